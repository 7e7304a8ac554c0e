"""The engine `native`: samples from the learner's own module, in this process, without a copy of weights.

1. A prompt is prefilled once, whatever the size of its group; prompts lie end to end, so nothing is padded.
2. Each decoding step runs one token of every row through the model, with its attention replaced: the rows of
   a prompt attend to the prompt's keys together, as queries of one attention, then each to its own suffix,
   and the two results are merged by their log-sum-exp (`kernels/attention_parts.py`, `cache.py`).
3. Finished rows leave the batch at once, and a prompt leaves with its last row.
4. A token is a function of its logits and of `(seed, index, position)` (`rollout/sampling.py`), so a sample
   does not depend on the rest of the batch, except through rounding in matrix products of another size.

Requests are admitted as whole groups, in the order of `submit`, as long as the keys and values that they may
need fit in `kv_cache_gib`; the others wait. A weight update during decoding keeps the keys and values of rows
in flight; `Completion.versions` says which weights sampled which tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rlhf.rollout.engine import EngineError, ImageInputs, PauseMode, RolloutRequest, SyncReport, WeightSource
from rlhf.rollout.learner_module import Model, causal_model, take_weights
from rlhf.rollout.native.cache import Kept, SharedPrefixCache
from rlhf.rollout.native.decoder import Decoder
from rlhf.rollout.native.model_support import check_decoding, why_unsupported
from rlhf.rollout.requests import Finished, Row, check_requests, rows_of
from rlhf.rollout.sampling import Drawn, RowSampling, sample
from rlhf.types import Completion

PREFILL_TOKENS = 4096
"""Most prompt tokens of one forward; a longer prompt gets a forward of its own."""


@dataclass(slots=True, eq=False)
class _Cohort:
    """Groups that were admitted together: all their rows have the same number of sampled tokens."""

    cache: SharedPrefixCache
    rows: list[Row]
    tokens: Int64[Tensor, " S"]
    """The last sampled token of each row, the model's next input."""
    positions: Int64[Tensor, " S"]
    """Its position, counted from the start of the prompt."""

    def record(
        self,
        tokens: Int64[Tensor, " S"],
        drawn: Iterable[tuple[int, float, Tensor | None]],
        keep: dict[tuple[str, int], Kept] | None,
    ) -> list[Row]:
        """Appends one token to every row; removes and returns the rows that it finishes.

        What is known of those whose requests say `keeps` goes to `keep`.
        """
        ended = [row.append(*one) for row, one in zip(self.rows, drawn, strict=True)]
        finished = [i for i, has_ended in enumerate(ended) if has_ended]
        self.tokens, self.positions = tokens, self.positions + 1
        gone = [self.rows[i] for i in finished]
        for i in finished:
            row = self.rows[i]
            if keep is not None and row.request.keeps:
                keep[row.request.prompt.id, row.index] = self.cache.kept(i)
        if gone:
            order = self.cache.drop(finished)
            index = torch.tensor(order, dtype=torch.int64, device=tokens.device)
            self.rows = [self.rows[i] for i in order]
            self.tokens, self.positions = self.tokens[index], self.positions[index]
        return gone


