"""RUN/samples.jsonl: the sampled tokens, with their advantages and entropies."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from statistics import fmean

import pytest
import torch

from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.monitoring.samples import ShownGroups, TokenTexts
from rlhf.rewards import Rewards, RewardSpec
from rlhf.types import Completion, FinishReason, Prompt
from tests.support import bandit_settings, group, metrics_of, random_groups, train, unscored


@pytest.mark.parametrize("learner", [{}, {"epochs": 2, "minibatches": 2}], ids=["one_update", "four_updates"])
def test_entropies_of_all_tokens_average_to_the_metric_of_the_first_pass(
    tmp_path: Path, tiny_model_dir: Path, learner: dict[str, int]
) -> None:
    settings = bandit_settings(tmp_path, tiny_model_dir, learner=learner, monitor={"samples_per_step": 99})
    train(settings | {"steps": 2})
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1] * 8 + [2] * 8
    for step in metrics_of(tmp_path):
        shown = [c for r in records if r["step"] == step["step"] for c in r["completions"]]
        learned = [c for c in shown if "entropy" in c]
        assert learned and sum(c["num_tokens"] for c in shown) == step["rollout/tokens"]
        if not learner:
            mean = fmean(e for c in learned for e in c["entropy"])
            assert mean == pytest.approx(step["entropy"], abs=2e-4)
        for completion in learned:
            assert len(completion["entropy"]) == len(completion["tokens"]) == completion["num_tokens"]
            text = re.sub(r"<\|\w+\|>", "", "".join(completion["tokens"]))
            assert text == completion["text"]
        # a group whose rewards are all equal is skipped, so that there is no forward pass of it
        assert all(c["advantage"] == 0 for c in shown if "entropy" not in c)


def test_what_was_not_learned_from_has_no_advantage_and_shifts_no_other() -> None:
    class Numbers:
        def decode(self, token_ids: list[int]) -> str:
            return f"<{token_ids[0]}>"

    from rlhf.types import is_learnable

    shown = group("p", [1], [[5, 6], [7], [8, 9]], [1.0, None, 0.0])
    learned = [t for t in shown.trajectories if is_learnable(t)]
    experience = unscored([type(shown)(shown.prompt, tuple(learned)), *random_groups(0, sizes=[2])])
    experience.advantages[:4] = torch.tensor([1.0, 1.0, -0.5, -1.0])
    entropy = torch.full_like(experience.advantages, 0.25)
    entropy[2] = torch.nan
    (record,) = ShownGroups(3, (shown,), experience).records(TokenTexts(Numbers()), entropy)
    first, second, third = record["completions"]
    assert (
        first["tokens"] == ["<5>", "<6>"] and first["advantage"] == 1.0 and first["entropy"] == [0.25, 0.25]
    )
    assert "advantage" not in second and "entropy" not in second
    assert third["advantage"] == [-0.5, -1.0] and "entropy" not in third


def test_a_step_that_is_cut_short_is_shown_without_entropies(tmp_path: Path) -> None:
    from tests.monitoring.test_monitor import group as scored
    from tests.monitoring.test_monitor import monitor

    with monitor(tmp_path, samples=1) as m:
        m.samples(1, [scored("a")])
    assert json.loads((tmp_path / "samples.jsonl").read_text())["prompt_id"] == "a"


def test_what_a_reward_function_logs_of_a_completion_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy\ndef right(completions, log_extra):\n"
        "    log_extra('letters', [numpy.int64(len(c)) for c in completions])\n"
        "    log_extra('why', [[c, {1, 2}] if c == 'b' else c for c in completions])\n"
        "    return [0.0] * len(completions)\n"
    )
    texts = ["a", "b", "long", "a"]
    spec = RewardSpec(f"{tmp_path}/own.py:right", cache=9)
    completions = [Completion("p", i, (5,), None, FinishReason.STOP, ()) for i in range(4)]
    with closing(Rewards([spec], ())) as rewards:
        (scored,), _ = rewards.score(
            [Prompt("p", (1,), "p")], [completions], [texts], trainer_state={"global_step": 0}
        )
    # the fourth is equal to the first, and is not scored again
    assert group_of(group_state(scored), {"p": scored.prompt}) == scored
    (record,) = ShownGroups(1, (scored,), None).records(None, None)
    assert [c["logged"] for c in record["completions"]] == [
        {"right/letters": 1, "right/why": "a"},
        {"right/letters": 1, "right/why": "['b', {1, 2}]"},
        {"right/letters": 4, "right/why": "long"},
        {"right/letters": 1, "right/why": "a"},
    ]
