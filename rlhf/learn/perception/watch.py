"""Five signs of KL hacking: the perception KL grows because completions lose touch with their prompts.

PAPO (arXiv:2507.06448) names the signs and one number: in the collapsed 7B run the KL's variance over tokens
was 8.4 times that of a healthy run. The other bounds are rules of thumb of this project. The last
`perception.watch_steps` steps are compared with as many steps at the start of the run, and with as many just
before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.perception import PerceptionConfig
from rlhf.metrics import Max, Metrics

Values = Mapping[str, float]
"""Metrics by name, each the mean over some steps."""
VARIANCE_OF_A_COLLAPSE = 8.4
WATCHED = (
    "perception/kl",
    "perception/kl_squared",
    "perception/entropy",
    "perception/masked_entropy",
    "clip_fraction/high",
    "reward/mean",
)


def _kl_doubled(first: Values, before: Values, last: Values) -> bool:
    return last["perception/kl"] >= 2.0 * max(first["perception/kl"], before["perception/kl"])


def _kl_varies(first: Values, before: Values, last: Values) -> bool:
    # variance = mean of squares - square of the mean
    at_first, now = (v["perception/kl_squared"] - v["perception/kl"] ** 2 for v in (first, last))
    return at_first > 0 and now >= VARIANCE_OF_A_COLLAPSE * at_first


def _more_clipped(first: Values, before: Values, last: Values) -> bool:
    name = "clip_fraction/high"
    return first.get(name, 0.0) < before.get(name, 0.0) < last.get(name, 0.0)


def _entropies_up(first: Values, before: Values, last: Values) -> bool:
    return all(
        last[name] >= 1.5 * first[name] for name in ("perception/entropy", "perception/masked_entropy")
    )


def _reward_halved(first: Values, before: Values, last: Values) -> bool:
    return last["reward/mean"] < 0.5 * max(first["reward/mean"], before["reward/mean"])


SIGNS: dict[str, Callable[[Values, Values, Values], bool]] = {
    "the perception KL has doubled": _kl_doubled,
    f"its variance over tokens is {VARIANCE_OF_A_COLLAPSE} times that of the first steps": _kl_varies,
    "more and more tokens are clipped at the upper bound": _more_clipped,
    "the entropies with and without the image are up by a half": _entropies_up,
    "the reward has fallen by half": _reward_halved,
}


class PerceptionWatch(Stateful):
    """Counts the signs after every step; `stops` is True once as many show as `perception.stop_at_signs`."""

    def __init__(self, section: PerceptionConfig) -> None:
        self.active = section.term is not None
        self.patience, self.limit = section.watch_steps, section.stop_at_signs
        self.steps: list[dict[str, float]] = []
        """Watched metrics of the first `watch_steps` steps, and of the last twice as many."""
        self.warned = False
        self.stops = False

    def look(self, metrics: Metrics) -> tuple[Metrics, list[str]]:
        """After each step: the number of signs as a metric, and warnings, each given once in a run."""
        if not self.active or "perception/kl" not in metrics:
            return {}, []
        self.steps.append({name: metrics[name].value for name in WATCHED if name in metrics})
        if len(self.steps) > 3 * self.patience:
            del self.steps[self.patience]
        shown = self.signs()
        texts: list[str] = []
        if len(shown) >= 2 and not self.warned:
            self.warned = True
            texts.append(
                f"the perception KL may be hacked: {'; '.join(shown)}. Lower perception.coef, or raise "
                "perception.entropy_coef and perception.masked_entropy_coef"
            )
        if self.limit is not None and len(shown) >= self.limit and not self.stops:
            self.stops = True
            texts.append(f"stopped by perception.stop_at_signs = {self.limit}: {'; '.join(shown)}")
        return {"perception/signs": Max(float(len(shown)))}, texts

    def signs(self) -> list[str]:
        """The signs that show now; none before three times `watch_steps` steps have been made."""
        n = self.patience
        if len(self.steps) < 3 * n:
            return []
        first, before, last = (_mean(self.steps[i * n : (i + 1) * n]) for i in range(3))
        return [text for text, holds in SIGNS.items() if holds(first, before, last)]

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "told": self.warned, "stops": self.stops}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.steps = [dict(step) for step in state["steps"]]
        self.warned, self.stops = state["told"], state["stops"] and self.limit is not None


def _mean(steps: list[dict[str, float]]) -> dict[str, float]:
    names = set[str].intersection(*(set(step) for step in steps))
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
