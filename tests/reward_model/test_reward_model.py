"""A tiny reward model: its gradient does not depend on microbatches, it learns a rule, others can load it."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import cli
from rlhf.algos.reward_model import bradley_terry
from rlhf.config.load import load_task
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.section import ConfigError
from rlhf.data.pairs import Example, load_examples
from rlhf.learn.optimizer import MasterAdamW
from rlhf.models.pretrained import load_tokenizer
from rlhf.reward_model.kinds.table import kind_of
from rlhf.reward_model.learner import Batch, RewardModelLearner, TrainedKind, next_batch
from rlhf.reward_model.model import RewardModel
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.types import Completion, FinishReason
from tests.support import ALONE, metrics_of, policy_of, reward_model_settings, without_clocks


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Pairs in which the better completion has more of the letter a."""
    return [
        {"prompt": f"say {i}:", "chosen": "a" * (1 + i % 4) + "b", "rejected": "b" * (1 + i % 5) + "c"}
        for i in range(first, first + count)
    ]


def rated(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"say {i}:",
            "completion": "a" * (i % 5) + "b" * (i % 3) + "c",
            "ratings": {"a": i % 5, "b": None if i % 4 == 0 else -(i % 3)},
        }
        for i in range(count)
    ]


def settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    for name, rows in (("train", pairs(40)), ("eval", pairs(20, 100))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reward_model_settings(folder, model_dir, **changes)


def rated_settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    made = settings(folder, model_dir, score={"kind": "ratings", "objectives": ["a", "b"]}, **changes)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated(40)))
    return made


def make(settings: dict[str, Any]) -> RewardModelConfig:
    return RewardModelConfig.model_validate(settings)


def examples_of(config: RewardModelConfig) -> list[Example]:
    return load_examples(config.data.train, config.data, kind_of(config), load_tokenizer(config.model.path))


def learner_of(config: RewardModelConfig, dtype: torch.dtype = torch.float64) -> RewardModelLearner:
    policy = policy_of(Path(config.model.path), dtype=dtype)
    model = RewardModel(policy, len(config.score.objectives))
    model.head.to(dtype)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    kind = kind_of(config)
    assert isinstance(kind, TrainedKind)
    optimizer = MasterAdamW(model.module, dtype, config.learner, config.steps)
    return RewardModelLearner(model, kind, optimizer, ALONE)


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_neither_microbatches_nor_packing_change_the_gradient(
    tmp_path: Path, tiny_model_dir: Path, kind: str
):
    config = make((settings if kind == "pairs" else rated_settings)(tmp_path, tiny_model_dir))
    examples = examples_of(config)
    learner = learner_of(config)
    batch = examples[:9]

    def gradients() -> list[torch.Tensor]:
        learner.model.module.zero_grad()
        for micro in learner.microbatches(batch):
            learner.accumulate(micro, Batch(batch, 0))
        return [p.grad.clone() for p in learner.model.module.parameters() if p.grad is not None]

    whole = gradients()
    learner.microbatch_tokens = 40
    for layout in ("shared_prefix", "packed", "padded"):
        learner.model.policy.layout = layout
        for got, want in zip(gradients(), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_the_loss_is_that_of_the_model_run_text_by_text(tmp_path: Path, tiny_model_dir: Path):
    config = make(settings(tmp_path, tiny_model_dir))
    examples = examples_of(config)
    learner, batch = learner_of(config), examples[:3]
    metrics = learner.accumulate(batch, Batch(batch, 0))
    policy = learner.model.policy
    policy.layout = "padded"
    losses: list[float] = []
    likelihood: list[torch.Tensor] = []
    for example in batch:
        found: list[torch.Tensor] = []
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt.token_ids, *completion]])
            found.append(policy.model.base_model(ids).last_hidden_state[0, -1] @ learner.model.head.weight[0])
            logprobs = policy.model(ids).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(-1, ids[0, 1:, None])[len(example.prompt.token_ids) - 1 :]
            likelihood.append(own[:, 0])
        losses.append(bradley_terry(found[0][None], found[1][None]).item())
    assert metrics["reward_model/loss"].value == pytest.approx(sum(losses) / 3)
    chosen = torch.cat(likelihood[0::2])
    assert metrics["reward_model/lm_loss"].value == pytest.approx(-chosen.mean().item())


