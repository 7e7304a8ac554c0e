"""Checkpoints are whole or absent: saved bits come back, damage is named, a kill costs one save."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.checkpoints.stateful import CheckpointError
from rlhf.checkpoints.store import export, latest, load
from tests.checkpoints.support import save

STATE = {
    "step": 1,
    "cursor": {"epoch": 2, "index": 17},
    "kl_coef": 0.1,
    "name": "größer",
    "rates": [0.5, None, True],
}


def tensors(fill: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((8, 4), fill), "bias": torch.full((4,), fill, dtype=torch.bfloat16)},
        "optimizer": {"weight.exp_avg": torch.full((8, 4), fill / 3), "step": torch.tensor(12)},
    }


def put(folder: Path, step: int, *, keep_last: int = 5, fill: float = 1.0) -> Path:
    return save(folder, step=step, tensors=tensors(fill), state=STATE, keep_last=keep_last)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, torch.pi])
    saved = {
        "fp32": torch.cat([noise, special]),
        "bf16": torch.cat([noise, special]).bfloat16(),
        "int64": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "rng": torch.get_rng_state(),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "grad": torch.ones(3, requires_grad=True),
    }
    path = save(tmp_path, step=12, tensors={"model": saved}, state=STATE, keep_last=1)
    checkpoint = load(path, device="cpu")
    assert path.name == "step_000012" and checkpoint.state == {"run": STATE}
    assert list(checkpoint.tensors) == ["run.model"]
    assert checkpoint.tensors["run.model"].keys() == saved.keys()
    for name, tensor in saved.items():
        back = checkpoint.tensors["run.model"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape, name
        assert bits(back) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(state=st.dictionaries(st.text(), JSON, max_size=4))
def test_any_json_state_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    path = save(folder, step=1, tensors={}, state=state, keep_last=1)
    assert load(path, device="cpu").state == {"run": state}


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"seen": {7: 0.5}}, r"state\['run'\]\['seen'\]: key 7 is no string"),
        ({"betas": [(0.9, 0.99)]}, r"state\['run'\]\['betas'\]\[0\]: tuple is not JSON"),
        ({"loss": torch.tensor(1.0)}, r"state\['run'\]\['loss'\]: Tensor is not JSON"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], where: str) -> None:
    with pytest.raises(AssertionError, match=where):
        save(tmp_path, step=1, tensors={}, state=state, keep_last=1)


def test_tensors_that_share_memory_are_refused_by_name(tmp_path: Path) -> None:
    weight = torch.zeros(6, 4)
    for other in (weight, weight.t(), weight[2:4], weight.flatten()[5:]):
        with pytest.raises(AssertionError, match=r"run.model: .*(embed.*head|head.*embed).* share memory"):
            save(tmp_path, step=1, tensors={"model": {"embed": weight, "head": other}}, state={}, keep_last=1)


def test_pieces_of_one_buffer_that_do_not_overlap_are_no_sharing(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    path = save(tmp_path, step=1, tensors={"model": {"a": flat[:4], "b": flat[4:]}}, state={}, keep_last=1)
    back = load(path, device="cpu").tensors["run.model"]
    assert back["a"].tolist() == [0, 1, 2, 3] and back["b"].tolist() == [4, 5, 6, 7, 8, 9]


def test_the_last_k_are_kept_and_latest_is_the_newest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    for step in (5, 10, 15):
        put(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == ["step_000010", "step_000015"]
    assert latest(tmp_path) == tmp_path / "step_000015"
    assert (tmp_path / "LATEST").read_text() == "step_000015\n"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        put(tmp_path, step)
    assert latest(tmp_path) == tmp_path / "step_1000000"


def test_a_step_saved_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    put(tmp_path, 5, fill=1.0)
    path = put(tmp_path, 5, fill=2.0)
    assert load(path, device="cpu").tensors["run.model"]["weight"].eq(2.0).all()
    assert steps(tmp_path) == ["step_000005"]


def test_checkpoints_of_later_steps_are_removed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 20, 10):
        put(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == ["step_000005", "step_000010"]
    assert "step_000020 is of a later step" in caplog.text


def flip_first(content: bytearray) -> None:
    content[0] ^= 1


def flip_middle(content: bytearray) -> None:
    content[len(content) // 2] ^= 0x10


def flip_last(content: bytearray) -> None:
    content[-1] ^= 0x80


def cut_off(content: bytearray) -> None:
    del content[-3:]


def empty(content: bytearray) -> None:
    content.clear()


FILES = ["run.model.safetensors", "run.optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("damage", [flip_first, flip_middle, flip_last, cut_off, empty])
@pytest.mark.parametrize("name", FILES)
def test_damage_in_any_file_is_named_and_the_last_good_one_used(
    tmp_path: Path, name: str, damage: Callable[[bytearray], None], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = put(tmp_path, 5), put(tmp_path, 10)
    content = bytearray((bad / name).read_bytes())
    damage(content)
    (bad / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step_000010/{name}: (size|digest|unreadable)"):
        load(bad, device="cpu")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    assert f"step_000010/{name}" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = put(tmp_path, 5), put(tmp_path, 10)
    (bad / name).unlink()
    assert latest(tmp_path) == good
    assert f"step_000010/{name}: missing" in caplog.text


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    manifest = put(tmp_path, 5) / "manifest.json"
    content = manifest.read_bytes()
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << (i % 8)
        manifest.write_bytes(damaged)
        assert latest(tmp_path) is None, f"byte {i}, {content[max(0, i - 10) : i + 10]!r}"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    put(tmp_path, 5)
    bad = put(tmp_path, 10)
    (bad / "state.json").write_text("{}")
    put(tmp_path, 10)
    assert latest(tmp_path) == bad


KILLED_WHILE_SAVING = """
    import itertools, os, signal, sys
    from pathlib import Path
    import safetensors.torch, torch
    import rlhf.checkpoints.store as checkpoint
    from tests.checkpoints import support as checkpoints

    root = Path(sys.argv[1])

    def save(folder, step):
        tensors = {"model": {"weight": torch.full((64,), float(step))}}
        checkpoints.save(folder, step=step, tensors=tensors, state={"step": step}, keep_last=1)

    def dies_at(call, calls_left):
        def wrapper(*args, **kwargs):
            calls_left[0] -= 1
            if calls_left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper

    def child(folder, point, steps):
        left = [point]
        for module, name in (
            (os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"),
            (checkpoint, "save_file"),
        ):
            setattr(module, name, dies_at(getattr(module, name), left))
        for step in steps:
            save(folder, step)
        os._exit(0)

    for again in (False, True):
        for point in itertools.count():
            folder = root / f"{again}-{point}"
            save(folder, 10)
            pid = os.fork()
            if pid == 0:
                child(folder, point, [10] if again else [20])
            _, status = os.waitpid(pid, 0)
            found = checkpoint.latest(folder)
            step = checkpoint.load(found, device="cpu").state["run"]["step"] if found else None
            save(folder, 30)
            print(again, point, os.WIFSIGNALED(status), step, sorted(p.name for p in folder.iterdir()))
            if not os.WIFSIGNALED(status):
                break
"""


def test_a_run_killed_at_any_point_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    result = run_python(KILLED_WHILE_SAVING, str(tmp_path))
    lines = [line.split(maxsplit=4) for line in result.splitlines()]
    for again, point, _, step, left in lines:
        assert step in ("10", "20"), (
            f"saving {'the same' if again == 'True' else 'a later'} step, point {point}"
        )
        assert left == "['LATEST', 'step_000030']"
    assert len(lines) > 20 and {line[3] for line in lines if line[0] == "False"} == {"10", "20"}
    assert [line[2] for line in lines].count("False") == 2, (
        "each series ends with the save that was not killed"
    )


def run_python(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


DISK_THAT_IS_FULL = """
    import resource, sys
    from pathlib import Path
    import torch
    from rlhf.checkpoints.store import CheckpointError, latest
    from tests.checkpoints.support import save

    folder = Path(sys.argv[1])

    def put(step, size):
        save(folder, step=step, tensors={"model": {"weight": torch.ones(size)}}, state={}, keep_last=1)

    put(5, 100)
    # simulates a full disk without special rights: no file of this process may grow beyond 64 KiB
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        put(10, 100_000)
    except CheckpointError as error:
        print(error)
    print(sorted(p.name for p in folder.iterdir()), latest(folder).name)
"""


def test_a_save_that_cannot_be_written_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    message, left = run_python(DISK_THAT_IS_FULL, str(tmp_path)).splitlines()
    assert message.startswith(f"the checkpoint of step 10 could not be written to {tmp_path}: ")
    assert "File too large" in message and message.endswith("Earlier checkpoints are as they were.")
    assert left == "['LATEST', 'step_000005'] step_000005"


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 5)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(CheckpointError, match=r"step 10 .*No space left.* takes 0.00 GiB, .* GiB are free"):
        put(tmp_path, 10)
    assert steps(tmp_path) == ["step_000005"]


def test_an_export_is_what_transformers_loads(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # its head is tied to the embedding
    source = tiny_model("qwen2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    folder = tmp_path / "final"
    for shift in (0.0, 1.0):
        with torch.no_grad():
            model.get_input_embeddings().get_parameter("weight").add_(shift)
        export(model, tokenizer, folder)
        back = AutoModelForCausalLM.from_pretrained(folder)
        token_ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(back(token_ids).logits, model(token_ids).logits)
        head = back.get_output_embeddings()
        assert head is not None and head.weight is back.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_an_export_does_not_overwrite_what_it_did_not_write(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("llama")
    (tmp_path / "thesis.tex").write_text("years of work")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    with pytest.raises(CheckpointError, match="is not empty and is no earlier export"):
        export(model, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_manifest_says_what_wrote_it(tmp_path: Path) -> None:
    manifest = json.loads((put(tmp_path, 5) / "manifest.json").read_text())
    assert manifest["step"] == 5 and manifest["world_size"] == 1
    assert torch.__version__.startswith(manifest["versions"]["torch"].partition("+")[0])
    assert set(manifest["files"]) == {"run.model.safetensors", "run.optimizer.safetensors", "state.json"}


def test_a_killed_export_is_cleared_away_by_the_next_and_no_other_folder(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    # process numbers end below 2 ** 22
    dead = 1 << 23
    names = (f"out.tmp-{dead}", f"out.replaced-{dead}", "out.tmp-1", "out.tmp-old", f"other.tmp-{dead}")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.json").write_text("{}")
    (tmp_path / f"out.tmp-{dead + 1}").mkdir()
    export(model, tokenizer, tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    # one of a process that runs, two of other names, one that no export has marked
    assert left == {"out", "out.tmp-1", "out.tmp-old", f"other.tmp-{dead}", f"out.tmp-{dead + 1}"}


def test_what_transformers_refuses_to_save_is_told_as_a_failed_export(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.generation_config.temperature = 0.5
    with pytest.raises(CheckpointError, match=r"could not be exported to .*out: GenerationConfig is invalid"):
        export(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
