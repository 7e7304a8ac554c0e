"""Every Triton kernel compiles for machines not here, spills nothing, and reads 16 bytes at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from rlhf.kernels.gae import triton_scan
from rlhf.kernels.token_stats import triton_kernels
from rlhf.kernels.token_stats.triton_rows import BLOCK, MOST_REGISTERS, REFERENCE_BLOCK, WARPS
from tests.kernels.compiled import TARGETS, Resources, resources

SHARED = {
    "stride": "i32",
    "bias_ptr": "*fp32",
    "ref_bias_ptr": "*fp32",
    "target_ptr": "*i64",
    "temperature_ptr": "*fp32",
    "first": "i32",
    "columns": "i32",
    "logit_scale": "fp32",
    "cap": "fp32",
}
each_target = pytest.mark.parametrize("target", TARGETS)
FEATURES = list(itertools.product((False, True), repeat=2))


def features(target: str, *, reference: bool, everything: bool) -> dict[str, Any]:
    return {
        "HAS_REFERENCE": reference,
        "HAS_CAP": everything,
        "HAS_BIAS": everything,
        "HAS_REF_BIAS": everything and reference,
        "BLOCK": REFERENCE_BLOCK if reference and target.startswith("sm") else BLOCK,
    }


def check(used: Resources, *, loads: int, stores: int = 0) -> None:
    assert used.spilled == 0, used
    assert used.registers <= MOST_REGISTERS, used
    # strides and sizes are compiled as numbers of any value: an odd vocabulary runs this very code
    assert used.wide_loads >= loads, used
    assert used.wide_stores >= stores, used


@each_target
@pytest.mark.parametrize(
    ("logits", "reference", "everything"), [*(("fp32", *f) for f in FEATURES), ("bf16", True, True)]
)
def test_the_fold(target: str, reference: bool, everything: bool, logits: str, tmp_path: Path) -> None:
    arguments = SHARED | {
        "z_ptr": f"*{logits}",
        "u_ptr": f"*{logits}",
        "state_ptr": "*fp32",
        "state_stride": "i32",
    }
    constants = features(target, reference=reference, everything=everything) | {"HAS_ENTROPY": True}
    used = resources(triton_kernels.fold_kernel, arguments, constants, target, tmp_path)
    check(used, loads=2 if reference else 1)


@each_target
@pytest.mark.parametrize(
    ("logits", "out", "in_place", "reference", "everything"),
    [
        *(("fp32", "bf16", True, *f) for f in FEATURES),
        ("fp32", "fp32", False, True, True),
        ("bf16", "bf16", False, True, True),
    ],
)
def test_the_gradient(
    target: str, reference: bool, everything: bool, logits: str, out: str, in_place: bool, tmp_path: Path
) -> None:
    arguments = SHARED | {
        "z_ptr": f"*{logits}",
        "u_ptr": f"*{logits}",
        "out_ptr": f"*{out}",
        "out_stride": "i32",
        "coefficient_ptr": "*fp32",
        "coefficient_stride": "i32",
    }
    constants = features(target, reference=reference, everything=everything) | {"IN_PLACE": in_place}
    used = resources(triton_kernels.gradient_kernel, arguments, constants, target, tmp_path)
    check(used, loads=2 if reference else 1, stores=1)


@each_target
def test_the_advantage_scan(target: str, tmp_path: Path) -> None:
    arguments = {"d_ptr": "*fp32", "c_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    used = resources(triton_scan.scan_kernel, arguments, {"BLOCK": triton_scan.BLOCK}, target, tmp_path)
    assert used.spilled == 0, used
    assert used.registers <= MOST_REGISTERS, used


def test_the_launches_are_the_ones_compiled_here() -> None:
    assert WARPS == triton_scan.WARPS == 8
