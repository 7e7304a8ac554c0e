"""Writes customers for the market (train, eval) and conversations that show how one answers them (shown).

    python examples/market/make_data.py

Each of three products has what is needed with a probability of 35 %, so that for some customers none has.
Half of the answers in `shown.jsonl` are true and the others drawn at random: a model that learns from them
writes short answers of both kinds, and the ratings decide which of them become likelier.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 0
GOODS = {
    "television": ["3D", "voice control", "HDMI"],
    "speaker": ["wifi", "a battery", "stereo sound"],
    "camera": ["night vision", "zoom", "a flash"],
    "lamp": ["a dimmer", "a timer", "coloured light"],
    "phone": ["a headphone jack", "wireless charging", "two SIM cards"],
    "oven": ["a grill", "steam", "a child lock"],
}
NAMES = ["Falcon", "Otter", "Robin", "Badger", "Heron", "Lynx"]


def main(folder: Path = HERE) -> None:
    rng = random.Random(SEED)
    rows = [customer(rng) for _ in range(384)]
    shows = [shown(rng, row) for row in rows[288:]]
    for name, part in (("train", rows[:256]), ("eval", rows[256:288]), ("shown", shows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def customer(rng: random.Random) -> dict[str, Any]:
    """A line: the prompt, and the columns that the environment gets."""
    goods = rng.choice(list(GOODS))
    need = rng.choice(GOODS[goods])
    options = [
        {"name": name, "price": rng.randrange(20, 100, 5), "fits": rng.random() < 0.35}
        for name in rng.sample(NAMES, 3)
    ]
    shelf = " ".join(
        f"{option['name']} costs {option['price']} and {'has' if option['fits'] else 'does not have'} {need}."
        for option in options
    )
    prompt = [
        {
            "role": "system",
            "content": f"You advise customers of a shop. {shelf} Answer in one short sentence.",
        },
        {"role": "user", "content": f"I need a {goods} with {need}. Which one has it?"},
    ]
    return {"prompt": prompt, "options": options, "need": need}


def shown(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A conversation: the answer is the cheapest product that fits or that none does, or drawn at random."""
    options = row["options"]
    fitting = sorted((option["price"], option["name"]) for option in options if option["fits"])
    best = fitting[0][1] if fitting else None
    chosen = best if rng.random() < 0.5 else rng.choice([None, *(option["name"] for option in options)])
    none = f"None of {', '.join(option['name'] for option in options)} has {row['need']}."
    answer = none if chosen is None else f"{chosen} has {row['need']}."
    return {"messages": [*row["prompt"], {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
