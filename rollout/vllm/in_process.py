"""vLLM beside the learner, in its process: one engine a rank, on the same device.

1. Token ids in, token ids and log-probs of the distribution really sampled from out. No tokenizer is
   loaded, and everything about a request is said with it: nothing comes from the model's generation
   settings.
2. A sample is a request of its own with a seed of its own, hash(seed, index); the prompt's keys and values
   are shared through the prefix cache. Left without a seed it would draw from the learner's generator.
3. A weight update hands the learner's tensors over, packs the head anew (rollout/vllm_worker.py), forgets the
   prefix cache, and ends with a proof of what the engine holds (rollout/proof.py). Samples in flight go on
   with keys and values computed anew.
4. The engine starts with random weights: it cannot sample before it was given the learner's.

vLLM 0.32. On a GPU the engine sleeps between `release` and the next request, its weights in host memory.
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
from rlhf.rollout.requests import Row, check_requests, rows_of
from rlhf.rollout.sampling import stream_keys
from rlhf.rollout.vllm.adapter import (
    adapter_request,
    folder_for_adapter,
    in_parts,
    prove_parts,
    room_for,
    write_adapter,
)
from rlhf.rollout.vllm.images import SEES, ImageFormat, given_pictures, take_given_pictures
from rlhf.rollout.vllm.process import group_left_alone, own_generator, process_left_alone
from rlhf.rollout.vllm.truncation import candidates_of, logprobs_asked
from rlhf.rollout.weight_proof import prove
from rlhf.types import Completion, FinishReason, Prompt

VERSIONS = ("0.32",)
WORKER = "rlhf.rollout.vllm.worker.HeldWeights"
MAX_SEQUENCES = 256
CPU_BLOCK = 32
"""Tokens that share or do not share a prefix together; vLLM's own 128 would share no short prompt on a
CPU.
"""
DEFAULTS = {
    # its own start-up messages, and the head it reports as not loaded in every update (the proof says it
    # better)
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(frozen=True, slots=True)
class VLLMModel:
    """What to sample from. The weights come from the learner."""

    path: str
    dtype: torch.dtype
    max_tokens: int
    """Of a prompt and its completion."""
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    kv_cache_gib: float = 4.0
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of vLLM's engine."""
    image_format: ImageFormat | None = None
    """Of a model that can see."""
    lora_rank: int = 0
    """Of an adapter that is sent by itself; 0: there is none, or it comes merged."""

    def engine_args(self) -> dict[str, Any]:
        """What every vLLM here is started with, in one process or another."""
        gpu = torch.cuda.is_available()
        cpu: dict[str, Any] = {} if gpu else {"block_size": CPU_BLOCK, "enforce_eager": True}
        sees: dict[str, Any] = {} if self.image_format is None else SEES
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
            **sees,
            **room_for(self.lora_rank),
            **self.args,
        }

    def check_length(self, request: RolloutRequest) -> None:
        longest = len(request.prompt.token_ids) + request.params.max_tokens
        if longest > self.max_tokens:
            raise EngineError(
                f"prompt {request.prompt.id!r} and its completion may have {longest} tokens, vllm was "
                f"started for {self.max_tokens}"
            )


def require_vllm() -> Any:
    """The vllm module. Raises EngineError: it is not installed, or of another version."""
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
            f"vllm {vllm.__version__} is installed; this adapter is written for {', '.join(VERSIONS)}.*"
        )
    return vllm


