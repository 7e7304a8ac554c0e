"""Every kind of model that the installed transformers knows, tiny and random, through learner and engine.

    python -m benchmarks.models [KIND ...] --out benchmarks/results/models.json --page docs/models.md

For each kind, log-probs and gradients of several groups in one microbatch are compared with the model's own
forward over one sequence at a time, in float32: with and without activation checkpointing, with and without
an adapter. Then a few tokens are decoded by the engine that the run would take, and compared likewise.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.model_kinds import (
    VOCABULARY,
    auto_class,
    language_models,
    seeing_models,
    small_config,
    small_model,
)
from rlhf.config.model import LoraConfig, ModelConfig
from rlhf.models.loading import load_policy
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.models.vision.text_alone import FAMILIES, text_alone
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.types import Prompt

WINDOWS = (16, 300)
"""Sliding windows that a kind with windows is tried with."""
PROMPTS = (1, 5, 17, 420)
"""Tokens of the prompts of one microbatch."""
COMPLETIONS = ((3, 9), (6,), (7, 1, 4), (2, 8))
CPU = torch.device("cpu")
HEAD = """# Models

Made by `make models` with transformers {} and torch {}, in float32 on a CPU: a tiny random model
of every kind that transformers has. Its log-probs and gradients are compared with its own forward over one
sequence at a time (prompts of 1 to 420 tokens in one microbatch), with and without activation checkpointing
and an adapter; then the engine that a run would take decodes a few tokens. {} kinds work. Kinds with sliding
windows were tried with windows of {} tokens; a window that no sequence of a run reaches is none:
prompts are then shared, and `native` decodes.

The largest error is that of a log-prob (nats), of the gradient (share of its norm) or of a decoded log-prob.
Images: `yes`, or `text alone`, where text teaches the language model of a kind that sees.

"""


class EngineRefusal(ValueError):
    """No engine in this process decodes the model."""


@dataclass
class Row:
    """What came out for one kind."""

    kind: str
    window: int | None = None
    layout: str = ""
    reason: str = ""
    """Why prompts are not shared."""
    engine: str = ""
    images: str = ""
    adapted: str = ""
    """Linear layers that an adapter takes by default."""
    frozen: str = ""
    logprob: float = 0.0
    """Largest error of a log-prob, nats."""
    gradient: float = 0.0
    """Norm of the error of the gradient, as a share of the gradient's norm."""
    decoding: float = 0.0
    checkpointing: str = ""
    """Why activation checkpointing is refused."""
    untried: str = ""
    """Why no tiny model could be made, or transformers itself cannot run it."""
    refused: str = ""
    failed: str = ""
    """The last lines of a traceback: a fault."""


def groups(limit: int) -> Packed:
    """Groups of random tokens, with prompts of 1 to 420 tokens or as many as the model has positions for."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (n,), generator=generator)

    prompts = [tokens(min(n, limit - 10)) for n in PROMPTS]
    return pack(prompts, [[tokens(n) for n in sizes] for sizes in COMPLETIONS])


def sequences(packed: Packed) -> Iterator[tuple[Tensor, Tensor]]:
    for span in packed.spans:
        prompt = packed.token_ids[span.start : span.start + span.prompt]
        rest = packed.token_ids[span.start + span.prompt : span.end]
        yield from ((prompt, completion) for completion in rest.split(list(span.completions)))


def plain(model: Any, packed: Packed) -> Tensor:
    """Log-probs `[N]` by the model's own forward over one sequence at a time."""
    parts: list[Tensor] = []
    for prompt, completion in sequences(packed):
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits
        chosen = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        parts.append(chosen.gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)


def packed_logprobs(policy: Policy, packed: Packed) -> Tensor:
    found = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert found is not None
    return found


