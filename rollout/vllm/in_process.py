"""The engine `vllm`: vLLM 0.32 in the learner's process, one engine per rank on the same device.

1. Token ids go in; token ids and their log-probs under the distribution sampled from come out. No tokenizer
   is loaded, and each request has all its settings: none comes from the model's generation config.
2. Each sample is a vLLM request of its own, with the seed hash(seed, index); the prompt's keys and values are
   shared through the prefix cache. Without a seed vLLM would draw from the learner's generator.
3. A weight update loads the learner's tensors, packs the head again (worker.py), clears the prefix cache, and
   verifies the weights held (rollout/weight_proof.py). Samples in flight recompute their keys and values.
4. The engine starts with random weights, so it must be sent the learner's before it samples.

On a GPU the engine sleeps between `release` and the next request, with its weights in host memory.
"""

from __future__ import annotations

import base64
import gc
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.engine import EngineError, PauseMode, RolloutRequest, SyncError, SyncReport, WeightSource
from rlhf.rollout.requests import Finished, Row, check_requests, rows_of
from rlhf.rollout.sampling import stream_keys
from rlhf.rollout.vllm.adapter import (
    adapted_source,
    adapter_request,
    folder_for_adapter,
    lora_engine_args,
    prove_adapted,
    write_adapter,
)
from rlhf.rollout.vllm.images import IMAGE_ENGINE_ARGS, ImageFormat, accept_processed_images, processed_images
from rlhf.rollout.vllm.isolation import kept_process_group, restored_generator, restored_process_state
from rlhf.rollout.vllm.truncation import candidates_of, logprobs_asked
from rlhf.rollout.weight_proof import prove
from rlhf.types import Completion, FinishReason, Prompt

