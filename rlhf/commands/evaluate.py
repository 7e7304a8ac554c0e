"""`rlhf eval`: accuracy and pass@k of a model on a dataset, by reward functions, with 95% intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from rlhf.collect.episodes import Episodes
from rlhf.collect.sampler import Sampler
from rlhf.commands.goals import goal_judges, report_goals
from rlhf.commands.model_source import Source, find_source, load_weights
from rlhf.commands.paths import taken_settings
from rlhf.commands.revise import Revision, describe_revision, measure_revision, revised
from rlhf.components import engine_starter
from rlhf.compute_dtype import with_dtype
from rlhf.config.load import make_config
from rlhf.config.overrides import read_settings
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.evaluation.intervals import pass_at_k, share_interval
from rlhf.files import write_atomically
from rlhf.inputs import Inputs
from rlhf.preflight.describe import about_inputs
from rlhf.preflight.load import load_inputs
from rlhf.rewards.success import check_objective, is_correct
from rlhf.types import FinishReason, Group

AT_ONCE = 64
"""Prompts that are sampled and scored together; the progress bar moves once for each such batch."""
FEW = 30
"""With fewer prompts than this a warning is given."""
TAKEN = ("model", "data", "environment", "reward", "rollout", "eval")
"""The sections of a run's config that an evaluation uses; the others are about training."""

PROMPTS = (
    "prompt_column",
    "image_column",
    "chat_template_kwargs",
    "max_prompt_tokens",
    "long_prompts",
)
"""The settings of the section `data` that an evaluation uses; the others are about completions in data."""


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of `rlhf eval`."""

    source: str
    config: str | None = None
    data: str | None = None
    rewards: tuple[str, ...] = ()
    k: tuple[int, ...] = ()
    """The k of pass@k; if empty, the powers of two up to the number of samples of a prompt."""
    greedy: bool = False
    """Whether to decode greedily, with one sample of each prompt."""
    goals: str | None = None
    """Who judges whether users' goals were reached (`goal_judges`); None: nobody."""
    revise: int = 0
    """How many times the model improves its answers."""
    revise_while: str | None = None
    """The objective that has to be above 0 for a revision to be kept and the answer to be improved further;
    None: every revision is kept."""
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
    """The results, as `--out` writes them.

    Example: two prompts with 4 samples each, of which 4 and 0 are correct: `accuracy.value` is 0.5.
    """

    source: str
    """What was named on the command line."""
    weights: str
    """The checkpoint or model that was evaluated."""
    data: str
    prompts: int
    samples: int
    """Samples of each prompt."""
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    reward: float | None
    """The mean reward of the samples that have one."""
    unscored: int
    """Samples without a reward: they count as wrong, and are left out of `reward`."""
    truncated: float
    """The share of samples that are cut at the token limit."""
    mean_tokens: float
    records: list[dict[str, Any]]
    """One object for each prompt, with its completions."""
    revisions: list[Revision] = field(default_factory=list[Revision])
    """What became of the answers when the model improved them, round by round."""
    goals: dict[str, Any] | None = None
    """What `--goals` found."""


def run_evaluation(request: Request) -> Iterator[str]:
    """The lines to show. All input is checked before weights are loaded; `out` is written at the end.

    Raises ConfigError, ModelError, EngineError, RewardError or CheckpointError.
    """
    if request.out is not None and Path(request.out).exists():
        raise ConfigError(f"--out: {request.out} exists already; nothing was overwritten, name another file")
    source = find_source(request.source)
    config = with_dtype(evaluation_config(request, source))
    ks = _ks(request, config.eval.samples)
    judges = None if request.goals is None else goal_judges(request.goals)
    inputs = load_inputs(config)
    with closing(inputs.rewards):
        groups, *rounds = _sample(request, source, config, inputs)
    measured = measure(groups, config, ks, source)
    for before, after in pairwise([groups, *rounds]):
        correct = [is_correct(t, config.reward) for g in after for t in g.trajectories]
        measured.revisions.append(measure_revision(before, after, correct))
    _write(request.out, measured)
    yield from describe(measured)
    if judges is not None:
        report = report_goals(groups, judges)
        _write(request.out, replace(measured, goals=report.figures()))
        yield from report.lines()
    yield from (f"warning      {text}" for text in about_inputs(config, inputs))
    if request.out is not None:
        yield f"written      {request.out}"


