# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# Triton is not typed.
"""The same two row kernels as `rows`, run by Triton: the launches and what they assume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.kernels.token_stats.rows import Coefficients, Scratch, Tile
from rlhf.kernels.token_stats.triton_kernels import fold_kernel, gradient_kernel

WARPS = 8
# 65536 registers a multiprocessor: two programs of 8 warps
MOST_REGISTERS = 128
# the largest blocks that keep to it, without and with a reference's logits
BLOCK, REFERENCE_BLOCK = 4096, 2048


class TritonRows:
    """Row kernels on a GPU (or in the interpreter), fp32 inside; the temperature must be a tensor."""

    buffers = 1

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Fold the tile into its rows' state."""
        logits, ref_logits = _same_layout(tile)
        height, width = logits.shape
        reference = tile.ref_logits is not None
        with torch.cuda.device_of(logits):
            fold_kernel[(height,)](
                logits,
                ref_logits,
                logits.stride(0),
                *_parameters(tile, logits),
                state,
                state.stride(0),
                tile.first,
                width,
                tile.scaling.logit_scale,
                tile.scaling.softcap or 1.0,
                HAS_REFERENCE=reference,
                HAS_ENTROPY=entropy,
                HAS_CAP=tile.scaling.softcap is not None,
                HAS_BIAS=tile.bias is not None,
                HAS_REF_BIAS=tile.ref_bias is not None,
                BLOCK=self._block_for(width, reference=reference),
                **launch_options(),
            )

    def gradient(
        self,
        tile: Tile,
        coefficients: Coefficients,
        *,
        scratch: Scratch,
        dtype: torch.dtype,
        overwrite: bool,
    ) -> Tensor:
        """The gradient by the tile's raw logits, in `dtype`, perhaps in the bytes of its logits."""
        logits, ref_logits = _same_layout(tile)
        height, width = logits.shape
        overwrite = overwrite and logits.stride(0) % 16 == 0 and dtype.itemsize <= logits.dtype.itemsize
        into = logits if overwrite else scratch("gradient", height, width)
        out = reinterpreted(into, dtype)
        self.write_gradient(tile, logits, ref_logits, coefficients, out, in_place=overwrite)
        return out

    def write_gradient(
        self,
        tile: Tile,
        logits: Tensor,
        ref_logits: Tensor,
        coefficients: Coefficients,
        out: Tensor,
        *,
        in_place: bool,
    ) -> None:
        """The gradient into `out`, a matrix whose rows start where the logits' do, modulo 16 elements."""
        height, width = logits.shape
        assert (logits.stride(0) - out.stride(0)) % 16 == 0
        reference = tile.ref_logits is not None and (coefficients.has_gap or coefficients.has_pull)
        with torch.cuda.device_of(logits):
            gradient_kernel[(height,)](
                logits,
                ref_logits,
                logits.stride(0),
                out,
                out.stride(0),
                *_parameters(tile, logits),
                coefficients.values,
                coefficients.values.stride(0),
                tile.first,
                width,
                tile.scaling.logit_scale,
                tile.scaling.softcap or 1.0,
                HAS_REFERENCE=reference,
                HAS_CAP=tile.scaling.softcap is not None,
                HAS_BIAS=tile.bias is not None,
                HAS_REF_BIAS=tile.ref_bias is not None,
                IN_PLACE=in_place,
                BLOCK=self._block_for(width, reference=reference),
                **launch_options(),
            )

    def _block_for(self, columns: int, *, reference: bool) -> int:
        most = REFERENCE_BLOCK if reference and torch.version.hip is None else BLOCK
        block = 128
        while block < min(columns, most):
            block *= 2
        return min(block, most)


def reinterpreted(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a matrix with aligned rows as one of `dtype` with as many columns, rows in place."""
    rows, columns = buffer.shape
    length = buffer.stride(0)
    whole = buffer.as_strided((rows, length), (length, 1))
    return whole.view(dtype)[:, :columns]


def _same_layout(tile: Tile) -> tuple[Tensor, Tensor]:
    """Both models' logits with one row stride, unit column stride; the policy's own for none."""
    logits, ref_logits = tile.logits, tile.ref_logits
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if ref_logits is None:
        return logits, logits
    if ref_logits.stride() != logits.stride():
        logits, ref_logits = logits.contiguous(), ref_logits.contiguous()
    return logits, ref_logits


def _parameters(tile: Tile, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature = tile.scaling.temperature
    assert isinstance(temperature, Tensor)
    bias = logits if tile.bias is None else tile.bias
    return bias, logits if tile.ref_bias is None else tile.ref_bias, tile.targets, temperature


def launch_options() -> dict[str, Any]:
    """How every row kernel is compiled."""
    # Triton's default for the fusion of multiply and add depends on its version
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    if torch.version.hip is None:
        # left to itself, ptxas spills a few bytes of some kernels to fit another program in
        options["maxnreg"] = MOST_REGISTERS
    return options
