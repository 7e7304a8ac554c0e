"""The text of `rlhf check` about settings and data, and the warnings that a run prints when it starts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

import torch

from rlhf.algos.algorithm import Algorithm
from rlhf.compute_dtype import in_words
from rlhf.config.checks import return_candidates
from rlhf.config.run import Config
from rlhf.devices import this_device
from rlhf.inputs import Inputs
from rlhf.models.chat import has_clock
from rlhf.preflight import tags
from rlhf.preflight.estimate import estimate
from rlhf.preflight.machine import Machine
from rlhf.types import AdvantageInputs


def describe(config: Config, inputs: Inputs, *, world_size: int = 1) -> Iterator[str]:
    """What a run of this config will do: the lines that `rlhf check` prints."""
    rollout, learner = config.rollout, config.learner
    lengths = sorted(len(p.token_ids) for p in inputs.train.prompts)
    samples = rollout.prompts_per_step * rollout.group_size
    if inputs.offline is not None and config.data.mode == "offline" and config.data.sampling == "groups":
        mean = inputs.offline.num_completions / len(inputs.offline.groups)
        samples = round(rollout.prompts_per_step * mean)
    settings = {key: value for key, value in config.algorithm.items() if key != "name"}
    yield from _describe_models(config, inputs)
    yield f"algorithm    {config.algorithm['name']} " + ", ".join(f"{k}={v}" for k, v in settings.items())
    yield (
        f"data         {len(inputs.train)} prompts of {lengths[0]} to {lengths[-1]} tokens "
        f"(median {statistics.median(lengths):.0f}), {inputs.train.skipped} skipped as too long"
    )
    yield from _describe_images(config, inputs)
    yield f"held out     {_held_out(config, inputs)}"
    yield from _describe_completions(config, inputs, world_size)
    updates = learner.epochs * learner.minibatches
    yield (
        f"updates      {learner.epochs} epoch(s) x {learner.minibatches} minibatch(es) = {updates} a step, "
        f"microbatches of at most {learner.microbatch_tokens} tokens"
    )
    passes = config.steps * rollout.prompts_per_step / len(inputs.train)
    yield (
        f"the run      {config.steps} steps, {config.steps * samples} completions, "
        f"{passes:.1f} passes over the data"
    )
    yield f"run folder   {config.run_dir}"
    yield from estimate(config, inputs, world_size=world_size, machine=_machine(config, world_size)).lines()
    yield from (f"warning      {text}" for text in warnings(config, inputs))


def _held_out(config: Config, inputs: Inputs) -> str:
    pairs = "" if inputs.eval_pairs is None else f"{len(inputs.eval_pairs.groups)} groups of completions"
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
    reference = config.model.reference or config.model.path if inputs.algorithm.needs_reference else None
    lora = config.model.lora
    adapter = "" if lora is None else f", LoRA of rank {lora.rank}"
    yield (
        f"model        {config.model.path} ({inputs.model.model_type}), computes in "
        f"{in_words(config.model.dtype, this_device())}{adapter}"
    )
    if reference and lora is not None and config.model.reference is None:
        reference = "the model with its adapter switched off"
    if reference and config.data.precompute_reference:
        reference += ", asked once before the first step and then given up"
    yield f"reference    {reference or 'none: no KL term, not loaded'}"
    if inputs.algorithm.critic is not None:
        start = config.critic.path or config.model.path
        kind = "a head on the policy" if config.critic.trunk == "policy" else f"its own model, from {start}"
        yield f"critic       {kind}, learning rate {config.critic.lr:g}"


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
    given = offline is not None and data.reward_column is not None
    functions = [f"{f.path} x {f.weight:g}" for f in config.reward.functions]
    yield f"rewards      {', '.join([f'column {data.reward_column} of the data'] * given + functions)}"
    for c in config.reward.constraints:
        bound = f"at most {c.bound:g}" if c.at_least is None else f"at least {c.bound:g}"
        yield f"constraint   mean of {c.objective} {bound}: multiplier from {c.start:g}, rate {c.rate:g}"
    samples = rollout.prompts_per_step * rollout.group_size
    drawn = f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {samples} completions"
    sampled = f"{drawn} of at most {rollout.max_completion_tokens} tokens on {world_size} rank(s)"
    if offline is None:
        yield f"a step       {sampled}"
        return
    yield f"completions  {offline.num_completions} in the data, {offline.skipped} skipped as too long"
    groups = f"{rollout.prompts_per_step} prompts with all their completions"
    first = groups if data.sampling == "groups" else f"{samples} completions, drawn as {data.sampling}"
    if data.mode == "offline":
        yield f"a step       {first}, from the data"
        return
    if data.offline_steps:
        yield f"steps 1 to {data.offline_steps:<3}{first}, from the data"
    yield f"then         {sampled}" + (", and those in the data of the same prompts" if data.mix else "")


def warnings(config: Config, inputs: Inputs) -> Iterator[str]:
    """Warnings about settings that are allowed but hardly ever intended."""
    yield from inputs.algorithm.cautions
    yield from inputs.rewards.cautions(inputs.train.columns)
    yield from tags.cautions(config, inputs)
    learned = config.data.mode != "offline"
    if config.rollout.truncates and learned and not return_candidates(config, inputs.algorithm):
        yield (
            "rollout.top_k, top_p or min_p truncates the distribution, and with algorithm.mismatch.kind = "
            "none the loss is computed as if it had not been truncated"
        )
    if config.rollout.group_size == 1 and learned and not _learns_from_one(inputs.algorithm):
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
    if any(not isinstance(p.content, str) for p in inputs.train.prompts) and has_clock(inputs.tokenizer):
        yield (
            f"the chat template of {config.model.path} writes the date or the time (strftime_now): prompts "
            "differ from day to day, so that no run can be repeated, and a resumed one learns from others"
        )
    if inputs.train.skipped > len(inputs.train):
        kept = len(inputs.train)
        yield f"{inputs.train.skipped} prompts are skipped as too long, more than are kept ({kept})"


def _learns_from_one(algorithm: Algorithm) -> bool:
    """Whether two prompts with one completion each, of which one is correct, have any nonzero advantage."""
    if algorithm.critic is not None:
        return True
    one_each = torch.arange(2)
    rewards, none = torch.tensor([0.0, 1.0]), torch.zeros(2)
    inputs = AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=one_each,
        token_penalty=none,
        sequence=one_each,
        loss_mask=torch.ones(2, dtype=torch.bool),
        prompt_values=none,
        temperature_factors=torch.ones(2),
    )
    return bool(algorithm.advantage(inputs).any())