def test_a_batch_is_filled_by_tokens_within_its_bounds(tmp_path: Path, tiny_model_dir: Path):
    config = make(settings(tmp_path, tiny_model_dir))
    examples = examples_of(config)
    seen: list[str] = []
    position = 0
    while position < len(examples):
        batch = next_batch(examples, config, position)
        assert len(batch) >= 4
        assert sum(e.tokens for e in batch) <= 200
        seen += [e.prompt.id for e in batch]
        position += len(batch)
    assert len(set(seen[: len(examples)])) == len(examples)
    few = config.model_copy(update={"batch": config.batch.model_copy(update={"tokens": 1, "low": 2})})
    assert len(next_batch(examples, few, 0)) == 2
    many = config.model_copy(update={"batch": config.batch.model_copy(update={"tokens": 10**6, "high": 7})})
    assert len(next_batch(examples, many, 0)) == 7


def test_it_learns_a_rule_and_transformers_gives_the_same_scores(tmp_path: Path, tiny_model_dir: Path):
    config = make(settings(tmp_path, tiny_model_dir))
    trainer = RewardModelTrainer(config)
    trainer.run()
    records = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (records[0]["accuracy"], records[0]["step"]) == (0.5, 0)
    assert records[-1]["accuracy"] > 0.9
    details = json.loads((tmp_path / "run" / "calibration.json").read_text())[-1]
    assert details["objectives"]["score"]["calibration_error"] < 0.5
    steps = metrics_of(tmp_path)
    assert steps[-1]["reward_model/loss"] < 0.5 < steps[0]["reward_model/loss"]
    assert steps[-1]["reward_model/lm_loss"] < steps[0]["reward_model/lm_loss"]

    folder = tmp_path / "run" / "model"
    scorer = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert scorer.config.num_labels == 1 and scorer.config.pad_token_id != tokenizer.eos_token_id
    ours = trainer.learner.scores(trainer.held_out)
    rows = [torch.tensor([*e.prompt.token_ids, *c]) for e in trainer.held_out for c in e.completions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=scorer.config.pad_token_id)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    with torch.no_grad():
        theirs = scorer(input_ids=padded, attention_mask=mask.long()).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(as_reward(folder, trainer.held_out), ours[:, 0], rtol=1e-3, atol=1e-3)


def as_reward(model: Path, examples: list[Example]) -> torch.Tensor:
    """Rewards of the same completions by the reward function, one group a pair; every second one is cut."""
    spec = RewardSpec("reward_model", params={"model": str(model)}, batch="step", timeout=60.0)
    rewards = Rewards([spec], ())
    completions: list[list[Completion]] = []
    for e in examples:
        whole, cut = e.completions[0], e.completions[1][:-1]
        completions.append(
            [
                Completion(e.prompt.id, 0, whole, (-1.0,) * len(whole), FinishReason.STOP, ()),
                Completion(e.prompt.id, 1, cut, (-1.0,) * len(cut), FinishReason.LENGTH, ()),
            ]
        )
    with closing(rewards):
        groups, _ = rewards.score(
            [e.prompt for e in examples], completions, [e.texts for e in examples], trainer_state={}
        )
    found = [t.objectives["reward_model"] for g in groups for t in g.trajectories]
    assert len(found) == 2 * len(examples)
    return torch.tensor(found)


