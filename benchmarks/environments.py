"""What tools cost: tokens a second with a slow tool, and without the keys and values of earlier turns.

64 episodes of three turns, 8 prompts with 8 samples each, on SmolLM2 and the native engine, real environment
processes. Four ways, interleaved, the median of each:

    instant     the tool answers at once
    slow        each call of the tool sleeps 0.2 s; the same turns
    again       as instant, but the engine keeps nothing: every turn is prefilled again with all before it
    one turn    as instant with one turn, for comparison

A turn ends with a full stop, comma or line end, so that lengths differ and the episodes do not go in step.
Expected: slow / instant at least 0.8.

    python -m benchmarks.environments --out benchmarks/results/<machine>/environments.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.runs import machine
from rlhf.collect.episodes import Episodes
from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.conversation import Conversation
from rlhf.environments.pool import EnvironmentPool
from rlhf.rollout.engine import RolloutRequest, SamplingParams
from rlhf.rollout.factory import make_engine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.small_model import make_small_model
from rlhf.types import Prompt

PROMPTS, GROUP, TURNS, TOKENS = 8, 8, 3, 400
SECONDS = 0.2
STOPS = (".", ",", "\n", " and", " the")
PLACES = ("France", "Peru", "Japan", "Kenya", "Norway", "India", "Chile", "Egypt")


class Instant:
    """Answers every turn with the same words."""

    seconds = 0.0

    def reset(self, **columns: Any) -> None:
        pass

    def respond(self, messages: list[dict[str, Any]]) -> list[dict[str, str]]:
        time.sleep(self.seconds)
        return [{"role": "user", "content": "Thank you. Please go on, and tell me something else about it."}]


class Slow(Instant):
    seconds = SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description="What tools cost.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path = make_small_model()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = make_engine(
        "native", model, eos_token_ids=(tokenizer.eos_token_id,), kv_cache_gib=4.0, max_tokens=600
    )
    assert isinstance(engine, NativeEngine)
    pools = {
        name: EnvironmentPool(EnvironmentConfig(path=(f"{__file__}:{name}",))) for name in ("Instant", "Slow")
    }
    conversation = Conversation(tokenizer, frozenset([tokenizer.eos_token_id]))
    found: dict[str, list[dict[str, float]]] = {"instant": [], "slow": [], "again": [], "one turn": []}
    for repeat in range(-1, options.repeats):
        for name, figures in found.items():
            pool = pools["Slow" if name == "slow" else "Instant"]
            turns = 1 if name == "one turn" else TURNS
            episodes = Episodes(engine, pool, conversation, tokenizer, turns, 200)
            # an engine that keeps nothing is one that is told to forget at once
            keeps = name != "again"
            measured = measure(episodes, requests(tokenizer, conversation), keeps=keeps)
            if repeat >= 0:
                figures.append(measured)
    medians = {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in found.items()
    }
    ratios = {
        "slow / instant": medians["slow"]["tokens_per_second"] / medians["instant"]["tokens_per_second"],
        "instant / again": medians["instant"]["tokens_per_second"] / medians["again"]["tokens_per_second"],
    }
    result = {
        "command": " ".join(["python -m benchmarks.environments", *sys.argv[1:]]),
        "machine": machine(),
        "episodes": PROMPTS * GROUP,
        "turns": TURNS,
        "tool_seconds": SECONDS,
        "medians": medians,
        "ratios": ratios,
        "all": found,
    }
    print(json.dumps(medians | ratios, indent=1))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for pool in pools.values():
        pool.close()


def requests(tokenizer: Any, conversation: Conversation) -> list[RolloutRequest]:
    stops = tuple(tokenizer.encode(text, add_special_tokens=False)[0] for text in STOPS)
    made: list[RolloutRequest] = []
    for number, place in enumerate(PLACES[:PROMPTS]):
        content = [{"role": "user", "content": f"Tell me about the history of {place}."}]
        prompt = Prompt(f"{number}", conversation.prompt(content, None), content)
        params = SamplingParams(GROUP, TOKENS, seed=number, stop_token_ids=stops)
        made.append(RolloutRequest(prompt, params))
    return made


def measure(episodes: Episodes, asked: list[RolloutRequest], *, keeps: bool) -> dict[str, float]:
    engine: Any = episodes.engine
    prefilled, original = 0, engine._decoder.prefill

    def counted(cache: Any, requests: Any, batch: Any) -> Any:
        nonlocal prefilled
        for place in batch:
            known = cache.begun[place].length if place in cache.begun else 0
            prefilled += len(requests[place].prompt.token_ids) - known
        return original(cache, requests, batch)

    engine._decoder.prefill = counted
    submit = engine.submit
    if not keeps:
        engine.submit = lambda some: submit([replace(r, continues=None) for r in some])
    try:
        begin = time.perf_counter()
        groups = episodes.run(asked, [0] * len(asked))
        seconds = time.perf_counter() - begin
    finally:
        engine._decoder.prefill, engine.submit = original, submit
    own = sum(len(c.token_ids) for group in groups for e in group for c in e.completions)
    turns = sum(len(e.completions) for group in groups for e in group)
    return {
        "seconds": seconds,
        "tokens": own,
        "turns": turns,
        "prefilled": prefilled,
        "tokens_per_second": own / seconds,
    }


if __name__ == "__main__":
    main()
