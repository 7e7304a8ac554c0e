"""Checks between sections: settings that are valid one by one but do not work together.

`make_config` calls `check_config` for every Config, so no other code gets one that fails here.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algos.algorithm import Algorithm
from rlhf.config.checks.preferences import preference_problems
from rlhf.config.checks.revisions import revision_problems
from rlhf.config.checks.samplers import sampler_problems
from rlhf.config.run import Config
from rlhf.types import Source


def return_candidates(config: Config, algorithm: Algorithm) -> bool:
    """Whether the engine returns the candidates: the tokens that truncated sampling left, over which engine
    and learner both normalise their log-probs."""
    has_rollouts = config.data.mode != "offline"
    return has_rollouts and config.rollout.truncates and algorithm.mismatch.kind != "none"


def check_config(config: Config, algorithm: Algorithm) -> None:
    """Raises ValueError with a line for each problem. `algorithm` is the one that `config` builds."""
    problems = [
        *_rewards(config, algorithm),
        *_teacher(config, algorithm),
        *_several_references(config, algorithm),
        *(_online(config, algorithm) if config.data.mode == "online" else _from_data(config, algorithm)),
        *_replay(config, algorithm),
        *preference_problems(config, algorithm),
        *_curriculum(config, algorithm),
        *_environment(config),
        *_two_adapters(config, algorithm),
        *revision_problems(config, algorithm),
        *_precomputed_reference(config, algorithm),
        *sampler_problems(config, algorithm),
        *_sizes(config),
        *_combinations(config),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _rewards(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """Something has to give completions a reward, wherever one is needed."""
    if config.reward.functions or config.environment.path:
        return
    data, judge = config.data, config.reward.preference
    if not algorithm.needs_rewards:
        yield from _without_rewards(config)
    elif judge is not None and data.mode != "offline":
        if data.mode != "online" and data.reward_column is None:
            yield "data.reward_column is null, but reward.preference compares what is sampled, not the data's"
    elif data.mode != "offline":
        pairs = (
            "; a judge of pairs is reward.preference, and to learn from chosen and rejected in data.train "
            "set data.mode: offline"
        )
        yield (
            f"reward.functions is empty, but with data.mode = {data.mode} there are rollouts to score"
            f"{pairs if algorithm.preference is not None else ''}"
        )
    elif data.reward_column is None:
        yield "reward.functions is empty and data.reward_column is null: nothing gives completions a reward"
    if data.eval is not None and algorithm.preference is None:
        alone = "; a judge has nothing to compare there" if judge is not None else ""
        yield f"reward.functions is empty, but data.eval = {data.eval} is evaluated by them: give some{alone}"
    if algorithm.needs_prompt_value and config.prompt_value.targets == "greedy":
        yield (
            "reward.functions is empty, but prompt_value.targets = greedy scores completions with them; "
            "give some, or learn the values from the data's rewards: prompt_value.targets = data"
        )


def _environment(config: Config) -> Iterator[str]:
    """What answers the policy between turns needs turns that are sampled, and functions that read them."""
    if not config.environment.path:
        return
    if config.data.mode == "offline":
        yield (
            "environment.path is given, but with data.mode = offline nothing is sampled that an environment "
            "could answer; set data.mode: online, or leave the section out"
        )


def _without_rewards(config: Config) -> Iterator[str]:
    """What rewards decide, beside the loss, where nothing gives any."""
    if config.budget.rule != "uniform":
        yield (
            f"budget.rule is {config.budget.rule}, which shares out rollouts by rewards, but "
            "reward.functions is empty: set it to uniform"
        )


def _teacher(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """An algorithm that learns from nothing but a reference needs one that is not the policy itself."""
    section, name = config.model, config.algorithm["name"]
    if not algorithm.has_teacher:
        return
    # of several teachers one may be the start itself, for prompts where the policy is to stay as it is
    if set(section.references.values()) <= {section.path}:
        same = "the same model as model.path" if section.references else "not given"
        yield (
            f"model.reference is {same}, but {name} learns from a teacher, and the policy knows all that its "
            "own start knows: set model.reference to the teacher, a folder or a name on the hub"
        )
    if config.iteration.reference == "iterate":
        yield (
            f"iteration.reference is iterate, so that the policy would be its own teacher; {name} needs start"
        )
    if config.data.sampling in ("positive", "priority"):
        yield (
            f"data.sampling is {config.data.sampling}, which draws completions by their advantages, but "
            f"{name} has none: set it to groups or completions"
        )


def _several_references(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What needs one reference for all prompts."""
    if not isinstance(config.model.reference, dict):
        return
    several = f"model.reference names several models ({', '.join(config.model.reference)})"
    if algorithm.preference is not None:
        yield f"{several}, but {config.algorithm['name']} compares pairs with a single one: give one path"
    if config.data.precompute_reference:
        yield f"{several}, but data.precompute_reference is for a single one: set it to false"
    sampled = config.rollout.sources & {Source.REFERENCE, Source.MIXTURE}
    if sampled:
        yield (
            f"{several}, but rollout.samplers has {{source: {min(sampled)}}}, which samples from a single "
            "one: give one path, or leave that sampler out"
        )


