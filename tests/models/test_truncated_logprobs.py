"""Samples of truncated distributions: log-probs and ratios are those of the truncated distributions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algos.algorithm import KL, Mismatch
from rlhf.algos.table import ALGORITHMS
from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.config.checks.run import return_candidates
from rlhf.config.load import make_config
from rlhf.config.rollout import RolloutConfig
from rlhf.learn.buffer import Buffer
from rlhf.learn.experience import pack_groups
from rlhf.metrics import merge
from rlhf.models.packing import Packed, microbatches
from rlhf.models.policy import Policy
from rlhf.rollout.engine import RolloutRequest, SamplingParams, SyncError, generate
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.sync.weight_sync import WeightSync
from rlhf.tensors.candidates import Candidates
from rlhf.types import Completion, Group, Prompt, Trajectory
from tests.support import ALONE, bandit_settings, learner_of, metrics_of, policy_of, train, unscored

Folder = Callable[[str], Path]
CUT: dict[str, Any] = {"top_k": 12, "top_p": 0.8, "min_p": 0.02}


def sampled(policy: Policy, engine: Any = NativeEngine, **settings: Any) -> list[Group]:
    """Two groups of the policy's own samples, with rewards of 0 and 1 in turn."""
    cut: dict[str, Any] = {"n": 4, "max_tokens": 9, "return_candidates": True, **CUT, **settings}
    requests = [
        RolloutRequest(Prompt(f"p{n}", tuple(range(3, 3 + n)), ""), SamplingParams(seed=n, **cut))
        for n in (4, 11)
    ]
    groups = generate(engine(policy.model, eos_token_ids=[2]), requests)
    return [
        Group(
            request.prompt,
            tuple(
                Trajectory.single_turn(c, text="", reward=float(i % 2), objectives={})
                for i, c in enumerate(group)
            ),
        )
        for request, group in zip(requests, groups, strict=True)
    ]


def packed_of(groups: list[Group]) -> Packed:
    (micro,) = microbatches(pack_groups(groups, device=ALONE.device), range(len(groups)), 10_000)
    return micro.packed


