"""Log-probability and entropy with gradients: time, peak memory and error of this project and of others.

    python benchmarks/token_stats.py                                  # every shape of this device
    python benchmarks/token_stats.py --shape 512,576,49152 --dtype bf16 --out results.json

Every contender gets the same hidden states `[N, H]`, head `[V, H]` and targets. On a CPU all work from
fp32 logits: 16-bit inputs are converted first for those that would round their logits (TRL's is also run as
it is). On a GPU all run as they are, and the errors show which of them round. Timed is one forward
and one backward for given gradients of both statistics. Before anything is printed, ours are checked
against float64, block by block of tokens.

Other projects are measured if they can be imported; one that cannot is listed with the reason. They are
installed in a folder of their own, without their dependencies:

    pip install --no-deps --target PEERS trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1
    PYTHONPATH=PEERS python benchmarks/token_stats.py

The bare GEMMs are the matmuls alone into buffers that exist: 2 N H V FLOP for the logits, once or (with
recomputation) twice, and as much for each of the two gradients; the share compares the fastest runs of
both, times are medians. A CPU's peak memory is the growth of the process's resident memory, a GPU's that of
its allocator; both without the inputs and their gradients.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.kernels.token_stats import token_stats
from rlhf.kernels.token_stats.api import Memory

Statistics = tuple[Tensor, Tensor | None]
Method = Callable[[Tensor, Tensor, Tensor], Statistics]
Results = dict[str, Any]
SHAPES = {
    "cpu": [(512, 576, 49152), (512, 896, 151936)],
    "cuda": [(16384, 4096, 128256), (8192, 2048, 151936), (32768, 896, 151936), (8192, 2048, 151665)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


# ---- contenders


def tandem(memory: Memory) -> Callable[[str], Method]:
    """The implementation of this project, in one of its memory modes."""

    def method(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        stats = token_stats(hidden, weight, targets, memory=memory, num_unmasked=len(targets))
        assert stats.logprob is not None
        return stats.logprob, stats.entropy

    return lambda device: method


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
    """The obvious implementation, with all logits in memory."""
    logprobs = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def compiled_chunks(device: str) -> Method:
    """torch.compile over blocks of tokens, recomputed in backward."""
    compiled = torch.compile(eager, dynamic=False)
    size = 128 if device == "cpu" else 1024

    def method(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        blocks = zip(hidden.split(size), targets.split(size), strict=True)
        parts = [checkpoint(compiled, h, weight, t, use_reentrant=False) for h, t in blocks]
        logprob, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprob, entropy

    return widened(method, device)


def widened(method: Method, device: str) -> Method:
    """On a CPU, a method on inputs converted to fp32, if it would round logits to the inputs' precision."""
    if device == "cuda":
        return method
    return lambda hidden, weight, targets: method(hidden.float(), weight.float(), targets)


def trl(device: str) -> Method:
    """TRL 1.16's fused head, with the tile width that its trainers use."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    options = (1.0, 32768, None, 1.0, ("entropy",))
    return lambda hidden, weight, targets: function.apply(hidden, weight, None, targets, *options)[:2]


def liger(device: str) -> Method:
    """Liger 0.8.5's fused linear PPO, in the form that runs without the CuTe DSL."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def method(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        nll, entropy = module._FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, True)
        return -nll, entropy

    return widened(method, device)


def cut_cross_entropy(device: str) -> Method:
    """Apple's, without entropy. Its kernel needs a GPU; elsewhere its torch.compile form runs."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    options = {"reduction": "none", "impl": "cce" if device == "cuda" else "torch_compile"}

    def method(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        return -function(hidden, weight, targets, **options), None

    return widened(method, device)


def verl_torch(device: str) -> Method:
    """verl 0.9.1's default, in plain PyTorch by blocks of 512 tokens."""
    function = verl_module("experimental.torch_functional").FusedLinearForPPOFunction
    return widened(lambda hidden, weight, targets: function.apply(hidden, weight, targets, 1.0, 512), device)


