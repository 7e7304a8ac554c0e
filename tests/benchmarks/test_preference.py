"""The comparison with TRL's DPOTrainer: its pairs, its checks and its arithmetic."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.preference import SEED, Variant, check, make_pairs, run_tandem, summary
from rlhf.data.order import order

WORDS = [first + "ox" for first in "abcdefghijklmno"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each of the words is one token together with the space before it."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], show_progress=False)
    backend.train_from_iterator([" " + " ".join(WORDS)] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def record(seconds: float, loss: float, peak: float, **more: Any) -> dict[str, Any]:
    return {"step_s": seconds, "learn_s": seconds, "sync_s": 0.0, "loss": loss, "grad_norm": 1.0} | {
        "peak_gib": peak,
        **more,
    }


def test_pairs_have_exactly_the_tokens_asked_for_alone_and_behind_their_prompt() -> None:
    tokenizer = word_tokenizer()
    lines, pairs = make_pairs(tokenizer, 46, 5)
    assert len(lines) == len(pairs) == 5
    for line, (prompt, chosen, rejected) in zip(lines, pairs, strict=True):
        assert (len(prompt), len(chosen), len(rejected)) == (46, 16, 16)
        assert tokenizer(line["prompt"]).input_ids == prompt
        for side, ids in (("chosen", chosen), ("rejected", rejected)):
            assert [*tokenizer(line[side]).input_ids, tokenizer.eos_token_id] == ids
        # no word is both in a chosen and in a rejected completion: only the end of sequence
        assert sorted(set(chosen) & set(rejected)) == [tokenizer.eos_token_id]


def test_the_order_of_pairs_within_a_step_is_free_and_other_pairs_are_refused() -> None:
    pairs = [([1], [2], [3]), ([4], [5], [6])]
    taken = record(1.0, 0.5, 2.0, pairs=[[[4], [5], [6]], [[1], [2], [3]]], threads=2)
    assert check("tandem 64", taken, pairs, 2) == record(1.0, 0.5, 2.0)
    with pytest.raises(SystemExit, match="trl 16 did not learn from the pairs of this step"):
        # chosen and rejected exchanged
        check("trl 16", taken | {"pairs": [[[1], [3], [2]], [[4], [5], [6]]]}, pairs, 2)
    with pytest.raises(SystemExit, match="trl 16 computes with 1 threads, the other sides with 2"):
        check("trl 16", taken | {"threads": 1}, pairs, 2)


def test_speed_memory_and_losses_are_compared_without_the_first_step() -> None:
    found = summary(
        {
            # medians without the first step: (7 + 9) / 2 = 8 and (10 + 14) / 2 = 12; the pass before training
            # took 9 s for three steps, 3 each: (12 + 3) / 8
            "tandem 64": [record(90, 0.69, 2.0), record(7, 0.60, 3.0), record(9, 0.5, 2.5)],
            "trl 16+precompute": [
                record(50, 0.69, 5.0, precompute_s=9.0),
                record(10, 0.59, 6.0, precompute_s=9.0),
                record(14, 0.5, 6.0, precompute_s=9.0),
            ],
        }
    )
    (compared,) = found["compared"]
    assert compared["times_faster"] == 1.5
    assert compared["times_faster_with_precomputing"] == 1.88
    assert compared["share_of_peak"] == 0.5
    assert compared["largest_loss_difference"] == pytest.approx(0.01)
    assert found["sides"]["tandem 64"]["step_s_range"] == [7, 9]


@pytest.mark.parametrize(
    ("who", "text", "reason"),
    [
        ("trl", "5", "expected a size that divides 16"),
        ("trl", "4+faster", "words out of checkpointing, compact_head, keeps_memory, precompute"),
        ("tandem", "many", "expected a size and words out of precompute"),
    ],
)
def test_a_wrong_variant_is_refused_with_what_is_expected(who: str, text: str, reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        Variant.read(who, text, 16)
    assert Variant.read("trl", "4+precompute", 16) == Variant("trl", 4, ("precompute",))
    assert Variant.read("trl", "4+precompute", 16).name == "trl 4+precompute"


def test_this_project_learns_from_the_pairs_in_the_order_that_trl_is_given(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": f"say {n}:", "chosen": "a" * (n + 1), "rejected": "b"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"folder": str(tmp_path), "name": "run", "model": str(tiny_model_dir), "words": []}
    sizes = {"steps": 2, "pairs": 3, "prompt_tokens": 8, "microbatch": 64, "lr": 1e-3}
    monkeypatch.setattr("sys.stdin", StringIO("step\nstep\n"))
    run_tandem(settings | sizes)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("STEP ")]
    first, second = (json.loads(line.removeprefix("STEP ")) for line in printed)
    # both completions are as likely as under the reference, so -log sigmoid(0) = log 2
    assert first["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert second["loss"] < first["loss"]
    # the six pairs differ in how long the chosen completion is, with its end-of-sequence token
    drawn = [2 + place for place in order(SEED, 6, 0, 6)]
    for step, learned in enumerate((first, second)):
        assert sorted(len(chosen) for _, chosen, _ in learned["pairs"]) == sorted(
            drawn[3 * step : 3 * step + 3]
        )
