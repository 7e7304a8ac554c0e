"""The efficiency of reward workers: samples a second, as a share of what as many workers could do at best.

A reward of one millisecond, asleep or computing, on 1,000 samples. The ideal is the time that the function
took by its own clock, inside the workers, divided by their number: the rest is the cost of the queue, of
moving samples and rewards, and of workers that finish at different times. The fraction cannot exceed 1;
rewards that compute also compete with everything else that runs.

    python -m benchmarks.rewards --out benchmarks/results/<machine>/rewards.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.runs import machine
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.types import Completion, FinishReason, Prompt, VersionSpan

SAMPLES, GROUP = 1000, 8


def sleep(completions: list[str]) -> list[float]:
    time.sleep(0.001)
    return [1.0] * len(completions)


def compute(completions: list[str]) -> list[float]:
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
    return [1.0] * len(completions)


def nothing(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def measure(function: str, workers: int, repeats: int) -> dict[str, float]:
    rewards = Rewards([RewardSpec(f"benchmarks.rewards:{function}", workers=workers)], ())
    spans = (VersionSpan(0, 0, 1),)
    prompts = [Prompt(f"p:{i}", (1,), "What is 3 + 5?") for i in range(SAMPLES // GROUP)]
    completions = [
        [Completion(p.id, i, (1,), (0.0,), FinishReason.STOP, spans) for i in range(GROUP)] for p in prompts
    ]
    texts = [["It is 8."] * GROUP for _ in prompts]
    walls: list[float] = []
    shares: list[float] = []
    processor: list[float] = []
    try:
        # wait until every worker has started
        for _ in range(3):
            rewards.score(prompts, completions, texts, trainer_state={})
            time.sleep(0.5)
        for _ in range(repeats):
            began, used = time.monotonic(), time.process_time()
            scoring = rewards.submit(prompts, completions, texts, trainer_state={})
            scoring.result()
            walls.append(time.monotonic() - began)
            processor.append(time.process_time() - used)
            shares.append(sum(scoring.by_function[0].seconds) / workers / walls[-1])
    finally:
        rewards.close()
    best = max(range(repeats), key=shares.__getitem__)
    return {
        "samples_per_second": SAMPLES / walls[best],
        "share_of_ideal": shares[best],
        "share_of_ideal_median": statistics.median(shares),
        "trainer_microseconds_a_sample": processor[best] / SAMPLES * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--functions", nargs="+", default=["sleep"], choices=["sleep", "compute", "nothing"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results: dict[str, Any] = {
        function: {str(n): measure(function, n, options.repeats) for n in options.workers}
        for function in options.functions
    }
    # the load by other processes, which the ideal does not account for
    place = machine() | {"load_average_before": load}
    text = json.dumps({"samples": SAMPLES, "repeats": options.repeats, "machine": place, **results}, indent=1)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