def verl_triton(device: str) -> Method:
    """verl 0.9.1's Triton kernels."""
    if device != "cuda":
        raise RuntimeError("needs a CUDA device")
    function = verl_module("kernel.linear_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight, targets, 1.0, "none")


def verl_module(name: str) -> Any:
    """Imports one file of verl alone: its package would import a cluster scheduler, which is not needed."""
    folders = [Path(p) / "verl" for p in sys.path if (Path(p) / "verl/version").exists()]
    if not folders:
        raise ModuleNotFoundError("No module named 'verl'")
    for package in ("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental"):
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(folders[0].joinpath(*package.split(".")[1:]))]
    device: Any = sys.modules.setdefault("verl.utils.device", types.ModuleType("verl.utils.device"))
    device.get_device_capability, device.get_torch_device = (
        torch.cuda.get_device_capability,
        lambda: torch.cuda,
    )
    device.get_device_name, device.is_cuda_available = lambda: "cuda", torch.cuda.is_available()
    return importlib.import_module(f"verl.utils.{name}")


# how to make it (which may fail, and says why), and its matmuls' FLOP in N H V
CONTENDERS: dict[str, tuple[Callable[[str], Method], int]] = {
    "tandem": (tandem("auto"), 6),
    "tandem, recompute": (tandem("recompute"), 8),
    "eager": (lambda device: widened(eager, device), 6),
    "torch.compile, chunked": (compiled_chunks, 8),
    "TRL 1.16": (lambda device: widened(trl(device), device), 8),
    "Liger 0.8.5": (liger, 8),
    "verl 0.9.1 torch": (verl_torch, 8),
    "verl 0.9.1 Triton": (verl_triton, 8),
    "CCE 25.1.1 (no entropy)": (cut_cross_entropy, 8),
}
AS_SHIPPED = "TRL 1.16 as shipped (bf16 logits)"


# ---- measuring


@dataclass(frozen=True)
class Problem:
    """One shape: inputs that need gradients, targets sampled from the policy, upstream gradients."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: tuple[Tensor, Tensor]
    device: str

    def wait(self) -> None:
        """Waits until a GPU has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Problem:
    """Hidden states that point at one token each, as a trained model's do: p(sampled) about 0.75."""
    tokens, dim, vocabulary = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(vocabulary, dim) / dim**0.5).to(dtype)
    aimed = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    top = 10 + 8 * torch.rand(tokens, 1, generator=generator, device=device)
    hidden = (top * weight[aimed].float() + normal(tokens, dim)).to(dtype)
    targets = torch.cat(
        [
            (h.float() @ weight.float().T).softmax(-1).multinomial(1, generator=generator)[:, 0]
            for h in hidden.split(256)
        ]
    )
    upstream = (normal(tokens) / tokens, normal(tokens) / tokens)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), targets, upstream, device)


def run(method: Method, problem: Problem) -> tuple[dict[str, Tensor], float, float]:
    """All results of one forward and backward, and the seconds of forward and of both."""
    problem.wait()
    start = time.perf_counter()
    logprob, entropy = method(problem.hidden, problem.weight, problem.targets)
    problem.wait()
    middle = time.perf_counter()
    loss = (problem.upstream[0] * logprob).sum()
    if entropy is not None:
        loss = loss + (problem.upstream[1] * entropy).sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    problem.wait()
    end = time.perf_counter()
    found = {"logprob": logprob.detach(), "d_hidden": d_hidden, "d_weight": d_weight}
    if entropy is not None:
        found["entropy"] = entropy.detach()
    return found, middle - start, end - start


