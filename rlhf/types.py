"""The data that flows from a prompt to an update, one frozen type a stage.

    Prompt --engine--> Completion --reward--> Trajectory --by prompt--> Group --experience--> Experience

Sizes have letters, everywhere in the project:

    N  tokens, packed end to end (never padded)      P  prompts of one step
    S  sequences (trajectories)                      G  completions of one prompt (may differ per prompt)
    V  vocabulary                                    H  hidden size
    K  objectives of a reward                        T  tokens of a forward pass, prompts included

Names (one word, one meaning):

    completion         what one sampling returns (never response, answer or generation)
    trajectory         prompt + completion(s) + reward
    rollout_logprobs   by the engine, of the distribution really sampled from
    old_logprobs       by the learner, at the weights before the update
    ref_logprobs       by the frozen reference
    iterate_logprobs   by the policy of the last iteration, frozen
    logprobs           by the policy being differentiated
    candidates         the tokens that truncated sampling left; all log-probs above are then among them
    loss_mask          True where the policy chose the token and learns from it
    policy_version     number of updates behind a token; staleness = current version - policy_version
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from rlhf.tensors.candidates import Candidates
from rlhf.tensors.contrasts import Contrasts, Rival
from rlhf.tensors.images import Image as Image
from rlhf.tensors.images import Images as Images
from rlhf.tensors.images import Mask as Mask
from rlhf.tensors.images import Observed as Observed
from rlhf.tensors.steps import StepRewards

Messages = str | Sequence[Mapping[str, Any]]


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The policy chose an end-of-sequence or stop token; that token belongs to the completion."""
    LENGTH = "length"
    """Cut at the token limit: the completion is truncated."""
    ABORT = "abort"
    """The engine gave up on it; it never reaches a reward."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised: `Prompt("train.jsonl:7", (1, 9690), "What is 3 + 5?", {"answer": 8})`."""

    id: str
    """Unique within the run: file name and line number."""
    token_ids: tuple[int, ...]
    content: Messages
    """The prompt as the dataset has it, plain text or chat messages. Rewards receive this."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All other columns of the dataset, which rewards receive too."""
    images: tuple[Image, ...] | None = None
    """In the order of their placeholders, of which `token_ids` holds as many as the model needs."""
    original: Prompt | None = None
    """The dataset's prompt, where an environment has put something behind it."""
    image_places: tuple[int, ...] | None = None
    """Where these placeholders stand, if `token_ids` may have more of them: a prompt that goes on with what
    the policy wrote. None: they are all that it has."""
    question_tokens: int | None = None
    """How many of `token_ids` are the question, where an answer to it and the request to improve that stand
    behind; None: all of them."""

    @property
    def pictures(self) -> Images | None:
        """The images with the prompt's id; None where there are none."""
        return None if not self.images else Images(self.id, self.images, places=self.image_places)


class Source(StrEnum):
    """What wrote a completion: the policy, a frozen model, a mixture of two, or nobody here (a dataset)."""

    POLICY = "policy"
    REFERENCE = "reference"
    ITERATE = "iterate"
    """The policy of the last iteration (`iteration.steps`)."""
    MIXTURE = "mixture"
    """The geometric mixture of policy and reference."""
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one sample of a request.

    Example: `Completion("x:7", 0, (40, 2), (-0.1, -0.5), FinishReason.STOP, (VersionSpan(3, 0, 2),))`.
    """

    prompt_id: str
    index: int
    """Place in its group, `0 .. n-1`."""
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...] | None
    """One a token, in the distribution really sampled from (temperature, top-p and top-k applied). Engines
    always give them. None: it is no sample of the policy at the learner's temperature."""
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    candidates: Candidates | None = None
    """The tokens that each token was drawn from, if the request asked for them and sampling was truncated."""
    source: Source = Source.POLICY

    def __post_init__(self) -> None:
        if self.rollout_logprobs is not None:
            lengths = len(self.token_ids), len(self.rollout_logprobs)
            assert lengths[0] == lengths[1], lengths
        if self.candidates is not None:
            lengths = len(self.token_ids), len(self.candidates.sizes)
            assert lengths[0] == lengths[1], lengths


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Everything after the prompt, with its reward.

    A second turn after a tool's answer, for example: tokens `a b | t t t | c d` with
    `loss_mask = 1 1 0 0 0 1 1` and `turns = 0 0 0 0 0 1 1`: the tool's tokens were not chosen by the policy.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    turns: tuple[int, ...]
    rollout_logprobs: tuple[float, ...] | None
    """0.0 where `loss_mask` is False. None: it is no sample of the policy at the learner's temperature."""
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    text: str
    reward: float | None
    """Weighted sum of the objectives. None: no function gave a number, the trajectory is not learned from."""
    objectives: Mapping[str, float] = field(default_factory=dict[str, float])
    candidates: Candidates | None = None
    """None: sampling was not truncated, or the learner's log-probs are over the whole vocabulary anyway."""
    source: Source = Source.POLICY
    logged: Mapping[str, str] = field(default_factory=dict[str, str])
    """What reward functions logged of it with `log_extra`, by `function/column`."""
    observations: tuple[Observed, ...] = ()
    """The observations that have images."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Turns and answers of the environment as chat messages; empty for a single turn."""
    step_rewards: tuple[tuple[int, float], ...] = ()
    """Parts of `reward` that single steps earned: the token that ends a step, and its reward."""

    @classmethod
    def single_turn(
        cls, completion: Completion, *, text: str, reward: float | None, objectives: Mapping[str, float]
    ) -> Trajectory:
        """The usual case: every token of one completion was chosen by the policy."""
        n = len(completion.token_ids)
        return cls(
            token_ids=completion.token_ids,
            loss_mask=(True,) * n,
            turns=(0,) * n,
            rollout_logprobs=completion.rollout_logprobs,
            finish_reason=completion.finish_reason,
            versions=completion.versions,
            text=text,
            reward=reward,
            objectives=objectives,
            candidates=completion.candidates,
            source=completion.source,
        )


