"""Helpers of several tests: tiny policies in float64, groups made by hand, and a bandit-like task."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from rlhf.algos.algorithm import Algorithm
from rlhf.config.learner import LearnerConfig
from rlhf.config.load import make_config
from rlhf.config.model import ModelConfig
from rlhf.distributed.world import World
from rlhf.learn.advantages import AdvantageContext
from rlhf.learn.buffer import Buffer
from rlhf.learn.critic import Critic
from rlhf.learn.experience import ExperienceBuilder, fields_of, pack_groups
from rlhf.learn.learner import Learner
from rlhf.learn.models import Models, References
from rlhf.learn.optimizer import MasterAdamW
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.learn.preference.twin import Twin
from rlhf.metrics import Max, Mean, Metrics, Sum
from rlhf.models.loading import load_policy
from rlhf.models.policy import Policy
from rlhf.trainer import Trainer
from rlhf.types import Experience, FinishReason, Group, Prompt, Trajectory, VersionSpan

ALONE = World(0, 1, torch.device("cpu"))
STEP: Metrics = {
    "reward/mean": Mean(3.0, 4),
    "reward/std": Mean(0.5),
    "kl/ref": Mean(0.0021),
    "entropy": Mean(1.32),
    "length/mean": Mean(98.0, 10),
    "length/truncated": Mean(3.0, 100),
    "throughput/tokens_per_second": Sum(412.0),
    "memory/peak_gib": Max(3.5),
    "time/step": Mean(11.2),
}
"""The metrics of a step."""


def bytes_held(thing: object) -> int:
    """The bytes of the tensors among its attributes."""
    return sum(value.nbytes for value in vars(thing).values() if isinstance(value, torch.Tensor))


class ExactRMSNorm(nn.Module):
    """Hugging Face's norms compute in float32 whatever the dtype of the model; this one keeps float64."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def policy_of(folder: Path, *, packing: str = "auto", dtype: torch.dtype = torch.float32) -> Policy:
    section = ModelConfig.model_validate({"path": str(folder), "packing": packing})
    policy = load_policy(section, str(folder), ALONE.device)
    if dtype == torch.float64:
        make_exact(policy.model)
    return policy


