"""What third-party verifiers may evaluate of a text that a policy wrote: values and formulas, never code.

reasoning-gym calls `eval` on answers (string_insertion, spiral_matrix, binary_matrix, n_queens) and sympy's
`parse_expr`, which is `eval` too (countdown, puzzle24, integration, polynomials). `guard_library` puts
functions in their place that look at the syntax tree first.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from typing import Any

VALUES = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load,
    ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator,
)  # fmt: skip
FORMULAS = (
    ast.Expression, ast.Constant, ast.Name, ast.Call, ast.Tuple, ast.Load,
    ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator,
)  # fmt: skip
ALSO_CALLED = {"sqrt", "cbrt", "root", "ln", "Rational", "Integer", "Float"}
"""Functions of sympy that a formula may call and that are not subclasses of `sympy.Function`."""
LARGEST_POWER = 10_000
"""Exponents and shifts beyond it are refused: 9**9**9 would be computed to its last digit."""


class NotAnExpression(ValueError):
    """A text that is more, or other, than a value or a formula."""


def value_of(text: Any) -> Any:
    """`eval` for values alone: numbers, text, lists, dictionaries, and arithmetic with numbers.

    Raises NotAnExpression for names, calls and attributes, SyntaxError for what Python cannot read.
    """
    tree = ast.parse(str(text).strip(), mode="eval")
    _check(tree, VALUES)
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def formula_reader(parse_expr: Callable[..., Any]) -> Callable[..., Any]:
    """sympy's `parse_expr` for formulas alone: numbers, symbols, arithmetic, and functions of mathematics.

    Raises NotAnExpression for anything else.
    """

    def read(text: Any, *positional: Any, **named: Any) -> Any:
        # factorials and repeating decimals are no Python; what stands beside them is still looked at
        plain = re.sub(r"!|(?<=\d)\[(\d+)\]", "", str(text)).strip()
        try:
            tree = ast.parse(plain, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise NotAnExpression(f"{str(text)!r:.200} is no formula") from None
        _check(tree, FORMULAS)
        return parse_expr(text, *positional, **named)

    return read


def guard_library(package: str) -> None:
    """Replaces `eval` and `parse_expr` in all loaded modules of `package`, and `sympy.parse_expr`.

    For a worker process: what it replaces in sympy holds for everything in the process.
    """
    import sympy  # pyright: ignore[reportMissingTypeStubs]
    from sympy.parsing.sympy_parser import parse_expr  # pyright: ignore

    read = formula_reader(parse_expr)
    setattr(sympy, "parse_expr", read)  # noqa: B010
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            names: dict[str, Any] = module.__dict__
            names["eval"] = value_of
            if names.get("parse_expr") is parse_expr:
                names["parse_expr"] = read


def _check(tree: ast.AST, allowed: tuple[type[ast.AST], ...]) -> None:
    computes = any(isinstance(node, ast.BinOp) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            raise NotAnExpression(f"an answer may not hold {type(node).__name__}: values and formulas alone")
        match node:
            case ast.Name(id=name) if name.startswith("_"):
                raise NotAnExpression(f"an answer may not hold the name {name}")
            case ast.Constant(value=str() | bytes()) if allowed is FORMULAS or computes:
                raise NotAnExpression("text is no part of a formula")
            case ast.Call(func=ast.Name(id=name), keywords=[]) if _is_mathematical(name):
                pass
            case ast.Call():
                raise NotAnExpression("an answer may call functions of mathematics alone")
            case ast.BinOp(op=ast.Pow() | ast.LShift(), right=right) if _is_large(right):
                raise NotAnExpression(f"an exponent may be {LARGEST_POWER} at most")
            case _:
                pass


def _is_mathematical(name: str) -> bool:
    import sympy  # pyright: ignore[reportMissingTypeStubs]

    found: Any = vars(sympy).get(name)
    function: Any = vars(sympy)["Function"]
    return name in ALSO_CALLED or (
        isinstance(found, type) and issubclass(found, function) and found is not function
    )


def _is_large(exponent: ast.expr) -> bool:
    """Whether an exponent is a large number, or is itself a power or a shift."""
    return any(
        (
            isinstance(node, ast.Constant)
            and isinstance(node.value, int | float)
            and node.value > LARGEST_POWER
        )
        or isinstance(node, ast.Pow | ast.LShift)
        for node in ast.walk(exponent)
    )
