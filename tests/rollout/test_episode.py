"""A trajectory of several turns, by hand."""

from __future__ import annotations

from dataclasses import replace

from rlhf.rollout.episode import Episode, Observation, of_turns, trajectory_of, turn_metrics
from rlhf.tensors.candidates import Candidates
from rlhf.types import Completion, FinishReason, Prompt, Source, VersionSpan

FIRST = Completion(
    "p", 0, (5, 2), (-0.5, -1.0), FinishReason.STOP, (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))
)
SECOND = Completion("p", 0, (6,), (-2.0,), FinishReason.STOP, (VersionSpan(4, 0, 1),))
TURNS = (FIRST, Observation((7, 8, 9)), SECOND)


def trajectory(*turns: Completion | Observation):
    return of_turns(turns, finish_reason=FinishReason.STOP, text="", reward=1.0, objectives={})


def test_turns_lie_end_to_end() -> None:
    found = trajectory(*TURNS)
    assert found.token_ids == (5, 2, 7, 8, 9, 6)
    assert found.loss_mask == (True, True, False, False, False, True)
    assert found.turns == (0, 0, 0, 0, 0, 1)
    assert found.rollout_logprobs == (-0.5, -1.0, 0.0, 0.0, 0.0, -2.0)
    assert found.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2), VersionSpan(4, 5, 6))
    assert found.candidates is None and found.source == Source.POLICY


def test_a_turn_without_logprobs_or_of_another_model_says_so_for_all() -> None:
    other = replace(SECOND, source=Source.REFERENCE, rollout_logprobs=None, versions=())
    found = trajectory(FIRST, Observation((7,)), other)
    assert found.rollout_logprobs is None and found.source == Source.REFERENCE


def test_observations_have_no_candidates() -> None:
    first = replace(FIRST, candidates=Candidates.of([[5, 1], [2, 3, 4]]))
    second = replace(SECOND, candidates=Candidates.of([[6]]))
    found = trajectory(first, Observation((7, 8)), second).candidates
    assert found is not None
    assert found.sizes.tolist() == [2, 3, 0, 0, 1] and found.ids.tolist() == [5, 1, 2, 3, 4, 6]


def test_metrics_of_turns() -> None:
    one = Episode(
        prompt=Prompt("p", (1,), ""), index=0, turns=TURNS, finish_reason=FinishReason.STOP, calls=2, errors=1
    )
    lost = replace(one, turns=(FIRST,), calls=0, errors=0, malformed=1, truncated=3, lost="why")
    found = {name: metric.value for name, metric in turn_metrics([one, lost]).items()}
    assert found == {
        "turns/mean": 1.5,
        "turns/tool_calls": 1.0,
        "turns/tool_errors": 0.5,
        "turns/malformed": 0.5,
        "turns/truncated": 1.5,
        "turns/lost": 0.5,
        "length/observed": 1.5,
    }
    assert turn_metrics([FIRST]) == {}
    assert trajectory_of(one, text="", reward=None, objectives={}).messages == ()
