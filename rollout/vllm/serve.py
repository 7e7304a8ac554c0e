"""vLLM's own server, which may be given pictures: `python -m rlhf.rollout.vllm.serve ARGUMENTS...`.

The arguments are those of `vllm serve`. With TANDEM_SEES=KIND of the model (`qwen2_5_vl`, ...) in the
environment it takes pictures as requests bring them (rollout/vllm_pictures.py).
"""

from __future__ import annotations

import importlib
import os

from rlhf.rollout.vllm.images import MARK, take_given_pictures

# the processes that a server starts import the module of its command anew, under the second name
if __name__ in ("__main__", "__mp_main__") and os.environ.get(MARK):
    take_given_pictures(os.environ[MARK])
if __name__ == "__main__":
    importlib.import_module("vllm.entrypoints.launchers.api_server.entry").main()
