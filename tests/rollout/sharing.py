"""The program of two ranks that share one vLLM server; a module that processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from rlhf.distributed.world import world
from rlhf.rollout.engine import generate
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.server_pool import Service
from rlhf.rollout.vllm.shared_servers import SharedServers
from rlhf.types import FinishReason
from tests.rollout.conformance import TOLERANCE, Source, conforming_model, drain, moved, worst
from tests.rollout.models import EOS, VOCABULARY, request

# seconds; generous, since the machine may be busy
PATIENCE = 600.0


def sharing(folder: str) -> None:
    """Updates, samples, aborts, and loses the server that rank 0 has started."""
    model = conforming_model()
    sampled = VLLMModel(folder, torch.float32, 512, VOCABULARY, (EOS,), kv_cache_gib=0.1)
    with world(timeout=4 * PATIENCE) as ranks:
        engine = SharedServers(sampled, Service(replicas=1, deadline=PATIENCE), ranks)
        (server,) = engine._pool.replicas
        first = 9 + 10 * ranks.rank
        requests = [request(length, n=3, max_tokens=100) for length in (first, first + 1)]
        for version, weights in enumerate((model, moved(model))):
            report = engine.update_weights(Source(weights), version)
            assert (report.version, report.compared) == (version, len(list(model.parameters())) + 1)
            groups = generate(engine, requests)
            assert worst(weights, requests, groups) < TOLERANCE
            assert {s.version for group in groups for c in group for s in c.versions} == {version}
        # one rank aborts its samples: those of the other go on
        engine.submit([request(first, n=2, max_tokens=400)])
        if ranks.rank == 1:
            engine.pause("abort")
            engine.resume()
        reasons = {c.finish_reason for c in drain(engine)}
        assert (FinishReason.ABORT in reasons) is (ranks.rank == 1)
        # the server is killed while both ranks wait for samples
        ranks.gather(None)
        engine.submit([request(first, n=2, max_tokens=300)])
        if ranks.rank == 0:
            time.sleep(0.2)
            process: Any = server._keeper
            keeper = process.pid
            children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
            os.killpg(int(children[0]), signal.SIGKILL)
        completions = drain(engine)
        assert len(completions) == 2
        assert worst(moved(model), [request(first, n=2, max_tokens=300)], [completions]) < TOLERANCE
        ranks.gather(None)
        engine.close()
