"""How a batch is cut into passes changes nothing, for every kind whose loss trains the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import load_examples
from rlhf.learn.optimizer import MasterAdamW
from rlhf.models.pretrained import load_tokenizer
from rlhf.reward_model.kinds.table import KINDS, kind_of
from rlhf.reward_model.learner import Batch, RewardModelLearner, TrainedKind
from rlhf.reward_model.model import RewardModel
from tests.support import ALONE, policy_of, reward_model_settings

# lines with different numbers of completions and steps, so that no average of averages is right
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"chosen": "a" * (1 + i), "rejected": "b", "margin": 0.3 * i} for i in range(4)],
    "ratings": [{"completion": "a" * (1 + i), "ratings": {"score": 0.5 * i}} for i in range(4)],
    "ranking": [
        {"completions": ["a", "bb", "ccc"][: 2 + i % 2], "relevance": [0, 2, 1][: 2 + i % 2]}
        for i in range(4)
    ],
    "steps": [{"steps": ["a", "bb", "c"][: 1 + i % 3], "labels": [1, 0, 0.5][: 1 + i % 3]} for i in range(4)],
    "gap": [{"chosen": "a" * (1 + i), "rejected": "b"} for i in range(4)],
}


def test_every_kind_that_trains_the_whole_model_is_here() -> None:
    assert set(ROWS) == {name for name, kind in KINDS.items() if issubclass(kind, TrainedKind)}


@pytest.mark.parametrize("name", ROWS)
def test_the_losses_of_the_parts_add_up_to_that_of_the_batch(
    name: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    lines = (json.dumps({"prompt": f"say {i}:", **row}) for i, row in enumerate(ROWS[name]))
    (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    centred = {"center_coef": 0.1} if name == "pairs" else {}
    settings = reward_model_settings(tmp_path, tiny_model_dir, score={"kind": name, **centred})
    config = RewardModelConfig.model_validate(settings)
    kind = kind_of(config)
    assert isinstance(kind, TrainedKind)
    model = RewardModel(policy_of(tiny_model_dir, dtype=torch.float64), 1)
    model.head.to(torch.float64)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    optimizer = MasterAdamW(model.module, torch.float64, config.learner, config.steps)
    learner = RewardModelLearner(model, kind, optimizer, ALONE)
    examples = load_examples(config.data.train, config.data, kind, load_tokenizer(str(tiny_model_dir)))

    def gradient(*parts: list[int]) -> tuple[torch.Tensor, float]:
        model.module.zero_grad()
        found = [learner.accumulate([examples[i] for i in part], Batch(examples, 3)) for part in parts]
        assert model.head.weight.grad is not None
        total: Any = [metrics["reward_model/loss"] for metrics in found]
        return model.head.weight.grad.clone(), sum(m.total for m in total) / sum(m.count for m in total)

    whole, loss = gradient([0, 1, 2, 3])
    cut, same = gradient([2], [0, 3], [1])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-10)
    assert same == pytest.approx(loss)
