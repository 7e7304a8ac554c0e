"""Whether an exact KL can be computed: policy and reference must give probabilities to the same tokens.

And, of several references, whether each line of the data names one.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.prompts import PromptDataset
from rlhf.models.pretrained import load_model_config, load_tokenizer, text_settings


def check_reference(
    config: Config, algorithm: Algorithm, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ConfigError when an exact KL compares the policy with a model of another vocabulary.

    `model` and `tokenizer` are the policy's. A reference's width, depth and family are free; so are rows of
    its head beyond the policy's, which no token has.
    """
    if not (algorithm.needs_exact_kl or algorithm.has_teacher):
        return
    for setting, path in config.model.references.items():
        if path != config.model.path:
            _check_one(config, setting, path, model, tokenizer)


def _check_one(
    config: Config, setting: str, path: str, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    of_policy, of_reference = text_settings(model), text_settings(load_model_config(path))
    whose = f"{setting}, {path}, cannot be compared with {config.model.path}: "
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
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but {setting}, "
            f"{path}, has positions for {limit} tokens; lower one of the two"
        )


def check_named(config: Config, algorithm: Algorithm, train: PromptDataset) -> None:
    """Raises ConfigError when `model.reference` names several models, and a line of the data none of them."""
    names, column = config.model.reference, config.data.reference_column
    if not isinstance(names, dict) or not algorithm.needs_reference:
        return
    if column not in train.columns:
        near = difflib.get_close_matches(column, train.columns, n=1)
        hint = f"; did you mean data.reference_column={near[0]}?" if near else ""
        raise ConfigError(
            f"model.reference names several models ({', '.join(names)}), of which data.reference_column = "
            f"{column} names one for each line, but {config.data.train} has no such column, only "
            f"{', '.join(train.columns) or 'that of the prompts'}{hint}"
        )
    for prompt in train.prompts:
        name = str(prompt.columns[column])
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{prompt.id}: column {column} is {name}, but model.reference has no model of that name, "
                f"only {', '.join(names)}{hint}"
            )


def by_column(config: Config, train: PromptDataset) -> str:
    """Several references in words, each with the number of prompts that name it."""
    names, column = config.model.reference, config.data.reference_column
    assert isinstance(names, dict)
    counts = Counter(str(prompt.columns[column]) for prompt in train.prompts)
    each = ", ".join(f"{name} ({counts[name]} prompts) {path}" for name, path in names.items())
    return f"by column {column}: {each}"


def unnamed(config: Config, train: PromptDataset) -> Iterator[str]:
    """A warning for each of several references that no line of the data names."""
    names, column = config.model.reference, config.data.reference_column
    if not isinstance(names, dict) or column not in train.columns:
        return
    used = {str(prompt.columns[column]) for prompt in train.prompts}
    for name in names:
        if name not in used:
            yield (
                f"model.reference.{name} is loaded, but no line of {config.data.train} names it in column "
                f"{column}"
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
