"""`rlhf pairs tree`: a search with a tiny model, its pairs token for token, and a run that learns them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.collect.sampler import Sampler
from rlhf.config.data import DataConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.config.tree import TreeConfig
from rlhf.data.completions import load_offline
from rlhf.pairs.files import Made
from rlhf.pairs.tree import Tree, TreeSearch
from rlhf.pairs.tree_judge import SelfEvaluation
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rollout.factory import make_engine
from rlhf.rollout.prefixed import PrefixedEngine
from rlhf.types import Prompt

EOS = 2
REWARD = """
def early(completions, **_):
    # how many of the first ten characters are in the first half of ASCII
    return [sum(c < "P" for c in text[:10]) / 10 for text in completions]
"""
"""As a plain prompt gives plain completions, `text` is a string."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with prompts, a reward and a config for them."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "reward.py").write_text(REWARD)
    lines = [json.dumps({"prompt": f"What is {n}?", "answer": "f(a=1, b=2)"}) for n in range(5)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "run_dir": str(folder / "run"),
        "steps": 1,
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": 40},
        "reward": {"functions": [{"path": f"{folder / 'reward.py'}:early"}], "success_threshold": 0.5},
        "algorithm": "grpo",
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 24},
        "tree": {
            "iterations": 3,
            "step_tokens": 6,
            "delimiter": "[aeiou]",
            "step_parts": 1,
            "gold_column": "answer",
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    assert main(["pairs", "tree", str(folder / "config.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_pairs_have_the_common_path_in_their_prompt(made: Path) -> None:
    pairs, summary = rows(made / "pairs.jsonl"), json.loads((made / "summary.json").read_text())
    assert len(pairs) == summary["pairs"] > 5
    assert summary["items"] == 5
    assert {pair["step"] for pair in pairs} >= {0, 1}
    for pair in pairs:
        question, _, path = pair["prompt"].partition("?")
        number = int(pair["question"].rpartition(":")[2]) - 1
        assert question == f"What is {number}"
        assert bool(path) == (pair["step"] > 0)
        assert pair["chosen"] != pair["rejected"]
        assert pair["values"][0] - pair["values"][1] >= 0.1 - 1e-4


def test_every_node_is_a_pair_or_is_counted(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    counts, dropped = summary["counts"], summary["dropped"]
    # five trees of three expansions, unless nothing was left to expand; three steps each
    expanded = counts["steps sampled"] / 3
    assert (
        summary["pairs"]
        + sum(dropped.values())
        + counts.get("expanded steps with fewer than two next steps", 0)
        == expanded
    )
    assert expanded <= 15


def test_stopped_and_started_again_it_makes_the_same_bytes(
    folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pairs", "tree", str(folder / "config.yaml"), "--out", str(folder / "again")]
    whole = TreeSearch.search

    def search(self: TreeSearch, prompts: Sequence[Prompt]) -> list[Made]:
        if prompts[0].id == "prompts.jsonl:3":
            raise KeyboardInterrupt
        return whole(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(TreeSearch, "search", search)
        assert main(command) == 130
    part = folder / "again" / "pairs.part"
    lines = part.read_bytes().split(b"\n")
    assert len(lines) == 4
    # the settings and the first prompt stay: it goes on in the middle of what is searched together
    part.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:40])
    assert main(command) == 0
    for name in ("pairs.jsonl", "summary.json"):
        assert (folder / "again" / name).read_bytes() == (made / name).read_bytes()


def test_other_settings_are_refused(folder: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pairs", "tree", str(folder / "config.yaml"), "--out", str(made)]
    assert main([*command, "tree.actions=2"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tree.gold_column=gold", "has no column 'gold', it has answer"),
        ("tree.delimiter=(", "must be a regular expression, got '('"),
        ("tree.delimiter=x*", "must not match the empty text, got 'x*'"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    command = ["pairs", "tree", str(folder / "config.yaml"), "--out", str(folder / "none"), override]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_configs_dpo_learns_from_the_pairs(
    folder: Path, made: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "dpo"
    changes = {
        "run_dir": run,
        "steps": 4,
        "model.path": tiny_model_dir,
        "model.dtype": "float32",
        "data.train": made / "pairs.jsonl",
        "data.eval": "null",
        "reward.functions": "[]",
        "learner.lr": 1e-3,
        "learner.schedule": "constant",
        "learner.warmup_steps": 0,
        "monitor.sinks": "[]",
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    assert main(["train", "configs/dpo.yaml", *overrides]) == 0
    losses = [json.loads(line)["pairs/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05


@pytest.fixture(scope="module")
def rewards(folder: Path) -> Iterator[Rewards]:
    with closing(Rewards([RewardSpec(f"{folder / 'reward.py'}:early")], ["answer"])) as found:
        yield found


@pytest.fixture(scope="module")
def search(rewards: Rewards, tiny_model_dir: Path) -> TreeSearch:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        # now and then the end of sequence is likely
        model.lm_head.weight[EOS] *= 60.0
    engine = make_engine("native", model, eos_token_ids=(EOS,), kv_cache_gib=0.1, max_tokens=100)
    section = RolloutConfig(max_completion_tokens=24, prompts_per_step=2, group_size=2)
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    sampler = Sampler(PrefixedEngine(engine, [EOS]), rewards, words, section, seed=0)
    settings = TreeConfig(iterations=4, step_tokens=6, delimiter="[aeiou]", step_parts=1)
    return TreeSearch(settings, sampler, RewardConfig(success_threshold=0.5), [EOS])


@pytest.fixture(scope="module")
def tree(search: TreeSearch) -> Tree:
    words: Any = search.sampler.tokenizer
    [tree] = search.grow([Prompt("p", tuple(words("Is it?")["input_ids"]), "Is it?", {"answer": "1"})])
    return tree


def test_a_prior_is_that_of_the_model_at_the_temperature_of_the_steps(search: TreeSearch, tree: Tree) -> None:
    model: Any = search.engine.engine._model  # type: ignore[attr-defined]
    assert len(list(tree.root.all())) > 5
    for node in list(tree.root.all())[1:]:
        assert node.parent is not None
        before = [*tree.start, *node.parent.tokens]
        own = list(node.tokens[len(node.parent.tokens) :])
        with torch.no_grad():
            logits = model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        logprobs = (logits / 1.5).log_softmax(-1)[range(len(own)), own]
        assert node.prior == pytest.approx(float(logprobs.mean().exp()), rel=1e-3)


def test_a_run_reads_the_very_tokens_of_the_tree(search: TreeSearch, tree: Tree, tmp_path: Path) -> None:
    [made] = search.search([tree.prompt])
    lines = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, **p.columns} for p in made.pairs
    ]
    # some have ended, and the reader puts the end of sequence behind these alone
    assert {reason for line in lines for reason in line["finish_reason"]} == {"stop", "length"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = DataConfig(train=str(file), mode="offline", max_prompt_tokens=64)
    words = search.sampler.tokenizer
    read = load_offline(file, words, section, max_completion_tokens=24, eos_token_id=EOS)
    nodes = {tree.start + node.tokens: node for node in tree.root.all()}
    assert len(read.groups) == len(lines) > 1
    for group in read.groups:
        node = nodes[group.prompt.token_ids]
        steps = [child.tokens[len(node.tokens) :] for child in node.children]
        chosen, rejected = (t.token_ids for t in group.trajectories)
        assert chosen in steps and rejected in steps and chosen != rejected


def test_visits_and_values_are_sums_over_the_steps_below(tree: Tree) -> None:
    nodes = list(tree.root.all())
    for node in nodes:
        assert node.visits == 1 + sum(child.visits for child in node.children)
    # a node's own simulation is what its children's leave of its total: a mean of two rewards in tenths
    for node in nodes:
        own = node.total - sum(child.total for child in node.children)
        assert own * 20 == pytest.approx(round(own * 20), abs=1e-6)
        assert -1e-9 <= own <= 1 + 1e-9


def test_steps_end_at_delimiters_and_the_last_one_is_all_the_rest(search: TreeSearch, tree: Tree) -> None:
    for node in list(tree.root.all())[1:]:
        if node.depth == 3:
            assert node.tokens[-1] == EOS or len(node.tokens) == 24
        elif not node.ended and len(node.text) < 6:
            assert node.text[-1] in "aeiou"
            assert not set(node.text[:-1]) & set("aeiou")


def test_the_model_marks_completions(search: TreeSearch, tiny_model_dir: Path, rewards: Rewards) -> None:
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    judge = SelfEvaluation(model, words, "answer")
    assert words.convert_ids_to_tokens(judge.marks) == ["A", "B", "C", "D"]
    with torch.no_grad():
        # all marks alike: (1 + .1 - 1 - 2) / 4 / 4
        model.lm_head.weight.zero_()
    [group] = _scored(search, Prompt("q", (5, 6), "hi", {"answer": "1"}))
    assert judge(group) == pytest.approx([-0.11875] * 2)


def _scored(search: TreeSearch, prompt: Prompt) -> Sequence[Any]:
    request = search.sampler.request(prompt, n=2, label="x")
    groups, _ = search.sampler.score([prompt], search.sampler.generate([request]), 0)
    return groups


def test_where_nothing_has_a_reward_the_prompt_is_counted(search: TreeSearch) -> None:
    judged = TreeSearch(
        search.settings, search.sampler, search.rewards, [EOS], lambda group: [None] * len(group.trajectories)
    )
    columns: Mapping[str, Any] = {"answer": "1"}
    [made] = judged.search([Prompt("p", (5, 6), "hi", columns)])
    assert made.pairs == ()
    assert made.dropped == {"no completion of the prompt has a reward": 1}
    assert made.counts["completions without a reward"] == 2
