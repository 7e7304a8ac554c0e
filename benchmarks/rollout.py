"""Tokens a second of each rollout engine: 8 prompts, groups of 8, at most 64 tokens, end of sequence.

    generate      `model.generate` at its best for this work: one left-padded batch of every prompt 8 times,
                  sdpa, no truncation of the distribution, no log-probs asked for
    native        `rlhf.rollout.native.engine.NativeEngine`, log-probs included, as they are in the others
    hf            `rlhf.rollout.hf.HFEngine`: one prompt at a time
    vllm          vLLM in this process (`make setup EXTRAS=vllm`)
    vllm-server   one server of it on loopback

All compute in bfloat16, one after the other in each repeat (the order alternates), with a new seed; those
that are idle stay loaded. `threads` of the result holds for all of them. A completion counts its
tokens up to and including the end of sequence. Prompts have 46 tokens (a question) or 446 (the question
after an irrelevant text). Before anything is timed, log-probs of the native engine are compared with
forwards over the whole sequences: within 1e-4 in float32, in bfloat16 within 0.1 in the mean. It packs its
weights anew in every repeat, as it does after every update; those of vLLM are given the weights once, and
compared.

An interrupted benchmark continues where it stopped. `load` of a repeat is the load average of the
machine, with all other processes.

Run: `python -m benchmarks.rollout --model MODEL_FOLDER --out benchmarks/results/MACHINE/rollout.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.runs import machine
from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.types import Prompt

PROMPTS, GROUP, MAX_TOKENS = 8, 8, 64
ENGINES = ("generate", "native", "hf", "vllm", "vllm-server")
FILLER = {46: 0, 446: 80}
"""Prompt tokens (of SmolLM2's tokenizer) by repetitions of a sentence of five tokens."""

Contender = Callable[[list[Prompt], int], int]
"""A function of a seed that samples every group and returns the number of sampled tokens."""
Repeat = dict[str, dict[str, float]]
"""Tokens and seconds of each contender."""


def prompts_of(tokenizer: Any, length: int) -> list[Prompt]:
    """Prompts that ask for a sum, in the model's chat format."""
    prompts: list[Prompt] = []
    for a in range(11, 11 + PROMPTS):
        filler = "Here is some context. " * FILLER[length]
        question = f"{filler}What is {a} + {a + 8}? Answer with the number only."
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(Prompt(id=f"{a}", token_ids=tuple(tokenizer(text).input_ids), content=question))
    return prompts


def requests_of(prompts: list[Prompt], seed: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt, SamplingParams(n=GROUP, max_tokens=MAX_TOKENS, seed=seed * PROMPTS + i))
        for i, prompt in enumerate(prompts)
    ]


class Weights:
    """The weights of the model, for an engine that has its own copy."""

    def __init__(self, model: Any) -> None:
        self.module = model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()


def engine_of(name: str, model: Any, eos: int) -> RolloutEngine:
    """An engine with room for the longest prompt."""
    longest = max(FILLER) + MAX_TOKENS
    engine = make_engine(name, model, eos_token_ids=[eos], kv_cache_gib=1.0, max_tokens=longest)
    engine.update_weights(Weights(model), 0)
    return engine


def contender(engine: RolloutEngine) -> Contender:
    def run(prompts: list[Prompt], seed: int) -> int:
        engine.release()
        groups = generate(engine, requests_of(prompts, seed))
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return run


