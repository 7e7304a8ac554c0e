"""Papers that are no algorithm here, and the part of each that is: as equations between things that exist.

docs/systems.md has the derivations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import NO_KL, Algorithm
from rlhf.algos.preference.losses import ComparedGroup
from rlhf.algos.preference.online_table import spac
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.ratio import Mismatch
from rlhf.algos.table import ALGORITHMS
from rlhf.types import Counts, LossInputs, Source

VOCABULARY, LENGTHS = 5, (3, 2, 4)
SEQUENCE = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
TOKENS = torch.tensor([0, 3, 1, 4, 4, 2, 0, 1, 3])


def gradient(algorithm: Algorithm, advantages: Tensor) -> Tensor:
    """By the logits `[N, V]` of a policy that has just sampled the three sequences: all ratios are 1."""
    logits = torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)[torch.arange(9), TOKENS]
    batch = LossInputs(
        logprobs=logprobs,
        entropy=torch.zeros(9, dtype=torch.float64),
        exact_kl=None,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=logprobs.detach(),
        ref_logprobs=None,
        advantages=advantages,
        loss_mask=torch.ones(9, dtype=torch.bool),
        sequence=SEQUENCE,
        turn=torch.zeros(9, dtype=torch.long),
        counts=Counts(tokens=9, sequences=3),
        kl_coef=0.0,
    )
    (found,) = torch.autograd.grad(algorithm.loss(batch).loss, logits)
    return found


@pytest.mark.parametrize("name", ["dapo", "reinforce_pp"])
def test_awm_of_a_language_model_is_the_policy_gradient(name: str):
    """Advantage Weighted Matching (arXiv:2509.25050) weighs the loss of the pre-training by the advantage.

    That loss is -log p for a language model (`sft`), so on policy the gradient of each token is A times its
    gradient under `sft`. The same for `grpo`, whose mean is over sequences, with the means' ratio.
    """
    weights = torch.tensor([1.2, -0.7, -0.5], dtype=torch.float64)[SEQUENCE]
    of_pretraining = gradient(ALGORITHMS["sft"](), torch.ones(9, dtype=torch.float64))
    limit = {"max_tokens": 9} if name == "dapo" else {}
    found = gradient(ALGORITHMS[name](kl=NO_KL, **limit), weights)
    assert torch.allclose(found, weights[:, None] * of_pretraining)
    # mean over 9 tokens against mean over 3 sequences of means over their tokens
    per_token = 9 / (3 * torch.tensor(LENGTHS, dtype=torch.float64))[SEQUENCE]
    of_grpo = gradient(ALGORITHMS["grpo"](kl=NO_KL), weights)
    assert torch.allclose(of_grpo, (weights * per_token)[:, None] * of_pretraining)


def test_glows_truncated_density_ratio_is_token_tis():
    """GLOW (arXiv:2401.09681) averages min(w, gamma) of density ratios w; `token_tis` does that to the ratio
    of learner and engine: of 5 and 0.4 with the bound 2, clip(5, 2) = 2, and 0.4 stays."""
    ratios = torch.tensor([5.0, 0.4, 1.0])
    where = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    cut, uncut = (Mismatch("token_tis", high=high).weight(ratios.log(), *where) for high in (2.0, 10.0))
    assert cut.tolist() == pytest.approx([2.0, 0.4, 1.0])
    # where no ratio exceeds the bound nothing is cut, so that the mean has no bias
    assert uncut.tolist() == pytest.approx(ratios.tolist())


def test_armors_relative_pessimism_is_the_penalty_of_spac():
    """ARMOR (arXiv:2302.11048) maximises the worst case of J(policy) - J(policy of the data).

    What the data does not support counts as no better than the data. SPAC does that with preferences: it adds
    beta (D(own sample) - mean of D over the pair) to the loss. That pushes the own sample down by beta and
    the pair up by half of it each, so that a policy which samples like the data feels nothing on average.
    """
    preference = spac(beta=0.25, penalty="linear").preference
    assert preference is not None and preference.pull is not None
    sources = [Source.DATA, Source.DATA, Source.POLICY]
    pulls = preference.pull(ComparedGroup([Comparison(0, 1)], [4, 4, 4], sources))
    assert pulls == pytest.approx([-0.125, -0.125, 0.25])
    assert sum(pulls) == pytest.approx(0.0)
