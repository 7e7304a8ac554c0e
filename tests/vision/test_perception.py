"""The perception term in a run: hand-worked numbers, its gradient, what stays out of it, and its watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import KL, Algorithm, LossOutput
from rlhf.algos.perception import Perception
from rlhf.algos.table import ALGORITHMS
from rlhf.config.load import make_config
from rlhf.config.perception import PerceptionConfig
from rlhf.config.section import ConfigError
from rlhf.learn.learner import Learner
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.learn.perception.watch import PerceptionWatch
from rlhf.metrics import Mean, Metrics, merge
from rlhf.models.packing import Packed, microbatches
from rlhf.models.policy import Policy
from rlhf.preflight.load import load_inputs
from rlhf.types import Counts, Experience, Group, LossInputs, PerceptionBatch
from tests.support import learner_of, metrics_of, train, train_interrupted, trajectory, without_clocks
from tests.vision.support import mixed_prompts, picture_settings, seeing_policy

Folder = Callable[[str], Path]
Gradients = dict[str, Tensor]


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def algorithm_of(name: str = "dapo", **perception: Any) -> Algorithm:
    """Without a KL; DAPO is a mean over tokens."""
    extra = {"max_tokens": 8} if name == "dapo" else {}
    term = PerceptionConfig.model_validate(perception).term
    return replace(ALGORITHMS[name](kl=KL(coef=0.0), **extra), perception=term)


def loss_of(algorithm: Algorithm, logprobs: Tensor, has_image: Tensor, **given: Any) -> LossOutput:
    n = len(logprobs)
    masked = f64(-0.3, -2.5, -0.8)
    return algorithm.loss(
        LossInputs(
            logprobs=logprobs,
            entropy=torch.zeros_like(logprobs),
            exact_kl=None,
            old_logprobs=logprobs.detach(),
            rollout_logprobs=logprobs.detach(),
            ref_logprobs=None,
            advantages=torch.zeros_like(logprobs),
            loss_mask=torch.ones(n, dtype=torch.bool),
            sequence=torch.zeros(n, dtype=torch.long),
            turn=torch.zeros(n, dtype=torch.long),
            counts=Counts(n, 1),
            kl_coef=0.0,
            perception=PerceptionBatch(masked, has_image, None, **given),
        )
    )


ALL = torch.ones(3, dtype=torch.bool)


def test_the_loss_is_the_numbers_worked_out_by_hand() -> None:
    def loss(**perception: Any) -> tuple[float, Tensor]:
        logprobs = f64(-0.1, -0.5, -1.0).requires_grad_()
        output = loss_of(algorithm_of(**perception), logprobs, ALL).loss
        output.backward()
        assert logprobs.grad is not None
        return output.item(), logprobs.grad

    value, gradient = loss(coef=0.02)
    assert value == pytest.approx(-0.0078365, abs=1e-7)
    torch.testing.assert_close(gradient, -0.02 / 3 * f64(0.181269, 0.864665, -0.221403), rtol=0, atol=1e-7)
    assert loss(entropy_coef=0.05)[0] == pytest.approx(0.0266667, abs=1e-7)
    torch.testing.assert_close(loss(entropy_coef=0.05)[1], f64(-0.05, -0.05, -0.05) / 3)
    value, gradient = loss(masked_entropy_coef=0.05)
    assert value == pytest.approx(0.06)
    assert (gradient == 0).all(), "masked log-probs from before the update have no gradient"
    assert loss(coef=0.02, entropy_coef=0.05, masked_entropy_coef=0.05)[0] == pytest.approx(0.07883, abs=1e-5)
    assert loss(coef=0.02, max_kl=0.2)[0] == pytest.approx(-0.02 * (0.018731 + 0.2 + 0.021403) / 3, abs=1e-7)


def test_metrics_and_annealing() -> None:
    algorithm = algorithm_of(coef=0.02, entropy_coef=0.05, masked_entropy_coef=0.05)
    whole = loss_of(algorithm, f64(-0.1, -0.5, -1.0), ALL)
    half = loss_of(algorithm, f64(-0.1, -0.5, -1.0), ALL, scale=0.5)
    assert half.loss.item() == pytest.approx(whole.loss.item() / 2)
    values = {name: partial.value for name, partial in half.metrics.items()}
    assert values["perception/kl"] == pytest.approx(0.391823, abs=1e-6)
    assert values["perception/entropy"] == pytest.approx(1.6 / 3)
    assert values["perception/masked_entropy"] == pytest.approx(1.2)
    assert values["perception/kl_squared"] == pytest.approx(0.429932, abs=1e-6)
    assert values["perception/coef"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_tokens_without_a_picture_have_no_part(name: str) -> None:
    some = torch.tensor([True, False, True])
    logprobs = f64(-0.1, -0.5, -1.0).requires_grad_()
    output = loss_of(algorithm_of(name, coef=0.02, entropy_coef=0.05), logprobs, some)
    output.loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad != 0).tolist() == [True, False, True]
    assert output.metrics["perception/kl"].value == pytest.approx((0.018731 + 0.021403) / 2, abs=1e-6)
    assert loss_of(algorithm_of(name, coef=0.02), logprobs, ~ALL).loss.item() == 0.0


def masked_passes_of(policy: Policy, algorithm: Algorithm, **section: Any) -> MaskedPasses:
    assert algorithm.perception is not None
    settings = PerceptionConfig.model_validate({"patch": 4} | section)
    return MaskedPasses(policy, algorithm.perception, settings, seed=0, steps=5)


def experience_of(
    policy: Policy, algorithm: Algorithm, *, step: int = 0, **section: Any
) -> tuple[Learner, Experience]:
    """Two groups with pictures and one without."""
    passes = None if algorithm.perception is None else masked_passes_of(policy, algorithm)
    learner, builder = learner_of(policy, algorithm, perception=passes, **section)
    assert policy.vision is not None
    samples = [[5, 6, 7], [8], [9, 10, 4, 11]]
    groups = [
        Group(p, tuple(trajectory(ids, float(i % 2)) for i, ids in enumerate(samples)))
        for p in mixed_prompts(policy.vision.processor)
    ]
    return learner, builder.build(groups, kl_coef=0.0, step=step)


def gradients_of(learner: Learner, experience: Experience, groups: list[int]) -> Gradients:
    learner.policy.model.zero_grad()
    learner.accumulate(experience, groups, learner.counts(experience, [0, 1, 2]), 0.0)
    return {n: p.grad.clone() for n, p in learner.policy.model.named_parameters() if p.grad is not None}


def assert_same(got: Gradients, want: Gradients) -> None:
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def logprobs_of(policy: Policy, packed: Packed) -> Tensor:
    result = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert result is not None
    return result


def test_a_text_only_group_learns_as_if_there_were_no_such_term(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"), dtype=torch.float64)
    with_term = gradients_of(*experience_of(policy, algorithm_of(coef=0.5, entropy_coef=0.1)), [1])
    without = gradients_of(*experience_of(policy, algorithm_of()), [1])
    assert_same(with_term, without)
    seeing = [gradients_of(*experience_of(policy, algorithm_of(coef=c)), [0]) for c in (0.5, 0.0)]
    assert max((seeing[0][n] - g).abs().max() for n, g in seeing[1].items()) > 1e-5


@pytest.mark.parametrize("gradient", ["policy", "both"])
@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_the_gradient_is_that_of_the_formula_however_the_batch_is_cut(
    tiny_vlm: Folder, family: str, gradient: str
) -> None:
    policy = seeing_policy(tiny_vlm(family), dtype=torch.float64)
    terms: Any = {"coef": 0.3, "entropy_coef": 0.2, "masked_entropy_coef": 0.1, "gradient": gradient}
    algorithm = algorithm_of(**terms)
    for budget in (80, 4096):
        learner, experience = experience_of(policy, algorithm, step=3, microbatch_tokens=budget)
        experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
        got = gradients_of(learner, experience, [0, 1, 2])
        policy.model.zero_grad()
        packed = next(microbatches(experience, [0, 2], 4096)).packed
        masked_passes = masked_passes_of(policy, algorithm)
        plain = logprobs_of(policy, packed)
        masked = logprobs_of(policy, masked_passes.masked(packed, 3))
        masked = masked if gradient == "both" else masked.detach()
        u = masked - plain
        # 16 of the 24 tokens have a picture
        loss = -0.3 * (u.exp() - u - 1).sum() - 0.2 * plain.sum() - 0.1 * masked.sum()
        (loss / 24).backward()
        want = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
        assert max(g.abs().max() for g in want.values()) > 1e-4
        # the experience keeps what it knows of before the update in float32
        for name, expected in want.items():
            torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-8, msg=name)


def test_the_mask_is_another_one_each_step_and_for_each_prompt_and_hides_something(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"))
    algorithm = algorithm_of(coef=0.1)
    first, again, later = (experience_of(policy, algorithm, step=s)[1].perception for s in (0, 0, 1))
    assert first is not None and again is not None and later is not None
    assert torch.equal(first.masked_logprobs, again.masked_logprobs)
    assert not torch.equal(first.masked_logprobs, later.masked_logprobs)
    assert first.has_image.tolist() == [True] * 8 + [False] * 8 + [True] * 8
    masked_passes = masked_passes_of(policy, algorithm)
    packed = next(microbatches(experience_of(policy, algorithm)[1], [0, 2], 4096)).packed
    masks = [i.mask for i in masked_passes.masked(packed, 0).images if i is not None]
    assert masks[0] != masks[1] and {i.mask for i in packed.images if i is not None} == {None}


def test_the_sampled_estimator_has_the_exact_kl_as_its_mean_and_both_its_gradient(tiny_vlm: Folder) -> None:
    """Every token of the vocabulary as a completion, weighted by its probability: a mean without noise."""
    policy = seeing_policy(tiny_vlm("qwen2_vl"), dtype=torch.float64)
    algorithm = algorithm_of(coef=1.0, estimator="exact")
    masked_passes = masked_passes_of(policy, algorithm)
    vocabulary = policy.head.module.out_features
    assert policy.vision is not None
    prompt = mixed_prompts(policy.vision.processor)[0]
    group = Group(prompt, tuple(trajectory([i], 0.0) for i in range(vocabulary)))
    _, builder = learner_of(policy, algorithm, perception=masked_passes)
    experience = builder.build([group], kl_coef=0.0)
    micro = next(microbatches(experience, [0], 4096))
    batch = masked_passes.batch(experience, micro, policy.hidden(micro.packed), temperature=1.0)
    assert batch is not None and batch.exact_kl is not None
    plain = logprobs_of(policy, micro.packed)
    with torch.no_grad():
        masked = logprobs_of(policy, masked_passes.masked(micro.packed, 0))
    u = masked - plain
    k3 = u.exp() - u - 1
    assert plain.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    exact = batch.exact_kl
    assert exact.max().item() == pytest.approx(exact.min().item(), abs=1e-12)
    assert exact[0].item() > 1e-6
    assert (plain.exp() * k3).sum().item() == pytest.approx(exact[0].item(), rel=1e-8)
    policy.model.zero_grad()
    exact[0].backward()
    got = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    # d KL(p || q) / dp with q held: the gradient of sum p (log p - log q)
    plain = logprobs_of(policy, micro.packed)
    (plain.exp() * (plain - masked)).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_a_policy_that_sees_nothing_new_has_no_term(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"), dtype=torch.float64)
    algorithm = algorithm_of(coef=1.0)
    learner, experience = experience_of(policy, algorithm)
    assert learner.perception is not None
    learner.perception.section = PerceptionConfig(ratio=0.0)
    perception = learner.perception.inputs(experience, step=0, temperature=1.0, budget=4096)
    still = replace(experience, perception=perception, advantages=torch.zeros_like(experience.advantages))
    gradients = gradients_of(learner, still, [0, 1, 2])
    # the masked log-probs are kept in float32
    assert max(g.abs().max() for g in gradients.values()) < 1e-6


def test_annealing_goes_straight_to_its_last_share(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"))
    masked_passes = masked_passes_of(policy, algorithm_of(coef=0.1), final_share=0.2)
    assert [masked_passes.scale(step) for step in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coef": -0.1}, "perception.coef"),
        ({"coef": 0.1, "ratio": 0.0}, "nothing is hidden"),
        ({"coef": 0.1, "estimator": "exact", "gradient": "both"}, "no gradient into the masked pass"),
        ({"coef": 0.1, "patches": 14}, "did you mean perception.patch"),
    ],
)
def test_what_cannot_be_is_refused_when_the_config_is_read(
    tmp_path: Path, tiny_model_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(picture_settings(tmp_path, tiny_model_dir, perception=settings))


def test_perception_without_pictures_is_refused(tmp_path: Path, tiny_vlm: Folder) -> None:
    settings = picture_settings(tmp_path, tiny_vlm("qwen2_vl"), perception={"coef": 0.1})
    (tmp_path / "train.jsonl").write_text('{"prompt": "say"}\n')
    with pytest.raises(ConfigError, match=r"no prompt of .* has an image"):
        load_inputs(make_config(settings))


def test_a_run_with_perception_stopped_within_a_step_goes_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_vlm: Folder
) -> None:
    runs: dict[str, dict[str, Any]] = {}
    for name in ("stopped", "straight"):
        (tmp_path / name).mkdir()
        runs[name] = picture_settings(
            tmp_path / name,
            tiny_vlm("qwen2_vl"),
            steps=3,
            perception={"coef": 0.02, "entropy_coef": 0.05, "gradient": "both", "patch": 4, "watch_steps": 1},
            learner={"minibatches": 2},
            rollout={"prompts_per_step": 4, "group_size": 4},
        )
    train(runs["straight"])
    train_interrupted(runs["stopped"], after=3)
    train(runs["stopped"] | {"checkpoint": {"resume": "auto", "export": False}})
    straight, stopped = (without_clocks(metrics_of(tmp_path / name)) for name in ("straight", "stopped"))
    assert stopped == straight and len(stopped) == 3
    assert all(step["perception/kl"] > 0 for step in stopped)
    assert stopped[-1]["perception/signs"] >= 0


def step_of(
    kl: float = 0.1, squared: float = 0.02, entropy: float = 1.0, clip: float = 0.01, reward: float = 0.5
) -> Metrics:
    return {
        "perception/kl": Mean(kl),
        "perception/kl_squared": Mean(squared),
        "perception/entropy": Mean(entropy),
        "perception/masked_entropy": Mean(entropy),
        "clip_fraction/high": Mean(clip),
        "reward/mean": Mean(reward),
    }


def watch_of(**section: Any) -> PerceptionWatch:
    return PerceptionWatch(PerceptionConfig.model_validate({"coef": 0.1, "watch_steps": 2} | section))


def test_a_healthy_run_shows_no_sign() -> None:
    watch = watch_of(stop_at_signs=1)
    for i in range(40):
        metrics, texts = watch.look(step_of(kl=0.1 + 0.005 * i, reward=0.3 + 0.01 * i))
        assert (metrics["perception/signs"].value, texts) == (0.0, [])
    assert not watch.stops


def test_a_collapse_shows_all_signs_is_told_once_and_stops_the_run() -> None:
    watch = watch_of(stop_at_signs=5)
    healthy = [step_of()] * 6
    falling = [step_of(clip=0.02), step_of(clip=0.03), step_of(clip=0.03)]
    collapsed = [step_of(kl=1.0, squared=2.0, entropy=2.0, clip=0.2, reward=0.1)] * 2
    told: list[str] = []
    for metrics in [*healthy, *falling]:
        told += watch.look(metrics)[1]
    assert told == [] and not watch.stops
    counts: list[float] = []
    for metrics in collapsed:
        shown, texts = watch.look(metrics)
        counts.append(shown["perception/signs"].value)
        told += texts
    assert counts[-1] == 5.0 and watch.stops
    assert len(told) == 2
    assert "may be hacked" in told[0] and "stop_at_signs = 5" in told[1]


def test_the_watch_remembers_over_a_resumption() -> None:
    steps = [step_of()] * 6 + [step_of(kl=1.0, squared=2.0)] * 2
    straight, before, after = watch_of(), watch_of(), watch_of()
    expected = [straight.look(s) for s in steps]
    got = [before.look(s) for s in steps[:7]]
    after.load(before.state(), {})
    assert got + [after.look(s) for s in steps[7:]] == expected
    assert expected[-1][0]["perception/signs"].value == 2.0


def test_a_run_without_the_term_is_not_watched() -> None:
    watch = PerceptionWatch(PerceptionConfig())
    assert watch.look(merge([step_of()])) == ({}, [])


def test_the_term_has_the_settings_that_are_its_own() -> None:
    assert PerceptionConfig().term is None
    term = PerceptionConfig(coef=0.02, entropy_coef=0.05, ratio=0.8).term
    assert term == Perception(coef=0.02, entropy_coef=0.05)