def gradient(model: Any, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logprobs * torch.linspace(-1.0, 1.0, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients, as a share of the norm of the second."""
    zero = torch.zeros(())
    square = sum(float((got.get(n, zero) - want.get(n, zero)).square().sum()) for n in {*got, *want})
    return (square / sum(float(g.square().sum()) for g in want.values())) ** 0.5


def windowed(kind: str, window: int) -> dict[str, Any]:
    """Settings that give some layers of a kind a sliding window."""
    switch = "use_sliding_window" in small_config(kind).to_dict()
    return {"sliding_window": window} | ({"use_sliding_window": True} if switch else {})


def survey(kind: str, window: int | None = None) -> Row:
    """Tries one kind, with a sliding window of that size if one is given."""
    row = Row(kind, window)
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = small_config(kind, **({} if window is None else windowed(kind, window)))
            model = small_model(config)
            model(input_ids=torch.arange(3, 20)[None], use_cache=False)
            model.save_pretrained(folder)
        except Exception as error:
            row.untried = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return row
        try:
            _measure(row, folder)
        except (ModelError, EngineRefusal) as refusal:
            row.refused = _without(folder, str(refusal))
        except Exception as error:
            last = [line.strip() for line in traceback.format_exc().splitlines() if "File" in line][-4:]
            row.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} | {' | '.join(last)}"
    return row


def _without(folder: str, text: str) -> str:
    return text.replace(f"{folder}: ", "").replace(folder, "the model")


def _measure(row: Row, folder: str) -> None:
    section = ModelConfig.model_validate({"path": folder})
    with _Reasons() as reasons:
        policy = load_policy(section, folder, CPU)
    row.layout, row.reason = policy.layout, _without(folder, reasons.last)
    row.images = "text alone" if text_alone(policy.model.config) else ""
    kind = auto_class(transformers.AutoConfig.from_pretrained(folder))
    truth = kind.from_pretrained(folder, attn_implementation="eager").eval()
    settings = truth.config.get_text_config().to_dict()
    packed = groups(min(512, settings.get("max_position_embeddings") or 512))
    expected = plain(truth, packed)
    everything = gradient(truth, expected)
    learns = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    want = {name: found for name, found in everything.items() if name in learns}
    for checkpointing in (False, True):
        if checkpointing:
            try:
                policy.checkpoint_activations()
            except ModelError as refusal:
                row.checkpointing = str(refusal)
        got = packed_logprobs(policy, packed)
        row.logprob = max(row.logprob, float((got - expected).abs().max().detach()))
        row.gradient = max(row.gradient, difference(gradient(policy.model, got), want))
    _decode(row, policy)
    try:
        _adapt(row, section, folder, packed)
    except ModelError as refusal:
        row.adapted = f"refused: {refusal}"


def _decode(row: Row, policy: Policy) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine = make_engine("native", policy.model, eos_token_ids=(), max_tokens=64)
        except ValueError as error:
            raise EngineRefusal(str(error)) from error
    row.engine = "native" if isinstance(engine, NativeEngine) else "hf"
    generator = torch.Generator().manual_seed(2)
    requests = [
        RolloutRequest(
            Prompt(f"p{n}", tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()), ""),
            SamplingParams(n=2, max_tokens=12, seed=n),
        )
        for n in (3, 40)
    ]
    row.decoding = max(logprob_errors(policy.model, requests, generate(engine, requests)))


def _adapt(row: Row, section: ModelConfig, folder: str, packed: Packed) -> None:
    """Compares log-probs under an adapter with those of the merged model."""
    logging.disable(logging.WARNING)
    policy = load_policy(section, folder, CPU)
    logging.disable(logging.NOTSET)
    with _Reasons() as reasons:
        policy.add_adapter(LoraConfig(rank=2, alpha=4.0), seed=0)
    row.frozen = _without(folder, reasons.last)
    assert policy.adapter is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    policy.merge()
    adapted = {
        n.split(".lora_")[0].rpartition(".")[2] for n, _ in policy.model.named_parameters() if ".lora_" in n
    }
    row.adapted = " ".join(sorted(adapted))
    merged = policy.rollout_model
    merged.set_attn_implementation("eager")
    with torch.no_grad():
        expected, got = plain(merged, packed), packed_logprobs(policy, packed)
    row.logprob = max(row.logprob, float((got - expected).abs().max()))


class _Reasons(logging.Handler):
    """Keeps the last warning of our loggers."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()

    def __enter__(self) -> _Reasons:
        logging.getLogger("rlhf").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("rlhf").removeHandler(self)


def rows(kinds: Sequence[str]) -> Iterator[Row]:
    """One row for each kind, and one for each of `WINDOWS` where the kind has sliding windows."""
    for kind in kinds:
        try:
            slides = small_config(kind).to_dict().get("sliding_window") is not None
        except Exception:
            slides = False
        for window in WINDOWS if slides else (None,):
            yield survey(kind, window)


def render(found: Sequence[Row]) -> str:
    """docs/models.md."""
    kinds: dict[str, list[Row]] = {}
    for row in found:
        kinds.setdefault(row.kind, []).append(row)
    works = {
        k: rows for k, rows in kinds.items() if not any(r.untried or r.refused or r.failed for r in rows)
    }
    versions = transformers.__version__, torch.__version__
    head = HEAD.format(*versions, len(works), " and ".join(map(str, WINDOWS)))
    lines = [
        *head.splitlines(),
        "| kind | layout | engine | images | adapter beside | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for kind, rows in works.items():
        layout, engine = (", ".join(dict.fromkeys(getattr(r, a) for r in rows)) for a in ("layout", "engine"))
        error = max(max(r.logprob, r.gradient, r.decoding) for r in rows)
        adapted = "none" if rows[0].adapted.startswith("refused") else rows[0].adapted
        images = "yes" if kind in FAMILIES else rows[0].images
        lines.append(f"| {kind} | {layout} | {engine} | {images} | {adapted} | {error:.0e} |")
    lines += ["", "Refused, when the model is loaded:", "", "| kind | reason |", "|---|---|"]
    lines += [
        f"| {k} | {next(r.refused for r in rows if r.refused)} |"
        for k, rows in kinds.items()
        if any(r.refused for r in rows)
    ]
    untried = [k for k, rows in kinds.items() if any(r.untried for r in rows)]
    lines += ["", f"Not tried, because no tiny model of them could be made: {', '.join(untried)}."]
    failed = [f"{k}: {rows[0].failed}" for k, rows in kinds.items() if any(r.failed for r in rows)]
    lines += ["", "Faults:", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("rlhf").propagate = False
    found: list[Row] = []
    kinds = arguments.kinds or [*language_models(), *seeing_models()]
    for row in rows(kinds):
        found.append(row)
        sys.stdout.write(json.dumps({k: v for k, v in asdict(row).items() if v}) + "\n")
        sys.stdout.flush()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if arguments.page is not None:
        arguments.page.write_text(render(found))


if __name__ == "__main__":
    main()
