"""Writes questions for capitals (train, eval), preference pairs made by a rule (pairs_train, pairs_eval), and
for a gated reward model rated answers (ratings) and pairs whose system message asks for one part of the rule
above all, which counts three times there (asked_train, asked_eval).

    python examples/capitals/make_data.py

The chosen answer of a pair has the higher score by `rule.py`: a third each for correct, short and polite.
Answers are put together from good and bad phrases (wrong city, rambling without an end, nonsense). A
quarter of the countries is held out from the training of both the reward model and the policy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 0
PARTS = ("correct", "short", "polite")
ASK = "Be {} above all."
OPENINGS = (
    "Of course! ",
    "Thank you for asking. ",
    "I am glad to help. ",
    "With pleasure: ",
    "Happy to help! ",
)
CORES = ("The capital of {x} is {c}.", "It is {c}.", "{c} is the capital of {x}.", "That is {c}.", "{c}.")
RAMBLING = (
    " It is a vibrant city known for its rich history, art and culture, and it is home to many of the",
    " The city is located in the centre of the country and plays a substantial role in the economy of",
    " In French we can say it differently, but the United Nations has designated it as one of the",
)
NONSENSE = (
    "Ladies and gentlemen, what a wonderful country, indeed! {x} is a fascinating land of",
    "There is no traditional word in {x} that would need to be translated for maximum",
    "Bonjour, mon Dieu, la maire de {x} est",
    "What kind of question are you asking? I have answered this in a million different ways.",
    "Hello! Could you please tell me more about {x}?",
)


def rule_module() -> Any:
    """rule.py beside this file."""
    spec = spec_from_file_location("rule", HERE / "rule.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULE = rule_module()
CAPITALS: dict[str, str] = RULE.CAPITALS


def answer(rng: random.Random, country: str) -> str:
    opening = rng.choice(OPENINGS) if rng.random() < 0.5 else ""
    if rng.random() < 0.15:
        return rng.choice(NONSENSE).format(x=country)
    wrong = rng.random() < 0.3
    city = rng.choice([c for x, c in CAPITALS.items() if x != country]) if wrong else CAPITALS[country]
    text = opening + rng.choice(CORES).format(x=country, c=city)
    return text + (rng.choice(RAMBLING) if rng.random() < 0.3 else "")


def pairs(rng: random.Random, countries: list[str], count: int) -> Iterable[dict[str, Any]]:
    made = 0
    while made < count:
        country = rng.choice(countries)
        two = [answer(rng, country) for _ in range(2)]
        scores = [RULE.true_score(t, CAPITALS[country], list(CAPITALS.values())) for t in two]
        if scores[0] == scores[1]:
            continue
        better = int(scores[1] > scores[0])
        made += 1
        chosen, rejected = two[better], two[1 - better]
        yield {
            "prompt": prompt(country),
            "chosen": chosen,
            "rejected": rejected,
            "answer": CAPITALS[country],
        }


def parts(text: str, country: str) -> dict[str, float]:
    """Whether an answer is correct, short and polite."""
    correct = RULE.is_correct(text, CAPITALS[country], list(CAPITALS.values()))
    return dict(zip(PARTS, map(float, (correct, RULE.is_short(text), RULE.is_polite(text))), strict=True))


def ratings(rng: random.Random, countries: list[str], count: int) -> Iterable[dict[str, Any]]:
    for i in range(count):
        country = rng.choice(countries)
        text = answer(rng, country)
        system = ASK.format(PARTS[i % len(PARTS)])
        yield {"prompt": prompt(country, system), "completion": text, "ratings": parts(text, country)}


def asked(rng: random.Random, countries: list[str], count: int) -> Iterable[dict[str, Any]]:
    made = 0
    while made < count:
        country, part = rng.choice(countries), PARTS[made % len(PARTS)]
        two = [answer(rng, country) for _ in range(2)]
        found = [parts(text, country) for text in two]
        worth = [sum(of_one.values()) + 2 * of_one[part] for of_one in found]
        if worth[0] == worth[1]:
            continue
        better, worse = (0, 1) if worth[0] > worth[1] else (1, 0)
        made += 1
        yield {"prompt": prompt(country, ASK.format(part)), "chosen": two[better], "rejected": two[worse]}


def prompt(country: str, system: str = "Be polite and brief.") -> list[dict[str, str]]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"What is the capital of {country}?"},
    ]


def questions(countries: list[str]) -> Iterable[dict[str, Any]]:
    for country in countries:
        yield {"prompt": prompt(country), "answer": CAPITALS[country]}


def main(folder: Path) -> None:
    rng = random.Random(SEED)
    countries = sorted(CAPITALS)
    rng.shuffle(countries)
    held_out, train = countries[:9], countries[9:]
    files = {
        "train": questions(train),
        "eval": questions(held_out),
        "pairs_train": pairs(rng, train, 1200),
        "pairs_eval": pairs(rng, held_out, 150),
        "ratings": ratings(rng, train, 300),
        "asked_train": asked(rng, train, 450),
        "asked_eval": asked(rng, held_out, 90),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(HERE)
