"""What `Trainer` is given as Python objects, reward functions and rows, put where the settings name it.

RUN/config.yaml then says what the run had:

* rows are written to RUN/data/train-DIGEST.jsonl, once; the digest is of their text, so other rows are
  another file, and a resumed run says so;
* a function at the top level of a module is `path/file.py:name`, or `package.module:name` within a package;
* any other function (of the script that runs, of a notebook, a lambda) goes to the workers as a pickle that
  has the function itself in it. Its path is `in memory (SCRIPT):name`, which says where it was; without the
  object such a path is refused (`rlhf.plugins.load_object`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlhf.config.load import make_config
from rlhf.config.overrides import read_settings
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.files import write_atomically
from rlhf.monitoring.run_folder import RunFolder
from rlhf.plugins import IN_MEMORY
from rlhf.rewards.plugin import name_apart

Function = Callable[..., Any] | str | Mapping[str, Any]
"""A reward function, or an entry of `reward.functions`, whose `path` may be the function itself."""
# not of Mapping[str, Any]: a Dataset does not say that its rows are
Rows = Iterable[Any]
"""Rows of a dataset: a list of dicts, or a `datasets.Dataset`."""


def with_objects(
    given: Config | Mapping[str, Any] | str | Path,
    reward: Function | Sequence[Function] | None = None,
    train: object = None,
    eval_rows: object = None,
) -> tuple[Config, Mapping[str, bytes]]:
    """The settings with the objects in place of `reward.functions`, `data.train` and `data.eval`, and the
    pickles of the functions that are in memory only, by their paths.

    Raises ConfigError: a setting is wrong, a function cannot be pickled, rows cannot be written as JSON; and
    RunFolderError: rows cannot be put into the run folder, because there is a run or something else.
    """
    if isinstance(given, Config) and reward is None and train is None and eval_rows is None:
        return given, {}
    settings = given.to_dict() if isinstance(given, Config) else read_settings(given)
    pickles: dict[str, bytes] = {}
    if reward is not None:
        one = callable(reward) or isinstance(reward, str | Mapping)
        listed = [reward] if one else reward
        _section(settings, "reward")["functions"] = _functions(cast(Sequence[Function], listed), pickles)
    rows = {"train": train, "eval": eval_rows}
    texts = {name: _text(name, found) for name, found in rows.items() if found is not None}
    paths = {name: _path(settings, name, text) for name, text in texts.items()}
    if paths:
        _section(settings, "data").update({name: str(path) for name, path in paths.items()})
    config = make_config(settings)
    for name, path in paths.items():
        _write(config, path, texts[name])
    return config, pickles


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section: object = settings.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name} must be a section of settings, got {section!r:.80}")
    return cast(dict[str, Any], section)


def _functions(given: Sequence[Function], pickles: dict[str, bytes]) -> list[dict[str, Any]]:
    """The entries of `reward.functions`; adds to `pickles` what is in memory only."""
    entries: list[dict[str, Any]] = [
        dict(cast(Mapping[str, Any], one)) if isinstance(one, Mapping) else {"path": one} for one in given
    ]
    objects = [entry["path"] for entry in entries if callable(entry.get("path"))]
    unnamed = [function for function in objects if _spec(function) is None]
    names = iter(name_apart([_name(function) for function in unnamed]))
    for entry in entries:
        function = entry.get("path")
        if callable(function):
            path = _spec(function)
            if path is None:
                path = f"{IN_MEMORY} ({_origin(function)}):{next(names)}"
                pickles[path] = _pickle(function)
            entry["path"] = path
    return entries


def _spec(function: Callable[..., Any]) -> str | None:
    """How another process finds the function, as `load_object` reads it; None: it cannot.

    Not where it is in the script that runs: to import that would run it once more.
    """
    name: str = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or getattr(module, name, None) is not function:
        return None
    return _spec_in(module, name)


def _spec_in(module: ModuleType, name: str) -> str | None:
    file = module.__file__
    if file is None:
        return None
    if module.__package__ or not file.endswith(".py"):
        return f"{module.__name__}:{name}"
    return f"{Path(file).resolve()}:{name}"


def _base(function: Callable[..., Any]) -> Any:
    """What has name and source: the function within decorators and `functools.partial`; of an object its
    class."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if hasattr(function, "__name__") else type(function)


def _name(function: Callable[..., Any]) -> str:
    """`lambda` for a lambda: names of metrics have no signs."""
    return re.sub(r"\W", "", _base(function).__name__) or "function"


def _origin(function: Callable[..., Any]) -> str:
    try:
        file = Path(inspect.getfile(_base(function)))
    except (TypeError, OSError):
        file = Path()
    return str(file.resolve()) if file.is_file() else "notebook or prompt"


def _pickle(function: Callable[..., Any]) -> bytes:
    # it comes with `datasets`; pickle itself has only names of functions
    import dill  # pyright: ignore[reportMissingTypeStubs]

    try:
        return cast(Any, dill).dumps(function, recurse=True)
    # whatever the objects raise that the function holds
    except Exception as error:
        raise ConfigError(
            f"the reward function {_name(function)} cannot be sent to its worker processes "
            f"({type(error).__name__}: {error}): write it into a file, with all that it needs, and give the "
            "path, as my_reward.py:name"
        ) from None


def _text(name: str, rows: Any) -> str:
    """The rows as lines of JSON. Raises ConfigError for what is no row, or has a value that JSON lacks."""
    given: object = rows
    if not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
        raise ConfigError(
            f"{name} must be rows (a list of dicts, a datasets.Dataset), got {type(given).__name__} "
            f"{given!r:.60}; a path goes into data.{name}, and of several splits one is given"
        )
    lines: list[str] = []
    for number, row in enumerate(cast(Iterable[object], rows), start=1):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{name}, row {number}: expected a dict, got {type(row).__name__} {row!r:.80}")
        columns = dict(cast(Mapping[str, Any], row))
        try:
            lines.append(json.dumps(columns, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}, row {number}: it cannot be written as JSON ({error}); numbers, texts, lists and "
                f"dicts can. For a datasets.Dataset with images: dataset.save_to_disk(FOLDER) and "
                f"data.{name}=FOLDER"
            ) from None
    return "".join(lines)


def _path(settings: Mapping[str, Any], name: str, text: str) -> Path:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return RunFolder(Path(str(settings.get("run_dir"))).expanduser()).data / f"{name}-{digest}.jsonl"


def _write(config: Config, path: Path, text: str) -> None:
    """Writes rows into the run folder unless they are there: every rank comes here, and a resumed run."""
    folder = RunFolder(Path(config.run_dir).expanduser())
    folder.assert_ours()
    if config.checkpoint.resume != "auto":
        folder.assert_no_run()
    if path.is_file():
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    # first: it shows the other ranks too that the folder is that of a run
    folder.lock.touch()
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text)
