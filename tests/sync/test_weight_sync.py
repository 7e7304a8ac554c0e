"""The check after every weight sync: which faults it finds, and how it reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.rollout import RolloutConfig
from rlhf.rollout.engine import RolloutRequest, SyncError
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.sampling import truncate
from rlhf.sync.diagnosis import diagnose
from rlhf.sync.weight_sync import LONGEST_PROBE_PROMPT, WeightSync, choose_probe_prompt
from rlhf.types import Completion, Prompt
from tests.support import policy_of

VOCABULARY, TOKENS = 200, 32


def drawn(temperature: float, noise: float = 0.0, **cut: Any) -> tuple[torch.Tensor, ...]:
    """Logits, tokens drawn at `temperature` with the truncation `cut`, and their log-probs."""
    generator = torch.Generator().manual_seed(3)
    logits = 2.0 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    probs = (logits / temperature).softmax(-1)
    top_k = torch.full((TOKENS,), cut.get("top_k", 0))
    top_p = torch.full((TOKENS,), cut.get("top_p", 1.0), dtype=torch.float64)
    probs = truncate(probs, top_k, top_p)
    probs = probs.masked_fill(probs < cut.get("min_p", 0.0) * probs.max(-1, keepdim=True).values, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]
    logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
    return logits, tokens, logprobs + noise * torch.randn(TOKENS, generator=generator)


@pytest.mark.parametrize(
    ("temperature", "cut", "said"),
    [
        (0.9, {}, "temperature: the engine samples at 0.9, the learner scores at 1"),
        (1.05, {}, "temperature: the engine samples at 1.05, the learner"),
        (1.0, {"top_k": 20}, "top-k: the engine keeps the 20 most probable"),
        (1.0, {"top_p": 0.9}, "top-p: the engine keeps a share of 0.9 only"),
        (1.0, {"min_p": 0.05}, "min-p: the engine leaves out tokens below 0.05"),
    ],
)
def test_the_setting_that_differs_is_named(temperature: float, cut: dict[str, Any], said: str) -> None:
    logits, tokens, logprobs = drawn(temperature, **cut)
    cause = diagnose(logits, tokens, logprobs, 1.0)
    assert cause is not None
    assert said in cause.text
    assert cause.unexplained < 0.01


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.03, 0.5])
def test_rounding_has_no_cause(noise: float) -> None:
    logits, tokens, logprobs = drawn(0.7, noise)
    assert diagnose(logits, tokens, logprobs, 0.7) is None


@pytest.mark.parametrize("sharpness", [2.0, 8.0])
def test_rounding_of_few_uncertain_tokens_has_no_cause(sharpness: float) -> None:
    """Of a policy that is sure of most tokens a few make up the differences, which one number can fit."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        logits = sharpness * torch.randn(TOKENS, 50, generator=generator, dtype=torch.float64)
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        slope = ((logits / 1.01).log_softmax(-1) - logits.log_softmax(-1)).gather(1, tokens)
        noise = 4.0 * slope * torch.randn(TOKENS, 1, generator=generator)
        logprobs = (logits.log_softmax(-1).gather(1, tokens) + noise)[:, 0]
        assert diagnose(logits, tokens[:, 0], logprobs, 1.0) is None


def test_a_setting_is_named_for_a_policy_that_is_sure_of_most_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8.0 * torch.randn(TOKENS, 50, generator=generator, dtype=torch.float64)
    tokens = torch.multinomial((logits / 1.1).softmax(-1), 1, generator=generator)
    logprobs = (logits / 1.1).log_softmax(-1).gather(1, tokens)[:, 0]
    cause = diagnose(logits, tokens[:, 0], logprobs, 1.0)
    assert cause is not None and "the engine samples at 1.1, the learner" in cause.text


class Skewed(HFEngine):
    """An engine with its own model that changes the log-probs it reports, and may ignore new weights."""

    skew: Callable[[float], float] = staticmethod(lambda logprob: logprob)
    ignores_weights = False
    requests: Sequence[RolloutRequest] = ()
    kept: Mapping[str, torch.Tensor]

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        self.requests = requests
        super().submit(requests)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        return [
            Completion(
                c.prompt_id,
                c.index,
                c.token_ids,
                tuple(map(self.skew, c.rollout_logprobs or ())),
                c.finish_reason,
                c.versions,
            )
            for c in super().poll(timeout)
        ]

    def update_weights(self, source: Any, version: int) -> Any:
        if self.ignores_weights:
            report = super().update_weights(source, version)
            self._model.load_state_dict(self.kept)
            return report
        return super().update_weights(source, version)


@pytest.fixture
def sync_and_engine(tiny_model: Callable[[str], Path]) -> tuple[WeightSync, Skewed]:
    folder = tiny_model("llama-sharp")
    section = RolloutConfig.model_validate({"temperature": 0.8, "engine": "hf"})
    sync = WeightSync(policy_of(folder), Prompt("p", tuple(range(3, 20)), ""), section, tolerance=1e-3)
    return sync, Skewed(policy_of(folder).model, eos_token_ids=[2])


def test_an_engine_that_agrees_passes(sync_and_engine: tuple[WeightSync, Skewed]) -> None:
    sync, engine = sync_and_engine
    assert sync.push(engine, 0).bytes > 0
    assert sync.push(engine, 1).version == 1


def test_the_probe_decodes_with_the_settings_of_the_run(sync_and_engine: tuple[WeightSync, Skewed]) -> None:
    sync, engine = sync_and_engine
    sync.push(engine, 0)
    params = engine.requests[0].params
    assert (params.temperature, params.n) == (0.8, 4)


def test_the_size_of_a_difference_is_reported(sync_and_engine: tuple[WeightSync, Skewed]) -> None:
    sync, engine = sync_and_engine
    sync.push(engine, 0)
    engine.skew = lambda logprob: logprob - 0.25
    with pytest.raises(SyncError, match=r"Skewed at version 7: .* by 0.25 nats in the mean over"):
        sync.push(engine, 7)


def test_an_engine_that_ignores_new_weights_is_found_at_the_start(
    sync_and_engine: tuple[WeightSync, Skewed],
) -> None:
    sync, engine = sync_and_engine
    engine.kept = {name: tensor.clone() for name, tensor in engine._model.state_dict().items()}
    engine.ignores_weights = True
    # its weights equal the learner's at the start, so a probe alone would pass
    with pytest.raises(SyncError, match="sent weights in a wrong order"):
        sync.push(engine, 0)


def test_log_probs_that_are_not_finite_are_reported(sync_and_engine: tuple[WeightSync, Skewed]) -> None:
    sync, engine = sync_and_engine
    sync.push(engine, 0)
    engine.skew = lambda logprob: float("nan")
    with pytest.raises(SyncError, match="have diverged"):
        sync.push(engine, 1)


def test_the_probe_takes_the_shortest_prompt_that_shows_enough() -> None:
    def prompt(n: int, *pictures: Any) -> Prompt:
        return Prompt(str(n), tuple(range(n)), "", images=pictures)

    assert choose_probe_prompt([prompt(90), prompt(40), prompt(12)]).id == "40"
    assert choose_probe_prompt([prompt(12), prompt(30)]).id == "12"
    assert len(choose_probe_prompt([prompt(90), prompt(70)]).token_ids) == LONGEST_PROBE_PROMPT
    seen = choose_probe_prompt([prompt(40), prompt(90, "picture"), prompt(70, "picture")])
    assert seen.id == "70" and len(seen.token_ids) == 70, "placeholders are not to be cut"
