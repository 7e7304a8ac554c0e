"""Checks of the shapes and types in the package's signatures while tests run.

jaxtyping's own import hook is not used: its wrapper costs about 20 µs a call, and a millisecond each time
that a nested function is defined, which is two thirds of the time of a run of a tiny model. Here only
functions and dataclasses with shapes in their annotations get that wrapper. Other functions are checked by
beartype alone, and nested functions without shapes not at all.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import random
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from jaxtyping import jaxtyped

DECORATOR = "__checked__"
"""The name under which each module has the decorator of its functions and classes."""


def install(package: str) -> None:
    """To be called before the package is imported. Does nothing without beartype."""
    if not find_spec("beartype"):
        return
    # beartype checks one random element of a list, drawn from the generator that it binds when imported. It
    # gets its own one, so that checks, also those in background threads, do not advance the global generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
        beartype: Any = import_module("beartype")
    # without the numeric tower an int would be refused for a float
    typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
    sys.meta_path.insert(0, _Finder(package, lambda thing: _checked(thing, typechecker)))


@dataclasses.dataclass(frozen=True)
class _Finder(MetaPathFinder):
    package: str
    decorator: Callable[[Any], Any]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self.decorator)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, decorator: Callable[[Any], Any]) -> None:
        super().__init__(fullname, path)
        self.decorator = decorator

    def get_code(self, fullname: str) -> Any:
        # not the compiled file in __pycache__, which has no decorators
        tree = _Decorate().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[DECORATOR] = self.decorator
        super().exec_module(module)


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
            # Triton compiles the function itself, and finds names in its globals
            return node
        # innermost: other decorators may hide the annotations
        node.decorator_list.append(_decorator_at(node))
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # outermost: after `dataclass` has made its `__init__`
        node.decorator_list.insert(0, _decorator_at(node))
        return self.generic_visit(node)


def _decorator_at(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Name(DECORATOR, ast.Load()), node)


def _checked(thing: Any, typechecker: Callable[[Any], Any]) -> Any:
    """A function, property or class of the package, with checks when it is called."""
    # tests that compile kernels switch jaxtyping's wrapper off
    if _has_shapes(thing) or _function_of(thing).__module__.startswith("rlhf.kernels."):
        return jaxtyped(thing, typechecker=typechecker)
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            made: Any = thing
            _resolve_inherited_fields(made)
            _drop_unknown_names(made.__init__)
            made.__init__ = typechecker(made.__init__)
        return thing
    function = _function_of(thing)
    if "<locals>" in function.__qualname__:
        return thing
    _drop_unknown_names(function)
    return typechecker(thing)


def _has_shapes(thing: Any) -> bool:
    """Whether a name in its annotations is one of jaxtyping's, or stands for a type made of them."""
    if dataclasses.is_dataclass(thing):
        names = vars(sys.modules[thing.__module__])
        hints = [field.type for field in dataclasses.fields(thing)]
    elif inspect.isclass(thing):
        return False
    else:
        names = _function_of(thing).__globals__
        hints = list(_function_of(thing).__annotations__.values())
    found = {name for hint in hints for name in re.findall(r"\w+", str(hint))}
    return any(type(names.get(name)).__module__.startswith("jaxtyping") for name in found)


def _function_of(thing: Any) -> Any:
    """The function within a property, a class method or a static method; or the function itself."""
    return getattr(thing, "fget", None) or getattr(thing, "__func__", thing)


def _resolve_inherited_fields(made: type) -> None:
    """Types of fields are text, whose names are those of the module in which the field was defined."""
    for base in made.__mro__[1:]:
        for name, hint in inspect.get_annotations(base).items():
            if name in inspect.get_annotations(made) or not isinstance(hint, str):
                continue
            hint = _value(hint, vars(sys.modules[base.__module__]))
            if name in made.__init__.__annotations__:
                made.__init__.__annotations__[name] = hint


def _drop_unknown_names(function: Any) -> None:
    """Leaves out the annotations whose names only a type checker imports."""
    if "TYPE_CHECKING" not in function.__globals__:
        return
    for name, hint in list(function.__annotations__.items()):
        if isinstance(hint, str) and _value(hint, function.__globals__) is Any:
            del function.__annotations__[name]


def _value(hint: str, names: dict[str, Any]) -> Any:
    """What an annotation means; Any where the module does not have its names (yet)."""
    try:
        return eval(hint, names)
    except NameError:
        return Any
