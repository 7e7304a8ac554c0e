"""Starts vLLM's server, which also takes processed images: `python -m rlhf.rollout.vllm.serve ARGUMENTS...`.

The arguments are those of `vllm serve`. With the environment variable TANDEM_SEES set to the model type
(`qwen2_5_vl`, ...), requests may have images that the learner has processed (images.py).
"""

from __future__ import annotations

import importlib
import os

from rlhf.rollout.vllm.images import KIND_VARIABLE, accept_processed_images

# child processes of the server import this module again, as `__mp_main__`
if __name__ in ("__main__", "__mp_main__") and os.environ.get(KIND_VARIABLE):
    accept_processed_images(os.environ[KIND_VARIABLE])
if __name__ == "__main__":
    importlib.import_module("vllm.entrypoints.launchers.api_server.entry").main()