@dataclass(frozen=True, slots=True)
class Duel:
    """Trajectory `first` of a group compared with trajectory `second`; example: `Duel(0, 3, 0.8)`."""

    first: int
    second: int
    probability: float
    """P(`first` is the better one), from a label or a judge."""


@dataclass(frozen=True, slots=True)
class Group:
    """The scored trajectories of one prompt; sizes may differ between prompts."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    draw: int = -1
    """The place of its prompt in the order in which the run draws prompts; -1 outside a run."""
    duels: tuple[Duel, ...] = ()
    """What is known of its trajectories two by two, beside their rewards."""

    @property
    def rewards(self) -> list[float]:
        """Rewards of the trajectories that have one."""
        return [t.reward for t in self.trajectories if t.reward is not None]


@dataclass(frozen=True, slots=True)
class Counts:
    """Denominators of one update, summed over all ranks and microbatches."""

    tokens: int
    """Unmasked tokens: those where `loss_mask` is True."""
    sequences: int
    """Sequences with at least one unmasked token."""
    earlier_tokens: int = 0
    """Unmasked tokens of all turns but the last of their sequence."""
    last_tokens: int = 0
    """Unmasked tokens of the last turn of their sequence."""
    correct_tokens: int = 0
    """Unmasked tokens of correct completions; counted for an algorithm that imitates those."""
    sampled: int = 0
    """Sequences that the policy sampled, as opposed to a frozen model or a dataset."""
    comparisons: float = 0.0
    """Sum of the shares of the contrasts: pairs, or completions where labels are single."""


@dataclass(frozen=True, slots=True)
class CriticTargets:
    """What the value function learns from, each fp32 `[N]`."""

    values: Tensor
    """Values before the update."""
    returns: Tensor
    """What the values are to become."""


@dataclass(frozen=True, slots=True)
class PerceptionInputs:
    """What the perception terms of a step are computed from; text-only samples have no part in them."""

    masked_logprobs: Tensor
    """fp32 `[N]`: log-probs given the masked images before the update; zeros: each pass computes its own."""
    has_image: Tensor  # bool [N]: tokens whose prompt has an image
    step: Tensor
    """int64, a scalar: the masks are drawn from it, the run's seed and the prompt."""