def exact(problem: Problem, *, entropy: bool) -> dict[str, Tensor]:
    """The statistics and gradients by their definition, in float64, 128 tokens at a time."""
    weight = problem.weight.detach().double().requires_grad_()
    total = torch.zeros_like(weight)
    parts: dict[str, list[Tensor]] = {"logprob": [], "entropy": [], "d_hidden": []}
    for rows in torch.arange(len(problem.targets), device=problem.targets.device).split(128):
        hidden = problem.hidden.detach()[rows].double().requires_grad_()
        logprobs = torch.log_softmax(hidden @ weight.T, -1)
        logprob = logprobs.gather(1, problem.targets[rows, None])[:, 0]
        uncertainty = -(logprobs.exp() * logprobs).sum(-1)
        loss = (problem.upstream[0][rows] * logprob).sum()
        if entropy:
            loss = loss + (problem.upstream[1][rows] * uncertainty).sum()
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        total += d_weight
        for name, value in (("logprob", logprob), ("entropy", uncertainty), ("d_hidden", d_hidden)):
            parts[name].append(value.detach())
    return {name: torch.cat(values) for name, values in parts.items()} | {"d_weight": total}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of each statistic, and relative error (Frobenius norm) of each gradient."""
    result = {}
    for name, value in found.items():
        if name.startswith("d_"):
            rows = list(zip(value.split(4096), truth[name].split(4096), strict=True))
            square = sum((a.double() - b).square().sum().item() for a, b in rows)
            result[name] = (square / sum(b.square().sum().item() for _, b in rows)) ** 0.5
        else:
            result[name] = (value.double() - truth[name]).abs().max().item()
    return result


def measured(method: Method, problem: Problem) -> tuple[float, float, float]:
    """Seconds of forward and of both, and the most memory taken at once beyond inputs and their gradients."""
    gradients = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))
    gc.collect()
    if problem.device == "cuda":
        problem.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, forward, total = run(method, problem)
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        _, forward, total = run(method, problem)
        peak = resident("VmHWM")
    return forward, total, (peak - before - gradients) / MIB


def resident(name: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def bare_gemms(problem: Problem, repeats: int) -> float:
    """Fewest seconds of 2 N H V FLOP: a third of the time of three matmuls over slices of the vocabulary."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    if problem.device == "cpu":
        hidden, weight = hidden.float(), weight.float()
    width = 4096 if problem.device == "cpu" else 16384
    logits = torch.empty(len(hidden), width, device=hidden.device)
    gradient = logits.to(hidden.dtype).normal_()
    d_hidden = torch.zeros(hidden.shape, device=hidden.device)
    d_weight = torch.empty_like(weight)

    def once() -> None:
        for part, out in zip(weight.split(width), d_weight.split(width), strict=True):
            columns = len(part)
            if hidden.dtype is torch.float32:
                torch.mm(hidden, part.T, out=logits[:, :columns])
                d_hidden.addmm_(gradient[:, :columns], part)
            else:
                torch.mm(hidden, part.T, out_dtype=torch.float32, out=logits[:, :columns])
                torch.addmm(d_hidden, gradient[:, :columns], part, out_dtype=torch.float32, out=d_hidden)
            torch.mm(gradient[:, :columns].T, hidden, out=out)

    times = []
    for _ in range(repeats + 1):
        problem.wait()
        start = time.perf_counter()
        once()
        problem.wait()
        times.append(time.perf_counter() - start)
    return min(times[1:]) / 3


def measure(
    problem: Problem, repeats: int, without: list[str], *, as_shipped: bool
) -> tuple[list[Results], dict[str, str]]:
    """The rows of all contenders, and why some are missing. They take turns; each round starts one later."""
    contenders = CONTENDERS | ({AS_SHIPPED: (trl, 8)} if as_shipped else {})
    missing = {name: "left out" for name in contenders if any(name.startswith(start) for start in without)}
    contenders = {name: value for name, value in contenders.items() if name not in missing}
    methods: dict[str, Method] = {}
    found: dict[str, dict[str, float]] = {}
    truths = {True: exact(problem, entropy=True)}
    for name, (make, _) in contenders.items():
        try:
            method = make(problem.device)
            results, *_ = run(method, problem)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        methods[name] = method
        if "entropy" not in results and False not in truths:
            truths[False] = exact(problem, entropy=False)
        found[name] = errors(results, truths["entropy" in results])
    del truths
    check(found, problem)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    for turn in range(repeats):
        names = list(methods)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(measured(methods[name], problem))
    unit = bare_gemms(problem, repeats)
    rows: list[Results] = []
    for name, taken in times.items():
        forwards, totals = ([1e3 * t for t in column] for column in list(zip(*taken, strict=True))[:2])
        total = statistics.median(totals)
        rows.append(
            {
                "name": name,
                "forward_ms": statistics.median(forwards),
                "total_ms": total,
                "spread_ms": [min(totals), max(totals)],
                "peak_mib": statistics.median(peak for *_, peak in taken),
                "share_of_bare": contenders[name][1] / 2 * unit * 1e3 / min(totals),
                "errors": found[name],
            }
        )
    return rows, missing


