"""Environments as people bring them: the examples of TRL's documentation, classes of verifiers, and our own.

`echo_env` and `verifiers` are not installed; `written` makes small packages of these names.
"""

from __future__ import annotations

from pathlib import Path

TRL = '''
import random

from echo_env import EchoEnv
from echo_env.models import EchoAction

ENV_URL = "https://openenv-echo-env.hf.space"


class IncrementEnv:
    # Reserved methods
    def reset(self, **kwargs) -> str | None:  # required; called at the start of each rollout
        self.counter = 0
        self.target = random.randint(1, 6)  # self-sample the task
        return f"Increment the counter by {self.target}."  # returned string becomes the prompt

    def get_reward(self) -> float:  # optional: the environment scores itself from its own state
        return float(self.counter == self.target)

    # Public methods (exposed as tools)
    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter


class EchoToolEnv:
    def __init__(self):
        self.env = EchoEnv(base_url=ENV_URL)
        self.reward = 0.0

    def reset(self, **kwargs) -> str | None:
        self.reward = 0.0
        return None

    def echo(self, message: str) -> str:
        """
        Echo the message back from the environment.

        Args:
            message: The message to echo

        Returns:
            The echoed message.
        """
        observation = self.env.step(EchoAction(message=message))
        self.reward = observation.observation.reward
        return observation.observation.echoed_message


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


async def async_add(a: int, b: int) -> int:
    """
    Asynchronously adds two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    return a + b
'''

ECHO_ENV = """
from types import SimpleNamespace


class EchoEnv:
    def __init__(self, base_url):
        self.base_url = base_url

    def step(self, action):
        message = action.message
        return SimpleNamespace(observation=SimpleNamespace(reward=len(message) * 0.1, echoed_message=message))
"""

ECHO_MODELS = """
from dataclasses import dataclass


@dataclass
class EchoAction:
    message: str
"""

VERIFIERS = """
class MultiTurnEnv:
    def __init__(self, max_turns=-1, **kwargs):
        self.max_turns = max_turns

    async def max_turns_reached(self, state):
        return state["turn"] >= self.max_turns and self.max_turns > 0

    async def setup_state(self, state, **kwargs):
        return state

    async def is_completed(self, messages, state, **kwargs):
        return await self.max_turns_reached(state)
"""

GAMES = '''
import verifiers as vf


class Guess(vf.MultiTurnEnv):
    """As in verifiers 0.1.3: messages and state, and a pair is returned."""

    async def setup_state(self, state, **kwargs):
        state["low"], state["high"] = 1, int(state["answer"]) + 2
        state["guessed"] = False
        return state

    async def is_completed(self, messages, state, **kwargs):
        return state["guessed"] or await self.max_turns_reached(state)

    async def env_response(self, messages, state, **kwargs):
        guess = int(messages[-1]["content"])
        if guess == int(state["answer"]):
            state["guessed"] = True
            return [], state
        hint = "higher" if guess < int(state["answer"]) else "lower"
        return [{"role": "user", "content": f"{hint}, turn {state['turn']}"}], state


class Count(vf.MultiTurnEnv):
    """As in verifiers 0.1.9: the state alone decides, is changed in place, and messages are returned."""

    async def setup_state(self, state):
        state["seen"] = 0

    async def is_completed(self, state):
        return len(state["trajectory"]) >= 3

    def env_response(self, state, messages):
        state["seen"] = len(messages)
        if messages[-1]["content"] == "stop":
            state["final_env_response"] = [{"role": "user", "content": "Stopped."}]
        return [{"role": "user", "content": f"{len(state['completion'])} messages"}]


def load_environment(max_turns=5):
    return Guess(max_turns=max_turns)
'''

OWN = '''
import random


class Market:
    """Free conversation."""

    def __init__(self, greeting, seed):
        self.greeting, self.first = greeting, random.Random(seed).random()

    def reset(self, wants, seed=None):
        self.wants, self.offers, self.second = wants, [], random.Random(seed).random()
        return [{"role": "user", "content": [{"type": "text", "text": self.greeting}]}]

    async def respond(self, messages):
        self.offers.append(messages[-1]["content"])
        if self.wants in self.offers[-1]:
            return None
        return "No, thank you." if len(self.offers) < 3 else messages

    async def get_reward(self):
        return {"sold": self.wants in self.offers[-1], "turns": -len(self.offers)}
'''


def written(folder: Path) -> Path:
    """Writes the files; returns the folder."""
    files = {
        "trl_examples.py": TRL,
        "echo_env/__init__.py": ECHO_ENV,
        "echo_env/models.py": ECHO_MODELS,
        "verifiers/__init__.py": VERIFIERS,
        "games.py": GAMES,
        "own.py": OWN,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder
