"""docs/errors.md: wrong inputs, and what a person is told of each: what the commands really said."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import main
from tests.conftest import save_tiny_model
from tests.pages.wrong_inputs import WRONG

HEAD = """# What goes wrong, and what you are told

<!-- written by `make docs` from tests/pages/wrong_inputs.py: each message is what the command said -->

Every mistake below is refused before any weights are loaded, with exit status 2 and a sentence on standard
error (under torchrun each rank says it, above torchrun's own report). A traceback is a bug of ours: please
report it. What shows only while a run goes on is in
[troubleshooting.md](troubleshooting.md).

The config that the examples change:

```yaml
{config}```

with `reward.py`

```python
{reward}```
"""
CONFIG: dict[str, Any] = {
    "run_dir": "runs/mine",
    "steps": 10,
    "model": {"path": "./model"},
    "data": {"train": "train.jsonl", "max_prompt_tokens": 64},
    "reward": {"functions": [{"path": "reward.py:short"}]},
    "algorithm": {"name": "grpo"},
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 16},
    "monitor": {"sinks": []},
}
REWARD = """def short(completions, **_):
    return [1.0 / (1 + len(text)) for text in completions]
"""


@dataclass(frozen=True)
class Said:
    """What came of one wrong input."""

    status: int
    text: str


def render(said: Mapping[str, Said]) -> str:
    config = yaml.safe_dump(CONFIG, sort_keys=False, default_flow_style=None, width=110)
    parts = [HEAD.format(config=config, reward=REWARD)]
    topic = ""
    for wrong in WRONG:
        if wrong.topic != topic:
            topic = wrong.topic
            parts.append(f"## {topic}\n")
        parts.append(block(wrong.title, wrong.given, wrong.command, said[wrong.title].text))
    return "\n".join(parts)


def block(title: str, given: str, command: str, text: str) -> str:
    """One mistake, as the page shows it."""
    lines = [
        f"**{title}**" + (f" {given}" if given else ""),
        "",
        "```",
        f"$ {command}",
        text.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


class Bench:
    """A folder with a model, data and a reward, made anew for each mistake."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.numbers = folder, folder / "stock" / "model", count()
        self.model.mkdir(parents=True)
        save_tiny_model(self.model, "llama")

    def try_all(self) -> dict[str, Said]:
        return {wrong.title: self.try_one(wrong.command, wrong.prepare) for wrong in WRONG}

    def try_one(self, command: str, prepare: Callable[[Path], None]) -> Said:
        # each in a folder of its own: a file is imported once a path
        here = self.folder / f"project-{next(self.numbers)}"
        here.mkdir()
        shutil.copytree(self.model, here / "model")
        (here / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
        (here / "reward.py").write_text(REWARD)
        (here / "train.jsonl").write_text("".join(f'{{"prompt": "say {i}:"}}\n' for i in range(8)))
        prepare(here)
        out, err = StringIO(), StringIO()
        with _inside(here), _no_weights(), redirect_stdout(out), redirect_stderr(err):
            status = main(_words(command))
        text = err.getvalue().replace(str(here), "/home/you/project")
        return Said(status, text)


def _words(command: str) -> list[str]:
    """As a shell takes them, without `rlhf`."""
    import shlex

    program, *words = shlex.split(command)
    assert program == "rlhf"
    return words


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _no_weights() -> Iterator[None]:
    """Loading any is a failure, except where tensors have no contents; packages that some have and others
    have not are hidden."""
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    load = kind.from_pretrained

    def refuse(*place: Any, **how: Any) -> Any:
        assert how.get("device_map") == "meta", "weights were loaded"
        return load(*place, **how)

    loader, hidden = kind.__dict__.get("from_pretrained"), {"wandb": sys.modules.get("wandb")}
    kind.from_pretrained = refuse
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if loader is None:
            del kind.from_pretrained
        else:
            kind.from_pretrained = loader
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
