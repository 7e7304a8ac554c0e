"""The engine `native`: samples from the learner's own module, in this process, without a copy of weights.

1. A prompt is prefilled once, whatever the size of its group; prompts lie end to end, so nothing is padded.
2. Each decoding step runs one token of every row through the model, with its attention replaced: the rows of
   a prompt attend to the prompt's keys together, as queries of one attention, then each to its own suffix,
   and the two results are merged by their log-sum-exp (`kernels/attention_parts.py`, `cache.py`).
3. Finished rows leave the batch at once, and a prompt leaves with its last row. A row that may be continued
   keeps its place in the cache; the request that continues it joins the next step with all tokens that are
   new, beside the one token of every other row, and still shares the prompt of its group.
4. A token is a function of its logits and of `(seed, index, position)` (`rollout/sampling.py`), so a sample
   does not depend on the rest of the batch, except through rounding in matrix products of another size.

Requests are admitted as whole groups, in the order of `submit`, as long as the keys and values that they may
need fit in `kv_cache_gib`; the others wait, and when nothing else is decoded, rows that are only kept make
room for them. A weight update during decoding keeps the keys and values of rows
in flight; `Completion.versions` says which weights sampled which tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

import torch
from torch import nn

from rlhf.rollout.engine import EngineError, ImageInputs, PauseMode, RolloutRequest, SyncReport, WeightSource
from rlhf.rollout.learner_module import Model, causal_model, take_weights
from rlhf.rollout.native.cohort import Cohort
from rlhf.rollout.native.decoder import Decoder
from rlhf.rollout.native.model_support import check_decoding, why_unsupported
from rlhf.rollout.requests import Finished, Row, check_requests, rows_of
from rlhf.rollout.sampling import Drawn, RowSampling, sample
from rlhf.types import Completion

PREFILL_TOKENS = 4096
"""Most prompt tokens of one forward; a longer prompt gets a forward of its own."""


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
        self._cohorts: list[Cohort] = []
        self._finished = Finished()
        self._sampling: RowSampling | None = None
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
            rows = rows_of(request, self._eos_token_ids, self._version)
            for row in rows:
                # ids may come again
                self._forget(row.sample)
            self._waiting.append(rows)
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
        self._forget()
        self._version = version
        for row in self._rows_in_flight():
            row.versions.append((version, len(row.token_ids)))
        return report

    def release(self) -> None:
        """Frees what is kept, packed weights, and unused memory of the GPU's allocator.

        The cache of rows that are decoded is freed with them.
        """
        self._forget()
        self._decoder.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget(self, sample: tuple[str, int]) -> None:
        self._forget(sample)

    def close(self) -> None:
        """Drops everything in flight."""
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
        """Continues what is kept, prefills as many other groups as fit, and samples their first tokens."""
        waiting = {rows[0].request.continues: rows[0] for rows in self._waiting}
        requested = {sample: row for sample, row in waiting.items() if sample is not None}
        joined = [row for cohort in self._cohorts for row in cohort.join(requested)] if requested else []
        if joined:
            self._waiting = [rows for rows in self._waiting if rows[0] not in joined]
            self._sampling = None
        groups = self._fitting()
        if self._waiting and not groups and not any(cohort.rows for cohort in self._cohorts):
            # what is not kept is computed again
            self._forget()
            groups = self._fitting()
        if groups:
            self._prefill(groups)

    def _fitting(self) -> list[list[Row]]:
        """Takes the first of the waiting groups, as many as fit into the memory that is left."""
        reserved = sum(cohort.cache.reserved_tokens for cohort in self._cohorts)
        groups: list[list[Row]] = []
        while self._waiting:
            wanted = [rows[0].request for rows in (*groups, self._waiting[0])]
            if (reserved + _reserve(wanted)) * self._bytes_per_token > self._budget:
                break
            groups.append(self._waiting.pop(0))
        return groups

    def _forget(self, sample: tuple[str, int] | None = None) -> None:
        """Drops what is kept, of one sample or of all."""
        for cohort in self._cohorts:
            cohort.forget(sample)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows or cohort.kept]

    def _prefill(self, groups: list[list[Row]]) -> None:
        requests = [rows[0].request for rows in groups]
        for request in requests:
            if request.continues is not None:
                self._forget(request.continues)
        prompts = [request.prompt.token_ids for request in requests]
        sizes = [len(rows) for rows in groups]
        longest = max(request.params.max_tokens for request in requests)
        lengths = [len(prompt) for prompt in prompts]
        cache = self._decoder.new_cache(lengths, sizes, longest)
        batches = [self._decoder.prefill(cache, requests, batch) for batch in _prefill_batches(lengths)]
        logits = [logits for logits, _ in batches]
        self._bytes_per_token = cache.bytes_per_token
        device = self._model.device
        rows = [row for group in groups for row in group]
        owner = torch.tensor(cache.owner, device=device)
        ends = torch.tensor([place for _, places in batches for place in places], device=device)[owner] - 1
        cohort = Cohort(cache, rows, owner, ends)
        sampling = _sampling_of(rows, device)
        self._cohorts.append(cohort)
        self._record([cohort], sample(torch.cat(logits)[owner], sampling, torch.zeros_like(owner)))
        self._sampling = None

    def _decode(self) -> None:
        """Samples one more token for every row."""
        cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        if not cohorts:
            return
        tokens, positions = (torch.cat(x) for x in zip(*(cohort.inputs() for cohort in cohorts), strict=True))
        rows = [row for cohort in cohorts for row in cohort.rows]
        if self._sampling is None:
            self._sampling = _sampling_of(rows, tokens.device)
        caches = [cohort.cache for cohort in cohorts]
        for cache in caches:
            cache.begin_step()
        logits = self._decoder.decode(tokens, positions, caches, self._sampling)
        for cache in caches:
            cache.end_step()
        sampled = torch.tensor([len(row.token_ids) for row in rows], device=tokens.device)
        self._record(cohorts, sample(logits, self._sampling, sampled))

    def _record(self, cohorts: list[Cohort], drawn: Drawn) -> None:
        sampled = drawn.per_row()
        sizes = [len(cohort.rows) for cohort in cohorts]
        for cohort, tokens in zip(cohorts, torch.split(drawn.tokens, sizes), strict=True):
            drawn_here = list(islice(sampled, len(tokens)))
            for row in cohort.record(tokens, drawn_here, keeps=self._decoder.keeps_samples):
                self._sampling = None
                self._finished.end(row)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows or cohort.kept]


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
