"""The settings of a run: one frozen tree, from YAML and `key=value` overrides, checked before anything loads.

    config = load_config("configs/quickstart.yaml", ["steps=40", "rollout.group_size=16"])

Every check of one setting stands in its section, every check between settings in `Config.check_together`.
The keys of `algorithm` are the keyword arguments of its function in `algos/table.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.lora_config import LoraConfig
from rlhf.mistakes import explain
from rlhf.origin import DataConfig, PromptValueConfig, ReplayConfig, check_origin
from rlhf.perception_config import PerceptionConfig
from rlhf.reward_config import RewardConfig
from rlhf.settings import (
    ConfigError,
    Count,
    Decay,
    Positive,
    Section,
    algorithm_factory,
    read_settings,
    resolve_algorithm,
)
from rlhf.types import leaves_out

ENGINES = ("native", "hf", "vllm", "vllm-server")


class ModelConfig(Section):
    path: str
    """Hugging Face causal language model: a local folder, or a hub name where there is a network."""
    reference: str | None = None
    """Frozen reference of the KL terms; the model itself at the start of the run when not given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the compute copy. The optimizer's master copy is always float32."""
    packing: Literal["auto", "shared_prefix", "packed", "padded"] = "auto"
    """How a group goes through the model: its prompt once, every sequence by itself, or that padded."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter only; the reference is then the model with its adapter switched off."""


class VLLMConfig(Section):
    """For `rollout.engine: vllm` and `vllm-server` (docs/engines.md); the first takes `args` and `lora`."""

    replicas: Positive = 1
    """Servers to start on this host."""
    urls: tuple[str, ...] = ()
    """Servers that run already, on this host, in place of those."""
    deadline: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds that a server may take to start, and to give the next sample; then it is started again."""
    transport: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How servers get weights: a file in shared memory, or from GPU to GPU; `auto`: what fits."""
    lora: Literal["merged", "adapter"] = "merged"
    """How `model.lora` is sent: in the weights that it adapts, or by itself, which is much less to send."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, as its `EngineArgs` names them: gpu_memory_utilization, ..."""


class RolloutConfig(Section):
    engine: str = "native"
    """What samples completions: `native`, `hf`, `vllm`, or one's own, `path/file.py:name` (engines.md)."""
    prompts_per_step: Positive = 32
    """Over all ranks."""
    group_size: Positive = 8
    """Completions of each prompt; with a knapsack budget the mean over prompts."""
    max_completion_tokens: Positive = 512
    """A completion is cut here."""
    ahead: Literal[0, 1] = 0
    """1: a step's batch is sampled before the update of the step before, one version older."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of sampling; the learner scores at the same temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """1 keeps the whole vocabulary. What truncates and is learned from needs `top_k` (docs/engines.md)."""
    top_k: Count = 0
    """0 keeps the whole vocabulary."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Tokens below this share of the most probable one are left out, before `top_k` and `top_p`."""
    stop_token_ids: tuple[int, ...] = ()
    """Beside the end-of-sequence tokens of the model."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 4.0
    """Memory for keys and values; groups beyond it wait for room."""
    sync_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Largest mean difference of engine and learner log-probs after a weight sync, in nats.

    Not given: 0.1 in bfloat16, 0.001 in float32.
    """
    vllm: VLLMConfig = VLLMConfig()

    @property
    def truncates(self) -> bool:
        return leaves_out(self.top_p, self.top_k, self.min_p)

    @property
    def elsewhere(self) -> bool:
        """Whether the engine has processes and memory of its own, to which weights are sent."""
        return self.engine == "vllm-server"

    @field_validator("engine")
    @classmethod
    def is_an_engine(cls, engine: str) -> str:
        if engine not in ENGINES and ":" not in engine:
            near = difflib.get_close_matches(engine, ENGINES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"must be {', '.join(ENGINES)}, path/file.py:name or package.module:name, "
                f"got {engine!r}{hint}"
            )
        return engine


