"""The sections `rollout`, `rollout.vllm` and `budget`: what samples, and how many completions a prompt."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.section import Count, Positive, Section
from rlhf.types import leaves_out

ENGINES = ("native", "hf", "vllm", "vllm-server")


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
