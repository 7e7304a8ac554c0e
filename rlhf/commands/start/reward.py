"""The reward function that `rlhf init --reward FILE.py` writes, with a test of itself."""

from __future__ import annotations

EXAMPLE = r'''"""A reward function. Test it by itself:   python FILE

A config names it with
    reward: {functions: [{path: "FILE:correct"}]}
"""

import re


def correct(completions, answer, **_):
    """One number for each completion: 1 where its last number is the answer of its prompt's row, else 0.

    completions: what the model wrote: a list of chat messages where the prompts are chats, else text.
    answer: the column `answer` of the data, one entry for each completion. Any column can be asked for by its
    name in this way; `**_` takes the others.
    A reward that tells degrees apart teaches more than one that is 0 for nearly everything.
    """
    rewards = []
    for completion, right in zip(completions, answer):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        rewards.append(1.0 if numbers and float(numbers[-1]) == float(right) else 0.0)
    return rewards


def test_correct():
    """Add completions that should score well, and some that should not."""
    cases = [
        ("3 + 5 = 8", 8, 1.0),
        ("8, no, 9", 8, 0.0),
        ("eight", 8, 0.0),
        ([{"role": "assistant", "content": "The answer is 8."}], 8, 1.0),
    ]
    for completion, answer, reward in cases:
        got = correct([completion], [answer])
        assert got == [reward], f"{completion!r} with the answer {answer}: {got}, expected {[reward]}"
    print(f"{len(cases)} completions, each with the reward that is expected")


if __name__ == "__main__":
    test_correct()
'''
"""FILE stands for the name of the file that is written."""
