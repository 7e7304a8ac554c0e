"""Imports the objects that a config names, as `package.module:name` or `path/file.py:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

RAISED = (
    SyntaxError,
    ImportError,
    NameError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
)
"""Exceptions of imported plug-in code that become a ValueError with the line."""

IN_MEMORY = "in memory"
"""How the path of a function begins that was given from Python and is in no file that can be imported."""


def load_object(spec: str) -> Any:
    """Imports the module or file of `spec` and returns the object named behind the colon.

    Raises ValueError when the spec has no colon, when the module or file does not exist, and when it has no
    such name (the message names the most similar one). An exception of the imported code itself is passed on.
    """
    where, colon, name = spec.rpartition(":")
    if spec.startswith(IN_MEMORY):
        raise ValueError(
            f"{name} was given from Python as an object, {where}, and no other process can import it: give "
            f"it again, Trainer(..., reward={name}), or write it into a file of its own and set "
            f"reward.functions to [{{path: FILE.py:{name}}}]"
        )
    if not colon or not where or not name:
        raise ValueError(f"expected package.module:name or path/file.py:name, got {spec!r}")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where} has no {name!r}{hint}")
    return getattr(module, name)


def load_plugin(spec: str) -> Any:
    """Like `load_object`, but exceptions of the imported code become a ValueError with file and line."""
    try:
        return load_object(spec)
    except RAISED as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        where = spec.rpartition(":")[0]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(
            f"{where} cannot be imported: {type(error).__name__}: {message}, line {line}"
        ) from error


def absolute(spec: str) -> str:
    """The spec with an absolute file path, valid in any folder. Raises ValueError if the file is missing."""
    where, colon, name = spec.rpartition(":")
    if not where.endswith(".py"):
        return spec
    _check_exists(Path(where))
    return f"{Path(where).resolve()}{colon}{name}"


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path} (looked from {Path.cwd()})")


def _load_file(path: Path) -> ModuleType:
    _check_exists(path)
    name = f"rlhf_plugin_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # the file may import other files in its folder, as it could if it were run as a script
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"there is no module {name!r}: it must be installed or on PYTHONPATH") from None
        raise
