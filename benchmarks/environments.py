"""What turns and tools cost: tokens a second of several turns, of one, with a slow tool, without kept turns.

64 episodes of three turns, 8 prompts with 8 samples each, on SmolLM2 and the native engine, real environment
processes. Five ways, interleaved, the median of each:

    instant      the tool answers at once
    slow         each call of the tool sleeps 0.2 s; the same turns
    again        as instant, but the engine keeps nothing: every turn is prefilled again with all before it
    same tokens  as many tokens as in instant are read and written, in one turn without an environment: each
                 episode is a request whose prompt is what was read for it, the observations and for one
                 sample of a group the prompt, and which samples as many tokens as the episode has
    first turn   the first turn alone: little is read, for comparison

A turn ends with a full stop, comma or line end, so that lengths differ and the episodes do not go in step.
Expected: instant / same tokens and slow / instant at least 0.8, instant / again at least 1.3. Instant cannot
come near first turn: what is read is computed too, and an observation of 26 tokens follows a turn of 9.

    python -m benchmarks.environments --out benchmarks/results/<machine>/environments.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.runs import machine
from rlhf.collect.episodes import Episodes
from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.conversation import Conversation
from rlhf.environments.pool import EnvironmentPool
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.episode import Episode, Observation
from rlhf.rollout.factory import make_engine
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
    # turns of a length that is given, whatever the model says
    endless = make_engine("native", model, eos_token_ids=(), kv_cache_gib=4.0, max_tokens=600)
    pools = {
        name: EnvironmentPool(EnvironmentConfig(path=(f"{__file__}:{name}",))) for name in ("Instant", "Slow")
    }
    conversation = Conversation(tokenizer, frozenset([tokenizer.eos_token_id]))
    names = ("instant", "slow", "again", "same tokens", "first turn")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    # the first round is not counted
    for repeat in range(-1, options.repeats):
        groups: list[list[Episode]] = []
        for name, figures in found.items():
            if name == "same tokens":
                asked, run = same_tokens(groups), partial(generate, endless)
            else:
                pool = pools["Slow" if name == "slow" else "Instant"]
                turns = 1 if name == "first turn" else TURNS
                episodes = Episodes(engine, pool, conversation, tokenizer, turns, 200)
                asked = requests(tokenizer, conversation)
                run = partial(played, episodes, keeps=name != "again")
            measured, sampled = measure(model, asked, run)
            if name == "instant":
                groups = sampled
            if repeat >= 0:
                figures.append(measured)
    medians = {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in found.items()
    }
    pairs = (("instant", "same tokens"), ("slow", "instant"), ("instant", "again"), ("instant", "first turn"))
    ratios = {
        f"{one} / {other}": medians[one]["tokens_per_second"] / medians[other]["tokens_per_second"]
        for one, other in pairs
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


def same_tokens(groups: list[list[Episode]]) -> list[RolloutRequest]:
    """Requests of one turn, in which as much is read and written as in these episodes."""
    asked: list[RolloutRequest] = []
    for number, episode in enumerate(episode for group in groups for episode in group):
        read = episode.prompt.token_ids if episode.index == 0 else ()
        for turn in episode.turns:
            read += turn.token_ids if isinstance(turn, Observation) else ()
        own = sum(len(turn.token_ids) for turn in episode.completions)
        params = SamplingParams(1, own, seed=number)
        asked.append(RolloutRequest(Prompt(f"{number}", read, ""), params))
    return asked


def played(episodes: Episodes, asked: list[RolloutRequest], *, keeps: bool) -> list[list[Episode]]:
    engine: Any = episodes.engine
    submit = engine.submit

    def forgetful(some: list[RolloutRequest]) -> None:
        for request in some:
            if request.continues is not None:
                engine.forget(request.continues)
        submit(some)

    engine.submit = submit if keeps else forgetful
    try:
        return episodes.run(asked, [0] * len(asked))
    finally:
        engine.submit = submit


def measure(
    model: Any, asked: list[RolloutRequest], run: Callable[[list[RolloutRequest]], list[list[Any]]]
) -> tuple[dict[str, float], list[list[Any]]]:
    """Figures of one run, and what it sampled."""
    computed = passes = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal computed, passes
        computed += kwargs["input_ids"].numel()
        passes += 1

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        begin = time.perf_counter()
        groups = run(asked)
        seconds = time.perf_counter() - begin
    finally:
        handle.remove()
    samples = [sample for group in groups for sample in group]
    turns = [turn for one in samples for turn in (one.completions if isinstance(one, Episode) else [one])]
    own = sum(len(turn.token_ids) for turn in turns)
    figures = {
        "seconds": seconds,
        "tokens": own,
        "turns": len(turns),
        # every token of a turn but its last is an input of its own
        "prefilled": computed - (own - len(turns)),
        "passes": passes,
        "tokens_per_second": own / seconds,
    }
    return figures, groups


if __name__ == "__main__":
    main()
