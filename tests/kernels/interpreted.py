"""The Triton kernels in Triton's interpreter, on CPU tensors: mathematics, masks, tails and strides.

Run by `test_triton_interpreter.py` in a process of its own, because TRITON_INTERPRET=1 has to be set
before the kernels are imported. The interpreter shows no races, and it truncates to bf16 instead of rounding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.kernels.gae import gae, triton_scan
from rlhf.kernels.token_stats import IGNORED, rows, triton_rows
from rlhf.kernels.token_stats.rows import Scaling, Scratch, Tile, Upstream
from rlhf.kernels.token_stats.state import empty_state, finish
from tests.kernels.cases import (
    FIELDS,
    Case,
    assert_close,
    assert_no_worse,
    exact,
    make_case,
    measured,
    measured_from_logits,
)

BLOCK = 128
VOCABULARIES = [1, 2, 97, 127, 128, 129, 256, 300]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a row of a few hundred columns needs several."""
    monkeypatch.setattr(triton_rows, "BLOCK", BLOCK)
    monkeypatch.setattr(triton_rows, "REFERENCE_BLOCK", BLOCK)


def check(case: Case, *, slack: float = 6e-6) -> None:
    truth = exact(case)
    plain = measured(case, backend="reference")
    statistics = {name: truth[name] for name in case.want}
    # logit gradients enter a bf16 matmul in bf16, and the interpreter cuts where it should round
    loose = slack if case.hidden.dtype is torch.float32 else 4 * torch.finfo(case.hidden.dtype).eps
    for memory in ("keep", "recompute"):
        got = measured(case, backend="triton", memory=memory)
        assert_no_worse(got, plain, statistics, slack=slack)
        assert_no_worse(got, plain, truth, slack=loose)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("reference", [False, True])
def test_every_statistic_and_gradient_is_as_near_the_truth_as_plain_pytorch(
    vocabulary: int, reference: bool
) -> None:
    check(make_case(5, 8, vocabulary, dtype=torch.float32, reference=reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vector_temperature", [False, True])
def test_bias_cap_scale_temperature_and_masks_work_together(
    dtype: torch.dtype, softcap: float | None, vector_temperature: bool
) -> None:
    check(
        make_case(
            6,
            8,
            199,
            dtype=dtype,
            bias=True,
            softcap=softcap,
            logit_scale=0.7,
            vector_temperature=vector_temperature,
            masked=0.4,
            seed=5,
        )
    )


@pytest.mark.usefixtures("small_tiles")
def test_many_tiles_give_what_one_gives() -> None:
    check(make_case(5, 8, 70, dtype=torch.float32, bias=True, vector_temperature=True))


@pytest.mark.parametrize("name", FIELDS)
def test_each_statistic_can_be_had_alone(name: str) -> None:
    case = make_case(3, 6, 140, dtype=torch.float32, bias=True)
    check(replace(case, want=(name,), upstream={k: v for k, v in case.upstream.items() if k == name}))


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_constant_added_to_all_logits_costs_no_more_than_in_plain_pytorch(offset: float) -> None:
    case = make_case(4, 8, 140, dtype=torch.float32, bias=True)
    assert case.bias is not None
    check(replace(case, bias=case.bias + offset), slack=6e-5)


@pytest.mark.parametrize("margin", [5.0, 15.0, 25.0])
def test_a_confident_token_keeps_its_small_log_probability(margin: float) -> None:
    logits = torch.zeros(1, 140)
    logits[0, 130] = margin
    got = measured_from_logits(_of_logits(logits, torch.tensor([130])), backend="triton")
    truth = torch.log_softmax(logits.double(), -1)[0, 130:131]
    torch.testing.assert_close(got["logprob"].double(), truth, rtol=1e-5, atol=0.0)


def test_columns_of_minus_infinity_are_never_chosen() -> None:
    case = make_case(3, 5, 300, dtype=torch.float32, bias=True)
    closed = torch.arange(300) % 3 == 1
    closed[:140], closed[290:] = True, True
    assert case.bias is not None
    bias = torch.where(closed, -torch.inf, case.bias)
    case = replace(case, bias=bias, ref_bias=bias.clone(), targets=torch.tensor([200, 201, 203]))
    got = measured(case, backend="triton")
    truth = measured(case.to(torch.float64), backend="reference")
    assert_close(got, truth, relative=1e-5)
    assert (got["d_weight"][closed] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [97, 128, 261])
@pytest.mark.parametrize("reference", [False, True])
def test_logits_of_any_row_length_whose_rows_start_unaligned(
    dtype: torch.dtype, vocabulary: int, reference: bool
) -> None:
    case = _random_logits(5, vocabulary, dtype, reference=reference)
    plain = measured_from_logits(case, backend="tiled")
    got = measured_from_logits(case, backend="triton")
    # the interpreter cuts where a bf16 is stored instead of rounding
    relative = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-5}[dtype]
    truth = {name: value.double() for name, value in plain.items()}
    assert_close(got, truth, relative=relative)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of the masked row
def test_masked_rows_of_logits_pass_nothing_on() -> None:
    case = _random_logits(4, 140, torch.float32, reference=False)
    targets, logits = case.targets.clone(), case.hidden.clone()
    targets[2], logits[2] = IGNORED, torch.nan
    got = measured_from_logits(replace(case, hidden=logits, targets=targets), backend="triton")
    assert (got["d_logits"][2] == 0).all()
    assert got["logprob"][2] == 0
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("columns", [128, 144, 300])
def test_a_gradient_may_take_the_bytes_of_its_logits(columns: int) -> None:
    tile, saved, upstream = _tile(columns)
    coefficients = rows.coefficients(saved, upstream)
    scratch = Scratch(5 * rows.padded(columns), torch.float32, torch.device("cpu"))
    truth = rows.gradient(tile, coefficients, scratch=scratch).clone()
    guarded = torch.full((2 * 64 + 5 * rows.padded(columns),), torch.nan)
    inside = guarded[64:-64].view(5, -1)[:, :columns]
    inside.copy_(tile.logits)
    got = triton_rows.TritonRows().gradient(
        replace(tile, logits=inside), coefficients, scratch=scratch, dtype=torch.bfloat16, overwrite=True
    )
    assert got.data_ptr() == inside.data_ptr()
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), truth, rtol=1e-2, atol=1e-6)
    assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()


