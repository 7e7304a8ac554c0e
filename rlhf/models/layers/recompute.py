"""Activations that cheap functions make of others are computed again in the backward pass, not kept for it.

Half of what autograd keeps of a transformer layer are such results: the values of a norm, an MLP's act(gate)
and act(gate) * up, keys and values copied to where attention reads them. Inside of `recomputing`, autograd is
handed the recipe of a tensor that `again` named, the function and its inputs, which are kept anyway; the
numbers that it computes from are the same, bit for bit. Everything else is kept as ever, and so is all of it
inside of a checkpointed layer, which keeps nothing in the first place.
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

_named: ContextVar[dict[int, weakref.ref[Tensor]] | None] = ContextVar("results with a recipe", default=None)
"""By the memory they are in."""


class Recipe:
    """How a tensor is computed. Its value is found when first asked for and lives as long as the recipe,
    which is until the last of those that kept it has had its backward pass."""

    def __init__(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs = [_recipe_of(x) or x.detach() for x in inputs]
        self._versions = [x._version for x in inputs]
        self._made = result._version
        self._value: Tensor | None = None

    def describes(self, result: Tensor) -> bool:
        """Whether nothing was written into the result since."""
        return result._version == self._made

    @torch.no_grad()
    def value(self) -> Tensor:
        """Raises RuntimeError, as autograd does, when something was written into an input."""
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
    """The same for all views of one piece of memory, on the meta device too."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def recomputing(keep: Callable[[Tensor], Tensor] = as_it_is) -> Generator[None]:
    """A forward pass in here keeps recipes in place of what `again` names; `keep` is given the rest."""
    named: dict[int, weakref.ref[Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        # it has the memory of what is saved, but is another object, and maybe of another shape
        known = named.get(memory_of(tensor))
        result = None if known is None else known()
        if result is None or not _same_numbers(tensor, result):
            return keep(tensor)
        recipe = _recipe_of(result)
        assert recipe is not None
        return (recipe, tensor.shape) if recipe.describes(result) else keep(tensor)

    def unpack(packed: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].value().view(packed[1])

    token = _named.set(named)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _named.reset(token)


def again(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Gives `result`, which is `function(*inputs)`; where it is saved for a backward pass inside of
    `recomputing`, `function` is called again there. An input may be such a result itself."""
    named = _named.get()
    if named is not None and result.requires_grad and result.is_contiguous():
        # an attribute: nothing but the result itself and those that save it keep the inputs alive
        cast(Any, result).recipe = Recipe(result, function, inputs)
        named[memory_of(result)] = weakref.ref(result)
    return result


def _recipe_of(tensor: Tensor) -> Recipe | None:
    return vars(tensor).get("recipe")


def _same_numbers(tensor: Tensor, result: Tensor) -> bool:
    """Of two that share their memory."""
    alike = tensor.dtype == result.dtype and tensor.numel() == result.numel()
    return alike and tensor.is_contiguous() and tensor.storage_offset() == result.storage_offset()