class ExactGemmaNorm(ExactRMSNorm):
    """Gemma's norm: its weights are counted from 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), 1.0 + self.weight, self.eps)


def make_exact(model: nn.Module) -> None:
    """Converts the model to float64, including the norms and the rotary table."""
    model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                weight, gemma = child.get_parameter("weight"), kind.startswith("Gemma")
                eps = cast(float, child.eps if gemma else child.variance_epsilon)
                setattr(module, name, (ExactGemmaNorm if gemma else ExactRMSNorm)(weight, eps))


def group(
    prompt: str, prompt_ids: list[int], completions: list[list[int]], rewards: list[float | None]
) -> Group:
    return Group(
        Prompt(prompt, tuple(prompt_ids), prompt),
        tuple(trajectory(ids, reward) for ids, reward in zip(completions, rewards, strict=True)),
    )


def trajectory(ids: list[int], reward: float | None, **changes: Any) -> Trajectory:
    n = len(ids)
    fields: dict[str, Any] = {
        "token_ids": tuple(ids),
        "loss_mask": (True,) * n,
        "turns": (0,) * n,
        "rollout_logprobs": tuple(-4.0 - 0.1 * (i % 7) for i in ids),
        "finish_reason": FinishReason.STOP,
        "versions": (VersionSpan(0, 0, n),),
        "text": "",
        "reward": reward,
        "objectives": {} if reward is None else {"right": reward},
    }
    return Trajectory(**(fields | changes))


def random_groups(seed: int, *, sizes: list[int], vocabulary: int = 99, longest: int = 12) -> list[Group]:
    """Groups of random tokens and lengths, with rewards 0 and 1, at least one of each in a group."""
    rng = random.Random(seed)
    groups: list[Group] = []
    for i, size in enumerate(sizes):
        ids = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(size)]
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest))]
        groups.append(group(f"p{i}", prompt, ids, [float(k % 2) for k in range(size)]))
    return groups


def unscored(groups: list[Group]) -> Experience:
    """The groups, packed, with advantages of 0: what buffers and records need, made without a model."""
    packed = pack_groups(groups, device=ALONE.device)
    advantages = torch.zeros_like(packed.rollout_logprobs)
    return Experience(**fields_of(packed), old_logprobs=None, ref_logprobs=None, advantages=advantages)


def learner_of(
    policy: Policy,
    algorithm: Algorithm,
    reference: Policy | References | None = None,
    *,
    critic_trunk: Path | None = None,
    perception: MaskedPasses | None = None,
    **section: Any,
) -> tuple[Learner, ExperienceBuilder]:
    """A learner and an experience builder as in a run of one rank, at temperature 1.

    A critic has the policy's trunk, or its own trunk from the folder `critic_trunk`.
    """
    settings = LearnerConfig.model_validate({"lr": 1e-3, "microbatch_tokens": 4096} | section)
    weights = next(policy.model.parameters()).dtype
    critic = None
    if critic_trunk is not None:
        critic = Critic.on_own_trunk(str(critic_trunk), ALONE.device, torch.float32, settings, 10)
        if weights == torch.float64:
            make_exact(critic.trunk.model)
            critic.head.double()
    elif algorithm.critic is not None:
        critic = Critic.on_policy_trunk(policy, settings, total_steps=10)
    optimizer = MasterAdamW(policy.model, weights, settings, total_steps=10)
    several = isinstance(reference, References)
    models = Models(
        algorithm=algorithm,
        policy=policy,
        reference=None if several else reference,
        references=reference if several else None,
        critic=critic,
        perception=perception,
    )
    chase = algorithm.chase
    twin = None if chase is None else Twin(policy, optimizer, chase, ALONE, settings, total_steps=10)
    learner = Learner(models, optimizer, ALONE, settings, temperature=1.0, twin=twin)
    context = AdvantageContext(is_correct=lambda trajectory: trajectory.reward == 1.0)
    builder = ExperienceBuilder(models, ALONE, settings, context, temperature=1.0)
    return learner, builder


REWARD = """
def share_of_a(completions, **_):
    return [text.count("a") / max(1, len(text)) for text in completions]

def each_a(completions, **_):
    return [[(i + 1, float(c == "a") / len(text)) for i, c in enumerate(text)] for text in completions]
"""


def bandit_settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run whose reward is the share of the letter a, which a tiny model learns in seconds."""
    (folder / "reward.py").write_text(REWARD)
    (folder / "train.jsonl").write_text("".join(f'{{"prompt": "say {i}:"}}\n' for i in range(40)))
    settings: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 12,
        "model": {"path": str(model_dir), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 32},
        "reward": {"functions": [{"path": f"{folder}/reward.py:share_of_a"}]},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.0}},
        "rollout": {"prompts_per_step": 8, "group_size": 8, "max_completion_tokens": 8},
        "learner": {"lr": 1e-2, "microbatch_tokens": 2048},
        "checkpoint": {"export": False},
        "monitor": {"sinks": []},
    }
    return changed(settings, changes)


def reward_model_settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a reward model's run on FOLDER/train.jsonl and FOLDER/eval.jsonl."""
    settings: dict[str, Any] = {
        "task": "reward_model",
        "run_dir": str(folder / "run"),
        "steps": 12,
        "model": {"path": str(model_dir), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 32,
        },
        "batch": {"tokens": 200},
        "learner": {"lr": 1e-2, "microbatch_tokens": 2048},
        "monitor": {"sinks": []},
    }
    return changed(settings, changes)


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with changes: sections are merged, other values are replaced."""
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return settings


def train(settings: dict[str, Any]) -> None:
    Trainer(make_config(settings)).run()


def train_interrupted(settings: dict[str, Any], *, after: int) -> None:
    """Trains until Ctrl-C arrives `after` updates, on which the run saves and ends."""
    updates, advance = 0, Buffer.advance

    def interrupted(self: Buffer, metrics: Metrics) -> None:
        nonlocal updates
        advance(self, metrics)
        updates += 1
        if updates == after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "advance", interrupted)
        train(settings)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step of the run of `bandit_settings(folder, ...)`."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


CLOCKS = ("time/", "throughput/", "memory/")


def without_clocks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without times and memory: equal bit for bit in two runs with the same settings."""
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]
