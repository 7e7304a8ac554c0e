"""The sections `rollout`, `rollout.vllm` and `budget`: engines, sampling, completions for each prompt."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from rlhf.config.section import Count, Positive, Section
from rlhf.tensors.candidates import leaves_out
from rlhf.types import Source

ENGINES = ("native", "hf", "vllm", "vllm-server")


class VLLMConfig(Section):
    """Settings of `rollout.engine: vllm`, which uses `lora` and `args` only, and of `vllm-server`
    (docs/engines.md)."""

    replicas: Positive = 1
    """Number of vLLM servers to start on this machine."""
    urls: tuple[str, ...] = ()
    """Addresses of servers that already run on this machine; with them none is started."""
    deadline: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds that a server may take to start, or to finish its next sample; a slower one is started
    again."""
    transport: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How servers get the weights. `file`: from a file in shared memory. `nccl`: over NCCL, for servers with
    GPUs of their own. `ipc`: from the memory of the learner's GPU, for servers on the same one. `auto`: the
    last two where there are GPUs for them, else `file`."""
    lora: Literal["merged", "adapter"] = "merged"
    """How an adapter (`model.lora`) is sent. `merged`: added to the weights. `adapter`: by itself, which is
    much less to send."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, by their names in its `EngineArgs` (`gpu_memory_utilization`,
    ...)."""


class SamplerConfig(Section):
    """One of the samplers of `rollout.samplers`: what it samples from, and how many completions of each
    prompt."""

    source: Literal["policy", "reference", "iterate", "mixture"] = "policy"
    """What is sampled from. `policy`: the policy. `reference`: the frozen reference. `iterate`: the policy of
    the last iteration (`iteration.steps`). `mixture`: policy and reference together, by `mixture`. All but
    the policy are sampled by an engine in this process."""
    n: Positive = 1
    """Completions of each prompt."""
    temperature: Annotated[float, Field(ge=0.0)] | None = None
    """Temperature of this sampler, 0: the most probable token is always taken; not given:
    `rollout.temperature`."""
    mixture: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of the reference's log-probs with `source: mixture`; 0: the policy, 1: the reference."""

    @model_validator(mode="after")
    def has_a_share_if_it_mixes(self) -> SamplerConfig:
        if (self.source == "mixture") != (self.mixture is not None):
            raise ValueError(
                "source: mixture and the share of the reference in it go together, for example "
                f"{{source: mixture, mixture: 0.125}}; got source: {self.source}, mixture: {self.mixture}"
            )
        return self


