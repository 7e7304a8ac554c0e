"""Datasets with completions: what is read, what is refused, and what a step draws from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf.algos.imitation import IMITATION
from rlhf.collect.offline import Draws, OfflineCollector, OfflineData, Sampling
from rlhf.collect.sampler import Hooks
from rlhf.config.data import DataConfig
from rlhf.config.learner import LearnerConfig
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.data.completions import OfflineDataset, load_offline
from rlhf.data.together import families
from rlhf.distributed.world import World
from rlhf.learn.experience import AdvantageContext, ExperienceBuilder
from rlhf.learn.models import Models
from rlhf.models.pretrained import load_tokenizer
from rlhf.types import FinishReason
from tests.support import ALONE, learner_of, policy_of

EOS = 2
HOOKS = Hooks(0, print, lambda: None)
ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "completion": "good", "reward": 0.9, "topic": "a", "finish_reason": "stop"},
    {"prompt": "two", "completion": "fair", "reward": 0.6, "topic": "b", "finish_reason": "length"},
    {"prompt": "one", "completion": "bad", "reward": 0.1, "topic": "a", "finish_reason": "stop"},
    {"prompt": "one", "completion": "lost", "reward": None, "topic": "a", "finish_reason": "stop"},
]


@pytest.fixture
def load(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., OfflineDataset]:
    tokenizer = load_tokenizer(str(tiny_model_dir))

    def from_rows(rows: list[dict[str, Any]], kind: str = "jsonl", **settings: Any) -> OfflineDataset:
        path = tmp_path / f"data.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            Dataset.from_list(rows).to_parquet(str(path))
        limit = settings.pop("max_completion_tokens", 16)
        section = DataConfig.model_validate({"train": str(path), "mode": "offline"} | settings)
        return load_offline(path, tokenizer, section, max_completion_tokens=limit, eos_token_id=EOS)

    return from_rows


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lines_with_the_same_prompt_are_a_group(load: Callable[..., OfflineDataset], kind: str):
    data = load(ROWS, kind)
    first, second = data.groups
    assert [t.text for t in first.trajectories] == ["good", "bad", "lost"]
    assert [t.reward for t in first.trajectories] == [0.9, 0.1, None]
    assert first.prompt.columns == {"topic": "a"}
    assert data.columns == ("topic",)
    # log-probs were not recorded, and no policy of this run sampled the completions
    assert all(t.rollout_logprobs is None and t.versions == () for t in first.trajectories)
    # a truncated completion has no end-of-sequence token
    assert first.trajectories[0].token_ids[-1] == EOS
    assert second.trajectories[0].finish_reason == FinishReason.LENGTH
    assert len(second.trajectories[0].token_ids) == len("fair")
    assert [p.content for p in data.prompts.prompts] == ["one", "two"]


def test_a_completion_may_be_a_column_of_another_name_or_chat_messages(load: Callable[..., OfflineDataset]):
    answer = [{"role": "assistant", "content": "good"}]
    assert load([{"prompt": "one", "response": "good", "reward": 1}]).groups[0].trajectories[0].text == "good"
    named = load(
        [{"prompt": "one", "chat": answer, "score": 1}], completion_column="chat", reward_column="score"
    )
    assert named.groups[0].trajectories[0].text == "good"
    unscored = load([{"prompt": "one", "completion": "good"}], reward_column=None)
    assert unscored.groups[0].trajectories[0].reward is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "completon": "y", "reward": 1}, "no column 'completion' .*did you mean 'completon'"),
        ({"prompt": "x", "completion": "", "reward": 1}, "must be non-empty text"),
        ({"prompt": "x", "completion": 7, "reward": 1}, "must be non-empty text"),
        ({"prompt": "x", "completion": "y", "reward": "high"}, "finite number or null, got 'high'"),
        ({"prompt": "x", "completion": "y", "reward": True}, "finite number or null, got True"),
        ({"prompt": "x", "completion": "y", "reward": float("nan")}, "finite number or null, got nan"),
        ({"prompt": "x", "completion": "y", "reward": 1, "finish_reason": "eos"}, "must be stop or length"),
        (
            {"prompt": "x", "completion": "y" * 16, "reward": 1},
            "1 lines are longer .* the first is .*:1; raise",
        ),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(
    load: Callable[..., OfflineDataset], row: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as error:
        load([row])
    assert "data.jsonl:1" in str(error.value)


def test_a_reward_column_that_is_not_there_is_refused(load: Callable[..., OfflineDataset]):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no column 'score' .*Set data.reward_column to its"):
        load([{"prompt": "x", "completion": "y", "scores": 1}], reward_column="score")


def test_columns_that_keep_completions_of_a_prompt_apart_are_named(load: Callable[..., OfflineDataset]):
    rows = [{**row, "temperature": i, "topic": "a"} for i, row in enumerate(ROWS)]
    data = load(rows)
    assert len(data.groups) == 4
    assert data.splitting == ("temperature",)
    assert load(ROWS).splitting == ()


def test_lines_that_are_too_long_are_left_out_if_asked(load: Callable[..., OfflineDataset]):
    rows = [*ROWS, {**ROWS[0], "completion": "far too long for this"}]
    data = load(rows, long_prompts="skip")
    assert (data.num_completions, data.skipped) == (4, 1)


def collector(
    data: OfflineDataset, sampling: Sampling, policy_dir: Path, world: World = ALONE
) -> OfflineCollector:
    """A collector with value 0.5 for every prompt that draws six completions a step."""
    models = Models(algorithm=IMITATION["a_lol_ref_free"](), policy=policy_of(policy_dir))
    section = LearnerConfig(lr=1e-3, microbatch_tokens=512)
    context = AdvantageContext(prompt_values={g.prompt.id: 0.5 for g in data.groups})
    experience = ExperienceBuilder(models, ALONE, section, context, temperature=1.0)
    return OfflineCollector(OfflineData(data, None, ALONE), Draws(sampling, 6, seed=3), experience, world)


def drawn(source: OfflineCollector, positions: range) -> Counter[str]:
    steps = [source.begin(p, HOOKS).settle() for p in positions]
    return Counter(t.text for s in steps for g in s.groups for t in g.trajectories)


def test_priority_draws_by_the_advantage_and_never_what_has_none(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path
):
    source = collector(load(ROWS), "priority", tiny_model_dir)
    counts = drawn(source, range(0, 6000, 6))
    # advantages 0.4 and 0.1: of 6000 draws 4800 and 1200 are expected, with a standard deviation of 31
    assert set(counts) == {"good", "fair"}
    assert abs(counts["good"] - 4800) < 160
    assert source.num_eligible == 2


@pytest.mark.parametrize(
    ("sampling", "texts"), [("completions", {"good", "bad", "fair"}), ("positive", {"good", "fair"})]
)
def test_the_others_draw_each_equally_often(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path, sampling: Sampling, texts: set[str]
):
    counts = drawn(collector(load(ROWS), sampling, tiny_model_dir), range(0, 60, 6))
    assert counts == dict.fromkeys(texts, 60 // len(texts))


def test_draws_depend_on_the_position_alone(load: Callable[..., OfflineDataset], tiny_model_dir: Path):
    source = collector(load(ROWS), "priority", tiny_model_dir)
    both = [source.begin(0, HOOKS).settle() for _ in range(2)]
    assert both[0].groups == both[1].groups
    assert both[0].position == 6


@pytest.mark.parametrize("sampling", ["groups", "completions", "positive", "priority"])
def test_ranks_share_out_what_one_would_draw(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path, sampling: Sampling
):
    data = load(ROWS)
    sources = [collector(data, sampling, tiny_model_dir, World(r, 2, torch.device("cpu"))) for r in (0, 1)]
    whole = collector(data, sampling, tiny_model_dir)
    for position in range(0, 24, 6):
        alone, *both = (s.begin(position, HOOKS).settle() for s in (whole, *sources))
        shared = [group for part in zip_longest(*(b.groups for b in both)) for group in part if group]
        assert shared == alone.groups
        assert {b.position for b in both} == {alone.position}


def _families(rows: list[dict[str, Any]], load: Callable[..., OfflineDataset], **changes: Any):
    data = {"train": "x.jsonl", "mode": "offline", "together_column": "topic"} | changes
    settings = {
        "run_dir": "x",
        "steps": 1,
        "model": {"path": "m"},
        "data": data,
        "algorithm": {"name": "sft"},
    }
    config = make_config({**settings, "rollout": {"prompts_per_step": 4}})
    return families(config, load(rows))


def test_a_step_never_separates_lines_that_belong_together(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path
):
    rows = [{"prompt": f"{i}", "completion": "x", "topic": "abcabc"[i]} for i in range(6)]
    found = _families(rows, load)
    assert found == [[0, 3], [1, 4], [2, 5]]
    source = collector(load(rows), "groups", tiny_model_dir)
    source.draws = replace(source.draws, per_step=4, together=found)
    steps = [source.begin(p, HOOKS).settle() for p in range(0, 36, 4)]
    drawn = [[int(str(g.prompt.content)) for g in s.groups] for s in steps]
    assert all([b - a for a, b in zip(d[::2], d[1::2], strict=True)] == [3, 3] for d in drawn)
    # 36 draws are six epochs of six lines, in different orders
    assert Counter(line for d in drawn for line in d) == dict.fromkeys(range(6), 6)
    assert len({tuple(d) for d in drawn}) > 1
    assert [g.draw for g in steps[1].groups] == [4, 5, 6, 7]


def test_lines_that_cannot_be_kept_together_are_refused(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": f"{i}", "completion": "x", "topic": "aab"[i]} for i in range(3)]
    with pytest.raises(
        ConfigError, match=r'2 lines have topic = "a", but 1 have "b", the first in data.jsonl:3'
    ):
        _families(rows, load)
    with pytest.raises(ConfigError, match="no such column, only topic; did you mean 'topic'"):
        _families(rows, load, together_column="topics")
    three = [{"prompt": f"{i}", "completion": "x", "topic": "a"} for i in range(3)]
    with pytest.raises(ConfigError, match=r"is 4, but 3 lines each .* set it to a multiple of 3"):
        _families(three, load)
    with pytest.raises(ConfigError, match=r"together_column is for data\.sampling = groups"):
        _families(three, load, sampling="completions")


def test_without_anything_above_its_value_there_is_nothing_to_draw(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path
):
    source = collector(load(ROWS[2:3]), "priority", tiny_model_dir)
    with pytest.raises(ValueError, match="no completion has an advantage above 0"):
        drawn(source, range(1))


def test_completions_below_their_value_move_no_weight(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path
):
    """A completion below the prompt's value changes the gradient no more than a masked completion would."""
    policy = policy_of(tiny_model_dir, dtype=torch.float64)
    algorithm = IMITATION["a_lol_ref_free"]()
    learner, _ = learner_of(policy, IMITATION["sft"]())
    learner.algorithm = algorithm
    data = load(ROWS)
    builder = collector(data, "groups", tiny_model_dir).experience
    builder.policy = policy
    experience = builder.build(data.groups[:1], kl_coef=0.0)
    counts = learner.counts(experience, [0])

    def gradient() -> list[torch.Tensor]:
        policy.model.zero_grad()
        learner.accumulate(experience, [0], counts, kl_coef=0.0)
        return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]

    both = gradient()
    # other tokens in the completion "bad" change nothing
    experience.token_ids[experience.sequence == 1] = 7
    assert all((a == b).all() for a, b in zip(both, gradient(), strict=True))
    assert any((g != 0).any() for g in both)
    experience.advantages[experience.sequence == 0] = 0.0
    assert all((g == 0).all() for g in gradient())
