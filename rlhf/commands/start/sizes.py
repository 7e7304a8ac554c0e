"""The sizes of a first config: from the lengths of the data, the model, and the memory of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from rlhf.commands.check import SAMPLE, answer_lengths, quantile, spaced
from rlhf.compute_dtype import with_dtype
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.devices import this_device
from rlhf.inputs import Inputs
from rlhf.models.attention import constant_up_to
from rlhf.models.pretrained import load_model_config, text_settings
from rlhf.models.sizes import model_sizes
from rlhf.preflight.estimate import Estimate, estimate
from rlhf.preflight.machine import Machine

ROUND = 64
"""Limits of tokens are multiples of it, where the model's positions allow."""
POSITIONS = 32768
"""Taken where a model names no limit."""
SHORTEST = 16
"""Fewer tokens than these for a completion are refused."""
FREE = 0.2
"""Share of the memory that stays free for what the estimate leaves out (docs/training.md)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the data, the model and the machine decide. Lengths are in tokens."""

    prompts: int
    longest: int
    """The longest prompt, chat template included."""
    max_prompt_tokens: int
    max_completion_tokens: int
    prompts_per_step: int
    group_size: int
    steps: int
    lr: float
    microbatch_tokens: int
    gradient_checkpointing: bool = False
    kv_cache_gib: float | None = None
    """None: the default."""
    lora: bool = False


def positions(model: str) -> int:
    """The number of tokens that the model at `model` has positions for. Raises ModelError."""
    config = load_model_config(model)
    limits = (text_settings(config).get("max_position_embeddings"), constant_up_to(config))
    return min([int(limit) for limit in limits if limit is not None], default=POSITIONS)


def first_sizes(room: int) -> Sizes:
    """Sizes with which all prompts can be read that a model with `room` positions can take."""
    return Sizes(0, 0, room - 1, 1, 1, 8, 20, 1e-6, room)


def measured_sizes(model: str, inputs: Inputs, room: int, max_completion_tokens: int | None) -> Sizes:
    """The sizes for the prompts of `inputs`, if memory is no concern.

    `max_completion_tokens`: given where the task is known. Raises ConfigError: the prompts leave no room.
    """
    on_cpu = this_device().type == "cpu"
    prompts = inputs.train.prompts
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if room - longest < SHORTEST:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and {model} positions for {room}, which leaves "
            f"{room - longest} for a completion: leave such prompts out, or take another --model"
        )
    wanted = max_completion_tokens or max(128 if on_cpu else 512, _references(inputs))
    limit = min(_rounded(longest), room - min(wanted, room - longest))
    completion = min(wanted, room - limit)
    at_once = 2 ** int(math.log2(min(len(prompts), 16 if on_cpu else 32)))
    weights = model_sizes(model, torch.float32).weights
    return Sizes(
        prompts=len(prompts),
        longest=longest,
        max_prompt_tokens=limit,
        max_completion_tokens=completion,
        prompts_per_step=at_once,
        group_size=8,
        steps=min(max(math.ceil(2 * len(prompts) / at_once), 20), 200),
        lr=2e-5 if weights < 200e6 else 1e-6,
        microbatch_tokens=max(4096 if on_cpu else 16384, _rounded(limit + completion)),
    )


def fitting(sizes: Sizes, config_of: Callable[[Sizes], Config], inputs: Inputs) -> tuple[Sizes, Estimate]:
    """The first sizes whose estimated memory leaves a fifth free here, or the smallest ones.

    In order: as they are, short microbatches, activations computed again, a smaller cache, an adapter.
    """
    machine: Machine | None = None
    found: tuple[Sizes, Estimate] | None = None
    for smaller in _smaller(sizes):
        config = with_dtype(config_of(smaller))
        if machine is None:
            dtype: torch.dtype = getattr(torch, config.model.dtype)
            machine = Machine.measured(this_device(), dtype, ranks_here=1)
        memory = estimate(config, inputs, world_size=1, machine=machine)
        found = (smaller, memory)
        if memory.peak <= (1 - FREE) * machine.memory:
            break
    assert found is not None
    return found


def _smaller(sizes: Sizes) -> Iterator[Sizes]:
    yield sizes
    shortest = _rounded(sizes.max_prompt_tokens + sizes.max_completion_tokens)
    sizes = replace(sizes, microbatch_tokens=min(sizes.microbatch_tokens, max(1024, shortest)))
    yield sizes
    sizes = replace(sizes, gradient_checkpointing=True)
    yield sizes
    sizes = replace(sizes, kv_cache_gib=1.0)
    yield sizes
    if find_spec("peft") is not None:
        yield replace(sizes, lora=True, lr=10 * sizes.lr)


def _references(inputs: Inputs) -> int:
    """The length that 95 % of the texts of a column keep to, in the column with the longest; 0: no texts."""
    lengths = answer_lengths(spaced(inputs.train.prompts, SAMPLE), inputs.tokenizer).values()
    return min(_rounded(max((quantile(counts, 0.95) for counts in lengths), default=0)), 2048)


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND
