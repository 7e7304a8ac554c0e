"""Whether a run can be continued: its newest checkpoint has to be of the same model and parts.

Only the names and shapes of what was saved are read. What the weights and the states hold is compared when
they are loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from rlhf.checkpoints.stateful import CheckpointError, assert_parts
from rlhf.checkpoints.store import checkpoints_newest_first, read_verified
from rlhf.checkpoints.tensor_files import SavedTensors
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.inputs import Inputs
from rlhf.learn.optimizer import assert_names, assert_shape
from rlhf.models.lora import adapter_shapes
from rlhf.models.pretrained import check_weights
from rlhf.models.vision.text_alone import leave_tower
from rlhf.monitoring.run_folder import RunFolder


def check_resume(config: Config, inputs: Inputs) -> None:
    """Raises ConfigError when `checkpoint.resume: auto` would load a checkpoint of another model, or of
    settings with other parts. A damaged checkpoint is passed over, as a run does.
    """
    if config.checkpoint.resume != "auto":
        return
    for path in checkpoints_newest_first(RunFolder(Path(config.run_dir).expanduser()).checkpoints):
        try:
            newest = read_verified(path, device="cpu")
        except (CheckpointError, SafetensorError, OSError):
            continue
        try:
            assert_parts(_parts(config, inputs), newest.state)
            if saved := newest.tensors.get("policy.model"):
                _assert_same_model(config, saved)
        except CheckpointError as error:
            raise ConfigError(f"{path}: {error}") from None
        return


def _parts(config: Config, inputs: Inputs) -> list[str]:
    """Names of the parts of a run that not all runs have, as its checkpoints have them."""
    present = {
        "critic": inputs.algorithm.critic is not None,
        "iterate": config.iteration.steps > 0,
        "offline": inputs.offline is not None,
        "prompt_value": inputs.algorithm.needs_prompt_value,
        "replay": config.replay.groups_per_step > 0,
    }
    return [name for name, needed in present.items() if needed]


def _assert_same_model(config: Config, saved: SavedTensors) -> None:
    """Raises CheckpointError: the names or shapes of the trained weights are not those of `saved`."""
    section = config.model
    model = check_weights(section.path)
    if model is None:
        # on the hub, where nothing of it is known yet
        return
    leave_tower(model)
    trained = {name: tuple(w.shape) for name, w in model.named_parameters() if w.requires_grad}
    if section.lora is not None:
        trained = adapter_shapes(model, section.lora)
        if not section.lora.targets:
            # which of all layers can have an adapter, a model without contents does not always tell
            trained = {name: shape for name, shape in trained.items() if name in saved}
    assert_names(set(saved), set(trained))
    for name, shape in trained.items():
        assert_shape(name, torch.Size(saved.shape(name)), torch.Size(shape))