def _write(out: str | None, measured: Measured) -> None:
    if out is not None:
        write_atomically(Path(out), json.dumps(asdict(measured), indent=1, ensure_ascii=False))


def evaluation_config(request: Request, source: Source) -> Config:
    """The settings of the run, or of `request.config`, with those of the command line in their place.

    Raises ConfigError when they are not those of a policy run, or lack a dataset or a reward function.
    """
    file = request.config if source.config is None else str(source.config)
    own = {} if file is None else read_settings(file)
    if own.get("task", "rl") != "rl":
        raise ConfigError(f"{file} trains a reward model; rlhf eval evaluates models that generate text")
    tree = taken_settings(own, source.folder, TAKEN, request.overrides)
    data, reward, rollout = tree["data"], tree["reward"], tree["rollout"]
    if source.checkpoint is None:
        tree["model"]["path"] = source.name
    if request.data is not None:
        data["eval"] = request.data
    # a judge compares what a run samples
    reward.pop("preference", None)
    # what is evaluated is sampled from the model alone
    rollout.pop("samplers", None)
    if request.rewards:
        reward["functions"] = [{"path": path} for path in request.rewards]
    _check_has_data(source, data)
    if not reward.get("functions") and not tree["environment"].get("path"):
        raise ConfigError(
            "no reward function says what is correct: add --reward file.py:function, or set "
            "reward.functions in the config"
        )
    if request.greedy:
        tree["eval"]["samples"] = 1
    improve = _improve_prompt(request, data, tree["environment"].get("path"))
    # load_inputs reads the evaluation data as data.train; all settings of training are fixed to plain values
    data = {key: data[key] for key in PROMPTS if key in data} | improve | {"train": data["eval"]}
    longest = int(data.get("max_prompt_tokens", 1024)) + int(rollout.get("max_completion_tokens", 512))
    return make_config(
        tree
        | {
            "data": data,
            "run_dir": ".",
            "steps": 1,
            "algorithm": {"name": "grpo", "kl": {"coef": 0.0}, "mismatch": {"kind": "none"}},
            "learner": {"microbatch_tokens": max(1, longest)},
            "monitor": {"sinks": []},
        }
    )


def _check_has_data(source: Source, data: Mapping[str, Any]) -> None:
    if data.get("eval"):
        return
    here = Path(source.name).expanduser().is_dir()
    hub = "" if here else f"{source.name} is no folder here, so it is taken for a model of the hub; "
    raise ConfigError(f"{hub}there is nothing to evaluate on: add --data FILE, or data.eval=FILE")


def _improve_prompt(request: Request, data: Mapping[str, Any], environment: object) -> dict[str, Any]:
    """The setting of the section `data` by which answers are improved, where they are.

    Raises ConfigError: there is none, or an environment answers the model.
    """
    if request.revise_while is not None and not request.revise:
        raise ConfigError("--revise-while ends revisions early: add --revise N, their number at most")
    if request.revise < 0:
        raise ConfigError(f"--revise: a number of revisions is 0 or more, got {request.revise}")
    column = {key: data[key] for key in ("improve_column",) if data.get(key) is not None}
    if not request.revise and not column:
        return {}
    if environment and request.revise:
        raise ConfigError("--revise improves single answers, but there is an environment: leave one out")
    if not data.get("improve_prompt"):
        raise ConfigError(
            "--revise asks for a better answer, but nothing says in which words: add "
            "data.improve_prompt='Improve your answer.'"
        )
    return {"improve_prompt": data["improve_prompt"]} | column


