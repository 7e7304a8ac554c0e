"""Whole runs that sample from frozen models: what samples what, the iterate's refresh, exact resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.collect.sampler import Hooks
from rlhf.config.load import make_config
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.trainer import Trainer
from rlhf.types import Group, Source
from tests.e2e.test_preference_runs import write_pairs
from tests.faults.processes import Fault, launch
from tests.support import bandit_settings, metrics_of, train, without_clocks

GREEDY = [
    {"source": "policy", "n": 1},
    {"source": "reference", "n": 1, "temperature": 0.0},
    {"source": "policy", "n": 1, "temperature": 0.0},
    {"source": "iterate", "n": 2, "temperature": 0.0},
]
ITERATES = {"samplers": [{"source": "policy", "n": 2}, {"source": "iterate", "n": 2}]}
REWARD = """
def share_of_a(completions, **_):
    return [sum(map(ord, c)) / (100 * len(c)) if c else 0.0 for c in completions]
"""
adapted = pytest.mark.parametrize("adapter", [False, True])


def settings(folder: Path, model: Path, *, adapter: bool = False, **changes: Any) -> dict[str, Any]:
    """Online DPO on a reward that hardly ever ties, with the `rollout.samplers` that are given."""
    base = bandit_settings(folder, model, algorithm={"name": "dpo"}, steps=4)
    (folder / "reward.py").write_text(REWARD)
    del base["rollout"]["group_size"]
    base["rollout"] |= {"prompts_per_step": 4}
    if adapter:
        pytest.importorskip("peft")
        base["model"]["lora"] = {"rank": 4}
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def collected(trainer: Trainer) -> list[Group]:
    """The groups of the next step, which is not made."""
    hooks = Hooks(trainer.cursor.steps_done, lambda _: None, lambda: None)
    return trainer.components.collector.begin(trainer.cursor.position, hooks).settle().sampled


def greedy(trainer: Trainer, groups: list[Group]) -> list[tuple[int, ...]]:
    """The policy's most probable completions of the same prompts."""
    sampler = trainer.components.sampler
    requests = [sampler.request(g.prompt, n=1, label=f"again/{i}") for i, g in enumerate(groups)]
    for request in requests:
        object.__setattr__(request.params, "temperature", 0.0)
    completions = sampler.generate(requests)
    return [c.token_ids for [c] in completions]


@adapted
def test_each_model_samples_what_it_is_asked_for(tmp_path: Path, tiny_model_dir: Path, adapter: bool):
    made = settings(
        tmp_path,
        tiny_model_dir,
        adapter=adapter,
        rollout={"samplers": GREEDY},
        iteration={"steps": 2},
        learner={"lr": 3e-2},
        monitor={"samples_per_step": 4},
    )
    fresh: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    trainer = Trainer(make_config(made))
    with trainer.open():
        trainer.sync()
        start = collected(trainer)
        of_start = greedy(trainer, start)
        for done in range(4):
            groups = collected(trainer)
            own = greedy(trainer, groups)
            first = of_start if done == 0 else [by_start(fresh, trainer, g) for g in groups]
            # the iterate is taken after steps 2 and 4
            taken = first if done < 2 else own if done == 2 else None
            for place, group in enumerate(groups):
                found = {i: t.token_ids for i, t in enumerate(group.trajectories)}
                assert found[1] == first[place]
                assert found[2] == own[place]
                assert found[3] == found[4]
                if taken is not None:
                    assert found[3] == taken[place]
                known = [t.rollout_logprobs is not None for t in group.trajectories]
                assert known == [True, False, False, False, False]
                assert [bool(t.versions) for t in group.trajectories] == known
                assert [t.source for t in group.trajectories] == [
                    Source.POLICY,
                    Source.REFERENCE,
                    Source.POLICY,
                    Source.ITERATE,
                    Source.ITERATE,
                ]
            trainer.step()
            # it learns: otherwise the models could not be told apart
            assert done > 0 or greedy(trainer, start) != of_start


def by_start(model: Any, trainer: Trainer, group: Group) -> tuple[int, ...]:
    """The most probable completion under `model`, token by token with full passes."""
    ids = list(group.prompt.token_ids)
    ends = set(trainer.inputs.eos_token_ids)
    made: list[int] = []
    with torch.no_grad():
        while len(made) < trainer.config.rollout.max_completion_tokens and not ends & set(made):
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    return tuple(made)


@adapted
def test_the_iterate_is_the_policy_of_the_last_iteration(tmp_path: Path, tiny_model_dir: Path, adapter: bool):
    iteration = {"steps": 2, "reference": "iterate"}
    made = settings(tmp_path, tiny_model_dir, adapter=adapter, iteration=iteration, steps=5)
    made["rollout"]["group_size"] = 4
    trainer = Trainer(make_config(made))
    ratios: list[float] = []
    with trainer.open():
        trainer.sync()
        models = trainer.components.experience.models
        assert models.reference is models.iterate
        while trainer.cursor.steps_done < 5:
            ratios.append(abs(trainer.step()["pairs/chosen_logratio"].value))
    # measured before each update: the policy is its reference in steps 1, 3 and 5
    assert [r < 1e-5 for r in ratios] == [True, False, True, False, True]


