"""Words in a sentence: whose samples a reward model learns from, and a reward model with PPO-max against DPO.

The two-layer model and the datasets are those of `benchmarks.preference_words`; the true reward is that of
examples/offline/reward.py, without noise.

`refresh` is what is kept of PARL (arXiv:2308.02585): the data of the reward model come from the policy. A
policy learns by GRPO, in iterations, from the score of a reward model. `fixed`: the model of the first
iteration's pairs serves all of them. `refreshed`: before each iteration one is trained anew on pairs that
the policy of that moment sampled. Every reward model has as many updates, from one pair of unequal true
rewards of each prompt whose samples have one. The first iteration is the same run for both. After each, the
policy samples held-out prompts:

    rank accuracy  of two samples of a prompt with unequal true rewards the better one has the higher score
    gap            mean of (a + b score) - mean of the true reward, where a and b are the least squares line
                   of the true reward on the samples that the reward model's pairs were drawn from

`unpacking` is the comparison of arXiv:2406.09279 with the shapes of configs/unpacking_*.yaml: a reward model
of the dataset's pairs (best and worst of six, by a noisy reward) and PPO-max with one sample a prompt, one
pass in minibatches and the critic that starts from the reward model, against DPO on the same pairs. Compute
is counted in tokens that pass through a model, prompts included: forward 1, forward and backward 3 (`units`).
DPO makes as many updates as use up what the reward model and PPO-max had together. The reward on held-out
prompts is measured along DPO and at the end of PPO-max, whose curve is that of the samples it learns from.

    python -m benchmarks.reward_data --runs FOLDER --out FILE.json --figure FILE.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.advantage_weighted import base, taught, written
from benchmarks.offline_data import Row, prompt_of, write
from benchmarks.preference_words import LIMIT, made_data, run
from benchmarks.runs import ROOT, Records, machine, read
from examples.offline.reward import one
from rlhf.config.load import make_config
from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.model import RewardModel
from rlhf.trainer import Trainer

Settings = dict[str, Any]
SEEDS = (0, 1, 2)
ITERATIONS, STEPS, PROMPTS, GROUP, LR = 4, 12, 8, 8, 5e-4
PAIRS_STEPS, PAIRS_A_STEP, PAIRS_LR = 60, 32, 1e-3
PPO_STEPS, PPO_PROMPTS, PPO_MINIBATCHES, PPO_LR, CRITIC_LR = 20, 64, 8, 3e-4, 1e-3
DPO_PAIRS, DPO_LR, BETAS = 32, 3e-4, (0.01, 0.1)
EVALUATIONS = 8
PASSES = {"reward model": 3, "dpo": 3 + 1, "ppo_max": 1 + 1 + 1 + 1 + 1 + 3 + 3}
"""Units of a token. DPO: the policy's update, the reference. PPO-max: sampling; policy, reference, reward
model and critic before the update; the updates of policy and critic."""


def line(scores: Sequence[float], truth: Sequence[float]) -> tuple[float, float]:
    """a and b of the least squares line truth = a + b score; b is 0 where all scores are equal."""
    if len(set(scores)) == 1:
        return statistics.mean(truth), 0.0
    found = statistics.linear_regression(scores, truth)
    return found.intercept, found.slope


def rank_accuracy(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Of two samples of a group, (scores, truth), with unequal truth: the share whose better one scores
    higher; equal scores count half. 0.5 where no two differ."""
    found = [
        0.5 if s == t else float((s > t) == (u > v))
        for scores, truth in groups
        for (s, u), (t, v) in itertools.combinations(zip(scores, truth, strict=True), 2)
        if u != v
    ]
    return statistics.mean(found) if found else 0.5


def units(kind: str, tokens: float) -> float:
    """Compute of so many tokens, each counted once a sample or pair."""
    return PASSES[kind] * tokens


def tokens_of(steps: Records, prompt: int) -> list[float]:
    """Tokens of each step of a policy's run: sampled or given ones, and `prompt` for each prompt."""
    return [step["rollout/tokens"] + prompt * step["rollout/groups"] for step in steps]


