"""The benchmark of made pairs: the share of scenes that the colour tells; where a caption has its number."""

from __future__ import annotations

from pathlib import Path

from benchmarks.made_pairs import batch_of, is_usual, processor_of, scenes_of, write_tokenizer
from benchmarks.small_looker import untaught


def test_the_colour_tells_the_number_in_the_share_that_is_asked_for():
    assert all(is_usual(scene) and not is_usual(scene.swapped()) for scene in scenes_of(5, 20, usual=1.0))
    assert not any(is_usual(scene) for scene in scenes_of(5, 20, usual=0.0))
    # 400 draws at 0.9: a standard deviation of 6 about 360
    assert abs(sum(map(is_usual, scenes_of(9, 400, usual=0.9))) - 360) < 24


def test_the_number_is_the_fourth_token_from_the_end(tmp_path: Path):
    tokenizer = write_tokenizer(tmp_path)
    untaught(tokenizer).config.save_pretrained(tmp_path)
    scenes = scenes_of(0, 12, usual=0.5)
    _, labels = batch_of(scenes, processor_of(tmp_path))
    assert tokenizer.convert_ids_to_tokens(labels[:, -4].tolist()) == [scene.word for scene in scenes]
    assert labels[0, -7] == -100 and tokenizer.convert_ids_to_tokens(labels[0, -6:].tolist())[0] == "There"
