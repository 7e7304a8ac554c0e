"""`rlhf combine`: the sum of adapters is the sum of their products, and peft and transformers load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.models.adapter_files import AdapterFile, combine

peft = pytest.importorskip("peft")


def saved(folder: Path, base: Path, **settings: Any) -> Path:
    """A folder with an adapter of random A and B on the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(len(str(folder)))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def changes(folder: Path, base: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight of its model, as peft computes it."""
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def combined(out: Path, **weights: float) -> int:
    """Runs the command on folders beside `out`."""
    return main(["combine", *(f"{out.parent / n}={w}" for n, w in weights.items()), "--out", str(out)])


def test_two_layers_by_hand():
    # A_1 = (1 2), B_1 = (3): 3 6; A_2 = (4 5), B_2 = (-1): -4 -5; half of the first, twice the second
    one = AdapterFile(Path("a"), "m", {}, {"x": (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))})
    two = AdapterFile(Path("b"), "m", {}, {"x": (torch.tensor([[4.0, 5.0]]), torch.tensor([[-1.0]]))})
    down, up = combine([one, two], [0.5, 2.0])["x"]
    assert down.tolist() == [[1.0, 2.0], [4.0, 5.0]] and up.tolist() == [[1.5, -2.0]]
    assert (up @ down).tolist() == [[0.5 * 3 - 2 * 4, 0.5 * 6 - 2 * 5]]


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"r": 2, "lora_alpha": 3},
        {"target_modules": ["v_proj", "down_proj"]},
        {"target_modules": r".*layers\.1\..*up_proj"},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    ],
    ids=["alike", "rank and alpha", "layers", "targets of another type", "rank-stabilised", "patterns"],
)
def test_the_combination_adds_the_sum_of_the_products(tmp_path: Path, tiny_model_dir: Path, other: Any):
    saved(tmp_path / "a", tiny_model_dir, **other)
    saved(tmp_path / "bb", tiny_model_dir)
    assert combined(tmp_path / "sum", a=0.3, bb=-0.7) == 0
    a, b, got = (changes(tmp_path / name, tiny_model_dir) for name in ("a", "bb", "sum"))
    assert set(got) == set(a) | set(b)
    for name, change in got.items():
        zero = torch.zeros_like(change)
        want = 0.3 * a.get(name, zero) - 0.7 * b.get(name, zero)
        assert want.abs().max() > 0.1
        torch.testing.assert_close(change, want, rtol=0, atol=1e-6)


def test_means_of_the_matrices_would_be_something_else(tmp_path: Path, tiny_model_dir: Path):
    saved(tmp_path / "a", tiny_model_dir)
    saved(tmp_path / "bb", tiny_model_dir)
    assert combined(tmp_path / "sum", a=0.5, bb=0.5) == 0
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "bb"))
    change = next(iter(changes(tmp_path / "sum", tiny_model_dir).values()))
    down, up = (next(v for n, v in a.items() if end in n) for end in ("lora_A", "lora_B"))
    down2, up2 = (next(v for n, v in b.items() if end in n) for end in ("lora_A", "lora_B"))
    of_means = 2 * (0.5 * up + 0.5 * up2) @ (0.5 * down + 0.5 * down2)
    assert (of_means - change).abs().max() > 0.1


def test_runs_are_combined_and_one_alone_stays_what_it_is(
    adapter_run: Path, tmp_path: Path, tiny_model_dir: Path, capsys
):
    run = adapter_run
    assert main(["combine", f"{run}=1", "--out", str(tmp_path / "alone")]) == 0
    assert "a LoRA adapter of rank 4" in capsys.readouterr().out
    AutoTokenizer.from_pretrained(tmp_path / "alone")
    alone, own = (changes(f, tiny_model_dir) for f in (tmp_path / "alone", run / "adapter"))
    assert max(change.abs().max().item() for change in own.values()) > 0
    for name, change in own.items():
        torch.testing.assert_close(alone[name], change, rtol=0, atol=1e-6)
    # the model of half of it twice is the run's own model
    arguments = ["combine", f"{run}=0.5", f"{run / 'adapter'}=0.5", "--merged", "--out", str(tmp_path / "m")]
    assert main(arguments) == 0, capsys.readouterr().err
    got, want = (
        AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "m", run / "model")
    )
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-6)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["combine", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_added_is_refused_by_name(tmp_path: Path, tiny_model_dir: Path, capsys):
    a, out = saved(tmp_path / "a", tiny_model_dir), tmp_path / "out"
    assert "as runs/a=0.5" in refused(capsys, a, "--out", out)
    assert "as runs/a=0.5" in refused(capsys, f"{a}=much", "--out", out)
    assert "as runs/a=0.5" in refused(capsys, f"{a}=nan", "--out", out)
    assert "holds no LoRA adapter" in refused(capsys, f"{tiny_model_dir}=1", "--out", out)
    file = a / "adapter_config.json"
    config = json.loads(file.read_text())
    for changed, words in (
        ({"base_model_name_or_path": "other/model"}, "is an adapter of other/model, but"),
        ({"peft_type": "LOHA"}, "its peft_type is LOHA"),
        ({"use_dora": True}, "DoRA is not linear"),
        ({"bias": "all"}, "it has biases"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
    ):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "adapter_config.json").write_text(json.dumps(config | changed))
        save_file(load_file(a / "adapter_model.safetensors"), other / "adapter_model.safetensors")
        assert words in refused(capsys, f"{a}=1", f"{other}=1", "--out", out)
    tensors = {n: w[:, :3].contiguous() for n, w in load_file(a / "adapter_model.safetensors").items()}
    (other / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, other / "adapter_model.safetensors")
    assert "the adapters are of different models" in refused(capsys, f"{a}=1", f"{other}=1", "--out", out)
    save_file({"base_model.model.head.bias": torch.ones(2)}, other / "adapter_model.safetensors")
    assert "neither A nor B" in refused(capsys, f"{other}=1", "--out", out)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "nothing was overwritten" in refused(capsys, f"{a}=1", "--out", out)
