"""Vision-language models: packed groups with images -> embeddings and positions for the language model.

The vision tower encodes the images of a prompt once per forward pass, however the group is packed. The image
features replace the embeddings of the placeholders *in prompts and in observations*; a placeholder that the
policy itself writes in a completion stays a token like any other, as it is for the engine that sampled it.
Positions of several axes (mrope) are the model's own within a prompt; its completions continue after the
largest of them. Where an observation has images, positions are the model's own for prompt and completion.
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
class ImageFeatures:
    """The images of one prompt or observation, encoded by the vision tower."""

    features: Tensor
    """`[n, H]`: one row for each placeholder token."""
    deeper: tuple[Tensor, ...]
    """`[n, H]` each: added to the hidden states of the first layers (DeepStack, in Qwen3-VL)."""


Placed = tuple[Images, Tensor]
"""Images, and the places `[n]` of their placeholders among some tokens."""


class Vision:
    """The image inputs of a model: its vision tower, applied to packed groups."""

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        # transformers' annotations are too incomplete for a strict check
        self._model: Any = model
        self.processor = processor
        self.decoder: Any = self._model.get_decoder()
        # of a token's position
        self.axes = 3 if processor.has_axes else 1

    def embed(self, packed: Packed) -> dict[str, Any]:
        """Arguments of `decoder` for `T` packed tokens: embeddings, positions, features for deeper layers.

        Raises ImageError, with the prompt's id: the number of its placeholders differs from that of its
        features.
        """
        embeds = self._model.get_input_embeddings()(packed.token_ids)
        positions = packed.positions.expand(self.axes, -1).clone()  # [axes, T]
        # the same prompt may be packed more than once; its images are encoded once
        encoded: dict[Images, ImageFeatures] = {}
        placed = self._place(packed, positions, encoded)
        found = [encoded[images] for images, _ in placed]
        arguments: dict[str, Any] = {"position_ids": positions[:, None] if self.axes > 1 else positions}
        if not found:
            return {"inputs_embeds": embeds[None], **arguments}
        where = torch.cat([places for _, places in placed])
        features = torch.cat([f.features for f in found]).to(embeds.dtype)
        arguments["inputs_embeds"] = embeds.index_copy(0, where, features)[None]
        if found[0].deeper:
            mask = torch.zeros_like(packed.token_ids, dtype=torch.bool)
            mask[where] = True
            arguments["visual_pos_masks"] = mask[None]
            arguments["deepstack_visual_embeds"] = [
                torch.cat(level) for level in zip(*(f.deeper for f in found), strict=True)
            ]
        return arguments

    def _place(self, packed: Packed, positions: Tensor, encoded: dict[Images, ImageFeatures]) -> list[Placed]:
        """The images of prompts and observations, placed among the `T` packed tokens, in their order.

        Fills `encoded`, and corrects `positions` `[axes, T]`, which do not account for images.
        """
        placed: list[Placed] = []
        observed = iter(packed.observed)
        for number, span in enumerate(packed.spans):
            images = packed.images[number] if packed.images else None
            begin = span.start + span.prompt
            prompt = packed.token_ids[span.start : begin]
            # places count from the start of the sequence
            before = [] if images is None else [self._seen(images, prompt, 0, encoded)]
            own = self.positions(prompt, before)
            if own is not None:
                positions[:, span.start : begin] = own
                # completions were numbered from the length of the prompt on
                positions[:, begin : span.end] += own.max() + 1 - span.prompt
            placed += [(i, places + span.start) for i, places in before]
            for length in span.completions:
                tokens = torch.cat([prompt, packed.token_ids[begin : begin + length]])
                inside = [
                    self._seen(o.images, tokens[: o.end + span.prompt], o.start + span.prompt, encoded)
                    for o in next(observed, ())
                ]
                own = self.positions(tokens, [*before, *inside]) if inside else None
                if own is not None:
                    positions[:, begin : begin + length] = own[:, span.prompt :]
                placed += [(i, places + begin - span.prompt) for i, places in inside]
                begin += length
        return placed

    def _seen(
        self, images: Images, tokens: Tensor, start: int, encoded: dict[Images, ImageFeatures]
    ) -> Placed:
        """Images whose placeholders stand in `tokens` from `start` on; adds them to `encoded`."""
        if images not in encoded:
            encoded[images] = self.encode(images)
        if images.places is None:
            places = (tokens[start:] == self.processor.image_token_id).nonzero()[:, 0] + start
        else:
            places = torch.tensor(images.places, dtype=torch.long, device=tokens.device)
        if len(places) != len(encoded[images].features):
            raise ImageError(
                f"{images.prompt_id}: it has {len(places)} placeholders, its images make "
                f"{len(encoded[images].features)} features; was it tokenised by another processor?"
            )
        return images, places

    def states(self, packed: Packed, **arguments: Any) -> Tensor:
        """Hidden states `[1, T, H]` of packed tokens; `arguments` go to the language model's attention."""
        return self.decoder(**self.embed(packed), use_cache=False, **arguments).last_hidden_state

    def padded_states(self, packed: Packed, mask: Tensor) -> Tensor:
        """Hidden states `[S, L, H]`, a padded row per sequence; `mask` `[S, L]` is 1 at tokens, else 0."""
        arguments = self.embed(separate(packed))
        lengths = mask.sum(1)
        start = lengths.cumsum(0) - lengths
        # [S, L]: the packed token at each place of a row; padding takes token 0, which the mask hides
        index = (start[:, None] + torch.arange(mask.shape[1], device=mask.device)) * mask
        positions = arguments["position_ids"][..., index]
        arguments["position_ids"] = positions[:, 0] if self.axes > 1 else positions[0]
        arguments["inputs_embeds"] = arguments["inputs_embeds"][0][index]
        if "visual_pos_masks" in arguments:
            arguments["visual_pos_masks"] = arguments["visual_pos_masks"][0][index] & mask.bool()
        return self.decoder(**arguments, attention_mask=mask, use_cache=False).last_hidden_state

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The further arguments of `model(input_ids=...)` for one prompt, on the model's device."""
        assert prompt.pictures is not None
        tensors = self.processor.inputs(prompt.pictures, prompt.token_ids)
        return {name: t.to(self._model.device) for name, t in tensors.items()}

    def read(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Tensor, list[int]]:
        """Hidden states `[1, T, H]` of prompts end to end, and the position of each prompt's next token."""
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

    def encode(self, images: Images) -> ImageFeatures:
        """Runs the vision tower and the projection to the language model on the images of one prompt."""
        tensors = self._tensors(images)
        output = self._model.base_model.get_image_features(**tensors, return_dict=True)
        # the model's family decides: one tensor for each image, or one for all of them
        pooled: Any = output.pooler_output
        features = pooled.flatten(0, 1) if isinstance(pooled, Tensor) else torch.cat(tuple(pooled))
        deeper = [torch.cat(list(level)) for level in output.get("deepstack_features") or ()]
        return ImageFeatures(features, tuple(deeper))

    def positions(self, tokens: Tensor, placed: Sequence[Placed]) -> Tensor | None:
        """Positions `[axes, tokens]` of one sequence; None: its positions are those of text."""
        if self.axes == 1 or not placed:
            return None
        grid = torch.cat([self._tensors(images)["image_grid_thw"] for images, _ in placed])
        kinds = torch.zeros_like(tokens, dtype=torch.int)
        kinds[torch.cat([places for _, places in placed])] = 1
        rope = self._model.base_model.get_rope_index
        return rope(tokens[None], kinds[None], image_grid_thw=grid)[0][:, 0]

    def _tensors(self, images: Images) -> Mapping[str, Tensor]:
        device = self._model.device
        return {name: t.to(device) for name, t in self.processor.pixels(images).tensors.items()}
