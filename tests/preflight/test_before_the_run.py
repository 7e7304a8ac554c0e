"""What makes a run fail is found before it starts; what a resumed run cannot repeat is told."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config

from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.checkpoints.stateful import CheckpointError, Cursor
from rlhf.cli import main
from rlhf.components import vllm_settings
from rlhf.config.load import make_config
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.section import ConfigError
from rlhf.data.identity import digest, identity
from rlhf.models.pretrained import TRUSTED, ModelError, load_model_config, load_tokenizer, text_settings
from rlhf.preflight.describe import warnings
from rlhf.preflight.load import load_inputs
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.trainer import Trainer
from rlhf.types import Group, Prompt
from tests.support import bandit_settings, metrics_of, trajectory


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("where", ["train", "eval", "completion"])
def test_a_token_beyond_the_embedding_is_refused_with_its_line(
    where: str, model: Path, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(model)
    rows = [
        {"prompt": "a", "completion": "b", "reward": 1.0},
        {"prompt": "a"} | {"completion": "b", "reward": 0},
    ]
    rows[1]["completion" if where == "completion" else "prompt"] = "use <|tool|>"
    odd = write(tmp_path / "odd.jsonl", *rows)
    settings = bandit_settings(tmp_path, model)
    if where == "completion":
        settings |= {"algorithm": {"name": "sft"}}
        settings["data"] |= {"train": odd, "mode": "offline"}
    else:
        settings["data"] |= {where: odd}
    line = "a completion of odd.jsonl:1" if where == "completion" else "odd.jsonl:2"
    message = rf"{line}: token 99 \('<\|tool\|>'\) is beyond the 99 embeddings of .* has 100 tokens"
    with pytest.raises(ConfigError, match=message):
        load_inputs(make_config(settings))


def test_settings_of_a_model_have_their_usual_names() -> None:
    settings = text_settings(GPT2Config(n_positions=300, n_embd=32, n_layer=2, n_head=4))
    usual = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
    assert [settings[name] for name in usual] == [300, 32, 2, 4]


def test_a_run_in_a_thread_trains_and_leaves_signals_alone(tmp_path: Path, tiny_model_dir: Path) -> None:
    trainer = Trainer(make_config(bandit_settings(tmp_path, tiny_model_dir, steps=1)))
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert [record["step"] for record in metrics_of(tmp_path)] == [1]


PROMPTS = [Prompt("a:1", (1, 2), "x", {"answer": 1}), Prompt("a:2", (1, 3), "y", {"answer": 2})]


def test_a_prompt_is_known_by_its_contents_and_not_by_its_line() -> None:
    moved = Prompt("a:9", (1, 2), "x", {"answer": 1})
    assert identity(moved) == identity(PROMPTS[0])
    others = [Prompt("a:1", (1, 4), "x", {"answer": 1}), Prompt("a:1", (1, 2), "x", {"answer": 5})]
    assert len({identity(p) for p in [*PROMPTS, *others]}) == 4
    swapped = [digest(PROMPTS), digest(PROMPTS[::-1])]
    assert swapped[0] != swapped[1]
    group = [Group(PROMPTS[0], (trajectory([5], 1.0),)), Group(PROMPTS[0], (trajectory([5], 0.0),))]
    assert len({digest(PROMPTS), *(digest(PROMPTS, [g]) for g in group)}) == 3


@pytest.mark.parametrize(("saved", "other"), [({"data": "x"}, True), ({"data": "y"}, False), ({}, False)])
def test_a_checkpoint_knows_its_data(saved: dict[str, str], *, other: bool) -> None:
    cursor = Cursor()
    cursor.data = "y"
    cursor.load({"steps_done": 1, "position": 4, **saved}, {})
    assert cursor.other_data is other
    assert cursor.state() == {"steps_done": 1, "position": 4, "data": "y"}


def test_completions_of_a_prompt_that_is_another_now_are_not_taken() -> None:
    state = group_state(Group(PROMPTS[0], (trajectory([5], 1.0),)))
    assert group_of(state, {"a:1": PROMPTS[0]}).prompt == PROMPTS[0]
    for prompts in ({}, {"a:1": PROMPTS[1]}):
        with pytest.raises(CheckpointError, match=r"completions of the prompt a:1, which is not in the data"):
            group_of(state, prompts)


def test_a_resumed_run_says_that_its_data_is_other(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(steps: int) -> str:
        settings = bandit_settings(
            tmp_path, tiny_model_dir, steps=steps, checkpoint={"resume": "auto", "every": 1}
        )
        if steps == 3:
            write(tmp_path / "train.jsonl", *({"prompt": f"new {i}:"} for i in range(30)))
        Trainer(make_config(settings)).run()
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split())

    told = "the training data is other data than that of the checkpoint"
    assert [told in run(steps) for steps in (1, 2, 3)] == [False, False, True]


def test_a_template_with_a_clock_is_warned_of(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}{{ messages[0].content }}")
    chat = write(tmp_path / "chat.jsonl", {"prompt": [{"role": "user", "content": "hi"}]})
    for train, warned in ((chat, True), (write(tmp_path / "text.jsonl", {"prompt": "hi"}), False)):
        settings = bandit_settings(tmp_path, model)
        settings["data"]["train"] = train
        config = make_config(settings)
        found = [text for text in warnings(config, load_inputs(config)) if "strftime_now" in text]
        assert bool(found) is warned


def test_code_of_a_model_runs_only_where_it_is_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asks)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "own_config.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (model / "own_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_config import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (model / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ModelError, match=r"brings Python code of its own.* model.trust_remote_code=true"):
        load_inputs(make_config(bandit_settings(tmp_path, model)))
    trusted = bandit_settings(tmp_path, model, model={"trust_remote_code": True}, steps=1)
    trusted["checkpoint"] = {"export": True}
    Trainer(make_config(trusted)).run()
    own_files = {"own_config.py", "own_model.py"}
    assert own_files <= {p.name for p in (tmp_path / "run" / "model").iterdir()}
    # a command in a process of its own knows it from the run's settings
    TRUSTED.clear()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert own_files <= {p.name for p in (tmp_path / "out").iterdir()}
    for given, wanted in (({}, True), ({"trust_remote_code": False}, False)):
        section = {"rollout": {"vllm": {"args": given}}, "model": {"trust_remote_code": True}}
        config_of_run = make_config(bandit_settings(tmp_path, model, **section))
        assert vllm_settings(config_of_run).args["trust_remote_code"] is wanted
    assert load_model_config(str(model)).model_type == "own"
    assert load_tokenizer(str(model)) is not None


def test_sft_on_pairs_or_labels_is_warned_of_and_best_of_is_not(tmp_path: Path, tiny_model_dir: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    label = {"prompt": "a", "completion": "b", "label": True}
    scored = {"prompt": "a", "completion": "b", "reward": 0.5, "label": "a"}
    found: list[str] = []
    for row in (pair, label, scored, {"prompt": "a", "completion": "b"}):
        for name in ("sft", "best_of"):
            settings = bandit_settings(tmp_path, tiny_model_dir, algorithm={"name": name, "kl": {}})
            settings["algorithm"] = {"name": name}
            settings |= {"reward": {}}
            write(tmp_path / "train.jsonl", row)
            settings["data"]["mode"] = "offline"
            if name == "best_of" and len(row) == 2:
                with pytest.raises(ValueError, match=r"train.jsonl:1: no column 'reward' among"):
                    load_inputs(make_config(settings))
                continue
            config = make_config(settings)
            found += [text for text in warnings(config, load_inputs(config)) if "imitates every" in text]
    assert [text.partition(", those of ")[2].partition(" too:")[0] for text in found] == [
        "rejected",
        "label = false",
    ]


def test_a_reward_model_knows_its_data_and_its_positions(tmp_path: Path, model: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 40, "rejected": "c"},
    ]
    settings = {
        "task": "reward_model", "run_dir": str(tmp_path / "run"), "batch": {"tokens": 64},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": "", "eval": write(tmp_path / "eval.jsonl", rows[0]), "max_completion_tokens": 99},
    }  # fmt: skip
    sizes: list[int] = []
    digests: set[str] = set()

    def load(*given: dict[str, str], **data: Any) -> RewardModelTrainer:
        settings["data"] |= {"train": write(tmp_path / "pairs.jsonl", *given)} | data
        return RewardModelTrainer(RewardModelConfig.model_validate(settings))

    for given in (rows, [rows[0], {**rows[1], "rejected": "d"}]):
        digests.add(digest([e.prompt for e in load(*given).train]))
    assert len(digests) == 2
    limits = {"max_completion_tokens": 20, "long_prompts": "skip"}
    sizes = [len(load(*rows, **limits).train)]
    assert sizes == [1]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 42}))
    # 1 token of the prompt, 40 of the completion, its end, and one more: 43
    with pytest.raises(
        ConfigError, match=r"pairs.jsonl:2: prompt and completion need 43 positions, but .* 42"
    ):
        load(*rows, max_completion_tokens=99)
