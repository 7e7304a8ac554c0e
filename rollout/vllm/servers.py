"""vLLM in processes of its own: several servers, on this host, started here or found by their addresses.

1. The samples of a prompt go to one server, the one with the fewest tokens still to come, so that it computes
   the prompt once. Each is a request of its own with a seed of its own: what it draws does not depend on
   where it is drawn, and is what the engine in this process draws.
2. A server that ends, breaks, or gives no sample for `deadline` seconds while it owes some, is lost: its
   samples are asked of the others, and it is started again, given the weights of now and compared with what
   was sent before it samples. One that was found by its address is waited for. When none is left in time,
   the error names each with its reason.
3. A weight update gives every server the weights (rollout/vllm_transport.py); it forgets its prefix cache and
   is compared (rollout/proof.py). What was given stays for servers that come back.
4. Nothing outlives the trainer (rollout/vllm_replica.py).
"""

from __future__ import annotations

import atexit
import importlib
import queue
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlhf.metrics import Max, Metrics, Sum
from rlhf.rollout.engine import EngineError, PauseMode, RolloutRequest, SyncReport, WeightSource
from rlhf.rollout.requests import Row, check_requests, rows_of
from rlhf.rollout.vllm.adapter import NAME
from rlhf.rollout.vllm.client import PATIENCE, Replica, ReplicaError
from rlhf.rollout.vllm.images import WIRE, given_pictures
from rlhf.rollout.vllm.in_process import (
    MAX_SEQUENCES,
    VLLMModel,
    check_end,
    check_prompt,
    require_vllm,
    sampling_settings,
)
from rlhf.rollout.vllm.pool import LOOK_EVERY, ServerPool, Service
from rlhf.rollout.vllm.process import process_left_alone
from rlhf.rollout.vllm.truncation import candidates_of
from rlhf.types import Completion


@dataclass(slots=True, eq=False)
class _Sample:
    """One in flight. An answer counts if it is of the last `attempt`."""

    row: Row
    features: Mapping[str, Any] | None = None
    """Of the prompt's pictures."""
    replica: Replica | None = None
    attempt: int = 0

    @property
    def tokens(self) -> int:
        return len(self.row.request.prompt.token_ids) + self.row.request.params.max_tokens


@dataclass(frozen=True, slots=True)
class _Answer:
    key: str
    attempt: int
    replica: Replica
    response: Any
    error: Exception | None


