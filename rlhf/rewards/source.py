"""What the source of a reward function says beyond its signature: entries of `**kwargs`, and comparisons.

    def score(completions, **kwargs):
        longest = max(len(c) for c in completions)       # compares: it needs several samples in a call
        return [len(c) / longest * a for c, a in zip(completions, kwargs["answer"])]     # needs `answer`

Only what is plain to see is found: a function without a source, or one that passes `kwargs` on, is not
looked into.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

PAIRING = {"combinations", "permutations", "pairwise", "product"}
COMPARING = PAIRING.union(
    (
        "max",
        "min",
        "mean",
        "fmean",
        "median",
        "quantile",
        "std",
        "stdev",
        "pstdev",
        "var",
        "zscore",
        "softmax",
    ),
    ("sorted", "argsort", "argmax", "argmin", "rank", "set", "Counter"),
)
"""Functions and methods whose value for a list depends on all its entries together."""
MAKING = {"zip", "list", "tuple", "enumerate", "map", "array", "asarray", "tensor", "Series"}
"""Functions that make a list or array with the entries of their arguments."""
LOGGING = {"print", "log_metric", "log_extra", "info", "debug", "warning", "log"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What the source says."""

    always: tuple[str, ...] = ()
    """Entries of `**kwargs` that every call reads."""
    perhaps: tuple[str, ...] = ()
    """Entries of `**kwargs` that some calls read."""
    compares: str = ""
    """The first expression that compares samples; empty: none was found."""


def read_source(called: Callable[..., Any], batch_arguments: Iterable[str]) -> Reading:
    """Reads the function's source; `batch_arguments` are its arguments with an entry for each sample."""
    function = _function(called)
    if function is None:
        return Reading()
    compares = next(_comparisons(function, set(batch_arguments)), "")
    if function.args.kwarg is None:
        return Reading(compares=compares)
    name = function.args.kwarg.arg
    body = [ast.Expr(function.body)] if isinstance(function, ast.Lambda) else function.body
    asked_for = {
        node.left.value
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and _names(name, node)
    }
    always = [key for key in _always(body, name) if key not in asked_for]
    every = [key for key in _entries(function, name) if key not in asked_for]
    return Reading(tuple(dict.fromkeys(always)), tuple(dict.fromkeys(set(every) - set(always))), compares)


def _function(called: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None:
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(called))
        tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), max(0, first - 1))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return next((node for node in ast.walk(tree) if isinstance(node, kinds)), None)


def _names(name: str, node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _entries(node: ast.AST, kwargs: str) -> Iterator[str]:
    """The keys of `kwargs["key"]` in a piece of source, apart from those that are assigned."""
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Subscript)
            and isinstance(part.value, ast.Name)
            and part.value.id == kwargs
            and isinstance(part.ctx, ast.Load)
            and isinstance(part.slice, ast.Constant)
            and isinstance(part.slice.value, str)
        ):
            yield part.slice.value


def _always(body: Iterable[ast.stmt], kwargs: str) -> Iterator[str]:
    """The keys that are read whatever the values are: up to the first branch, and in no part of a branch."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _always(statement.body, kwargs)
        elif isinstance(statement, ast.For):
            yield from _entries(statement.iter, kwargs)
        elif isinstance(
            statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return | ast.Assert
        ):
            if not any(isinstance(part, ast.IfExp | ast.BoolOp | ast.Lambda) for part in ast.walk(statement)):
                yield from _entries(statement, kwargs)
        elif not isinstance(statement, ast.FunctionDef | ast.Import | ast.ImportFrom | ast.Pass):
            # what follows may be skipped by a return inside
            return


def _comparisons(
    function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, batch: set[str]
) -> Iterator[str]:
    """Calls such as `max(...)` of a list with an entry for each sample.

    Such lists are the arguments in `batch`, what is assigned from a comprehension over one of them, and what
    a loop over one of them appends to.
    """
    calls: list[ast.Call] = []
    for node in _in_order(function):
        if isinstance(node, ast.Assign) and _is_batch(node.value, batch):
            batch |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.For) and _is_batch(node.iter, batch):
            batch |= _appended_to(node)
        if isinstance(node, ast.Call):
            calls.append(node)
    for call in calls:
        method_of = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        compared = call.args[:1] if len(call.args) == 1 or _called(call) in PAIRING else []
        if _called(call) in COMPARING and any(_is_batch(part, batch) for part in compared + method_of):
            yield f"{ast.unparse(call)} in line {call.lineno}"


def _appended_to(loop: ast.For) -> set[str]:
    """Names of the lists that a loop appends to in each round."""
    values = [statement.value for statement in loop.body if isinstance(statement, ast.Expr)]
    methods = [call.func for call in values if isinstance(call, ast.Call) and _called(call) == "append"]
    owners = [method.value for method in methods if isinstance(method, ast.Attribute)]
    return {owner.id for owner in owners if isinstance(owner, ast.Name)}


def _called(call: ast.Call) -> str:
    """The name of the called function or method; empty for another expression."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, first to last, without those inside a call that only logs."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Call) and _called(child) in LOGGING):
            yield child
            yield from _in_order(child)


def _is_batch(node: ast.expr, batch: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in batch
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
        return any(_is_batch(part.iter, batch) for part in node.generators)
    if isinstance(node, ast.Call) and _called(node) in MAKING:
        return any(_is_batch(argument, batch) for argument in node.args)
    return False
