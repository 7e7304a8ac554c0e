"""Model folders that are not whole: the file or the weight is named before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.checkpoints.store import export
from rlhf.cli import main
from rlhf.config.load import make_config
from rlhf.models.pretrained import (
    ModelError,
    check_weights,
    eos_token_ids,
    load_generation_config,
    load_model,
    load_model_config,
    load_scorer,
    load_tokenizer,
)
from rlhf.preflight.load import load_inputs
from tests.rewards.test_model import save_classifier
from tests.support import bandit_settings

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2000000000\n"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(state), file, {"format": "pt"})


def in_shards(folder: Path) -> list[Path]:
    """The folder's weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def assert_refused(folder: Path, message: str, *, head: bool = True) -> None:
    """Both by the check, which reads no weights, and when the model is loaded."""
    loads: Any = load_model if head else load_scorer
    for refuse in (lambda: check_weights(str(folder), head=head), lambda: loads(str(folder), CPU)):
        with pytest.raises(ModelError, match=message):
            refuse()


def test_a_whole_model_passes_in_one_file_in_several_and_as_a_pickle(folder: Path) -> None:
    check_weights(str(folder))
    check_weights(str(folder), head=False)
    assert len(in_shards(folder)) > 1
    check_weights(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    check_weights(str(folder))


def test_weights_that_the_files_lack_are_named(folder: Path) -> None:
    rewrite(folder, lambda state: {k: v for k, v in state.items() if ".layers.1.mlp" not in k})
    first = r"lack 3 of the model's weights \(model.layers.1.mlp.down_proj.weight, .*would be random"
    assert_refused(folder, first)
    # the names that a transformer without head gives them
    assert_refused(folder, r"lack 3 of the model's weights \(layers.1.mlp.down_proj.weight", head=False)


def test_a_lost_head_is_named_unless_it_is_tied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for tied in (True, False):
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        rewrite(folder, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
        if tied:
            check_weights(str(folder))
        else:
            assert_refused(folder, r"lack 1 of the model's weights \(lm_head.weight\)")
            check_weights(str(folder), head=False)


def test_a_prefix_of_torch_compile_is_named(folder: Path) -> None:
    rewrite(folder, lambda state: {f"_orig_mod.{k}": v for k, v in state.items()})
    assert_refused(folder, r"without the prefix _orig_mod., which torch.compile")


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    name = "model.norm.weight"
    rewrite(folder, lambda state: state | {name: torch.ones(7)})
    assert_refused(folder, r"model.norm.weight is \[7\] in its files, but \[32\] by config.json")


def test_a_reward_model_without_its_score_head_is_refused(tmp_path: Path) -> None:
    from rlhf.rewards.model import RewardModel

    folder = save_classifier(tmp_path, ["reward"])
    rewrite(folder, lambda state: {k: v for k, v in state.items() if k != "score.weight"})
    assert_refused(folder, r"lack 1 of the model's weights \(score.weight\)", head=False)
    with pytest.raises(ModelError, match=r"lack 1 of the model's weights \(score.weight\)"):
        RewardModel(str(folder))


def test_a_lost_shard_is_named(folder: Path) -> None:
    lost = in_shards(folder)[1]
    lost.unlink()
    assert_refused(folder, rf"index.json names \d+ files of weights, but 1 of them .* not there: {lost.name}")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_cut_is_named(folder: Path, kind: str) -> None:
    if kind.endswith("bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / kind)
        (folder / "model.safetensors").unlink()
    contents = (folder / kind).read_bytes()
    (folder / kind).write_bytes(contents[: len(contents) // 2])
    assert_refused(folder, rf"{kind} is damaged or not all of it is there \({len(contents) // 2} bytes")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_pointer_of_git_lfs_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    assert_refused(
        folder, rf"{name} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(folder: Path, name: str) -> None:
    contents = (folder / name).read_text()
    (folder / name).write_text(contents[: len(contents) // 2])
    with pytest.raises(ModelError, match=rf"{name} is damaged or not all of it is there"):
        load_tokenizer(str(folder))


def test_an_adapter_in_place_of_a_model_is_named_with_its_base(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=r"holds an adapter \(LoRA\) alone, for org/base: take that model"):
        load_model_config(str(folder))


@pytest.mark.parametrize("which", ["policy", "reference", "critic"])
def test_every_model_of_a_run_is_checked_before_it_starts(
    which: str, folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rewrite(folder, lambda state: {k: v for k, v in state.items() if "layers.0.self_attn" not in k})
    changes: dict[str, Any] = {
        "policy": {"model": {"path": str(folder)}},
        "reference": {
            "model": {"reference": str(folder)}, "algorithm": {"kl": {"coef": 0.1}},
        },
        "critic": {"algorithm": {"name": "ppo"}, "critic": {"path": str(folder)}},
    }[which]  # fmt: skip
    config = make_config(bandit_settings(tmp_path, tiny_model_dir, **changes))
    with pytest.raises(ModelError, match=r"model: its files lack 4 of the model's weights"):
        load_inputs(config)


SHIPPED = {"eos_token_id": [2, 1], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("shipped", "kept"),
    [
        ({"do_sample": True}, {"do_sample": True, "temperature": 0.6}),
        # transformers reads these two, and refuses to save them
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}),
        ({}, {"do_sample": True, "temperature": 0.6}),
        ({"pad_token_id": -1}, {"do_sample": None, "temperature": None, "pad_token_id": None}),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_repaired(
    folder: Path, tmp_path: Path, shipped: dict[str, Any], kept: dict[str, Any]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(SHIPPED | shipped))
    assert eos_token_ids(str(folder)) == {1, 2}
    export(load_model(str(folder), CPU), AutoTokenizer.from_pretrained(folder), tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [2, 1]
    assert {name: getattr(found, name) for name in kept} == kept


@pytest.mark.parametrize("contents", ['{"max_new_tokens": -1}', "{", "[]"])
@pytest.mark.filterwarnings("ignore")
def test_a_generation_config_beyond_repair_is_refused_before_the_run(
    folder: Path, tmp_path: Path, contents: str
) -> None:
    (folder / "generation_config.json").write_text(contents)
    with pytest.raises(ModelError, match=r"generation_config.json (is invalid|cannot be read): "):
        load_inputs(make_config(bandit_settings(tmp_path, folder)))


def test_without_a_generation_config_the_models_config_says_where_texts_end(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_generation_config(str(folder)) is None
    assert eos_token_ids(str(folder)) == {2}


def test_rlhf_check_says_what_train_would(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (folder / "model.safetensors").write_text(POINTER)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(bandit_settings(tmp_path, folder)))
    for command in ("check", "train"):
        assert main([command, str(file)]) == 2
        assert capsys.readouterr().err == (
            f"rlhf {command}: {folder}/model.safetensors is a pointer of Git LFS, not the file itself: "
            "fetch it with git lfs pull\n"
        )
