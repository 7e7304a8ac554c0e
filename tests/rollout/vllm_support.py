"""Whether the tests of vLLM can run: `make test` installs it and says that they must."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

INSTALLED = find_spec("vllm") is not None
if os.environ.get("TANDEM_TEST_VLLM") == "1" and not INSTALLED:
    raise RuntimeError("TANDEM_TEST_VLLM=1, but vllm is not installed: make setup EXTRAS=vllm")
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed: make setup EXTRAS=vllm")
