"""What transformers is asked for, with types: models, tokenizers, their settings, and how a model attends."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.layers.gated_mlp import lighten_mlps
from rlhf.models.layers.rms_norm import fuse_norms

# its annotations are too incomplete for a strict check
_transformers: Any = transformers
_hub: Any = huggingface_hub


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*vocab*", "*.tiktoken", "tekken.json", "spiece.model")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class ModelError(ValueError):
    """The model cannot be loaded or trained as asked. The message says why."""


def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In evaluation mode, with its vision tower if it has one.

    Raises ModelError when there is no causal language model at `path`.
    """
    try:
        kind = _kind_of(load_model_config(path))
        model = kind.from_pretrained(local_or_hub(path), dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    return _ready(model, device)


def _ready(model: Any, device: torch.device | None = None) -> PreTrainedModel:
    fuse_norms(model)
    lighten_mlps(model)
    return model.to(device).eval() if device is not None else model.eval()


def _kind_of(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model with its head, and its vision tower if it has one."""
    if "vision_config" in config.to_dict():
        return _transformers.AutoModelForImageTextToText
    return _transformers.AutoModelForCausalLM


def load_scorer(path: str, device: torch.device) -> tuple[PreTrainedModel, Tensor | None]:
    """A transformer without head, in float32, and the weight `[K, H]` of its score head if it has one.

    A reward model of the Hugging Face sequence-classification layout has one, a causal language model none.
    Raises ModelError when there is neither at `path`.
    """
    architecture = (load_model_config(path).architectures or [""])[0]
    try:
        if not architecture.endswith("ForSequenceClassification"):
            trunk = _transformers.AutoModel.from_pretrained(local_or_hub(path), dtype=torch.float32)
            return _ready(trunk, device), None
        model = _transformers.AutoModelForSequenceClassification.from_pretrained(
            local_or_hub(path), dtype=torch.float32
        )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    head = score_head_of(model)
    if not isinstance(head, nn.Linear) or "bias" in dict(head.named_parameters()):
        raise ModelError(f"{path} is a {architecture}, whose score is not one linear map of hidden states")
    return _ready(model.base_model, device), head.weight.detach().to(device)


SCORED_AT_END = {"scored_at": "end_of_sequence"}
"""In the config of a reward model: the tokens of a text have an end-of-sequence token behind them."""


def classifier_of(
    model: PreTrainedModel, weight: Tensor, names: Sequence[str], pad_token_id: int
) -> PreTrainedModel:
    """The transformer of `model` under a score head `[K, H]`, as a sequence classifier of K named scores.

    transformers reads the score at the last token that is not padding, so `pad_token_id` must be one that no
    text ends with. Raises ModelError: there is no such class for this kind of model.
    """
    config = copy.deepcopy(model.config)
    labels = dict(enumerate(names))
    config.num_labels, config.id2label = len(labels), labels
    config.label2id = {name: i for i, name in labels.items()}
    config.problem_type, config.pad_token_id = "regression", pad_token_id
    config.update(SCORED_AT_END)
    kind = _transformers.AutoModelForSequenceClassification
    try:
        scorer = kind.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
    except ValueError as error:
        name = type(model).__name__
        raise ModelError(f"{name} cannot be saved as a sequence classifier: {error}") from None
    scorer.base_model.load_state_dict(model.base_model.state_dict())
    head = score_head_of(scorer)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(weight)
    return scorer


def pad_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A special token that ends no text. Raises ModelError when the tokenizer has none."""
    known: Any = tokenizer
    ids = [known.pad_token_id, known.unk_token_id, known.bos_token_id, *known.all_special_ids]
    for token_id in ids:
        if token_id is not None and token_id != known.eos_token_id:
            return token_id
    raise ModelError(
        f"{known.name_or_path} has no special token beside the end of sequence, which padding needs: a "
        "reward model reads its score at the last token that is not padding"
    )


def score_head_of(model: Any) -> nn.Module | None:
    """What a sequence classifier puts on its transformer."""
    return model._modules.get("score")


def empty_model(path: str, dtype: torch.dtype, *, head: bool) -> PreTrainedModel:
    """A causal language model, or its transformer alone, with parameters on the meta device, tied as they
    are; buffers are real."""
    config = load_model_config(path)
    kind = _kind_of(config) if head else _transformers.AutoModel
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=dtype)
    model.tie_weights()
    return _ready(model)


def base_prefix(model: Any) -> str:
    """Where a model with a head has its transformer."""
    return model.base_model_prefix


def layer_classes(model: Any) -> set[str]:
    """Names of the classes of a model's layers, the parts that are to stay in one piece."""
    return set(model._no_split_modules or ())


def model_folder(path: str) -> Path:
    """Where the files of a model lie; those of a hub name are fetched. Raises ModelError."""
    folder = Path(local_or_hub(path))
    if folder.is_dir():
        return folder
    try:
        return Path(_hub.snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except OSError as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ModelError when there is none at `path`."""
    place = local_or_hub(path)
    if Path(place).is_dir() and not any(list(Path(place).glob(pattern)) for pattern in TOKENIZERS):
        raise ModelError(f"{path} has no tokenizer: none of {', '.join(TOKENIZERS)} is there")
    try:
        return _transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} has no tokenizer that can be loaded: {_short(error)}") from error


def load_model_config(path: str) -> PretrainedConfig:
    """Raises ModelError when there is none at `path`, or of a kind that transformers does not know."""
    place = local_or_hub(path)
    _check_json(Path(place) / "config.json")
    try:
        return _transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: its config.json cannot be used: {_short(error)}") from error


def _check_json(file: Path) -> None:
    """Raises ModelError where a local config.json is damaged, or of a kind that nobody knows."""
    if not file.is_file():
        return
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from None
    known: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    kind, kinds = settings.get("model_type"), list[str](known.CONFIG_MAPPING_NAMES)
    if kind not in kinds and "auto_map" not in settings:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"{file} is of a model_type {kind!r}, which this transformers does not know{hint}")


def check_writes_text(path: str, config: PretrainedConfig) -> None:
    """Raises ModelError for a model that is none of language, and for a folder without weights."""
    kinds: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    writers = {**kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **kinds.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    kind, own_code = config.model_type, "auto_map" in config.to_dict()
    if kind not in writers and not own_code:
        raise ModelError(f"{path} is a {kind}, which writes no text: a causal language model is needed")
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ModelError(f"{folder} has no weights: none of {', '.join(WEIGHTS)} is there")


def _short(error: Exception) -> str:
    """What transformers says, which may be a page, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def local_or_hub(path: str) -> str:
    """A folder that exists, or a hub name as it is. Raises ModelError for a folder that is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is no model folder of the Hugging Face layout: it has no config.json")
        return str(folder)
    if path.startswith(("/", "~", ".")) or path.count("/") > 1:
        hint = " Make it with: python -m rlhf.small_model" if folder.name.startswith("SmolLM2") else ""
        raise ModelError(f"there is no model folder {folder}.{hint}")
    return path


def text_settings(config: Any) -> dict[str, Any]:
    """The settings of a model's language part, by name; a model of text alone has no other."""
    return config.get_text_config().to_dict()


def eos_token_ids(path: str) -> set[int]:
    """Where the model at `path` ends a completion by its own account; it may say nothing."""
    try:
        own = _transformers.GenerationConfig.from_pretrained(local_or_hub(path)).eos_token_id
    except OSError:
        own = text_settings(load_model_config(path)).get("eos_token_id")
    return {own} if isinstance(own, int) else set(own or ())


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text without the special tokens."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def head_of(model: Any) -> nn.Module | None:
    return model.get_output_embeddings()


def checkpoint_activations(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def attention_of(model: Any) -> str:
    """The name under which its attention to text is registered; there is no public way to ask for it."""
    return model.config.get_text_config()._attn_implementation


def set_attention(model: Any, name: str) -> None:
    """Of the language model; a vision tower beside it keeps its own."""
    text = model.config.get_text_config()
    parts = {part: name for part in model.config.sub_configs if getattr(model.config, part) is text}
    model.set_attn_implementation(parts or name)


def takes_attention(model: Any) -> bool:
    """Whether the model takes its attention from transformers' AttentionInterface."""
    return model._supports_attention_backend
