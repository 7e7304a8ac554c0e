"""The tree of `rlhf pairs tree`: which step is expanded next, what steps are worth, and which two are a pair.

Pure parts of iTool's Monte Carlo tree search (arXiv:2501.09766, and the authors' code zeng-yirong/iTool).

1. A node is a step: tokens that the policy may write behind those of its parent. The root is the prompt.
2. The search goes down from the root to the child with the highest `selection_score` until it meets a step
   that has not been expanded. A step is expanded once, and the search leaves out what can grow no more. (In
   the authors' code it goes on only from nodes with *more* than `actions` children, so that the root is
   expanded twice before there is a choice.)
3. The root is simulated too, so that it has a visit before its children are compared. (In the authors' code
   it has none, and the logarithm of 0 is taken.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

END_REWARD = 0.1
"""What a step gains for the end of a call in its place, and loses otherwise (as in the authors' code)."""
_WORD = re.compile(r"\w+")


@dataclass(slots=True, eq=False)
class Node:
    """A step of a tree, with all that was found out below it."""

    tokens: tuple[int, ...] = ()
    """The tokens behind the prompt, those of earlier steps included."""
    text: str = ""
    """The text of this step."""
    prior: float = 1.0
    """exp of the mean log-prob of its tokens, at the temperature of the steps."""
    parent: Node | None = field(default=None, repr=False)
    ended: bool = False
    """Whether nothing follows in this turn."""
    fast: float = 0.0
    """The reward for words that it shares with the right answer."""
    visits: int = 0
    """Simulations of this step and of those below it: N."""
    total: float = 0.0
    """The sum of their values: Q."""
    rollouts: int = 0
    """Completions that were scored in these simulations."""
    right: int = 0
    """Those of them that are correct."""
    expanded: bool = False
    children: list[Node] = field(default_factory=list["Node"])

    @property
    def depth(self) -> int:
        """Steps from the prompt: 0 for the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def value(self) -> float:
        """The mean value of its simulations, of which there must be one."""
        return self.total / self.visits

    def path(self) -> Iterator[Node]:
        """This node, its parent, and so on up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def all(self) -> Iterator[Node]:
        """This node and all below it, each before its children."""
        yield self
        for child in self.children:
            yield from child.all()


def selection_score(total: float, visits: int, prior: float, parent_visits: int, exploration: float) -> float:
    """`Q/(N+1) + c prior sqrt(ln N_parent / (N+1))`: the authors' code, where Q is the sum of values."""
    unsure = math.sqrt(math.log(parent_visits) / (visits + 1))
    return total / (visits + 1) + exploration * prior * unsure


def can_grow(node: Node, depth: int) -> bool:
    """Whether the node, or one below it, is still to be expanded."""
    if not node.expanded:
        return not node.ended and node.depth < depth
    return any(can_grow(child, depth) for child in node.children)


def select(root: Node, *, exploration: float, depth: int) -> Node | None:
    """The step to expand; None where the whole tree is done. Of equal children the first one is taken."""
    if not can_grow(root, depth):
        return None
    node = root
    while node.expanded:
        parent = node
        node = max(
            (child for child in parent.children if can_grow(child, depth)),
            key=lambda c: selection_score(c.total, c.visits, c.prior, parent.visits, exploration),
        )
    return node


def back_up(node: Node, value: float, *, rollouts: int, right: int) -> None:
    """Adds one simulation of `node`, whose value is given, to it and to all above it."""
    for above in node.path():
        above.visits += 1
        above.total += value
        above.rollouts += rollouts
        above.right += right


def words(text: str) -> set[str]:
    """Runs of letters, digits and underscores."""
    return set(_WORD.findall(text))


def overlap(first: str, second: str) -> float:
    """`|A & B| / min(|A|, |B|)` of the words of two texts; of texts without words 1 if they are equal.

    How the authors' code finds words is not known here; these are those of `words`.
    """
    a, b = words(first), words(second)
    if not a or not b:
        return float(first == second)
    return len(a & b) / min(len(a), len(b))


def fast_reward(step: str, gold: str, end_marker: str) -> float:
    """What a new step is worth by its words alone: +-0.1 and `overlap(gold, step) - .5` (the authors' code).

    The 0.1 is added where the step has `end_marker` and the right answer `gold` has it too, or neither has,
    and else taken off.
    """
    agrees = (end_marker in step) == (end_marker in gold)
    return (END_REWARD if agrees else -END_REWARD) + overlap(gold, step) - 0.5


def self_evaluation(probabilities: Sequence[float]) -> float:
    """`(A + .1 B - C - 2 D) / 4`: a forced choice of four marks as one number (the authors' code).

    `(.8, .15, .04, .01)` gives .18875.
    """
    a, b, c, d = probabilities
    return (a + 0.1 * b - c - 2.0 * d) / 4.0


@dataclass(frozen=True, slots=True)
class Siblings:
    """The best and the worst child of a node, and why they are no pair (None: they are one)."""

    best: Node
    worst: Node
    reason: str | None


ALL_WRONG = "all completions below are wrong"
ALL_RIGHT = "all completions below are right"
NO_CONTRAST = "values too close"
ALIKE = "steps too much alike"
POOR = "the best step is too bad"


def compare(node: Node, *, min_gap: float, max_overlap: float, min_best: float) -> Siblings | None:
    """The pair among the children of `node`; None where fewer than two were simulated.

    The best and the worst value are compared: they must differ by `min_gap`, share no more than `max_overlap`
    of their words, and the better one must be worth `min_best` (spec of the authors' filter). Of equal values
    the first child is the best, and the last one the worst.
    """
    children = [child for child in node.children if child.visits]
    if len(children) < 2:
        return None
    best = max(children, key=lambda child: child.value)
    worst = min(reversed(children), key=lambda child: child.value)
    reason = None
    # values are sums of rewards: a gap that is the limit but for rounding counts
    if best.value - worst.value < min_gap - 1e-9 or best.value == worst.value:
        right, rollouts = sum(c.right for c in children), sum(c.rollouts for c in children)
        reason = ALL_WRONG if not right else ALL_RIGHT if right == rollouts else NO_CONTRAST
    elif best.value < min_best - 1e-9:
        reason = POOR
    elif overlap(best.text, worst.text) > max_overlap:
        reason = ALIKE
    return Siblings(best, worst, reason)
