"""The text of `rlhf check` about settings and data, and the warnings that a run prints when it starts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator

import torch

from rlhf.algos.algorithm import KL
from rlhf.compute_dtype import in_words
from rlhf.config.checks.run import return_candidates
from rlhf.config.reward import JudgeConfig
from rlhf.config.run import Config
from rlhf.data.chats import chats_column
from rlhf.data.completions import OfflineDataset
from rlhf.data.prompts import first_row
from rlhf.devices import this_device
from rlhf.inputs import Inputs
from rlhf.models.chat import has_clock
from rlhf.models.lora import frozen_experts, without_adapter
from rlhf.models.pretrained import empty_model
from rlhf.models.vision.text_alone import text_alone
from rlhf.preflight import tags
from rlhf.preflight.environments import describe_environments
from rlhf.preflight.estimate import estimate
from rlhf.preflight.machine import Machine
from rlhf.preflight.models import models_of
from rlhf.preflight.probe import credits_steps, ignores_rewards, learns_from_one
from rlhf.preflight.reference import by_column, unnamed
from rlhf.preflight.trial import try_packing
from rlhf.rewards.judges.duels import asking
from rlhf.types import Source


def describe(config: Config, inputs: Inputs, *, world_size: int = 1) -> Iterator[str]:
    """What a run of this config will do: the lines that `rlhf check` prints."""
    rollout, learner = config.rollout, config.learner
    samples = rollout.prompts_per_step * rollout.group_size
    if inputs.offline is not None and config.data.mode == "offline" and config.data.sampling == "groups":
        mean = inputs.offline.num_completions / len(inputs.offline.groups)
        samples = round(rollout.prompts_per_step * mean)
    yield from _describe_models(config, inputs)
    yield f"algorithm    {config.algorithm['name']} {_settings(config)}"
    prompts = _lengths(len(p.token_ids) for p in inputs.train.prompts)
    yield f"data         {len(inputs.train)} prompts {prompts}, {inputs.train.skipped} skipped as too long"
    if config.data.improve_column is not None:
        yield (
            f"improves     the answer in the column {config.data.improve_column}, asked by "
            f"{config.data.improve_prompt!r}"
        )
    yield from _describe_images(config, inputs)
    if inputs.environments is not None:
        yield from describe_environments(config, inputs.environments, inputs.train.prompts)
    yield f"held out     {_held_out(config, inputs)}"
    yield from _describe_completions(config, inputs, world_size)
    yield from _describe_samplers(config)
    updates = learner.epochs * learner.minibatches
    yield (
        f"updates      {learner.epochs} epoch(s) x {learner.minibatches} minibatch(es) = {updates} a step, "
        f"microbatches of at most {learner.microbatch_tokens} tokens"
    )
    writers, critic = models_of(config, inputs.algorithm)
    yield f"packing      {try_packing(config.model, writers, critic, config.longest)}"
    passes = config.steps * rollout.prompts_per_step / len(inputs.train)
    drawn = f"{config.steps * samples} completions"
    if config.data.mode == "offline" and _learns_pairs(inputs):
        drawn = f"{config.steps * rollout.prompts_per_step} pairs"
    yield (f"the run      {config.steps} steps, {drawn}, {passes:.1f} passes over the data")
    yield f"run folder   {config.run_dir}"
    yield from estimate(config, inputs, world_size=world_size, machine=_machine(config, world_size)).lines()
    yield from (f"warning      {text}" for text in warnings(config, inputs))


def _settings(config: Config) -> str:
    """The settings of the algorithm; of a KL that is switched off no more than that."""
    values = {key: value for key, value in config.algorithm.items() if key != "name"}
    off = isinstance(values.get("kl"), KL) and not values["kl"].coef
    return ", ".join(f"{k}=none" if k == "kl" and off else f"{k}={v}" for k, v in values.items())


def _lengths(tokens: Iterable[int]) -> str:
    counts = sorted(tokens)
    return f"of {counts[0]} to {counts[-1]} tokens (median {statistics.median(counts):.0f})"


def _are_pairs(data: OfflineDataset) -> bool:
    return all(len(g.trajectories) == 2 for g in data.groups)


def _learns_pairs(inputs: Inputs) -> bool:
    """Whether a preference algorithm learns from data of pairs alone."""
    data = inputs.offline
    return data is not None and inputs.algorithm.preference is not None and _are_pairs(data)


def _held_out(config: Config, inputs: Inputs) -> str:
    pairs = ""
    if inputs.eval_pairs is not None:
        what = "pairs" if _are_pairs(inputs.eval_pairs) else "groups of completions"
        same = inputs.eval_pairs.identical
        left_out = f" ({same} more left out, whose completions are the same)" if same else ""
        pairs = f"{len(inputs.eval_pairs.groups)} {what}{left_out}"
    if inputs.eval is None:
        return pairs or "none"
    several = len(config.reward.functions) > 1
    what = config.reward.success_objective or ("the weighted sum of rewards" if several else "the reward")
    return (
        f"{pairs and pairs + '; '}{len(inputs.eval)} prompts x {config.eval.samples} samples; correct where "
        f"{what} is at least {config.reward.success_threshold:g}"
    )


def _describe_images(config: Config, inputs: Inputs) -> Iterator[str]:
    images = [len(p.images or ()) for p in inputs.train.prompts]
    if any(images):
        with_images = sum(n > 0 for n in images)
        yield f"images       {sum(images)}, in {with_images} of the {len(images)} prompts"
    if inputs.algorithm.perception is not None:
        section = config.perception
        yield (
            f"perception   coef {section.coef:g}, entropy_coef {section.entropy_coef:g}, masked_entropy_coef "
            f"{section.masked_entropy_coef:g}; {section.ratio:.0%} of {section.patch}-pixel patches hidden"
        )


def _describe_models(config: Config, inputs: Inputs) -> Iterator[str]:
    sources = config.rollout.sources
    needed = inputs.algorithm.needs_reference or bool(sources & {Source.REFERENCE, Source.MIXTURE})
    reference = (config.model.reference or config.model.path) if needed else None
    if isinstance(reference, dict):
        reference = by_column(config, inputs.train)
    lora = config.model.lora
    adapter = "" if lora is None else f", LoRA of rank {lora.rank}"
    yield (
        f"model        {config.model.path} ({inputs.model.model_type}), computes in "
        f"{in_words(config.model.dtype, this_device())}{adapter}"
    )
    if told := text_alone(inputs.model):
        yield f"images       {told}"
    if lora is not None:
        empty = empty_model(config.model.path, torch.float32, head=True)
        for told in (frozen_experts(empty), without_adapter(empty, lora.targets)):
            yield from () if told is None else (f"warning      {told}",)
    chase = inputs.algorithm.chase
    if chase is not None:
        yield (
            f"adapters     two, with learning rates lr and {chase.lr_ratio:g} lr; every {chase.interval} "
            "steps the one with the lower loss becomes the fast one, which is the policy"
        )
    if reference and lora is not None and config.model.reference is None:
        reference = "the model with its adapter switched off"
    if reference and inputs.algorithm.has_teacher:
        reference += ", the teacher" + ("s" if isinstance(config.model.reference, dict) else "")
    if reference and config.data.precompute_reference:
        reference += ", asked once before the first step and then given up"
    if reference and config.iteration.reference == "iterate":
        reference = "the iterate"
    why = "no KL term"
    if inputs.algorithm.preference is not None:
        alone = "log-probs of the policy " + (
            "and the iterate" if inputs.algorithm.needs_iterate else "alone"
        )
        why = f"{config.algorithm['name']} compares {alone}"
    yield f"reference    {reference or f'none: {why}, not loaded'}"
    if config.iteration.steps:
        share = "" if config.iteration.mix == 1.0 else f"by a share of {config.iteration.mix:g} "
        yield (
            f"iterate      becomes the policy {share}every {config.iteration.steps} steps; until then it is "
            f"{config.model.path}"
        )
    if inputs.algorithm.critic is not None:
        start = config.critic.path or config.model.path
        kind = "a head on the policy" if config.critic.trunk == "policy" else f"its own model, from {start}"
        yield f"critic       {kind}, learning rate {config.critic.lr:g}"


def _describe_samplers(config: Config) -> Iterator[str]:
    for sampler in config.rollout.samplers:
        temperature = config.rollout.temperature if sampler.temperature is None else sampler.temperature
        share = "" if sampler.mixture is None else f", {sampler.mixture:g} of the reference"
        yield f"sampled      {sampler.n} of each prompt from the {sampler.source}{share}, at {temperature:g}"


def seconds_per_step(config: Config, inputs: Inputs, world_size: int) -> float:
    """A lower bound of the seconds of a step, from the sizes of the model and the speed of this machine."""
    machine = _machine(config, world_size)
    return estimate(config, inputs, world_size=world_size, machine=machine).seconds.step


def _machine(config: Config, world_size: int) -> Machine:
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Machine.measured(this_device(), dtype, ranks_here=ranks_here)


def _describe_completions(config: Config, inputs: Inputs, world_size: int) -> Iterator[str]:
    """Where the completions of a step come from, and which functions reward them."""
    rollout, data, offline = config.rollout, config.data, inputs.offline
    yield f"rewards      {_rewards(config, inputs)}"
    if config.reward.preference is not None:
        yield from _describe_judge(config, inputs, config.reward.preference)
    for c in config.reward.constraints:
        bound = f"at most {c.bound:g}" if c.at_least is None else f"at least {c.bound:g}"
        yield f"constraint   mean of {c.objective} {bound}: multiplier from {c.start:g}, rate {c.rate:g}"
    samples = rollout.prompts_per_step * rollout.group_size
    drawn = f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {samples} completions"
    sampled = f"{drawn} of at most {rollout.max_completion_tokens} tokens on {world_size} rank(s)"
    if offline is not None:
        yield from _describe_data(offline)
    if inputs.algorithm.preference is not None and (offline is None or not _are_pairs(offline)):
        yield from _describe_pairing(config, offline)
    if offline is None:
        yield f"a step       {sampled}"
        return
    groups = f"{rollout.prompts_per_step} prompts with all their completions"
    if _learns_pairs(inputs):
        groups = f"{rollout.prompts_per_step} pairs"
    elif offline.num_completions == len(offline.groups):
        groups = f"{rollout.prompts_per_step} prompts with a completion each"
    if data.together_column is not None:
        groups += f", those of one {data.together_column} together"
    first = groups if data.sampling == "groups" else f"{samples} completions, drawn as {data.sampling}"
    if data.mode == "offline":
        yield f"a step       {first}, from the data"
        return
    if data.offline_steps:
        yield f"steps 1 to {data.offline_steps:<3}{first}, from the data"
    yield f"then         {sampled}" + (", and those in the data of the same prompts" if data.mix else "")


def _rewards(config: Config, inputs: Inputs) -> str:
    """What gives completions their rewards; of functions that score held-out samples alone, that they do."""
    named = [f"{f.path} x {f.weight:g}" for f in config.reward.functions]
    if inputs.environments is not None and inputs.environments.gives_rewards:
        named.append("get_reward of the environment")
    functions = ", ".join(named)
    if config.reward.preference is not None:
        functions = functions or "mean win rate of a completion against the others of its prompt"
    column = config.data.reward_column
    if not inputs.algorithm.needs_rewards:
        name = config.algorithm["name"]
        return f"{functions}, measured only" if functions else f"none: {name} learns from the teacher alone"
    if inputs.offline is None or column is None:
        return functions
    columns = first_row(inputs.offline.source).columns
    given = f"column {column} of the data"
    if inputs.offline.imitates:
        given = "1 for every completion of the data"
    elif "chosen" in columns:
        given = "1 for chosen, 0 for rejected" + (
            ", labels by probability" if "probability" in columns else ""
        )
    elif "completions" in columns and config.data.completion_column is None:
        given = "column rewards of the data"
    elif column not in columns and "label" in columns:
        given = "1 or 0 by column label of the data"
    if not functions:
        return given
    if config.data.mode == "offline":
        if inputs.eval is None:
            return f"{given}; {functions} is not used, without data.eval"
        return f"{given}; samples of held-out prompts by {functions}"
    return f"{given}, {functions}"


def _describe_judge(config: Config, inputs: Inputs, judge: JudgeConfig) -> Iterator[str]:
    """The judge of pairs, and how often it is called."""
    asked, rollout = asking(config), config.rollout
    duels = len(list(asked.duels(rollout.group_size)))
    orders = " x 2 orders" if judge.both_orders else ""
    calls = rollout.prompts_per_step * asked.calls(rollout.group_size)
    yield (
        f"judge        {judge.path}: {rollout.prompts_per_step} prompts x {duels} duels{orders} = {calls} "
        "calls a step, fewer where completions are the same"
    )
    if inputs.rewards.win_rate is not None:
        yield "             held-out prompts are not sampled: the judge has nothing to compare there"


def _describe_data(data: OfflineDataset) -> Iterator[str]:
    lengths = _lengths(len(t.token_ids) for g in data.groups for t in g.trajectories)
    pairs = f", as {len(data.groups)} pairs" if _are_pairs(data) else ""
    skipped = f", {data.skipped} lines skipped as too long"
    yield f"completions  {data.num_completions} {lengths} in the data{pairs}{skipped}"
    if data.identical:
        yield f"             {data.identical} pairs left out, because their two completions are the same"


def _describe_pairing(config: Config, data: OfflineDataset | None) -> Iterator[str]:
    """How a preference algorithm makes comparisons of completions that are no pairs yet."""
    pairs = config.pairs
    if data is not None and data.num_completions == len(data.groups):
        yield "comparisons  none: each completion is good or bad by itself"
        return
    gap = f" at least {pairs.min_gap:g} apart" if pairs.min_gap else ""
    yield f"pairs        of each prompt by pairs.rule = {pairs.rule}, of different rewards{gap}"


def about_inputs(config: Config, inputs: Inputs) -> Iterator[str]:
    """Warnings about prompts and reward functions, which hold for an evaluation too."""
    yield from inputs.rewards.cautions(inputs.train.columns)
    columns = first_row(config.data.train).columns
    chats = chats_column(columns, config.data.prompt_column)
    if inputs.offline is None and config.data.prompt_column not in columns and chats is not None:
        yield (
            f"{config.data.train} has whole chats (column {chats}): answers are sampled to the messages "
            "before the assistant's first one, or to all where the assistant has not the last word"
        )
    yield from tags.cautions(config, inputs)
    if any(not isinstance(p.content, str) for p in inputs.train.prompts) and has_clock(inputs.tokenizer):
        yield (
            f"the chat template of {config.model.path} writes the date or the time (strftime_now): prompts "
            "differ from day to day, so that no run can be repeated, and a resumed one learns from others"
        )


def _imitates_worse(config: Config, inputs: Inputs) -> Iterator[str]:
    """A warning where rejected completions, or those labelled false, are imitated like the better ones."""
    if inputs.offline is None or not ignores_rewards(inputs.algorithm):
        return
    columns, reward = first_row(inputs.offline.source).columns, config.data.reward_column
    labelled = "label" in columns and reward is not None and reward not in columns
    worse = "rejected" if "rejected" in columns else "label = false" if labelled else None
    if worse is not None:
        yield (
            f"{config.algorithm['name']} imitates every completion of {config.data.train}, those of {worse} "
            "too: algorithm.name=best_of imitates the better ones alone, and dpo or kto learn from both"
        )


def warnings(config: Config, inputs: Inputs) -> Iterator[str]:
    """Warnings about settings that are allowed but hardly ever intended."""
    yield from inputs.algorithm.cautions
    yield from about_inputs(config, inputs)
    yield from _imitates_worse(config, inputs)
    if inputs.rewards.of_steps and not credits_steps(inputs.algorithm):
        yield (
            f"{inputs.rewards.of_steps[0]} gives rewards to single steps, but {config.algorithm['name']} has "
            "one advantage for a whole completion and learns from their sum, which grows with the number of "
            "steps: ppo, reinforce_pp and grpo_ps learn which step earned what"
        )
    prefers = inputs.algorithm.preference is not None
    if prefers and config.data.mode == "online" and {"chosen", "rejected"} <= set(inputs.train.columns):
        yield (
            f"{config.data.train} has chosen and rejected, but with data.mode = online only its prompts are "
            "used: completions are sampled and scored; to learn from its pairs set data.mode: offline"
        )
    learned = config.data.mode != "offline"
    if config.rollout.truncates and learned and not return_candidates(config, inputs.algorithm):
        yield (
            "rollout.top_k, top_p or min_p truncates the distribution, and with algorithm.mismatch.kind = "
            "none the loss is computed as if it had not been truncated"
        )
    alone = config.rollout.group_size == 1 and not config.data.mix
    if alone and learned and not learns_from_one(inputs.algorithm):
        yield (
            f"rollout.group_size is 1, and {config.algorithm['name']} compares the completions of a prompt: "
            "all advantages are 0, so that no reward is learned from"
        )
    if config.rollout.prompts_per_step > len(inputs.train):
        yield (
            f"a step draws {config.rollout.prompts_per_step} prompts, but the data has {len(inputs.train)}: "
            "some are drawn twice"
        )
    if inputs.offline is not None and inputs.offline.splitting:
        columns = ", ".join(inputs.offline.splitting)
        yield f"completions of one prompt form separate groups where they differ in the columns {columns}"
    yield from unnamed(config, inputs.train)
    if inputs.train.skipped > len(inputs.train):
        kept = len(inputs.train)
        yield f"{inputs.train.skipped} prompts are skipped as too long, more than are kept ({kept})"
