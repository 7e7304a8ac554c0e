"""Recomputed activations have the same bits, are not kept for the backward pass, and leak nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from rlhf.config.model import LoraConfig
from rlhf.models.layers.gated_mlp import lighten_mlps
from rlhf.models.layers.recompute import memory_of, recomputable, recomputing, unchanged
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from tests.support import policy_of

SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
KINDS: list[Any] = [(LlamaMLP, LlamaConfig), (Qwen3MLP, Qwen3Config), (GemmaMLP, GemmaConfig)]


def ragged() -> Packed:
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, 99, (n,), generator=generator)

    # prompts of several lengths, one of them longer than its completions, and a group of one completion
    return pack(
        [tokens(5), tokens(140), tokens(9)],
        [[tokens(4), tokens(7)], [tokens(6), tokens(6), tokens(2)], [tokens(3)]],
    )


def states_and_gradients(policy: Policy, *, recompute: bool) -> list[Tensor]:
    """Hidden states and gradients; without `recompute` by the function below the decorator of `hidden`."""
    hidden: Any = policy.hidden
    states = hidden(ragged()) if recompute else hidden.__wrapped__(policy, ragged())
    states.backward(torch.linspace(-1, 1, states.numel()).view_as(states).to(states.dtype))
    found = [states.detach()]
    for parameter in policy.model.parameters():
        if parameter.grad is not None:
            found.append(parameter.grad)
            parameter.grad = None
    return found


def kept(run: Callable[[], Any], *, recompute: bool) -> int:
    """Bytes of the memory that a forward pass keeps; memory shared by several tensors counts once."""
    alive: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return alive.setdefault(memory_of(tensor), tensor)

    with recomputing(keep) if recompute else saved_tensors_hooks(keep, unchanged):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_states_and_gradients_are_the_same_bits(
    tiny_model: Callable[[str], Path], shape: str, dtype: torch.dtype
) -> None:
    policy = policy_of(tiny_model(shape), dtype=dtype)
    plain = states_and_gradients(policy, recompute=False)
    again = states_and_gradients(policy, recompute=True)
    assert len(plain) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("how", ["adapter", "checkpointing", "padded"])
def test_they_are_the_same_bits_with_an_adapter_with_checkpointing_and_with_padded_rows(
    tiny_model_dir: Path, how: str
) -> None:
    policy = policy_of(tiny_model_dir, packing="padded" if how == "padded" else "auto")
    if how == "adapter":
        policy.add_adapter(LoraConfig(rank=2), seed=0)
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
    if how == "checkpointing":
        policy.checkpoint_activations()
    plain = states_and_gradients(policy, recompute=False)
    again = states_and_gradients(policy, recompute=True)
    assert len(plain) == len(again) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_an_mlp_keeps_its_two_projections_alone(kind: Any, config: Any) -> None:
    mlp = kind(config(**SMALL))
    x = torch.randn(1, 5, 8, requires_grad=True)
    plain = mlp(x)
    want = torch.autograd.grad(plain.sum(), [x, *mlp.parameters()])
    assert lighten_mlps(nn.Sequential(mlp)) == 1
    with recomputing():
        y = mlp(x)
    assert torch.equal(y, plain)
    got = torch.autograd.grad(y.sum(), [x, *mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    weights, per_number = 4 * 3 * 8 * 12, 4 * 5
    assert kept(lambda: mlp(x), recompute=True) == weights + per_number * (8 + 2 * 12)
    assert kept(lambda: mlp(x), recompute=False) == weights + per_number * (8 + 4 * 12)


def test_mlps_on_the_meta_device_are_prepared_and_others_stay_as_they_are() -> None:
    with torch.device("meta"):
        without_weights = nn.Sequential(LlamaMLP(LlamaConfig(**SMALL)))
    assert lighten_mlps(without_weights) == 1
    sparse = Gemma3nTextConfig(
        hidden_size=8, intermediate_size=[12, 12], num_hidden_layers=2, activation_sparsity_pattern=[0.5, 0.0]
    )
    others = [Phi3MLP(Phi3Config(pad_token_id=0, **SMALL)), Gemma3nTextMLP(sparse, 0)]
    assert lighten_mlps(nn.Sequential(*others)) == 0
    assert lighten_mlps(nn.Sequential(Gemma3nTextMLP(sparse, 1))) == 1, "one that is not made sparse"


def leaf() -> Tensor:
    return torch.randn(4, 6, requires_grad=True)


def test_the_graph_can_be_gone_through_twice_and_differentiated_twice() -> None:
    x = leaf()

    def cube_of_exp(x: Tensor, named: Callable[..., Tensor]) -> Tensor:
        e = named(x.exp(), torch.exp, x)
        return (e * e.view(-1).view(4, 6) * e).sum()

    want = torch.autograd.grad(cube_of_exp(x, lambda y, *_: y), x)[0]
    with recomputing():
        y = cube_of_exp(x, recomputable)
    for _ in range(2):
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        assert torch.equal(first, want)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 3 * want)


def test_a_recomputed_value_lives_until_its_last_use() -> None:
    x, calls = leaf(), list[int]()

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    with recomputing():
        twice = recomputable(2 * x, double, x)
        y = F.linear(twice, torch.ones(3, 6, requires_grad=True)) + F.linear(
            twice, torch.ones(3, 6, requires_grad=True)
        )
        recipe: Any = weakref.ref(vars(twice)["recipe"])
        del twice
    y.sum().backward()
    assert len(calls) == 1
    assert recipe() is None


def test_what_was_written_to_is_kept_or_refused() -> None:
    x = leaf()
    with recomputing():
        # a result that was changed is not what its recipe says
        result = recomputable(2 * x, torch.mul, x, torch.tensor(2.0))
        result.add_(1.0)
        y = result * result
    y.sum().backward()
    torch.testing.assert_close(x.grad, 4 * (2 * x + 1).detach())
    with recomputing():
        scaled = x * 3
        y = recomputable(scaled.exp(), torch.exp, scaled).square()
        scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="was written to"):
        y.sum().backward()


def test_a_checkpointed_layer_keeps_no_inputs_of_recipes() -> None:
    x, made = leaf(), list[weakref.ref[Any]]()

    def layer(x: Tensor) -> Tensor:
        gate = x * 2
        result = recomputable(gate.sigmoid(), torch.sigmoid, gate)
        made.extend(weakref.ref(recipe) for name, recipe in vars(result).items() if name == "recipe")
        return result.square()

    with recomputing():
        y: Any = checkpoint(layer, x, use_reentrant=False)
    assert len(made) == 1 and made[0]() is None
    y.sum().backward()
    want = torch.autograd.grad((2 * x).sigmoid().square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize(("shape", "less"), [("llama", 2 * 64 + 2 * 32), ("gemma", 2 * 64)])
def test_a_policy_keeps_less(tiny_model: Callable[[str], Path], shape: str, less: int) -> None:
    """`less`: elements per token that each of the two layers saves, by its MLP and by its norms if fused."""
    policy, packed = policy_of(tiny_model(shape)), ragged()
    hidden: Any = policy.hidden
    plain, lean = (kept(lambda: hidden.__wrapped__(policy, packed), recompute=flag) for flag in (False, True))
    assert plain - lean >= 4 * len(packed.token_ids) * 2 * less
