"""Typed access to transformers: loads models, tokenizers and their configs, and sets a model's attention."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Collection, Sequence
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
from rlhf.models.weight_files import (
    TOKENIZERS,
    ModelError,
    base_of,
    check_files,
    check_json,
    check_report,
    check_small_files,
    damaged_json,
)

# what reading a damaged file of weights raises
DAMAGED = (OSError, SafetensorError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)

# its annotations are too incomplete for a strict check
_transformers: Any = transformers
_hub: Any = huggingface_hub

TRUSTED: set[str] = set()
"""The models whose own Python code may run in this process: see `trust`."""


def trust(path: str) -> None:
    """Lets the code that the model at `path` brings run here, with all rights of this process.

    `model.trust_remote_code` asks for it. Other models are loaded with the code of transformers alone, and
    refused where that does not know them; nothing is asked on standard input.
    """
    TRUSTED.add(local_or_hub(path))


def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in evaluation mode, with its vision tower if it has one.

    `path`: a model folder or the name of a model on the Hugging Face hub. Raises ModelError when there is no
    causal language model.
    """
    # first, because transformers refuses some of these files without their name
    generation = load_generation_config(path)
    model = loaded(_kind_of(load_model_config(path)), path, dtype)
    model.generation_config = generation or model.generation_config
    return _ready(model, device)


def loaded(kind: Any, path: str, dtype: torch.dtype, device: str | None = None) -> Any:
    """A model with all of its weights. Raises ModelError: files are damaged, or lack some of them."""
    place = local_or_hub(path)
    if Path(place).is_dir():
        check_files(Path(place))
    try:
        model, report = kind.from_pretrained(
            place,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            # told by `check_report`, by name
            ignore_mismatched_sizes=True,
            **_code_of(place),
        )
    except (*DAMAGED, ValueError) as error:
        # ValueError: transformers has no class for this config
        raise ModelError(f"{path} cannot be loaded: {_short(error)}") from error
    check_report(path, report)
    return model


def check_weights(path: str, *, head: bool = True) -> Any | None:
    """The model at a local `path`, without contents of its weights; None for one on the hub, of which nothing
    is known before it is downloaded.

    Without `head`, as `load_scorer` loads it. Raises ModelError: files are damaged, or lack weights.
    """
    if not Path(local_or_hub(path)).is_dir():
        return None
    config = load_model_config(path)
    if head:
        load_generation_config(path)
    return loaded(_kind_of(config) if head else _scorer_kind(config), path, torch.float32, device="meta")


def _ready(model: Any, device: torch.device | None = None) -> PreTrainedModel:
    """The model in evaluation mode, with layers that keep less for the backward pass."""
    fuse_norms(model)
    lighten_mlps(model)
    return model.to(device).eval() if device is not None else model.eval()


