"""How a reward model is saved: as a sequence classifier of transformers, or as a model and its score head.

transformers has sequence classifiers for language models. It has none for the vision-language models whose
images are supported: those are saved as they are, with the score head `[K, H]` in a file beside them, of
which their config.json tells (`SCORE_FILE`).
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from safetensors import torch as _safetensors
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.models.pretrained import SCORE_FILE, ModelError, base_prefix, load_model, loaded, score_head_of
from rlhf.models.sharding import gathered
from rlhf.models.vision.text_alone import FAMILIES
from rlhf.rollout.weight_file import WeightFile

# their annotations are too incomplete for a strict check
_files: Any = _safetensors
_transformers: Any = transformers
HEAD = "score.safetensors"
"""The file of the score head of a model that transformers has no classifier for."""
WEIGHT = "score.weight"


class Classifier:
    """A transformer and K named scores, of which `save_pretrained` writes all. The model may be sharded: then
    rank 0 calls it, while every other rank iterates over `gathered`."""

    def __init__(
        self,
        model: PreTrainedModel,
        weight: Tensor,
        names: Sequence[str],
        pad_token_id: int,
        entries: Mapping[str, Any],
    ) -> None:
        """`weight` `[K, H]`: of the score head. `entries` of the config say at which tokens it is scored.

        transformers reads a score at the last token that is not padding, so no text may end with
        `pad_token_id`.
        """
        self.model, self.weight = model, weight
        config = copy.deepcopy(model.config)
        labels = dict(enumerate(names))
        config.num_labels, config.id2label = len(labels), labels
        config.label2id = {name: i for i, name in labels.items()}
        config.problem_type, config.pad_token_id = "regression", pad_token_id
        config.update(dict(entries))
        config.dtype = weight.dtype
        self.config = config

    def save_pretrained(self, save_directory: str) -> None:
        if not has_classifier(self.config):
            self._save_beside(Path(save_directory))
        elif isinstance(self.model, FSDPModule):
            self._save_gathered(Path(save_directory))
        else:
            cast(Any, self._whole()).save_pretrained(save_directory)

    def _whole(self) -> PreTrainedModel:
        kind = _transformers.AutoModelForSequenceClassification
        scorer = kind.from_config(self.config, dtype=self.weight.dtype, attn_implementation="sdpa")
        scorer.base_model.load_state_dict(self.model.base_model.state_dict())
        head = score_head_of(scorer)
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.copy_(self.weight)
        return scorer

    def _save_gathered(self, folder: Path) -> None:
        """Writes the weights while they are gathered, under the names that the classifier has for them."""
        with init_empty_weights(include_buffers=False):
            scorer = _transformers.AutoModelForSequenceClassification.from_config(self.config)
        own, theirs = base_prefix(self.model), base_prefix(scorer)
        names = dict(cast(nn.Module, scorer).named_parameters())
        with WeightFile(folder / "model.safetensors", names) as file:
            for name, weight in gathered(self.model):
                # the language-model head is no part of a classifier
                if name.startswith(f"{own}."):
                    file.add(theirs + name.removeprefix(own), weight)
            file.add(WEIGHT, self.weight)
        self.config.architectures = [type(scorer).__name__]
        cast(Any, self.config).save_pretrained(folder)

    def _save_beside(self, folder: Path) -> None:
        """The model as it is, and the score head in a file of its own."""
        before = self.model.config
        self.config.update({SCORE_FILE: HEAD})
        self.model.config = self.config
        try:
            cast(Any, self.model).save_pretrained(str(folder))
        finally:
            self.model.config = before
        _files.save_file({WEIGHT: self.weight.contiguous()}, folder / HEAD)


def has_classifier(config: PretrainedConfig) -> bool:
    """Whether transformers, or the model's own code, has a sequence classifier for this kind of model."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    known = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    brought: Mapping[str, str] = config.to_dict().get("auto_map") or {}
    return config.model_type in known or "AutoModelForSequenceClassification" in brought


def check_can_be_saved(path: str, config: PretrainedConfig) -> None:
    """Raises ModelError: a reward model on the model at `path` could not be saved as this module does."""
    if not has_classifier(config) and config.model_type not in FAMILIES:
        raise ModelError(
            f"{path} is a {config.model_type}, of which transformers has no sequence classifier: a reward "
            "model on it could not be saved; take another kind of model"
        )


def load_classifier(
    path: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, nn.Linear | None]:
    """The model at `path`, whose config this is, in evaluation mode: a sequence classifier, or one that sees
    and its score head. Raises ModelError: it lacks weights."""
    if SCORE_FILE not in config.to_dict():
        kind = _transformers.AutoModelForSequenceClassification
        return loaded(kind, path, dtype).to(device).eval(), None
    file = Path(path).expanduser() / config.to_dict()[SCORE_FILE]
    if not file.is_file():
        raise ModelError(
            f"{path} lacks the file {file.name}, the weights of its score: copy the whole folder"
        )
    weight: Tensor = _files.load_file(file)[WEIGHT].to(device, dtype)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device, dtype=dtype)
    head.load_state_dict({"weight": weight})
    return load_model(path, device, dtype), head
