"""While tests run, functions and dataclasses of the package refuse what their annotations do not allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from rlhf.checkpoints.store import latest
from rlhf.kernels.attention_parts import attend
from rlhf.metrics import Mean
from rlhf.types import Prompt

roar = pytest.importorskip("beartype.roar")
NUMBER: Any = 3


def test_shapes_have_to_agree() -> None:
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 5, 4)
    attend(query, key, key, scale=1.0)
    # their last sizes are one letter, their numbers of dimensions are given
    with pytest.raises(TypeCheckError, match="key"):
        attend(query, key[..., :3], key, scale=1.0)
    with pytest.raises(TypeCheckError, match="query"):
        attend(query[0], key, key, scale=1.0)


def test_types_of_functions_without_shapes_are_checked() -> None:
    with pytest.raises(roar.BeartypeCallHintParamViolation):
        latest(NUMBER)


def test_fields_of_dataclasses_are_checked() -> None:
    # an int is a float, as pyright has it
    assert Mean(1).value == 1.0
    with pytest.raises(roar.BeartypeCallHintParamViolation):
        Prompt(NUMBER, (1, 2), "")
