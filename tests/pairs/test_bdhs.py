"""Pairs from a model that does not see: what is kept of the answer, how often it is tried, what counts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.models.vision.images import noise
from rlhf.pairs.bdhs import Hallucinator, Hiding, Written
from rlhf.pairs.files import PairsError
from rlhf.pairs.sentences import beginning, exchange_yes_and_no, sentences_of
from rlhf.pairs.similarity import cosine, load_similarity, ngram_similarity
from rlhf.types import Group, Prompt
from tests.support import trajectory
from tests.vision_models import save_tiny_vlm

GOLD = "Yes, it is. The disc is red! How big?"


def test_sentences_are_the_text_in_parts():
    assert sentences_of(GOLD) == ["Yes, it is.", " The disc is red!", " How big?"]
    for text in ("3.5 is a number. So", "one", " two\n\nthree. \n", "Wait... what?! No."):
        assert "".join(sentences_of(text)) == text.rstrip()
    assert sentences_of("3.5 is a number. So") == ["3.5 is a number.", " So"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Yes, it is.", "No, it is."),
        ("no", "yes"),
        ("\n No one.", "\n Yes one."),
        ("Nobody is.", "Nobody is."),
        ("It is, yes.", "It is, yes."),
    ],
)
def test_yes_is_exchanged_for_no(before: str, after: str):
    assert exchange_yes_and_no(before) == after
    assert exchange_yes_and_no(after) == before


def test_a_sentence_begins_with_none_to_all_but_one_of_its_words():
    found = {beginning(" The disc is red!", random.Random(seed)) for seed in range(60)}
    assert found == {"", " The", " The disc", " The disc is"}
    assert beginning("red", random.Random(0)) == ""


def test_similarity_by_hand(tmp_path: Path):
    # words: one of two in common. Threes: " a ", "a b", " b " and " a ", "a c", " c ", one of three in common
    # dot product 1 + 1, both norms sqrt(2 + 3): 2 / 5
    assert ngram_similarity("a b", "A  c") == pytest.approx(0.4)
    assert ngram_similarity("It is red.", "It is red.") == pytest.approx(1.0)
    assert ngram_similarity("", "red") == 0.0
    # 1 * 3 + 2 * 0 over sqrt(1 + 4) * sqrt(9 + 16) = 3 / (2.236 * 5)
    assert cosine({0: 1.0, 1: 2.0}, {0: 3.0, 2: 4.0}) == pytest.approx(0.26833, abs=1e-5)
    (tmp_path / "mine.py").write_text(
        "def embed(texts):\n    return [[len(t), 1.0] for t in texts]\ndef wrong(texts):\n    return 3\n"
    )
    # (3, 1) and (1, 1): 4 / (sqrt(10) * sqrt(2))
    assert load_similarity(f"{tmp_path}/mine.py:embed")("abc", "d") == pytest.approx(0.89443, abs=1e-5)
    with pytest.raises(PairsError, match=r"wrong must return a vector of numbers for each of two texts"):
        load_similarity(f"{tmp_path}/mine.py:wrong")("a", "b")


class Recorder:
    """Writes a fixed text, and remembers what it was asked."""

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, list[tuple[str, list[int], bool]]()

    def image_places(self, prompt: Prompt) -> list[int]:
        return list(range(1000))

    def write(self, prompt: Prompt, begin: str, hidden: Sequence[int], seed: int, *, whole: bool) -> Written:
        self.asked.append((begin, list(hidden), whole))
        return Written(self.says)


def maker(says: str, similarity: Any, **hiding: Any) -> tuple[Hallucinator, Recorder]:
    rows = trajectory([5], 1.0), trajectory([6], 0.0)
    rows = tuple(replace(row, text=text) for row, text in zip(rows, (GOLD, "a worse one"), strict=True))
    seeing = Group(Prompt("x:1", (1,), "what?", {"topic": "discs"}, (b"picture",)), rows)
    blind = Group(Prompt("x:2", (1,), "what?"), rows)
    recorder: Any = Recorder(says)
    return Hallucinator([seeing, blind], recorder, similarity, Hiding(**hiding), seed=0), recorder


def test_each_sentence_follows_the_gold_ones_before_it():
    hallucinator, recorder = maker(" MADE UP.", lambda a, b: 0.0)
    [pair] = hallucinator.make(0).pairs
    begins = [begin for begin, _, _ in recorder.asked]
    first, second, _ = sentences_of(GOLD)
    assert len(begins[0].split()) < 3
    assert begins[1].startswith(first) and begins[1] != first + second
    assert begins[2].startswith(first + second) and begins[2] != GOLD
    assert not any(whole for _, _, whole in recorder.asked)
    # the model's words stand once for each sentence, behind what was kept of it
    kept = [begins[0], begins[1][len(first) :], begins[2][len(first + second) :]]
    assert pair.rejected == "".join(f"{k} MADE UP." for k in kept)
    assert pair.chosen == GOLD
    assert pair.columns == {"topic": "discs", "similarity": 0.0, "tries": 1}


def test_an_answer_that_is_too_similar_is_tried_again_and_the_last_try_has_no_guide():
    hallucinator, recorder = maker("all by itself", lambda a, b: 0.97)
    made = hallucinator.make(0)
    [pair] = made.pairs
    assert pair.rejected == "all by itself" and pair.columns["tries"] == 5
    # four tries of three sentences, then the whole
    assert [whole for _, _, whole in recorder.asked] == [False] * 12 + [True]
    assert recorder.asked[-1][0] == ""
    hidden = {tuple(hidden) for _, hidden, _ in recorder.asked}
    assert len(hidden) == 5
    assert made.counts["tries"] == 5
    assert made.counts["pairs of the last try, which wrote the whole answer by itself"] == 1
    # just below the threshold the first one does
    [pair] = maker("x", lambda a, b: 0.9699)[0].make(0).pairs
    assert pair.columns["tries"] == 1


@pytest.mark.parametrize(("rho", "mean", "slack"), [(0.0, 0, 0), (1.0, 1000, 0), (0.99, 990, 13)])
def test_the_share_of_tokens_that_is_hidden(rho: float, mean: int, slack: int):
    hallucinator, recorder = maker("x", lambda a, b: 0.0, rho=rho)
    hallucinator.make(0)
    # 1000 tokens: the standard deviation at 0.99 is sqrt(1000 * 0.99 * 0.01) = 3.1
    assert abs(len(recorder.asked[0][1]) - mean) <= slack


def test_what_gives_no_pair_is_counted():
    hallucinator, _ = maker(" ", lambda a, b: 0.0)
    assert hallucinator.make(1).dropped == {"the prompt has no image": 1}
    alone, _ = maker(" ", lambda a, b: 0.0, tries=1)
    assert alone.make(0).dropped == {"the model wrote nothing": 1}
    with pytest.raises(PairsError, match="--rho"):
        Hiding(rho=1.2)
    with pytest.raises(PairsError, match="--tries"):
        Hiding(tries=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees, and two answers about pictures."""
    folder = tmp_path_factory.mktemp("bdhs")
    save_tiny_vlm(folder / "model", "qwen2_vl")
    rows = []
    for seed in range(2):
        picture = noise(24, 16, seed)
        assert isinstance(picture, bytes)
        (folder / f"{seed}.png").write_bytes(picture)
        content = [{"type": "image", "image": f"{seed}.png"}, {"type": "text", "text": "what?"}]
        rows.append({"prompt": [{"role": "user", "content": content}], "completion": GOLD, "number": seed})
    (folder / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder}/model}}\ndata: {{train: {folder}/gold.jsonl}}\n"
    )
    return folder


