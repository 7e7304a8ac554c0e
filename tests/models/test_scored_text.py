"""How completions are written for reward models: what is scored, and that a saved model is read so too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.models.pretrained import load_tokenizer
from rlhf.models.scored_text import AtEnd, AtSteps, OfTwo, form_of


def test_what_each_form_writes_and_where_it_is_scored(tiny_model_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_model_dir))
    end = tokenizer.eos_token

    def read(written: tuple[list[int], list[int]]) -> tuple[str, list[str]]:
        """The text, and the text up to each place that is scored."""
        ids, places = written
        return tokenizer.decode(ids), [tokenizer.decode(ids[: place + 1]) for place in places]

    assert read(AtEnd().write(tokenizer, "so")) == (f"so{end}", [f"so{end}"])
    text = f"a;\nbc;\nd{end}"
    # empty parts are no steps, at the end and within
    for given in ("a;\nbc;\nd", "a;\n;\nbc;\nd;\n"):
        assert read(AtSteps(";\n").write(tokenizer, given)) == (text, ["a;\n", "a;\nbc;\n", text])
    assert read(AtSteps(";\n").write(tokenizer, "")) == (end, [end])
    assert read(OfTwo().write(tokenizer, "a", "b")) == (f"a{end}b{end}", [f"a{end}b{end}"])


def test_a_saved_config_names_the_form() -> None:
    for form in (AtEnd(), AtSteps("\n\n"), OfTwo()):
        config = SimpleNamespace(to_dict=lambda form=form: {"architectures": ["x"], **form.entries})
        assert form_of(config) == form
    assert form_of(SimpleNamespace(to_dict=dict)) is None
