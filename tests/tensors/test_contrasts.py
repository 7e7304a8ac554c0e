"""Contrasts of a microbatch: numbered anew, and never cut."""

import pytest
import torch

from rlhf.tensors.contrasts import Contrasts


def contrasts() -> Contrasts:
    """a over b of one group, c over e of another: the example of the class."""
    return Contrasts(
        sequence=torch.tensor([0, 1, 2, 4]),
        coefficient=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        contrast=torch.tensor([0, 0, 1, 1]),
        target=torch.tensor([1.0, 0.73]),
        weight=torch.ones(2),
        share=torch.ones(2),
        offset=torch.zeros(2),
    )


def test_a_microbatch_has_its_own_numbers() -> None:
    found = contrasts().within(torch.tensor([4, 2, 3]))
    assert found.sequence.tolist() == [1, 0]
    assert found.coefficient.tolist() == [1.0, -1.0]
    assert found.contrast.tolist() == [0, 0]
    assert found.target.tolist() == pytest.approx([0.73])


def test_a_microbatch_without_compared_sequences_has_none() -> None:
    found = contrasts().within(torch.tensor([3]))
    assert len(found.sequence) == len(found.target) == 0


def test_a_cut_contrast_is_an_error() -> None:
    with pytest.raises(AssertionError, match="cuts a contrast"):
        contrasts().within(torch.tensor([0, 2, 4]))