def sampling_settings(request: RolloutRequest, index: int, model: VLLMModel) -> dict[str, Any]:
    """vLLM's SamplingParams of one sample, every setting that matters given."""
    params = request.params
    greedy = params.temperature == 0
    key = int(stream_keys([params.seed], [index], torch.device("cpu")).item())
    return {
        "n": 1,
        # vLLM takes -1 for "no seed"
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
    """Raises EngineError when vLLM is not there, or cannot be started for this model."""

    def __init__(self, model: VLLMModel) -> None:
        self._model = model
        self._rows: dict[str, Row] = {}
        self._ended: dict[str, list[Completion]] = {}
        self._finished: list[Completion] = []
        self._version = 0
        self._paused = self._asleep = False
        self._first: str | None = None
        self._base: WeightSource | None = None
        self._sleeps = torch.cuda.is_available()
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._owns_group = not torch.distributed.is_initialized()
        if not (launched or self._owns_group):
            raise EngineError("there is a vllm engine in this process already; close it first")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        args: dict[str, Any] = {
            "async_scheduling": False,
            "disable_log_stats": True,
            "enable_sleep_mode": self._sleeps,
            **model.engine_args(),
        }
        if launched:
            args["distributed_executor_backend"] = "external_launcher"
        with process_left_alone():
            vllm = require_vllm()
            if model.image_format is not None:
                take_given_pictures(model.image_format.kind)
            self._sampling_params: Any = vllm.SamplingParams
            self._delta: Any = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
            try:
                self._llm: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args))
            except (RuntimeError, TypeError, ValueError) as error:
                raise EngineError(f"vllm cannot start for {model.path}: {error}") from error
        self._folder = folder_for_adapter() if model.lora_rank else None
        self._adapter: Any = None if self._folder is None else adapter_request(self._folder.name)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a prompt that is empty, in flight or too long, or whose pictures do not fit
        it or cannot be seen.
        """
        check_requests(
            requests, self._ended, self._model.vocabulary, sees=self._model.image_format is not None
        )
        for request in requests:
            self._model.check_length(request)
        prompts = [self._prompt(request.prompt) for request in requests]
        self._wake()
        for request, prompt in zip(requests, prompts, strict=True):
            self._ended[request.prompt.id] = []
            for row in rows_of(request, self._model.eos_token_ids, self._version):
                self._start(row, prompt)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Decodes until a whole group has finished, or `timeout`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # with a seed for every sample vLLM still draws one number a step from the generator it shares with us
        with own_generator():
            while self._rows and not self._finished and not self._paused:
                for output in self._llm.step():
                    self._take(output)
                if deadline is not None and time.monotonic() >= deadline:
                    break
        finished, self._finished = self._finished, []
        return finished

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends samples where they are, `wait` decodes them to their end, `keep` holds them."""
        if mode == "abort" and self._rows:
            self._llm.abort_request(list(self._rows))
            for key in list(self._rows):
                self._end(key)
        if mode == "wait":
            finished: list[Completion] = []
            while self._rows:
                finished.extend(self.poll())
            self._finished = finished + self._finished
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Raises SyncError: the engine does not hold what it was sent, or keeps prompts of older weights."""
        start = time.perf_counter()
        self._wake()
        parts = in_parts(source, self._model.lora_rank)
        base = source if parts is None else parts.base
        sent = _Counted(base)
        if parts is None or base is not self._base:
            self._call("tandem_load", weights=sent.weights())
            self._base = base
        if parts is not None and self._folder is not None:
            sent.bytes += write_adapter(Path(self._folder.name), parts.adapter, self._model.dtype)
            self._call("tandem_adapter", path=self._folder.name)
        self.forget_prompts()
        dtype = self._model.dtype
        if parts is None:
            proven = prove("vllm", self, source, version, dtype)
        else:
            proven = prove_parts("vllm", self, parts, version, dtype)
        self._version, self._first = version, None
        for row in self._rows.values():
            row.versions.append((version, len(row.token_ids)))
        seconds = time.perf_counter() - start
        return SyncReport(version, seconds, sent.bytes, proven.compared, proven.unread)

    def forget_prompts(self) -> None:
        """Keys, values and features of pictures of older weights are of no use, those of samples in flight
        included.
        """
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise SyncError("vllm did not give up its prefix cache after a weight update")
        self._llm.reset_encoder_cache()

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        return self._call("tandem_digests", names=names, version=version)

    def part(self, name: str, copy: str, version: int) -> Tensor:
        return decoded_part(self._call("tandem_part", name=name, copy=copy, version=version))

    def release(self) -> None:
        """On a GPU: weights go to host memory and the memory of keys and values is free."""
        if self._sleeps and not self._asleep and not self._rows:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        self._rows, self._ended, self._finished = {}, {}, []
        with group_left_alone(kept=not self._owns_group):
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
        """As vLLM takes it."""
        if prompt.images and self._model.image_format is not None:
            return given_pictures(self._model.image_format, prompt).engine_input(prompt.token_ids)
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
        """The tokens a sample has got since the last step."""
        row = self._rows[output.request_id]
        (sampled,) = output.outputs
        first = output.request_id == self._first
        if first:
            # it may be asked once more, and is found then
            self._first = ""
        if first and output.num_cached_tokens:
            raise SyncError(
                f"vllm found {output.num_cached_tokens} tokens of a prompt in its cache after the weight "
                f"update to version {self._version}: it keeps keys and values of older weights"
            )
        for token, found in zip(sampled.token_ids, sampled.logprobs, strict=True):
            candidates = [(other, logprob.logprob) for other, logprob in found.items()]
            left = candidates_of(row, token, candidates, self._model.vocabulary)
            row.append(token, found[token].logprob, left)
        if output.finished:
            check_prompt(row, output.prompt_token_ids)
            check_end(row, sampled.finish_reason)
            self._end(output.request_id)

    def _end(self, key: str) -> None:
        row = self._rows.pop(key)
        prompt_id = row.request.prompt.id
        self._ended[prompt_id].append(row.completion())
        if len(self._ended[prompt_id]) == row.request.params.n:
            self._finished.extend(self._ended.pop(prompt_id))


def check_prompt(row: Row, seen: Sequence[int] | None) -> None:
    """Raises EngineError: what was continued is not the prompt."""
    sent = row.request.prompt.token_ids
    if seen is not None and tuple(seen) != sent:
        raise EngineError(
            f"vllm continued another prompt than {row.request.prompt.id!r}: {len(seen)} tokens instead of "
            f"{len(sent)}; a chat template or a special token was added to it"
        )


def check_end(row: Row, reason: str | None) -> None:
    """Raises EngineError: a sample ended where it should not, or went on where it should have ended."""
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
    """A source's weights, with their bytes."""

    def __init__(self, source: WeightSource) -> None:
        self._source, self.bytes = source, 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source.named_tensors():
            self.bytes += tensor.nbytes
            yield name, tensor.detach()
