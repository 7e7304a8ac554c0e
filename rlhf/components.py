"""Every component of a run, built from its settings: models, engine, collector, learner and the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from rlhf.algos.algorithm import Algorithm
from rlhf.checkpoints.stateful import Stateful
from rlhf.collect.budgets import Budgets
from rlhf.collect.collector import Collector
from rlhf.collect.curriculum import PromptOrder
from rlhf.collect.episodes import Episodes
from rlhf.collect.offline import GroupSource
from rlhf.collect.pairing import Pairing
from rlhf.collect.prefetch import Prefetch
from rlhf.collect.sampler import Sampler
from rlhf.collect.sources import Sources
from rlhf.config.checks.run import return_candidates
from rlhf.config.rollout import VLLMConfig
from rlhf.config.run import Config
from rlhf.distributed.world import World
from rlhf.evaluation.pairs import PairEvaluation, held_out_pairs
from rlhf.inputs import Inputs
from rlhf.learn.advantages import AdvantageContext
from rlhf.learn.buffer import Buffer
from rlhf.learn.controllers import KLCoefficient
from rlhf.learn.critic import Critic, critic_section
from rlhf.learn.experience import ExperienceBuilder
from rlhf.learn.iterate import Iterate, frozen_copy
from rlhf.learn.learner import Learner
from rlhf.learn.models import Models, References
from rlhf.learn.optimizer import MasterAdamW
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.learn.perception.watch import PerceptionWatch
from rlhf.learn.precomputed_reference import PrecomputedReference
from rlhf.learn.preference.twin import Twin
from rlhf.learn.pretraining import Pretraining
from rlhf.models.loading import load_policy, load_sharded_policy
from rlhf.models.policy import Policy, WithoutAdapter
from rlhf.models.pretrained import load_model
from rlhf.models.sharding import Sharding
from rlhf.models.vision.embeddings import Vision
from rlhf.rewards.constraints import Constraints
from rlhf.rewards.success import is_correct
from rlhf.rollout.engine import RolloutEngine
from rlhf.rollout.engine_group import EngineGroup
from rlhf.rollout.factory import make_engine, mixture_engine
from rlhf.rollout.mixture import OtherModel
from rlhf.sync.engine_on_demand import EngineOnDemand, SyncOnDemand
from rlhf.sync.weight_sync import Sync, WeightSync, choose_probe_prompt
from rlhf.types import Source

TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
"""`rollout.sync_tolerance`, in nats, where none is set: by `model.dtype`."""


@dataclass(frozen=True, slots=True)
class Components:
    """What the trainer's loop calls, and what its checkpoints save."""

    policy: Policy
    engine: RolloutEngine
    sampler: Sampler
    budgets: Budgets
    constraints: Constraints
    collector: GroupSource
    pairing: Pairing
    pair_evaluation: PairEvaluation | None
    """Held-out pairs of a preference algorithm; None where `data.eval` has none."""
    iterate: Iterate | None
    """The policy of the last iteration; None without `iteration.steps`."""
    prefetch: Prefetch
    experience: ExperienceBuilder
    learner: Learner
    sync: Sync
    kl: KLCoefficient
    buffer: Buffer
    perception_watch: PerceptionWatch
    stateful: dict[str, Stateful]
    """What a checkpoint holds, by name."""
    preparations: list[Callable[[], str]]
    """Run once each, in this order, before the first step; each returns a line about its result."""


