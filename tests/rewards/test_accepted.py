"""Every kind of function in the table of docs/rewards.md is accepted, and gets its arguments in a worker."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rlhf.rewards.plugin import RewardSpec, load_reward
from rlhf.rewards.scoring import Rewards
from tests.rewards.test_scoring import completions_of, prompt

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"

# by the first cell of the table's row: source, spec, and the scores of "aa" and "b" with answers "a" and "b"
ACCEPTED: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "a function": (
        "def score(completions, answer): return [float(a in c) for c, a in zip(completions, answer)]",
        {},
        [1, 1],
    ),
    "a lambda": ("score = lambda completions: [float(len(c)) for c in completions]", {}, [2, 1]),
    "a `functools.partial`": (
        """
        from functools import partial
        def count(completions, letter, most=9.0): return [min(most, c.count(letter)) for c in completions]
        score = partial(count, letter="a")
        """,
        {"params": {"most": 1.0}},
        [1, 0],
    ),
    "a decorated function": (
        """
        from functools import wraps
        def twice(f):
            @wraps(f)
            def inner(*args, **kwargs): return [2 * s for s in f(*args, **kwargs)]
            return inner
        @twice
        def score(completions, answer): return [float(c == a) for c, a in zip(completions, answer)]
        """,
        {},
        [0, 2],
    ),
    "a bound method": (
        """
        class Box:
            half = 0.5
            def method(self, completions): return [self.half * len(c) for c in completions]
        score = Box().method
        """,
        {},
        [1, 0.5],
    ),
    "a class with `__call__`": (
        """
        class score:
            def __init__(self, factor): self.factor = factor
            def __call__(self, completions): return [self.factor * len(c) for c in completions]
        """,
        {"params": {"factor": 3}},
        [6, 3],
    ),
    "a dataclass with `__call__`": (
        """
        from dataclasses import dataclass
        @dataclass
        class score:
            factor: float = 2.0
            def __call__(self, completions, answer):
                return [self.factor * (c == a) for c, a in zip(completions, answer)]
        """,
        {},
        [0, 2],
    ),
    "an object with `__call__`": (
        """
        from dataclasses import dataclass
        @dataclass
        class Score:
            factor: float
            def __call__(self, completions, answer):
                return [self.factor * (c == a) for c, a in zip(completions, answer)]
        score = Score(4.0)
        """,
        {},
        [0, 4],
    ),
    "an `nn.Module`, class or object": (
        """
        import torch
        class Net(torch.nn.Module):
            def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.tensor(2.0))
            def forward(self, completions):
                return self.scale * torch.tensor([float(len(c)) for c in completions])
        score = Net()
        """,
        {},
        [4, 2],
    ),
    "an `async` function, also behind a partial or as a method": (
        """
        from functools import partial
        async def later(completions, letter): return [float(c.count(letter)) for c in completions]
        score = partial(later, letter="b")
        """,
        {},
        [0, 1],
    ),
    "a function of TRL": (
        """
        def score(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
            log_extra("seen", completions)
            log_metric("right", 1.0)
            assert kwargs.keys() == {"answer", "level"} and kwargs["level"] == [3], kwargs
            return [float(len(ids)) + trainer_state.global_step for ids in completion_ids]
        """,
        {},
        [9, 8],
    ),
    "the `compute_score` of verl": (
        """
        def score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
            return {"score": float(ground_truth in solution_str) + len(extra_info), "acc": 1}
        """,
        {"params": {"ground_truth": "a", "data_source": "mine"}},
        [1, 0],
    ),
    "the batched `compute_score` of verl": (
        """
        def score(data_sources, solution_strs, ground_truths, extra_infos):
            return [{"score": len(s)} for s in solution_strs]
        """,
        {"params": {"ground_truths": ["a"], "data_sources": ["mine"]}},
        [2, 1],
    ),
}


def rows() -> list[str]:
    table = DOCS.read_text().partition("| function | what it gets |\n|---|---|\n")[2].partition("\n\n")[0]
    return [line.strip("| ").partition(" | ")[0] for line in table.splitlines()]


def test_the_table_in_the_docs_is_the_one_that_is_tested() -> None:
    assert rows() == list(ACCEPTED)


def scored(tmp_path: Path, source: str, spec: dict[str, Any], columns: tuple[str, ...]) -> Rewards:
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    return Rewards([RewardSpec(f"{tmp_path}/mine.py:score", workers=1, **spec)], columns)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_it_is_accepted(tmp_path: Path, kind: str) -> None:
    source, spec, expected = ACCEPTED[kind]
    rewards = scored(tmp_path, source, spec, ("answer", "level"))
    prompts = [prompt(1, answer="a", level=3), prompt(2, answer="b", level=3)]
    texts = [["aa"], ["b"]]
    groups, _ = rewards.score(
        prompts, completions_of(prompts, texts), texts, trainer_state={"global_step": 7}
    )
    rewards.close()
    assert [group.rewards for group in groups] == [[value] for value in expected]


ASYNC_METHOD = """
class score:
    async def __call__(self, completions): return [float(len(c)) for c in completions]
"""
ASYNC_COMPUTE_SCORE = """
async def score(data_source, solution_str, ground_truth): return float(len(solution_str))
"""


@pytest.mark.parametrize("source", [ASYNC_METHOD, ASYNC_COMPUTE_SCORE])
def test_an_async_function_of_another_kind_is_awaited(tmp_path: Path, source: str) -> None:
    rewards = scored(tmp_path, source, {}, ("ground_truth", "data_source"))
    prompts, texts = [prompt(1, ground_truth="a", data_source="b")], [["aa", "b"]]
    groups, _ = rewards.score(prompts, completions_of(prompts, texts), texts, trainer_state={})
    rewards.close()
    assert groups[0].rewards == [2.0, 1.0]


def test_text_that_is_not_valid_unicode_can_be_printed_and_logged(tmp_path: Path) -> None:
    source = """
        def score(completions, log_extra):
            print("lone \\ud83d")
            log_extra("seen", ["\\ud83d"])
            return [1.0]
        """
    rewards = scored(tmp_path, source, {}, ())
    rewards.print_to(tmp_path / "rewards.log")
    prompts, texts = [prompt(1)], [["a"]]
    groups, _ = rewards.score(prompts, completions_of(prompts, texts), texts, trainer_state={})
    rewards.close()
    assert groups[0].rewards == [1.0]
    lines = (tmp_path / "rewards.log").read_text().splitlines()
    assert sorted(lines) == ["score: lone \\ud83d", 'score: train.jsonl:1#0 seen: "\\ud83d"']


LACKING = {
    "partial": "from functools import partial\ndef f(completions, gold): return [0.0]\nscore = partial(f)",
    "module": """
        import torch
        class score(torch.nn.Module):
            def forward(self, completions, gold): return [0.0]
        """,
    "kwargs": "def score(completions, **kw): return [float(g in c) for c, g in zip(completions, kw['gold'])]",
    "kwargs of a method": """
        class score:
            def __call__(self, completions, **columns):
                gold = columns["gold"]
                return [float(g in c) for c, g in zip(completions, gold)]
        """,
    "verl": "def score(data_source, solution_str, ground_truth, gold): return 0.0",
}


@pytest.mark.parametrize("kind", LACKING)
def test_a_column_that_every_call_needs_must_be_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"score needs columns .* 'gold' \(did you mean 'golden'\?\)"):
        scored(tmp_path, LACKING[kind], {}, ("golden", "data_source", "ground_truth")).close()
    scored(tmp_path, LACKING[kind], {}, ("gold", "data_source", "ground_truth")).close()


@pytest.mark.parametrize(
    "body",
    [
        "return [1.0] if 'gold' not in kwargs else [float(kwargs['gold'][0])]",
        "return [float(kwargs.get('gold', [0])[0])]",
    ],
)
def test_what_a_function_asks_for_before_it_reads_it_is_not_needed(tmp_path: Path, body: str) -> None:
    rewards = scored(tmp_path, f"def score(completions, **kwargs):\n    {body}", {}, ())
    assert list(rewards.cautions(())) == []
    rewards.close()


def test_what_only_some_calls_read_is_a_caution(tmp_path: Path) -> None:
    source = """
        def score(completions, level, **kwargs):
            if level[0] > 3:
                return [float(kwargs["gold"][0])]
            return [0.0]
        """
    rewards = scored(tmp_path, source, {}, ("level",))
    (caution,) = rewards.cautions(("level",))
    assert re.search(r"score reads 'gold' from its keyword arguments in some calls, but", caution)
    assert list(rewards.cautions(("level", "gold"))) == []
    rewards.close()


COMPARE = {
    "best = max(len(c) for c in completions)": r"max\(\(?len\(c\) for c in completions\)?\) in line 2",
    "best = sorted(set(answer))": r"sorted\(set\(answer\)\)|set\(answer\)",
    "lengths = [len(c) for c in completions]; mean = np.mean(lengths)": r"np\.mean\(lengths\)",
    "t = torch.tensor([len(c) for c in completions]); u = t.std()": r"t\.std\(\)",
    "r = []\n    for c in completions:\n        r.append(len(c))\n    best = max(r)": r"max\(r\) in line 5",
    "pairs = list(itertools.combinations(completions, 2))": r"itertools\.combinations\(completions, 2\)",
}
ALONE = [
    "best = [max(c.split()) for c in completions]",
    "limit = max(weights)",
    "scores = [min(1.0, len(c)) for c in completions]; log_metric('best', max(scores))",
    "words = []\n    for w in completions[0].split():\n        words.append(len(w))\n    best = max(words)",
    "total = sum(len(c) for c in completions) / len(completions)",
]


def reading(tmp_path: Path, line: str) -> str:
    heading = "def score(completions, answer, log_metric=None, weights=(1, 2), **kwargs):"
    (tmp_path / "mine.py").write_text(f"{heading}\n    {line}\n    return [0.0]")
    return load_reward(RewardSpec(f"{tmp_path}/mine.py:score")).signature.compares


@pytest.mark.parametrize("line", COMPARE)
def test_a_function_that_compares_samples_is_noticed(tmp_path: Path, line: str) -> None:
    assert re.search(COMPARE[line], reading(tmp_path, line))


@pytest.mark.parametrize("line", ALONE)
def test_a_function_that_looks_at_each_sample_alone_is_not(tmp_path: Path, line: str) -> None:
    assert reading(tmp_path, line) == ""


def test_the_caution_says_what_to_set(tmp_path: Path) -> None:
    source = "def score(completions): return [len(c) / max(map(len, completions)) for c in completions]"
    rewards = scored(tmp_path, source, {}, ())
    (caution,) = rewards.cautions(())
    assert "seems to compare samples (max(map(len, completions)) in line 1), but each call has one" in caution
    assert "set its batch to group" in caution
    rewards.close()
    rewards = scored(tmp_path, source, {"batch": "group"}, ())
    assert list(rewards.cautions(())) == []
    rewards.close()


VERL = """
def score(data_source, solution_str, ground_truth, extra_info=None, keywords=("x",)):
    assert extra_info == {}, extra_info
    assert keywords == ["please", "a"], keywords
    return float(any(word in solution_str for word in keywords))
"""


def test_a_list_in_params_of_a_verl_function_is_one_argument_and_extra_info_is_never_none(
    tmp_path: Path,
) -> None:
    rewards = scored(
        tmp_path,
        VERL,
        {"params": {"keywords": ["please", "a"]}},
        ("data_source", "ground_truth", "extra_info"),
    )
    prompts = [
        prompt(1, data_source="d", ground_truth="a", extra_info=None),
        prompt(2, data_source="d", ground_truth="b", extra_info={}),
    ]
    for columns in (prompts, [prompt(3, data_source="d", ground_truth="a")]):
        texts = [["aa", "x", "please"]] * len(columns)
        groups, _ = rewards.score(columns, completions_of(columns, texts), texts, trainer_state={})
        assert [group.rewards for group in groups] == [[1.0, 0.0, 1.0]] * len(columns)
    rewards.close()


def test_what_a_function_logs_is_logged(tmp_path: Path) -> None:
    source = """
        def score(completions, trainer_state, log_extra, log_metric):
            log_metric("length", len(completions[0]))
            log_metric("bad", float("nan"))
            log_extra("first letter", [c[:1] for c in completions])
            assert trainer_state.max_steps == 10 and trainer_state.epoch == 2.5
            return [0.0 for c in completions]
        """
    rewards = scored(tmp_path, source, {}, ())
    rewards.print_to(tmp_path / "rewards.log")
    rewards.max_steps, rewards.steps_per_epoch = 10, 2.0
    prompts, texts = [prompt(1)], [["abc", "d"]]
    _, metrics = rewards.score(
        prompts, completions_of(prompts, texts), texts, trainer_state={"global_step": 5}
    )
    rewards.close()
    # lengths 3 and 1
    assert (metrics["reward/score/length"].value, "reward/score/bad" in metrics) == (2.0, False)
    lines = (tmp_path / "rewards.log").read_text().splitlines()
    assert 'score: train.jsonl:1#0 first letter: "a"' in lines
    assert 'score: train.jsonl:1#1 first letter: "d"' in lines
    assert "score: log_metric('bad', nan) is left out: the value is not finite" in lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("log_extra('x', [1, 2])", r"log_extra\('x', ...\) needs 1 values, one a completion, got 2"),
        ("trainer_state.best_metric", "trainer_state has no 'best_metric', only global_step"),
    ],
)
def test_a_wrong_use_says_what_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    source = f"def score(completions, log_extra, trainer_state):\n    {line}\n    return [0.0]"
    rewards = scored(tmp_path, source, {}, ())
    prompts, texts = [prompt(1)], [["abc"]]
    with pytest.raises(RuntimeError, match=message):
        rewards.score(prompts, completions_of(prompts, texts), texts, trainer_state={"global_step": 5})
    rewards.close()