@pytest.mark.parametrize("columns", [97, 128, 300])
def test_nothing_is_written_beside_the_gradient(columns: int) -> None:
    tile, saved, upstream = _tile(columns)
    coefficients = rows.coefficients(saved, upstream)
    guarded = torch.full((2 * 64 + 5 * columns,), torch.nan)
    out = guarded[64:-64].view(5, columns)
    logits = tile.logits.contiguous()
    triton_rows.TritonRows().write_gradient(
        replace(tile, logits=logits), logits, logits, coefficients, out, in_place=False
    )
    assert out.isfinite().all()
    assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
def test_the_advantage_scan_is_the_loop(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(count)
    rewards, values, lam = torch.rand(3, count, generator=generator) - 0.5
    sequence = torch.randint(4, (count,), generator=generator).sort().values * 3 - 4
    mask = torch.rand(count, generator=generator) < 0.7
    truth = gae(
        rewards.double(), values.double(), sequence, mask, gamma=0.97, lam=lam.double(), backend="reference"
    )
    monkeypatch.setattr(triton_scan, "BLOCK", 64)
    got = gae(rewards, values, sequence, mask, gamma=0.97, lam=lam, backend="triton")
    torch.testing.assert_close(got.advantages.double(), truth.advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.returns.double(), truth.returns, rtol=1e-5, atol=1e-6)


def _of_logits(logits: Tensor, targets: Tensor) -> Case:
    return Case(logits, torch.empty(0), targets, want=FIELDS[:3])


def _random_logits(tokens: int, vocabulary: int, dtype: torch.dtype, *, reference: bool) -> Case:
    case = make_case(tokens, 4, vocabulary, dtype=torch.float32, vector_temperature=True, reference=reference)
    logits = (case.hidden @ case.weight.T).to(dtype)
    if not reference:
        return replace(case, hidden=logits, ref_hidden=None)
    assert case.ref_hidden is not None and case.ref_weight is not None
    return replace(case, hidden=logits, ref_hidden=(case.ref_hidden @ case.ref_weight.T).to(dtype))


def _tile(columns: int) -> tuple[Tile, Tensor, Upstream]:
    generator = torch.Generator().manual_seed(columns)
    targets = torch.tensor([0, columns - 1, 5, 17, 64])
    logits = 3 * torch.randn(5, columns, generator=generator)
    tile = Tile(logits, 0, targets, Scaling(torch.full((5,), 0.7)))
    state = empty_state(5, dtype=torch.float32, device=torch.device("cpu"))
    scratch = Scratch(5 * rows.padded(columns), torch.float32, torch.device("cpu"))
    rows.fold(state, tile, entropy=True, scratch=scratch)
    _, saved = finish(state, frozenset({"logprob", "entropy"}))
    logprob, entropy = torch.randn(2, 5, generator=generator)
    return tile, saved, Upstream(logprob, entropy, None, None, None)
