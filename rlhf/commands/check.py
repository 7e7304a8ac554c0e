"""`rlhf check`: shows what a run will do and what is likely to go wrong, without loading weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from rlhf.compute_dtype import slowness, with_dtype
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.devices import this_device
from rlhf.distributed.world import world_size
from rlhf.inputs import Inputs
from rlhf.monitoring.run_folder import RunFolder
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.preflight.resume import check_resume
from rlhf.preflight.trial import try_packing
from rlhf.preflight.tried_rewards import try_rewards
from rlhf.types import Prompt

T = TypeVar("T")
SAMPLE = 256
"""The number of prompts that are examined for the risk of truncation."""
LONG = 0.05
"""The share of reference answers over the limit above which a warning is given."""


def run_check(
    config: Config | RewardModelConfig, *, ranks: int | None = None, every_setting: bool = False
) -> Iterator[str]:
    """The lines to show, for `ranks` ranks, or for those that were started.

    Raises ValueError for everything that a run would refuse before it loads weights.
    """
    earlier = RunFolder(Path(config.run_dir).expanduser()).settings()
    config = with_dtype(config, earlier=earlier)
    if isinstance(config, RewardModelConfig):
        from rlhf.reward_model.trainer import RewardModelTrainer
        from rlhf.reward_model.trainer import describe as describe_reward_model

        trainer = RewardModelTrainer(config)
        try_packing(config.model, [config.model.path], None, None)
        yield from describe_reward_model(trainer)
    else:
        ranks = ranks or world_size()
        inputs = load_inputs(config, world_size=ranks)
        with closing(inputs.rewards):
            check_resume(config, inputs)
            yield from describe(config, inputs, world_size=ranks)
            yield from truncation(config, inputs)
            yield from try_rewards(inputs)
    if slow := slowness(config.model.dtype, this_device()):
        yield f"warning      {slow}"
    yield from _run_folder(config)
    if every_setting:
        yield from ("", "every setting in force:", "", *config.to_yaml().splitlines())


def truncation(config: Config, inputs: Inputs) -> Iterator[str]:
    """How near the data comes to the token limits: the lengths of prompts, and of texts in other columns.

    Reference answers stand for completions. A policy reasons before it answers, so if a reference answer does
    not fit, a completion will not fit either.
    """
    prompts = spaced(inputs.train.prompts, SAMPLE)
    limit = config.rollout.max_completion_tokens
    lengths = sorted(len(p.token_ids) for p in prompts)
    near = sum(n > 0.9 * config.data.max_prompt_tokens for n in lengths)
    yield (
        f"lengths      prompts: {quantile(lengths, 0.95)} tokens at 95 %, limit "
        f"{config.data.max_prompt_tokens}; {near} of {len(lengths)} examined are within a tenth of it"
    )
    for column, counts in answer_lengths(prompts, inputs.tokenizer).items():
        over = sum(n > limit for n in counts)
        yield (
            f"             column {column}: {quantile(counts, 0.5)} tokens in the median, "
            f"{quantile(counts, 0.95)} at 95 %; completions end at {limit}"
        )
        if over > LONG * len(counts):
            yield (
                f"warning      {over} of {len(counts)} texts in the column {column} are longer than "
                f"rollout.max_completion_tokens = {limit}: completions like them would be cut"
            )


def answer_lengths(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Sorted lengths (tokens) of the texts of each column; numbers and short labels are left out."""
    columns: Mapping[str, Any] = prompts[0].columns
    found: dict[str, list[int]] = {}
    for column in columns:
        texts = [p.columns[column] for p in prompts if isinstance(p.columns[column], str)]
        if texts and max(map(len, texts)) > 40:
            encoded = cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"]
            found[column] = sorted(len(ids) for ids in encoded)
    return found


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest of the sorted values such that at least `share` of them are no larger."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def spaced(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, evenly spaced."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _run_folder(config: Config | RewardModelConfig) -> Iterator[str]:
    folder = RunFolder(Path(config.run_dir).expanduser())
    folder.assert_ours()
    resumes = config.checkpoint.resume == "auto"
    if folder.has_run() and not resumes:
        yield (
            f"warning      {folder.path} holds a run, which rlhf train will not overwrite: set another "
            "run_dir, or checkpoint.resume=auto to continue it"
        )
    elif resumes:
        what = (
            "the run in the folder is continued"
            if folder.has_run()
            else "the folder has no run yet: one begins"
        )
        yield f"resume       {what}"
