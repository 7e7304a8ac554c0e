"""Self-test at loading: compares packed groups with the model's own forward on a few tokens.

There are three comparisons of the same form: log-probs of a policy, log-probs after prompts with images, and
hidden states of a trunk without a language-model head. Each returns a description of the difference, or None
where the two agree.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf.models.attention import DEFINITION, constant_up_to, set_attention
from rlhf.models.layers.shared_prefix import FOLD_UP_TO
from rlhf.models.packing import pack
from rlhf.models.policy import Policy, Trunk
from rlhf.models.pretrained import text_settings
from rlhf.models.vision.images import noise
from rlhf.torch_typed import integers
from rlhf.types import Images

LONG_PROMPT = FOLD_UP_TO + 2
"""Tokens of a prompt that is too long for `shared_prefix.py` to fold query heads: its other code path."""
COMPLETION_TOKENS = 7
"""Tokens of the longer of the two completions."""
TOLERANCE = 0.01
"""Largest allowed error, as a share of the change that another prompt or image makes."""


@torch.no_grad()
def forward_error(policy: Policy, window: int | None = None) -> str | None:
    """Compares log-probs of `policy` with those of the model's own forward over whole sequences.

    `window`: tokens of a sliding window, beyond which it is compared too.
    """
    prompts, others, completions = _short_and_long(policy.model, policy.head.module.out_features, window)
    packs = [pack([prompt], [completions]) for prompt in prompts]
    found = [policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob for packed in packs]
    got = torch.cat([logprobs for logprobs in found if logprobs is not None])
    with _own_attention(policy):
        expected, changed = (
            torch.cat([_full_forward(policy.model, prompt, completions) for prompt in several])
            for several in (prompts, others)
        )
        alone = _full_forward(policy.model, prompts[0], [completions[0][:1]])
    if _looks_ahead(alone, expected, changed):
        return "a token's log-prob depends on the tokens after it: this is no causal language model"
    return _difference(got, expected, changed, unit=" nats", other="prompt")


@torch.no_grad()
def image_error(policy: Policy) -> str | None:
    """Compares log-probs after prompts of two images each; None for a model without an image processor."""
    if policy.vision is None:
        return None
    processor, device = policy.vision.processor, policy.model.device
    text = f"a{processor.placeholder}b{processor.placeholder}c"
    images = [Images("self-test", (noise(64, 64, seed), noise(64, 96, seed))) for seed in (0, 1)]
    prompts = [torch.tensor(processor.token_ids(text, i), device=device) for i in images]
    letters = [i for i in range(2, 14) if i != processor.image_token_id]
    completions = [torch.tensor(part, device=device) for part in (letters[:7], letters[5:9])]
    packed = pack(prompts, [completions] * len(prompts), images)
    got = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert got is not None
    with _own_attention(policy):
        expected = [
            _full_forward_with_images(policy, prompt, i, completions)
            for prompt, i in zip(prompts, images, strict=True)
        ]
    # the images have the same sizes, so the two prompts have the same tokens and differ by the images alone
    return _difference(got, torch.cat(expected), torch.cat(expected[::-1]), unit=" nats", other="image")


@torch.no_grad()
def hidden_state_error(trunk: Trunk, window: int | None = None) -> str | None:
    """Compares hidden states of packed groups with those of padded rows, beyond a `window` too."""
    vocabulary = text_settings(trunk.model.config)["vocab_size"]
    prompts, others, completions = _short_and_long(trunk.model, vocabulary, window)

    def states(several: Sequence[Tensor]) -> Tensor:
        return torch.cat([trunk.hidden(pack([prompt], [completions])) for prompt in several])

    got = states(prompts)
    with _own_attention(trunk):
        expected, changed = states(prompts), states(others)
        alone = trunk.hidden(pack(prompts[:1], [[completions[0][:1]]]))
    if _looks_ahead(alone, expected, changed):
        return "a token's hidden states depend on the tokens after it: this is no causal language model"
    return _difference(got, expected, changed, unit="", other="prompt")


def _short_and_long(
    model: PreTrainedModel, vocabulary: int, window: int | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A short and a long prompt, the same two with another first token, and two completions, as token ids.

    On a CPU, the attention of a pack with the long prompt takes another code path than with the short one.
    The long one is half as long again as the `window`, if there is one, as far as there are positions.
    """
    length = max(LONG_PROMPT, (window or 0) * 3 // 2)
    limits = text_settings(model.config).get("max_position_embeddings"), constant_up_to(model.config)
    room = min(limit for limit in (*limits, length + COMPLETION_TOKENS) if limit)
    ids = torch.arange(2, length + 9, device=model.device) % vocabulary
    prompts = [ids[:5], ids[: min(length, room - COMPLETION_TOKENS)]]
    others = [torch.cat([ids[8:9], prompt[1:]]) for prompt in prompts]
    return prompts, others, [ids[5 : 5 + COMPLETION_TOKENS], ids[4:7]]


@contextmanager
def _own_attention(trunk: Trunk) -> Generator[None]:
    """Within this context the model computes on padded rows, with the attention that defines it."""
    layout, trunk.layout = trunk.layout, "padded"
    set_attention(trunk.model, DEFINITION)
    try:
        yield
    finally:
        trunk.layout = layout


def _looks_ahead(alone: Tensor, expected: Tensor, changed: Tensor) -> bool:
    """Whether the first row changes when the tokens after it are left out."""
    return bool((alone - expected[:1]).abs().max() > TOLERANCE * (changed - expected).abs().max() + 1e-5)


def _difference(got: Tensor, expected: Tensor, changed: Tensor, *, unit: str, other: str) -> str | None:
    """Describes by how much `got` differs from `expected`; None when they agree.

    The scale is the difference that another prompt (or image) makes: `changed` against `expected`. They agree
    when the largest error is within `TOLERANCE` of it.
    """
    signal, error = (changed - expected).abs().max().item(), (got - expected).abs().max().item()
    if error <= TOLERANCE * signal + 1e-5:
        return None
    return f"by {error:.2g}{unit}, where another {other} makes {signal:.2g}"


def _full_forward(model: PreTrainedModel, prompt: Tensor, completions: Sequence[Tensor]) -> Tensor:
    """Log-probs `[N]` of the completions' tokens by the model's own forward, head included."""
    parts = [
        _chosen(
            model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits, prompt, completion
        )
        for completion in completions
    ]
    return torch.cat(parts)


def _full_forward_with_images(
    policy: Policy, prompt: Tensor, images: Images, completions: Sequence[Tensor]
) -> Tensor:
    assert policy.vision is not None
    parts: list[Tensor] = []
    for completion in completions:
        inputs = policy.vision.processor.inputs(images, integers(prompt))
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(completion)))
        moved = {name: tensor.to(prompt.device) for name, tensor in inputs.items()}
        logits = policy.model(
            input_ids=torch.cat([prompt, completion])[None], use_cache=False, **moved
        ).logits
        parts.append(_chosen(logits, prompt, completion))
    return torch.cat(parts)


def _chosen(logits: Tensor, prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-probs of the completion's tokens, from the logits `[1, T, V]` of prompt and completion."""
    logprobs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, completion[:, None])[:, 0]