def build_components(config: Config, inputs: Inputs, world: World) -> Components:
    """Loads the weights of all models. Raises ModelError."""
    models = _models(config, inputs, world)
    optimizer = MasterAdamW(models.policy.model, _dtype(config), config.learner, config.steps)
    iterate = None if models.iterate is None else Iterate(models.policy, models.iterate, config.iteration)
    budgets = Budgets(config, world, learns_rewards=inputs.algorithm.needs_rewards)
    constraints = Constraints(config.reward.constraints, inputs.rewards, world)
    perception_watch = PerceptionWatch(config.perception)
    engine, sync, sampler = _rollout(config, inputs, world, models)
    sources = Sources(config, inputs, world, models.reference or models.policy, sampler)
    pair_evaluation = _pair_evaluation(models, sources)
    experience = _experience_builder(models, sources, constraints)
    learner = _learner(config, inputs, world, models, optimizer)
    order, kl = PromptOrder(config, inputs.train, budgets.tracker), KLCoefficient(inputs.algorithm.kl)
    rollouts = Collector(sampler, order, inputs.algorithm, budgets, world)
    collector = sources.collector(rollouts, experience)
    buffer, prefetch = Buffer(), Prefetch(inputs.train, world, config.rollout.ahead)
    stateful: dict[str, Stateful] = {
        "policy": optimizer,
        "kl": kl,
        "budgets": budgets,
        "constraints": constraints,
        "reward_scaler": experience.scaler,
        "warmup": learner.warmup,
        "buffer": buffer,
        "ahead": prefetch,
        "hacking": perception_watch,
        **sources.stateful,
        **_present(critic=models.critic, iterate=iterate, twin=learner.twin),
    }
    return Components(
        policy=models.policy,
        engine=engine,
        sampler=sampler,
        budgets=budgets,
        constraints=constraints,
        collector=collector,
        pairing=_pairing(config, inputs),
        pair_evaluation=pair_evaluation,
        iterate=iterate,
        prefetch=prefetch,
        experience=experience,
        learner=learner,
        sync=sync,
        kl=kl,
        buffer=buffer,
        perception_watch=perception_watch,
        stateful=stateful,
        preparations=sources.preparations,
    )


def _pairing(config: Config, inputs: Inputs) -> Pairing:
    reviser = inputs.reviser(config.data.improve_prompt)
    return Pairing(config.pairs, inputs.algorithm, inputs.rewards.win_rate, reviser)


def _present(**parts: Stateful | None) -> dict[str, Stateful]:
    return {name: part for name, part in parts.items() if part is not None}


def _models(config: Config, inputs: Inputs, world: World) -> Models:
    """Loads the models that the algorithm needs. Raises ModelError."""
    sharding = Sharding.of(config.distributed, _dtype(config), world)
    if sharding is None:
        policy, reference = _whole_models(config, inputs, world)
    else:
        policy, reference = _sharded_models(config, inputs, world, sharding)
    iterate = _iterate(config, inputs, sharding, policy) if config.iteration.steps else None
    if config.iteration.reference == "iterate" and inputs.algorithm.needs_reference:
        reference = iterate
    models = Models(
        algorithm=inputs.algorithm,
        policy=policy,
        reference=None if isinstance(reference, References) else reference,
        references=reference if isinstance(reference, References) else None,
        iterate=iterate,
        critic=_critic(config, inputs, sharding or world.device, policy),
        perception=MaskedPasses.of(config, policy),
    )
    if config.model.gradient_checkpointing:
        _checkpoint_activations(models)
    return models


def _whole_models(config: Config, inputs: Inputs, world: World) -> tuple[Policy, Policy | References | None]:
    """Policy and reference, each as a whole on this rank's device."""
    section = config.model
    policy = load_policy(section, section.path, world.device, inputs.processor, longest=config.longest)
    if section.lora is not None:
        policy.add_adapter(section.lora, seed=config.seed)
    if not _needs_starting_reference(config, inputs.algorithm):
        return policy, None
    if section.lora is not None and section.reference is None:
        return policy, WithoutAdapter(policy)
    is_sampled = config.rollout.sources & {Source.REFERENCE, Source.MIXTURE}

    def load(path: str) -> Policy:
        reference = load_policy(section, path, world.device, inputs.processor, longest=config.longest)
        reference.freeze(_dtype(config))
        if world.device.type == "cpu" and not is_sampled:
            reference.leave_in_file(path)
        return reference

    return policy, _references(config, load)


def _references(config: Config, load: Callable[[str], Policy]) -> Policy | References:
    """The reference, or several by name; a model that has two names is loaded once."""
    given = config.model.reference
    if not isinstance(given, dict):
        return load(given or config.model.path)
    loaded = {path: load(path) for path in dict.fromkeys(given.values())}
    return References({name: loaded[path] for name, path in given.items()}, config.data.reference_column)