def draw_pairs(groups: Sequence[tuple[Row, Sequence[str]]], seed: int) -> list[Row]:
    """One pair a prompt, drawn from those of its samples whose true rewards differ."""
    rng, pairs = random.Random(seed), list[Row]()
    for row, texts in groups:
        two = [
            (a, b) for a, b in itertools.permutations(texts, 2) if one(a, row["words"]) > one(b, row["words"])
        ]
        # an empty completion has no text to be scored
        two = [pair for pair in two if all(pair)]
        if two:
            chosen, rejected = rng.choice(two)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    rng.shuffle(pairs)
    return pairs


Groups = list[tuple[Row, list[str]]]


def samples(model: Path, file: Path) -> Groups:
    """Eight samples of each prompt of a file."""
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    asked = [{"prompt": prompt_of(row["words"], chat=False), "words": row["words"]} for row in rows]
    return [(row, texts) for row, _, texts in written(model, asked, LIMIT + 16)]


def scored(model: RewardModel, groups: Groups) -> list[tuple[list[float], list[float]]]:
    """Scores and true rewards of the samples of each prompt."""
    found: list[tuple[list[float], list[float]]] = []
    for row, texts in groups:
        scores: Any = model([row["prompt"]] * len(texts), texts)
        found.append((scores, [one(text, row["words"]) for text in texts]))
    return found


def flat(groups: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    scores, truth = ([x for group in groups for x in group[side]] for side in (0, 1))
    return scores, truth


def judged(model: RewardModel, source: Groups, held_out: Groups) -> dict[str, float]:
    """What a reward model, whose pairs were drawn from `source`, says of the policy's held-out samples."""
    groups = scored(model, held_out)
    a, b = line(*flat(scored(model, source)))
    scores, truth = flat(groups)
    proxy = statistics.mean(a + b * score for score in scores)
    return {
        "truth": round(statistics.mean(truth), 4),
        "proxy": round(proxy, 4),
        "gap": round(proxy - statistics.mean(truth), 4),
        "rank_accuracy": round(rank_accuracy(groups), 4),
    }


def train_rewards(model: Path, pairs: Path, folder: Path, seed: int) -> Path:
    """A reward model of a file of pairs, unless it was trained before. Held-out pairs are not looked at: the
    file is its own."""
    if not (folder / "model").is_dir():
        settings: Settings = {
            "task": "reward_model",
            "run_dir": str(folder),
            "seed": seed,
            "steps": PAIRS_STEPS,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": str(pairs),
                "eval": str(pairs),
                "max_prompt_tokens": 24,
                "max_completion_tokens": 64,
            },
            "score": {"kind": "pairs", "lm_coef": 0.0},
            "batch": {"tokens": 1, "low": PAIRS_A_STEP, "high": PAIRS_A_STEP},
            "learner": {"lr": PAIRS_LR, "schedule": "linear", "microbatch_tokens": 4096},
            "monitor": {"sinks": []},
            "checkpoint": {"every": 0},
        }
        RewardModelTrainer(RewardModelConfig.model_validate(settings)).run()
    return folder / "model"


def policy_settings(
    model: Path, data: Path, rewards: Path | None, seed: int, lr: float, steps: int
) -> Settings:
    made = base(model, data, steps=steps, prompts=PROMPTS, limit=LIMIT, lr=lr)
    del made["prompt_value"]
    made["model"]["dtype"] = "float32"
    made["data"] = {
        "train": str(data / "best.jsonl"),
        "eval": str(data / "eval.jsonl"),
        "max_prompt_tokens": 24,
    }
    truth = {"path": f"{ROOT}/examples/offline/reward.py:words_used", "batch": "step"}
    if rewards is not None:
        score = {"path": "reward_model", "params": {"model": str(rewards)}, "batch": "step"}
        truth |= {"weight": 0.0}
        made["reward"] = {"functions": [score | {"memory_gib": 16.0, "timeout": 60.0}, truth]}
        made["reward"] |= {"success_objective": "words_used"}
    made["learner"]["schedule"] = "constant"
    return made | {"seed": seed}


def learn(settings: Settings, folder: Path) -> Path:
    """An iteration of GRPO, unless it was made before; the folder of its model."""
    if not (folder / "model").is_dir():
        quiet = {"run_dir": str(folder), "monitor": {"sinks": [], "samples_per_step": 0}}
        Trainer(make_config(settings | quiet | {"checkpoint": {"every": 0}})).run()
    return folder / "model"


