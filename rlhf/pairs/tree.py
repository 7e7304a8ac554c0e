"""`rlhf pairs tree`: pairs of next steps from a tree search, whose values are rewards of sampled completions.

iTool (arXiv:2501.09766). A step is expanded (`tree.actions` next steps are sampled), each new step is
simulated (`tree.rollouts` completions are sampled behind it and scored), and its value is added to all steps
above it. After `tree.iterations` of that the best and the worst next step of every node are a pair, whose
prompt is all that stands before them.

What differs from the authors' code:

1. A simulation goes on to the end of the completion, or of the episode where an environment answers, and
   its value is the mean of the run's rewards; the authors have the model mark two more steps
   (`tree.evaluator: self` has it mark whole completions).
2. All new steps are simulated, so that siblings that are compared have values.
3. No repetition penalty: theirs is printed as 0.75, and below 1 it rewards repetition.
4. The value in the pair filter is a mean; which of Q and Q / N theirs compares is not known here.
5. A step is the first `tree.step_parts` parts of what was sampled, and ends with a token. One whose text
   would not be read as the same tokens is left out (tree_steps.py).

With an environment the tree grows over the policy's first turn; later turns only decide what it is worth.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlhf.collect.episodes import Episodes
from rlhf.collect.sampler import Sampler
from rlhf.config.reward import RewardConfig
from rlhf.config.run import Config
from rlhf.config.tree import TreeConfig
from rlhf.distributed.world import derive_seed
from rlhf.inputs import Inputs
from rlhf.pairs.files import Made, Pair
from rlhf.pairs.tree_search import Node, back_up, compare, fast_reward, select
from rlhf.pairs.tree_steps import ReadBack, step_length
from rlhf.rewards.success import is_correct
from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.rollout.episode import Episode, Sample
from rlhf.rollout.prefixed import PrefixedEngine
from rlhf.types import Completion, FinishReason, Group, Prompt

NO_REWARD = "no completion of the prompt has a reward"
UNREADABLE = "the prompt is not read as the same tokens"

Valued = tuple[list[float], int]
"""The values of completions that have one, and how many of them are correct."""


@dataclass(slots=True, eq=False)
class Tree:
    """The search of one prompt."""

    prompt: Prompt
    root: Node = field(default_factory=Node)
    start: tuple[int, ...] = ()
    """Tokens of the prompt, with what an environment put behind it."""
    text: str | None = None
    dropped: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])

    @property
    def is_done(self) -> bool:
        """Whether the search was given up."""
        return bool(self.dropped)


class TreeSearch:
    """Searches the trees of several prompts at the same time; what it finds depends on them alone.

    `sampler` samples rollouts with an engine that is a `PrefixedEngine`.
    """

    def __init__(
        self,
        settings: TreeConfig,
        sampler: Sampler,
        rewards: RewardConfig,
        end_token_ids: Sequence[int],
        evaluate: Callable[[Group], list[float | None]] | None = None,
    ) -> None:
        """`evaluate`: gives the completions of a prompt their values; None: these are their rewards."""
        assert isinstance(sampler.engine, PrefixedEngine)
        self.settings, self.sampler, self.rewards = settings, sampler, rewards
        self.engine = sampler.engine
        self.evaluate = evaluate
        self.reader = ReadBack(sampler.tokenizer, frozenset(end_token_ids))
        self.delimiter = re.compile(settings.delimiter)

    @classmethod
    def of(
        cls,
        config: Config,
        settings: TreeConfig,
        inputs: Inputs,
        engine: RolloutEngine,
        evaluate: Callable[[Group], list[float | None]] | None = None,
    ) -> TreeSearch:
        """The search of a run's settings; `config` has the sections that sampling needs."""
        prefixed = PrefixedEngine(engine, inputs.eos_token_ids)
        episodes = Episodes.of(config, inputs, prefixed)
        sampler = Sampler(
            prefixed, inputs.rewards, inputs.tokenizer, config.rollout, config.seed, episodes=episodes
        )
        return cls(settings, sampler, config.reward, inputs.eos_token_ids, evaluate)

    def search(self, prompts: Sequence[Prompt]) -> list[Made]:
        """The pairs of each prompt. Raises RewardError or EngineError."""
        return [self._made(tree) for tree in self.grow(prompts)]

    def grow(self, prompts: Sequence[Prompt]) -> list[Tree]:
        """The trees of the prompts, fully grown."""
        settings = self.settings
        trees = [Tree(prompt) for prompt in prompts]
        self._simulate([(tree, tree.root, "start") for tree in trees])
        for number in range(settings.iterations):
            growing: list[tuple[Tree, Node]] = []
            for tree in trees:
                step = (
                    None
                    if tree.is_done
                    else select(tree.root, exploration=settings.exploration, depth=settings.depth)
                )
                if step is not None:
                    growing.append((tree, step))
            if not growing:
                break
            self._expand(growing, number)
            self._simulate(
                [(t, c, f"{number}/{i}") for t, node in growing for i, c in enumerate(node.children)]
            )
        return trees

    def _simulate(self, steps: Sequence[tuple[Tree, Node, str]]) -> None:
        """Samples completions behind each step, scores them, and adds their values to the steps above."""
        if not steps:
            return
        requests: list[RolloutRequest] = []
        for tree, node, label in steps:
            # without an environment nothing more is drawn behind a turn that has ended
            n = 1 if node.ended and self.sampler.episodes is None else self.settings.rollouts
            request = self.sampler.request(tree.prompt, n=n, label=f"tree/{label}")
            if node.tokens:
                self.engine.prefixes[request.prompt.id] = node.tokens
            requests.append(request)
        samples = self._sampled(requests, [tree for tree, _, _ in steps])
        groups, _ = self.sampler.score([tree.prompt for tree, _, _ in steps], samples, 0)
        for (tree, node, _), own, group in zip(steps, samples, groups, strict=True):
            if node.parent is None:
                self._begin(tree, own)
            self._value(tree, node, group)

    def _sampled(self, requests: Sequence[RolloutRequest], trees: Sequence[Tree]) -> list[list[Sample]]:
        if self.sampler.episodes is None:
            return [list(found) for found in generate(self.engine, requests)]
        # the episodes of a prompt begin alike, so that their prompt is the same
        seeds = [derive_seed(self.sampler.seed, f"environment/tree/{tree.prompt.id}") for tree in trees]
        return [list(found) for found in self.sampler.episodes.run(requests, seeds)]

    def _begin(self, tree: Tree, samples: Sequence[Sample]) -> None:
        """The first completions of a prompt tell what an environment puts behind it."""
        begun = [s.prompt for s in samples if isinstance(s, Episode) and s.turns]
        tree.start = (begun[0] if begun else tree.prompt).token_ids
        tree.text = self.reader.prompt(tree.start)
        if tree.text is None:
            tree.dropped[UNREADABLE] += 1

    def _value(self, tree: Tree, node: Node, group: Group) -> None:
        values, right = self._values(group)
        tree.counts["completions"] += len(group.trajectories)
        if lost := len(group.trajectories) - len(values):
            tree.counts["completions without a reward"] += lost
        if values:
            value = math.fsum(values) / len(values) + node.fast
            back_up(node, value, rollouts=len(values), right=right)
        elif node.parent is None:
            tree.dropped[NO_REWARD] += 1
        else:
            # nothing is known of it: it is in no pair, and nothing grows from it
            node.ended = True

    def _values(self, group: Group) -> Valued:
        trajectories = group.trajectories
        given = [t.reward for t in trajectories] if self.evaluate is None else self.evaluate(group)
        known = [(v, t) for v, t in zip(given, trajectories, strict=True) if v is not None]
        return [v for v, _ in known], sum(is_correct(t, self.rewards) for _, t in known)

    def _expand(self, growing: Sequence[tuple[Tree, Node]], number: int) -> None:
        requests = [self._steps_request(tree, node, number) for tree, node in growing]
        for (tree, node), found in zip(growing, generate(self.engine, requests), strict=True):
            node.expanded = True
            for completion in found:
                self._add(tree, node, completion)

    def _steps_request(self, tree: Tree, node: Node, number: int) -> RolloutRequest:
        section, settings = self.sampler.section, self.settings
        room = section.max_completion_tokens - len(node.tokens)
        last = node.depth + 1 == settings.depth
        name = f"{tree.prompt.id}@tree/{number}/steps"
        params = SamplingParams(
            n=settings.actions,
            max_tokens=room if last else min(room, settings.step_tokens),
            seed=derive_seed(self.sampler.seed, name),
            temperature=settings.temperature,
            stop_token_ids=section.stop_token_ids,
        )
        prompt = Prompt(name, tree.start + node.tokens, tree.prompt.content)
        return RolloutRequest(prompt, params)

    def _add(self, tree: Tree, node: Node, completion: Completion) -> None:
        """Adds the first step of a completion to the children of `node`."""
        tree.counts["steps sampled"] += 1
        last = node.depth + 1 == self.settings.depth
        ids, logprobs = completion.token_ids, completion.rollout_logprobs
        size = len(ids)
        if not last:
            size = step_length(self.sampler.tokenizer, ids, self.delimiter, self.settings.step_parts)
        tokens = node.tokens + ids[:size]
        stopped = size == len(ids) and completion.finish_reason == FinishReason.STOP
        ended = stopped or len(tokens) >= self.sampler.section.max_completion_tokens
        if any(child.tokens == tokens for child in node.children):
            tree.counts["steps sampled twice"] += 1
            return
        text = self.reader.completion(ids[:size])
        if text is None or not (ended or last or self.reader.prompt(tree.start + tokens) is not None):
            tree.counts["steps not read as the same tokens"] += 1
            return
        assert logprobs is not None
        prior = math.exp(math.fsum(logprobs[:size]) / size)
        child = Node(tokens, text, prior, parent=node, ended=ended)
        if self.settings.gold_column is not None:
            gold = str(tree.prompt.columns[self.settings.gold_column])
            child.fast = fast_reward(text, gold, self.settings.end_marker)
        node.children.append(child)

    def _made(self, tree: Tree) -> Made:
        settings, pairs, dropped = self.settings, list[Pair](), Counter(tree.dropped)
        for node in tree.root.all() if not tree.is_done else ():
            found = compare(
                node,
                min_gap=settings.min_gap,
                max_overlap=settings.max_overlap,
                min_best=settings.min_best,
            )
            if found is None and node.expanded:
                tree.counts["expanded steps with fewer than two next steps"] += 1
            elif found is None:
                continue
            elif found.reason is not None:
                dropped[found.reason] += 1
            else:
                pairs.append(self._pair(tree, node, found.best, found.worst))
        return Made(tuple(pairs), dict(dropped), dict(tree.counts))

    def _pair(self, tree: Tree, node: Node, best: Node, worst: Node) -> Pair:
        prompt = self.reader.prompt(tree.start + node.tokens)
        assert prompt is not None
        columns = {
            # what has not ended goes on, so that no end-of-sequence token is put behind it
            "finish_reason": [self._reason(best), self._reason(worst)],
            "question": tree.prompt.id,
            "step": node.depth,
            "values": [round(best.value, 4), round(worst.value, 4)],
        }
        return Pair(prompt, best.text, worst.text, columns=columns)

    def _reason(self, node: Node) -> str:
        stopped = node.tokens[-1] in self.reader.end_token_ids
        return str(FinishReason.STOP if stopped else FinishReason.LENGTH)


def in_batches(
    search: Callable[[Sequence[Prompt]], list[Made]], prompts: Sequence[Prompt], size: int
) -> Callable[[int], Made]:
    """What comes of a prompt, by its number; `size` prompts are searched together, always the same ones.

    So a search that goes on after a kill samples in the same batches, and rounds alike.
    """
    found: dict[int, list[Made]] = {}

    def make(number: int) -> Made:
        batch, place = divmod(number, size)
        if batch not in found:
            found.clear()
            found[batch] = search(prompts[batch * size : (batch + 1) * size])
        return found[batch][place]

    return make
