"""The section `pairs`: which completions of a prompt a preference loss compares, and with what label."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlhf.algos.preference.pairing import RULES
from rlhf.config.section import Section


class PairsConfig(Section):
    """How the completions of a prompt become pairs, for preference algorithms (docs/preferences.md). Two
    completions, as those of a file with `chosen` and `rejected`, are one pair by any rule."""

    rule: str = "best_worst"
    """Pairs of a group of several completions. `best_worst`: the highest against the lowest reward.
    `best_second`: the highest against the next. `best_random`: the highest against a random other one.
    `first_two`: the first two. `all`: every two. `of_data`: the best against the worst of those that the
    data has for the prompt (HyPO, SPAC). `dno_prct`: every two of which the better has a reward of 5 or more
    and leads by 2, or by 1 if the policy wrote it (DNO). Or a function of your own, as
    `path/file.py:function`."""
    labels: Literal["auto", "hard", "reward", "preference"] = "auto"
    """The probability that the better one of a pair is really better. `auto`: that of the data's column
    `probability`, 1 where there is none, and 1 where a judge's win rates are the rewards, as in TRL's online
    DPO. `hard`: 1. `reward`: the sigmoid of the difference of the two rewards. `preference`: what the judge,
    or the data's column `probability`, says of the two; a pair of which nothing is said is left out."""
    min_gap: Annotated[float, Field(ge=0.0)] = 0.0
    """Two completions whose rewards differ by less than this, or not at all, are no pair."""
    truncated: Literal["keep", "drop", "lose"] = "keep"
    """Completions that were cut at their limit. `keep`: compared like others. `drop`: in no pair. `lose`:
    worse than all that ended by themselves."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 0.0
    """What each token takes off a reward before completions are compared."""

    @field_validator("rule")
    @classmethod
    def is_known_or_a_function(cls, rule: str) -> str:
        if rule not in RULES and ":" not in rule:
            raise ValueError(f"must be one of {', '.join(RULES)} or path/file.py:function, got {rule!r}")
        return rule