def test_ratings_of_several_objectives_get_a_head_each(tmp_path: Path, tiny_model_dir: Path):
    config = make(rated_settings(tmp_path, tiny_model_dir, steps=40, batch={"tokens": 800}))
    RewardModelTrainer(config).run()
    details = json.loads((tmp_path / "run" / "calibration.json").read_text())
    for name in ("a", "b"):
        before, after = details[0]["objectives"][name], details[-1]["objectives"][name]
        assert before["accuracy"] == 0.5 and after["accuracy"] > 0.75
        assert after["calibration_error"] < 0.5 * before["calibration_error"]
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert scorer.config.id2label == {0: "a", 1: "b"} and scorer.score.out_features == 2


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(tmp_path: Path, tiny_model_dir: Path):
    folders = [tmp_path / name for name in ("straight", "stopped")]
    for folder in folders:
        folder.mkdir()
    made = [settings(f, tiny_model_dir, steps=6, checkpoint={"export": False}) for f in folders]
    RewardModelTrainer(make(made[0])).run()
    # the learning-rate schedule is that of all six steps
    short = RewardModelTrainer(make(made[1]))
    short.config = replace_steps(short.config, 3)
    short.run()
    assert len(metrics_of(folders[1])) == 3
    resumed = made[1] | {"checkpoint": {"resume": "auto"}}
    RewardModelTrainer(make(resumed)).run()
    straight, stopped = (without_clocks(metrics_of(folder)) for folder in folders)
    assert straight == stopped


def test_a_checkpoint_has_the_accuracy_by_which_the_best_are_kept(tmp_path: Path, tiny_model_dir: Path):
    section = {"every": 1, "keep_last": 1, "keep_best": 2, "export": False}
    made = settings(tmp_path, tiny_model_dir, steps=3, eval={"every": 2}, checkpoint=section)
    RewardModelTrainer(make(made)).run()
    run = tmp_path / "run"
    accuracy = {d["step"]: d["accuracy"] for d in json.loads((run / "calibration.json").read_text())}
    manifests = [json.loads(file.read_text()) for file in run.glob("checkpoints/*/manifest.json")]
    assert {m["step"]: m["score"] for m in manifests} == {2: accuracy[2], 3: accuracy[3]}
    assert not (run / "model").exists()


def replace_steps(config: RewardModelConfig, steps: int) -> RewardModelConfig:
    return config.model_copy(update={"steps": steps})


def test_out_of_memory_is_said_with_what_it_was_doing(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17 bytes")

    monkeypatch.setattr("torch.autograd.backward", no_memory)
    (tmp_path / "c.yaml").write_text(json.dumps(settings(tmp_path, tiny_model_dir, steps=1)))
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "out of memory in learn, step 1: lower learner.microbatch_tokens" in capsys.readouterr().err


def test_it_is_one_task_of_the_same_command(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_text(json.dumps(settings(tmp_path, tiny_model_dir, steps=1)))
    assert cli.main(["check", str(tmp_path / "c.yaml")]) == 0
    assert "40 examples, 20 held out" in capsys.readouterr().out
    assert cli.main(["train", str(tmp_path / "c.yaml"), "learner.lr=1e-3"]) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "reward_modle"}, "did you mean reward_model?"),
        ({"batch": {"tokes": 5}}, "unknown setting batch.tokes; did you mean batch.tokens?"),
        ({"batch": {"low": 9, "high": 8}}, "batch.low must be at most batch.high = 8, got 9"),
        ({"score": {"kind": "ratings", "lm_coef": 1.0}}, "ratings does not have: it must be 0, got 1"),
        ({"score": {"objectives": ["a", "b"]}}, "score.kind is pairs, which has one score"),
        (
            {"score": {"kind": "ratings", "center_coef": 0.01}},
            "score.center_coef is a setting of score.kind = pairs, but the kind is ratings",
        ),
        ({"learner": {"epochs": 2}}, "makes one update of each batch"),
        ({"steps": 5, "learner": {"warmup_steps": 6}}, "the run has 5 steps"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], message: str):
    (tmp_path / "c.yaml").write_text(json.dumps(settings(tmp_path, tiny_model_dir, **changes)))
    with pytest.raises(ConfigError) as error:
        load_task(str(tmp_path / "c.yaml"))
    assert message in str(error.value)


def test_defaults_are_those_of_the_paper(tmp_path: Path, tiny_model_dir: Path):
    made = settings(tmp_path, tiny_model_dir, learner={"lr": 1.0})
    del made["learner"], made["steps"]
    config = make(made)
    assert (config.steps, config.learner.lr, config.learner.warmup_steps) == (1000, 5e-6, 100)
    assert (config.batch.low, config.batch.high, config.lm_coef) == (4, 128, 1.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "x"}, "rejected is missing"),
        (
            {"prompt": "p", "chosen": "x", "rejected": ""},
            "column 'rejected' must be non-empty text or one chat message, got ''",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "the same text"),
        ({"prompt": "p", "chosen": "x" * 600, "rejected": "y"}, "a completion of 601 tokens"),
    ],
)
def test_a_bad_pair_is_refused_with_its_line(
    tmp_path: Path, tiny_model_dir: Path, row: dict[str, Any], message: str
):
    made = settings(tmp_path, tiny_model_dir)
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        RewardModelTrainer(make(made))


