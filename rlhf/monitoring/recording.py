"""Opens the run folder and the monitor of a run on rank 0; the other ranks get a silent monitor."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.config.section import masked
from rlhf.distributed.world import World
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.run_folder import RunFolder, with_origin
from rlhf.monitoring.samples import TokenTexts


@contextmanager
def recording(
    folder: RunFolder,
    config: Config | RewardModelConfig,
    world: World,
    *,
    samples_per_step: int = 0,
    texts: TokenTexts | None = None,
) -> Generator[Monitor]:
    """Claims the folder and starts its monitor; closes the monitor and releases the folder at the end.

    Raises RunFolderError as `RunFolder.claim` does, and SinkError as `Monitor.start` does.
    """
    if not world.is_main:
        yield Monitor.silent()
        return
    text = with_origin(config.to_yaml())
    with (
        folder.claim(config=text, resume=config.checkpoint.resume == "auto"),
        Monitor.start(
            folder,
            sinks=config.monitor.sinks,
            total_steps=config.steps,
            samples_per_step=samples_per_step,
            settings=masked(config.model_dump(mode="json")),
            texts=texts,
        ) as monitor,
    ):
        yield monitor
