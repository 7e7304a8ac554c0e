"""Cache of the scores of a deterministic reward function: an equal sample is not scored twice."""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from rlhf.rewards.workers.return_values import Scores


class ScoreCache:
    """Scores of the `size` samples that were used last (LRU). Failures are not cached."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._scores: OrderedDict[bytes, Scores] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(arguments: Mapping[str, Any]) -> bytes:
        """SHA-256 of all arguments that a function gets for one sample, except `trainer_state`."""
        written = io.BytesIO()
        pickler = pickle.Pickler(written)
        # without `fast`, the bytes depend on which parts of the arguments are the same object
        pickler.fast = True
        pickler.dump({name: value for name, value in arguments.items() if name != "trainer_state"})
        return hashlib.sha256(written.getvalue()).digest()

    def get(self, key: bytes) -> Scores | None:
        with self._lock:
            if key in self._scores:
                self._scores.move_to_end(key)
            return self._scores.get(key)

    def put(self, key: bytes, scores: Scores) -> None:
        with self._lock:
            self._scores[key] = scores
            self._scores.move_to_end(key)
            if len(self._scores) > self.size:
                self._scores.popitem(last=False)