class RolloutConfig(Section):
    """The engine that samples completions, how many it samples in a step, and how it draws their tokens."""

    engine: str = "native"
    """Engine that samples completions. `native`: ours, which computes a prompt once for its group. `hf`:
    `generate` of transformers. `vllm`: vLLM in this process. `vllm-server`: one or more vLLM servers. Or one
    of your own, as `path/file.py:name` (docs/engines.md)."""
    prompts_per_step: Positive = 32
    """Prompts of one step, over all ranks."""
    group_size: Positive = 8
    """Completions of each prompt, which form a group; with `budget.rule: knapsack` the mean over prompts.
    With `samplers` it is their sum."""
    samplers: tuple[SamplerConfig, ...] = ()
    """What samples the completions of a prompt, for example
    `[{source: policy, n: 1}, {source: reference, n: 1}]`; not given: the policy, `group_size` times."""
    max_completion_tokens: Positive = 512
    """Most tokens of a completion; a longer one is cut."""
    ahead: Literal[0, 1] = 0
    """0: a step samples its batch from the newest policy. 1: from the policy before the last update, so that
    rewards of the next batch are computed during an update."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature. The learner computes log-probs at the same temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Tokens are drawn from the most probable ones that together reach this probability; 1: from all. Below 1
    a policy that learns from its rollouts also needs `top_k` (docs/engines.md)."""
    top_k: Count = 0
    """Tokens are drawn from this many of the most probable ones; 0: from all."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Tokens with less than this share of the highest probability are not drawn, which is decided before
    `top_k` and `top_p`; 0: all may be drawn. It needs `top_k` as `top_p` does."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids of tokens that end a completion, in addition to the end-of-sequence tokens of the model."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 4.0
    """Memory for the engine's keys and values, in GiB; groups that do not fit wait until others are done."""
    sync_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Largest mean difference between the engine's and the learner's log-probs after a weight sync, in nats;
    beyond it the run stops. Not given: 0.1 in bfloat16, 0.001 in float32."""
    vllm: VLLMConfig = VLLMConfig()

    @model_validator(mode="before")
    @classmethod
    def samplers_make_the_group(cls, given: Any) -> Any:
        """`group_size` is the sum over the samplers, where there are any and it is not given."""
        if not isinstance(given, dict):
            return given
        settings = cast(dict[str, Any], given)
        sizes = [_size(sampler) for sampler in settings.get("samplers") or ()]
        if sizes and "group_size" not in settings and None not in sizes:
            return settings | {"group_size": sum(n for n in sizes if n is not None)}
        return settings

    @model_validator(mode="after")
    def has_the_size_of_its_samplers(self) -> RolloutConfig:
        total = sum(sampler.n for sampler in self.samplers)
        if self.samplers and total != self.group_size:
            raise ValueError(
                f"the samplers make {total} completions of a prompt, but group_size is {self.group_size}: "
                "leave group_size out"
            )
        return self

    @property
    def sources(self) -> frozenset[Source]:
        """What completions are sampled from."""
        return frozenset(Source(s.source) for s in self.samplers) or frozenset({Source.POLICY})

    @property
    def truncates(self) -> bool:
        """Whether `top_p`, `top_k` or `min_p` keep some tokens from being drawn."""
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


def _size(sampler: Any) -> int | None:
    """`n` of a sampler as it was given; None where it is no number."""
    n = cast(Any, sampler).get("n", 1) if isinstance(sampler, dict) else getattr(sampler, "n", None)
    return n if isinstance(n, int) else None


class BudgetConfig(Section):
    """How the completions of a step are divided among its prompts (`rollout.group_size` times the
    prompts)."""

    rule: Literal["uniform", "knapsack"] = "uniform"
    """`uniform`: every prompt gets `rollout.group_size`. `knapsack`: a prompt gets the more completions, the
    more its success rate makes them worth (most at one in three), and the total stays the same."""
    low: Positive = 2
    """Fewest completions of a prompt with `knapsack`."""
    high: Positive = 128
    """Most completions of a prompt with `knapsack`."""
    prior: Annotated[float, Field(gt=0.0)] | None = None
    """How `knapsack` estimates a success rate. Given: as the mean of a Beta posterior, with this prior count
    of both successes and failures, from a prompt's first sample on. Not given: as the plain rate of its last
    16 samples, from the 8th on, as in the paper."""
    probes: Count = 0
    """Completions of each prompt that are sampled first; their outcomes then decide how the rest of the step
    is divided. 0: only earlier steps decide. Above 0 it needs `prior`."""
    cost: Literal["completions", "tokens"] = "completions"
    """What `knapsack` keeps the same in every step. `completions`: their number. `tokens`: the tokens to
    expect of them, by each prompt's mean length when it last came; the best value for a token is taken first,
    which is an approximation, and the number of completions varies. It needs `prior`."""
    advantage_clip: Annotated[float, Field(gt=0.0)] = 5.0
    """Bound of advantages, up and down, with `knapsack`: a rare success in a large group has a very large
    one."""

    @model_validator(mode="after")
    def check_knapsack(self) -> BudgetConfig:
        if self.prior is None and (self.probes or self.cost == "tokens"):
            setting = "budget.probes" if self.probes else "budget.cost = tokens"
            raise ValueError(
                f"{setting} needs a success rate of every prompt, new ones too: set budget.prior, for "
                "example to 1"
            )
        if self.probes > self.low:
            raise ValueError(
                f"budget.probes is {self.probes}, but must be at most budget.low = {self.low}, the fewest "
                "completions of a prompt"
            )
        if self.probes and self.cost == "tokens":
            raise ValueError(
                "budget.probes divides a number of completions: budget.cost must be completions, got tokens"
            )
        return self
