# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# Triton is not typed.
"""Launches the Triton row kernels: block sizes, strides and compile options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.kernels.token_stats.rows import Coefficients, Scratch, Tile
from rlhf.kernels.token_stats.triton_kernels import fold_kernel, gradient_kernel

WARPS = 8
# of the 65536 registers of a multiprocessor, so that two programs of 8 warps fit
MOST_REGISTERS = 128
# the largest blocks within that limit, without and with the reference model's logits
BLOCK, REFERENCE_BLOCK = 4096, 2048


class TritonRows:
    """Row kernels on a GPU (or in the interpreter), in fp32; the temperature of a tile must be a tensor."""

    buffers = 1

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Folds the tile into its rows' state."""
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
        """The gradient by the tile's raw logits, in `dtype`; with `overwrite` it may be written over them."""
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
        """Writes the gradient into `out`, whose row stride equals that of the logits modulo 16 elements."""
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
    """The memory of a matrix with aligned rows as a matrix of `dtype`: as many columns, same row starts."""
    rows, columns = buffer.shape
    length = buffer.stride(0)
    whole = buffer.as_strided((rows, length), (length, 1))
    return whole.view(dtype)[:, :columns]


def _same_layout(tile: Tile) -> tuple[Tensor, Tensor]:
    """The logits of policy and reference with equal row strides and unit column stride.

    Without a reference model the policy's logits stand in for its own.
    """
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
    """Compile options of all row kernels."""
    # set explicitly: Triton's default for fused multiply-add depends on its version
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    if torch.version.hip is None:
        # without a limit ptxas spills a few bytes of some kernels so that another program fits
        options["maxnreg"] = MOST_REGISTERS
    return options
