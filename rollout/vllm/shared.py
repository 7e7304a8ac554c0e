"""vLLM servers that several ranks of one host sample from.

1. Rank 0 starts them (or finds them by their addresses), watches them, brings lost ones back and gives them
   weights, which it proves as a rank that is alone does. The others are told the addresses, and after every
   update which servers have taken it.
2. Every rank routes its own samples. One that finds a server lost asks others for its samples and comes back
   when that server says that it holds the weights of now; an answer sampled by older ones is asked for again.
3. What holds or ends samples for all, a server is told for all ranks: an update holds the samples of every
   rank, and a rank that gives up names its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.metrics import Metrics
from rlhf.rollout.engine import EngineError, Ranks, SyncError, SyncReport, WeightSource
from rlhf.rollout.vllm.client import PATIENCE, Replica, ReplicaError
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.pool import LOOK_EVERY, ServerPool, Service
from rlhf.rollout.vllm.servers import VLLMServerEngine
from rlhf.rollout.vllm.transport import Place, Transport


class Led(ServerPool):
    """The servers of rank 0, which also notices a loss while it has no samples to wait for."""

    def __init__(self, model: VLLMModel, service: Service) -> None:
        self._losing = threading.Lock()
        super().__init__(model, service)
        threading.Thread(target=self._look_after, daemon=True).start()

    def lose(self, replica: Replica, reason: str) -> None:
        with self._losing:
            if replica.ready:
                super().lose(replica, reason)

    def _look_after(self) -> None:
        while not self._closed:
            for server in self.ready:
                if server.has_ended:
                    self.lose(server, f"{server} ended: {server.last_words()}")
            time.sleep(LOOK_EVERY)


class Followed(ServerPool):
    """The same servers, as the other ranks see them."""

    def __init__(self, model: VLLMModel, service: Service, urls: Sequence[str]) -> None:
        super().__init__(model, replace(service, urls=tuple(urls)))

    def _transport_for(self, placed: Sequence[Place | None]) -> Transport:
        """Rank 0 gives weights; nothing goes through this one."""
        return self._transport

    def follow(self, version: int) -> None:
        """Rank 0 has given them weights."""
        self._version = version

    def _say(self, text: str) -> None:
        """Rank 0 does."""

    def _caught_up(self, replica: Replica) -> bool:
        """Rank 0 gives a server that comes back its weights, and then this version."""
        said = replica.call("GET", "/weight_info", timeout=PATIENCE)
        return said["weight_version"] == str(self._version)


class SharedServers(VLLMServerEngine):
    """Made, updated and closed by all ranks together. Raises EngineError, on each of them."""

    def __init__(self, model: VLLMModel, service: Service, ranks: Ranks) -> None:
        self._ranks, self._leads = ranks, ranks.rank == 0
        pool: ServerPool | None = None
        error: EngineError | None = None
        if self._leads:
            try:
                pool = Led(model, service)
            except EngineError as caught:
                error = caught
        urls = [] if pool is None else [replica.url for replica in pool.replicas]
        urls, error = ranks.gather((urls, error))[0]
        if error is not None:
            raise error
        super().__init__(model, service, pool or Followed(model, service, urls))

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError or EngineError on every rank: what rank 0 found."""
        held = any(self._ranks.gather(bool(self._samples)))
        outcome: tuple[SyncReport | None, list[str], Exception | None] = None, [], None
        if self._leads:
            try:
                outcome = self._lead(source, version, held=held), [r.url for r in self._pool.ready], None
            except (EngineError, SyncError) as caught:
                outcome = None, [], caught
        else:
            # a model in shards is gathered by all ranks together
            for _ in source.named_tensors():
                pass
        report, ready, error = self._ranks.gather(outcome)[0]
        if error is not None:
            raise error
        self._version = version
        if isinstance(self._pool, Followed):
            self._pool.follow(version)
            for replica in self._pool.ready:
                if replica.url not in ready:
                    self._lose(replica, f"{replica} did not take the weights of version {version}")
        return report

    def measured(self) -> Metrics:
        """A server that is lost is lost for all ranks."""
        return super().measured() if self._leads else {}

    def _lead(self, source: WeightSource, version: int, *, held: bool) -> SyncReport:
        if held:
            self._pool.tell_all("/pause?mode=keep", self._lose)
        report = super().update_weights(source, version)
        if held:
            self._pool.tell_all("/resume", self._lose)
        return report

    def _tell_all(self, path: str) -> None:
        """Only that samples of this rank are given up: others would be held and resumed with it."""
        if not path.endswith("abort"):
            return
        for replica in self._pool.ready:
            mine = [
                f"generate-tokens-{self._request_id(key, sample.attempt)}"
                for key, sample in self._samples.items()
                if sample.replica is replica
            ]
            if mine:
                try:
                    replica.call("POST", "/abort_requests", {"request_ids": mine}, timeout=PATIENCE)
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
    """Whether a server says that of its tokens; one that was started anew has weights of no number."""
    said = [str(span["version"]) for span in spans or ()]
    return bool(said) and all(s.isdigit() and int(s) >= version for s in said)
