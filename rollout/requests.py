"""Samples in flight: one row per sample of a request, which becomes a completion; checks of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf.rollout.engine import EngineError, RolloutRequest
from rlhf.tensors.candidates import Candidates
from rlhf.types import Completion, FinishReason, VersionSpan


@dataclass(slots=True, eq=False)
class Row:
    """One sample of a request while it is decoded."""

    request: RolloutRequest
    index: int
    stop_ids: frozenset[int]
    versions: list[tuple[int, int]]
    """`(version, first token)`: which weights sampled it from that token on."""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    candidates: list[Tensor] = field(default_factory=list[Tensor])
    """Per token: its candidates, the token itself first; empty unless `candidates_needed`."""

    @property
    def sample(self) -> tuple[str, int]:
        """What `RolloutRequest.continues` names it by."""
        return self.request.prompt.id, self.index

    def append(self, token_id: int, logprob: float, candidates: Tensor | None = None) -> bool:
        """Appends a token; returns whether it finishes the row."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.request.params.candidates_needed:
            assert candidates is not None
            self.candidates.append(candidates)
        return token_id in self.stop_ids or len(self.token_ids) == self.request.params.max_tokens

    def completion(self) -> Completion:
        """The completion with the tokens sampled so far; its reason is ABORT if the row is not finished."""
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            reason = FinishReason.STOP
        elif len(self.token_ids) == self.request.params.max_tokens:
            reason = FinishReason.LENGTH
        else:
            reason = FinishReason.ABORT
        ends = [start for _, start in self.versions[1:]] + [len(self.token_ids)]
        spans = [VersionSpan(v, start, end) for (v, start), end in zip(self.versions, ends, strict=True)]
        return Completion(
            prompt_id=self.request.prompt.id,
            index=self.index,
            token_ids=tuple(self.token_ids),
            rollout_logprobs=tuple(self.logprobs),
            finish_reason=reason,
            versions=tuple(span for span in spans if span.start < span.end),
            candidates=Candidates.of(self.candidates) if self.request.params.candidates_needed else None,
        )


@dataclass(slots=True)
class Finished:
    """The samples of an engine that have ended and have not been returned, and how many of each request have
    not ended."""

    _missing: dict[str, int] = field(default_factory=dict[str, int])
    _samples: list[Completion] = field(default_factory=list[Completion])
    is_due: bool = False
    """Whether a whole group has ended since the last `take`, or a sample that is to be continued: an engine
    returns no later than that."""

    @property
    def in_flight(self) -> list[str]:
        """Ids of the requests of which samples have not ended."""
        return list(self._missing)

    def expect(self, request: RolloutRequest) -> None:
        """Counts the samples of a request that begins."""
        self._missing[request.prompt.id] = request.params.n

    def end(self, row: Row) -> None:
        """A sample has ended; its group has with its last one."""
        prompt_id = row.request.prompt.id
        self._samples.append(row.completion())
        self._missing[prompt_id] -= 1
        if not self._missing[prompt_id]:
            del self._missing[prompt_id]
        self.is_due |= row.request.keeps or prompt_id not in self._missing

    def take(self) -> list[Completion]:
        """The samples that have ended since the last call, also of groups of which others have not."""
        taken, self._samples, self.is_due = self._samples, [], False
        return taken

    def clear(self) -> None:
        """Forgets everything."""
        self._missing, self._samples, self.is_due = {}, [], False


def rows_of(request: RolloutRequest, eos_token_ids: Iterable[int], version: int) -> list[Row]:
    """The rows of one request, sorted by `index`."""
    stop_ids = frozenset((*eos_token_ids, *request.params.stop_token_ids))
    return [Row(request, index, stop_ids, [(version, 0)]) for index in range(request.params.n)]


def check_requests(
    requests: Sequence[RolloutRequest],
    in_flight: Iterable[str],
    vocabulary: int,
    *,
    takes_images: bool = False,
    takes_mixtures: bool = False,
) -> None:
    """Raises EngineError for a prompt in flight, empty, with unknown token ids, or with images not taken.

    So too for one that asks for a mixture of two models from an engine that has one.
    """
    ids = set(in_flight)
    for request in requests:
        prompt = request.prompt
        if prompt.id in ids:
            raise EngineError(f"a request for prompt {prompt.id!r} is in flight already: ids must be unique")
        ids.add(prompt.id)
        if not prompt.token_ids:
            raise EngineError(f"prompt {prompt.id!r} has no tokens: expected at least one")
        if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocabulary:
            raise EngineError(
                f"prompt {prompt.id!r} has token ids from {min(prompt.token_ids)} to "
                f"{max(prompt.token_ids)}, the model has 0 to {vocabulary - 1}; was it tokenised for another "
                "model?"
            )
        if prompt.images and not takes_images:
            raise EngineError(
                f"prompt {prompt.id!r} has images, but the model was loaded without an image processor"
            )
        if request.mixture and not takes_mixtures:
            raise EngineError(
                f"prompt {prompt.id!r} is to be sampled from a mixture of two models, with share "
                f"{request.mixture} of the reference, but this engine has one model; send it to an engine "
                "that rollout.factory.mixture_engine makes, or ask for mixture 0"
            )
