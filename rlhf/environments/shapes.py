"""The shapes of environments, found by their methods: tools, a conversation, and MultiTurnEnv of verifiers.

    class Calculator:                              # environment_factory of TRL's GRPOTrainer
        def reset(self, **columns): ...            # a text, parts or messages put behind the prompt; or None
        def multiply(self, a: int, b: int) -> int: ...     # every other public method is a tool
        def get_reward(self): ...                  # optional: a number, or numbers by name

    class Market:                                  # free conversation
        def reset(self, **columns): ...
        def respond(self, messages): ...           # the new messages; None: the episode is over

    class Game(vf.MultiTurnEnv): ...               # setup_state, env_response, is_completed: verifiers 0.1

    def multiply(a: int, b: int) -> int: ...       # a function is a tool (TRL's `tools`)

Functions among several paths are tools of every environment, as in TRL; functions alone are one environment.
All methods may be async. `reset` gets the columns that it takes, all of them with `**columns`, and `seed` if
it has an argument of that name, as the constructor has. What differs from TRL: 1. an instance has
one episode and is not used again; 2. the calls of one turn are carried out one after the other, async ones
too; 3. arguments are checked before the tool is called. Of verifiers, datasets and rubrics are not used:
reward functions are this project's.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlhf.environments.calls import Call, Malformed, Parser
from rlhf.environments.observations import Texts, WrongAnswer
from rlhf.environments.protocol import Ending, Message, Reply
from rlhf.environments.state import public_state, reward_of
from rlhf.environments.tools import DoesNotFit, fitted
from rlhf.rewards.signature import did_you_mean
from rlhf.rewards.workers.worker import raised

Wait = Callable[[Any], Any]
"""The result of what a function returned: awaited, if it is awaitable."""


class Abandoned(BaseException):
    """Raised in the thread of an episode whose time is up."""


class Episode(ABC):
    """One instance of an environment. Any exception means that the episode is lost."""

    def __init__(self, name: str, instance: Any, wait: Wait) -> None:
        self.name, self.instance, self.wait = name, instance, wait

    @abstractmethod
    def respond(self, messages: Sequence[Message]) -> Reply: ...

    def end(self) -> Ending:
        """Its own reward, and its public attributes."""
        get_reward = getattr(self.instance, "get_reward", None)
        reward = None if get_reward is None else reward_of(self.wait(get_reward()), self.name)
        return Ending(reward, public_state(self.variables()))

    def variables(self) -> Mapping[str, Any]:
        return getattr(self.instance, "__dict__", {})


class ToolEpisode(Episode):
    """An instance with tools, or functions alone."""

    def __init__(
        self, name: str, instance: Any, wait: Wait, tools: Mapping[str, tuple[Any, Any]], parser: Parser
    ) -> None:
        """`tools`: function and schema by name."""
        super().__init__(name, instance, wait)
        self.tools, self.parser = tools, parser

    def respond(self, messages: Sequence[Message]) -> Reply:
        text, texts = text_of(messages[-1]), Texts()
        parsed = self.parser(text)
        if not parsed.calls:
            return Reply(turn={"role": "assistant", "content": text})
        answered = [self._answer(call, texts) for call in parsed.calls]
        made = [call for call in parsed.calls if isinstance(call, Call)]
        turn: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if made:
            functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in made]
            turn["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        said = [how for how, _ in answered]
        return Reply(
            messages=tuple(message for _, message in answered),
            turn=turn,
            calls=said.count("done") + said.count("error"),
            errors=said.count("error"),
            malformed=said.count("malformed"),
            truncated=texts.truncated,
        )

    def _answer(self, call: Call | Malformed, texts: Texts) -> tuple[str, Message]:
        """How a call went, "done", "error" or "malformed", and the message with its result."""
        try:
            if isinstance(call, Malformed):
                raise DoesNotFit(call.reason)
            if call.name not in self.tools:
                known = ", ".join(self.tools)
                raise DoesNotFit(
                    f"there is no tool {call.name!r}{did_you_mean(call.name, self.tools)}; the tools: {known}"
                )
            function, schema = self.tools[call.name]
            arguments = fitted(call.arguments, schema)
        except DoesNotFit as error:
            return "malformed", _result(call.name, texts.of_result({"error": str(error)}))
        try:
            return "done", _result(call.name, texts.of_result(self.wait(function(**arguments))))
        except Abandoned:
            raise
        except BaseException as error:
            # a tool may raise anything, even SystemExit; the policy is told, and the episode goes on
            return "error", _result(call.name, texts.of_result({"error": raised(error)}))


class Conversation(Episode):
    """An instance that answers the policy's turns with messages."""

    def respond(self, messages: Sequence[Message]) -> Reply:
        texts, given = Texts(), [dict(message) for message in messages]
        said = texts.messages(self.wait(self.instance.respond(given)), f"respond of {self.name}")
        if len(said) >= len(messages) and [dict(message) for message in messages] == said[: len(messages)]:
            raise WrongAnswer(
                f"respond of {self.name} must return the new messages only, not the conversation"
            )
        turn = {"role": "assistant", "content": text_of(messages[-1])}
        return Reply(tuple(said), turn, truncated=texts.truncated)


class VerifiersEpisode(Episode):
    """A state of an object of verifiers; all episodes of a process share the object, as they do there."""

    def __init__(
        self, name: str, instance: Any, wait: Wait, state: dict[str, Any], given: frozenset[str]
    ) -> None:
        """`given`: keys of the state that are not the environment's own."""
        super().__init__(name, instance, wait)
        self.state, self.given = state, given

    def respond(self, messages: Sequence[Message]) -> Reply:
        given, turn = [dict(m) for m in messages], {"role": "assistant", "content": text_of(messages[-1])}
        if not self.state["trajectory"]:
            self.state["prompt"] = given[:-1]
        self.state["completion"] = given[len(self.state["prompt"]) :]
        self.state["turn"] += 1
        self.state["responses"].append(turn)
        step: dict[str, Any] = {
            "prompt": given[:-1],
            "completion": [turn],
            "reward": None,
            "advantage": None,
            "extras": {},
        }
        self.state["trajectory"].append(step)
        if self._ask("is_completed", given):
            return Reply(turn=turn)
        returned, texts = self._ask("env_response", given), Texts()
        if isinstance(returned, tuple):
            # before 0.1.9 it returned messages and state
            returned, self.state = cast(tuple[Any, dict[str, Any]], returned)
        said = texts.messages(returned, f"env_response of {self.name}")
        if self.state.get("final_env_response") is not None or (
            # where it takes the messages, verifiers asks before each turn too
            "messages" in parameters(self.instance.is_completed) and self._ask("is_completed", given + said)
        ):
            return Reply(turn=turn)
        return Reply(tuple(said), turn, truncated=texts.truncated)

    def _ask(self, method: str, messages: list[dict[str, Any]]) -> Any:
        function = getattr(self.instance, method)
        given: dict[str, Any] = {"messages": messages, "state": self.state}
        return self.wait(function(**{key: given[key] for key in parameters(function) if key in given}))

    def variables(self) -> Mapping[str, Any]:
        return {key: value for key, value in self.state.items() if key not in self.given}


def verifiers_state(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an episode as verifiers makes it from a line of the dataset."""
    return {
        "id": 0,
        "prompt": [],
        "answer": "",
        "task": "default",
        "info": {},
        "example_id": 0,
        **columns,
        "completion": [],
        "responses": [],
        "trajectory": [],
        "turn": 0,
        "timing": {"generation_ms": 0.0, "scoring_ms": 0.0, "total_ms": 0.0},
    }


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that can be given by name."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_any(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def text_of(message: Message) -> str:
    """The text of a message, whose content may be parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _result(name: str, content: str | list[dict[str, Any]]) -> Message:
    return {"role": "tool", "name": name or "unknown", "content": content}
