"""Packed groups through a model give what separate sequences give: log-probs and every gradient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.config.model import ModelConfig
from rlhf.kernels.token_stats import api
from rlhf.models.layers import shared_prefix as attention
from rlhf.models.loading import load_policy
from rlhf.models.packing import GroupSpan, Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.models.self_test import forward_error
from tests.support import ALONE, policy_of


def ragged(seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, 99, (n,), generator=generator)

    prompts = [tokens(17), tokens(1), tokens(5)]
    completions = [[tokens(n) for n in lengths] for lengths in ((7, 3, 11), (4,), (1, 6, 6, 2))]
    return pack(prompts, completions)


def loss_and_gradients(policy: Policy, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
    policy.model.zero_grad()
    statistics = policy.statistics(packed, temperature=0.7, want=("logprob", "entropy"))
    assert statistics.logprob is not None and statistics.entropy is not None
    weights = torch.linspace(-1, 1, len(packed.targets), dtype=statistics.logprob.dtype)
    (statistics.logprob * weights + 0.1 * statistics.entropy).sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return statistics.logprob.detach(), gradients


def test_a_gpu_is_never_asked_how_many_tokens_there_are(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Counting unmasked tokens on the GPU would make the host wait in each pass."""

    def count(targets: Tensor, num_unmasked: int | None) -> int:
        assert num_unmasked == len(targets)
        return len(targets)

    monkeypatch.setattr(api, "_count", count)
    head = policy_of(tiny_model_dir).head
    hidden = torch.randn(5, head.module.in_features)
    found = head.statistics(hidden, torch.arange(5), temperature=1.0, want=("logprob",)).logprob
    assert found is not None and found.shape == (5,)


@pytest.fixture(params=[0, 1000], ids=["repeated", "folded"])
def fold_up_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(attention, "FOLD_UP_TO", request.param)
    return request.param


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefix_equals_padded_in_float64(
    tiny_model: Callable[[str], Path], family: str, checkpointing: bool, fold_up_to: int
):
    shared = policy_of(tiny_model(family), packing="shared_prefix", dtype=torch.float64)
    plain = policy_of(tiny_model(family), packing="padded", dtype=torch.float64)
    if checkpointing:
        shared.checkpoint_activations()
    packed = ragged()
    logprobs, gradients = loss_and_gradients(shared, packed)
    expected, expected_gradients = loss_and_gradients(plain, packed)
    torch.testing.assert_close(logprobs, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-10 * scale, name


def test_in_float32_shared_prefix_is_no_further_from_the_truth_than_padded(
    tiny_model_dir: Path, fold_up_to: int
):
    packed = ragged()
    truth, _ = loss_and_gradients(policy_of(tiny_model_dir, dtype=torch.float64), packed)
    shared, _ = loss_and_gradients(policy_of(tiny_model_dir, packing="shared_prefix"), packed)
    plain, _ = loss_and_gradients(policy_of(tiny_model_dir, packing="padded"), packed)
    assert (shared - truth).abs().max() <= (plain - truth).abs().max() + 1e-6


def test_padding_beside_huge_scores_leaves_no_nan():
    """A ragged group: padded rows would weigh real keys by exp(score - another row's normaliser)."""
    lengths, prompt = (40, 3), 130
    span = GroupSpan(0, prompt, lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, prompt + sum(lengths), 8)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k[0, 0, prompt : prompt + 3], q[0, 0, prompt + 40 :] = 20.0, 20.0
    k[0, 0, prompt + 40 :] = 20.0
    tensors = [t.requires_grad_() for t in (q, k, v)]
    output, _ = attention.shared_prefix_attention(torch.nn.Identity(), q, k, v, None, spans=(span,))
    output.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in tensors if t.grad is not None)


def test_dropout_is_off_in_training_mode_too(tiny_model: Callable[[str], Path], tmp_path: Path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))
    policy = policy_of(folder, packing="padded")
    policy.checkpoint_activations()
    one, two = (policy.statistics(ragged(), temperature=1.0, want=("logprob",)).logprob for _ in range(2))
    assert one is not None and two is not None and torch.equal(one, two)


def test_each_group_is_alone_in_its_attention(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir, packing="shared_prefix")
    packed = ragged()
    together = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert together is not None
    first = packed.spans[0]
    prompt, rest = packed.token_ids[: first.prompt], packed.token_ids[first.prompt : first.end]
    alone = pack([prompt], [list(rest.split(list(first.completions)))])
    expected = policy.statistics(alone, temperature=1.0, want=("logprob",)).logprob
    assert expected is not None
    torch.testing.assert_close(together[: len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_a_softcapped_model_with_sliding_windows_is_padded_and_correct(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    policy = policy_of(tiny_model("gemma2"))
    assert policy.layout == "padded"
    assert len(caplog.records) == 1 and "caps attention logits; sequences are padded" in caplog.text
    assert forward_error(policy) is None
    for packing in ("shared_prefix", "packed"):
        with pytest.raises(ModelError, match=rf"model.packing is {packing}, but .* cannot: it caps"):
            policy_of(tiny_model("gemma2"), packing=packing)


@pytest.mark.parametrize("shape", ["mistral", "gemma3_text"])
def test_a_model_with_sliding_windows_is_packed_without_sharing_and_says_so_once(
    tiny_model: Callable[[str], Path], shape: str, caplog: pytest.LogCaptureFixture
):
    policy = policy_of(tiny_model(shape))
    assert policy.layout == "packed"
    assert len(caplog.records) == 1
    assert "are not shared within a group, because it attends to a sliding window of 16" in caplog.text
    with pytest.raises(
        ModelError, match=r"model.packing is shared_prefix, but .* sliding window of 16 tokens"
    ):
        policy_of(tiny_model(shape), packing="shared_prefix")


@pytest.mark.parametrize("shape", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_without_sharing_equals_padded_in_float64(
    tiny_model: Callable[[str], Path], shape: str, checkpointing: bool
):
    policy = policy_of(tiny_model(shape), packing="packed", dtype=torch.float64)
    plain = policy_of(tiny_model(shape), packing="padded", dtype=torch.float64)
    if checkpointing:
        policy.checkpoint_activations()
    # prompts of 17 tokens and more are longer than the window
    logprobs, gradients = loss_and_gradients(policy, ragged())
    expected, expected_gradients = loss_and_gradients(plain, ragged())
    torch.testing.assert_close(logprobs, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-10 * scale, name


def test_a_head_of_another_kind_is_noticed(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    assert forward_error(policy) is None

    def louder(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * 1.1

    policy.head.module.register_forward_hook(louder)
    assert forward_error(policy) is not None


def test_exact_kl_of_a_policy_with_itself_is_zero_and_of_another_is_not(tiny_model_dir: Path):
    policy, reference = policy_of(tiny_model_dir), policy_of(tiny_model_dir)
    same = policy.statistics(ragged(), temperature=1.0, want=("logprob", "kl"), reference=reference)
    assert same.kl is not None and same.kl.abs().max() < 1e-6
    with torch.no_grad():
        policy.head.module.weight.mul_(1.5)
    other = policy.statistics(ragged(), temperature=1.0, want=("logprob", "kl"), reference=reference)
    assert other.kl is not None and other.kl.min() > 0


def test_a_missing_folder_says_so_before_anything_loads():
    with pytest.raises(ModelError, match="there is no model folder"):
        load_policy(ModelConfig(path="./nowhere"), "./nowhere", ALONE.device)
