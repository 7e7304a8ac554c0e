"""The operators under torch.compile: no graph break, known shapes, no mutated inputs."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from rlhf.kernels.token_stats import logit_stats, token_stats
from rlhf.kernels.token_stats.api import Memory
from tests.kernels.cases import FIELDS, Case, make_case

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own


@pytest.fixture(autouse=True)
def as_in_production() -> Iterator[None]:
    """Starts without compiled code, and without run-time type checks, which would break the graph."""
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def loss_of(
    hidden: Tensor, weight: Tensor, case: Case, *, num_unmasked: int | None, memory: Memory
) -> Tensor:
    stats = token_stats(
        hidden * 2.0,
        weight,
        case.targets,
        temperature=case.temperature,
        ref_hidden=case.ref_hidden,
        ref_weight=case.ref_weight,
        want=FIELDS,
        num_unmasked=num_unmasked,
        memory=memory,
        backend="tiled",
    )
    kept = [value for value in stats if value is not None]
    assert len(kept) == len(FIELDS)
    return torch.stack(kept).sin().sum()


@pytest.mark.parametrize("memory", ["auto", "recompute"])
@pytest.mark.parametrize("counted", [False, True])
def test_it_compiles_into_one_graph_with_the_same_gradients(memory: Memory, counted: bool) -> None:
    case = make_case(7, 5, 40, masked=0.3, seed=3, vector_temperature=True)
    number = int((case.targets != -100).sum()) if counted else None
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_of, compiled):
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        loss = function(hidden, weight, case, num_unmasked=number, memory=memory)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(plain, traced, rtol=1e-12, atol=1e-12)


def test_logits_compile_into_one_graph() -> None:
    logits = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 29])

    def loss(logits: Tensor) -> Tensor:
        stats = logit_stats(logits.sin(), targets, backend="tiled")
        assert stats.logprob is not None and stats.entropy is not None
        return (stats.logprob * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = (torch.autograd.grad(f(logits), logits)[0] for f in (loss, compiled))
    torch.testing.assert_close(plain, traced)


@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_keep_their_contract(keep: bool) -> None:
    case = make_case(5, 4, 32, masked=0.3, dtype=torch.float32)
    number = int((case.targets != -100).sum())
    arguments = (
        case.hidden.requires_grad_(),
        case.weight.requires_grad_(),
        None,
        case.targets,
        None,
        case.ref_hidden,
        case.ref_weight,
        None,
        0.8,
        1.0,
        None,
        ",".join(FIELDS),
        keep,
        number,
        1 << 20,
        "",
        0,
        "tiled",
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.rlhf.token_stats.default, arguments, test_utils=checks)