LIMITS = ["data.max_prompt_tokens=120", "rollout.max_completion_tokens=40"]


def test_the_command_writes_pairs_that_the_project_reads(folder: Path, capsys: pytest.CaptureFixture[str]):
    asked = [str(folder / "model"), "--data", str(folder / "gold.jsonl"), *LIMITS]
    assert main(["pairs", "bdhs", *asked, "--out", str(folder / "a")]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "pairs        2" in told and "counted      2: tries" in told
    by_config = [str(folder / "run.yaml"), "--out", str(folder / "b"), *LIMITS]
    assert main(["pairs", "bdhs", *by_config]) == 0
    lines = [json.loads(line) for line in (folder / "a" / "pairs.jsonl").read_text().splitlines()]
    assert (folder / "a" / "pairs.jsonl").read_bytes() == (folder / "b" / "pairs.jsonl").read_bytes()
    for number, line in enumerate(lines):
        assert line["chosen"] == GOLD != line["rejected"] and line["number"] == number
        assert line["similarity"] == round(ngram_similarity(line["rejected"], GOLD), 6) < 0.97
        image = line["prompt"][0]["content"][0]["image"]
        assert (folder / "a" / image).read_bytes() == (folder / f"{number}.png").read_bytes()
    train = [f"run_dir={folder}/run", f"model.path={folder}/model", f"data.train={folder}/a/pairs.jsonl"]
    config = Path(__file__).parents[2] / "configs" / "dpo.yaml"
    # each sentence may have 40 tokens
    limit = "rollout.max_completion_tokens=140"
    step = ["steps=1", "learner.warmup_steps=0", "rollout.prompts_per_step=2", limit]
    rest = ["data.eval=null", "reward.functions=[]", *step]
    assert main(["train", str(config), *train, *LIMITS, *rest]) == 0, capsys.readouterr().err


def test_what_cannot_be_made_pairs_of_is_refused(
    folder: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text.jsonl").write_text('{"prompt": "what?", "completion": "this"}\n')
    out = ["--out", str(tmp_path / "out"), *LIMITS]

    def refused(*arguments: str) -> str:
        assert main(["pairs", "bdhs", *arguments, *out]) == 2
        return capsys.readouterr().err

    assert "add --data FILE" in refused(str(folder / "model"))
    text = ["--data", str(tmp_path / "text.jsonl")]
    assert "no prompt of" in refused(str(folder / "model"), *text)
    assert "takes no images" in refused(str(tiny_model_dir), *text)
    assert "there is no file nowhere.py" in refused(
        str(folder / "model"), *text, "--similarity", "nowhere.py:f"
    )
    assert not (tmp_path / "out").exists()
