# pyright: basic
# Triton's own language is not typed, and no_type_check keeps import hooks from wrapping its functions.
"""The Triton row kernels: fold and gradient of a tile of logits, one program per row, everything in fp32.

Both kernels go over a row in blocks that start at an aligned address at or before the row's first element,
whatever the row's stride, so a vocabulary of any size is read 16 bytes at a time. Columns before the row's
first are masked in registers; only the loads of the last block are masked.

The kernels use no libdevice, autotuning or atomics: they run in Triton's interpreter, and the same call
gives the same bits every time.
"""

from typing import no_type_check

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
IGNORED = tl.constexpr(-100)
ALIGNMENT = tl.constexpr(16)


@no_type_check
@triton.jit
def _tanh(x):
    # an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel
    t = x * x
    near = -0.00571706 * t + 0.0206506
    near = near * t - 0.0537435
    near = near * t + 0.13331491
    near = near * t - 0.33333284
    near = x + x * t * near
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@no_type_check
@triton.jit
def _capped(z, bias_ptr, column, valid, logit_scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    # raw logits to scaled ones, without the temperature; minus infinity becomes FLOOR, a NaN stays
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    z = tl.where(z < FLOOR, FLOOR, z) * logit_scale
    if HAS_CAP:
        z = cap * _tanh(z / cap)
    return z


@no_type_check
@triton.jit
def _fold_block(
    top,
    others,
    shifted,
    gap,
    ref_top,
    ref_others,
    ref_gap,
    z_row,
    u_row,
    bias_ptr,
    ref_bias_ptr,
    lane,
    head,
    span,
    target,
    inverse_temperature,
    logit_scale,
    cap,
    HAS_REFERENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    valid = lane >= head
    if IS_TAIL:
        valid = valid & (lane < span)
        z = tl.load(z_row + lane, mask=lane < span, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_row + lane).to(tl.float32)
    column = lane - head
    counts = valid & (column != target)
    a = _capped(z, bias_ptr, column, valid, logit_scale, cap, HAS_BIAS, HAS_CAP) * inverse_temperature
    new_top = tl.maximum(top, tl.max(tl.where(valid, a, FLOOR), 0))
    down = top - new_top
    share = tl.exp(down)
    d = tl.where(counts, a - new_top, FLOOR)
    weight = tl.where(counts, tl.exp(d), 0.0)
    if HAS_ENTROPY:
        shifted = share * (shifted + down * others) + tl.sum(weight * d, 0)
    if HAS_REFERENCE:
        if IS_TAIL:
            u = tl.load(u_row + lane, mask=lane < span, other=0.0).to(tl.float32)
        else:
            u = tl.load(u_row + lane).to(tl.float32)
        u = (
            _capped(u, ref_bias_ptr, column, valid, logit_scale, cap, HAS_REF_BIAS, HAS_CAP)
            * inverse_temperature
        )
        new_ref_top = tl.maximum(ref_top, tl.max(tl.where(valid, u, FLOOR), 0))
        ref_down = ref_top - new_ref_top
        ref_share = tl.exp(ref_down)
        e = tl.where(counts, u - new_ref_top, FLOOR)
        ref_weight = tl.where(counts, tl.exp(e), 0.0)
        gap = share * (gap + (down - ref_down) * others) + tl.sum(weight * (d - e), 0)
        ref_gap = ref_share * (ref_gap + (ref_down - down) * ref_others) + tl.sum(ref_weight * (e - d), 0)
        ref_others = ref_share * ref_others + tl.sum(ref_weight, 0)
        ref_top = new_ref_top
    others = share * others + tl.sum(weight, 0)
    return new_top, others, shifted, gap, ref_top, ref_others, ref_gap


@no_type_check
@triton.jit(do_not_specialize=["first", "columns"])
def fold_kernel(
    z_ptr,
    u_ptr,
    stride,
    bias_ptr,
    ref_bias_ptr,
    target_ptr,
    temperature_ptr,
    state_ptr,
    state_stride,
    first,
    columns,
    logit_scale,
    cap,
    HAS_REFERENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds one row of a tile into its running state `[STATE_ROWS, R]`, described in `state.py`."""
    row = tl.program_id(0).to(tl.int64)
    target = (tl.load(target_ptr + row) - first).to(tl.int32)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
    slot = state_ptr + row
    top = tl.load(slot)
    others = tl.load(slot + state_stride)
    shifted = tl.load(slot + 2 * state_stride)
    gap = tl.load(slot + 3 * state_stride)
    ref_top = tl.load(slot + 4 * state_stride)
    ref_others = tl.load(slot + 5 * state_stride)
    ref_gap = tl.load(slot + 6 * state_stride)

    start = row * stride // ALIGNMENT * ALIGNMENT
    head = (row * stride - start).to(tl.int32)
    z_row = z_ptr + start
    u_row = u_ptr + start
    span = head + columns
    lanes = tl.arange(0, BLOCK)
    full = span // BLOCK * BLOCK
    for block in range(0, full, BLOCK):
        top, others, shifted, gap, ref_top, ref_others, ref_gap = _fold_block(
            top, others, shifted, gap, ref_top, ref_others, ref_gap,
            z_row, u_row, bias_ptr, ref_bias_ptr, block + lanes, head, span, target,
            inverse_temperature, logit_scale, cap,
            HAS_REFERENCE, HAS_ENTROPY, HAS_CAP, HAS_BIAS, HAS_REF_BIAS, False,
        )  # fmt: skip
    if full < span:
        top, others, shifted, gap, ref_top, ref_others, ref_gap = _fold_block(
            top, others, shifted, gap, ref_top, ref_others, ref_gap,
            z_row, u_row, bias_ptr, ref_bias_ptr, full + lanes, head, span, target,
            inverse_temperature, logit_scale, cap,
            HAS_REFERENCE, HAS_ENTROPY, HAS_CAP, HAS_BIAS, HAS_REF_BIAS, True,
        )  # fmt: skip

    tl.store(slot, top)
    tl.store(slot + state_stride, others)
    tl.store(slot + 2 * state_stride, shifted)
    if (target >= 0) & (target < columns):
        z = tl.load(z_row + head + target).to(tl.float32)
        a = _capped(z, bias_ptr, target, True, logit_scale, cap, HAS_BIAS, HAS_CAP) * inverse_temperature
        tl.store(slot + 7 * state_stride, a)
        tl.store(slot + 9 * state_stride, 1.0)
    if HAS_REFERENCE:
        tl.store(slot + 3 * state_stride, gap)
        tl.store(slot + 4 * state_stride, ref_top)
        tl.store(slot + 5 * state_stride, ref_others)
        tl.store(slot + 6 * state_stride, ref_gap)
        if (target >= 0) & (target < columns):
            u = tl.load(u_row + head + target).to(tl.float32)
            u = _capped(u, ref_bias_ptr, target, True, logit_scale, cap, HAS_REF_BIAS, HAS_CAP)
            tl.store(slot + 8 * state_stride, u * inverse_temperature)


@no_type_check
@triton.jit
def _gradient_block(
    z_row,
    u_row,
    out_row,
    bias_ptr,
    ref_bias_ptr,
    lane,
    head,
    span,
    target,
    is_unmasked,
    top,
    ref_top,
    constant,
    slope,
    gap_slope,
    pull,
    boost,
    own,
    inverse_temperature,
    logit_scale,
    cap,
    HAS_REFERENCE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    MASKED: tl.constexpr,
):
    column = lane - head
    valid = (lane >= head) & (lane < span)
    if MASKED:
        z = tl.load(z_row + lane, mask=valid, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_row + lane).to(tl.float32)
    if HAS_REFERENCE:
        if MASKED:
            u = tl.load(u_row + lane, mask=valid, other=0.0).to(tl.float32)
        else:
            u = tl.load(u_row + lane).to(tl.float32)
    if IN_PLACE:
        # all threads must have read their part of the block before any of them overwrites it
        tl.debug_barrier()
    capped = _capped(z, bias_ptr, column, valid, logit_scale, cap, HAS_BIAS, HAS_CAP)
    d = capped * inverse_temperature - top
    if MASKED:
        d = tl.where(valid, d, 0.0)
    weight = tl.exp(d)
    factor = constant + slope * d
    if HAS_REFERENCE:
        u = _capped(u, ref_bias_ptr, column, valid, logit_scale, cap, HAS_REF_BIAS, HAS_CAP)
        e = u * inverse_temperature - ref_top
        if MASKED:
            e = tl.where(valid, e, 0.0)
        result = weight * (factor - gap_slope * e) - pull * tl.exp(e)
    else:
        result = weight * factor
    result = tl.where(column == target, result + weight * boost + own, result)
    result *= inverse_temperature * logit_scale
    if HAS_CAP:
        t = capped / cap
        result *= 1.0 - t * t
    # a masked row has gradient 0 even if its logits are NaN
    result = tl.where(is_unmasked, result, 0.0)
    if MASKED:
        tl.store(out_row + lane, result.to(out_row.dtype.element_ty), mask=valid)
    else:
        tl.store(out_row + lane, result.to(out_row.dtype.element_ty))


@no_type_check
@triton.jit(do_not_specialize=["first", "columns"])
def gradient_kernel(
    z_ptr,
    u_ptr,
    stride,
    out_ptr,
    out_stride,
    bias_ptr,
    ref_bias_ptr,
    target_ptr,
    temperature_ptr,
    coefficient_ptr,
    coefficient_stride,
    first,
    columns,
    logit_scale,
    cap,
    HAS_REFERENCE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradient by one row of raw logits, from the row's coefficients (`rows.Coefficients`).

    IN_PLACE: `out` starts at the same byte as `z`, its elements are no wider, and `stride` is a multiple of
    16. A store at element j then only overwrites logits up to j, which have been read.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(target_ptr + row)
    is_unmasked = token != IGNORED
    target = (token - first).to(tl.int32)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
    slot = coefficient_ptr + row
    top = tl.load(slot)
    ref_top = tl.load(slot + coefficient_stride)
    constant = tl.load(slot + 2 * coefficient_stride)
    slope = tl.load(slot + 3 * coefficient_stride)
    gap_slope = tl.load(slot + 4 * coefficient_stride)
    pull = tl.load(slot + 5 * coefficient_stride)
    boost = tl.load(slot + 6 * coefficient_stride)
    own = tl.load(slot + 7 * coefficient_stride)

    start = row * stride // ALIGNMENT * ALIGNMENT
    head = (row * stride - start).to(tl.int32)
    z_row = z_ptr + start
    u_row = u_ptr + start
    out_row = out_ptr + row * out_stride // ALIGNMENT * ALIGNMENT
    span = head + columns
    lanes = tl.arange(0, BLOCK)
    full = span // BLOCK * BLOCK
    begin = 0
    if (head > 0) & (full > 0):
        begin = BLOCK
        _gradient_block(
            z_row, u_row, out_row, bias_ptr, ref_bias_ptr, lanes, head, span, target, is_unmasked,
            top, ref_top, constant, slope, gap_slope, pull, boost, own,
            inverse_temperature, logit_scale, cap,
            HAS_REFERENCE, HAS_CAP, HAS_BIAS, HAS_REF_BIAS, IN_PLACE, True,
        )  # fmt: skip
    for block in range(begin, full, BLOCK):
        _gradient_block(
            z_row, u_row, out_row, bias_ptr, ref_bias_ptr, block + lanes, head, span, target, is_unmasked,
            top, ref_top, constant, slope, gap_slope, pull, boost, own,
            inverse_temperature, logit_scale, cap,
            HAS_REFERENCE, HAS_CAP, HAS_BIAS, HAS_REF_BIAS, IN_PLACE, False,
        )  # fmt: skip
    if full < span:
        _gradient_block(
            z_row, u_row, out_row, bias_ptr, ref_bias_ptr, full + lanes, head, span, target, is_unmasked,
            top, ref_top, constant, slope, gap_slope, pull, boost, own,
            inverse_temperature, logit_scale, cap,
            HAS_REFERENCE, HAS_CAP, HAS_BIAS, HAS_REF_BIAS, IN_PLACE, True,
        )  # fmt: skip
