"""`JudgeSpec`: the settings of a pairwise judge; finds and imports it, and reads what it answers.

    def judge(prompts, completions, **columns) -> list[float | int | None]

This is the signature of TRL's pairwise judges: `completions` has two completions for each prompt. An answer
is a **float**: P(the first one is better), from 0 to 1; or an **int**, as in TRL: the index of the better
one, so that 0 says the first and 1 the second; or -1 or None: no verdict. A bool is refused, because True
could mean either. Prompts, completions (of an episode all its messages), columns, `params` and classes are as
for reward functions (rlhf/rewards/plugin.py).

An object or a class with the method `judge(prompts, completions, shuffle_order=...)` and without `__call__`,
a judge of TRL, gets text, as from TRL's trainers, and `shuffle_order=False`: which completion stands first is
decided here (`reward.preference.both_orders`).
"""

from __future__ import annotations

import inspect
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar

from rlhf.rewards.builtin import as_text, compared_texts
from rlhf.rewards.plugin import Reward, RewardSpec, find
from rlhf.rewards.signature import called_by, parameters_of, signature_of
from rlhf.rewards.workers.return_values import WrongReturn, read_values

BUILT_IN = {
    "pair_judge": "rlhf.rewards.judges.chat:PairJudge",
    "pair_model": "rlhf.rewards.judges.models:PairModel",
    "pair_rewards": "rlhf.rewards.judges.models:PairRewards",
}


@dataclass(frozen=True, slots=True)
class JudgeSpec(RewardSpec):
    """The settings of a judge; a "sample" is one comparison. Example: `JudgeSpec("my_judge.py:shorter")`."""

    kind: ClassVar[str] = "judge"
    scored: ClassVar[str] = "comparison"
    score: ClassVar[str] = "verdict"
    none_given: ClassVar[str] = "the judge gave none (None or -1); RUN/rewards.log has what it printed"

    def load(self) -> Reward:
        return load_judge(self)


@dataclass(frozen=True, slots=True)
class Judge(Reward):
    """A judge that is imported; calling it returns P(the first is better) of each comparison, or None."""

    is_of_trl: bool = False

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        given = dict(arguments)
        if self.is_of_trl:
            given |= {
                "prompts": [as_text(prompt) for prompt in given["prompts"]],
                "completions": [list(compared_texts(*pair)) for pair in given["completions"]],
            }
        # not super(): a dataclass with slots is another class than the one that super() means
        returned = Reward.__call__(self, given)
        count = len(given["completions"])
        return (
            _read_later(returned, count) if inspect.iscoroutine(returned) else read_verdicts(returned, count)
        )


def load_judge(spec: RewardSpec) -> Judge:
    """Imports the judge that a spec names, and makes the object if it is a class.

    Raises ValueError when there is none, it cannot be called, or it does not take one of `params`. An
    exception of the imported module or of the class is passed on.
    """
    found = find(spec, BUILT_IN)
    params = dict(spec.params)
    is_class = inspect.isclass(found)
    if is_class:
        parameters_of(spec.called, found, params)
        found, params = found(**params), {}
    is_of_trl = not callable(found)
    if is_of_trl:
        found = getattr(found, "judge", None)
    if not callable(found):
        raise ValueError(
            f"judge {spec.path} must be a function, or a class or object with __call__ or the method judge"
        )
    called = called_by(found)
    named, takes_any = parameters_of(spec.called, called, params)
    if "shuffle_order" in named:
        params["shuffle_order"] = False
    signature = signature_of(named, takes_any, called, params, is_class=is_class)
    # a judge compares by its nature, and gets both completions
    return Judge(found, params, replace(signature, compares=""), is_of_trl)


def read_verdicts(returned: object, count: int) -> list[float | None]:
    """P(the first is better) of each comparison; None: no verdict. Raises WrongReturn."""
    return [_verdict(_plain(value)) for value in read_values(returned, count, "verdicts, one a pair")]


def _verdict(value: Any) -> float | None:
    expected = (
        "must return for each pair a float, P(the first is better), or an int: 0 the first, 1 the second"
    )
    if value is None:
        return None
    if isinstance(value, bool):
        raise WrongReturn(f"{expected}; got {value}, which could mean either: return float(first is better)")
    if isinstance(value, Integral):
        known = {0: 1.0, 1: 0.0, -1: None}
        if int(value) not in known:
            raise WrongReturn(f"{expected}, -1 none; got {value}")
        return known[int(value)]
    if not isinstance(value, float):
        raise WrongReturn(f"{expected}; got {type(value).__name__} {value!r:.80}")
    # NaN passes, and is counted as a failure of this comparison
    if value < 0.0 or value > 1.0:
        raise WrongReturn(f"{expected}; a float must lie between 0 and 1, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    """Arrays and tensors, of any size, as lists and numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


async def _read_later(returned: Coroutine[Any, Any, Any], count: int) -> list[float | None]:
    return read_verdicts(await returned, count)
