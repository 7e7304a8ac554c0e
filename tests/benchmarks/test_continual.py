"""The benchmark of one domain after another: what it adds up, and that both domains are learned."""

from __future__ import annotations

import pytest
import torch

from benchmarks import continual
from benchmarks.continual import ARMS, Adapter, added, change, measure


def test_half_of_each_adapter_is_the_mean_of_what_they_change():
    generator = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        return torch.randn(4, 12, generator=generator), torch.randn(16, 4, generator=generator)

    one, two = adapter(), adapter()
    torch.testing.assert_close(added(one, two), (change(one) + change(two)) / 2)


@pytest.mark.parametrize("method", ["dpo", "ofs_dpo"])
def test_each_domain_is_learned_better_by_its_own_run(monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.setattr(continual, "STEPS", 8)
    found = {row["arm"]: row for row in measure(method, 1)}
    assert set(found) == set(ARMS)
    assert found["a"]["a"] > 0.7 > found["b"]["a"] and found["b"]["b"] > 0.7 > found["a"]["b"]
