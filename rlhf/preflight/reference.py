"""Whether an exact KL can be computed: policy and reference must give probabilities to the same tokens."""

from __future__ import annotations

from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.models.pretrained import load_model_config, load_tokenizer, text_settings


def check_reference(
    config: Config, algorithm: Algorithm, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ConfigError when an exact KL compares the policy with a model of another vocabulary.

    `model` and `tokenizer` are the policy's. The reference's width, depth and family are free; so are rows of
    its head beyond the policy's, which no token has.
    """
    path = config.model.reference
    if path in (None, config.model.path) or not (algorithm.needs_exact_kl or algorithm.has_teacher):
        return
    of_policy, of_reference = text_settings(model), text_settings(load_model_config(path))
    whose = f"model.reference, {path}, cannot be compared with {config.model.path}: "
    own, other = cast(int, of_policy["vocab_size"]), cast(int, of_reference["vocab_size"])
    different = _first_difference(tokenizer, load_tokenizer(path))
    if different is not None:
        sizes = f"the vocabularies have {own} tokens (policy) and {other} (reference)"
        raise ConfigError(
            f"{whose}an exact KL needs the same vocabulary, and {different}; {sizes}. Take a reference of "
            "the policy's family"
        )
    if other < own:
        raise ConfigError(
            f"{whose}its head has {other} rows, the policy's {own}: resize one of them "
            "(resize_token_embeddings), so that the reference has as many or more"
        )
    caps = of_policy.get("final_logit_softcapping"), of_reference.get("final_logit_softcapping")
    if caps[0] != caps[1]:
        raise ConfigError(
            f"{whose}final_logit_softcapping is {caps[0]} in the policy and {caps[1]} in the reference, and "
            "an exact KL caps both alike"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    limit = of_reference.get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but model.reference, "
            f"{path}, has positions for {limit} tokens; lower one of the two"
        )


def _first_difference(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> str | None:
    """The first token id that stands for different texts, in words; None: the vocabularies are the same."""
    ours, theirs = _by_id(policy), _by_id(reference)
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            texts = [repr(t[number]) if number in t else "nothing" for t in (ours, theirs)]
            return f"token {number} is {texts[0]} in the policy's tokenizer, {texts[1]} in the reference's"
    return None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    known: Any = tokenizer
    return {number: text for text, number in cast(dict[str, int], known.get_vocab()).items()}