VERSIONS = ("0.32",)
WORKER = "rlhf.rollout.vllm.worker.HeldWeights"
MAX_SEQUENCES = 256
CPU_BLOCK = 32
"""Tokens of a block of the prefix cache on a CPU; with vLLM's default of 128 short prompts are not shared."""
DEFAULTS = {
    # hides start-up messages, and a wrong warning at every update that the head was not loaded
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(frozen=True, slots=True)
class VLLMModel:
    """The model to sample from and how vLLM is started for it; its weights come from the learner."""

    path: str
    dtype: torch.dtype
    max_tokens: int
    """Limit of prompt and completion together."""
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    kv_cache_gib: float = 4.0
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of vLLM's engine."""
    image_format: ImageFormat | None = None
    """None if the model takes no images."""
    lora_rank: int = 0
    """Rank of an adapter that is sent unmerged; 0 if there is none, or it is merged."""

    def engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM's engine, in this process and in servers."""
        gpu = torch.cuda.is_available()
        cpu: dict[str, Any] = {} if gpu else {"block_size": CPU_BLOCK, "enforce_eager": True}
        image_args: dict[str, Any] = {} if self.image_format is None else IMAGE_ENGINE_ARGS
        return {
            "model": self.path,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": self.max_tokens,
            "max_num_seqs": MAX_SEQUENCES,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "worker_extension_cls": WORKER,
            **cpu,
            **image_args,
            **lora_engine_args(self.lora_rank),
            **self.args,
        }

    def check_length(self, request: RolloutRequest) -> None:
        longest = len(request.prompt.token_ids) + request.params.max_tokens
        if longest > self.max_tokens:
            raise EngineError(
                f"prompt {request.prompt.id!r} and its completion may have {longest} tokens, but vllm was "
                f"started for {self.max_tokens}"
            )


def require_vllm() -> Any:
    """The module vllm. Raises EngineError if it cannot be imported or has another version."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        vllm: Any = importlib.import_module("vllm")
    except ImportError as error:
        raise EngineError(
            f"rollout.engine is vllm, which cannot be imported: make setup EXTRAS=vllm ({error})"
        ) from error
    if not str(vllm.__version__).startswith(VERSIONS):
        raise EngineError(
            f"vllm {vllm.__version__} is installed, expected {', '.join(VERSIONS)}.*: make setup EXTRAS=vllm"
        )
    return vllm


def sampling_settings(request: RolloutRequest, index: int, model: VLLMModel) -> dict[str, Any]:
    """vLLM's SamplingParams of one sample, with every relevant setting given explicitly."""
    params = request.params
    greedy = params.temperature == 0
    key = int(stream_keys([params.seed], [index], torch.device("cpu")).item())
    return {
        "n": 1,
        # never negative: -1 means no seed in vLLM
        "seed": key & (2**63 - 1),
        "temperature": params.temperature,
        "top_p": 1.0 if greedy else params.top_p,
        "top_k": 0 if greedy else params.top_k,
        "min_p": 0.0 if greedy else params.min_p,
        "max_tokens": params.max_tokens,
        "ignore_eos": True,
        "stop_token_ids": sorted({*model.eos_token_ids, *params.stop_token_ids}),
        "logprobs": logprobs_asked(params, model.vocabulary),
        "detokenize": False,
    }


class VLLMEngine:
    """The engine `vllm`. Raises EngineError if vLLM is not installed or cannot start for this model."""

    def __init__(self, model: VLLMModel) -> None:
        self._model = model
        self._rows: dict[str, Row] = {}
        self._finished = Finished()
        self._version = 0
        self._paused = self._asleep = False
        self._first: str | None = None
        self._base: WeightSource | None = None
        self._sleeps = torch.cuda.is_available()
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._owns_group = not torch.distributed.is_initialized()
        if not (launched or self._owns_group):
            raise EngineError("there is a vllm engine in this process already: close it first")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        args: dict[str, Any] = {
            "async_scheduling": False,
            "disable_log_stats": True,
            "enable_sleep_mode": self._sleeps,
            **model.engine_args(),
        }
        if launched:
            args["distributed_executor_backend"] = "external_launcher"
        with restored_process_state():
            vllm = require_vllm()
            if model.image_format is not None:
                accept_processed_images(model.image_format.kind)
            self._sampling_params: Any = vllm.SamplingParams
            self._delta: Any = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
            try:
                self._llm: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args))
            except (RuntimeError, TypeError, ValueError) as error:
                raise EngineError(f"vllm cannot start for {model.path}: {error}") from error
        self._folder = folder_for_adapter() if model.lora_rank else None
        self._adapter: Any = None if self._folder is None else adapter_request(self._folder.name)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a prompt that is too long, whose placeholders do not fit its images, or that
        `check_requests` refuses.
        """
        takes_images = self._model.image_format is not None
        check_requests(requests, self._finished.in_flight, self._model.vocabulary, takes_images=takes_images)
        for request in requests:
            self._model.check_length(request)
        prompts = [self._prompt(request.prompt) for request in requests]
        self._wake()
        for request, prompt in zip(requests, prompts, strict=True):
            self._finished.expect(request)
            for row in rows_of(request, self._model.eos_token_ids, self._version):
                self._start(row, prompt)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Decodes until a whole group has finished or `timeout` seconds have passed."""
        self._step(None if timeout is None else time.monotonic() + timeout)
        return self._finished.take()

    def _step(self, deadline: float | None) -> None:
        # even with seeds vLLM draws one number per step from the global generator, which the learner uses
        with restored_generator():
            while self._rows and not self._finished.is_due and not self._paused:
                for output in self._llm.step():
                    self._take(output)
                if deadline is not None and time.monotonic() >= deadline:
                    break

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends samples with the tokens so far, `wait` decodes them to the end, `keep` holds them."""
        if mode == "abort" and self._rows:
            self._llm.abort_request(list(self._rows))
            for key in list(self._rows):
                self._end(key)
        if mode == "wait":
            while self._rows:
                self._finished.is_due = False
                self._step(None)
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError if the engine does not hold what it was sent, or does not clear its caches."""
        start = time.perf_counter()
        self._wake()
        adapted = adapted_source(source, self._model.lora_rank)
        base = source if adapted is None else adapted.base
        sent = _Counted(base)
        if adapted is None or base is not self._base:
            self._call("tandem_load", weights=sent.weights())
            self._base = base
        if adapted is not None and self._folder is not None:
            sent.bytes += write_adapter(Path(self._folder.name), adapted.adapter, self._model.dtype)
            self._call("tandem_adapter", path=self._folder.name)
        self.forget_prompts()
        dtype = self._model.dtype
        if adapted is None:
            proven = prove("vllm", self, source, version, dtype)
        else:
            proven = prove_adapted("vllm", self, adapted, version, dtype)
        self._version, self._first = version, None
        for row in self._rows.values():
            row.versions.append((version, len(row.token_ids)))
        seconds = time.perf_counter() - start
        return SyncReport(version, seconds, sent.bytes, proven.compared, proven.unread)

    def forget_prompts(self) -> None:
        """Clears keys, values and image features of older weights, those of samples in flight too."""
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise SyncError("vllm did not clear its prefix cache after a weight update")
        self._llm.reset_encoder_cache()

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        return self._call("tandem_digests", names=names, version=version)

    def part(self, name: str, copy: str, version: int) -> Tensor:
        return decoded_part(self._call("tandem_part", name=name, copy=copy, version=version))

    def release(self) -> None:
        """On a GPU moves weights to host memory and frees the memory of keys and values."""
        if self._sleeps and not self._asleep and not self._rows:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        self._rows = {}
        self._finished.clear()
        with kept_process_group(kept=not self._owns_group):
            self._llm.engine_core.shutdown()
        if self._folder is not None:
            self._folder.cleanup()
        del self._llm
        gc.collect()
        state: Any = importlib.import_module("vllm.distributed.parallel_state")
        state.destroy_model_parallel()
        if self._owns_group:
            state.destroy_distributed_environment()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _call(self, method: str, **kwargs: Any) -> Any:
        (answer,) = self._llm.collective_rpc(method, kwargs=kwargs)
        return answer

    def _prompt(self, prompt: Prompt) -> Any:
        """The prompt as vLLM takes it."""
        if prompt.images and self._model.image_format is not None:
            return processed_images(self._model.image_format, prompt).engine_input(prompt.token_ids)
        return {"prompt_token_ids": list(prompt.token_ids)}

    def _start(self, row: Row, prompt: Any) -> None:
        request = row.request
        key = f"{request.prompt.id}/{row.index}"
        self._rows[key] = row
        if self._first is None:
            self._first = key
        settings = sampling_settings(request, row.index, self._model)
        self._llm.add_request(
            key,
            prompt,
            self._sampling_params(output_kind=self._delta, **settings),
            lora_request=self._adapter,
        )

    def _take(self, output: Any) -> None:
        """Appends the tokens of a sample from one step of vLLM."""
        row = self._rows[output.request_id]
        (sampled,) = output.outputs
        first = output.request_id == self._first
        if first:
            # later prompts may be repeated, and are then found in the cache rightly
            self._first = ""
        if first and output.num_cached_tokens:
            raise SyncError(
                f"vllm found {output.num_cached_tokens} tokens of a prompt in its cache after the weight "
                f"update to version {self._version}: it keeps keys and values of older weights"
            )
        for token, found in zip(sampled.token_ids, sampled.logprobs, strict=True):
            candidates = [(other, logprob.logprob) for other, logprob in found.items()]
            ids = candidates_of(row, token, candidates, self._model.vocabulary)
            row.append(token, found[token].logprob, ids)
        if output.finished:
            check_prompt(row, output.prompt_token_ids)
            check_end(row, sampled.finish_reason)
            self._end(output.request_id)

    def _end(self, key: str) -> None:
        self._finished.end(self._rows.pop(key))