class BudgetConfig(Section):
    rule: Literal["uniform", "knapsack"] = "uniform"
    """`knapsack` shares the completions of a step out by what each prompt's success rate makes them worth."""
    low: Positive = 2
    """Fewest completions of a prompt under `knapsack`."""
    high: Positive = 128
    """Most completions of a prompt under `knapsack`."""
    prior: Annotated[float, Field(gt=0.0)] | None = None
    """Success rates as means of a Beta posterior with this prior on both sides, known from the first sample
    on; not given: the plain rate of the last 16 samples, from 8 on, as in the paper."""
    probes: Count = 0
    """Above 0: this many completions a prompt first, then the rest of the step where the posterior says."""
    cost: Literal["completions", "tokens"] = "completions"
    """What a step may spend. `tokens`: a completion costs its prompt's mean length so far, and the best value
    per token is taken first, which is approximate; the number of completions a step then varies."""
    advantage_clip: Annotated[float, Field(gt=0.0)] = 5.0
    """Bound of advantages under `knapsack`: rare successes of a large group have a huge one."""

    @model_validator(mode="after")
    def check_knapsack(self) -> BudgetConfig:
        if self.prior is None and (self.probes or self.cost == "tokens"):
            setting = "budget.probes" if self.probes else "budget.cost = tokens"
            raise ValueError(f"{setting} needs the posterior of every prompt: set budget.prior, perhaps to 1")
        if self.probes > self.low:
            raise ValueError(
                f"budget.probes is {self.probes}, more than the budget.low = {self.low} of a prompt"
            )
        if self.probes and self.cost == "tokens":
            raise ValueError("budget.probes shares out completions: budget.cost must be completions")
        return self


class LearnerConfig(Section):
    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of AdamW, decoupled."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """Of the learning rate after the warm-up, down to 0 at the last step where it falls."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Longer gradients are scaled down to it."""
    epochs: Positive = 1
    """Passes over the experience of one step."""
    minibatches: Positive = 1
    """Updates a pass; prompts are dealt to them at random."""
    microbatch_tokens: Positive = 16384
    """Tokens of one forward and backward pass: memory, not results, depends on it."""


class CriticConfig(Section):
    """For algorithms with a critic. What it learns is in `algorithm.critic`, the rest in `learner`."""

    trunk: Literal["own", "policy"] = "own"
    """A model of its own under the value head, or the policy's, which the value loss then trains too."""
    path: str | None = None
    """Where an own trunk starts: a causal language model, or a reward model of one score, whose head is taken
    with it. Not given: the policy's model. A head that comes from nowhere starts at 0."""
    lr: Annotated[float, Field(gt=0.0)] = 1.65e-6
    """Of its own AdamW."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Of its own AdamW."""


class DistributedConfig(Section):
    mode: Literal["replicated", "sharded"] = "replicated"
    """Whether each rank holds the whole model and its optimizer, or rows of every weight (FSDP2)."""
    shard_ranks: Positive | None = None
    """Over how many ranks a sharded model is cut, each group of them holding it whole; not given: over those
    of one machine."""
    timeout: Annotated[float, Field(gt=0.0)] = 1800.0
    """Seconds that one rank waits for another before the run ends with the name of the late one."""


class PtxConfig(Section):
    """Text whose likelihood is added to every update (rlhf/pretraining.py)."""

    path: str | None = None
    """jsonl or parquet file, or a `datasets` folder; not given: none."""
    kind: Literal["text", "completions"] = "text"
    """Whole texts, or the completions of prompts."""
    coef: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of its loss: no paper states one, so it must be given."""
    samples: Positive | None = None
    """Texts of an update, over all ranks; must be given too."""

    @model_validator(mode="after")
    def check_together(self) -> PtxConfig:
        missing = [name for name in ("path", "coef", "samples") if vars(self)[name] is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"path, coef and samples go together, {' and '.join(missing)} is not given")
        return self


class EvalConfig(Section):
    every: Count = 0
    """Steps between evaluations; 0: before the first step and after the last one only."""
    samples: Positive = 8
    """Completions of each held-out prompt."""
    max_prompts: Positive | None = None
    """Only the first so many held-out prompts; not given: all."""


class CheckpointConfig(Section):
    every: Count = 50
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_last: Positive = 2
    """How many of the newest checkpoints stay."""
    keep_best: Count = 0
    """Beside the last ones, those of the steps whose evaluation was the most accurate."""
    background: bool | None = None
    """Write while the next step is computed, from a copy on the host; not given: on a GPU."""
    resume: Literal["never", "auto"] = "never"
    """`auto` goes on from the newest whole checkpoint in `run_dir`, or begins where there is none."""
    export: bool = True
    """Write the final model in the Hugging Face layout."""


class MonitorConfig(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Beside RUN/metrics.jsonl, which is always written."""
    samples_per_step: Count = 2
    """Groups whose completions go to RUN/samples.jsonl."""


