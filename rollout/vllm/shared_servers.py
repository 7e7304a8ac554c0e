"""vLLM servers shared by several ranks of one host: rank 0 leads (starts, updates), the others follow.

1. The leader, rank 0, starts the servers (or finds them by their URLs), watches them, restarts lost ones,
   sends weights and verifies them, as with a single rank. The followers get the URLs, and after every update
   the list of servers that have the new weights.
2. Every rank routes its own samples. If it finds a server lost, it sends the samples to others, and uses the
   server again once that reports the current version of weights. A sample drawn with older weights is
   repeated.
3. Pausing a server affects all ranks, so the leader pauses for an update, and a rank that aborts its samples
   names them by their request ids.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.metrics import Metrics
from rlhf.rollout.engine import EngineError, Ranks, SyncError, SyncReport, WeightSource
from rlhf.rollout.vllm.client import ANSWER_TIMEOUT, Replica, ReplicaError
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.server_engine import VLLMServerEngine
from rlhf.rollout.vllm.server_pool import POLL_INTERVAL, ServerPool, Service
from rlhf.rollout.vllm.transport import Place, Transport


class LeaderPool(ServerPool):
    """The leader's pool, on rank 0; a thread notices servers that end while the leader samples nothing."""

    def __init__(self, model: VLLMModel, service: Service) -> None:
        self._losing = threading.Lock()
        super().__init__(model, service)
        threading.Thread(target=self._watch_processes, daemon=True).start()

    def lose(self, replica: Replica, reason: str) -> None:
        with self._losing:
            if replica.ready:
                super().lose(replica, reason)

    def _watch_processes(self) -> None:
        while not self._closed:
            for server in self.ready:
                if server.has_ended:
                    self.lose(server, f"{server} ended: {server.last_log_lines()}")
            time.sleep(POLL_INTERVAL)


class FollowerPool(ServerPool):
    """A follower's pool, on the other ranks: it samples from the servers but never starts or updates them."""

    def __init__(self, model: VLLMModel, service: Service, urls: Sequence[str]) -> None:
        super().__init__(model, replace(service, urls=tuple(urls)))

    def _transport_for(self, placed: Sequence[Place | None]) -> Transport:
        """Unused, since the leader sends the weights."""
        return self._transport

    def follow(self, version: int) -> None:
        """Notes that the leader has sent the weights of `version`."""
        self._version = version

    def _warn(self, text: str) -> None:
        """Does nothing: the leader logs losses."""

    def _update_restarted(self, replica: Replica) -> bool:
        """Whether the leader has sent the current weights to a restarted server, as the server reports."""
        info = replica.call("GET", "/weight_info", timeout=ANSWER_TIMEOUT)
        return info["weight_version"] == str(self._version)


class SharedServers(VLLMServerEngine):
    """Each rank's engine; made, updated and closed by all ranks together. Raises EngineError on all."""

    def __init__(self, model: VLLMModel, service: Service, ranks: Ranks) -> None:
        self._ranks, self._is_leader = ranks, ranks.rank == 0
        pool: ServerPool | None = None
        error: EngineError | None = None
        if self._is_leader:
            try:
                pool = LeaderPool(model, service)
            except EngineError as caught:
                error = caught
        urls = [] if pool is None else [replica.url for replica in pool.replicas]
        urls, error = ranks.gather((urls, error))[0]
        if error is not None:
            raise error
        super().__init__(model, service, pool or FollowerPool(model, service, urls))

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError or EngineError on every rank if the update failed on the leader."""
        held = any(self._ranks.gather(bool(self._samples)))
        outcome: tuple[SyncReport | None, list[str], Exception | None] = None, [], None
        if self._is_leader:
            try:
                report = self._update_as_leader(source, version, held=held)
                outcome = report, [r.url for r in self._pool.ready], None
            except (EngineError, SyncError) as caught:
                outcome = None, [], caught
        else:
            # gathering a sharded model is collective: every rank has to iterate
            for _ in source.named_tensors():
                pass
        report, ready, error = self._ranks.gather(outcome)[0]
        if error is not None:
            raise error
        self._version = version
        if isinstance(self._pool, FollowerPool):
            self._pool.follow(version)
            for replica in self._pool.ready:
                if replica.url not in ready:
                    self._lose(replica, f"{replica} did not take the weights of version {version}")
        return report

    def measured(self) -> Metrics:
        """Only the leader reports, since servers and losses are the same for all ranks."""
        return super().measured() if self._is_leader else {}

    def _update_as_leader(self, source: WeightSource, version: int, *, held: bool) -> SyncReport:
        if held:
            self._pool.post_to_all("/pause?mode=keep", self._lose)
        report = super().update_weights(source, version)
        if held:
            self._pool.post_to_all("/resume", self._lose)
        return report

    def _post_to_all(self, path: str) -> None:
        """Aborts only this rank's samples; pausing and resuming a server would affect the other ranks."""
        if not path.endswith("abort"):
            return
        for replica in self._pool.ready:
            request_ids = [
                f"generate-tokens-{self._request_id(key, sample.attempt)}"
                for key, sample in self._samples.items()
                if sample.replica is replica
            ]
            if request_ids:
                try:
                    replica.call(
                        "POST", "/abort_requests", {"request_ids": request_ids}, timeout=ANSWER_TIMEOUT
                    )
                except ReplicaError as error:
                    self._lose(replica, str(error))

    def _take(self, answer: Any) -> None:
        sample = self._samples.get(answer.key)
        if sample is not None and sample.attempt == answer.attempt and answer.response is not None:
            (choice,) = answer.response["choices"]
            oldest = sample.row.versions[0][0]
            if choice["token_ids"] and not _of_weights_since(oldest, choice["weight_versions"]):
                self._lose(answer.replica, f"{answer.replica} sampled with weights before version {oldest}")
                return
        super()._take(answer)


def _of_weights_since(version: int, spans: Sequence[Any] | None) -> bool:
    """Whether all tokens were sampled with that version or a later one; a new server reports no number."""
    versions = [str(span["version"]) for span in spans or ()]
    return bool(versions) and all(v.isdigit() and int(v) >= version for v in versions)