def test_a_share_of_the_policy_makes_a_mean(tmp_path: Path, tiny_model_dir: Path):
    iteration = {"steps": 1, "reference": "iterate", "mix": 0.25}
    made = settings(tmp_path, tiny_model_dir, iteration=iteration, steps=1)
    made["rollout"]["group_size"] = 4
    trainer = Trainer(make_config(made))
    with trainer.open():
        trainer.sync()
        models = trainer.components.experience.models
        assert models.iterate is not None
        before = {n: p.clone() for n, p in models.policy.model.named_parameters()}
        trainer.step()
        after = dict(models.policy.model.named_parameters())
        for name, held in models.iterate.model.named_parameters():
            torch.testing.assert_close(held, 0.75 * before[name] + 0.25 * after[name])
        assert any(not torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ["xpo", "inpo", "sppo", "dno"])
def test_methods_with_frozen_models_learn(tmp_path: Path, tiny_model_dir: Path, name: str):
    source = "reference" if name == "xpo" else "iterate"
    made = settings(
        tmp_path,
        tiny_model_dir,
        rollout={"samplers": [{"source": "policy", "n": 2}, {"source": source, "n": 2}]},
        algorithm={"name": name} | ({"eta": 0.2, "tau": 0.1} if name == "inpo" else {}),
        iteration={"steps": 0 if name == "xpo" else 6},
        pairs={"rule": "all" if name == "dno" else "best_worst"},
        steps=5,
    )
    train(made)
    steps = metrics_of(tmp_path)
    # fresh pairs are ordered rightly by what earlier ones taught
    margins = [step["pairs/margin"] for step in steps]
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    if name == "xpo":
        # what the reference samples is less likely under the policy whether it wins or not, so that the
        # margin of fresh pairs says nothing
        assert all(step["pairs/pull"] < 0 and step["grad_norm"] > 0 for step in steps)
    else:
        assert sum(margins) > 0.02, margins
    assert ("mismatch/k3" in steps[-1] and "kl/ref" in steps[-1]) or name in ("sppo", "dno")


@adapted
@pytest.mark.parametrize("name", ["nash_md", "ipo"])
def test_methods_that_sample_from_a_mixture(tmp_path: Path, tiny_model_dir: Path, name: str, adapter: bool):
    own = [{"source": "policy", "n": 2}] if name == "nash_md" else []
    made = settings(
        tmp_path,
        tiny_model_dir,
        adapter=adapter,
        rollout={"samplers": [*own, {"source": "mixture", "n": 2, "mixture": 0.25}]},
        algorithm={"name": name},
        pairs={} if name == "nash_md" else {"rule": "first_two", "labels": "reward"},
        monitor={"samples_per_step": 4},
        steps=3,
    )
    train(made)
    # Nash-MD compares its own samples with those of the mixture, and learns from its own alone
    expected = {"policy"} if name == "nash_md" else {"mixture"}
    assert set(sources(tmp_path)) == expected
    steps = metrics_of(tmp_path)
    assert all(step["grad_norm"] > 0 for step in steps)
    assert ("loss/policy" in steps[-1]) == (name == "nash_md")