@dataclass(frozen=True, slots=True)
class PerceptionBatch:
    """What the perception terms see of one microbatch. Tensors are `[N]`."""

    masked_logprobs: Tensor
    has_image: Tensor
    exact_kl: Tensor | None
    """KL(policy || policy given the masked image), whole vocabulary; gradient into the former alone."""
    scale: float = 1.0
    """Factor of all coefficients of the terms in this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGroups:
    """The trajectory tokens of several groups, end to end, and what the samplers and the data know of them.

    Two groups of prompts `p q` and `r`, with completions `a b`, `c` and `d e`:

        prompts   = (p q), (r)              one tensor a group: a prompt is kept, and computed, once
        token_ids = a b c d e               N = 5
        sequence  = 0 0 1 2 2               S = 3
        positions = 2 3 2 1 2               continue those of the prompt
        group     = 0 0 1                   [S]
    """

    prompts: tuple[Tensor, ...]
    token_ids: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    turn: Tensor  # int64 [N]
    group: Tensor  # int64 [S]
    loss_mask: Tensor  # bool [N]
    rollout_logprobs: Tensor  # fp32 [N]
    recorded: Tensor | None = None
    """bool `[N]`: where `rollout_logprobs` is known (it is 0.0 elsewhere). None: everywhere."""
    numbers: Tensor | None = None
    """int64 `[P]`: the number of each group among the groups of all ranks. None: no rank has other groups."""
    references: Tensor | None = None
    """int64 `[P]`: the number of the frozen model that each group is compared with. None: there is one."""
    images: tuple[Images | None, ...] = ()
    """The images of each group's prompt; empty where no prompt has any."""
    observed: tuple[tuple[Observed, ...], ...] = ()
    """The observations with images of each of the S sequences; empty where no sequence has any."""
    candidates: Candidates | None = None
    """What each token was drawn from; every log-prob of the learner is then renormalised over the same."""
    contrasts: Contrasts | None = None
    """What an algorithm with a preference loss compares. A group is then never cut by a microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(PackedGroups):
    """All that one step learns from: packed groups, and what models and rewards say of their tokens."""

    old_logprobs: Tensor | None
    """fp32 `[N]`. None: there is one update a step, and the learner's first pass, detached, stands for it."""
    ref_logprobs: Tensor | None
    """fp32 `[N]`. None: no reference is needed, or the learner's own passes give them (exact KL)."""
    advantages: Tensor  # fp32 [N]
    iterate_logprobs: Tensor | None = None
    """fp32 `[N]`. None: the algorithm does not compare with the policy of the last iteration."""
    correct: Tensor | None = None
    """bool `[S]`: completions that solve their prompt. None: the algorithm does not ask."""
    pull: Tensor | None = None
    """fp32 `[S]`: the constant by which a preference loss multiplies each sequence's log-prob. None: 0."""
    critic: CriticTargets | None = None
    perception: PerceptionInputs | None = None


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """What an advantage function sees: scored sequences of whole groups, and their tokens."""

    rewards: Tensor  # [S]
    objectives: Tensor  # [S, K]
    objective_weights: Tensor  # [K]
    group: Tensor  # [S], 0 .. P-1, contiguous
    token_penalty: Tensor  # [N]
    """What a KL in the reward subtracts from each token; zeros without one."""
    sequence: Tensor  # [N]
    loss_mask: Tensor  # [N]
    turn: Tensor  # [N], number of the policy's turn in its sequence
    names: tuple[str, ...] = ()
    """Names of the K objectives."""
    values: Tensor | None = None
    """`[N]`: the critic's values before the update."""
    prompt_values: Tensor | None = None
    """`[S]`: the frozen value of each sequence's prompt, when the algorithm asks for it."""
    temperature_factors: Tensor | None = None
    """`[S]`: the factor of the temperature of each sequence's prompt, when the algorithm asks for it."""
    own: Tensor | None = None
    """bool `[S]`: what the policy sampled. None: all of it."""
    steps: StepRewards | None = None
    """What earned `rewards`. None: the last token of each sequence."""
    all_sum: Callable[[Tensor], Tensor] = lambda t: t
    """Adds a tensor up over the ranks: the identity on one rank."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss sees of one microbatch. All `[N]`; `logprobs`, `entropy` and the KLs carry gradient."""

    logprobs: Tensor
    entropy: Tensor
    """Over the whole vocabulary, in nats; with gradient if the algorithm's entropy coefficient is not 0."""
    exact_kl: Tensor | None
    """KL(policy || reference) over the whole vocabulary, when the algorithm asks for it."""
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    sequence: Tensor
    """Ids of the sequences of this microbatch, `0 .. S-1`, contiguous; a sequence is never cut."""
    turn: Tensor
    counts: Counts
    kl_coef: float
    """The coefficient in force: an adaptive controller may move it from step to step."""
    recorded: Tensor | None = None
    """bool: where `rollout_logprobs` is known; None: everywhere. Elsewhere no mismatch is corrected."""
    correct: Tensor | None = None
    """bool: tokens of correct completions, for an algorithm that imitates those."""
    perception: PerceptionBatch | None = None
    contrasts: Contrasts | None = None
    """Those of this microbatch, with its numbers of sequences; none of them is cut."""
    pull: Tensor | None = None
    """`[S]` of this microbatch."""
    iterate_logprobs: Tensor | None = None
    forward_kl: Tensor | None = None
    """KL(reference || policy) over the whole vocabulary, when the algorithm asks for it."""
    rival: Rival | None = None
    """The margins of the other copy of the policy, where two of them learn (OFS-DPO)."""


def is_own(trajectory: Trajectory) -> bool:
    """Whether the policy sampled it, at the temperature at which the learner computes log-probs."""
    return trajectory.rollout_logprobs is not None


def is_learnable(trajectory: Trajectory) -> bool:
    """Whether a trajectory has what a loss needs: tokens and a reward."""
    return trajectory.reward is not None and len(trajectory.token_ids) > 0
