"""Converts metrics, groups and images to JSON values and tensors for checkpoints, and back."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate, islice, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.checkpoints.stateful import CheckpointError
from rlhf.metrics import ExpMean, Max, Mean, Metrics, Partial, Sum
from rlhf.tensors.candidates import Candidates
from rlhf.torch_typed import integers
from rlhf.types import Duel, FinishReason, Group, Images, Observed, Prompt, Source, Trajectory, VersionSpan

KINDS: dict[str, type[Partial]] = {kind.__name__: kind for kind in (Mean, ExpMean, Sum, Max)}


def pack_images(images: Sequence[Images | None]) -> dict[str, Tensor]:
    """The images of each prompt as tensors: prompt ids and then paths or files, end to end as bytes."""
    if not images:
        return {}
    files = [source for i in images if i is not None for source in i.sources]
    parts = [b"" if i is None else i.prompt_id.encode() for i in images]
    parts += [file.encode() if isinstance(file, str) else file for file in files]
    return {
        "bytes": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8),
        "lengths": torch.tensor([len(part) for part in parts]),
        "pictures": torch.tensor([0 if i is None else len(i.sources) for i in images]),
        "is_path": torch.tensor([isinstance(file, str) for file in files]),
    }


def unpack_images(tensors: Mapping[str, Tensor]) -> tuple[Images | None, ...]:
    """Inverse of `pack_images`."""
    if not tensors:
        return ()
    ends = list(accumulate(integers(tensors["lengths"]), initial=0))
    held = tensors["bytes"].cpu().numpy().tobytes()
    parts = [held[start:end] for start, end in pairwise(ends)]
    pictures = integers(tensors["pictures"])
    kinds = integers(tensors["is_path"])
    files = iter(
        part.decode() if is_path else part
        for part, is_path in zip(parts[len(pictures) :], kinds, strict=True)
    )
    return tuple(
        Images(name.decode(), tuple(islice(files, count))) if count else None
        for name, count in zip(parts[: len(pictures)], pictures, strict=True)
    )


def pack_observed(observed: Sequence[Sequence[Observed]]) -> dict[str, Tensor]:
    """The observations with images of each sequence as tensors."""
    if not observed:
        return {}
    ranges = [(number, o.start, o.end) for number, of_one in enumerate(observed) for o in of_one]
    images = pack_images([o.images for of_one in observed for o in of_one])
    return images | {"ranges": torch.tensor(ranges), "sequences": torch.tensor(len(observed))}


def unpack_observed(tensors: Mapping[str, Tensor]) -> tuple[tuple[Observed, ...], ...]:
    """Inverse of `pack_observed`."""
    if not tensors:
        return ()
    found: list[list[Observed]] = [[] for _ in range(int(tensors["sequences"]))]
    for place, images in zip(tensors["ranges"], unpack_images(tensors), strict=True):
        number, start, end = integers(place)
        assert images is not None
        found[number].append(Observed(start, end, images))
    return tuple(map(tuple, found))


def metrics_state(metrics: Metrics) -> dict[str, list[Any]]:
    """Metrics as JSON values: the kind of each partial and its numbers."""
    return {name: [type(p).__name__, *_numbers(p)] for name, p in metrics.items()}


def metrics_from(state: Mapping[str, Any]) -> Metrics:
    """Inverse of `metrics_state`."""
    return {name: KINDS[kind](*numbers) for name, (kind, *numbers) in state.items()}


def _numbers(partial: Partial) -> list[float]:
    return [float(getattr(partial, f.name)) for f in fields(partial)]


def group_state(group: Group) -> dict[str, Any]:
    """A group as JSON values; its prompt is stored as an id, a digest of its tokens, and what is not in the
    data."""
    trajectories: list[dict[str, Any]] = []
    for t in group.trajectories:
        plain = {f.name: getattr(t, f.name) for f in fields(t)}
        plain |= {"finish_reason": t.finish_reason.value, "objectives": dict(t.objectives)}
        plain["source"] = t.source.value
        plain["logged"] = dict(t.logged)
        plain["step_rewards"] = [list(step) for step in t.step_rewards]
        plain |= {"versions": [[v.version, v.start, v.end] for v in t.versions]}
        plain["observations"] = [[o.start, o.end, o.images.prompt_id, *_files(o)] for o in t.observations]
        if t.candidates is not None:
            plain["candidates"] = {"ids": integers(t.candidates.ids), "sizes": integers(t.candidates.sizes)}
        trajectories.append({k: list(cast(Any, v)) if isinstance(v, tuple) else v for k, v in plain.items()})
    prompt = group.prompt
    saved: dict[str, Any] = {"prompt": prompt.id, "digest": _digest(prompt.original or prompt)}
    if prompt.original is not None:
        saved["begun"] = {"token_ids": list(prompt.token_ids), "content": prompt.content}
    duels = [[d.first, d.second, d.probability] for d in group.duels]
    return saved | {"draw": group.draw, "trajectories": trajectories, "duels": duels}


def _files(observed: Observed) -> list[str | dict[str, str]]:
    """The images of an observation as JSON values: paths, or files in base64."""
    sources = observed.images.sources
    return [s if isinstance(s, str) else {"base64": base64.b64encode(s).decode()} for s in sources]


def _observed_of(start: int, end: int, prompt_id: str, *files: str | Mapping[str, str]) -> Observed:
    """Inverse of the values of an observation in `group_state`."""
    sources = (f if isinstance(f, str) else base64.b64decode(f["base64"]) for f in files)
    return Observed(start, end, Images(prompt_id, tuple(sources)))


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt.token_ids).encode()).hexdigest()[:16]


def group_of(state: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Group:
    """Inverse of `group_state`, with the prompts of the run by id.

    Raises CheckpointError: the data has no such prompt, or another one in its place.
    """
    prompt = prompts.get(state["prompt"])
    # checkpoints of earlier versions have no digest
    if prompt is None or state.get("digest", _digest(prompt)) != _digest(prompt):
        raise CheckpointError(
            f"the checkpoint holds completions of the prompt {state['prompt']}, which is not in the data any "
            "more, or is another one: resume with the data as it was, or begin a new run in another run_dir"
        )
    if "begun" in state:
        begun = state["begun"]
        prompt = replace(
            prompt, token_ids=tuple(begun["token_ids"]), content=begun["content"], original=prompt
        )
    trajectories: list[Trajectory] = []
    for plain in state["trajectories"]:
        values: dict[str, Any] = {
            k: tuple(cast(Any, v)) if isinstance(v, list) else v for k, v in plain.items()
        }
        values["versions"] = tuple(VersionSpan(*v) for v in plain["versions"])
        values["finish_reason"] = FinishReason(plain["finish_reason"])
        values["observations"] = tuple(_observed_of(*o) for o in plain.get("observations", ()))
        values["step_rewards"] = tuple((token, reward) for token, reward in plain.get("step_rewards", ()))
        # checkpoints of earlier versions have no source: what nobody recorded came from data
        unrecorded = plain["rollout_logprobs"] is None
        values["source"] = Source(plain.get("source", Source.DATA if unrecorded else Source.POLICY))
        # checkpoints of earlier versions call the candidates "kept"
        candidates = values.pop("kept", None) or values.get("candidates")
        if candidates is not None:
            ids = torch.tensor(candidates["ids"], dtype=torch.int32)
            values["candidates"] = Candidates(ids, torch.tensor(candidates["sizes"], dtype=torch.long))
        trajectories.append(Trajectory(**values))
    duels = tuple(Duel(*duel) for duel in state.get("duels", ()))
    return Group(prompt, tuple(trajectories), draw=state["draw"], duels=duels)
