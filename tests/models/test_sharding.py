"""Models in shards: losses, gradients and checkpoints are those of one rank that holds everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoints.store import load
from rlhf.config.learner import DistributedConfig
from rlhf.distributed.shards import first_row, own_rows
from rlhf.distributed.world import world
from rlhf.models.loading import _tried, load_sharded_policy
from rlhf.models.packing import pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.models.sharding import Sharding, WeightFiles, gathered, in_step, shard_ranks
from tests.faults.processes import launch
from tests.ranks import together
from tests.support import bandit_settings, metrics_of, policy_of

COMPARED = ("reward/mean", "length/mean", "entropy", "grad_norm", "loss/policy", "kl/ref", "ptx/loss")


def tokens(rank: int) -> Any:
    ids = (torch.arange(3, 30) + 7 * rank) % 99
    return pack([ids[:4], ids[4:7]], [[ids[7:10], ids[10:16]], [ids[16:18]]])


def gradients_are_those_of_one(folder: str, other: str, shards: int | None) -> None:
    """Of a loss with an exact KL to the model `other`, also while some ranks make empty passes."""
    with world() as here:
        section = DistributedConfig(mode="sharded", shard_ranks=shards)
        sharding = Sharding.of(section, torch.float32, here)
        assert sharding is not None
        from rlhf.config.model import ModelConfig

        model = ModelConfig(path=folder)
        policy = load_sharded_policy(model, folder, sharding, trains=True)
        reference = load_sharded_policy(model, other, sharding, trains=False)
        whole, whole_reference = policy_of(Path(folder)), policy_of(Path(other))
        ranks = range(here.size)
        # the last rank has one pass fewer than the others
        passes = [0, 1] if here.rank < here.size - 1 else [0]
        for number in in_step(passes, policy.model, here):
            if number is None:
                policy.dummy_pass(reference).backward()
                continue
            loss_of(policy, reference, here.rank + 10 * number).backward()
        for rank in ranks:
            for number in [0, 1] if rank < here.size - 1 else [0]:
                loss_of(whole, whole_reference, rank + 10 * number).backward()
        expected = dict(whole.model.named_parameters())
        for name, parameter in policy.model.named_parameters():
            want = expected[name].grad
            assert want is not None and parameter.grad is not None
            rows = own_rows(parameter.grad)
            start = first_row(parameter)
            torch.testing.assert_close(rows, want[start : start + len(rows)], rtol=1e-4, atol=1e-6)
        for name, weight in gathered(policy.model):
            assert torch.equal(weight, expected.pop(name))
        assert not expected


def loss_of(policy: Policy, reference: Policy, seed: int) -> torch.Tensor:
    """From the policy's hidden states, as the learner makes them before it asks the reference."""
    packed = tokens(seed)
    found = policy.statistics(
        packed,
        temperature=1.0,
        want=("logprob", "kl"),
        reference=reference,
        hidden=policy.hidden(packed),
    )
    assert found.logprob is not None and found.kl is not None
    return found.logprob.square().sum() + 100.0 * found.kl.sum()


@pytest.mark.multi
@pytest.mark.parametrize(
    ("family", "ranks", "shards"), [("qwen2", 2, None), ("llama", 4, 2)], ids=["tied-2", "hybrid-2x2"]
)
def test_gradients_are_those_of_one_rank(
    tiny_model: Callable[[str], Path], family: str, ranks: int, shards: int | None
) -> None:
    other = tiny_model("llama-sharp")
    together(ranks, gradients_are_those_of_one, str(tiny_model(family)), str(other), shards)


