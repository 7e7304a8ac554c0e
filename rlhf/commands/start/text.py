"""The text of a first config: each value with the reason for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf.commands.start.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the user chose, or what stands for it."""

    file: str
    """The config that is written."""
    model: str
    data: str
    held_out: str | None
    reward: str


def config_text(chosen: Chosen, sizes: Sizes, *, memory: str = "") -> str:
    """The config as YAML with comments. `memory`: the estimate, in words."""
    sections = (
        _head(chosen, sizes),
        _model(chosen, sizes),
        _data(chosen, sizes),
        _method(chosen),
        _rollout(sizes),
        _learner(sizes, memory),
    )
    return "".join(f"{line}\n" for lines in sections for line in lines)


def _head(chosen: Chosen, sizes: Sizes) -> Iterator[str]:
    file = chosen.file
    passes = sizes.steps * sizes.prompts_per_step / max(sizes.prompts, 1)
    yield "# Written by rlhf init. Paths are relative to the folder in which rlhf is called."
    yield f"#   rlhf check {file}               checks model, data and reward, estimates memory and time"
    yield f"#   rlhf check {file} --settings    also shows every other setting"
    yield f"#   rlhf train {file}               Ctrl-C saves and leaves; checkpoint.resume=auto goes on"
    yield f"run_dir: {_scalar(f'runs/{Path(file).stem}')}"
    yield (
        f"# with {sizes.prompts_per_step} prompts a step each of the {sizes.prompts} prompts comes up "
        f"{passes:.1f} times in the mean"
    )
    yield f"steps: {sizes.steps}"


def _model(chosen: Chosen, sizes: Sizes) -> Iterator[str]:
    yield "model:"
    yield f"  path: {_scalar(chosen.model)}"
    if sizes.gradient_checkpointing:
        yield "  # activations are computed again instead of kept: less memory, about a third more time"
        yield "  gradient_checkpointing: true"
    if sizes.lora:
        yield "  # only an adapter is trained: the optimizer of all weights would not fit into memory"
        yield "  lora: {rank: 16}"


def _data(chosen: Chosen, sizes: Sizes) -> Iterator[str]:
    yield "data:"
    yield f"  train: {_scalar(chosen.data)}"
    yield "  # prompts that training never shows: without them learning cannot be told from memorising"
    yield "  # eval: FILE" if chosen.held_out is None else f"  eval: {_scalar(chosen.held_out)}"
    yield f"  # the longest prompt has {sizes.longest} tokens, chat template included"
    yield f"  max_prompt_tokens: {sizes.max_prompt_tokens}"


def _method(chosen: Chosen) -> Iterator[str]:
    yield "reward:"
    yield "  functions:"
    yield f"    - path: {_scalar(chosen.reward)}"
    yield "algorithm:"
    yield "  name: grpo"
    yield "  # 0: nothing holds the model near its start, and no second model is in memory"
    yield "  kl: {coef: 0.0}"


def _rollout(sizes: Sizes) -> Iterator[str]:
    yield "rollout:"
    yield "  # completions of one prompt are compared: a prompt teaches where some succeed and some fail"
    yield f"  prompts_per_step: {sizes.prompts_per_step}"
    yield f"  group_size: {sizes.group_size}"
    yield "  # longer completions are cut: raise it where length/truncated of the run is above 0.1"
    yield f"  max_completion_tokens: {sizes.max_completion_tokens}"
    if sizes.kv_cache_gib is not None:
        yield "  # groups that do not fit into the cache wait"
        yield f"  kv_cache_gib: {sizes.kv_cache_gib:g}"


def _learner(sizes: Sizes, memory: str) -> Iterator[str]:
    yield "learner:"
    yield "  # 2e-5 suits 135M weights, 1e-6 those of billions; an adapter takes ten times as much"
    yield f"  lr: {sizes.lr:.1e}".replace("e-0", "e-")
    yield "  # tokens of one forward and backward pass: it decides about memory, not about results"
    yield f"  microbatch_tokens: {sizes.microbatch_tokens}"
    if memory:
        yield f"# estimated memory: {memory}"


def _scalar(text: str) -> str:
    """A text as a value of YAML, in one line."""
    dumped = yaml.safe_dump(text, allow_unicode=True, width=10**6)
    return dumped.removesuffix("...\n").strip()
