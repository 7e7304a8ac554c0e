"""The sections `learner`, `critic`, `distributed` and `ptx`: optimizers, ranks, and a loss on other text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.section import Count, Decay, Positive, Section, Share


class LearnerConfig(Section):
    """The optimizer (AdamW), and how the experience of a step is divided into updates and forward passes."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Learning rate of the policy's AdamW, after the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's running means: of the gradient, and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Term that AdamW adds to the denominator of an update."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay of AdamW: each update also takes the share `lr * weight_decay` off every weight."""
    warmup_steps: Count = 0
    """Steps at the start over which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up. `constant`: stays at `lr`. `linear` and `cosine`: falls to
    `final_lr_share` of it at the end of the run. `inverse_sqrt`: falls with the square root of
    warmup_steps / step, as in PPO-max."""
    final_lr_share: Share = 0.0
    """Share of `lr` that is left at the end of the run, with `schedule: linear` or `cosine`."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Bound of the gradient's norm (with a critic, of both models together): a longer one is scaled down to
    it."""
    epochs: Positive = 1
    """Passes over the completions of a step; each pass makes one update for each of the `minibatches`."""
    minibatches: Positive = 1
    """Updates in one pass: the groups of a step are divided among them at random."""
    microbatch_tokens: Positive = 16384
    """Most tokens, prompts included, of one forward and backward pass. The gradients of an update's passes
    are added up, so memory depends on this number and the result does not: lower it when memory runs out."""

    @model_validator(mode="after")
    def has_a_final_share_only_where_it_falls(self) -> LearnerConfig:
        if self.final_lr_share and self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"learner.final_lr_share is {self.final_lr_share:g}, where a linear or cosine schedule ends, "
                f"but learner.schedule is {self.schedule}: leave one of them out"
            )
        return self


class IterationConfig(Section):
    """The iterate: the policy of the last iteration, kept frozen beside the policy, to sample from or to
    compare with (docs/preferences.md)."""

    steps: Count = 0
    """Steps of an iteration, after which the policy becomes the iterate; 0: there is none. Until then the
    iterate is the model that the run begins with."""
    reference: Literal["start", "iterate"] = "start"
    """The reference of every algorithm. `start`: `model.reference`, for the whole run. `iterate`: the
    iterate, so that each iteration is compared with the last one (iterative DPO, GRPO with a moving
    reference)."""
    mix: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the policy in the new iterate; the rest is the iterate before. 1: it becomes the policy."""


class CriticConfig(Section):
    """The model of the critic, for algorithms that have one (`ppo`, `ppo_max`, `vapo`, `awr_token`). What it
    learns is set in `algorithm.critic`; its other optimizer settings are those of `learner`."""

    trunk: Literal["own", "policy"] = "own"
    """Network below the value head. `own`: a second model, loaded for the critic. `policy`: the policy's,
    which the value loss then trains too; no second model is loaded."""
    path: str | None = None
    """Model that `trunk: own` starts from: a causal language model, whose new value head starts at 0, or a
    reward model with one score, whose head becomes the value head. Not given: `model.path`."""
    lr: Annotated[float, Field(gt=0.0)] = 1.65e-6
    """Learning rate of the critic's AdamW."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Term that the critic's AdamW adds to the denominator of an update."""


class DistributedConfig(Section):
    """How several ranks (processes of one run, one for each GPU) share the model and wait for each other."""

    mode: Literal["replicated", "sharded"] = "replicated"
    """`replicated`: each rank holds the whole model and its optimizer. `sharded`: each rank holds a part of
    the rows of every weight (FSDP2), for models that do not fit on one device."""
    shard_ranks: Positive | None = None
    """For `sharded`: number of ranks that hold one copy of the model between them. The number of all ranks
    must be a multiple of it. Not given: the ranks of one machine."""
    timeout: Annotated[float, Field(gt=0.0)] = 1800.0
    """Seconds that one rank waits for another before the run ends with an error that names the late rank."""


class PtxConfig(Section):
    """Text that the policy is not to forget: its language-model loss is added to every update (PPO-ptx,
    rlhf/learn/pretraining.py). Off unless `path`, `coef` and `samples` are given."""

    path: str | None = None
    """The text: a jsonl or parquet file, or a `datasets` folder; not given: no such loss."""
    kind: Literal["text", "completions"] = "text"
    """What is learned. `text`: all of the column `text`. `completions`: the column `completion`, given the
    column `prompt`."""
    coef: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of this loss beside the policy's. No paper states one, so there is no default."""
    samples: Positive | None = None
    """Texts in each update, over all ranks."""

    @model_validator(mode="after")
    def check_together(self) -> PtxConfig:
        missing = [name for name in ("path", "coef", "samples") if vars(self)[name] is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"path, coef and samples go together, {' and '.join(missing)} is not given")
        return self
