"""Recomputes cheap activations (norms, MLP products) in the backward pass instead of keeping them.

Half of what autograd keeps of a transformer layer are cheap functions of other kept tensors: the output of a
norm, an MLP's act(gate) and act(gate) * up. A layer marks such a result with `recomputable`. Within the
context `recomputing`, autograd then keeps a recipe (the function and its inputs, which are kept anyway) in
place of the result. The recomputed numbers are the same, bit for bit. Unmarked tensors are kept as usual; a
layer under activation checkpointing keeps nothing, marked or not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_marked: ContextVar[dict[int, weakref.ref[Tensor]] | None] = ContextVar("recomputable results", default=None)
"""The results that `recomputable` marked, by `memory_of`; None outside of `recomputing`."""


class Recipe:
    """How to compute a tensor: a function and its inputs.

    The value is computed when it is first asked for, and lives as long as the recipe, which is until the last
    operation that kept the recipe has had its backward pass.
    """

    def __init__(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs = [_recipe_of(x) or x.detach() for x in inputs]
        self._versions = [x._version for x in inputs]
        self._made = result._version
        self._value: Tensor | None = None

    def describes(self, result: Tensor) -> bool:
        """Whether the result was not written to since the recipe was made."""
        return result._version == self._made

    @torch.no_grad()
    def value(self) -> Tensor:
        """The recomputed tensor. Raises RuntimeError, as autograd does, when an input was written to."""
        if self._value is None:
            for x, version in zip(self._inputs, self._versions, strict=True):
                if isinstance(x, Tensor) and x._version != version:
                    raise RuntimeError(
                        f"a tensor {list(x.shape)} that the backward pass needs was written to"
                    )
            values = [x.value() if isinstance(x, Recipe) else x for x in self._inputs]
            self._value = self._function(*values)
        return self._value


def memory_of(tensor: Tensor) -> int:
    """An identifier of the memory of a tensor: the same for all its views, on the meta device too."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def recomputing(keep: Callable[[Tensor], Tensor] = unchanged) -> Generator[None]:
    """Within this context, a forward pass keeps recipes in place of the results that `recomputable` marked.

    Every other tensor that autograd saves is passed through `keep`.
    """
    marked: dict[int, weakref.ref[Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        # autograd saves another object than was marked, perhaps a view: they are matched by their memory
        known = marked.get(memory_of(tensor))
        result = None if known is None else known()
        if result is None or not _same_numbers(tensor, result):
            return keep(tensor)
        recipe = _recipe_of(result)
        assert recipe is not None
        return (recipe, tensor.shape) if recipe.describes(result) else keep(tensor)

    def unpack(packed: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].value().view(packed[1])

    token = _marked.set(marked)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _marked.reset(token)


def recomputable(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns `result`, marked as the value of `function(*inputs)`.

    Within `recomputing`, an operation that saves it for its backward pass calls `function` there instead. An
    input may be such a result itself.
    """
    marked = _marked.get()
    if marked is not None and result.requires_grad and result.is_contiguous():
        # held by the result alone, so that the inputs live no longer than the result or what saves it
        cast(Any, result).recipe = Recipe(result, function, inputs)
        marked[memory_of(result)] = weakref.ref(result)
    return result


def _recipe_of(tensor: Tensor) -> Recipe | None:
    return vars(tensor).get("recipe")


def _same_numbers(tensor: Tensor, result: Tensor) -> bool:
    """Whether two tensors that share their memory have the same numbers in the same order."""
    alike = tensor.dtype == result.dtype and tensor.numel() == result.numel()
    return alike and tensor.is_contiguous() and tensor.storage_offset() == result.storage_offset()
