"""Whatever makes `rlhf train` fail before its first step, `rlhf check` finds: what it passes also trains."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rlhf.cli import main
from rlhf.config.load import load_config
from rlhf.models.pretrained import ModelError
from rlhf.preflight.load import load_inputs
from rlhf.trainer import Trainer
from tests.conftest import save_tiny_tokenizer
from tests.rewards.test_model import save_classifier
from tests.support import bandit_settings, changed

Change = Callable[[Path], dict[str, Any]]
"""Spoils or changes what is in a folder (the model is in `model`) and returns changes of the settings."""
ASK = {"role": "user", "content": "say a"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2000000000\n"
REWARDS = """
from dataclasses import dataclass
from functools import partial

def close(completions, goal, answer=None, **kwargs):
    return [float(len(c)) for c in completions]

near = partial(close, goal=3)
short = lambda completions: [0.0 for _ in completions]

@dataclass
class Scale:
    by: float = 2.0
    def __call__(self, completions, **kwargs):
        return [self.by for _ in completions]

def lacking(completions, **kwargs):
    return [float(a) for a in kwargs["answer"]]

def compute_score(solution_str, ground_truth, keywords=()):
    return float(len(keywords))
"""


def weights(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: str = "model"
) -> Change:
    def spoil(here: Path) -> dict[str, Any]:
        file = here / folder / "model.safetensors"
        save_file(change({k: v.clone() for k, v in load_file(file).items()}), file, {"format": "pt"})
        return {}

    return spoil


def model_file(name: str, content: str | None, *, keep: bool = True) -> Change:
    """Writes a file of the model, or cuts it in half. To `keep` JSON is to add to it."""

    def spoil(here: Path) -> dict[str, Any]:
        file = here / "model" / name
        if content is None:
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
        elif keep and content.startswith("{"):
            old = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(old | json.loads(content)))
        else:
            file.write_text(content)
        return {}

    return spoil


def rows(*columns: dict[str, Any], **changes: Any) -> Change:
    def spoil(here: Path) -> dict[str, Any]:
        (here / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in columns))
        return changes

    return spoil


def settings(**changes: Any) -> Change:
    return lambda here: changes


def held_out(*lines: dict[str, Any], **changes: Any) -> Change:
    """Data to compare held-out completions by, beside the same lines to learn from."""

    def spoil(here: Path) -> dict[str, Any]:
        made = rows(*lines)(here) | {"algorithm": {"name": "dpo"}} | changes
        shutil.copy(here / "train.jsonl", here / "eval.jsonl")
        return made | {"data": made.get("data", {}) | {"mode": "offline", "eval": str(here / "eval.jsonl")}}

    return spoil


def reward(path: str, **more: Any) -> Change:
    def spoil(here: Path) -> dict[str, Any]:
        (here / "rewards.py").write_text(REWARDS)
        return {"reward": {"functions": [{"path": f"{here}/rewards.py:{path}", **more}]}}

    return spoil


def scored_by(spoil: Change) -> Change:
    """A reward model in the folder `rm`."""

    def change(here: Path) -> dict[str, Any]:
        save_classifier(here / "rm", ["reward"])
        spoil(here)
        function = {"path": "reward_model", "params": {"model": str(here / "rm")}, "timeout": 60}
        return {"reward": {"functions": [function]}}

    return change


def adapter_alone(here: Path) -> dict[str, Any]:
    (here / "model" / "config.json").unlink()
    (here / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    return {}


def run_folder_taken(here: Path) -> dict[str, Any]:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("years of work")
    return {}


def run_folder_is_a_file(here: Path) -> dict[str, Any]:
    (here / "run").write_text("")
    return {}


def broken_sink(here: Path) -> dict[str, Any]:
    (here / "wandb.py").write_text("import no_such_package\n")
    return {"monitor": {"sinks": ["wandb"]}}


def double_scorer(here: Path) -> dict[str, Any]:
    save_classifier(here / "rm", ["a", "b"])
    return {"algorithm": {"name": "ppo"}, "critic": {"path": str(here / "rm")}}


def cut_scorer(here: Path) -> dict[str, Any]:
    save_classifier(here / "rm", ["a"])
    weights(lambda state: {k: v for k, v in state.items() if "layers.1.mlp" not in k}, "rm")(here)
    return {"algorithm": {"name": "ppo"}, "critic": {"path": str(here / "rm")}}


def extra_token(here: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(here / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(here / "model")
    return rows({"prompt": "a"}, {"prompt": "use <|tool|>"})(here)


def sliding(here: Path) -> dict[str, Any]:
    from transformers import MistralConfig, MistralForCausalLM

    shutil.rmtree(here / "model")
    size = save_tiny_tokenizer(here / "model")
    config: Any = MistralConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8, max_position_embeddings=512,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(here / "model")
    return {"model": {"packing": "shared_prefix"}}


def of_kind(kind: str, **changes: Any) -> Change:
    """A small model of another kind."""

    def change(here: Path) -> dict[str, Any]:
        from benchmarks.model_kinds import small_config, small_model

        shutil.rmtree(here / "model")
        size = save_tiny_tokenizer(here / "model")
        small_model(small_config(kind, vocab_size=size)).save_pretrained(here / "model")
        return changes

    return change


def encoder(folder: Path) -> dict[str, Any]:
    """BERT, which reads in both directions, as a critic."""
    from transformers import BertConfig, BertModel

    size = save_tiny_tokenizer(folder)
    config: Any = BertConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return {"algorithm": {"name": "ppo"}, "critic": {"path": str(folder)}}


OFFLINE: dict[str, Any] = {
    "data": {"mode": "offline"},
    "algorithm": {"name": "sft"},
    "reward": {"functions": []},
}
CHAT = [ASK, {"role": "assistant", "content": "a"}]
REFUSED: dict[str, tuple[Change, str]] = {
    "a layer is missing": (
        weights(lambda state: {k: v for k, v in state.items() if ".layers.1.mlp" not in k}), "lack 3 of"),
    "compiled": (weights(lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}), "_orig_mod."),
    "another shape": (weights(lambda state: state | {"model.norm.weight": torch.ones(7)}), r"is \[7\] in"),
    "cut weights": (model_file("model.safetensors", None), "not all of it is there"),
    "a pointer": (model_file("model.safetensors", POINTER), "pointer of Git LFS"),
    "a pointer as tokenizer": (model_file("tokenizer.json", POINTER), "pointer of Git LFS"),
    "a cut tokenizer": (model_file("tokenizer.json", None), "tokenizer.json is damaged"),
    "an adapter alone": (adapter_alone, r"an adapter \(LoRA\) alone"),
    "no such folder": (settings(model={"path": "./nowhere"}), "there is no model folder nowhere"),
    "code of its own": (
        model_file("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'),
        "model.trust_remote_code=true"),
    "generation config": (
        model_file("generation_config.json", '{"max_new_tokens": -1}', keep=False), "is invalid"),
    "positions": (model_file("config.json", '{"max_position_embeddings": 30}'), "positions for 30 tokens"),
    "a token without embedding": (extra_token, r"train.jsonl:2: token 99 \('<\|tool\|>'\)"),
    "a packing that the model cannot do": (sliding, "cannot: it attends to a sliding window of 8 tokens"),
    "no such layer": (settings(model={"lora": {"targets": ["q_porj"]}}), "did you mean q_proj"),
    "a layer that is not called": (
        of_kind("mamba", model={"lora": {"targets": ["dt_proj"]}}), "its weight is used without calling"),
    "no causal model": (of_kind("bert-generation"), "depends on the tokens after it: this is no causal"),
    "a critic that is no causal model": (
        lambda here: encoder(here / "encoder"), "hidden states depend on the tokens after it"),
    "two scores": (double_scorer, "gives 2 scores a text"),
    "a critic without weights": (cut_scorer, "lack 3 of"),
    "a lacking column": (reward("lacking"), "needs columns that the dataset does not have: 'answer'"),
    "no such function": (reward("nere"), "did you mean near"),
    "a reward model without a layer": (
        scored_by(weights(lambda state: {k: v for k, v in state.items() if "layers.1.mlp" not in k}, "rm")),
        "reward function reward_model: .* lack 3 of"),
    "stringified messages": (rows({"prompt": json.dumps([ASK])}), "is text that holds chat messages"),
    "ends with the assistant": (rows({"prompt": CHAT}), "ends with a message of the assistant"),
    "tools": (
        rows({"prompt": [ASK], "tools": [{"type": "function", "function": {"name": "f"}}]}), "write tools"),
    "calls": (
        rows({"prompt": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, ASK]}),
        "does not write tool_calls"),
    "no rewards": (
        rows({"prompt": "a", "completion": "b"}, **OFFLINE | {"algorithm": {"name": "weighted_bc"}}),
        "no column 'reward' among"),
    "held-out completions without an order": (
        held_out({"prompt": "a", "completion": "b", "label": True}, algorithm={"name": "kto"}),
        "no held-out line has two completions with unequal rewards"),
    "a broken sink": (broken_sink, "installed but cannot be imported: No module named 'no_such_package'"),
    "files in the run folder": (run_folder_taken, "holds files that are not those of a run"),
    "a file as run folder": (run_folder_is_a_file, "is a file; choose another run_dir"),
    "a run folder in a file": (
        lambda here: {"run_dir": str(here / "train.jsonl" / "run")}, "train.jsonl is no folder that you may"
    ),
}  # fmt: skip
TRAINS: dict[str, Change] = {
    "nulls": rows({"prompt": [{**ASK, "tool_calls": None, "name": None}]}),
    "half a character": rows({"prompt": "nice \ud83d"}),
    "text of a template": rows({"prompt": "<|user|>say a<|end|>"}),
    "a generation config that is mended": model_file("generation_config.json", '{"temperature": 0.6}'),
    "a partial": reward("near"),
    "a lambda": reward("short"),
    "a class": reward("Scale"),
    "a list in params": lambda here: {
        **rows({"prompt": "a", "ground_truth": "b"})(here),
        **reward("compute_score", params={"keywords": ["x"]})(here),
    },
    "an adapter": settings(model={"lora": {"rank": 2, "targets": ["q_proj"]}}),
    # a linear layer with a forward of its own
    "an adapter of Falcon": of_kind("falcon", model={"lora": {"rank": 2, "targets": ["query_key_value"]}}),
    "a sliding window": lambda here: sliding(here) | {"model": {"packing": "auto"}},
    "pairs that a function scores, held out by their labels": held_out(
        {"prompt": "a", "chosen": "ab", "rejected": "b"}, data={"reward_column": None}
    ),
    "completions alone": rows({"prompt": "a", "completion": "b"}, **OFFLINE),
    "chats of ShareGPT": rows(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, **OFFLINE
    ),
}


def prepared(folder: Path, model: Path, change: Change) -> Path:
    shutil.copytree(model, folder / "model")
    given = bandit_settings(folder, folder / "model", steps=1)
    given["rollout"] |= {"prompts_per_step": 2, "group_size": 2}
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(changed(given, change(folder))))
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_train_would_refuse_check_refuses_with_the_same_sentence(
    case: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, message = REFUSED[case]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    file = prepared(tmp_path, tiny_model_dir, change)
    said: list[str] = []
    # a worker takes seconds to load a reward model
    for command in ("check",) if "reward model" in case else ("check", "train"):
        assert main([command, str(file)]) == 2
        said.append(capsys.readouterr().err.rpartition(f"rlhf {command}: ")[2])
    assert re.search(message, said[0]), said[0]
    assert said[0] == said[-1] and said[0].count("\n") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TRAINS)
def test_what_check_passes_makes_its_first_step(case: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    trainer = Trainer(load_config(prepared(tmp_path, tiny_model_dir, TRAINS[case])))
    with trainer.open():
        trainer.sync()
        trainer.prepare()
        trainer.step()
    assert trainer.cursor.steps_done == 1


def test_sharded_weights_have_to_be_safetensors_under_the_models_names(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    file = prepared(tmp_path, tiny_model_dir, settings(distributed={"mode": "sharded"}))
    load_inputs(load_config(file), world_size=2).rewards.close()
    folder = tmp_path / "model"
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    # one rank holds all of the model, and reads any file
    load_inputs(load_config(file)).rewards.close()
    with pytest.raises(ModelError, match=r"has no safetensors files, which sharded models are read from"):
        load_inputs(load_config(file), world_size=2)
    with pytest.raises(ValueError, match=r"distributed.shard_ranks is 2, but 3 ranks"):
        load_inputs(
            load_config(file, ["distributed.shard_ranks=2", "rollout.prompts_per_step=3"]), world_size=3
        )
