"""Numbers of an algorithm that follow the run: their values by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from rlhf.config.load import make_config
from rlhf.config.run import Config
from rlhf.config.schedule import Parts, Ramp
from rlhf.config.section import ConfigError
from tests.config.test_config import settings

FALLING = {"start": 0.28, "end": 0.2, "shape": "linear"}


def config_of(steps: int = 5, **algorithm: Any) -> Config:
    return make_config(settings(steps=steps, algorithm={"name": "grpo"} | algorithm))


def test_a_ramp_goes_from_the_first_step_to_the_last_one():
    config = config_of(clip_high=FALLING, clip_low=FALLING | {"shape": "cosine"})
    found = [config.numbers_in_force(step) for step in range(5)]
    # a quarter of the way is (1 - cos 45 degrees) / 2 = 0.1464466 of the cosine: 0.28 - 0.08 * 0.1464466
    assert [x["clip_high"] for x in found] == pytest.approx([0.28, 0.26, 0.24, 0.22, 0.2])
    assert [x["clip_low"] for x in found] == pytest.approx([0.28, 0.2682843, 0.24, 0.2117157, 0.2])
    assert found[-1] == {"clip_high": 0.2, "clip_low": 0.2}
    # a run of one step has the first value, and a run that goes on beyond its steps the last one
    assert config_of(steps=1, clip_high=FALLING).numbers_in_force(0) == {"clip_high": 0.28}
    assert config.numbers_in_force(9)["clip_high"] == 0.2


@pytest.mark.parametrize("iteration", [1, 2, 7])
def test_parts_are_the_iterations_of_a_run(iteration: int):
    values, steps = [1e-5, 5e-6, 0.0], 3 * iteration
    config = config_of(steps, name="xpo", alpha={"values": values})
    found = [config.numbers_in_force(step)["alpha"] for step in range(steps)]
    assert found == [value for value in values for _ in range(iteration)]


def test_a_step_has_the_algorithm_of_its_numbers():
    config = config_of(kl={"coef": {"values": [0.0, 0.1, 0.0]}, "estimator": "k2"}, entropy_coef=FALLING)
    first, middle = config.build_algorithm(0), config.build_algorithm(2)
    assert (first.kl.coef, middle.kl.coef, middle.kl.estimator) == (0.0, 0.1, "k2")
    assert middle.entropy_coef == pytest.approx(0.24)
    # at the start there is no KL, but the run needs its reference all along
    assert not first.needs_reference and config.build_algorithm().needs_reference
    assert config_of(name="dpo", beta=FALLING).beta == 0.2
    assert config_of(name="dpo", beta=0.3).beta == 0.3
    assert config_of().beta is None


def test_the_saved_config_keeps_the_schedule():
    config = config_of(clip_high=FALLING, kl={"coef": {"values": [0.04, 0.0]}})
    saved = yaml.safe_load(config.to_yaml())
    assert saved["algorithm"]["clip_high"] == FALLING
    assert saved["algorithm"]["kl"]["coef"] == {"values": [0.04, 0.0]}
    assert make_config(saved) == config
    assert config.algorithm["clip_high"] == Ramp(0.28, 0.2, "linear")
    assert config.algorithm["kl"]["coef"] == Parts((0.04, 0.0))
    assert (
        str(Ramp(0.28, 0.2, "linear")) == "0.28 to 0.2 (linear)" and str(Parts((0.04, 0.0))) == "0.04 then 0"
    )


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"clip_high": FALLING | {"shape": "step"}}, "shape: Input should be 'linear' or 'cosine'"),
        (
            {"clip_high": FALLING | {"end": -0.1}},
            "must be 0 or more.*100% of the run is done: clip_high = -0.1",
        ),
        ({"clip_high": FALLING | {"start": -0.1}}, r"must be 0 or more.*0% of the run is done"),
        ({"clip_high": {"values": [0.2, -0.2, 0.2]}}, r"must be 0 or more.*clip_high = -0.2"),
        ({"kl": {"coef": FALLING | {"end": -0.1}}}, r"kl.coef must be 0 or more.*kl.coef = -0.1"),
        ({"clip_high": FALLING | {"end": "low"}}, "algorithm.clip_high: expected a number, or .*end: Input"),
        ({"clip_high": FALLING | {"stop": 1}}, "unknown stop"),
        ({"clip_high": {"start": 0.1}}, "end: "),
        ({"clip_high": [0.3, 0.2]}, r"must be a number, got \[0.3, 0.2\]; .* write {values: \[0.3, 0.2\]}"),
        ({"clip_high": {"values": []}}, "goes through finite numbers"),
        ({"clip_high": FALLING | {"end": float("inf")}}, "goes through finite numbers"),
        ({"kl": {"coef": FALLING, "target": 0.1}}, "kl.target = 0.1 would move it too"),
        ({"kl": {"coef": 0.1, "target": FALLING}}, "kl.target is read once"),
        ({"kl": {"estimator": FALLING}}, "kl.estimator: .* only a number with a fraction"),
        ({"kl": {"horizon": FALLING}}, "kl.horizon: .* only a number with a fraction"),
        ({"name": "dapo", "refill": FALLING}, "refill: .* only a number with a fraction"),
        ({"name": "ofs_dpo", "lr_ratio": FALLING}, "lr_ratio is read once"),
        # both ends are in order, but on the way tau overtakes eta
        (
            {
                "name": "inpo",
                "tau": {"start": 0.001, "end": 0.09},
                "eta": {"start": 0.01, "end": 0.1, "shape": "cosine"},
            },
            r"tau must be at most eta.*when 18% of the run is done",
        ),
    ],
)
def test_what_cannot_follow_the_run_is_refused(algorithm: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_of(**algorithm)