def check(found: dict[str, dict[str, float]], problem: Problem) -> None:
    """Stops the benchmark if the results of this project are wrong."""
    rounding = 2e-6 if problem.hidden.dtype is torch.float32 else 4e-3
    for name in (n for n in found if n.startswith("tandem")):
        for key, error in found[name].items():
            limit = rounding if key.startswith("d_") else 2e-5
            if not error <= limit:
                raise SystemExit(f"{name}: {key} is off by {error:.2e}, more than {limit:.0e}")


# ---- the command


def verdict(rows: list[Results], device: str, shape: tuple[int, ...]) -> dict[str, bool]:
    """The claims of this project, and whether the results support them, among contenders of equal work."""
    by_name = {row["name"]: row for row in rows if row["name"] != AS_SHIPPED and "entropy" in row["errors"]}
    ours, again = by_name.pop("tandem"), by_name.pop("tandem, recompute")
    promises = {f"faster than {n}": ours["total_ms"] < row["total_ms"] for n, row in by_name.items()}
    if device == "cpu" and "eager" in by_name:
        promises["at most half of eager's peak"] = ours["peak_mib"] <= by_name["eager"]["peak_mib"] / 2
    if device == "cuda" and shape == SHAPES["cuda"][0]:
        promises["80% of the bare GEMMs, with recomputation"] = again["share_of_bare"] >= 0.8
        promises["within 2 GiB, with recomputation"] = again["peak_mib"] <= 2048
    return promises


def report(rows: list[Results], missing: dict[str, str], promises: dict[str, bool]) -> None:
    """Prints the table of results."""
    titles = f"{'forward':>9}{'total ms':>9}{'spread':>14}{'MiB':>7}{'bare':>6}"
    print(f"{'':36}{titles}  error: statistics, gradients")
    for row in rows:
        spread = "{:.0f}..{:.0f}".format(*row["spread_ms"])
        of_gradients, of_stats = (
            max(v for k, v in row["errors"].items() if k.startswith("d_") is gradient)
            for gradient in (True, False)
        )
        print(
            f"{row['name']:36}{row['forward_ms']:>9.1f}{row['total_ms']:>9.1f}{spread:>14}{row['peak_mib']:>7.0f}"
            f"{row['share_of_bare']:>6.0%}  {of_stats:.1e}, {of_gradients:.1e}"
        )
    for name, reason in missing.items():
        print(f"{name:36}not measured: {reason}")
    for promise, holds in promises.items():
        print(f"{'yes' if holds else 'NO':>4}  {promise}")


def main() -> None:
    """Measures the shapes that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="N,H,V; may be repeated")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--without", action="append", default=[], help="how a contender's name starts")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: 7 on a CPU, 20 on a GPU)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args()
    asked = [(int(n), int(h), int(v)) for n, h, v in (s.split(",") for s in given.shape or ())]
    shapes = asked or SHAPES[given.device]
    repeats = given.repeats or (7 if given.device == "cpu" else 20)
    torch.set_float32_matmul_precision("highest")
    results = []
    for shape in shapes:
        for name in given.dtype or (["fp32", "bf16"] if given.device == "cpu" else ["bf16"]):
            print(f"\nN, H, V = {shape}, {name} inputs, {given.device}", flush=True)
            problem = make_problem(shape, DTYPES[name], given.device)
            rows, missing = measure(
                problem, repeats, given.without, as_shipped=(given.device, name) == ("cpu", "bf16")
            )
            promises = verdict(rows, given.device, shape)
            report(rows, missing, promises)
            results.append(
                {"shape": shape, "dtype": name, "rows": rows, "missing": missing, "verdict": promises}
            )
    if given.out:
        cpu = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        machine = {
            "device": torch.cuda.get_device_name()
            if given.device == "cuda"
            else cpu[0].split(":")[1].strip(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        command = " ".join(["python benchmarks/token_stats.py", *sys.argv[1:]])
        report_of_all = {"command": command, "machine": machine, "repeats": repeats, "results": results}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report_of_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