def _kind_of(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model with its head, and its vision tower if it has one."""
    if "vision_config" in config.to_dict():
        return _transformers.AutoModelForImageTextToText
    return _transformers.AutoModelForCausalLM


def _scorer_kind(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a reward model with its score head, else a transformer alone.

    Raises ModelError: it is a reward model that sees, which is none of these.
    """
    if SCORE_FILE in config.to_dict():
        raise ModelError(
            f"{config.name_or_path} is a reward model with eyes, but a critic of its own reads text alone: "
            "take critic.trunk=policy, or start it from a model without a vision tower"
        )
    scores = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    return _transformers.AutoModelForSequenceClassification if scores else _transformers.AutoModel


def load_scorer(path: str, device: torch.device) -> tuple[PreTrainedModel, Tensor | None]:
    """A transformer without head, in float32, and the weight `[K, H]` of its score head, or None.

    A reward model has a score head, in Hugging Face's sequence-classification layout; a causal language model
    has none. Raises ModelError when there is neither at `path`, or as `score_weight` does.
    """
    model = loaded(_scorer_kind(load_model_config(path)), path, torch.float32)
    if (weight := score_weight(path, model)) is None:
        return _ready(model, device), None
    return _ready(model.base_model, device), weight.to(device)


def score_weight(path: str, model: Any) -> Tensor | None:
    """`[K, H]` of a classifier's score head; None for another model. Raises ModelError: it is not linear."""
    head, kind = score_head_of(model), type(model).__name__
    if not kind.endswith("ForSequenceClassification"):
        return None
    if not isinstance(head, nn.Linear) or "bias" in dict(head.named_parameters()):
        raise ModelError(f"{path} is a {kind}, whose score is not one linear map of hidden states")
    return head.weight.detach()


SCORED_AT_END = {"scored_at": "end_of_sequence"}
"""Entry in the config of a reward model: it was trained on texts that end with an end-of-sequence token."""
SCORE_FILE = "score_file"
"""Entry in the config of a reward model that sees, whose score head is in a file (models/classifier.py)."""


def pad_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A special token other than the end of sequence, to pad with. Raises ModelError when there is none."""
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
    """The score head of a sequence classifier, or None."""
    return model._modules.get("score")


def empty_model(path: str, dtype: torch.dtype, *, head: bool) -> PreTrainedModel:
    """A causal language model, or without `head` its transformer alone, without contents of the weights.

    Parameters are on the meta device and tied as the config says; buffers are real.
    """
    config = load_model_config(path)
    kind = _kind_of(config) if head else _transformers.AutoModel
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=dtype, **_code_of(local_or_hub(path)))
    model.tie_weights()
    if head:
        model.generation_config = load_generation_config(path) or model.generation_config
    return _ready(model)


def random_model(path: str, config: PretrainedConfig, *, head: bool) -> PreTrainedModel:
    """A model of the kind at `path`, with the sizes of `config` and random float32 weights.

    A causal language model, or without `head` its transformer alone.
    """
    kind = _kind_of(config) if head else _transformers.AutoModel
    return _ready(kind.from_config(config, dtype=torch.float32, **_code_of(local_or_hub(path))))


def base_prefix(model: Any) -> str:
    """Name of the attribute under which a model with a head has its transformer."""
    return model.base_model_prefix


def layer_classes(model: Any) -> set[str]:
    """Names of the classes of a model's layers, which transformers says must not be split over devices."""
    return set(model._no_split_modules or ())


def model_folder(path: str) -> Path:
    """The folder of a model's files, downloaded for a hub name. Raises ModelError: there are none."""
    folder = Path(local_or_hub(path))
    if folder.is_dir():
        return folder
    try:
        return Path(_hub.snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except OSError as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`. Raises ModelError when there is none."""
    place = local_or_hub(path)
    if Path(place).is_dir() and not any(list(Path(place).glob(pattern)) for pattern in TOKENIZERS):
        raise ModelError(f"{path} has no tokenizer: none of {', '.join(TOKENIZERS)} is there")
    try:
        return _transformers.AutoTokenizer.from_pretrained(place, **_code_of(place))
    except Exception as error:
        # the library of tokenizers raises plain exceptions, and damaged files give errors of any type
        which = damaged_json(Path(place)) or f"{path} has no tokenizer that can be loaded"
        raise ModelError(f"{which}: {_short(error)}") from error


def load_model_config(path: str) -> PretrainedConfig:
    """The config.json at `path`. Raises ModelError: there is none, or transformers does not know its kind."""
    place = local_or_hub(path)
    check_json(Path(place) / "config.json")
    try:
        return _transformers.AutoConfig.from_pretrained(place, **_code_of(place))
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path} brings Python code of its own, which transformers does not have: read it, and set "
                "model.trust_remote_code=true (params.trust_remote_code of a reward model) to let it run"
            ) from None
        where = "" if Path(place).is_dir() else f" (there is no folder {path} in {Path.cwd()})"
        raise ModelError(f"{path}: its config.json cannot be used{where}: {_short(error)}") from error


def _code_of(place: str) -> dict[str, bool]:
    """Whether transformers may run the code of a model; not given, it would ask on standard input."""
    return {"trust_remote_code": place in TRUSTED}


def load_generation_config(path: str) -> Any | None:
    """The model's generation_config.json, in a form that can be saved; None where there is none.

    Many published ones set a temperature without do_sample, which transformers reads but does not save: they
    get do_sample. Where more is wrong, only the valid token ids are kept. Its settings for sampling are not
    used here, `rollout` has its own. Raises ModelError: the file cannot be read.
    """
    place = local_or_hub(path)
    file = Path(place) / "generation_config.json"
    if Path(place).is_dir() and not file.is_file():
        return None
    kind = _transformers.GenerationConfig
    try:
        found = kind.from_pretrained(place)
        if _can_be_saved(found):
            return found
        found.do_sample = True
        if _can_be_saved(found):
            return found
        # a padding id of -1 is common, and invalid
        ids = {n: getattr(found, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return kind(**{n: i for n, i in ids.items() if not isinstance(i, int) or i >= 0})
    except OSError as error:
        if not file.is_file():
            return None
        raise ModelError(f"{file} cannot be read: {_short(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is invalid: {_short(error)}; mend it, or remove it if nothing needs it"
        ) from None


def _can_be_saved(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def check_writes_text(path: str, config: PretrainedConfig) -> None:
    """Raises ModelError for a model that is not a language model, and for a folder without weights."""
    kinds: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    writers = {**kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **kinds.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    kind, own_code = config.model_type, "auto_map" in config.to_dict()
    if kind not in writers and not own_code:
        raise ModelError(f"{path} is a {kind}, which writes no text: a causal language model is needed")
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_files(folder)


def _short(error: Exception) -> str:
    """The message of an error on one line of at most 300 characters (transformers may write a page)."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def local_or_hub(path: str) -> str:
    """The path of a folder that exists, else `path` as the name of a model on the hub.

    Raises ModelError: a folder without config.json, or a path that cannot be a hub name and does not exist.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_small_files(folder)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            base = base_of(folder / "adapter_config.json")
            raise ModelError(
                f"{folder} holds an adapter (LoRA) alone, for {base}: take that model, or one into which the "
                "adapter is merged (rlhf export, or merge_and_unload of peft)"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is no model folder of the Hugging Face layout: it has no config.json")
        return str(folder)
    if path.startswith(("/", "~", ".")) or path.count("/") > 1:
        hint = " Make it with: python -m rlhf.small_model" if folder.name.startswith("SmolLM2") else ""
        raise ModelError(f"there is no model folder {folder} (looked from {Path.cwd()}).{hint}")
    return path


def text_settings(config: Any) -> dict[str, Any]:
    """The config of a model's language part, by name; the whole config for a model of text alone.

    Settings are there under their usual names, also where the model has its own (GPT-2's n_positions is
    max_position_embeddings).
    """
    text = config.get_text_config()
    settings: dict[str, Any] = text.to_dict()
    usual = {name: settings[own] for name, own in text.attribute_map.items() if own in settings}
    return settings | usual


def eos_token_ids(path: str) -> set[int]:
    """Ids of the end-of-sequence tokens by the model's generation config, else its config; may be empty."""
    found = load_generation_config(path)
    own = text_settings(load_model_config(path)).get("eos_token_id") if found is None else found.eos_token_id
    return {own} if isinstance(own, int) else set(own or ())


def decoded(tokenizer: Any, token_ids: Sequence[int], dropped: Collection[int] | None = None) -> str:
    """The text of token ids, without those in `dropped`; None: without any special token."""
    if dropped is None:
        return tokenizer.decode(list(token_ids), skip_special_tokens=True)
    kept = [token_id for token_id in token_ids if token_id not in dropped]
    return tokenizer.decode(kept, skip_special_tokens=False, spaces_between_special_tokens=False)


def head_of(model: Any) -> nn.Module | None:
    """The language-model head, or None."""
    return model.get_output_embeddings()