def with_margins(folder: Path, model_dir: Path, score: dict[str, Any]) -> RewardModelConfig:
    """Settings of a run whose pairs have the margins 0.5 and 2 by turns, in a column `ahead`."""
    made = settings(folder, model_dir, score={"lm_coef": 0.0, **score})
    rows = [{**row, "ahead": (0.5, 2.0)[i % 2]} for i, row in enumerate(pairs(4))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make(made)


def test_margins_and_centring_are_part_of_the_loss(tmp_path: Path, tiny_model_dir: Path):
    def step(**score: Any) -> tuple[float, torch.Tensor]:
        config = with_margins(tmp_path, tiny_model_dir, score)
        learner, examples = learner_of(config), examples_of(config)
        metrics = learner.accumulate(examples, Batch(examples, 0))
        gradient = learner.model.head.weight.grad
        assert gradient is not None
        return metrics["reward_model/loss"].value, gradient

    config = with_margins(tmp_path, tiny_model_dir, {})
    scores = learner_of(config).scores(examples_of(config))[:, 0].tolist()
    ahead = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    without, plain = step()
    with_margin, _ = step(margin_column="ahead")
    assert without == pytest.approx(sum(math.log1p(math.exp(-a)) for a in ahead) / 4, abs=1e-5)
    less = [math.log1p(math.exp(m - a)) for a, m in zip(ahead, (0.5, 2.0, 0.5, 2.0), strict=True)]
    assert with_margin == pytest.approx(sum(less) / 4, abs=1e-5)
    # the loss that is shown is that of the pairs; centring adds to the gradient alone
    same, centred = step(center_coef=0.01)
    assert same == without and not torch.allclose(centred, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("margins", 1.0, "score.margin_column is 'margins', which is not among the columns chosen, rejected"),
        ("margin", "much", "the margin in column 'margin' must be a number, got 'much'"),
    ],
)
def test_a_bad_margin_is_refused_with_its_line(
    tmp_path: Path, tiny_model_dir: Path, column: str, value: object, message: str
):
    made = settings(tmp_path, tiny_model_dir, score={"margin_column": column})
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "margin": value}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl:1: {message}"):
        RewardModelTrainer(make(made))


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (3, "must be an object"),
        ({"c": 1}, "which is not in score.objectives"),
        ({"a": "good"}, "must be a number or null"),
        ({"a": None}, "none of the objectives is rated"),
    ],
)
def test_a_bad_rating_is_refused_with_its_line(
    tmp_path: Path, tiny_model_dir: Path, ratings: object, message: str
):
    made = rated_settings(tmp_path, tiny_model_dir)
    row = {"prompt": "p", "completion": "x", "ratings": ratings}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        RewardModelTrainer(make(made))


@pytest.mark.parametrize("kind", ["pairs", "gated"])
def test_the_compute_type_is_chosen_for_the_machine(tmp_path: Path, tiny_model_dir: Path, kind: str):
    made = rated_settings if kind == "gated" else settings
    changes: dict[str, Any] = {"model": {"dtype": "auto"}, "steps": 1, "checkpoint": {"export": False}}
    config = made(tmp_path, tiny_model_dir, **changes)
    if kind == "gated":
        (tmp_path / "rated.jsonl").write_text((tmp_path / "train.jsonl").read_text())
        settings(tmp_path, tiny_model_dir)
        config["score"] = {"kind": "gated", "objectives": ["a", "b"], "gate": {"width": 4, "layers": 0}}
        config["data"]["ratings"] = str(tmp_path / "rated.jsonl")
    trainer = RewardModelTrainer(make(config))
    trainer.run()
    assert trainer.learner.model.policy.model.dtype in (torch.bfloat16, torch.float32)
    assert len(metrics_of(tmp_path)) == 1
