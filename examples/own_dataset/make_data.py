"""Makes a dataset in three forms: jsonl, parquet, and a saved folder of the `datasets` library.

    python examples/own_dataset/make_data.py FOLDER

A row needs a prompt: plain text, or a list of chat messages, to which the model's chat template is applied.
Every further column, here `answer` and `level`, is handed to the reward functions by its name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset


def rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [
                {"role": "user", "content": f"Write {n} in Roman numerals. Reply with the numeral only."}
            ],
            "answer": roman(n),
            "level": len(roman(n)),
        }
        for n in range(1, 60)
    ]


def roman(n: int) -> str:
    numeral = ""
    for value, letters in ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        numeral += letters * (n // value)
        n %= value
    return numeral


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = rows()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[::2]))
    Dataset.from_list(made[1::2]).to_parquet(str(folder / "eval.parquet"))
    Dataset.from_list(made).save_to_disk(str(folder / "all"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
