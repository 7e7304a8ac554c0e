"""The table is a config schema: short functions, typed keywords, and relations that hold."""

from __future__ import annotations

import inspect
import types
import typing
from functools import partial
from typing import Any

import pytest
import torch

from rlhf.algos import surrogate
from rlhf.algos.algorithm import KL, Algorithm, Mismatch
from rlhf.algos.critic import CriticLoss, RewardScaling
from rlhf.algos.imitation import IMITATION
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.algos.ratio import sequence_ratio
from rlhf.algos.reduction import sequence_mean_constant, token_mean
from rlhf.algos.shaping import Selection, keep_mixed
from rlhf.algos.table import ALGORITHMS, cispo, dapo, dr_grpo, grpo, gspo, reinforce_pp, rloo, sapo
from rlhf.types import AdvantageInputs

# settings of a few words are Literals
LEAVES = {float, int, bool, str, tuple[str, ...], type(None), KL, Mismatch, CriticLoss, RewardScaling}
every_algorithm = pytest.mark.parametrize("name", list(ALGORITHMS))


@every_algorithm
def test_settings_are_keywords_of_plain_types(name: str):
    function = inspect.unwrap(ALGORITHMS[name])
    hints = typing.get_type_hints(function)
    for key, parameter in inspect.signature(function).parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, key
        hint = hints[key]
        leaves = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        assert {str if typing.get_origin(leaf) is typing.Literal else leaf for leaf in leaves} <= LEAVES, key


@every_algorithm
def test_an_algorithm_is_twelve_lines_at_most(name: str):
    source = inspect.getsource(inspect.unwrap(ALGORITHMS[name]))
    assert len(source.strip().splitlines()) <= 12


def bounds(algorithm: Algorithm) -> dict[str, float | None]:
    assert isinstance(algorithm.surrogate, partial)
    return algorithm.surrogate.keywords


def test_defaults_are_those_of_the_papers():
    assert bounds(grpo()) == {"low": 0.2, "high": 0.2, "dual": None}
    assert grpo().kl == KL(coef=0.04, estimator="k3", placement="loss")
    assert bounds(dapo(max_tokens=20480)) == {"low": 0.2, "high": 0.28, "dual": 10.0}
    assert dapo(max_tokens=20480).kl.coef == 0.0
    assert bounds(gspo())["low"] == 3e-4
    assert bounds(gspo())["high"] == 4e-4
    assert bounds(sapo()) == {"tau_positive": 1.0, "tau_negative": 1.05}
    assert bounds(build_on("dtpo")) == {"low": 0.2, "high": 0.24, "dual": None}
    assert rloo().kl == KL(coef=0.03, estimator="k1", placement="reward")
    assert reinforce_pp().kl.placement == "reward"
    for name in ALGORITHMS:
        built = build_on(name)
        # imitation does not ask who made a completion
        assert built.mismatch == (Mismatch("none") if built.from_data else Mismatch("token_tis")), name
        assert built.from_data or built.mismatch.bounds == (0.0, 2.0), name


def test_the_upper_bound_of_cispo_was_never_published_and_must_be_given():
    with pytest.raises(TypeError, match="clip_high"):
        cispo(max_tokens=10)  # type: ignore[call-arg]


def test_the_punished_stretch_of_dapo_is_a_fifth_as_in_the_paper():
    shape = dapo(max_tokens=20480).shape_reward
    assert shape(1.0, 20480 - 4096) == 1.0
    assert shape(1.0, 18432) == 0.5
    assert dapo(max_tokens=20480, overlong_cache=0).shape_reward(1.0, 20480) == 1.0


def test_relatives_share_what_they_do_not_change():
    base, tokens = grpo(), torch.tensor([0, 1, 1])
    long = dapo(max_tokens=100)
    assert (base.selection, long.selection) == (Selection(), Selection(keep=keep_mixed, refill=9))
    assert long.reduction is token_mean
    assert gspo().ratio is sequence_ratio
    assert gspo().reduction is base.reduction
    assert cispo(max_tokens=100, clip_high=5.0).selection.keep is keep_mixed
    constant = dr_grpo(max_tokens=100).reduction
    assert isinstance(constant, partial)
    assert constant.func is sequence_mean_constant
    assert rloo().surrogate is surrogate.reinforce
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0]),
        objectives=torch.tensor([[1.0], [0.0]]),
        objective_weights=torch.ones(1),
        group=torch.zeros(2, dtype=torch.long),
        token_penalty=torch.zeros(3),
        sequence=tokens,
        loss_mask=torch.tensor([True, True, False]),
        turn=torch.zeros(3, dtype=torch.long),
        prompt_values=torch.tensor([0.5, 0.5]),
        # of a critic that has learned the mean
        values=torch.full((3,), 0.5),
    )
    signs = {name: build_on(name).advantage(inputs).sign().tolist() for name in ALGORITHMS}
    compared = PREFERENCE.keys() | TWO_ROLES.keys() | (ONLINE_PREFERENCE.keys() - {"nash_md", "hypo"})
    assert {name: signs.pop(name) for name in compared} == {name: [0.0] * 3 for name in compared}
    # reinforce_pp has no group, but two rewards for a batch are a group too
    assert signs == {name: [1.0, -1.0, 0.0] if name not in IMITATION else signs[name] for name in signs}
    # sft takes all alike, awr takes the worse one a little; the others leave it out; distill asks no reward
    some = {"sft", "awr", "awr_token"}
    assert signs.pop("distill") == [0.0] * 3
    imitating = IMITATION.keys() - {"distill"}
    assert {name: signs[name] for name in imitating} == {
        name: [1.0, float(name in some), 0.0] for name in imitating
    }


def build_on(name: str) -> Algorithm:
    required: dict[str, Any] = {"max_tokens": 8} if name in ("dr_grpo", "dapo", "cispo") else {}
    required |= {"cispo": {"clip_high": 5.0}, "dtpo": {"tool_objectives": ("tool",)}}.get(name, {})
    return ALGORITHMS[name](**required)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool_objectives": ()}, "tool_objectives is empty"),
        ({"earlier_weight": -1.0}, "weight of the turns before the last one must be 0 or more, got -1"),
    ],
)
def test_dtpo_names_what_its_settings_must_be(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings: dict[str, Any] = {"tool_objectives": ("tool",), **changes}
        ALGORITHMS["dtpo"](**settings)