def _needs_starting_reference(config: Config, algorithm: Algorithm) -> bool:
    """Whether the model of the start (or `model.reference`) has to be loaded beside the policy."""
    if config.iteration.reference == "iterate":
        return False
    return algorithm.needs_reference or bool(config.rollout.sources & {Source.REFERENCE, Source.MIXTURE})


def _iterate(config: Config, inputs: Inputs, sharding: Sharding | None, policy: Policy) -> Policy:
    """A frozen model like the policy, whose weights `Iterate` sets."""
    if sharding is not None:
        return load_sharded_policy(config.model, config.model.path, sharding, trains=False)
    frozen = frozen_copy(policy, inputs.processor)
    if policy.adapter is None:
        frozen.freeze(_dtype(config))
    return frozen


def _sharded_models(
    config: Config, inputs: Inputs, world: World, sharding: Sharding
) -> tuple[Policy, Policy | References | None]:
    """Policy and reference, each in shards; an engine in this process samples from a whole `replica`."""
    section = config.model
    longest = config.longest
    policy = load_sharded_policy(section, section.path, sharding, trains=True, longest=longest)
    if not config.rollout.elsewhere:
        policy.replica = load_model(section.path, world.device, _dtype(config))
        policy.replica.requires_grad_(requires_grad=False)
    if not _needs_starting_reference(config, inputs.algorithm):
        return policy, None
    load = partial(load_sharded_policy, section, sharding=sharding, trains=False, longest=longest)
    return policy, _references(config, load)


def _critic(config: Config, inputs: Inputs, device: torch.device | Sharding, policy: Policy) -> Critic | None:
    if inputs.algorithm.critic is None:
        return None
    section = critic_section(config.critic, config.learner)
    if config.critic.trunk == "policy":
        return Critic.on_policy_trunk(policy, section, config.steps)
    path = config.critic.path or config.model.path
    return Critic.on_own_trunk(path, device, _dtype(config), section, config.steps, longest=config.longest)


def _checkpoint_activations(models: Models) -> None:
    models.policy.checkpoint_activations()
    if models.critic is not None and models.critic.own:
        models.critic.trunk.checkpoint_activations()


def _rollout(
    config: Config, inputs: Inputs, world: World, models: Models
) -> tuple[RolloutEngine, Sync, Sampler]:
    """The engine, what sends it the policy's weights, and what samples prompts with it."""
    section, policy = config.rollout, models.policy
    policy.merge()
    tolerance = section.sync_tolerance or TOLERANCE[config.model.dtype]
    candidates = return_candidates(config, inputs.algorithm)
    sync = WeightSync(
        policy,
        choose_probe_prompt(inputs.train.prompts),
        section,
        tolerance=tolerance,
        return_candidates=candidates,
    )
    rank = 0 if config.model.lora is None else config.model.lora.rank
    start = engine_starter(config, inputs, policy.rollout_model, lora_rank=rank, ranks=world)
    on_demand = config.data.mode == "offline"
    engine = EngineOnDemand(start, sync) if on_demand else start()
    others = _frozen_engines(config, inputs, models)
    if others:
        engine = EngineGroup(engine, others)
    episodes = Episodes.of(config, inputs, engine)
    sampler = Sampler(engine, inputs.rewards, inputs.tokenizer, section, config.seed, candidates, episodes)
    return engine, SyncOnDemand(sync) if on_demand else sync, sampler


def _frozen_engines(
    config: Config, inputs: Inputs, models: Models
) -> dict[Source, Callable[[], RolloutEngine]]:
    """What makes the engines of the samplers that sample from another model than the policy alone."""
    kind = config.rollout.engine if config.rollout.engine in ("native", "hf") else "native"
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": kind})})
    frozen = {Source.REFERENCE: models.reference, Source.ITERATE: models.iterate}
    starters: dict[Source, Callable[[], RolloutEngine]] = {
        source: engine_starter(config, inputs, model.rollout_model)
        for source, model in frozen.items()
        if model is not None and source in config.rollout.sources
    }
    if Source.MIXTURE in config.rollout.sources:
        assert models.reference is not None
        reference, policy = models.reference.rollout_model, models.policy.rollout_model
        processor = inputs.processor
        starters[Source.MIXTURE] = partial(
            mixture_engine,
            kind,
            policy,
            OtherModel(reference, image_inputs=None if processor is None else Vision(reference, processor)),
            eos_token_ids=inputs.eos_token_ids,
            kv_cache_gib=config.rollout.kv_cache_gib,
            max_tokens=config.longest,
            image_inputs=None if processor is None else Vision(policy, processor),
        )
    return starters