def iterate(start: Path, data: Path, runs: Path, seed: int) -> list[Row]:
    """Both arms of one seed: what their reward models say after each iteration."""
    rows: list[Row] = []
    for arm in ("fixed", "refreshed"):
        policy = start
        for number in range(1, ITERATIONS + 1):
            shared = number == 1
            name = f"{'both' if shared else arm}-{seed}-{number}"
            if shared or arm == "refreshed":
                source = samples(policy, data / "best.jsonl")
                pairs = draw_pairs(source, seed)
                write(runs / f"pairs-{name}.jsonl", pairs)
                rewards = train_rewards(start, runs / f"pairs-{name}.jsonl", runs / f"rewards-{name}", seed)
                judge = RewardModel(str(rewards))
            settings = policy_settings(policy, data, rewards, seed, LR, STEPS)
            settings["rollout"]["group_size"] = GROUP
            settings |= {
                "algorithm": {"name": "grpo", "kl": {"coef": 0.0}},
                "eval": {"every": 0, "samples": 1},
            }
            policy = learn(settings, runs / f"policy-{name}")
            found = judged(judge, source, samples(policy, data / "eval.jsonl"))
            rows.append({"arm": arm, "seed": seed, "iteration": number, "pairs": len(pairs)} | found)
            sys.stdout.write(f"{rows[-1]}\n")
    return rows