class VLLMServerEngine:
    """Raises EngineError when a server does not start, is not there, or lacks what is needed."""

    def __init__(self, model: VLLMModel, service: Service, pool: ServerPool | None = None) -> None:
        """`pool`: the servers, where something special is to be done for them."""
        self._model, self._service, self._name = model, service, uuid.uuid4().hex
        if model.image_format is not None:
            # pictures are written in a format of its own
            with process_left_alone():
                require_vllm()
                importlib.import_module(WIRE)
        self._pool = pool or ServerPool(model, service)
        self._samples: dict[str, _Sample] = {}
        self._ended: dict[str, list[Completion]] = {}
        self._finished: list[Completion] = []
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        size = MAX_SEQUENCES * len(self._pool.replicas)
        self._senders = ThreadPoolExecutor(size, thread_name_prefix="vllm")
        self._version = self._lost = 0
        self._paused = self._aborting = False
        self._hopeless_since: float | None = None
        atexit.register(self.close)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a prompt that is empty, in flight or too long, or whose pictures do not fit
        it or cannot be seen.
        """
        image_format = self._model.image_format
        check_requests(requests, self._ended, self._model.vocabulary, sees=image_format is not None)
        for request in requests:
            self._model.check_length(request)
        features = [
            given_pictures(image_format, r.prompt).features()
            if image_format is not None and r.prompt.images
            else None
            for r in requests
        ]
        for request, pictures in zip(requests, features, strict=True):
            self._ended[request.prompt.id] = []
            for row in rows_of(request, self._model.eos_token_ids, self._version):
                self._samples[f"{request.prompt.id}/{row.index}"] = _Sample(row, pictures)
            self._route()

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Waits until a whole group has finished, or `timeout`."""
        until = None if timeout is None else time.monotonic() + timeout
        while self._samples and not self._finished and not self._paused:
            left = LOOK_EVERY if until is None else max(0.0, min(LOOK_EVERY, until - time.monotonic()))
            self._listen(left)
            self._watch()
            if until is not None and time.monotonic() >= until:
                break
        finished, self._finished = self._finished, []
        return finished

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends samples where they are, `wait` decodes them to their end, `keep` holds them."""
        if mode == "wait":
            finished: list[Completion] = []
            while self._samples:
                finished.extend(self.poll())
            self._finished = finished + self._finished
        if mode == "keep":
            self._tell_all("/pause?mode=keep")
        if mode == "abort":
            self._abort()
        self._paused = True

    def resume(self) -> None:
        self._tell_all("/resume")
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError: a server does not hold what it was sent. One that is lost is given it later."""
        start = time.perf_counter()
        held = self._samples and not self._paused
        if held:
            self._tell_all("/pause?mode=keep")
        sent = self._pool.update(source, version, self._lose)
        self._version = version
        if held:
            self._tell_all("/resume")
        seconds, proven = time.perf_counter() - start, self._pool.proven
        return SyncReport(version, seconds, sent, proven.compared, proven.unread)

    def measured(self) -> Metrics:
        lost, self._lost = self._pool.lost - self._lost, self._pool.lost
        return {
            "rollout/servers": Max(float(len(self._pool.ready))),
            "rollout/servers_lost": Sum(float(lost)),
        }

    def release(self) -> None:
        """The servers have memory of their own; the learner's is not read any more until the next update."""
        self._pool.retire()

    def close(self) -> None:
        """Ends the servers that were started here, and waits until they are gone."""
        self._samples, self._ended, self._finished = {}, {}, []
        self._pool.close()
        self._senders.shutdown(wait=True, cancel_futures=True)
        atexit.unregister(self.close)

    def _route(self) -> None:
        """Sends samples that have no server to the one with the fewest tokens to come, prompt by prompt."""
        waiting: dict[str, list[tuple[str, _Sample]]] = {}
        for key, sample in self._samples.items():
            if sample.replica is None:
                waiting.setdefault(sample.row.request.prompt.id, []).append((key, sample))
        ready = self._pool.ready
        if not ready:
            return
        for group in waiting.values():
            load = {id(replica): 0 for replica in ready}
            for sample in self._samples.values():
                if sample.replica is not None and id(sample.replica) in load:
                    load[id(sample.replica)] += sample.tokens
            replica = min(ready, key=lambda r: load[id(r)])
            if not load[id(replica)]:
                replica.moved = time.monotonic()
            for key, sample in group:
                sample.replica = replica
                self._senders.submit(self._send, key, sample, replica, sample.attempt)

    def _send(self, key: str, sample: _Sample, replica: Replica, attempt: int) -> None:
        request = sample.row.request
        response, error = None, None
        if not self._aborting and sample.attempt == attempt:
            body: dict[str, Any] = {
                "token_ids": list(request.prompt.token_ids),
                "sampling_params": sampling_settings(request, sample.row.index, self._model),
                "return_token_ids": sample.row.index == 0,
                "request_id": self._request_id(key, attempt),
            }
            if self._model.lora_rank:
                body["model"] = NAME
            if sample.features is not None:
                body["features"] = sample.features
            try:
                timeout = 2 * self._service.deadline
                response = replica.call("POST", "/inference/v1/generate", body, timeout=timeout)
            except (EngineError, ReplicaError) as caught:
                error = caught
        self._answers.put(_Answer(key, attempt, replica, response, error))

    def _request_id(self, key: str, attempt: int) -> str:
        """Among those of everybody who uses the server."""
        return f"{self._name}/{key}/{attempt}"

    def _listen(self, seconds: float) -> None:
        """Takes the answers there are; waits for the first."""
        try:
            answer = self._answers.get(timeout=seconds) if seconds else self._answers.get_nowait()
            while True:
                self._take(answer)
                answer = self._answers.get_nowait()
        except queue.Empty:
            return

    def _take(self, answer: _Answer) -> None:
        sample = self._samples.get(answer.key)
        if sample is None or sample.attempt != answer.attempt:
            return
        if isinstance(answer.error, EngineError):
            raise answer.error
        if answer.error is not None:
            self._lose(answer.replica, str(answer.error))
            return
        answer.replica.moved, answer.replica.failures = time.monotonic(), 0
        row = sample.row
        if answer.response is not None:
            (choice,) = answer.response["choices"]
            check_prompt(row, answer.response.get("prompt_token_ids"))
            logged: Any = choice["logprobs"]
            content: list[Any] = logged["content"] if logged and logged["content"] else []
            for token, found in zip(choice["token_ids"], content, strict=True):
                candidates = [(other["token_id"], other["logprob"]) for other in found["top_logprobs"]]
                row.append(
                    token, found["logprob"], candidates_of(row, token, candidates, self._model.vocabulary)
                )
            row.versions[:] = [(int(s["version"]), s["start"]) for s in choice["weight_versions"] or ()] or (
                row.versions
            )
            if choice["finish_reason"] != "abort":
                check_end(row, choice["finish_reason"])
            elif not self._aborting:
                self._lose(answer.replica, f"{answer.replica} gave a sample up")
                return
        del self._samples[answer.key]
        prompt_id = row.request.prompt.id
        self._ended[prompt_id].append(row.completion())
        if len(self._ended[prompt_id]) == row.request.params.n:
            self._finished.extend(self._ended.pop(prompt_id))

    def _abort(self) -> None:
        """Servers give back what they have; what was not sent yet comes back empty."""
        self._aborting = True
        try:
            self._tell_all("/pause?mode=abort")
            until = time.monotonic() + PATIENCE
            while any(sample.replica is not None for sample in self._samples.values()):
                self._listen(LOOK_EVERY)
                if time.monotonic() > until:
                    break
            for key, sample in list(self._samples.items()):
                sample.attempt += 1
                self._take(_Answer(key, sample.attempt, sample.replica or self._pool.replicas[0], None, None))
        finally:
            self._aborting = False

    def _watch(self) -> None:
        """Loses a server that owes samples and gives none; gives up when none is left and none comes back."""
        now, deadline = time.monotonic(), self._service.deadline
        owing = {id(sample.replica) for sample in self._samples.values()}
        for replica in self._pool.ready:
            if id(replica) in owing and now - replica.moved > deadline:
                self._lose(replica, f"{replica} gave no sample for {deadline:g} s: it is frozen or too slow")
        if self._pool.ready:
            self._hopeless_since = None
            self._route()
            return
        self._hopeless_since = self._hopeless_since or now
        if self._pool.given_up or now - self._hopeless_since > 2 * deadline:
            raise EngineError(self._pool.why_none_is_left())

    def _lose(self, replica: Replica, reason: str) -> None:
        """Its samples are asked of others, and it is brought back meanwhile."""
        for sample in self._samples.values():
            if sample.replica is replica:
                sample.replica, sample.attempt = None, sample.attempt + 1
        if replica.ready:
            self._pool.lose(replica, reason)
        self._route()

    def _tell_all(self, path: str) -> None:
        self._pool.tell_all(path, self._lose)
