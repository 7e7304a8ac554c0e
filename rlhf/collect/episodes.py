"""`Episodes`: runs episodes of several turns; it stands where `generate` stands for completions of one turn.

1. Every sample gets an instance of its environment, which is reset before the first token; the samples of a
   group get the same columns and seed, so they start alike and share their prompt.
2. The first turn of a group is one request of n samples. Each finished turn goes to its environment while
   others decode; the next turn is a request of one sample whose prompt is the token ids so far and those of
   the observation.
3. An episode ends when the environment has nothing to answer, after `environment.max_turns` turns, or when
   `rollout.max_completion_tokens`, which counts observations too, is reached.

Turn k of sample i draws with a seed made of the group's seed, i and k, so what an episode samples does not
depend on how long an environment took, but for the rounding of matrix products of another size. Decoding
waits for answers as long as that costs little (`PATIENCE`), so that with environments that answer quickly a
run repeats itself bit for bit. The environment of a turn that was cut gets no call for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.collect.running_episodes import Decoding, RunningEpisode, RunningGroup
from rlhf.config.run import Config
from rlhf.data.prompts import TOOLS
from rlhf.distributed.world import derive_seed
from rlhf.environments.conversation import Conversation, without_cuts, without_images
from rlhf.environments.protocol import Ending, Environments, Lost, Message, Reply
from rlhf.inputs import Inputs
from rlhf.models.chat import ChatError
from rlhf.models.pretrained import decoded
from rlhf.models.vision.images import ImageError
from rlhf.rollout.engine import KeepsSamples, RolloutEngine, RolloutRequest
from rlhf.rollout.episode import Episode
from rlhf.types import Completion, FinishReason, Prompt

POLL_SECONDS = 0.02
"""How long the engine decodes, at most, before answers of environments are looked at."""
WAIT_SECONDS = 0.2
"""How long answers are waited for, at most, when nothing is decoded."""
PATIENCE = (1.0, 0.05)
"""How long decoding may wait for answers in one call of `run`: seconds, and share of the time so far."""

Outcome = Reply | Ending | Lost


@dataclass(frozen=True, slots=True)
class Episodes:
    """`max_turns` and `max_prompt_tokens`: the settings of these names."""

    engine: RolloutEngine
    environments: Environments
    conversation: Conversation
    tokenizer: PreTrainedTokenizerBase
    max_turns: int
    max_prompt_tokens: int

    @classmethod
    def of(cls, config: Config, inputs: Inputs, engine: RolloutEngine) -> Episodes | None:
        """What runs the episodes of a run; None where no environment answers."""
        if inputs.environments is None or inputs.conversation is None:
            return None
        return cls(
            engine,
            inputs.environments,
            inputs.conversation,
            inputs.tokenizer,
            config.environment.max_turns,
            config.data.max_prompt_tokens,
        )

    def run(
        self,
        requests: Sequence[RolloutRequest],
        seeds: Sequence[int],
        *,
        between: Callable[[], None] | None = None,
        finished: Callable[[int, list[Episode]], None] | None = None,
        arrived: Callable[[int, int], None] | None = None,
    ) -> list[list[Episode]]:
        """The episodes of each request, sorted by `index`; arguments are those of `generate`.

        `seeds`: what the environments of each request's samples are reset with. An episode whose environment
        fails has `lost` set; it never raises. Raises RuntimeError as `generate` does.
        """
        return _Run(self, requests, seeds, finished, arrived).all(between)


class _Run:
    """One call of `Episodes.run`."""

    def __init__(
        self,
        episodes: Episodes,
        requests: Sequence[RolloutRequest],
        seeds: Sequence[int],
        finished: Callable[[int, list[Episode]], None] | None,
        arrived: Callable[[int, int], None] | None,
    ) -> None:
        self.own, self.engine, self.environments = episodes, episodes.engine, episodes.environments
        self.finished, self.arrived = finished, arrived
        self.began, self.waited = time.monotonic(), 0.0
        self.outcomes: SimpleQueue[tuple[RunningEpisode, Outcome]] = SimpleQueue()
        self.asked = 0
        """Calls of environments that have not been answered."""
        self.decoding: dict[str, Decoding] = {}
        """What the engine samples, by the id of its request."""
        self.ready: deque[RolloutRequest] = deque()
        self.groups = [
            RunningGroup(number, request, self.environments.name_for(request.prompt.columns))
            for number, request in enumerate(requests)
        ]
        self.seeds = seeds
        self.total = sum(request.params.n for request in requests)
        self.missing = self.total

    def all(self, between: Callable[[], None] | None) -> list[list[Episode]]:
        try:
            for group, seed in zip(self.groups, self.seeds, strict=True):
                self._begin(group, seed)
            while self.missing:
                if between is not None:
                    between()
                self._answers()
                if self.ready:
                    self.engine.submit([self.ready.popleft() for _ in range(len(self.ready))])
                self._decode()
        except BaseException:
            self.engine.pause("abort")
            self.engine.poll(timeout=0.0)
            self.engine.resume()
            for group in self.groups:
                for episode in group.running:
                    self.environments.drop(episode.key)
            raise
        return [[group.done[i] for i in sorted(group.done)] for group in self.groups]

    def _begin(self, group: RunningGroup, seed: int) -> None:
        prompt = group.request.prompt
        for index in range(group.request.params.n):
            episode = RunningEpisode(group, index, prompt)
            group.running.append(episode)
            self.asked += 1
            finish = partial(self._put, episode)
            self.environments.begin(episode.key, group.name, prompt.columns, seed, finish)

    def _put(self, episode: RunningEpisode, outcome: Outcome) -> None:
        """Called from another thread."""
        self.outcomes.put((episode, outcome))

    def _answers(self) -> None:
        """Goes on with the episodes whose environments have answered."""
        found: list[tuple[RunningEpisode, Outcome]] = []
        while len(found) < self.asked:
            idle = not (found or self.decoding or self.ready)
            begin = time.monotonic()
            seconds, share = PATIENCE
            patience = seconds + share * (begin - self.began) - self.waited
            try:
                found.append(self.outcomes.get(timeout=WAIT_SECONDS if idle else max(0.0, patience)))
            except Empty:
                break
            finally:
                if not idle:
                    self.waited += time.monotonic() - begin
        self.asked -= len(found)
        # the order in which they happened to arrive decides nothing
        for episode, outcome in sorted(found, key=lambda one: (one[0].group.number, one[0].index)):
            self._go_on(episode, outcome)

    def _go_on(self, episode: RunningEpisode, outcome: Outcome) -> None:
        group = episode.group
        if isinstance(outcome, Reply):
            episode.replies.append(outcome)
        if episode.index not in group.begun:
            assert not isinstance(outcome, Ending)
            group.begun[episode.index] = outcome if isinstance(outcome, Lost) else outcome.messages
            if len(group.begun) == len(group.running):
                self._open(group)
        elif isinstance(outcome, Reply):
            self._observe(episode, outcome)
        else:
            self._end(episode, outcome)

    def _open(self, group: RunningGroup) -> None:
        """All samples of a group are reset: asks for their first turns, of the prompt that they share."""
        found = [group.begun[i] for i in range(len(group.running))]
        first = next((f for f in found if not isinstance(f, Lost)), None)
        shared = None if first is None else self._prompt(group.request.prompt, first)
        for episode, own in zip(group.running, found, strict=True):
            if isinstance(own, Lost):
                self._end(episode, own)
            elif isinstance(shared, Lost):
                self.environments.drop(episode.key)
                self._end(episode, shared)
            elif own != first:
                self.environments.drop(episode.key)
                self._end(episode, Lost("value", _BEGAN_OTHERWISE.format(name=group.name)))
            else:
                assert shared is not None
                episode.prompt = shared
        going = [e for e in group.running if e.index not in group.done]
        if going:
            assert isinstance(shared, Prompt)
            self._ask(replace(group.request, prompt=shared), group.running)

    def _prompt(self, prompt: Prompt, messages: Sequence[Message]) -> Prompt | Lost:
        """The prompt with what the reset has put behind it."""
        if not messages:
            return prompt
        assert not isinstance(prompt.content, str)
        messages, more = without_images(messages)
        content = self.own.conversation.put_behind(prompt.content, messages)
        images = (*(prompt.images or ()), *more)
        try:
            ids = self.own.conversation.prompt(content, cast(Any, prompt.columns.get(TOOLS)), images)
        except (ChatError, ImageError) as error:
            return Lost("value", f"what reset returned cannot be written into the prompt: {error}")
        if len(ids) > self.own.max_prompt_tokens:
            return Lost(
                "value",
                f"with what reset returned the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                f"{self.own.max_prompt_tokens}",
            )
        return replace(
            prompt,
            token_ids=ids,
            content=without_cuts(content),
            images=images or None,
            original=prompt,
        )

    def _ask(self, request: RolloutRequest, episodes: list[RunningEpisode]) -> None:
        last = episodes[0].num_turns + 1 == self.own.max_turns
        self.ready.append(replace(request, keeps=not last))
        self.decoding[request.prompt.id] = Decoding(episodes, len(episodes))

    def _decode(self) -> None:
        if not self.decoding:
            return
        polled = self.engine.poll(POLL_SECONDS if self.asked else None)
        if not polled and not self.asked:
            raise RuntimeError(f"the rollout engine stopped with {self.missing} episodes missing")
        for completion in polled:
            decoding = self.decoding[completion.prompt_id]
            episode = decoding.episodes[completion.index]
            decoding.missing -= 1
            if not decoding.missing:
                del self.decoding[completion.prompt_id]
            if episode.index not in episode.group.done:
                episode.turns.append(completion)
                self._turn(episode, completion)
            elif isinstance(self.engine, KeepsSamples):
                # a sample that was lost at its reset is sampled with its group all the same
                self.engine.forget((completion.prompt_id, completion.index))

    def _turn(self, episode: RunningEpisode, completion: Completion) -> None:
        """The policy has ended a turn: the environment answers."""
        ended = completion.finish_reason == FinishReason.STOP
        closed = completion.token_ids[-1:] and completion.token_ids[-1] in self.own.conversation.end_token_ids
        own = completion.token_ids[:-1] if closed else completion.token_ids
        text = decoded(self.own.tokenizer, own, frozenset())
        episode.messages.append({"role": "assistant", "content": text})
        self.asked += 1
        finish = partial(self._put, episode)
        if ended:
            self.environments.respond(episode.key, tuple(episode.messages), finish)
        else:
            episode.reason = completion.finish_reason
            self.environments.end(episode.key, tuple(episode.messages), finish)

    def _observe(self, episode: RunningEpisode, reply: Reply) -> None:
        """The environment has answered: another turn, or the end."""
        if reply.turn is not None:
            episode.messages[-1] = reply.turn
        last = episode.num_turns == self.own.max_turns
        if reply.messages and not last:
            try:
                token = episode.turns[-1].token_ids[-1]
                observed = self.own.conversation.observation(reply.messages, token)
            except (ChatError, ImageError) as error:
                self.environments.drop(episode.key)
                self._end(episode, Lost("value", f"its answer cannot be written: {error}"))
                return
            room = episode.group.request.params.max_tokens - len(episode.tokens) - len(observed.token_ids)
            if room > 0:
                episode.messages += without_images(reply.messages)[0]
                episode.turns.append(observed)
                self._next(episode, room)
                return
            episode.reason = FinishReason.LENGTH
        self.asked += 1
        finish = partial(self._put, episode)
        self.environments.end(episode.key, tuple(episode.messages), finish)

    def _next(self, episode: RunningEpisode, room: int) -> None:
        request, number = episode.group.request, episode.num_turns
        prompt = episode.next_prompt(self.own.conversation)
        seed = derive_seed(request.params.seed, f"{episode.index}/{number}")
        params = replace(request.params, n=1, max_tokens=room, seed=seed)
        request = replace(request, prompt=prompt, params=params, continues=episode.last_sample)
        self._ask(request, [episode])

    def _end(self, episode: RunningEpisode, outcome: Ending | Lost) -> None:
        group = episode.group
        if episode.turns and isinstance(self.engine, KeepsSamples):
            self.engine.forget(episode.last_sample)
        ending, lost = (outcome, None) if isinstance(outcome, Ending) else (Ending(), outcome)
        group.done[episode.index] = episode.ended(ending, lost)
        self.missing -= 1
        if self.arrived is not None:
            self.arrived(self.total - self.missing, self.total)
        if self.finished is not None and len(group.done) == len(group.running):
            self.finished(group.number, [group.done[i] for i in sorted(group.done)])


_BEGAN_OTHERWISE = (
    "environment {name}: reset returned another text than for the first sample of the prompt, with the same "
    "columns and seed; the samples of a prompt are compared, so they must begin alike: draw at random from "
    "the argument seed of reset"
)