def by_hand(policy: Policy, groups: list[Group], temperature: float) -> torch.Tensor:
    """Log-probs by the model's own forward, over one sequence at a time, candidates only."""
    found: list[torch.Tensor] = []
    layout, policy.layout = policy.layout, "padded"
    for group in groups:
        prompt = group.prompt.token_ids
        for t in group.trajectories:
            ids = torch.tensor([prompt + t.token_ids])
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
            candidates = [()] * len(t.token_ids) if t.candidates is None else t.candidates.each()
            for row, token, left in zip(logits, t.token_ids, candidates, strict=True):
                if len(left):
                    out = torch.ones_like(row, dtype=torch.bool)
                    out[torch.as_tensor(left).long()] = False
                    row = row.masked_fill(out, float("-inf"))
                found.append(row.log_softmax(-1)[token])
    policy.layout = layout
    return torch.stack(found)


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    policy.model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.model.parameters()]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_log_probs_and_gradients_are_those_of_masked_logits(
    tiny_model: Folder, packing: str, mixed: bool
) -> None:
    policy = policy_of(tiny_model("llama-sharp"), packing=packing)
    groups = sampled(policy)
    if mixed:
        # a completion without candidates, as one that no engine made
        first, second = groups
        groups = [replace(first, trajectories=(replace(first.trajectories[0], candidates=None),)), second]
    exact = policy_of(tiny_model("llama-sharp"), packing=packing, dtype=torch.float64)
    packed = packed_of(groups)
    assert packed.candidates is not None and bool((packed.candidates.sizes > 0).all()) is not mixed
    got = exact.statistics(packed, temperature=0.7, want=("logprob", "entropy"))
    assert got.logprob is not None and got.entropy is not None
    expected = by_hand(exact, groups, 0.7)
    upstream = torch.randn(len(expected), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(got.logprob, expected, atol=1e-10, rtol=0)
    pairs = [gradients(exact, (logprob * upstream).sum()) for logprob in (got.logprob, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)
    # the entropy stays that of the whole vocabulary
    plain = exact.statistics(replace(packed, candidates=None), temperature=0.7, want=("entropy",)).entropy
    torch.testing.assert_close(got.entropy, plain)


def test_the_reference_is_renormalised_over_the_same_tokens(tiny_model: Folder) -> None:
    policy = policy_of(tiny_model("llama-sharp"))
    groups, reference = sampled(policy), policy_of(tiny_model("llama-sharp"))
    with torch.no_grad():
        for weight in reference.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    packed = packed_of(groups)
    want = ("logprob", "ref_logprob", "kl")
    both = policy.statistics(packed, temperature=1.0, want=want, reference=reference)
    alone = reference.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    torch.testing.assert_close(both.ref_logprob, alone)
    whole = policy.statistics(
        replace(packed, candidates=None), temperature=1.0, want=want, reference=reference
    )
    torch.testing.assert_close(both.kl, whole.kl)


@pytest.mark.parametrize("engine", [NativeEngine, HFEngine])
def test_the_engine_and_the_learner_agree_on_log_probs_of_drawn_tokens(
    tiny_model: Folder, engine: Any
) -> None:
    policy = policy_of(tiny_model("llama-sharp"))
    groups = sampled(policy, engine)
    logprob = policy.statistics(packed_of(groups), temperature=1.0, want=("logprob",)).logprob
    assert logprob is not None
    stated = torch.tensor([p for g in groups for t in g.trajectories for p in t.rollout_logprobs or ()])
    torch.testing.assert_close(logprob.detach(), stated, atol=1e-4, rtol=0)
    # over the whole vocabulary they would not
    whole = policy.statistics(replace(packed_of(groups), candidates=None), temperature=1.0, want=("logprob",))
    assert whole.logprob is not None and (whole.logprob - stated).mean() < -0.05


def test_after_an_update_the_ratio_is_that_of_the_truncated_policies(tiny_model: Folder) -> None:
    """Two minibatches: the second has another policy than the one that sampled."""
    algorithm = ALGORITHMS["grpo"](kl=KL(coef=0.01), mismatch=Mismatch("token_tis"))
    policy, reference = (policy_of(tiny_model("llama-sharp")) for _ in range(2))
    groups = sampled(policy)
    learner, builder = learner_of(policy, algorithm, reference, epochs=2)
    experience = builder.build(groups, kl_coef=0.01)
    before = by_hand(policy, groups, 1.0).detach()
    assert experience.old_logprobs is not None and experience.ref_logprobs is not None
    torch.testing.assert_close(experience.old_logprobs, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(experience.ref_logprobs, before, atol=1e-4, rtol=0)
    first, second = learner.updates(experience, step=0, seed=0, kl_coef=0.01)
    assert first["mismatch/k3"].value < 1e-7 and first["ratio/mean"].value == pytest.approx(1.0, abs=1e-5)
    (micro,) = microbatches(experience, range(2), 10_000)
    learner, builder = learner_of(policy, algorithm, reference)
    hidden = policy.hidden(micro.packed)
    statistics = policy.statistics(micro.packed, temperature=1.0, want=learner.want, hidden=hidden)
    counts = learner.counts(experience, [0, 1])
    inputs = learner._loss_inputs(experience, micro, hidden, statistics, counts, 0.01)
    now = by_hand(policy, groups, 1.0)
    torch.testing.assert_close(inputs.logprobs, now, atol=1e-4, rtol=0)
    assert (now - before).abs().max() > 0.01
    assert merge([second])["mismatch/k3"].value < 1e-7


def test_candidates_are_taken_and_joined() -> None:
    rng = random.Random(0)
    rows = [[rng.randrange(99) for _ in range(rng.randrange(4))] for _ in range(20)]
    candidates = Candidates.of(rows)
    assert [ids.tolist() for ids in candidates.each()] == rows
    index = torch.tensor([3, 3, 19, 0, 7])
    assert [ids.tolist() for ids in candidates.take(index).each()] == [rows[i] for i in index.tolist()]
    assert (
        Candidates.join([Candidates.of(rows[:5]), Candidates.of(rows[5:])])
        == candidates
        != Candidates.of(rows[1:])
    )
    assert candidates.ids.dtype == torch.int32


def test_a_saved_group_keeps_its_candidates(tiny_model: Folder) -> None:
    (group, _) = sampled(policy_of(tiny_model("llama-sharp")))
    again = group_of(json.loads(json.dumps(group_state(group))), {group.prompt.id: group.prompt})
    assert again.trajectories[0].candidates is not None
    assert again == group


def test_a_saved_experience_keeps_its_candidates(tiny_model: Folder) -> None:
    experience = unscored(sampled(policy_of(tiny_model("llama-sharp"))))
    buffer, again = Buffer(), Buffer()
    buffer.fill(experience, {})
    saved: Any = buffer.tensors()
    again.load(buffer.state(), saved)
    assert again.experience is not None and experience.candidates is not None
    assert again.experience.candidates == experience.candidates


class Silent(HFEngine):
    def poll(self, timeout: float | None = None) -> list[Completion]:
        return [replace(c, candidates=None) for c in super().poll(timeout)]


class Wider(HFEngine):
    """Keeps twice as many tokens as it was asked to."""

    def submit(self, requests: Any) -> None:
        super().submit([replace(r, params=replace(r.params, top_k=2 * r.params.top_k)) for r in requests])


@pytest.mark.parametrize(
    ("engine", "said"),
    [(Silent, "does not say which tokens truncation left"), (Wider, r"keeps other tokens .* \(3, 1.0 and")],
)
def test_an_engine_that_truncates_otherwise_is_reported(tiny_model: Folder, engine: Any, said: str) -> None:
    policy = policy_of(tiny_model("llama-sharp"))
    prompt, section = Prompt("p", tuple(range(3, 20)), ""), RolloutConfig(top_k=3)
    sync = WeightSync(policy, prompt, section, tolerance=1e-3, return_candidates=True)
    sync.push(HFEngine(policy.model, eos_token_ids=[2]), 0)
    with pytest.raises(SyncError, match=said):
        sync.push(engine(policy.model, eos_token_ids=[2]), 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout": {"top_k": 5}}, True),
        ({"rollout": {"min_p": 0.1, "top_k": 5}}, True),
        ({"rollout": {}}, False),
        ({"rollout": {"top_k": 5}, "algorithm": {"name": "grpo", "mismatch": {"kind": "none"}}}, False),
    ],
)
def test_candidates_are_requested_where_they_are_needed(
    tmp_path: Path, tiny_model: Folder, changes: dict[str, Any], expected: bool
) -> None:
    config = make_config(bandit_settings(tmp_path, tiny_model("llama"), **changes))
    assert return_candidates(config, config.build_algorithm()) is expected


def test_a_run_learns_from_truncated_samples(tmp_path: Path, tiny_model: Folder) -> None:
    """As it would without truncation: the mismatch stays that of rounding."""
    settings = bandit_settings(
        tmp_path,
        tiny_model("llama"),
        rollout={"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
        learner={"minibatches": 2},
    )
    train(settings)
    records = metrics_of(tmp_path)
    assert records[-1]["reward/mean"] > 1.5 * records[0]["reward/mean"]
    assert max(record["mismatch/k3"] for record in records if "mismatch/k3" in record) < 1e-6
