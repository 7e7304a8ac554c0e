"""Checks of `rollout.samplers` and `iteration`: what samples completions has to exist and to be of use."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algos.algorithm import Algorithm
from rlhf.config.rollout import SamplerConfig
from rlhf.config.run import Config
from rlhf.types import Source


def sampler_problems(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """A line for each problem."""
    rollout, name = config.rollout, config.algorithm["name"]
    sources = rollout.sources
    frozen = sorted(sources - {Source.POLICY})
    if rollout.samplers and config.data.mode == "offline":
        yield "rollout.samplers is for rollouts, but data.mode = offline has none"
    if rollout.samplers and config.budget.rule != "uniform":
        yield (
            f"rollout.samplers says how many completions each prompt gets, and so does budget.rule = "
            f"{config.budget.rule}: set it to uniform"
        )
    if frozen and config.distributed.mode == "sharded":
        yield (
            f"rollout.samplers samples from the {' and the '.join(frozen)}, which takes whole weights on "
            "each rank, but distributed.mode is sharded: set it to replicated"
        )
    if Source.MIXTURE in sources and rollout.vllm.lora == "adapter":
        yield (
            "a mixture is sampled from merged weights, but rollout.vllm.lora = adapter merges none: set it "
            "to merged"
        )
    others = frozen or any(_differs(config, s) for s in rollout.samplers)
    if others and algorithm.from_data is None and not algorithm.selection.own_only:
        what = f"the {' and the '.join(frozen)}" if frozen else "the policy at another temperature"
        yield (
            f"algorithm {name} compares the policy with the one that sampled, but rollout.samplers has "
            f"completions of {what}: take a preference algorithm, sft, best_of, awr or one of their variants"
        )
    compared = algorithm.preference is not None
    # Nash-MD learns from them alone, HyPO beside pairs of the data
    if rollout.samplers and (algorithm.selection.own_only or (compared and algorithm.has_advantages)):
        own = [s for s in rollout.samplers if s.source == "policy"]
        if not own or any(_differs(config, s) for s in own):
            yield (
                f"algorithm {name} learns from the policy's own samples at rollout.temperature, but "
                "rollout.samplers has none: add {source: policy, n: 1}"
            )
    if algorithm.selection.own_only and rollout.group_size < 2:
        yield f"algorithm {name} compares completions of a prompt, but rollout.group_size is 1"
    yield from _iteration_problems(config, algorithm, sources)


def _iteration_problems(config: Config, algorithm: Algorithm, sources: frozenset[Source]) -> Iterator[str]:
    iteration, name = config.iteration, config.algorithm["name"]
    users = {
        f"algorithm {name} compares with the policy of the last iteration": algorithm.needs_iterate,
        "rollout.samplers samples from the iterate": Source.ITERATE in sources,
        "iteration.reference is iterate": iteration.reference == "iterate",
    }
    wanted = [text for text, holds in users.items() if holds]
    if wanted and not iteration.steps:
        yield f"{wanted[0]}, but iteration.steps is 0: set the number of steps of an iteration"
    if iteration.steps and not wanted:
        yield (
            f"iteration.steps is {iteration.steps}, but nothing uses the iterate: set iteration.reference to "
            "iterate, or sample from it with rollout.samplers"
        )
    if iteration.reference == "iterate" and config.model.reference is not None:
        yield (
            f"model.reference is {config.model.reference}, but with iteration.reference = iterate the "
            "reference is the iterate: leave one of them out"
        )
    if iteration.reference == "iterate" and config.data.precompute_reference:
        yield (
            "data.precompute_reference computes the reference's log-probs once, but with iteration.reference "
            "= iterate the reference moves: set it to false"
        )


def _differs(config: Config, sampler: SamplerConfig) -> bool:
    """Whether a sampler's temperature is not the one at which the learner computes log-probs."""
    return sampler.temperature is not None and sampler.temperature != config.rollout.temperature
