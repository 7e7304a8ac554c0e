"""The rollout engine protocol: token ids in, token ids with log-probs out; one request a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from rlhf.config.rollout import RolloutConfig
from rlhf.metrics import Metrics
from rlhf.types import Completion, Prompt, leaves_out

PauseMode = Literal["abort", "wait", "keep"]


class EngineError(ValueError):
    """An engine cannot serve a request, or samples nonsense. The message says why and what to do."""


class SyncError(RuntimeError):
    """The engine does not sample from the learner's policy."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled.

    Sample `i` of a request, at token `t`, uses the uniform number `hash(seed, i, t)`: what it draws depends
    neither on the other requests of the batch nor on what was sampled before. Tokens below `min_p` times the
    most probable one are left out first, then all but the `top_k` most probable, then those beyond a share
    `top_p` of the rest; `min_p=0`, `top_k=0` and `top_p=1` leave out none.
    """

    n: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    """0 takes the most probable token; its log-prob is then that at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    return_candidates: bool = False
    """Completions come with the tokens that truncation left at each place (`Completion.candidates`); needs
    `top_k`, which bounds their number."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(
                f"n and max_tokens must be at least 1, got n={self.n}, max_tokens={self.max_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise ValueError(
                "sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1, "
                f"got {self.temperature}, {self.top_p}, {self.top_k}, {self.min_p}"
            )
        if self.candidates_needed and not self.top_k:
            raise ValueError(
                "return_candidates needs top_k, which bounds the candidates of a token, but top_k is 0"
            )

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and leaves_out(self.top_p, self.top_k, self.min_p)

    @property
    def candidates_needed(self) -> bool:
        """Whether completions come with what each token was drawn from: asked for, and not everything."""
        return self.return_candidates and self.truncates


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A prompt and how to sample it. `prompt.id` names the request: unique among those in flight."""

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight update cost."""

    version: int
    seconds: float
    bytes: int
    """Copied; 0 when the engine holds the learner's own module."""
    compared: int = 0
    """Weights that the engine was seen to hold as they were sent (rollout/proof.py)."""
    unread: tuple[str, ...] = ()
    """Weights that it cannot be asked for."""


@runtime_checkable
class ImageInputs(Protocol):
    """How an engine of this process feeds pictures to the model it samples from."""

    def inputs(self, prompt: Prompt) -> Mapping[str, Tensor]:
        """What `model(input_ids=...)` takes beside the ids of one prompt, a row of each."""
        ...

    def read(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Tensor, list[int]]:
        """Hidden states `[1, T, H]` of prompts end to end, and the position of each one's next token.

        `arguments` go to the attention of the language model.
        """
        ...


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run that share an engine (`rlhf.distributed.world.World`)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank; all of them call it."""
        ...


@runtime_checkable
class WeightSource(Protocol):
    """The learner's weights, as an engine reads them."""

    @property
    def module(self) -> nn.Module:
        """The compute copy of the policy; an engine in the same process may hold this very object."""
        ...

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors in the order and under the names of the Hugging Face layout.

        Of a model in shards each is gathered when it is asked for and may be given up when the next one is;
        every rank then iterates, to the end.
        """
        ...


@runtime_checkable
class AdaptedSource(WeightSource, Protocol):
    """The learner's weights in two parts, for an engine that takes them so."""

    @property
    def base(self) -> WeightSource:
        """What the adapter stands on: one object as long as the weights are the same."""
        ...

    @property
    def adapter(self) -> WeightSource:
        """Of every adapted layer `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, to be added as B A."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Groups are scored while others decode: `submit` returns at once, `poll` gives what has finished."""

    def submit(self, requests: Sequence[RolloutRequest]) -> None: ...

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Completions that finished since the last call; `[]` when nothing is in flight.

        Waits up to `timeout` seconds for the first (None: as long as the engine's own deadline).
        """
        ...

    def pause(self, mode: PauseMode) -> None:
        """Stops decoding.

        `abort` ends what is in flight (`poll` returns the tokens so far, marked ABORT), `wait` finishes it
        first, `keep` holds it for `resume`.
        """
        ...

    def resume(self) -> None: ...

    def update_weights(self, source: WeightSource, version: int) -> SyncReport: ...

    def release(self) -> None:
        """Gives memory back that the learner can use until the next `submit`."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Measured(Protocol):
    """An engine with something to say about itself in the metrics of a step."""

    def measured(self) -> Metrics:
        """Since it was asked last."""
        ...


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    *,
    between: Callable[[], None] | None = None,
    finished: Callable[[int, list[Completion]], None] | None = None,
) -> list[list[Completion]]:
    """`submit` and `poll` to the end: the group of each request, in order of `index`.

    `between` is called before each poll; what it raises ends the rollout, and what is in flight is given up.
    `finished` gets the number and the group of each request as soon as it is complete; others still decode.
    """
    engine.submit(requests)
    numbers = {r.prompt.id: (number, r.params.n) for number, r in enumerate(requests)}
    done: dict[str, list[Completion]] = {r.prompt.id: [] for r in requests}
    missing = sum(r.params.n for r in requests)
    try:
        while missing:
            if between is not None:
                between()
            polled = engine.poll()
            if not polled:
                raise RuntimeError(f"the rollout engine stopped with {missing} completions missing")
            for completion in polled:
                group = done[completion.prompt_id]
                group.append(completion)
                number, size = numbers[completion.prompt_id]
                if finished is not None and len(group) == size:
                    finished(number, sorted(group, key=lambda c: c.index))
            missing -= len(polled)
    except BaseException:
        engine.pause("abort")
        engine.poll(timeout=0.0)
        engine.resume()
        raise
    return [sorted(done[r.prompt.id], key=lambda c: c.index) for r in requests]


def sampling_of(
    section: RolloutConfig, *, n: int, max_tokens: int, seed: int, return_candidates: bool
) -> SamplingParams:
    """How a run samples."""
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        seed=seed,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        stop_token_ids=section.stop_token_ids,
        return_candidates=return_candidates,
    )