def ppo_settings(model: Path, data: Path, rewards: Path, seed: int) -> Settings:
    """configs/unpacking_ppo.yaml, smaller: one sample a prompt, one pass, a constant KL of 0.05."""
    made = policy_settings(model, data, rewards, seed, PPO_LR, PPO_STEPS)
    made["rollout"] |= {"prompts_per_step": PPO_PROMPTS, "group_size": 1}
    made["learner"] |= {"epochs": 1, "minibatches": PPO_MINIBATCHES, "warmup_steps": PPO_STEPS // 10}
    made["critic"] = {"path": str(rewards), "lr": CRITIC_LR}
    made["algorithm"] = {"name": "ppo_max", "kl": {"coef": 0.05}}
    return made | {"eval": {"every": 0, "samples": 1}}


def dpo_settings(model: Path, data: Path, seed: int, beta: float, steps: int) -> Settings:
    """configs/unpacking_dpo.yaml, smaller: the learning rate rises over a tenth of the run, falls to 0."""
    made = policy_settings(model, data, None, seed, DPO_LR, steps)
    made["data"] |= {"mode": "offline", "train": str(data / "pairs.jsonl"), "max_prompt_tokens": 24}
    made["rollout"] |= {"prompts_per_step": DPO_PAIRS}
    del made["rollout"]["group_size"]
    made["learner"] |= {"schedule": "linear", "warmup_steps": steps // 10}
    made["algorithm"] = {"name": "dpo", "beta": beta}
    return made | {"eval": {"every": max(1, steps // 6), "samples": EVALUATIONS}}


def unpack(start: Path, data: Path, runs: Path, seed: int) -> list[Row]:
    """PPO-max and DPO of one seed: the held-out reward along the compute used."""
    pairs = [json.loads(text) for text in (data / "pairs.jsonl").read_text().splitlines()]
    # a word is a token, and the end is one
    prompt = len(pairs[0]["prompt"].split())
    each = statistics.mean(len(f"{p['chosen']} {p['rejected']}".split()) + 2 + prompt for p in pairs)
    spent = units("reward model", each * PAIRS_STEPS * PAIRS_A_STEP)
    rewards = train_rewards(start, data / "pairs.jsonl", runs / f"rewards-of-data-{seed}", seed)
    folder = runs / f"ppo_max-{seed}"
    policy = learn(ppo_settings(start, data, rewards, seed), folder)
    records = read(folder)[0]
    used = [units("ppo_max", tokens) for tokens in tokens_of(records, prompt)]
    rows: list[Row] = [
        {
            "arm": "ppo_max",
            "reward": [round(record["reward/words_used"], 4) for record in records],
            # what a step samples is the policy before its update
            "units": [round(spent + sum(used[:step])) for step in range(PPO_STEPS)],
            "last": truth_of(samples(policy, data / "eval.jsonl")),
            "total": round(spent + sum(used)),
            "reward_model_units": round(spent),
        }
    ]
    steps = round((spent + sum(used)) / units("dpo", each * DPO_PAIRS))
    for beta in BETAS:
        folder = runs / f"dpo-{beta}-{seed}"
        curve = run(dpo_settings(start, data, seed, beta, steps), folder)
        used = [units("dpo", tokens) for tokens in tokens_of(read(folder)[0], prompt)]
        rows.append(
            {
                "arm": f"dpo, beta {beta}",
                "updates": steps,
                "reward": curve["reward"],
                "units": [round(sum(used[:step])) for step in curve["steps"]],
                "last": curve["reward"][-1],
                "total": round(sum(used)),
            }
        )
    sys.stdout.write("".join(f"{row}\n" for row in rows))
    return [{"seed": seed} | row for row in rows]


def truth_of(groups: Groups) -> float:
    return round(statistics.mean(one(text, row["words"]) for row, texts in groups for text in texts), 4)


def spread(values: Sequence[float]) -> list[float]:
    """Mean, smallest and largest."""
    return [round(statistics.mean(values), 4), round(min(values), 4), round(max(values), 4)]


def summary(refresh: Sequence[Row], unpacked: Sequence[Row]) -> dict[str, Any]:
    arms = {arm: [row for row in refresh if row["arm"] == arm] for arm in ("fixed", "refreshed")}
    names = ("truth", "proxy", "gap", "rank_accuracy")
    return {
        "refresh: mean, lowest and highest of the seeds, by iteration": {
            arm: {
                name: [
                    spread([r[name] for r in rows if r["iteration"] == i]) for i in range(1, ITERATIONS + 1)
                ]
                for name in names
            }
            for arm, rows in arms.items()
        },
        "unpacking: held-out reward at the end, and what was used": {
            arm: {
                name: spread([row[name] for row in unpacked if row["arm"] == arm])
                for name in ("last", "total")
            }
            for arm in dict.fromkeys(row["arm"] for row in unpacked)
        },
    }


def draw(refresh: Sequence[Row], unpacked: Sequence[Row], file: Path) -> None:
    """True reward and what the reward model makes of it, rank accuracy; reward along the compute."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    numbers = list(range(1, ITERATIONS + 1))
    for colour, arm in zip(("C0", "C1"), ("fixed", "refreshed"), strict=True):
        for axis, name, style in ((0, "truth", "-"), (0, "proxy", "--"), (1, "rank_accuracy", "-")):
            curves = [[r[name] for r in refresh if r["arm"] == arm and r["seed"] == seed] for seed in SEEDS]
            for curve in curves:
                axes[axis].plot(numbers, curve, style, color=colour, alpha=0.25, linewidth=0.8)
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            label = arm if axis else f"{arm}: {'true reward' if name == 'truth' else 'what its model says'}"
            axes[axis].plot(numbers, means, style, color=colour, marker="o", label=label)
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in unpacked)):
        for row in unpacked:
            if row["arm"] == arm:
                label = arm if row["seed"] == SEEDS[0] else None
                axes[2].plot(
                    [u / 1000 for u in row["units"]],
                    row["reward"],
                    color=f"C{number + 2}",
                    marker=".",
                    label=label,
                )
    axes[0].set(title="PARL's data: reward", xlabel="iteration", xticks=numbers)
    axes[1].set(title="rank accuracy on the policy's own samples", xlabel="iteration", xticks=numbers)
    axes[2].set(
        title="DPO: held-out reward; PPO-max: own samples", xlabel="1000 token passes, reward model's too"
    )
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    start, refresh, unpacked = taught(options.runs, steps=600), list[Row](), list[Row]()
    for seed in SEEDS:
        data = made_data(options.runs, start, seed)
        refresh += iterate(start, data, options.runs, seed)
        unpacked += unpack(start, data, options.runs, seed)
    results = {
        "command": "python -m benchmarks.reward_data --runs FOLDER --out FILE.json --figure FILE.png",
        "machine": machine(),
        "cpu_seconds": round(time.process_time() - begun, 1),
        **summary(refresh, unpacked),
        "refresh": refresh,
        "unpacking": unpacked,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(refresh, unpacked, options.figure)


if __name__ == "__main__":
    main()
