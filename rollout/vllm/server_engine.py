"""The engine `vllm-server`: routes samples to vLLM servers on this host and watches for lost servers.

1. All samples of a prompt go to one server, that with the fewest tokens still to come, so that the prompt is
   computed once. Each sample is a request with a seed of its own: it does not depend on which server draws
   it, and is the same that the engine `vllm` draws.
2. A server is lost if it ends, fails, or returns no sample for `deadline` seconds although samples were sent
   to it. Its samples are sent to the others. It is restarted (a server found by its URL is waited for), sent
   the current weights, and verified before it samples again. If no server is left, the error names each one's
   reason.
3. A weight update sends the weights to every server (transport.py), which clears its prefix cache and is
   verified (rollout/weight_proof.py). The weights stay available for servers that are restarted.
4. No process outlives the trainer (keeper.py).
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
from rlhf.rollout.requests import Finished, Row, check_requests, rows_of
from rlhf.rollout.vllm.adapter import ADAPTER_NAME
from rlhf.rollout.vllm.client import ANSWER_TIMEOUT, Replica, ReplicaError
from rlhf.rollout.vllm.images import SERDE_MODULE, processed_images
from rlhf.rollout.vllm.in_process import (
    MAX_SEQUENCES,
    VLLMModel,
    check_end,
    check_prompt,
    require_vllm,
    sampling_settings,
)
from rlhf.rollout.vllm.isolation import restored_process_state
from rlhf.rollout.vllm.server_pool import POLL_INTERVAL, ServerPool, Service
from rlhf.rollout.vllm.truncation import candidates_of
from rlhf.types import Completion


@dataclass(slots=True, eq=False)
class _Sample:
    """A sample in flight. Only an answer to the last `attempt` counts."""

    row: Row
    features: Mapping[str, Any] | None = None
    """The processed images of its prompt."""
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
    """The engine `vllm-server`. Raises EngineError if a server does not start or lacks a feature."""

    def __init__(self, model: VLLMModel, service: Service, pool: ServerPool | None = None) -> None:
        """`pool` replaces the default pool of servers."""
        self._model, self._service, self._name = model, service, uuid.uuid4().hex
        if model.image_format is not None:
            # the module that encodes images for requests
            with restored_process_state():
                require_vllm()
                importlib.import_module(SERDE_MODULE)
        self._pool = pool or ServerPool(model, service)
        self._samples: dict[str, _Sample] = {}
        self._finished = Finished()
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        size = MAX_SEQUENCES * len(self._pool.replicas)
        self._senders = ThreadPoolExecutor(size, thread_name_prefix="vllm")
        self._version = self._lost = 0
        self._paused = self._aborting = False
        self._none_ready_since: float | None = None
        atexit.register(self.close)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a prompt that is too long, whose placeholders do not fit its images, or that
        `check_requests` refuses.
        """
        image_format = self._model.image_format
        takes_images, in_flight = image_format is not None, self._finished.in_flight
        check_requests(requests, in_flight, self._model.vocabulary, takes_images=takes_images)
        for request in requests:
            self._model.check_length(request)
        features = [
            processed_images(image_format, r.prompt).features()
            if image_format is not None and r.prompt.images
            else None
            for r in requests
        ]
        for request, images in zip(requests, features, strict=True):
            self._finished.expect(request)
            for row in rows_of(request, self._model.eos_token_ids, self._version):
                self._samples[f"{request.prompt.id}/{row.index}"] = _Sample(row, images)
            self._route()

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Waits until a whole group has finished or `timeout` seconds have passed."""
        self._wait(None if timeout is None else time.monotonic() + timeout)
        return self._finished.take()

    def _wait(self, until: float | None) -> None:
        while self._samples and not self._finished.is_due and not self._paused:
            wait = POLL_INTERVAL if until is None else max(0.0, min(POLL_INTERVAL, until - time.monotonic()))
            self._take_answers(wait)
            self._watch()
            if until is not None and time.monotonic() >= until:
                break

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends samples with the tokens so far, `wait` decodes them to the end, `keep` holds them."""
        if mode == "wait":
            while self._samples:
                self._finished.is_due = False
                self._wait(None)
        if mode == "keep":
            self._post_to_all("/pause?mode=keep")
        if mode == "abort":
            self._abort()
        self._paused = True

    def resume(self) -> None:
        self._post_to_all("/resume")
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError if a server does not hold what it was sent. A lost one is updated later."""
        start = time.perf_counter()
        held = self._samples and not self._paused
        if held:
            self._post_to_all("/pause?mode=keep")
        sent = self._pool.update(source, version, self._lose)
        self._version = version
        if held:
            self._post_to_all("/resume")
        seconds, proven = time.perf_counter() - start, self._pool.proven
        return SyncReport(version, seconds, sent, proven.compared, proven.unread)

    def measured(self) -> Metrics:
        lost, self._lost = self._pool.lost - self._lost, self._pool.lost
        return {
            "rollout/servers": Max(float(len(self._pool.ready))),
            "rollout/servers_lost": Sum(float(lost)),
        }

    def release(self) -> None:
        """The servers keep their memory; after this call they no longer read the learner's weights."""
        self._pool.retire()

    def close(self) -> None:
        """Ends the servers that were started here, and waits until their processes have ended."""
        self._samples = {}
        self._finished.clear()
        self._pool.close()
        self._senders.shutdown(wait=True, cancel_futures=True)
        atexit.unregister(self.close)

    def _route(self) -> None:
        """Sends samples without a server to that with the fewest tokens to come, prompt by prompt."""
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
                replica.last_progress = time.monotonic()
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
                body["model"] = ADAPTER_NAME
            if sample.features is not None:
                body["features"] = sample.features
            try:
                timeout = 2 * self._service.deadline
                response = replica.call("POST", "/inference/v1/generate", body, timeout=timeout)
            except (EngineError, ReplicaError) as caught:
                error = caught
        self._answers.put(_Answer(key, attempt, replica, response, error))

    def _request_id(self, key: str, attempt: int) -> str:
        """A request id that is unique among all users of the server."""
        return f"{self._name}/{key}/{attempt}"

    def _take_answers(self, seconds: float) -> None:
        """Takes the answers that have arrived; waits up to `seconds` for the first."""
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
        answer.replica.last_progress, answer.replica.failures = time.monotonic(), 0
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
                self._lose(answer.replica, f"{answer.replica} aborted a sample")
                return
        del self._samples[answer.key]
        self._finished.end(row)

    def _abort(self) -> None:
        """Collects the tokens sampled so far from the servers; samples not yet sent end empty."""
        self._aborting = True
        try:
            self._post_to_all("/pause?mode=abort")
            until = time.monotonic() + ANSWER_TIMEOUT
            while any(sample.replica is not None for sample in self._samples.values()):
                self._take_answers(POLL_INTERVAL)
                if time.monotonic() > until:
                    break
            for key, sample in list(self._samples.items()):
                sample.attempt += 1
                self._take(_Answer(key, sample.attempt, sample.replica or self._pool.replicas[0], None, None))
        finally:
            self._aborting = False

    def _watch(self) -> None:
        """Marks servers without progress as lost. Raises EngineError if none is left and none comes back."""
        now, deadline = time.monotonic(), self._service.deadline
        busy = {id(sample.replica) for sample in self._samples.values()}
        for replica in self._pool.ready:
            if id(replica) in busy and now - replica.last_progress > deadline:
                self._lose(
                    replica, f"{replica} returned no sample for {deadline:g} s: it is frozen or too slow"
                )
        if self._pool.ready:
            self._none_ready_since = None
            self._route()
            return
        self._none_ready_since = self._none_ready_since or now
        if self._pool.given_up or now - self._none_ready_since > 2 * deadline:
            raise EngineError(self._pool.why_none_is_left())

    def _lose(self, replica: Replica, reason: str) -> None:
        """Sends its samples to other servers, and restarts it in the background."""
        for sample in self._samples.values():
            if sample.replica is replica:
                sample.replica, sample.attempt = None, sample.attempt + 1
        if replica.ready:
            self._pool.lose(replica, reason)
        self._route()

    def _post_to_all(self, path: str) -> None:
        self._pool.post_to_all(path, self._lose)