def _online(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """With `data.mode: online` the dataset has no completions and no rewards to learn from."""
    for key, default in (
        ("sampling", "groups"),
        ("together_column", None),
        ("offline_steps", 0),
        ("mix", False),
    ):
        value = config.data.model_dump()[key]
        if value != default:
            yield f"data.{key} is {value}, but with data.mode = online no completions come from the dataset"
    if config.prompt_value.targets == "data":
        yield "prompt_value.targets is data, but with data.mode = online the dataset has no rewards"
    if algorithm.prompt_temperature is not None:
        yield (
            "algorithm.divergence picks the temperature of a prompt by the dataset's rewards, but with "
            "data.mode = online the dataset has none"
        )


def _from_data(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What learning from the dataset's completions needs of the algorithm and of other settings."""
    data, name = config.data, config.algorithm["name"]
    offline = data.mode == "offline"
    if offline and algorithm.mismatch.kind != "none":
        yield (
            f"algorithm.mismatch.kind is {algorithm.mismatch.kind}, but the dataset's completions have no "
            "log-probs, so no mismatch can be corrected: set it to none"
        )
    if (offline or data.offline_steps or data.mix) and algorithm.from_data is None:
        yield (
            f"algorithm {name} compares the policy with the one that sampled, but the dataset's completions "
            "have no log-probs; learn from them with sft, best_of, awr, a_lol or one of their variants"
        )
    if data.sampling != "groups" and not algorithm.pointwise:
        yield (
            f"data.sampling is {data.sampling}, which draws completions one by one, but {name} compares "
            "those of a group; set it to groups, or take a baseline that is none or prompt_value"
        )
    if data.sampling != "groups" and data.together_column is not None:
        yield f"data.together_column is for data.sampling = groups, but it is {data.sampling}"
    if offline and (data.offline_steps or data.mix):
        yield "data.offline_steps and data.mix are for data.mode = offline_to_online, but it is offline"
    if not offline and not data.offline_steps and not data.mix:
        yield "data.mode is offline_to_online: set data.offline_steps, data.mix or both"
    if data.offline_steps > config.steps:
        yield f"data.offline_steps is {data.offline_steps}, but the run has {config.steps} steps"
    if offline and config.rollout.ahead:
        yield "rollout.ahead samples the next batch before an update, but data.mode = offline samples none"
    if offline and config.budget.rule != "uniform":
        yield f"budget.rule is {config.budget.rule}, but data.mode = offline has no rollouts to share out"


def _replay(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """Replay is for rollouts, and needs a correction for tokens of older policies."""
    if not config.replay.groups_per_step:
        return
    if config.data.mode == "offline":
        yield "replay.groups_per_step is for rollouts, but data.mode = offline has none"
    if config.rollout.ahead:
        yield (
            "replay.groups_per_step learns from tokens of older policies, but rollout.ahead = 1 takes these "
            "out of the loss: set one of the two to 0"
        )
    if algorithm.mismatch.kind == "none" and algorithm.from_data is None:
        yield (
            "replay.groups_per_step needs a correction, but algorithm.mismatch.kind is none: tokens of older "
            "policies would count as the policy's own; token_tis is the usual kind"
        )


def _curriculum(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """A curriculum orders prompts by how often their samples are correct."""
    if config.data.curriculum == "none":
        return
    if config.data.mode == "offline":
        yield (
            "data.curriculum goes by the success of samples, but with data.mode = offline there are none: "
            "set it to none"
        )
    elif not algorithm.needs_rewards or (config.reward.preference and not config.reward.functions):
        yield (
            "data.curriculum goes by how often samples are correct, but nothing says that of a single sample "
            "here: set it to none, or give reward.functions"
        )


def _two_adapters(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What two copies of the policy that learn together need."""
    name = config.algorithm["name"]
    if algorithm.chase is None:
        return
    if config.model.lora is None:
        yield (
            f"algorithm {name} trains two copies of the policy, which are LoRA adapters on one model, but "
            "model.lora is not set: set model.lora.rank and model.lora.alpha"
        )
    if config.distributed.mode == "sharded":
        yield (
            f"algorithm {name} trains two LoRA adapters, and adapters are not sharded: set distributed.mode "
            "to replicated"
        )
    if config.ptx.path is not None:
        yield f"ptx.path adds its texts to one policy, but {name} trains two adapters: leave one of them out"


def _precomputed_reference(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What has to hold so that the reference needs to be asked only once."""
    data, name = config.data, config.algorithm["name"]
    if not data.precompute_reference:
        return
    if data.mode != "offline":
        yield (
            f"data.precompute_reference is for data.mode = offline, but it is {data.mode}: the reference "
            "also scores completions that are yet to be sampled"
        )
    if not algorithm.needs_reference:
        yield f"data.precompute_reference is set, but {name} with these settings has no reference"
    if algorithm.needs_exact_kl:
        yield (
            "data.precompute_reference keeps the log-probs of the data's tokens alone, but "
            "algorithm.kl.estimator = exact compares the whole vocabulary"
        )
    if algorithm.preference is not None and algorithm.preference.baseline == "other_prompts":
        yield (
            f"data.precompute_reference does not work with {name}, which also asks the reference for each "
            "completion behind the prompt of another pair, which changes from step to step"
        )


def _sizes(config: Config) -> Iterator[str]:
    """Numbers of tokens, prompts, steps and completions that must fit into others."""
    rollout, learner, budget = config.rollout, config.learner, config.budget
    longest = config.data.max_prompt_tokens + rollout.max_completion_tokens
    if learner.microbatch_tokens < longest:
        yield (
            f"learner.microbatch_tokens is {learner.microbatch_tokens}, but one sequence may have "
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest} tokens"
        )
    if learner.minibatches > rollout.prompts_per_step:
        yield (
            f"learner.minibatches is {learner.minibatches}, but a step has only "
            f"rollout.prompts_per_step = {rollout.prompts_per_step} prompts to divide among them"
        )
    if learner.warmup_steps > config.steps:
        yield (f"learner.warmup_steps is {learner.warmup_steps}, but the run has {config.steps} steps")
    if budget.rule == "knapsack" and not budget.low <= rollout.group_size <= budget.high:
        yield (
            f"budget.rule is knapsack, so rollout.group_size, the mean over prompts, must lie between "
            f"budget.low = {budget.low} and budget.high = {budget.high}; got {rollout.group_size}"
        )


def _combinations(config: Config) -> Iterator[str]:
    """Settings that have no effect or are not supported together."""
    if config.critic.trunk == "policy" and config.critic.path is not None:
        yield (
            f"critic.path is {config.critic.path}, but with critic.trunk = policy no second model is loaded; "
            "set critic.trunk to own, or leave out critic.path"
        )
    if config.model.lora is not None and config.distributed.mode == "sharded":
        yield "model.lora does not work with distributed.mode = sharded: set distributed.mode to replicated"
    if config.checkpoint.keep_best and config.data.eval is None:
        yield (
            f"checkpoint.keep_best is {config.checkpoint.keep_best}, but there is no data.eval, by whose "
            "accuracy checkpoints are compared"
        )
    if config.eval.every and config.data.eval is None:
        yield (f"eval.every is {config.eval.every}, but there is no data.eval to evaluate on")
