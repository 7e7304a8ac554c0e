"""TRL's side of preference.py: DPOTrainer on the same pairs, run by a Python that has TRL 1.16.

Each line "step" on standard input lets one optimizer step pass; its figures are one JSON line on standard
output. Nothing of rlhf is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils  # pyright: ignore[reportMissingImports]
from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Timed(DPOTrainer):
    """Keeps what a step learned from and its losses, and times the reference pass before training."""

    losses: list[float]
    batches: list[dict[str, Any]]
    norms: list[float]
    precompute_s = 0.0

    def _precompute_ref_logps(self, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments, **keywords)
        self.precompute_s = time.perf_counter() - start
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        self.losses.append(loss.item())
        self.batches.append(inputs)
        return loss

    def _get_grad_norm(self, *arguments: Any, **keywords: Any) -> Any:
        norm = super()._get_grad_norm(*arguments, **keywords)
        self.norms.append(float(norm))
        return norm


class Paced(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.precompute_s = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if sys.stdin.readline().strip() != "step":
            sys.exit()
        self.losses.clear()
        self.batches.clear()
        self.norms.clear()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step_s = time.perf_counter() - self.start
        record = {
            "step_s": step_s,
            "learn_s": step_s,
            "sync_s": 0.0,
            # the microbatches of a step are equally large
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": self.norms[-1],
            "pairs": [pair for batch in self.batches for pair in pairs_of(batch)],
            "precompute_s": self.precompute_s,
            "peak_gib": peak_gib(),
            "threads": torch.get_num_threads(),
        }
        print("STEP " + json.dumps(record), flush=True)  # noqa: T201


def pairs_of(batch: dict[str, Any]) -> list[list[list[int]]]:
    """Token ids of prompt, chosen and rejected completion; the first half of the rows is chosen."""
    rows: list[tuple[list[int], list[int]]] = []
    for ids, attended, learned in zip(
        *(batch[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        end, begin = sum(attended), sum(attended) - sum(learned)
        rows.append((ids[:begin], ids[begin:end]))
    half = len(rows) // 2
    return [[rows[i][0], rows[i][1], rows[i + half][1]] for i in range(half)]


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder, words = Path(settings["folder"]), settings["words"]
    if "compact_head" in words:
        # without a GPU, TRL scores the tokens of prompts too; its function asks only where it scores them
        trl.trainer.utils._use_triton = lambda device: True
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=settings["microbatch"],
        gradient_accumulation_steps=settings["pairs"] // settings["microbatch"],
        train_sampling_strategy="sequential",
        max_length=None,
        beta=settings["beta"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        precompute_ref_log_probs="precompute" in words,
        max_steps=settings["steps"],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing="checkpointing" in words,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    file = str(folder / "in_order.jsonl")
    paced = Paced()
    trainer = Timed(
        model=settings["model"],
        args=config,
        train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "cache")),
        callbacks=[paced],
    )
    trainer.losses, trainer.batches, trainer.norms = paced.losses, paced.batches, paced.norms
    paced.precompute_s = trainer.precompute_s
    trainer.train()


if __name__ == "__main__":
    main()
