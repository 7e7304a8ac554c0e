"""Reward `code`: runs the program in a completion in the sandbox; the score is the share of tests passed.

The program is the last fenced block of the completion (```python ... ```, also `python3`, `py`, or without a
language), or the whole completion when there is none. The column `tests` holds either Python code that raises
when something is wrong (asserts; the code is appended to the program), or a list of
`{"input": ..., "output": ...}`: what the program reads from standard input and what it must print.
`rlhf/sandbox/runner.py` runs the programs.
"""

from __future__ import annotations

import logging
import re
import secrets
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rlhf.rewards.builtin import Completion, completion_text
from rlhf.sandbox.enclosure import LEVELS
from rlhf.sandbox.runner import PROTECTS, Limits, isolation, run_python

logger = logging.getLogger(__name__)

OPENING = re.compile(r"(`{3,}|~{3,})[ \t]*([^\s`~]*)[^`~]*$")
"""The fence that opens a block, with the language; anything may follow the language."""
LANGUAGE = re.compile(r"(?:py(?:thon)?[\d.]*)?", re.IGNORECASE)
"""The languages of programs: python, Python3, py, or none."""


class CodeReward:
    """Scores each completion with the share of its tests that pass; all asserts together are one test."""

    def __init__(self, seconds: float = 5.0, memory_mib: int = 512, allow_limits_only: bool = False) -> None:
        """`seconds` is the limit of one test: the function's `timeout` must leave time for all of a sample.

        Logs how well the sandbox isolates programs on this system. Raises RuntimeError where the system
        allows no namespaces, unless `allow_limits_only` says that programs may run without.
        """
        self.limits = Limits(seconds=seconds, memory_mib=memory_mib)
        level = isolation()
        logger.warning("generated programs run at isolation level %r: %s", level, PROTECTS[level])
        if level == LEVELS[-1] and not allow_limits_only:
            raise RuntimeError(
                f"programs would run with {PROTECTS[level]}. Run in a container or on a machine that allows "
                "user namespaces, put a sandbox behind the reward remote, or set params: "
                "{allow_limits_only: true} where the programs may do all that you may do"
            )

    def __call__(
        self, completions: Sequence[Completion], tests: Sequence[str | Sequence[Mapping[str, str]]]
    ) -> list[float]:
        return [
            self.share_passed(program_of(completion_text(completion)), checks)
            for completion, checks in zip(completions, tests, strict=True)
        ]

    def share_passed(self, program: str, tests: str | Sequence[Mapping[str, str]]) -> float:
        """Share of `tests` that `program` passes. Raises ValueError for an empty list of tests."""
        if isinstance(tests, str):
            return float(self._asserts_hold(program, tests))
        if not tests:
            raise ValueError("a sample without tests cannot be judged: its column 'tests' is an empty list")
        return sum(self._prints(program, test) for test in tests) / len(tests)

    def _asserts_hold(self, program: str, tests: str) -> bool:
        """Whether all asserts pass and are reached: a program that exits before them has passed none.

        A random word printed after the tests proves that they were reached; it is new every time, so that a
        program cannot know it. (It stands in the program's own file: a program that reads this file, or that
        redefines `==`, can cheat.)
        """
        done = secrets.token_hex(16)
        result = run_python(f"{program}\n\n{tests}\nprint({done!r})\n", self.limits)
        return result.status == 0 and not result.ended and result.output.rstrip().endswith(done)

    def _prints(self, program: str, test: Mapping[str, str]) -> bool:
        result = run_python(program, self.limits, standard_input=str(test["input"]))
        expected = [line.rstrip() for line in str(test["output"]).rstrip().splitlines()]
        printed = [line.rstrip() for line in result.output.rstrip().splitlines()]
        return result.status == 0 and not result.ended and printed == expected


def program_of(text: str) -> str:
    """The program in a completion: its last fenced block, or the whole text if there is no block.

    Blocks of other languages do not count. A block's indentation, as in a list, is taken off.
    """
    text = text.replace("\r\n", "\n")
    programs = [code for language, code in _blocks(text) if LANGUAGE.fullmatch(language)]
    return programs[-1] if programs else text


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block that is closed; a fence may stand behind text in its line."""
    fence, language, indent = "", "", 0
    content: list[str] = []
    for line in text.split("\n"):
        if not fence:
            opening = OPENING.search(line)
            if opening:
                fence, language = opening[1], opening[2]
                indent, content = len(line) - len(line.lstrip()), []
        elif line.strip().startswith(fence) or line.rstrip().endswith(fence):
            last = "" if line.strip().startswith(fence) else line.rstrip().rstrip(fence[0])
            code = "\n".join([*content, last] if last else content) + "\n"
            # dedent would also change lines of white space, so only what needs it gets it
            yield language, textwrap.dedent(code) if code.lstrip("\n")[:1].isspace() else code
            fence = ""
        else:
            content.append(line[min(indent, len(line) - len(line.lstrip())) :])
