"""docs/algorithms.md and docs/preferences.md and its companions say what the code does."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algos.algorithm import KL, Algorithm, Mismatch
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.algos.ratio import CORRECTIONS
from rlhf.algos.table import ALGORITHMS
from rlhf.types import Counts, LossInputs

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "algorithms.md").read_text()
# methods that compare completions have a page of their own
PAGES = ("preferences", "preferences_online", "continual", "revisions")
BOTH = TEXT + "".join((DOCS / f"{page}.md").read_text() for page in PAGES)
COMPARING = PREFERENCE.keys() | ONLINE_PREFERENCE.keys() | TWO_ROLES.keys()
SHARED = {"kl", "mismatch", "entropy_coef", "critic", "reward_scaling"}


def section(name: str) -> str:
    found = re.search(rf"^### `{name}`$(.*?)(?=^##)", BOTH, re.MULTILINE | re.DOTALL)
    assert found, f"no page has a section for {name}"
    return found[1]


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_setting_is_written_down_with_its_default(name: str):
    text = section(name)
    for key, parameter in inspect.signature(ALGORITHMS[name]).parameters.items():
        if key in SHARED:
            continue
        required = parameter.default is inspect.Parameter.empty
        assert (f"`{key}`" if required else f"`{key} = {parameter.default}`") in text
    written = set(re.findall(r"`(\w+) = ", text))
    assert written <= inspect.signature(ALGORITHMS[name]).parameters.keys()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in COMPARING])
def test_every_algorithm_has_a_row_with_its_kl(name: str):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
    kl = inspect.signature(ALGORITHMS[name]).parameters["kl"].default
    assert (f"{kl.coef:g} {kl.estimator}, {kl.placement}" if kl.coef else "| none |") in row


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_every_method_on_comparisons_has_a_row_that_says_whether_it_needs_a_reference(name: str):
    row = next(line for line in BOTH.splitlines() if line.startswith(f"| `{name}` |"))
    algorithm = ALGORITHMS[name]()
    needs = {"reference": algorithm.needs_reference, "iterate": algorithm.needs_iterate}
    models = " and ".join(model for model, needed in needs.items() if needed)
    assert row.split("|")[6].strip() == ("yes" if models == "reference" else models or "no")
    assert algorithm.kl.coef == 0 or name in ("nash_md", "hypo")


@pytest.mark.parametrize("name", ["ppo", "ppo_max", "vapo"])
def test_every_setting_of_a_critic_is_written_down_with_the_defaults_of_each_algorithm(name: str):
    head = next(line for line in TEXT.splitlines() if line.startswith("| key | `ppo` |"))
    column = [cell.strip(" `") for cell in head.split("|")].index(name)
    defaults = inspect.signature(ALGORITHMS[name]).parameters
    nested = {"critic": defaults["critic"].default}
    if "reward_scaling" in defaults:
        nested["reward_scaling"] = defaults["reward_scaling"].default
    for section_name, value in nested.items():
        for key, setting in dataclasses.asdict(value).items():
            row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{section_name}.{key}` |"))
            assert row.split("|")[column].strip() == {None: "none"}.get(setting, str(setting)), row


def test_every_correction_is_written_down_with_its_bounds():
    lines = TEXT[TEXT.index("## Mismatch") :].splitlines()
    for kind, (_, low, high) in CORRECTIONS.items():
        row = next(line for line in lines if line.startswith(f"| `{kind}` |"))
        bounds = {"none": "| |", "token_tis": "high 2", "sequence_tis": "high 2"}.get(
            kind, f"{low:g} to {high:g}"
        )
        assert bounds in row
    assert f"`{Mismatch().kind}`" in TEXT


def test_the_example_of_an_own_algorithm_runs():
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/algorithms.md", "exec"), names)
    algorithm = names["my_algorithm"](width=0.1, kl=KL())
    assert isinstance(algorithm, Algorithm)
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = LossInputs(
        logprobs=logprobs,
        entropy=torch.zeros(2),
        exact_kl=None,
        old_logprobs=torch.tensor([-1.0, -1.5]),
        rollout_logprobs=torch.tensor([-1.0, -1.5]),
        ref_logprobs=None,
        advantages=torch.ones(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
        sequence=torch.zeros(2, dtype=torch.long),
        turn=torch.zeros(2, dtype=torch.long),
        counts=Counts(tokens=2, sequences=1),
        kl_coef=0.0,
    )
    output = algorithm.loss(batch)
    output.loss.backward()
    # at ratio 1 the parabola has no gradient: -A / 2 tokens
    assert logprobs.grad is not None
    assert logprobs.grad[0].item() == pytest.approx(-0.5)
    assert output.metrics["my/distance"].value == pytest.approx((1 - torch.tensor(-0.5).exp().item()) / 2)