class Config(Section):
    task: Literal["rl"] = "rl"
    """What is trained: a policy, or with `reward_model` that (rlhf/reward_model_config.py)."""
    run_dir: str
    """Folder of the run, new or with `checkpoint.resume: auto` an earlier one."""
    steps: Positive
    """Rounds of rollouts and updates."""
    seed: Count = 0
    """Of everything drawn at random."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algorithm: dict[str, Any]
    """`name` (a key of `ALGORITHMS`, or `path/file.py:function`) and that function's keyword
    arguments; or the name alone."""
    rollout: RolloutConfig = RolloutConfig()
    budget: BudgetConfig = BudgetConfig()
    prompt_value: PromptValueConfig = PromptValueConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    perception: PerceptionConfig = PerceptionConfig()
    distributed: DistributedConfig = DistributedConfig()
    ptx: PtxConfig = PtxConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def gym_brings_its_reward(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        settings: dict[str, Any] = {**typing.cast(Mapping[str, Any], given)}
        data: Any = settings.get("data")
        if isinstance(data, Mapping) and str(typing.cast(Any, data).get("train")).startswith("gym:"):
            settings.setdefault("reward", {"functions": [{"path": "gym"}]})
        return settings

    @field_validator("algorithm", mode="before")
    @classmethod
    def may_be_a_name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("algorithm")
    @classmethod
    def has_a_name(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(settings.get("name"), str):
            raise ValueError(f"needs a name, one of {', '.join(ALGORITHMS)} or path/file.py:function")
        return settings

    @model_validator(mode="after")
    def check_together(self) -> Config:
        rollout, learner, budget = self.rollout, self.learner, self.budget
        settings = resolve_algorithm(self.algorithm, max_tokens=rollout.max_completion_tokens)
        object.__setattr__(self, "algorithm", settings)
        check_origin(self, self.build_algorithm())
        longest = self.data.max_prompt_tokens + rollout.max_completion_tokens
        if learner.microbatch_tokens < longest:
            raise ValueError(
                f"learner.microbatch_tokens is {learner.microbatch_tokens}, but one sequence may have "
                f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest} tokens"
            )
        if learner.minibatches > rollout.prompts_per_step:
            raise ValueError(
                f"learner.minibatches is {learner.minibatches}, but a step has only "
                f"rollout.prompts_per_step = {rollout.prompts_per_step} prompts to deal out"
            )
        if learner.warmup_steps > self.steps:
            raise ValueError(
                f"learner.warmup_steps is {learner.warmup_steps}, but the run has {self.steps} steps"
            )
        if budget.rule == "knapsack" and not budget.low <= rollout.group_size <= budget.high:
            raise ValueError(
                f"the knapsack budget shares out rollout.group_size = {rollout.group_size} rollouts a prompt "
                f"between budget.low = {budget.low} and budget.high = {budget.high}"
            )
        if self.critic.trunk == "policy" and self.critic.path is not None:
            raise ValueError(
                f"critic.path is {self.critic.path}, but critic.trunk is policy: no other model is loaded"
            )
        if self.model.lora is not None and self.distributed.mode == "sharded":
            raise ValueError(
                "model.lora trains so few weights that they are not sharded: take distributed.mode=replicated"
            )
        if self.checkpoint.keep_best and self.data.eval is None:
            raise ValueError(
                f"checkpoint.keep_best is {self.checkpoint.keep_best}, but there is no data.eval to "
                "compare checkpoints by"
            )
        if self.eval.every and self.data.eval is None:
            raise ValueError(f"eval.every is {self.eval.every}, but there is no data.eval to evaluate on")
        return self

    def build_algorithm(self) -> Algorithm:
        settings = dict(self.algorithm)
        algorithm = algorithm_factory(settings.pop("name"))(**settings)
        return dataclasses.replace(algorithm, perception=self.perception.term)

    def to_yaml(self) -> str:
        """Every setting with the value in force, as RUN/config.yaml holds it."""
        plain = {key: _plain(value) for key, value in self.model_dump(mode="json").items()}
        return yaml.safe_dump(plain, sort_keys=False, width=110)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `dotted.key=value` overrides.

    Raises ConfigError: the file is missing or is no YAML mapping, an override is malformed, a key is unknown
    (its nearest neighbour is named), a value is out of its range, or two settings do not go together.
    """
    return make_config(read_settings(path, overrides))


def make_config(settings: Mapping[str, Any]) -> Config:
    """A checked Config from a nested mapping. Raises ConfigError."""
    if settings.get("task") == "reward_model":
        raise ConfigError(
            "task is reward_model: this is no run of a policy; rlhf train CONFIG trains it, from Python "
            "rlhf.reward_model_trainer.RewardModelTrainer(rlhf.tasks.load_task(CONFIG)).run()"
        )
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, prefix="", schema=Config))) from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in typing.cast(dict[str, Any], value).items()}
    return value