class NativeEngine:
    """`kv_cache_gib`: memory for keys and values, GiB.

    `max_tokens`: the most tokens of prompt and completion together; a window no smaller is none. Raises
    ValueError when the model's attention is more than a softmax over all earlier tokens, or when decoding a
    few tokens does not reproduce the log-probs of a plain forward.
    """

    _takes_mixtures = False

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_ids: Sequence[int],
        kv_cache_gib: float = 4.0,
        max_tokens: int | None = None,
        image_inputs: ImageInputs | None = None,
    ) -> None:
        self._model = causal_model(model)
        reason = why_unsupported(self._model, max_tokens)
        if reason is not None:
            raise ValueError(f"the native engine cannot decode {type(self._model).__name__}: {reason}")
        self._eos_token_ids: tuple[int, ...] = ()
        self._waiting: list[list[Row]] = []
        self._cohorts: list[_Cohort] = []
        self._finished = Finished()
        self._sampling: RowSampling | None = None
        self._kept: dict[tuple[str, int], Kept] = {}
        """Keys and values of samples that may be continued, oldest first."""
        self._version = 0
        self._paused = False
        self._bytes_per_token = 0
        self._budget = int(kv_cache_gib * 2**30)
        self._decoder = Decoder(self._model, image_inputs)
        check_decoding(self, self._model)
        self._eos_token_ids = tuple(eos_token_ids)

    @staticmethod
    def supports(model: Model) -> str | None:
        """Why this engine cannot decode `model`, by its configuration; None if no reason is found there."""
        return why_unsupported(model)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a group that cannot fit in `kv_cache_gib`, or as `check_requests` does."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        check_requests(
            requests,
            self._finished.in_flight,
            vocabulary,
            takes_images=self._decoder.image_inputs is not None,
            takes_mixtures=self._takes_mixtures,
        )
        for request in requests:
            needed = _reserve([request]) * self._bytes_per_token
            if needed > self._budget:
                raise EngineError(
                    f"prompt {request.prompt.id!r} with {request.params.n} samples of "
                    f"{request.params.max_tokens} tokens may need {needed / 2**30:.3g} GiB of keys and "
                    f"values, kv_cache_gib is {self._budget / 2**30:.3g}; raise it, or lower the group size "
                    "or the token limit"
                )
        for request in requests:
            self._waiting.append(rows_of(request, self._eos_token_ids, self._version))
            self._finished.expect(request)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Decodes until a whole group has finished or `timeout` seconds have passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._paused:
            self._decode_until(deadline)
        return self._finished.take()

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends rows with the tokens they have, `wait` decodes them to the end, `keep` holds them."""
        if mode == "abort":
            for row in self._rows_in_flight():
                self._finished.end(row)
            self._waiting, self._cohorts, self._sampling = [], [], None
            self._kept.clear()
        if mode == "wait":
            while self._finished.in_flight:
                self._finished.is_due = False
                self._decode_until(None)
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Copies the weights, unless the learner's own module is used. Raises ValueError on a mismatch."""
        report = take_weights(self._model, source, version)
        self._decoder.clear()
        self._kept.clear()
        self._version = version
        for row in self._rows_in_flight():
            row.versions.append((version, len(row.token_ids)))
        return report

    def release(self) -> None:
        """Frees packed weights and unused memory of the GPU's allocator; the cache is freed with its rows."""
        self._kept.clear()
        self._decoder.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget(self, sample: tuple[str, int]) -> None:
        self._kept.pop(sample, None)

    def close(self) -> None:
        """Drops everything in flight."""
        self._kept.clear()
        self._waiting, self._cohorts, self._sampling = [], [], None
        self._finished.clear()

    def _rows_in_flight(self) -> list[Row]:
        decoding = [row for cohort in self._cohorts for row in cohort.rows]
        return decoding + [row for rows in self._waiting for row in rows]

    def _decode_until(self, deadline: float | None) -> None:
        if self._finished.is_due or not self._finished.in_flight:
            return
        with self._decoder.running():
            while self._finished.in_flight and not self._finished.is_due:
                self._admit()
                self._decode()
                if deadline is not None and time.monotonic() >= deadline:
                    break

    def _admit(self) -> None:
        """Prefills as many waiting groups as fit, and samples their first tokens."""
        reserved = sum(cohort.cache.reserved_tokens for cohort in self._cohorts)
        groups: list[list[Row]] = []
        while self._waiting:
            wanted = [rows[0].request for rows in (*groups, self._waiting[0])]
            room = self._budget - (reserved + _reserve(wanted)) * self._bytes_per_token
            if room < 0:
                break
            while sum(kept.length for kept in self._kept.values()) * self._bytes_per_token > room:
                # what is not kept is computed again
                del self._kept[next(iter(self._kept))]
            groups.append(self._waiting.pop(0))
        if groups:
            self._prefill(groups)

    def _prefill(self, groups: list[list[Row]]) -> None:
        requests = [rows[0].request for rows in groups]
        prompts = [request.prompt.token_ids for request in requests]
        sizes = [len(rows) for rows in groups]
        longest = max(request.params.max_tokens for request in requests)
        begun = self._begun(requests)
        cache = self._decoder.new_cache([len(prompt) for prompt in prompts], sizes, longest, begun)
        rest = [len(prompt) - (begun[i].length if i in begun else 0) for i, prompt in enumerate(prompts)]
        batches = [self._decoder.prefill(cache, requests, batch) for batch in _prefill_batches(rest)]
        cache.begun.clear()
        logits = [logits for logits, _ in batches]
        self._bytes_per_token = cache.bytes_per_token
        device = self._model.device
        rows = [row for group in groups for row in group]
        owner = torch.tensor(cache.owner, device=device)
        ends = torch.tensor([place for _, places in batches for place in places], device=device)[owner] - 1
        cohort = _Cohort(cache, rows, owner, ends)
        sampling = _sampling_of(rows, device)
        self._record([cohort], sample(torch.cat(logits)[owner], sampling, torch.zeros_like(owner)))
        if cohort.rows:
            self._cohorts.append(cohort)
        self._sampling = None

    def _begun(self, requests: Sequence[RolloutRequest]) -> dict[int, Kept]:
        """What is kept of the samples that these requests continue, by the place of the request."""
        found: dict[int, Kept] = {}
        for place, request in enumerate(requests):
            kept = None if request.continues is None else self._kept.pop(request.continues, None)
            if kept is not None:
                found[place] = kept
        return found

    def _decode(self) -> None:
        """Samples one more token for every row."""
        if not self._cohorts:
            return
        caches = [cohort.cache for cohort in self._cohorts]
        for cache in caches:
            cache.begin_token()
        tokens = torch.cat([cohort.tokens for cohort in self._cohorts])
        positions = torch.cat([cohort.positions for cohort in self._cohorts])
        if self._sampling is None:
            self._sampling = _sampling_of(
                [row for cohort in self._cohorts for row in cohort.rows], tokens.device
            )
        logits = self._decoder.decode(tokens, positions, caches, self._sampling)
        for cache in caches:
            cache.end_token()
        sampled = torch.cat([torch.full_like(c.tokens, c.cache.length) for c in self._cohorts])
        self._record(self._cohorts, sample(logits, self._sampling, sampled))

    def _record(self, cohorts: list[_Cohort], drawn: Drawn) -> None:
        sampled = drawn.per_row()
        sizes = [len(cohort.rows) for cohort in cohorts]
        for cohort, tokens in zip(cohorts, torch.split(drawn.tokens, sizes), strict=True):
            keep = self._kept if self._decoder.keeps_samples else None
            for row in cohort.record(tokens, list(islice(sampled, len(tokens))), keep):
                self._sampling = None
                self._finished.end(row)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]


def _sampling_of(rows: Sequence[Row], device: torch.device) -> RowSampling:
    requests = [row.request for row in rows]
    indices, mixtures = [row.index for row in rows], [request.mixture for request in requests]
    return RowSampling.of([request.params for request in requests], indices, device, mixtures)


def _reserve(requests: Sequence[RolloutRequest]) -> int:
    """Most tokens that the cache of these groups may hold, with prompts padded to the longest."""
    longest_prompt = max(len(request.prompt.token_ids) for request in requests)
    longest = max(request.params.max_tokens for request in requests)
    return len(requests) * longest_prompt + sum(request.params.n for request in requests) * longest


def _prefill_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of prompts of these lengths, grouped into forwards of at most `PREFILL_TOKENS` tokens."""
    batches: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room:
            batches.append([])
            room = max(PREFILL_TOKENS, length)
        batches[-1].append(number)
        room -= length
    return batches
