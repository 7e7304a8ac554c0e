"""Text mixed into the updates: drawn by number, weighed by its tokens, and refused when it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.learner import PtxConfig
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.data.texts import load_texts
from rlhf.distributed.world import World
from rlhf.learn.pretraining import Pretraining
from rlhf.metrics import merge
from rlhf.models.pretrained import load_tokenizer
from tests.support import ALONE, bandit_settings, metrics_of, policy_of, train

TEXTS = [{"text": "bb" * (1 + i % 3) + "c"} for i in range(7)]
ANSWERS = [{"prompt": f"say {i}:", "completion": "bc" * (1 + i % 3)} for i in range(7)]


def section(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> PtxConfig:
    (folder / "ptx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"path": str(folder / "ptx.jsonl"), "coef": 0.5, "samples": 4}
    return PtxConfig.model_validate(made | changes)


@pytest.mark.parametrize("kind", ["text", "completions"])
def test_its_gradient_is_that_of_the_mean_over_all_learned_tokens(
    tmp_path: Path, tiny_model_dir: Path, kind: str
):
    policy = policy_of(tiny_model_dir, dtype=torch.float64)
    made = section(tmp_path, TEXTS if kind == "text" else ANSWERS, kind=kind, samples=7)
    texts = load_texts(made, load_tokenizer(str(tiny_model_dir)), 64)

    def gradients() -> list[torch.Tensor]:
        return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]

    def mixed(budget: int, ranks: int = 1) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of all ranks, one after the other."""
        policy.model.zero_grad()
        parts = [
            Pretraining(texts, made, policy, World(rank, ranks, ALONE.device), seed=0, budget=budget)
            for rank in range(ranks)
        ]
        loss = merge([part.accumulate(3) for part in parts])["ptx/loss"].value
        return loss, gradients()

    found = [mixed(64), mixed(25), mixed(64, ranks=2)]
    policy.model.zero_grad()
    policy.layout = "padded"
    losses = torch.zeros((), dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([[*text.given, *text.learned]])
        logprobs = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        losses = losses - logprobs[len(text.given) - 1 :].sum()
    mean = losses / sum(len(text.learned) for text in texts)
    (0.5 * mean).backward()
    for loss, some in found:
        assert loss == pytest.approx(mean.item())
        for got, want in zip(some, gradients(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_run_mixes_it_into_every_update_and_it_is_remembered(tmp_path: Path, tiny_model_dir: Path):
    made = section(tmp_path, TEXTS).model_dump()
    train(bandit_settings(tmp_path, tiny_model_dir, steps=6, ptx=made, learner={"minibatches": 2}))
    losses = [record["ptx/loss"] for record in metrics_of(tmp_path)]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("changes", [{"coef": None}, {"samples": None}, {"path": None}])
def test_what_no_source_gives_must_be_given(tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any]):
    made = section(tmp_path, TEXTS).model_dump() | changes
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} is not given"):
        make_config(bandit_settings(tmp_path, tiny_model_dir, ptx=made))


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"text": "b"}], "text", "must have 2 to 64 tokens"),
        ([{"words": "bbb"}], "text", "no column 'text'"),
        ([{"prompt": "bbb"}], "completions", "needs a column completion"),
        ([{"prompt": "b" * 60, "completion": "b" * 9}], "completions", "got 70"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, tiny_model_dir: Path, rows: list[dict[str, Any]], kind: str, message: str
):
    with pytest.raises(ValueError, match=message):
        load_texts(section(tmp_path, rows, kind=kind), load_tokenizer(str(tiny_model_dir)), 64)