def run(folder: Path, model_dir: Path, ranks: int, **changes: Any) -> list[dict[str, Any]]:
    """Several updates a step, an exact KL, and prompts and texts that ranks cannot share out evenly."""
    folder.mkdir(exist_ok=True)
    texts = [{"text": "b" * (2 + i)} for i in range(5)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    settings = bandit_settings(
        folder,
        model_dir,
        steps=3,
        rollout={"prompts_per_step": 6, "group_size": 4, "max_completion_tokens": 6},
        learner={"microbatch_tokens": 64},
        checkpoint={"every": 0, "resume": "auto"},
        ptx={"path": str(folder / "texts.jsonl"), "coef": 0.1, "samples": 3},
    )
    settings["algorithm"] = {"name": "grpo", "kl": {"coef": 0.01, "estimator": "exact"}}
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    for ended in launch(settings, folder / "log", ranks=ranks):
        assert ended.code == 0, ended.said
    return metrics_of(folder)


def assert_close(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(expected, got, strict=True):
        for name in COMPARED:
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), (one["step"], name)


SHARDED = {"mode": "sharded"}


@pytest.mark.multi
def test_sharded_runs_learn_what_one_rank_learns_and_any_number_resumes_any_other(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    straight = run(tmp_path / "one", tiny_model_dir, 1)
    assert_close(
        run(tmp_path / "four", tiny_model_dir, 4, distributed=SHARDED | {"shard_ranks": 2}), straight
    )
    two = tmp_path / "two"
    assert_close(run(two, tiny_model_dir, 2, steps=2, distributed=SHARDED), straight[:2])
    saved = two / "run" / "checkpoints" / "step_000002"
    assert {"policy.model.rank00000.safetensors", "policy.model.rank00001.safetensors"} <= {
        file.name for file in saved.iterdir()
    }
    whole = load(saved, device="cpu").tensors["policy.model"]
    assert whole["model.embed_tokens.weight"].shape == (99, 32)
    # saved on two ranks, continued on one and on four
    for ranks in (1, 4):
        copied = tmp_path / f"to-{ranks}"
        copy(two, copied)
        assert_close(run(copied, tiny_model_dir, ranks, distributed=SHARDED), straight)


@pytest.mark.multi
def test_a_critic_of_its_own_learns_the_same_in_shards(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Actor, critic and reference, each in shards."""
    kl = {"coef": 0.01, "estimator": "k1", "placement": "reward"}
    changes: dict[str, Any] = {"algorithm": {"name": "ppo_max", "kl": kl}, "critic": {"lr": 1e-3}, "steps": 2}
    one = run(tmp_path / "one", tiny_model_dir, 1, **changes)
    two = run(tmp_path / "two", tiny_model_dir, 2, distributed=SHARDED, **changes)
    assert_close(two, one)
    for alone, both in zip(one, two, strict=True):
        for name in ("critic/loss", "critic/returns", "critic/explained_variance"):
            assert both[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4), (alone["step"], name)
    saved = {file.name for file in (tmp_path / "two" / "run" / "checkpoints" / "step_000002").iterdir()}
    assert {f"critic.optimizer.rank0000{rank}.safetensors" for rank in (0, 1)} <= saved


def copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


@pytest.mark.multi
def test_in_bfloat16_masters_are_float32_and_the_run_learns(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = {"dtype": "bfloat16", "gradient_checkpointing": True}
    one = run(tmp_path / "one", tiny_model_dir, 1, model=model, steps=2)
    two = run(tmp_path / "two", tiny_model_dir, 2, model=model, steps=2, distributed=SHARDED)
    assert two[0]["reward/mean"] == pytest.approx(one[0]["reward/mean"], abs=0.02)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=0.1)
    saved = load(tmp_path / "two" / "run" / "checkpoints" / "step_000002", device="cpu")
    assert {t.dtype for t in saved.tensors["policy.model"].values()} == {torch.float32}


def test_rows_are_read_without_the_rest_of_a_weight(tiny_model_dir: Path) -> None:
    files = WeightFiles(tiny_model_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = files.rows(name, 0, 64)
    assert whole.shape == (64, 32) and torch.equal(files.rows(name, 10, 13), whole[10:13])


def test_a_model_without_safetensors_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no safetensors files"):
        WeightFiles(tmp_path)


def test_ranks_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_ranks is 3, but 8 ranks cannot be dealt"):
        shard_ranks(DistributedConfig(mode="sharded", shard_ranks=3), 8)


def test_any_rows_are_read_out_of_the_files_of_any_ranks(tmp_path: Path) -> None:
    """A file of rows says in its own header which they are."""
    from safetensors.torch import save_file

    from rlhf.checkpoints.tensor_files import ROWS, SavedTensors

    whole = torch.arange(10.0).view(5, 2)
    for rank, (start, stop) in enumerate([(0, 3), (3, 5)]):
        rows = {"w": whole[start:stop].clone()}
        save_file(rows, tmp_path / f"{rank}", {ROWS: json.dumps({"w": (start, [5, 2])})})
    saved = SavedTensors([tmp_path / "1", tmp_path / "0"], "cpu")
    assert torch.equal(saved["w"], whole) and saved.shape("w") == (5, 2)
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(saved.rows("w", start, stop), whole[start:stop])


def test_a_rank_that_is_lost_while_models_are_compared_is_no_fault_of_the_model() -> None:
    def fails(text: str) -> str:
        raise RuntimeError(text)

    assert _tried(lambda: fails("no such kernel")) == "its code fails there with RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        _tried(lambda: fails("Connection closed by peer [127.0.0.1]:18656"))
