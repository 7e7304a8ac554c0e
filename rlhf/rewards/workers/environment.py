"""The environment variables of workers: those that programs need to run, and those that are named.

The environment of a training run holds keys: of the Hugging Face hub, of W&B, of clouds. A reward
function judges what a policy wrote, often with libraries of others, and an environment does what it asks for,
so they get no key that their settings do not name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from rlhf.config.section import MASK, holds_mask

# a worker must not compete with the threads of the trainer
SINGLE_THREADED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TERM|TMPDIR|TEMP|TMP|XDG_\w+|VIRTUAL_ENV|CONDA_\w+"
    r"|PYTHON\w+|LD_LIBRARY_PATH|LD_PRELOAD|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|(ATEN|DNNL|ONEDNN|MKL|OMP|KMP|GOMP|MALLOC|GLIBC|NUMBA|TRITON)_\w+|TORCH\w*|CUDA_\w+|NVIDIA_\w+|ROCM_\w+"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_\w+|ENDPOINT)|HUGGINGFACE_HUB_CACHE|TRANSFORMERS_\w+"
    r"|TOKENIZERS_PARALLELISM|NLTK_DATA|COVERAGE_\w+"
)
"""What a worker gets without being asked for: where things are, and how libraries compute."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
"""In a name, what makes its value a secret wherever it stands."""


@runtime_checkable
class NeedsVariables(Protocol):
    """The settings of what runs in a worker, as far as they decide on its environment variables."""

    kind: ClassVar[str]
    """What messages call it: "reward function", "judge", "environment"."""

    @property
    def path(self) -> str: ...

    @property
    def params(self) -> Mapping[str, Any]: ...

    @property
    def variables(self) -> Sequence[str]:
        """Names of the variables that it gets beside those that all programs need."""
        ...

    @property
    def gpu(self) -> bool: ...


def environment(spec: NeedsVariables) -> dict[str, str]:
    """The environment of a worker. Raises ValueError where `variables` names one that is not set."""
    for name in spec.variables:
        if name not in os.environ:
            raise ValueError(
                f"{spec.kind} {spec.path}: the environment variable {name}, named by variables, is not set"
            )
    if holds_mask(dict(spec.params)):
        raise ValueError(
            f"{spec.kind} {spec.path}: a secret in its params is masked ({MASK}), because config.yaml "
            "does not keep secrets; give it again, or name an environment variable as key_variable"
        )
    kept = {name: value for name, value in os.environ.items() if _is_given(name, spec)}
    gpus = _own_gpu_first() if spec.gpu else dict.fromkeys(GPUS, "")
    # a function may print any text, even one that is not valid Unicode
    printing = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    return kept | dict.fromkeys(SINGLE_THREADED, "1") | gpus | printing


def hidden(message: str, spec: NeedsVariables) -> str:
    """What to add to a function's error whose message names a variable that is set, but not given to it."""
    names = [name for name in re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", message) if name in os.environ]
    missing = sorted({name for name in names if not _is_given(name, spec)})
    if not missing:
        return ""
    return (
        f"\n{', '.join(missing)} is set here, but {spec.kind}s get the environment variables that their "
        f"settings name, no others: add variables: [{', '.join(missing)}] to this {spec.kind.split()[-1]}"
    )


def _is_given(name: str, spec: NeedsVariables) -> bool:
    if name in spec.variables or name in _key_variables(spec.params):
        return True
    return KEPT.fullmatch(name) is not None and SECRET.search(name) is None


def _key_variables(params: Mapping[str, Any]) -> Iterator[str]:
    """What `key_variable` names in `params`, and in the settings of a service among them."""
    for key, value in params.items():
        if key == "key_variable" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _key_variables(cast(Mapping[str, Any], value))


def _own_gpu_first() -> dict[str, str]:
    """Environment in which the GPU of this rank is the first: a worker uses the first GPU that it sees."""
    # imported here because it imports torch, which a process that starts workers may not need
    from rlhf.devices import visible_gpus

    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), visible_gpus()
    return {GPUS[0]: ",".join([*gpus[rank:], *gpus[:rank]])} if gpus else {}
