"""TRL's side of grpo_step.py: GRPOTrainer on the same work, run by a Python that has TRL 1.16.

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
from datasets import load_dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


def distinct_characters(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return [len(set(messages[0]["content"])) / 50 for messages in completions]


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Timed(GRPOTrainer):
    """Keeps the seconds of rollouts and rewards, and what was sampled."""

    record: dict[str, float]

    def _generate(self, prompts: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate(prompts)
        self.record["rollout_s"] = time.perf_counter() - start
        self.record["prompt_tokens"] = sum(len(ids) for ids in output[0])
        self.record["completion_tokens"] = sum(len(ids) for ids in output[1])
        return output

    def _calculate_rewards(self, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        output = super()._calculate_rewards(*arguments, **keywords)
        self.record["reward_s"] = time.perf_counter() - start
        return output


class Paced(TrainerCallback):
    def __init__(self) -> None:
        self.record: dict[str, float] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if sys.stdin.readline().strip() != "step":
            sys.exit()
        self.record.clear()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        record = self.record
        record["step_s"] = time.perf_counter() - self.start
        record["learn_s"] = record["step_s"] - record["rollout_s"] - record["reward_s"]
        record["sync_s"] = 0.0
        record["peak_gib"] = peak_gib()
        print("STEP " + json.dumps(record), flush=True)  # noqa: T201


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder = Path(settings["folder"])
    samples, microbatch = settings["prompts"] * settings["group_size"], settings["microbatch"]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=samples // microbatch,
        num_generations=settings["group_size"],
        max_completion_length=settings["max_tokens"],
        beta=settings["kl_coef"],
        learning_rate=settings["lr"],
        loss_type="grpo",
        max_steps=settings["steps"],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": settings["dtype"]},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    paced = Paced()
    trainer = Timed(
        model=settings["model"],
        reward_funcs=distinct_characters,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        callbacks=[paced],
    )
    trainer.record = paced.record
    trainer.train()


if __name__ == "__main__":
    main()
