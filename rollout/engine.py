"""The protocol of rollout engines: requests in, completions with the log-prob of every token out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from rlhf.config.rollout import RolloutConfig
from rlhf.metrics import Metrics
from rlhf.tensors.candidates import leaves_out
from rlhf.types import Completion, Prompt, Source

PauseMode = Literal["abort", "wait", "keep"]


class EngineError(ValueError):
    """An engine cannot start or serve a request, or samples wrongly. The message says why and what to do."""


class SyncError(RuntimeError):
    """After a weight update the engine does not sample from the learner's policy."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled: `n` completions of at most `max_tokens` tokens.

    Token `t` of sample `i` uses the uniform number `hash(seed, i, t)`, so it depends neither on the other
    requests of the batch nor on earlier samples. Truncation first leaves out tokens less probable than
    `min_p` times the most probable one, then all but the `top_k` most probable, then keeps the smallest set
    of the rest with a share `top_p` of their probability; `min_p=0`, `top_k=0` and `top_p=1` leave out none.
    """

    n: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    """0 takes the most probable token and returns its log-prob at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    return_candidates: bool = False
    """Whether completions have the tokens that truncation left at each position (`Completion.candidates`);
    needs `top_k`, which bounds their number."""

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
        """Whether tokens are drawn at random from less than the whole vocabulary."""
        return self.temperature > 0 and leaves_out(self.top_p, self.top_k, self.min_p)

    @property
    def candidates_needed(self) -> bool:
        """Whether completions have candidates: `return_candidates` is set, and sampling is truncated."""
        return self.return_candidates and self.truncates


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A prompt and how to sample it. `prompt.id` names the request and is unique among those in flight."""

    prompt: Prompt
    params: SamplingParams
    source: Source = Source.POLICY
    """What is sampled from; engines of one model do not look at it (rollout/engine_group.py)."""
    mixture: float = 0.0
    """Share of the reference, in log-probs, where `source` is MIXTURE (rollout/mixture.py); 0: none."""
    keeps: bool = False
    """Whether later requests may continue its samples: each is returned as soon as it has ended, and an
    engine may keep what it computed of them (`KeepsSamples`)."""
    continues: tuple[str, int] | None = None
    """The sample that this prompt begins with, prompt and completion: id of its request, and index."""

    def __post_init__(self) -> None:
        if not 0 <= self.mixture <= 1:
            raise ValueError(f"mixture is the share of the reference, from 0 to 1, got {self.mixture}")


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Cost of one weight update, and which weights were verified afterwards."""

    version: int
    seconds: float
    bytes: int
    """Bytes sent or copied; 0 if the engine holds the learner's own module."""
    compared: int = 0
    """Number of weights found bit for bit as they were sent (rollout/weight_proof.py)."""
    unread: tuple[str, ...] = ()
    """Names of the weights that the engine cannot read back."""


@runtime_checkable
class ImageInputs(Protocol):
    """Turns the images of prompts into inputs of the model, for an engine in this process."""

    def inputs(self, prompt: Prompt) -> Mapping[str, Tensor]:
        """Arguments that `model(input_ids=...)` needs for the images of one prompt, in a batch of one."""
        ...

    def read(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Tensor, list[int]]:
        """Hidden states `[1, T, H]` of the prompts end to end, and the position id of each one's next token.

        `arguments` are passed to the attention of the language model.
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
        """The values of all ranks, in order of rank; a collective call."""
        ...


@runtime_checkable
class WeightSource(Protocol):
    """The learner's weights, from which an engine takes them."""

    @property
    def module(self) -> nn.Module:
        """The policy's model in its compute dtype; an engine in this process may use this very object."""
        ...

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, in the order and with the names of the Hugging Face layout.

        The weights of a sharded model are gathered one by one: each may be freed when the next is requested,
        and every rank has to iterate to the end.
        """
        ...


@runtime_checkable
class AdaptedSource(WeightSource, Protocol):
    """The weights of a policy with a LoRA adapter, base and adapter apart."""

    @property
    def base(self) -> WeightSource:
        """The base weights; the same object is returned as long as they have not changed."""
        ...

    @property
    def adapter(self) -> WeightSource:
        """`LAYER.lora_A.weight` and `LAYER.lora_B.weight` of adapted layers; B A is added to the weight."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Asynchronous, so that groups are scored while others decode: `submit` returns at once, then `poll`."""

    def submit(self, requests: Sequence[RolloutRequest]) -> None: ...

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Completions that finished since the last call; `[]` if nothing is in flight.

        Waits up to `timeout` seconds for the first one (None: as long as the engine's own deadline).
        """
        ...

    def pause(self, mode: PauseMode) -> None:
        """Stops decoding.

        `abort` ends all samples in flight (`poll` returns the tokens so far, marked ABORT), `wait` decodes
        them to the end first, `keep` holds them until `resume`.
        """
        ...

    def resume(self) -> None: ...

    def update_weights(self, source: WeightSource, version: int) -> SyncReport: ...

    def release(self) -> None:
        """Frees memory for the learner until the next `submit`."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class KeepsSamples(Protocol):
    """An engine that keeps keys and values of samples whose requests say `keeps`, until they are continued,
    forgotten, or no longer true: weights change, or the memory is needed."""

    def forget(self, sample: tuple[str, int]) -> None:
        """Frees what is kept of a sample, if anything is."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An engine that adds metrics of its own to those of a step."""

    def measured(self) -> Metrics:
        """Metrics of the time since the last call."""
        ...


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    *,
    between: Callable[[], None] | None = None,
    finished: Callable[[int, list[Completion]], None] | None = None,
    arrived: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """Submits the requests and polls until all are done: the group of each request, sorted by `index`.

    `between` is called before each poll; an exception that it raises ends the rollout and aborts all samples
    in flight. `finished` gets the number of a request and its group as soon as that group is complete, while
    others still decode. `arrived` gets, after each poll, how many completions have come and how many were
    asked for. Raises RuntimeError if the engine stops before all completions have come.
    """
    engine.submit(requests)
    numbers = {r.prompt.id: (number, r.params.n) for number, r in enumerate(requests)}
    done: dict[str, list[Completion]] = {r.prompt.id: [] for r in requests}
    missing = total = sum(r.params.n for r in requests)
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
            if arrived is not None:
                arrived(total - missing, total)
    except BaseException:
        engine.pause("abort")
        engine.poll(timeout=0.0)
        engine.resume()
        raise
    return [sorted(done[r.prompt.id], key=lambda c: c.index) for r in requests]


def sampling_of(
    section: RolloutConfig, *, n: int, max_tokens: int, seed: int, return_candidates: bool
) -> SamplingParams:
    """The sampling parameters that the settings of a run give."""
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
