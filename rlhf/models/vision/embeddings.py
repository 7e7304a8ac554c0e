"""Models that look: packed groups with pictures -> embeddings and positions for the language model.

The vision tower sees the pictures of a prompt once a group, however the group is packed. Its features take
the places of the placeholders *in prompts*; a placeholder that the policy itself writes in a completion is a
token like any other, as it is to the engine that sampled it. Positions of several axes (mrope) are the
model's own for a prompt; its completions go on after the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.packing import GroupSpan, Packed, separate
from rlhf.models.vision.images import ImageError
from rlhf.models.vision.processor import Processor
from rlhf.types import Images, Prompt


@dataclass(frozen=True, slots=True)
class Seen:
    """One prompt's pictures through the model's eyes."""

    features: Tensor
    """`[n, H]`, one row a placeholder."""
    deeper: tuple[Tensor, ...]
    """`[n, H]` each: added to the hidden states of the first layers (Qwen3-VL)."""


class Vision:
    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        # transformers' annotations are too incomplete for a strict check
        self._model: Any = model
        self.processor = processor
        self.decoder: Any = self._model.get_decoder()
        self.axes = 3 if processor.has_axes else 1

    def embed(self, packed: Packed) -> dict[str, Any]:
        """Arguments of `decoder` for `T` packed tokens: embeddings, positions, what deeper layers add.

        Raises ImageError with the prompt's id: its placeholders are not as many as its features.
        """
        embeds = self._model.get_input_embeddings()(packed.token_ids)
        positions = packed.positions.expand(self.axes, -1).clone()
        looked: dict[Images, Seen] = {}
        places: list[Tensor] = []
        seen: list[Seen] = []
        for span, images in zip(packed.spans, packed.images, strict=False):
            if images is None:
                continue
            prompt = packed.token_ids[span.start : span.start + span.prompt]
            there = (prompt == self.processor.image_token_id).nonzero()[:, 0]
            if images not in looked:
                looked[images] = self.look(images)
            seen.append(looked[images])
            if len(there) != len(seen[-1].features):
                raise ImageError(
                    f"{images.prompt_id}: its prompt has {len(there)} placeholders, its pictures make "
                    f"{len(seen[-1].features)} features; was it tokenised by another processor?"
                )
            places.append(there + span.start)
            own = self.positions(images, prompt)
            if own is not None:
                positions[:, span.start : span.start + span.prompt] = own
                positions[:, span.start + span.prompt : span.end] += own.max() + 1 - span.prompt
        arguments: dict[str, Any] = {"position_ids": positions[:, None] if self.axes > 1 else positions}
        if not seen:
            return {"inputs_embeds": embeds[None], **arguments}
        where = torch.cat(places)
        features = torch.cat([s.features for s in seen]).to(embeds.dtype)
        arguments["inputs_embeds"] = embeds.index_copy(0, where, features)[None]
        if seen[0].deeper:
            mask = torch.zeros_like(packed.token_ids, dtype=torch.bool)
            mask[where] = True
            arguments["visual_pos_masks"] = mask[None]
            arguments["deepstack_visual_embeds"] = [
                torch.cat(level) for level in zip(*(s.deeper for s in seen), strict=True)
            ]
        return arguments

    def states(self, packed: Packed, **arguments: Any) -> Tensor:
        """Hidden states `[1, T, H]`; `arguments` go to the attention of the language model."""
        return self.decoder(**self.embed(packed), use_cache=False, **arguments).last_hidden_state

    def padded_states(self, packed: Packed, mask: Tensor) -> Tensor:
        """`[S, L, H]`, one padded row a sequence; `mask` `[S, L]` is 1 where a row has a token."""
        arguments = self.embed(separate(packed))
        lengths = mask.sum(1)
        start = lengths.cumsum(0) - lengths
        index = (start[:, None] + torch.arange(mask.shape[1], device=mask.device)) * mask
        positions = arguments["position_ids"][..., index]
        arguments["position_ids"] = positions[:, 0] if self.axes > 1 else positions[0]
        arguments["inputs_embeds"] = arguments["inputs_embeds"][0][index]
        if "visual_pos_masks" in arguments:
            arguments["visual_pos_masks"] = arguments["visual_pos_masks"][0][index] & mask.bool()
        return self.decoder(**arguments, attention_mask=mask, use_cache=False).last_hidden_state

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """What `model(input_ids=...)` takes beside the ids of one prompt, a row of each."""
        assert prompt.pictures is not None
        tensors = self.processor.inputs(prompt.pictures, prompt.token_ids)
        return {name: t.to(self._model.device) for name, t in tensors.items()}

    def read(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Tensor, list[int]]:
        """Hidden states `[1, T, H]` of prompts end to end, and the position of each one's next token."""
        device = self._model.device
        ids = [torch.tensor(prompt.token_ids, device=device) for prompt in prompts]
        starts = [0, *accumulate(len(prompt) for prompt in ids)]
        nothing = torch.empty(0, dtype=torch.long, device=device)
        prompts_alone = Packed(
            token_ids=torch.cat(ids),
            positions=torch.cat([torch.arange(len(prompt), device=device) for prompt in ids]),
            rows=nothing,
            targets=nothing,
            spans=tuple(GroupSpan(s, len(p), ()) for s, p in zip(starts, ids, strict=False)),
            images=tuple(prompt.pictures for prompt in prompts),
        )
        embedded = self.embed(prompts_alone)
        places = embedded["position_ids"].reshape(self.axes, -1)
        following = [int(places[:, a:b].max()) + 1 for a, b in pairwise(starts)]
        return self.decoder(**embedded, use_cache=False, **arguments).last_hidden_state, following

    def look(self, images: Images) -> Seen:
        """The vision tower and what joins it to the language model, for the pictures of one prompt."""
        tensors = self._tensors(images)
        output = self._model.base_model.get_image_features(**tensors, return_dict=True)
        # a tensor a picture, or one of all pictures
        pooled: Any = output.pooler_output
        features = pooled.flatten(0, 1) if isinstance(pooled, Tensor) else torch.cat(tuple(pooled))
        deeper = [torch.cat(list(level)) for level in output.get("deepstack_features") or ()]
        return Seen(features, tuple(deeper))

    def positions(self, images: Images, prompt: Tensor) -> Tensor | None:
        """`[axes, P]` of one prompt; None: those of text."""
        if self.axes == 1:
            return None
        grid = self._tensors(images)["image_grid_thw"]
        kinds = (prompt == self.processor.image_token_id).int()[None]
        return self._model.base_model.get_rope_index(prompt[None], kinds, image_grid_thw=grid)[0][:, 0]

    def _tensors(self, images: Images) -> Mapping[str, Tensor]:
        device = self._model.device
        return {name: t.to(device) for name, t in self.processor.pixels(images).tensors.items()}
