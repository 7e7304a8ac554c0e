"""Games and hills of the online preference methods, with few steps: what they show within seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.preference_nash import CYCLE, cycle, nash_point, preferences


def test_the_nash_point_is_its_own_best_answer():
    # policy = reference * exp(P / tau) up to a factor, and nobody wins against everybody
    point = nash_point()
    log_ratio = point.log() - torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    rest = log_ratio - preferences() @ point / 0.1
    torch.testing.assert_close(rest - rest.mean(), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert point.tolist() == pytest.approx([0.585, 0.127, 0.288], abs=1e-3)


def test_ipo_and_inpo_play_nash_and_dpo_does_not():
    # larger steps than the benchmark's, and fewer
    arms = {name: replace(arm, lr=6 * arm.lr) for name, arm in CYCLE.items()}
    found = cycle(300, {name: arms[name] for name in ("online ipo", "online dpo")})
    found |= cycle(500, {"inpo": replace(CYCLE["inpo"], lr=0.9)}, iteration=12)
    assert found["online ipo"]["distance"] < 1e-3
    assert found["inpo"]["distance"] < 1e-3
    assert found["online dpo"]["distance"] > 0.1
