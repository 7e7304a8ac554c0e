"""Arguments that `token_stats` refuses, with the messages of its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.kernels.backend import resolve
from rlhf.kernels.token_stats import api, token_stats

N, H, V = 4, 3, 20


def call(**changes: Any) -> None:
    inputs: dict[str, Any] = {
        "hidden": torch.zeros(N, H),
        "weight": torch.zeros(V, H),
        "targets": torch.zeros(N, dtype=torch.long),
    }
    token_stats(**(inputs | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(N, H + 1)}, r"expected hidden \[N, H\] and weight \[V, H\]"),
        ({"hidden": torch.zeros(2, N, H)}, r"got \[2, 4, 3\] and \[20, 3\]"),
        ({"targets": torch.zeros(N + 1, dtype=torch.long)}, r"expected integer targets \[4\]"),
        ({"targets": torch.zeros(N)}, r"got torch.float32"),
        ({"hidden": torch.zeros(N, H, dtype=torch.bfloat16)}, "convert one"),
        ({"bias": torch.zeros(V + 1)}, r"expected bias \[20\]"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": torch.ones(N + 1)}, r"expected a number or \[4\]"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"want": ("logp",)}, "expected one or more of logprob, entropy"),
        ({"want": ()}, "expected one or more of"),
        ({"want": ("kl",)}, "pass its inputs"),
        ({"workspace_bytes": 0}, "workspace_bytes must be above 0"),
        ({"num_unmasked": 5}, r"num_unmasked must lie in \[0, 4\]"),
        ({"num_unmasked": 3}, "num_unmasked is 3, but 4 targets"),
        ({"backend": "triton"}, "backend 'triton' needs CUDA tensors, got one on cpu"),
        ({"targets": torch.tensor([0, 1, 20, 2])}, r"target 20 is outside \[0, 20\); mask a token with -100"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, "target -1 is outside"),
        ({"want": ("kl",), "ref_hidden": torch.zeros(N, 5)}, r"got \[4, 5\] and \[20, 3\]"),
        (
            {"want": ("kl",), "ref_hidden": torch.zeros(N, H), "ref_bias": torch.zeros(V)},
            "ref_bias without ref_weight",
        ),
        (
            {
                "want": ("kl",),
                "ref_hidden": torch.zeros(N, H, dtype=torch.float64),
                "ref_weight": torch.zeros(V, H, dtype=torch.float64),
            },
            "float64 needs both",
        ),
    ],
)
def test_an_impossible_call_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown backend 'cuda'; choose one of auto, reference, tiled, triton"
    ):
        resolve("cuda", torch.zeros(1), offered=api.OFFERED)
    with pytest.raises(ValueError, match="unknown memory mode 'all'; choose auto, recompute or keep"):
        api.check_memory("all", 1)


def test_triton_refuses_float64_rather_than_lose_it() -> None:
    wide = {"hidden": torch.zeros(N, H).double(), "weight": torch.zeros(V, H).double()}
    with pytest.raises(ValueError, match="would lose the precision of float64"):
        call(backend="triton", **wide)


def test_the_reference_may_have_another_precision() -> None:
    call(
        want=("kl",),
        ref_hidden=torch.zeros(N, 5, dtype=torch.bfloat16),
        ref_weight=torch.zeros(V, 5, dtype=torch.bfloat16),
    )


def test_integer_temperatures_and_narrow_targets_are_fine() -> None:
    call(temperature=2, targets=torch.zeros(N, dtype=torch.int32))
