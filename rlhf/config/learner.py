"""The sections `learner`, `critic`, `distributed` and `ptx`: how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.section import Count, Decay, Positive, Section


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