def plain_generate(model: Any, eos: int) -> Contender:
    def run(prompts: list[Prompt], seed: int) -> int:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        padding = [longest - len(prompt.token_ids) for prompt in prompts]
        ids = torch.tensor([(eos,) * pad + p.token_ids for pad, p in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        torch.manual_seed(seed)
        model.set_attn_implementation("sdpa")
        model.eval()
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=GROUP,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=eos,
            pad_token_id=eos,
        )[:, longest:]
        ended = (out == eos).int().cumsum(-1)
        # tokens after an end of sequence do not count
        return int(((ended == 0) | ((ended == 1) & (out == eos))).sum())

    return run


def verify(model: Any, prompts: list[Prompt], eos: int, largest: float, mean: float) -> dict[str, float]:
    """Differences (nats) of log-probs between engine and forward passes. SystemExit beyond the bounds."""
    requests = requests_of(prompts[:2], 0)
    groups = [group[:3] for group in generate(NativeEngine(model, eos_token_ids=[eos]), requests)]
    errors = logprob_errors(model, requests, groups)
    found = {"max": max(errors), "mean": statistics.mean(errors), "tokens": len(errors)}
    if found["max"] > largest or found["mean"] > mean:
        raise SystemExit(f"the native engine's log-probs are off by {found}; nothing is timed")
    return found


def contenders_of(names: list[str], model: Any, eos: int, close: ExitStack) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for name in names:
        if name == "generate":
            found[name] = plain_generate(model, eos)
        else:
            engine = engine_of(name, model, eos)
            close.callback(engine.close)
            found[name] = contender(engine)
    return found


def one_repeat(contenders: dict[str, Contender], prompts: list[Prompt], repeat: int) -> Repeat:
    """Runs every contender once, in an order that alternates."""
    times: Repeat = {}
    for name in list(contenders)[:: -1 if repeat % 2 else 1]:
        start = time.perf_counter()
        tokens = contenders[name](prompts, 1 + repeat)
        seconds = time.perf_counter() - start
        load = round(os.getloadavg()[0], 1)
        times[name] = {"tokens": tokens, "seconds": round(seconds, 3), "load": load}
        sys.stderr.write(
            f"{repeat} {name}: {tokens} tokens, {seconds:.2f} s, {tokens / seconds:.0f} tokens/s\n"
        )
    return times


def summary(repeats: list[Repeat], prompt_tokens: int) -> list[dict[str, Any]]:
    """One row for each contender."""
    rates = {name: [r[name]["tokens"] / r[name]["seconds"] for r in repeats] for name in repeats[0]}
    rows: list[dict[str, Any]] = []
    for name, found in rates.items():
        row: dict[str, Any] = {
            "engine": name,
            "prompt_tokens": prompt_tokens,
            "repeats": len(repeats),
            "median_seconds": round(statistics.median(r[name]["seconds"] for r in repeats), 2),
            "median_tokens_per_second": round(statistics.median(found), 1),
            "range_tokens_per_second": [round(min(found), 1), round(max(found), 1)],
            "range_load": [f(r[name].get("load", 0.0) for r in repeats) for f in (min, max)],
        }
        if "generate" in rates:
            row["times_generate"] = round(statistics.median(found) / statistics.median(rates["generate"]), 2)
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens a second of the rollout engines.")
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=list(FILLER), choices=list(FILLER))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES[:3]), choices=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    return parser.parse_args()


def interrupted(out: Path | None, result: dict[str, Any]) -> dict[str, list[Repeat]]:
    """The repeats that an interrupted call of the same command on the same machine has left."""
    if out is None or not out.exists():
        return {}
    found = json.loads(out.read_text())
    unfinished = not found["rows"]
    same = all(found[key] == result[key] for key in ("command", "machine"))
    return found["samples"] if same and unfinished else {}


def main() -> None:
    options = parse()
    arguments = " ".join(sys.argv[1:]).replace(options.model, "MODEL_FOLDER")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    eos = int(tokenizer.eos_token_id)
    short = prompts_of(tokenizer, 46)
    exact = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    checks = {"float32": verify(exact, short, eos, largest=1e-4, mean=1e-4)}
    del exact
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    checks["bfloat16"] = verify(model, short, eos, largest=float("inf"), mean=0.1)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.rollout {arguments}",
        "workload": f"{PROMPTS} prompts x {GROUP} samples x <= {MAX_TOKENS} tokens, bfloat16",
        "machine": machine(),
        "logprob_difference_from_whole_forward": checks,
        "rows": [],
    }
    samples = interrupted(options.out, result)
    with ExitStack() as close:
        contenders = contenders_of(options.engines, model, eos, close)
        for length in options.prompt_tokens:
            prompts = prompts_of(tokenizer, length)
            repeats = samples.setdefault(str(length), [])
            if len(repeats) < options.repeats:
                for run in contenders.values():
                    run(prompts[:1], 0)
            while len(repeats) < options.repeats:
                repeats.append(one_repeat(contenders, prompts, len(repeats)))
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({**result, "samples": samples}, indent=1) + "\n")
    for length in options.prompt_tokens:
        result["rows"] += summary(samples[str(length)], length)
    text = json.dumps({**result, "samples": samples}, indent=1) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
