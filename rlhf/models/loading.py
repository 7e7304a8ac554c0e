"""Loads policies and other models, chooses their packing, and checks it against the model's own forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.model import ModelConfig
from rlhf.distributed.watchdog import lost_connection
from rlhf.models.attention import DEFINITION, caps_attention, sliding_window, takes_attention
from rlhf.models.packing import Layout, least
from rlhf.models.policy import Policy, Trunk
from rlhf.models.pretrained import ModelError, load_model, load_scorer, text_settings
from rlhf.models.self_test import forward_error, hidden_state_error, image_error
from rlhf.models.sharding import Sharding, free_gathered, open_policy, open_scorer
from rlhf.models.vision.processor import Processor
from rlhf.models.vision.text_alone import leave_tower, text_alone
from rlhf.rollout.learner_module import exact_attention, only_eager

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

log = logging.getLogger(__name__)


def load_policy(
    section: ModelConfig,
    path: str,
    device: torch.device,
    processor: Processor | None = None,
    *,
    longest: int | None = None,
) -> Policy:
    """Loads a whole policy in float32 (the optimizer copies its masters from it) and checks its forward.

    `longest`: the most tokens of prompt and completion together; None: unknown. A sliding window that is no
    smaller is none. Raises ModelError: the model cannot be loaded, its head is not linear, or it cannot do
    the packing of `section` (the message gives the reason).
    """
    return checked_policy(section, path, load_model(path, device), processor, longest=longest)


def load_sharded_policy(
    section: ModelConfig, path: str, sharding: Sharding, *, trains: bool, longest: int | None = None
) -> Policy:
    """Loads a policy in shards, which are stored in float32 if it `trains`. Every rank calls it.

    The forward is checked in float32; then the model is opened again to compute in `sharding.computed`.
    Raises ModelError as `load_policy` does.
    """
    policy = checked_policy(
        section, path, open_policy(path, sharding.exact(), trains=trains), longest=longest
    )
    free_gathered(policy.model)
    if sharding.computed == torch.float32:
        return policy
    layout = policy.layout
    del policy
    model = open_policy(path, sharding, trains=trains)
    leave_tower(model)
    reopened = Policy(model, layout=layout)
    with torch.no_grad():
        reopened.dummy_pass()
    return reopened


def load_trunk(
    path: str, device: torch.device | Sharding, *, longest: int | None = None
) -> tuple[Trunk, Tensor | None]:
    """A transformer in float32, and the weight `[K, H]` of its score head if it has one.

    Given a `Sharding` in place of a device, it is loaded in shards: it is checked in float32 and then opened
    again to compute in `Sharding.computed`. Raises ModelError as `load_policy` does.
    """
    if isinstance(device, torch.device):
        return _checked_scorer(path, *load_scorer(path, device), longest)
    trunk, weight = _checked_scorer(path, *open_scorer(path, device.exact()), longest)
    if device.computed == torch.float32:
        return trunk, weight
    layout = trunk.layout
    del trunk
    model, weight = open_scorer(path, device)
    reopened = Trunk(model, layout=layout)
    with torch.no_grad():
        reopened.hidden(least(model.device))
    free_gathered(model)
    return reopened, weight


def checked_policy(
    section: ModelConfig,
    path: str,
    model: PreTrainedModel,
    processor: Processor | None = None,
    *,
    longest: int | None,
) -> Policy:
    """A policy of a model that is loaded, in the layout that its own forward allows.

    Raises ModelError as `load_policy` does.
    """
    leave_tower(model)
    if told := text_alone(model.config):
        log.warning("%s: %s", path, told)
    policy = Policy(model, layout="padded", processor=processor)
    window = sliding_window(model.config, longest)

    def error() -> str | None:
        return forward_error(policy, window) or image_error(policy)

    choose_layout(policy, path, section.packing, error, window)
    return policy


def checked_trunk(path: str, model: PreTrainedModel, *, longest: int | None) -> Trunk:
    """A transformer that is loaded, in the first layout that works. Raises ModelError like `load_trunk`."""
    trunk = Trunk(model, layout="padded")
    window = sliding_window(model.config, longest)
    choose_layout(trunk, path, "auto", lambda: hidden_state_error(trunk, window), window)
    return trunk


def _checked_scorer(
    path: str, model: PreTrainedModel, weight: Tensor | None, longest: int | None
) -> tuple[Trunk, Tensor | None]:
    trunk = checked_trunk(path, model, longest=longest)
    free_gathered(model)
    return trunk, weight


def choose_layout(
    trunk: Trunk, path: str, asked: str, error: Callable[[], str | None], window: int | None
) -> None:
    """Sets `trunk.layout` to the layout `asked` for, or for "auto" to the first of `LAYOUTS` that works.

    `error` compares the present layout with the model's own forward and describes the difference, or returns
    None. If "auto" does not end at the first layout, a warning says why. `window`: tokens of the smallest
    sliding window; None: there is none. Raises ModelError: the model cannot do the layout that was asked for,
    or even padded rows differ from its own forward.
    """
    reasons: list[str] = []
    for layout in LAYOUTS if asked == "auto" else (cast(Layout, asked),):
        reason = why_not(trunk.model, layout, window)
        if reason is None:
            trunk.layout = layout
            reason = _tried(error)
        if reason is not None and layout == "padded" and exact_attention(trunk.model) != DEFINITION:
            only_eager(trunk.model)
            trunk.layout = layout
            reason = _tried(error)
        if reason is None:
            if reasons:
                how = {"packed": "sequences are packed", "padded": "sequences are padded"}[layout]
                log.warning(
                    "%s: prompts are not shared within a group, because %s; %s", path, reasons[0], how
                )
            return
        reasons.append(reason)
    if asked in ("auto", "padded"):
        raise ModelError(
            f"{path}: log-probs computed from its hidden states and head differ from its own ({reasons[-1]})"
        )
    raise ModelError(f"model.packing is {asked}, but {path} cannot: {reasons[0]}")


def _tried(error: Callable[[], str | None]) -> str | None:
    """What `error` returns, or the reason why it cannot be computed."""
    try:
        return error()
    except NotImplementedError as refusal:
        return str(refusal)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        if lost_connection(failure):
            # another rank, which has shards of this model, is gone
            raise
        # the code of a model may fail in any way where it is called otherwise than transformers does
        text = " ".join(str(failure).split())
        return f"its code fails there with {type(failure).__name__}: {text:.200}"


def why_not(model: PreTrainedModel, layout: Layout, window: int | None) -> str | None:
    """Why a model cannot do a layout, judged by its config alone; None: the config allows it."""
    if layout == "padded":
        return None
    settings = text_settings(model.config)
    kinds: set[str] = set(settings.get("layer_types") or ())
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}"
    if caps_attention(model.config):
        return "it caps attention logits"
    if not takes_attention(model):
        return f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
    if layout == "shared_prefix" and window is not None:
        return f"it attends to a sliding window of {window} tokens"
    return None
