"""Training from Python instead of the command line: python examples/library.py [key=value ...]"""

import sys

from rlhf.config.load import load_config
from rlhf.trainer import Trainer

if __name__ == "__main__":
    config = load_config("configs/quickstart.yaml", ["run_dir=runs/library", *sys.argv[1:]])
    trainer = Trainer(config)  # reads and checks everything but the weights
    print(f"{len(trainer.inputs.train)} prompts, {config.steps} steps")  # noqa: T201
    trainer.run()
