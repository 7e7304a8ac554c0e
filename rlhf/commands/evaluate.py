"""`rlhf eval`: how often a model is right on a dataset, by a reward function, with 95% intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from rlhf.collect.sampler import Sampler
from rlhf.commands.source import Source, find_source, load_weights
from rlhf.components import engine_starter
from rlhf.config.load import make_config
from rlhf.config.overrides import apply_override, read_settings
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.evaluation.intervals import bootstrap, pass_at_k
from rlhf.files import write_atomically
from rlhf.inputs import Inputs
from rlhf.preflight.load import load_inputs
from rlhf.rewards.success import check_objective, is_correct
from rlhf.types import FinishReason, Group

AT_ONCE = 64
FEW = 30
TAKEN = ("model", "data", "reward", "rollout", "eval", "seed")
"""Sections of a run's config that an evaluation goes by; all else is about training."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    source: str
    config: str | None = None
    data: str | None = None
    rewards: tuple[str, ...] = ()
    k: tuple[int, ...] = ()
    """Of pass@k; none: the powers of two up to the samples a prompt."""
    greedy: bool = False
    """The most probable token each time, so one sample a prompt."""
    out: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Example, of two prompts with 4 samples each, 4 and 0 of them right: `accuracy.value` 0.5."""

    source: str
    weights: str
    data: str
    prompts: int
    samples: int
    """A prompt."""
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    reward: float | None
    """Mean of those that got one."""
    unscored: int
    """Samples that no reward function gave a number: not right, and not in `reward`."""
    truncated: float
    """Share of samples cut at the limit."""
    mean_tokens: float
    records: list[dict[str, Any]]
    """One a prompt, with its completions."""


def run_evaluation(request: Request) -> Iterator[str]:
    """The lines to show. Everything is checked before weights are loaded; `out` is written at the end.

    Raises ConfigError, ModelError, EngineError, RewardError or CheckpointError.
    """
    if request.out is not None and Path(request.out).exists():
        raise ConfigError(f"{request.out} exists already; nothing was overwritten, name another file")
    source = find_source(request.source)
    config = evaluation_config(request, source)
    wanted = _wanted(request, config.eval.samples)
    inputs = load_inputs(config)
    with closing(inputs.rewards):
        groups = _sample(request, source, config, inputs)
    measured = measure(groups, config, wanted, source)
    if request.out is not None:
        write_atomically(Path(request.out), json.dumps(asdict(measured), indent=1, ensure_ascii=False))
    yield from describe(measured)
    if request.out is not None:
        yield f"written      {request.out}"


def evaluation_config(request: Request, source: Source) -> Config:
    """Settings of the run, or of `request.config`, with what the command line says instead.

    Raises ConfigError.
    """
    file = request.config if source.config is None else str(source.config)
    own = {} if file is None else read_settings(file)
    if own.get("task", "rl") != "rl":
        raise ConfigError(f"{file} trains a reward model; rlhf eval is for models that write completions")
    tree: dict[str, Any] = {key: own[key] for key in TAKEN if key in own}
    for override in request.overrides:
        apply_override(tree, override)
    for section in ("model", "data", "reward", "rollout", "eval"):
        tree[section] = dict(tree.get(section) or {})
    data, reward, rollout = tree["data"], tree["reward"], tree["rollout"]
    if source.checkpoint is None:
        tree["model"]["path"] = source.name
    if request.data is not None:
        data["eval"] = request.data
    if request.rewards:
        reward["functions"] = [{"path": path} for path in request.rewards]
    if not data.get("eval"):
        raise ConfigError("there is nothing to evaluate on: --data FILE, or data.eval=FILE")
    if not reward.get("functions"):
        raise ConfigError(
            "nothing says what is right: --reward file.py:function, or reward.functions in a config"
        )
    if request.greedy:
        tree["eval"]["samples"] = 1
    # the held-out set is the only one; how a model is trained has no say here
    data["train"], data["eval"] = data["eval"], None
    longest = int(data.get("max_prompt_tokens", 1024)) + int(rollout.get("max_completion_tokens", 512))
    return make_config(
        tree
        | {
            "run_dir": ".",
            "steps": 1,
            "algorithm": {"name": "grpo", "kl": {"coef": 0.0}, "mismatch": {"kind": "none"}},
            "learner": {"microbatch_tokens": max(1, longest)},
            "monitor": {"sinks": []},
        }
    )


def measure(groups: Sequence[Group], config: Config, wanted: Sequence[int], source: Source) -> Measured:
    """Accuracy is pass@1. Every group has `eval.samples` trajectories."""
    check_objective(groups, config.reward)
    counts = [sum(is_correct(t, config.reward) for t in group.trajectories) for group in groups]
    samples = [t for group in groups for t in group.trajectories]
    rewards = [t.reward for t in samples if t.reward is not None]
    n = config.eval.samples
    return Measured(
        source=source.name,
        weights=str(source.checkpoint or source.name),
        data=config.data.train,
        prompts=len(groups),
        samples=n,
        accuracy=_estimate([c / n for c in counts]),
        pass_at={k: _estimate([pass_at_k(n, c, k) for c in counts]) for k in wanted},
        reward=sum(rewards) / len(rewards) if rewards else None,
        unscored=len(samples) - len(rewards),
        truncated=sum(t.finish_reason == FinishReason.LENGTH for t in samples) / len(samples),
        mean_tokens=sum(sum(t.loss_mask) for t in samples) / len(samples),
        records=[_record(group, config) for group in groups],
    )


def describe(measured: Measured) -> Iterator[str]:
    yield f"model        {measured.weights}"
    yield f"data         {measured.data}: {measured.prompts} prompts x {measured.samples} samples"
    yield f"accuracy     {_said(measured.accuracy)}"
    for k, estimate in measured.pass_at.items():
        if k > 1:
            yield f"pass@{k:<8}{_said(estimate)}"
    mean = "none" if measured.reward is None else f"{measured.reward:.4f}"
    yield f"reward       {mean}, mean of {measured.prompts * measured.samples - measured.unscored} samples"
    yield f"length       {measured.mean_tokens:.1f} tokens, {100 * measured.truncated:.1f} % cut at the limit"
    if measured.unscored:
        yield (
            f"warning      {measured.unscored} samples got no reward (a function failed or does not apply); "
            "they count as wrong"
        )
    if measured.prompts < FEW:
        yield (
            f"warning      {measured.prompts} prompts are few: below about {FEW} the intervals are too narrow"
        )
    yield (
        "             95 % intervals over prompts: bootstrap, 10,000 resamples; "
        "Wilson's where all prompts agree"
    )


def _sample(request: Request, source: Source, config: Config, inputs: Inputs) -> list[Group]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(source, config.model, device, seed=config.seed)
    section = config.rollout
    engine = engine_starter(config, inputs, weights.model)()
    # one that does not hold this very module has loaded the weights of `model.path`
    engine.update_weights(weights, version=0)
    if request.greedy:
        section = section.model_copy(update={"temperature": 0.0})
    sampler = Sampler(engine, inputs.rewards, inputs.tokenizer, section, config.seed)
    prompts = inputs.train.prompts[: config.eval.max_prompts]
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
    groups: list[Group] = []
    for part in track(parts, "evaluating", console=Console(stderr=True), transient=True):
        requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in part]
        scored, _ = sampler.score(part, sampler.generate(requests), 0)
        groups += scored
    engine.close()
    return groups


def _wanted(request: Request, samples: int) -> list[int]:
    wanted = sorted(set(request.k)) or [2**i for i in range(samples.bit_length())]
    for k in wanted:
        if not 1 <= k <= samples:
            raise ConfigError(
                f"pass@{k} is estimated from {max(1, k)} samples a prompt at least, eval.samples is {samples}"
            )
    return wanted


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(sum(values) / len(values), *bootstrap(values))


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.4f}  ({estimate.low:.4f} to {estimate.high:.4f})"


def _record(group: Group, config: Config) -> dict[str, Any]:
    content = group.prompt.content
    return {
        "id": group.prompt.id,
        "prompt": content if isinstance(content, str) else list(content),
        "completions": [
            {
                "text": t.text,
                "reward": t.reward,
                "objectives": dict(t.objectives),
                "right": is_correct(t, config.reward),
                "finish_reason": str(t.finish_reason),
            }
            for t in group.trajectories
        ],
    }