def measure(groups: Sequence[Group], config: Config, ks: Sequence[int], source: Source) -> Measured:
    """Accuracy (pass@1), pass@k and reward of groups that have `eval.samples` trajectories each."""
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
        pass_at={k: _estimate([pass_at_k(n, c, k) for c in counts]) for k in ks},
        reward=sum(rewards) / len(rewards) if rewards else None,
        unscored=len(samples) - len(rewards),
        truncated=sum(t.finish_reason == FinishReason.LENGTH for t in samples) / len(samples),
        mean_tokens=sum(sum(t.loss_mask) for t in samples) / len(samples),
        records=[_record(group, config) for group in groups],
    )


def describe(measured: Measured) -> Iterator[str]:
    """The results as lines for the user."""
    yield f"model        {measured.weights}"
    yield f"data         {measured.data}: {measured.prompts} prompts x {measured.samples} samples"
    yield f"accuracy     {_text(measured.accuracy)}"
    for k, estimate in measured.pass_at.items():
        if k > 1:
            yield f"pass@{k:<8}{_text(estimate)}"
    mean = "none" if measured.reward is None else f"{measured.reward:.4f}"
    yield f"reward       {mean}, mean of {measured.prompts * measured.samples - measured.unscored} samples"
    yield f"length       {measured.mean_tokens:.1f} tokens, {100 * measured.truncated:.1f} % cut at the limit"
    yield from (describe_revision(i, revision) for i, revision in enumerate(measured.revisions, start=1))
    if measured.unscored:
        yield (
            f"warning      {measured.unscored} samples got no reward (a function failed or returned None); "
            "they count as wrong"
        )
    if measured.prompts < FEW:
        yield (
            f"warning      {measured.prompts} prompts are few: below about {FEW} the intervals are too narrow"
        )
    yield (
        "             95 % intervals over prompts: normal, two prompts of value 0 and two of value 1 added "
        "(Agresti and Coull)"
    )


def _sample(request: Request, source: Source, config: Config, inputs: Inputs) -> list[list[Group]]:
    """The scored answers to all prompts, and those of each round of revisions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(source, config.model, device, seed=config.seed)
    section = config.rollout
    engine = engine_starter(config, inputs, weights.model)()
    # an engine that does not share this module has loaded `model.path` instead of the checkpoint
    engine.update_weights(weights, version=0)
    if request.greedy:
        section = section.model_copy(update={"temperature": 0.0})
    episodes = Episodes.of(config, inputs, engine)
    sampler = Sampler(engine, inputs.rewards, inputs.tokenizer, section, config.seed, episodes=episodes)
    prompts = inputs.train.prompts[: config.eval.max_prompts]
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
    rounds: list[list[Group]] = [[] for _ in range(1 + request.revise)]
    reviser = inputs.reviser(config.data.improve_prompt)
    for part in track(parts, "evaluating", console=Console(stderr=True), transient=True):
        requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in part]
        scored, _ = sampler.score(part, sampler.generate(requests), 0)
        rounds[0] += scored
        for number, of_round in enumerate(rounds[1:], start=1):
            assert reviser is not None
            scored = revised(sampler, reviser, scored, number, while_above=request.revise_while)
            of_round += scored
    engine.close()
    if inputs.environments is not None:
        inputs.environments.close()
    return rounds


def _ks(request: Request, samples: int) -> list[int]:
    """The k of pass@k. Raises ConfigError when one is larger than the number of samples of a prompt."""
    ks = sorted(set(request.k)) or [2**i for i in range(samples.bit_length())]
    for k in ks:
        if not 1 <= k <= samples:
            raise ConfigError(
                f"pass@{k} needs at least {max(1, k)} samples of each prompt, but eval.samples is {samples}; "
                "raise eval.samples, or lower --k"
            )
    return ks


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(sum(values) / len(values), *share_interval(values))


def _text(estimate: Estimate) -> str:
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
