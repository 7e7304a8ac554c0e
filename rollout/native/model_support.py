"""Checks whether the native engine can decode a model: by its configuration and by decoding a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch

from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.learner_module import Model, causal_model, exact_attention, sampling_mode
from rlhf.types import Completion, Prompt

VISION_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
"""Model types that encode images before the language model, which can then be decoded like any other."""
TOLERANCE = 1e-3
"""Largest mean |difference| of log-probs, in nats."""
CHEAP = 512
"""Tokens of the largest window beyond which decoding is checked."""
NOISE_FACTOR = 3.0
"""Below float32 precision: the largest ratio of the engine's error to that of plain cached decoding."""


def why_unsupported(model: Model, max_tokens: int | None = None) -> str | None:
    """The reason why it cannot be decoded, from its class and configuration; None if there is none.

    `max_tokens`: the most tokens of prompt and completion together; None: unknown.
    """
    config = model.config
    text = config.get_text_config()
    settings = text.to_dict()
    layers = set(settings.get("layer_types") or ["full_attention"]) - {"full_attention"}
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if window is not None and max_tokens is not None and window >= max_tokens:
        # no sequence is longer than the window
        window, layers = None, layers - {"sliding_attention"}
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if text is not config and config.model_type not in VISION_MODELS:
        return f"it is a {config.model_type}, which takes other inputs than text"
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced (it does not use the AttentionInterface of transformers)"
    if layers:
        return f"it has layers of type {', '.join(sorted(layers))}"
    if settings.get("attn_logit_softcapping") is not None:
        return "it soft-caps its attention scores"
    if window is not None:
        return f"its attention has a sliding window of {window} tokens"
    return None


def check_decoding(engine: RolloutEngine, model: Model) -> None:
    """Decodes 8 tokens after some prompts and compares log-probs with forwards over the whole sequences.

    Raises ValueError if the mean |difference| is above `TOLERANCE` and, in a precision below float32, also
    above `NOISE_FACTOR` times that of plain cached decoding.
    """
    name = "hf" if isinstance(engine, HFEngine) else "native"
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    params = SamplingParams(n=2, max_tokens=8, seed=0)
    # decoding beyond a window too, where that is cheap
    window = model.config.get_text_config().to_dict().get("sliding_window") or 0
    sizes = (5, 9) if name == "native" or not 0 < window <= CHEAP else (5, 9, window + 4)
    requests = [
        RolloutRequest(
            Prompt(
                id=f"self-test-{size}", token_ids=tuple(7 * i % vocabulary for i in range(size)), content=""
            ),
            params,
        )
        for size in sizes
    ]
    try:
        completions = generate(engine, requests)
    except Exception as error:
        # the code of a model may fail in any way where it is called otherwise than transformers does
        raise ValueError(
            f"the engine {name} cannot decode {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    difference = mean(logprob_errors(model, requests, completions))
    allowed = TOLERANCE
    if difference > allowed and model.dtype != torch.float32:
        plain = generate(HFEngine(model, eos_token_ids=()), requests)
        allowed = NOISE_FACTOR * mean(logprob_errors(model, requests, plain))
    # `not <=` instead of `>`, so that NaN is refused too
    if not difference <= allowed:
        raise ValueError(
            f"the engine {name} cannot decode {type(model).__name__}: log-probs of 8 tokens differ from "
            f"those of a forward over the whole sequence by {difference:.3g} nats in the mean, allowed is "
            f"{allowed:.3g}"
        )


def logprob_errors(
    model: Model, requests: Sequence[RolloutRequest], groups: Sequence[Sequence[Completion]]
) -> list[float]:
    """|rollout log-prob - log-prob by one forward over prompt and completion| of every token, in nats.

    The requests must not truncate the distribution.
    """
    model = causal_model(model)
    errors: list[float] = []
    with sampling_mode(model, exact_attention(model)):
        for request, completions in zip(requests, groups, strict=True):
            prompt = request.prompt.token_ids
            for completion in completions:
                ids = torch.tensor([prompt + completion.token_ids], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                logprobs = (logits / (request.params.temperature or 1.0)).log_softmax(-1)
                chosen = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
                errors.extend((chosen - torch.tensor(completion.rollout_logprobs)).abs().tolist())
    return errors
