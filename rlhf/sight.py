"""Whether packed groups with pictures give what the model's own forward gives; tried when it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.packing import pack
from rlhf.pictures import noise
from rlhf.typed import integers
from rlhf.types import Images

Policy = Any
"""That of rlhf/policy.py, which asks."""


@torch.no_grad()
def sight_error(policy: Policy) -> str | None:
    """The difference on a few tokens after two pictures; None when there is hardly any."""
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
    layout, policy.layout = policy.layout, "padded"
    own = [
        torch.cat([_by_its_own_forward(policy, prompt, i, completion) for completion in completions])
        for prompt, i in zip(prompts, images, strict=True)
    ]
    policy.layout = layout
    # the pictures have one size, so the two prompts have the same tokens
    return difference(got, torch.cat(own), torch.cat(own[::-1]), "picture")


def difference(got: Tensor, want: Tensor, elsewhere: Tensor, other: str) -> str | None:
    """In words, None when it is less than a hundredth of what another prompt (or picture) makes."""
    signal, error = (elsewhere - want).abs().max().item(), (got - want).abs().max().item()
    if error <= 0.01 * signal + 1e-5:
        return None
    return f"by {error:.2g} nats, where another {other} makes {signal:.2g}"


def _by_its_own_forward(policy: Policy, prompt: Tensor, images: Images, completion: Tensor) -> Tensor:
    assert policy.vision is not None
    inputs = policy.vision.processor.inputs(images, integers(prompt))
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(completion)))
    moved = {name: tensor.to(prompt.device) for name, tensor in inputs.items()}
    logits = policy.model(input_ids=torch.cat([prompt, completion])[None], **moved).logits
    logprobs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, completion[:, None])[:, 0]
