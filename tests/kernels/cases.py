"""Random cases for `token_stats`, their exact results in float64, and the criteria for a backend's errors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlhf.kernels.backend import Backend
from rlhf.kernels.token_stats import IGNORED, logit_stats, token_stats
from rlhf.kernels.token_stats.api import Memory

FIELDS = ("logprob", "entropy", "logsumexp", "kl", "kl_reverse", "ref_logprob")
DIFFERENTIABLE = FIELDS[:5]


class Options(TypedDict, total=False):
    """Further arguments of `token_stats`, beside a case and a backend."""

    memory: Memory
    workspace_bytes: int
    group: ProcessGroup | None
    vocab_start: int
    num_unmasked: int | None


@dataclass(frozen=True)
class Case:
    """Inputs of one call. `want`: the statistics computed; `upstream`: the loss's gradients by them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    want: tuple[str, ...] = FIELDS
    upstream: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with its numbers rounded to another precision."""
        names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if v is None else v.to(dtype) for k, v in values.items()})


def make_case(
    tokens: int,
    dim: int,
    vocabulary: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    vector_temperature: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reference: bool = True,
    masked: float = 0.0,
    upstream: tuple[str, ...] = DIFFERENTIABLE,
) -> Case:
    """A random case whose numbers are exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if tokens > 1:
        targets[0], targets[1] = 0, vocabulary - 1
    targets[torch.rand(tokens, generator=generator) < masked] = IGNORED
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weights = {
        name: torch.randn(tokens, generator=generator, dtype=torch.float64).to(wide) for name in upstream
    }
    has = {True: normal, False: lambda *_: None}
    return Case(
        normal(tokens, dim),
        normal(vocabulary, dim),
        targets,
        bias=has[bias](vocabulary),
        temperature=0.5 + torch.rand(tokens, generator=generator) if vector_temperature else 0.8,
        softcap=softcap,
        logit_scale=logit_scale,
        ref_hidden=has[reference](tokens, dim + 3),
        ref_weight=has[reference](vocabulary, dim + 3),
        ref_bias=has[bias and reference](vocabulary),
        want=FIELDS if reference else FIELDS[:3],
        upstream={k: v for k, v in weights.items() if reference or k in FIELDS[:3]},
    )


def exact(case: Case) -> dict[str, Tensor]:
    """Every statistic and gradient in float64, by its definition and autograd."""
    case = case.to(torch.float64)
    inputs = _leaves(case)
    kept = case.targets != IGNORED
    divisor = case.temperature
    if isinstance(divisor, Tensor):
        divisor = divisor.double()[kept, None]

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = hidden[kept] @ weight.T
        z = case.logit_scale * (z if bias is None else z + bias)
        z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
        return z / divisor

    a = logprobs(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    lp = a.log_softmax(-1)
    y = case.targets[kept, None]
    stats = {
        "logprob": lp.gather(1, y)[:, 0],
        "entropy": -_weighted(lp.exp(), lp),
        "logsumexp": a.logsumexp(-1),
    }
    if case.ref_hidden is not None:
        shared = (case.weight, case.bias)
        head = shared if case.ref_weight is None else (case.ref_weight, case.ref_bias)
        lq = logprobs(case.ref_hidden, *head).log_softmax(-1)
        stats["kl"] = _weighted(lp.exp(), lp - lq)
        stats["kl_reverse"] = _weighted(lq.exp(), lq - lp)
        stats["ref_logprob"] = lq.gather(1, y)[:, 0]
    stats = {k: torch.zeros(len(kept), dtype=torch.float64).masked_scatter(kept, v) for k, v in stats.items()}
    return _with_gradients({k: stats[k] for k in case.want}, inputs, case)


def measured(case: Case, *, backend: Backend, **options: Unpack[Options]) -> dict[str, Tensor]:
    """Every statistic and gradient as computed by `token_stats`."""
    inputs = _leaves(case)
    stats = token_stats(
        inputs["hidden"],
        inputs["weight"],
        case.targets,
        bias=inputs.get("bias"),
        temperature=case.temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        ref_hidden=case.ref_hidden,
        ref_weight=case.ref_weight,
        ref_bias=case.ref_bias,
        want=case.want,
        backend=backend,
        **options,
    )
    present = {k: v for k, v in zip(FIELDS, stats, strict=True) if v is not None}
    assert set(present) == set(case.want)
    return _with_gradients(present, inputs, case)


def plain(case: Case) -> dict[str, Tensor]:
    """Every statistic and gradient by plain PyTorch, with backward matmuls in the inputs' precision.

    The case has no bias. The logits of 16-bit inputs are computed in fp32, as `token_stats` does.
    """
    assert case.bias is None and case.ref_hidden is not None and case.ref_weight is not None
    inputs = _leaves(case)
    low = (inputs["hidden"] @ inputs["weight"].T).float()
    wide = inputs["hidden"].detach().float() @ inputs["weight"].detach().float().T
    stats = logit_stats(
        low + (wide - low).detach(),
        case.targets,
        temperature=case.temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        ref_logits=case.ref_hidden.float() @ case.ref_weight.float().T,
        want=case.want,
        backend="reference",
    )
    present = {k: v for k, v in zip(FIELDS, stats, strict=True) if v is not None}
    return _with_gradients(present, inputs, case)


def assert_close(
    got: dict[str, Tensor], truth: dict[str, Tensor], *, relative: float, absolute: float = 0.0
) -> None:
    """Asserts that every tensor agrees within `relative` times its largest number."""
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        error = (got[name].double() - value).abs().amax().item() if value.numel() else 0.0
        scale = value.abs().amax().item() if value.numel() else 0.0
        assert error <= relative * max(1.0, scale) + absolute, f"{name}: {error:.2e} of {scale:.2e}"


def assert_no_worse(
    fast: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], *, slack: float = 1e-6
) -> None:
    """Asserts |fast - truth| <= |plain - truth| + slack, with the largest error of each tensor."""
    for name, value in truth.items():
        scale = max(1.0, value.abs().amax().item()) if value.numel() else 1.0
        ours, theirs = (
            (x[name].double() - value).abs().amax().item() if value.numel() else 0.0 for x in (fast, plain)
        )
        assert ours <= theirs + slack * scale, f"{name}: {ours:.2e}, plain PyTorch {theirs:.2e}"


def _leaves(case: Case) -> dict[str, Tensor]:
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {k: v.detach().clone().requires_grad_() for k, v in tensors.items() if v is not None}


def _weighted(probs: Tensor, values: Tensor) -> Tensor:
    # 0 log 0 = 0, with derivative 0
    return (probs * torch.where(probs == 0, 0.0, values)).sum(-1)


def _with_gradients(stats: dict[str, Tensor], inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    terms = [(weight * stats[name]).sum() for name, weight in case.upstream.items() if name in stats]
    result = {name: value.detach() for name, value in stats.items()}
    if terms:
        gradients = torch.autograd.grad(torch.stack(terms).sum(), list(inputs.values()))
        result |= {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return result


def measured_from_logits(case: Case, *, backend: Backend) -> dict[str, Tensor]:
    """As `measured`, by `logit_stats` for a case whose `hidden` and `ref_hidden` are logits."""
    logits = case.hidden.detach().clone().requires_grad_()
    stats = logit_stats(
        logits,
        case.targets,
        temperature=case.temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        ref_logits=case.ref_hidden,
        want=case.want,
        backend=backend,
    )
    present = {k: v for k, v in zip(FIELDS, stats, strict=True) if v is not None}
    return _with_gradients(present, {"logits": logits}, case)
