"""What a prompt is, whatever its line: digests of prompts by their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from rlhf.types import Group, Prompt


def identity(prompt: Prompt) -> str:
    """A name of a prompt made of its tokens, images and columns: it stays where lines are added or moved."""
    found = hashlib.sha256()
    columns = json.dumps(prompt.columns, sort_keys=True, default=repr)
    found.update(json.dumps([prompt.token_ids, columns]).encode("utf-8", "surrogatepass"))
    for image in prompt.images or ():
        found.update(hashlib.sha256(image.encode() if isinstance(image, str) else image).digest())
    return found.hexdigest()[:32]


def digest(prompts: Sequence[Prompt], groups: Sequence[Group] = ()) -> str:
    """A digest of prompts and their order, and of the completions that a dataset has of them."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(identity(prompt).encode())
    for group in groups:
        for trajectory in group.trajectories:
            found.update(json.dumps([trajectory.token_ids, trajectory.reward]).encode())
    return found.hexdigest()
