"""The shapes of environments, as people bring them; without processes where none is needed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from contextvars import Context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlhf.environments.loading import Environment, load
from rlhf.environments.observations import WrongAnswer
from rlhf.environments.protocol import Ending, Reply
from rlhf.environments.randomness import _divert, seed_generators
from rlhf.environments.shapes import Episode
from rlhf.environments.spec import EnvironmentSpec
from tests.environments.asking import begin, call, contents, conversation, end, pool_of, turn
from tests.environments.brought import written

CALCULATOR = f"{Path(__file__).parents[2] / 'examples' / 'calculator' / 'environment.py'}:Calculator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("brought"))


def loaded(*paths: str, **settings: Any) -> dict[str, Environment]:
    return load(EnvironmentSpec(paths, **settings))


def wait(value: Any) -> Any:
    async def awaited() -> Any:
        return await value

    return asyncio.run(awaited()) if inspect.isawaitable(value) else value


def begun(
    environment: Environment, columns: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[Episode, Reply]:
    return environment.begin(columns or {}, seed, wait)


def says(role: str, *texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for text in texts)


def test_examples_of_trl_and_of_verifiers_run_unchanged_in_processes(folder: Path) -> None:
    examples, games = folder / "trl_examples.py", folder / "games.py"
    paths = (f"{examples}:IncrementEnv", f"{examples}:EchoToolEnv", f"{games}:load_environment")
    with pool_of(*paths, workers=2) as pool:
        assert pool.names == ("IncrementEnv", "EchoToolEnv", "Guess")
        (tool,) = pool.tools("IncrementEnv")
        assert tool["function"]["name"] == "increment"
        assert tool["function"]["parameters"] == {
            "type": "object",
            "properties": {"step": {"type": "integer", "description": "Value to add to the counter."}},
            "required": ["step"],
        }
        assert pool.tools("Guess") == []

        # the samples of a group begin with the same seed, and so with the same task
        said = [begin(pool, key, "IncrementEnv", seed=7, columns={"prompt": "Count."}) for key in "abcd"]
        assert said == [said[0]] * 4
        target = int(contents(said[0])[0].split()[-1].rstrip("."))
        assert 1 <= target <= 6
        steps = call("increment", f'{{"step": {target - 1}}}') + call("increment", '{"step": 1}')
        reply = turn(pool, "a", "I add. " + steps)
        assert contents(reply) == [str(target - 1), str(target)]
        assert turn(pool, "a", "Done.") == Reply(turn={"role": "assistant", "content": "Done."})
        assert end(pool, "a") == Ending(1.0, {"counter": target, "target": target})
        assert end(pool, "b") == Ending(0.0, {"counter": 0, "target": target})

        assert begin(pool, "e", "EchoToolEnv") == Reply()
        assert contents(turn(pool, "e", call("echo", '{"message": "Hello"}'))) == ["Hello"]
        # five characters, a tenth each; the client is no JSON and stays behind
        assert end(pool, "e") == Ending(None, {"reward": 0.5})

        assert begin(pool, "g", "Guess", columns={"answer": "5"}) == Reply()
        assert contents(turn(pool, "g", "3")) == ["higher, turn 1"]
        assert contents(turn(pool, "g", "5")) == []
        assert end(pool, "g") == Ending(None, {"low": 1, "high": 7, "guessed": True})
        assert pool.name_for({"environment": "Guess"}) == "Guess"
        with pytest.raises(
            ValueError, match=r"must name one of IncrementEnv, EchoToolEnv, Guess, got 'Gues'"
        ):
            pool.name_for({"environment": "Gues"})


def test_functions_are_tools_of_one_environment(folder: Path) -> None:
    examples = folder / "trl_examples.py"
    ((name, environment),) = loaded(f"{examples}:multiply", f"{examples}:async_add").items()
    assert name == "multiply+async_add"
    episode, reply = begun(environment, {"prompt": "Compute."})
    assert reply == Reply()
    text = call("multiply", '{"a": 6, "b": 7}') + call("async_add", '{"a": 6, "b": 7.0}')
    assert contents(episode.respond(conversation(text))) == ["42", "13"]
    assert episode.end() == Ending()


def test_functions_beside_classes_are_tools_of_each(folder: Path) -> None:
    examples = folder / "trl_examples.py"
    both = loaded(f"{examples}:IncrementEnv", f"{examples}:multiply", f"{examples}:EchoToolEnv")
    assert {name: list(one.tools) for name, one in both.items()} == {
        "IncrementEnv": ["increment", "multiply"],
        "EchoToolEnv": ["echo", "multiply"],
    }
    episode, _ = begun(both["EchoToolEnv"])
    text = call("multiply", '{"a": 6, "b": 7}') + call("echo", '{"message": "ho"}')
    assert contents(episode.respond(conversation(text))) == ["42", "ho"]


def test_tools_of_a_class_and_the_end_of_its_episode() -> None:
    calculator = loaded(CALCULATOR)["Calculator"]
    episode, _ = begun(calculator)
    text = "Let me see. " + "".join(
        call(name, '{"a": 0.1, "b": 0.2}') for name in ("add", "subtract", "multiply", "divide")
    )
    reply = episode.respond(conversation(text))
    # exact decimals: 0.1 + 0.2 is not 0.30000000000000004
    assert contents(reply) == ["0.3", "-0.1", "0.02", "0.5"]
    assert [message["name"] for message in reply.messages] == ["add", "subtract", "multiply", "divide"]
    assert reply.turn is not None
    assert reply.turn["content"] == "Let me see."
    function = {"name": "add", "arguments": {"a": 0.1, "b": 0.2}}
    assert reply.turn["tool_calls"][0] == {"type": "function", "function": function}
    reply = episode.respond(conversation(call("divide", '{"a": 1, "b": 0}')))
    assert contents(reply) == ['{"error": "ValueError: division by zero"}']
    assert (reply.calls, reply.errors, reply.malformed) == (1, 1, 0)
    wrong = call("add", '{"a": "1", "b": 2}') + call("sub", "{}") + "<tool_call>{</tool_call>"
    reply = episode.respond(conversation(wrong))
    assert contents(reply) == [
        '{"error": "a must be a number, got \'1\'"}',
        '{"error": "there is no tool \'sub\'; the tools: add, divide, multiply, subtract"}',
        '{"error": "the call is not JSON: Expecting property name enclosed in double quotes"}',
    ]
    assert (reply.calls, reply.errors, reply.malformed) == (0, 0, 3)
    assert contents(episode.respond(conversation("<think>" + call("add") + "</think>Three."))) == []


def test_a_conversation_gets_columns_and_seed_and_ends_with_none(folder: Path) -> None:
    market = loaded(f"{folder / 'own.py'}:Market", params={"greeting": "Hello."})["Market"]
    assert market.requires == ["wants"]
    columns = {"wants": "tea", "prompt": "Sell.", "other": 1}
    episode, reply = begun(market, columns, seed=3)
    again, _ = begun(market, columns, seed=3)
    assert contents(reply) == [[{"type": "text", "text": "Hello."}]]
    reply = episode.respond(conversation("Coffee?"))
    assert reply.messages == says("user", "No, thank you.")
    assert reply.turn == {"role": "assistant", "content": "Coffee?"}
    assert episode.respond(conversation("Green tea?")).messages == ()
    ending, other = episode.end(), (again.respond(conversation("Tea?")), again.end())[1]
    assert ending.reward == {"sold": 1.0, "turns": -2.0}
    assert (ending.state["first"], ending.state["second"]) == (other.state["first"], other.state["second"])
    assert ending.state["offers"] == ["Coffee?", "Green tea?"]
    again.respond(conversation("Water?"))
    with pytest.raises(WrongAnswer, match="must return the new messages only"):
        again.respond(conversation("Milk?"))


def test_a_class_of_verifiers_with_the_state_alone(folder: Path) -> None:
    count = loaded(f"{folder / 'games.py'}:Count")["Count"]
    episode, reply = begun(count, {"answer": "x"})
    assert reply == Reply()
    first = [*says("system", "Count."), *says("user", "Go."), *says("assistant", "one")]
    reply = episode.respond(first)
    # what the policy wrote is the completion so far
    assert reply.messages == says("user", "1 messages")
    second = [*first, *reply.messages, *says("assistant", "two")]
    assert contents(episode.respond(second)) == ["3 messages"]
    # at the third turn it is completed, before the environment answers
    third = [*second, *says("user", "3 messages"), *says("assistant", "three")]
    assert episode.respond(third).messages == ()
    assert episode.end() == Ending(None, {"seen": 5})
    other, _ = begun(count)
    assert other.respond(conversation("stop")).messages == ()


def test_functions_of_a_shared_generator_draw_from_that_of_the_episode() -> None:
    shared, module = np.random.RandomState(1), ModuleType("numpy.random")
    # as numpy has them: methods of the shared generator, and a function that seeds it
    vars(module).update(rand=shared.rand, randint=shared.randint, seed=lambda seed: shared.seed(seed))
    _divert(module, shared)

    def episode(seed: int) -> tuple[float, int, float]:
        seed_generators(seed)
        drawn = module.rand(), module.randint(100)
        module.seed(9)
        return *drawn, module.rand()

    own = np.random.RandomState(5)
    expected = own.rand(), own.randint(100), np.random.RandomState(9).rand()
    outside = np.random.RandomState(1)
    assert Context().run(module.rand) == outside.rand()
    assert Context().run(episode, 5) == Context().run(episode, 5) == expected
    # nothing of this was drawn from the shared one
    assert Context().run(module.rand) == outside.rand()


REFUSED = {
    "class Nothing:\n    def reset(self): ...": (
        "is none of the shapes that are understood: it has no tool (a public method with type hints and a"
    ),
    'class NoReset:\n    def go(self) -> str:\n        """Goes."""': (
        "has no method reset, which begins an episode: add `def reset(self, **columns): ...`"
    ),
    'class Untyped:\n    def reset(self): ...\n    def go(self, far):\n        """Goes."""': (
        "mine.py:3: tool Untyped.go: the argument far has no type hint: write `far: float`, or int"
    ),
    "class Undocumented:\n    def reset(self): ...\n    def go(self, far: int) -> str: ...": (
        "mine.py:3: tool Undocumented.go has no schema (it has no docstring). "
        "Its docstring must be like this:\n"
        '    """What the tool does.\n\n    Args:\n        far: What it is.\n    """'
    ),
    'class Half:\n    def reset(self): ...\n    def go(self, far: int) -> str:\n        """Goes."""': (
        "tool Half.go has no schema (the docstring has no description for the argument 'far')"
    ),
    'class Any_:\n    def reset(self): ...\n    def go(self, **how: int) -> str:\n        """Goes."""': (
        "tool Any_.go takes **how: int, but the policy gives arguments by name: name each of them"
    ),
    "class Talk:\n    def reset(self): ...\n    def respond(self, answer, more): ...": (
        "has the method respond(messages) of an environment that converses freely"
    ),
    'def reset() -> str:\n    """Starts."""': "a tool cannot be called reset, the name of a method",
    "class Needs:\n    def __init__(self, url): ...\n    def reset(self): ...": (
        "needs the argument 'url': set it in environment.params"
    ),
    "class Open:\n    def env_response(self, messages, state): ...": (
        "has no method is_completed: add `async def is_completed(self, messages, state): ...`"
    ),
    "class Odd:\n    def env_response(self, turns, state): ...\n    def is_completed(self, state): ...": (
        "env_response takes 'turns', but it is given `messages` and `state`"
    ),
    "value = 7": "must be a class or a function, got 7",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_fits_no_shape_is_refused_with_what_to_do(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    name = source.split()[1].split("(")[0].rstrip(":") if not source.startswith("value") else "value"
    with pytest.raises(ValueError) as refused:
        loaded(f"{tmp_path / 'mine.py'}:{name}")
    assert REFUSED[source] in str(refused.value), str(refused.value)


def test_params_and_names_that_do_not_fit_are_refused(folder: Path) -> None:
    own, examples = f"{folder / 'own.py'}:Market", folder / "trl_examples.py"
    with pytest.raises(ValueError, match=r"does not take 'greting' \(did you mean 'greeting'\?\)"):
        loaded(own, params={"greting": "Hi"})
    with pytest.raises(ValueError, match=r"environment\.params are for classes"):
        loaded(f"{examples}:multiply", params={"a": 1})
    with pytest.raises(ValueError, match="two tools have the name multiply"):
        loaded(f"{examples}:multiply", f"{examples}:multiply")
    with pytest.raises(ValueError, match="two environments have the same name"):
        loaded(CALCULATOR, CALCULATOR)
    with pytest.raises(
        ValueError, match=r"environment\.calls must be one of json_tags, python, or my\.py:function"
    ):
        loaded(CALCULATOR, calls="xml")