def test_a_mixture_of_0_is_the_policy_and_of_1_the_reference(tmp_path: Path, tiny_model_dir: Path):
    samplers = [
        {"source": "mixture", "n": 1, "mixture": 0.0, "temperature": 0.0},
        {"source": "policy", "n": 1, "temperature": 0.0},
        {"source": "mixture", "n": 1, "mixture": 1.0, "temperature": 0.0},
        {"source": "reference", "n": 1, "temperature": 0.0},
    ]
    made = settings(tmp_path, tiny_model_dir, rollout={"samplers": samplers}, learner={"lr": 3e-2})
    trainer = Trainer(make_config(made))
    with trainer.open():
        # greedy samples of equal models are equal, from which nothing would be learned
        with torch.no_grad():
            for weight in trainer.components.policy.model.parameters():
                weight.mul_(1.0 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        trainer.sync()
        found = [[t.token_ids for t in group.trajectories] for group in collected(trainer)]
        assert all(of_0 == policy and of_1 == reference for of_0, policy, of_1, reference in found)
        assert any(policy != reference for _, policy, _, reference in found)


def sources(folder: Path) -> list[str]:
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    return [c.get("source", "policy") for line in lines for c in json.loads(line)["completions"]]


def test_hypo_learns_from_labels_of_the_data_and_holds_its_own_samples(tmp_path: Path, tiny_model_dir: Path):
    made = settings(
        tmp_path,
        tiny_model_dir,
        rollout={"group_size": 2},
        algorithm={"name": "hypo", "kl": {"coef": 0.05}},
        data={"mode": "offline_to_online", "mix": True},
        pairs={"rule": "of_data"},
        reward={},
        monitor={"samples_per_step": 4},
        steps=5,
    )
    made["reward"] = {}
    write_pairs(tmp_path / "train.jsonl", seed=0, count=40)
    train(made)
    found = sources(tmp_path)
    assert found.count("data") == found.count("policy") > 0
    steps = metrics_of(tmp_path)
    assert steps[-1]["pairs/margin"] > 0 and steps[-1]["kl/ref"] > 0
    # the data's half of the completions has no advantages, and does not count as without signal
    assert steps[-1]["advantage/zero_fraction"] < 0.5
    # nothing is learned from rewards: no prompt is hard or solved
    assert not any(name.startswith("budget/") for name in steps[-1])
    assert steps[0]["kl/ref"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["selm", "spac"])
def test_pairs_of_data_beside_samples_of_the_iterate(tmp_path: Path, tiny_model_dir: Path, name: str):
    made = settings(
        tmp_path,
        tiny_model_dir,
        rollout={"samplers": [{"source": "iterate", "n": 1}]},
        algorithm={"name": name, "beta": 0.1},
        data={"mode": "offline_to_online", "mix": True},
        iteration={"steps": 3, "reference": "iterate"} if name == "selm" else {"steps": 3},
        pairs={"rule": "best_worst" if name == "selm" else "of_data"},
        monitor={"samples_per_step": 4},
    )
    write_pairs(tmp_path / "train.jsonl", seed=0, count=40)
    if name == "selm":
        made["data"]["reward_column"] = None
    train(made)
    found = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    sources = [sorted(c.get("source", "policy") for c in record["completions"]) for record in found]
    # what is learned from: the pair, and the sample that the loss makes less likely
    assert sources and all(s.count("iterate") == 1 and "data" in s for s in sources)
    steps = metrics_of(tmp_path)
    assert steps[-1]["pairs/accuracy"] >= 0.5
    assert "kl/ref" not in steps[-1], "no completion is the policy's own"


@adapted
def test_a_run_that_was_killed_at_a_refresh_goes_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_model_dir: Path, adapter: bool
):
    files: list[str] = []
    faults = (
        None,
        Fault("rlhf.learn.iterate:Iterate._take", 2),
        Fault("rlhf.rollout.native.engine:NativeEngine._decode", 50),
    )
    for number, fault in enumerate(faults):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = settings(
            folder,
            tiny_model_dir,
            adapter=adapter,
            rollout=ITERATES,
            iteration={"steps": 2},
            checkpoint={"export": False, "every": 1, "resume": "auto"},
            steps=5,
        )
        [ended] = launch(made, folder / "log", fault=fault)
        if fault is not None:
            assert ended.code == -9, ended.said
            [ended] = launch(made, folder / "again")
        assert ended.code == 0, ended.said
        files.append(json.dumps(without_clocks(metrics_of(folder))))
    assert files[0] == files[1] == files[2]


@pytest.mark.multi
def test_two_ranks_learn_what_one_does(tmp_path: Path, tiny_model_dir: Path):
    runs: list[list[dict[str, Any]]] = []
    for ranks, mode in ((1, "replicated"), (2, "replicated"), (2, "sharded")):
        folder = tmp_path / f"{ranks}{mode}"
        folder.mkdir()
        made = settings(
            folder,
            tiny_model_dir,
            algorithm={"name": "inpo", "eta": 0.2, "tau": 0.1},
            iteration={"steps": 2},
            distributed={"mode": mode},
        )
        made["rollout"]["group_size"] = 4
        for ended in launch(made, folder / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        runs.append(metrics_of(folder))
    one, *others = runs
    for other in others:
        for alone, together in zip(one, other, strict=True):
            for key in ("pairs/loss", "pairs/margin", "grad_norm", "reward/mean"):
                assert together[key] == pytest.approx(alone[key], abs=1e-5, rel=1e-4), (alone["step"], key)


def test_check_says_who_samples_and_what_the_iterate_costs(tmp_path: Path, tiny_model_dir: Path):
    made = settings(tmp_path, tiny_model_dir, rollout=ITERATES, iteration={"steps": 2})
    config = make_config(made)
    text = "\n".join(describe(config, load_inputs(config)))
    assert f"iterate      becomes the policy every 2 steps; until then it is {tiny_model_dir}" in text
    assert "sampled      2 of each prompt from the policy, at 1\n" in text
    assert "sampled      2 of each prompt from the iterate, at 1\n" in text
    assert "iterate: the policy of the last iteration" in text
