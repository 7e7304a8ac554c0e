"""Kinds of reward models on one set of frozen states: gated against its parts, PG-RANK against Bradley-Terry.

Questions for capitals, as in examples/capitals, each with five answers; its rule says which of three parts an
answer fulfils (correct, short, polite). The system message asks for one of the three above all. A quarter of
the countries is held out. The small instruct model reads each answer once, and everything is learned from
these states:

gate    The gated model has the three parts as objectives, fitted to ratings of the answers; beside it are
        each objective alone, and their plain mean. Pairs are labelled in two ways: `rule`, the answer with
        more parts is better, which is what the plain mean of perfect objectives says; `asked`, the part that
        the system message asks for counts three times as much as each other.
rank    lists: relevance is the number of parts. One linear head is trained with the loss of all pairs of a
        list (Bradley-Terry), another by the policy gradient of nDCG@1 (PG-RANK). Learning rate and number of
        updates are those that are best on five countries of the training set.

A seed draws the lists that are trained on, what is held out of them, the first weights and the batches.

    python -m benchmarks.reward_models --out benchmarks/results/<machine>/reward_models.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import ROOT, write_claims
from rlhf.algos.reward_model.losses import bradley_terry
from rlhf.algos.reward_model.ranking import expected_first, ndcg, ranking_loss, sample_rankings
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example, load_examples
from rlhf.distributed.world import World
from rlhf.models.loading import load_policy
from rlhf.models.pretrained import load_tokenizer
from rlhf.plugins import load_object
from rlhf.reward_model.frozen_states import FrozenStates, States
from rlhf.reward_model.kinds.gated import MEAN, Gated, GatedLearner
from rlhf.reward_model.kinds.table import kind_of
from rlhf.reward_model.learner import next_batch
from rlhf.reward_model.model import RewardModel

MODEL = "~/.cache/tandem/SmolLM2-135M-Instruct"
PARTS = ("correct", "short", "polite")
SYSTEM = "Be {} above all."
ASKED = 3.0
"""How much the part counts that the system message asks for; each other part counts 1."""
ANSWERS = 5
VALIDATED = 5
"""Countries of the training set by which the heads' learning rate and number of updates are chosen."""
GATE_LR = 1e-2
GATE = {"width": 64, "layers": 1}
RATES = (1e-3, 3e-3, 1e-2)
LISTS = 32
"""Lists of an update of a head."""
SAMPLES = 32
CPU = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Listed:
    """The answers to one question."""

    example: Example
    states: States
    parts: Tensor
    """`[n, 3]`: 1 where an answer fulfils a part of the rule."""
    country: str
    asked: int
    """The part that the system message asks for."""

    @property
    def relevance(self) -> Tensor:
        return self.parts.sum(-1)

    def worth(self, labels: str) -> Tensor:
        """By which the answers are paired."""
        weights = torch.ones(len(PARTS))
        if labels == "asked":
            weights[self.asked] = ASKED
        return self.parts @ weights


def config(kind: str, folder: Path, *, seed: int = 0, steps: int = 1, **score: Any) -> RewardModelConfig:
    data = {
        "train": str(folder / "lists.jsonl"),
        "eval": str(folder / "lists.jsonl"),
        "max_prompt_tokens": 96,
    }
    settings: dict[str, Any] = {
        "task": "reward_model",
        "run_dir": str(folder),
        "seed": seed,
        "steps": steps,
        "model": {"path": MODEL, "dtype": "float32"},
        "data": data | ({"ratings": "none"} if kind == "gated" else {}),
        "score": {"kind": kind, **score},
        # an update has 64 pairs: the tokens do not count
        "batch": {"tokens": 1, "low": 64, "high": 64},
        # the scale of the gate, which starts at 1, has a long way to go
        "learner": {"lr": GATE_LR, "schedule": "linear", "microbatch_tokens": 2048},
    }
    return RewardModelConfig.model_validate(settings)


