"""SRPO: its loss by hand, and the policy that it learns from pairs, whoever wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algos.preference.forms import Row
from rlhf.algos.preference.losses import Preference, margins
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import srpo
from tests.algos.preference.comparing import comparing, group_of


def loss_of(ratios: Sequence[float], probability: float = 1.0, mix: float = 0.5, better: int = 0) -> float:
    """Of the log-ratios of `w l w|w l|w w|l l|l`; `better` is which of the first two is the better one."""
    algorithm = srpo(beta=0.5, mix=mix)
    assert algorithm.preference is not None
    rows = algorithm.preference.rows(group_of([Comparison(better, 1 - better, probability)], [1] * 6))
    return algorithm.loss(comparing(ratios, rows)).loss.item()


def test_at_the_start_it_is_a_quarter_and_at_the_solution_nothing():
    assert loss_of([0.0] * 6) == pytest.approx(0.25)
    # P = .8: the policy and the improver are (.6457, .3543) where the reference is (.5, .5)
    w, lost = np.log(0.645656 / 0.5), np.log(0.354344 / 0.5)
    assert loss_of([w, lost, w, lost, w, lost], 0.8) == pytest.approx(0.0, abs=1e-9)
    # the policy's own halves with the wrong sign cancel the improver's: .3 is missing
    assert loss_of([lost, w, w, lost, w, lost], 0.8, mix=1.0) == pytest.approx(0.3**2, abs=1e-6)


RATIOS = [0.2, -0.1, 0.3, -0.2, 0.5, -0.4]
IMPROVER = 0.5 * (0.5 - 0.5 * (0.5 + 0.4)) ** 2 + 0.5 * (-0.5 - 0.5 * (-0.2 - 0.3)) ** 2
BOTH = (0.5 - 0.25 * (0.5 + 0.2 + 0.2 + 0.1)) ** 2


def test_its_three_rows_are_worked_out_by_hand():
    # improver .5 * .0025 + .5 * .0625 = .0325, both .0625
    assert pytest.approx([0.0325, 0.0625]) == [IMPROVER, BOTH]
    assert loss_of(RATIOS, mix=1.0) == pytest.approx(BOTH)
    assert loss_of(RATIOS, mix=0.25) == pytest.approx(0.75 * IMPROVER + 0.25 * BOTH)
    # the same pair the other way round
    assert loss_of([RATIOS[i] for i in (1, 0, 5, 4, 3, 2)], better=1) == pytest.approx(0.04750)


@pytest.mark.parametrize("mix", [0.0, 1.1])
def test_a_mix_that_teaches_no_first_answer_is_refused(mix: float):
    with pytest.raises(ValueError, match="mix must be above 0"):
        srpo(mix=mix)


K = 4
SCORES = np.random.default_rng(0).normal(size=(K, K))
WINS = torch.tensor(1.0 / (1.0 + np.exp(-(SCORES - SCORES.T))))
"""P(i beats j) of four actions; no score of single actions explains it."""
WRITERS = ((0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1), (0.05, 0.05, 0.3, 0.6))


def learned(preference: Preference, writer: Sequence[float], tables: list[Tensor]) -> Tensor:
    """The policy `[K]` at the lowest loss over all pairs, as often as `writer` writes them; the reference is
    uniform. `tables`: logits of first answers `[K]`, and where second ones are learned those `[K, K]`."""
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    total = sum(writer[i] * writer[j] for i, j in pairs)
    rows: list[Row] = []
    places: list[int] = []
    for i, j in pairs:
        # as `Reviser.revised` puts them: the pair, and each of it after each of it
        own = [i, j] if len(tables) == 1 else [i, j, *(K + K * a + b for a in (i, j) for b in (i, j))]
        group = group_of([Comparison(0, 1, WINS[i, j].item())], [1] * len(own))
        weight = writer[i] * writer[j] / total
        made = [
            replace(row.shifted(len(places)), weight=row.weight * weight) for row in preference.rows(group)
        ]
        rows, places = rows + made, places + own
    batch = comparing([0.0] * len(places), rows)
    contrasts = batch.contrasts
    assert contrasts is not None

    def loss() -> Tensor:
        logprobs = torch.cat([table.log_softmax(-1).flatten() for table in tables])[places]
        margin = margins(replace(batch, logprobs=logprobs + np.log(K)), preference)
        # beside a loss below 1e-9 the optimizer sees no difference
        return 1e4 * (contrasts.weight * preference.compare(margin, contrasts.target)).sum()

    optimizer = torch.optim.LBFGS(tables, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return tables[0].detach().softmax(0)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def test_four_actions_are_learned_alike_from_three_writers_and_ipo_moves_with_them():
    # the closed form: pi(y) ~ ref(y) / Z(y), with Z(y) = mean over y2 of exp(P(y2 beats y) / beta)
    inverse = 1.0 / (WINS / 0.5).exp().mean(0)
    closed = inverse / inverse.sum()
    assert closed.tolist() == pytest.approx([0.3605, 0.3129, 0.1769, 0.1496], abs=1e-4)
    robust, ipo = srpo(beta=0.5).preference, PREFERENCE["ipo"](tau=0.5).preference
    assert robust is not None and ipo is not None
    moved: list[Tensor] = []
    for writer in WRITERS:
        got = learned(robust, writer, [zeros(K), zeros(K, K)])
        assert got.tolist() == pytest.approx(closed.tolist(), abs=1e-4)
        moved.append(learned(ipo, writer, [zeros(K)]))
    assert (moved[0] - moved[1]).abs().max() > 0.01 and (moved[0] - moved[2]).abs().max() > 0.01
