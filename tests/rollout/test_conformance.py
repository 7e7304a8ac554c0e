"""The engines `native` and `hf` pass the checks of `conformance.py`."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.rollout.hf import HFEngine
from rlhf.rollout.native.engine import NativeEngine
from tests.rollout.conformance import CHECKS, Check, conforming_model
from tests.rollout.models import EOS


@pytest.mark.parametrize("kind", [NativeEngine, HFEngine])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_embedded_engines_conform(kind: Any, check: Check) -> None:
    held, model = conforming_model(), conforming_model()
    engine = kind(held, eos_token_ids=[EOS])
    check(engine, model)
    assert engine.poll() == []
    engine.close()