def check_prompt(row: Row, seen: Sequence[int] | None) -> None:
    """Raises EngineError if the prompt that vLLM continued is not the one that was sent."""
    sent = row.request.prompt.token_ids
    if seen is not None and tuple(seen) != sent:
        raise EngineError(
            f"vllm continued another prompt than {row.request.prompt.id!r}: {len(seen)} tokens instead of "
            f"{len(sent)}; a chat template or a special token was added to it"
        )


def check_end(row: Row, reason: str | None) -> None:
    """Raises EngineError if a sample ended too early or too late, or with another reason than expected."""
    expected = row.completion().finish_reason
    early = [i for i, token in enumerate(row.token_ids[:-1]) if token in row.stop_ids]
    if early or REASONS.get(reason or "") is not expected:
        raise EngineError(
            f"vllm ended a sample of {row.request.prompt.id!r} with {reason!r} after {len(row.token_ids)} "
            f"tokens, by its stop tokens and limit it is {expected.value!r}"
            + (f" after {early[0] + 1}" if early else "")
        )


def decoded_part(answer: Sequence[Any]) -> Tensor:
    shape, numbers = answer
    return torch.frombuffer(bytearray(base64.b64decode(numbers)), dtype=torch.float32).view(shape)


class _Counted:
    """Iterates over a source's weights and counts their bytes."""

    def __init__(self, source: WeightSource) -> None:
        self._source, self.bytes = source, 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source.named_tensors():
            self.bytes += tensor.nbytes
            yield name, tensor.detach()