def engine_starter(
    config: Config, inputs: Inputs, model: PreTrainedModel, *, lora_rank: int = 0, ranks: World | None = None
) -> Callable[[], RolloutEngine]:
    """A function that starts the engine `rollout.engine`, which holds `model` or is sent its weights.

    `lora_rank`: rank of an adapter that is sent to the engine by itself; 0: there is none, or it is merged
    into the weights. `ranks`: the ranks that share the engine's servers.
    """
    section = config.rollout
    return partial(
        make_engine,
        section.engine,
        model,
        eos_token_ids=inputs.eos_token_ids,
        kv_cache_gib=section.kv_cache_gib,
        max_tokens=config.longest,
        dtype=_dtype(config),
        vllm=vllm_settings(config),
        image_inputs=None if inputs.processor is None else Vision(model, inputs.processor),
        lora_rank=lora_rank,
        ranks=ranks,
    )


def vllm_settings(config: Config) -> VLLMConfig:
    """The settings of vLLM, which has a switch of its own for the code that a model brings."""
    section = config.rollout.vllm
    if not config.model.trust_remote_code:
        return section
    return section.model_copy(update={"args": {"trust_remote_code": True, **section.args}})


def _pair_evaluation(models: Models, sources: Sources) -> PairEvaluation | None:
    config, held_out = sources.config, sources.inputs.eval_pairs
    if held_out is None:
        return None
    evaluation = PairEvaluation(
        held_out_pairs(held_out.groups),
        models,
        sources.world,
        temperature=config.rollout.temperature,
        microbatch_tokens=config.learner.microbatch_tokens,
        beta=config.beta if models.reference is not None else None,
    )
    sources.stateful["held_out_pairs"] = evaluation
    sources.preparations.append(evaluation.prepare)
    return evaluation


def _experience_builder(models: Models, sources: Sources, constraints: Constraints) -> ExperienceBuilder:
    config = sources.config
    context = AdvantageContext(
        objective_weights=constraints.weights,
        prompt_values=sources.prompt_values,
        temperature_factors=sources.temperature_factors,
        is_correct=lambda trajectory: is_correct(trajectory, config.reward),
        advantage_clip=config.budget.advantage_clip if config.budget.rule == "knapsack" else None,
    )
    temperature = config.rollout.temperature
    experience = ExperienceBuilder(models, sources.world, config.learner, context, temperature=temperature)
    if config.data.precompute_reference:
        assert models.reference is not None and sources.data is not None
        groups = sources.data.dataset.groups
        computed = PrecomputedReference(models.reference, groups, experience.logprobs, sources.world)
        experience.precomputed = computed.logprobs
        sources.stateful["reference"] = computed
        sources.preparations.append(computed.prepare)
    if experience.running_reward is not None:
        sources.stateful["running_reward"] = experience.running_reward
    return experience


def _learner(config: Config, inputs: Inputs, world: World, models: Models, optimizer: MasterAdamW) -> Learner:
    section, temperature, pretraining = config.learner, config.rollout.temperature, None
    if config.ptx.path is not None:
        budget, seed = section.microbatch_tokens, config.seed
        pretraining = Pretraining(inputs.texts, config.ptx, models.policy, world, seed=seed, budget=budget)
    chase = models.algorithm.chase
    twin = None if chase is None else Twin(models.policy, optimizer, chase, world, section, config.steps)
    return Learner(
        models, optimizer, world, section, temperature=temperature, pretraining=pretraining, twin=twin
    )


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.model.dtype)