def rows(lists: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Country and line of each question; a line whose answers are all as good as each other is drawn anew."""
    make = load_object(f"{ROOT}/examples/capitals/make_data.py:answer").__globals__
    rule, capitals = make["RULE"], make["CAPITALS"]
    cities = list(capitals.values())
    rng = random.Random(0)
    countries = sorted(capitals)
    rng.shuffle(countries)
    for i in range(lists * len(countries)):
        country = countries[i % len(countries)]
        while True:
            answers = [make["answer"](rng, country) for _ in range(ANSWERS)]
            parts = [
                [
                    float(rule.is_correct(text, capitals[country], cities)),
                    float(rule.is_short(text)),
                    float(rule.is_polite(text)),
                ]
                for text in answers
            ]
            relevance = [sum(of_one) for of_one in parts]
            if len(set(relevance)) > 1:
                break
        asked = i // len(countries) % len(PARTS)
        system = {"role": "system", "content": SYSTEM.format(PARTS[asked])}
        prompt = [system, *make["prompt"](country)[1:]]
        line = {"prompt": prompt, "completions": answers, "relevance": relevance}
        yield country, {**line, "parts": parts, "asked": asked}


def read(lists: int) -> tuple[FrozenStates, list[Listed]]:
    """Every list with the states of its answers, each read once by the model."""
    with tempfile.TemporaryDirectory() as folder:
        made, section = list(rows(lists)), config("ranking", Path(folder))
        text = "".join(json.dumps(row) + "\n" for _, row in made)
        (Path(folder) / "lists.jsonl").write_text(text)
        tokenizer = load_tokenizer(MODEL)
        examples = load_examples(section.data.train, section.data, kind_of(section), tokenizer)
        policy = load_policy(section.model, MODEL, torch.device("cpu"))
        policy.freeze(torch.float32)
        frozen = FrozenStates(RewardModel(policy, len(PARTS)), section.learner.microbatch_tokens, CPU)
        found = frozen.of(examples)
    return frozen, [
        Listed(example, states, torch.tensor(row["parts"]), country, row["asked"])
        for example, states, (country, row) in zip(examples, found, made, strict=True)
    ]


def gate(
    frozen: FrozenStates,
    train: Sequence[Listed],
    held: Sequence[Listed],
    labels: str,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """Accuracy on held-out pairs of the gated score, of the objectives' mean, and of each objective."""
    section = config("gated", Path("."), seed=seed, steps=steps, objectives=PARTS, gate=GATE)
    rated = [rating for listed in train for rating in ratings_of(frozen, listed)]
    learner = GatedLearner(frozen, section, CPU, rated)
    pairs, judged = (
        [pair for listed in several for pair in pairs_of(frozen, listed, labels)] for several in (train, held)
    )
    losses: list[float] = []
    for step in range(steps):
        metrics = learner.update(next_batch(pairs, section, step * section.batch.low), step=step)
        losses.append(metrics["reward_model/loss"].value)
    weights = {
        PARTS[asked]: dict(zip(PARTS, gates.mean(0).tolist(), strict=True))
        for asked in range(len(PARTS))
        for gates in [gates_of(learner, [listed for listed in held if listed.asked == asked])]
    }
    found = Gated(section).judge(learner.scores(judged), judged)
    accuracy = {name: sum(j.correct) / len(j.correct) for name, j in found.items()}
    curve = [round(sum(losses[i : i + 50]) / 50, 4) for i in range(0, steps, 50)]
    told = {"gate by what was asked for": weights, "fitted": learner.notes, "loss": curve}
    return {"accuracy": accuracy, "pairs": len(judged), **told}


@torch.no_grad()
def gates_of(learner: GatedLearner, lists: Sequence[Listed]) -> Tensor:
    """The gate's weights `[P, 3]` for the prompts of lists."""
    return learner.gate(torch.stack([listed.states.prompt for listed in lists]))


def ratings_of(frozen: FrozenStates, listed: Listed) -> Iterator[Example]:
    for i, parts in enumerate(listed.parts.tolist()):
        yield part_of(frozen, listed, [i], tuple(parts))


def pairs_of(frozen: FrozenStates, listed: Listed, labels: str) -> Iterator[Example]:
    worth = listed.worth(labels)
    for better, worse in permutations(range(ANSWERS), 2):
        if worth[better] > worth[worse]:
            yield part_of(frozen, listed, [better, worse], (0.0,))


def part_of(frozen: FrozenStates, listed: Listed, answers: list[int], labels: tuple[float, ...]) -> Example:
    """An example of some of a list's answers, whose states are known."""
    e = listed.example
    texts, completions = tuple(e.texts[i] for i in answers), tuple(e.completions[i] for i in answers)
    example = Example(e.prompt, texts, completions, labels)
    frozen.known[id(example)] = States(listed.states.prompt, listed.states.ends[answers])
    return example


def rank(train: Sequence[Listed], held: Sequence[Listed], seed: int, steps: int) -> dict[str, Any]:
    """nDCG@1 on held-out lists of a head trained by pairs and of one trained by rankings."""
    countries = sorted({listed.country for listed in train})
    validated = set(random.Random(seed).sample(countries, VALIDATED))
    chosen_by = [listed for listed in train if listed.country in validated]
    rest = [listed for listed in train if listed.country not in validated]
    states = torch.cat([listed.states.ends for listed in rest])
    mean, std = states.mean(0), states.std(0) + 1e-6
    found: dict[str, Any] = {}
    for name in ("pairs", "rankings"):
        tried = [
            (first_of(weight, chosen_by, mean, std), -update, rate, weight)
            for rate in RATES
            for update, weight in head(name, rest, mean, std, rate, seed, steps)
        ]
        # of equals the one with fewer updates
        best, update, rate, weight = max(tried, key=lambda t: t[:2])
        found[name] = {
            "ndcg@1": first_of(weight, held, mean, std),
            "on the countries it was chosen by": best,
            "lr": rate,
            "updates": -update,
        }
    return found


def head(
    name: str, lists: Sequence[Listed], mean: Tensor, std: Tensor, rate: float, seed: int, steps: int
) -> Iterator[tuple[int, Tensor]]:
    """Trains a linear head; yields the number of updates and the weight every 25 of them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(mean), requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    inputs = [((listed.states.ends - mean) / std, listed.relevance) for listed in lists]
    for update in range(1, steps + 1):
        drawn = torch.randint(len(lists), (LISTS,), generator=generator).tolist()
        loss = torch.zeros(())
        for states, relevance in (inputs[i] for i in drawn):
            scores = states @ weight
            if name == "pairs":
                better, worse = (relevance[:, None] > relevance).nonzero().unbind(-1)
                loss = loss + bradley_terry(scores[better], scores[worse]).mean()
            else:
                rankings = sample_rankings(scores, SAMPLES, generator)
                loss = loss + ranking_loss(scores, rankings, ndcg(relevance[rankings], top=1), top=1)
        optimizer.zero_grad()
        torch.autograd.backward([loss / LISTS])
        optimizer.step()
        if update % 25 == 0:
            yield update, weight.detach().clone()


def first_of(weight: Tensor, lists: Sequence[Listed], mean: Tensor, std: Tensor) -> float:
    """nDCG@1."""
    found = [expected_first((listed.states.ends - mean) / std @ weight, listed.relevance) for listed in lists]
    return sum(found) / len(found)


def check(found: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What is claimed, of the means over the seeds."""

    def accuracy(labels: str, name: str) -> float:
        return sum(one[labels]["accuracy"][name] for one in found) / len(found)

    def first(name: str) -> float:
        return sum(one["rank"][name]["ndcg@1"] for one in found) / len(found)

    rule, asked = (max(accuracy(labels, part) for part in PARTS) for labels in ("rule", "asked"))
    return {
        "rule: gated above the best single objective": accuracy("rule", "score") > rule,
        "asked: gated above the best single objective": accuracy("asked", "score") > asked,
        "asked: gated above the plain mean": accuracy("asked", "score") > accuracy("asked", MEAN),
        "rankings: nDCG@1 at least that of pairs": first("rankings") >= first("pairs"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lists", type=int, default=6, help="of each country")
    parser.add_argument("--gate-steps", type=int, default=1000, help="updates of a gate, a multiple of 50")
    parser.add_argument("--steps", type=int, default=100, help="most updates of a head")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    frozen, lists = read(options.lists)
    countries = list(dict.fromkeys(listed.country for listed in lists))
    held = [listed for listed in lists if listed.country in countries[:9]]
    pool = [listed for listed in lists if listed.country not in countries[:9]]
    found: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        train = random.Random(seed).sample(pool, 2 * len(pool) // 3)
        one = {
            "seed": seed,
            "rule": gate(frozen, train, held, "rule", seed, options.gate_steps),
            "asked": gate(frozen, train, held, "asked", seed, options.gate_steps),
            "rank": rank(train, held, seed, options.steps),
        }
        found.append(one)
    by_chance = [(listed.relevance / listed.relevance.max()).mean().item() for listed in held]
    sizes = {"lists": len(lists), "trained on": 2 * len(pool) // 3, "held out": len(held)}
    result = {"sizes": sizes, "ndcg@1 of a random order": sum(by_chance) / len(held), "seeds": found}
    write_claims(options.out, "reward_models", begun, result, check(found))


if __name__ == "__main__":
    main()
