"""The datasets of a policy run: read in the form that its settings and its algorithm need, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.data import DataConfig
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.chats import chats_column, prompt_of_chat
from rlhf.data.completions import OfflineDataset, load_offline
from rlhf.data.preferences import require_named
from rlhf.data.prompts import PromptDataset, first_row, load_prompts
from rlhf.data.revision import Improvement, Reviser
from rlhf.data.rows import Row
from rlhf.data.together import families
from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Environments
from rlhf.evaluation.pairs import held_out_pairs
from rlhf.models.pretrained import SCORE_FILE, load_model_config
from rlhf.models.vision.processor import Processor
from rlhf.preflight.environments import with_tools
from rlhf.preflight.probe import ignores_rewards
from rlhf.types import Prompt

PAIR_COLUMNS = {"chosen", "completions", "label"}
"""Columns of which one tells that a file has completions to compare, not prompts alone."""
LABELS = {"chosen", "rewards", "label"}
"""Columns that say which of such completions are the better ones."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the datasets of a run."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    processor: Processor | None
    end_token_ids: tuple[int, ...]
    environments: Environments | None
    conversation: Conversation | None

    def train(self, algorithm: Algorithm) -> tuple[PromptDataset, OfflineDataset | None]:
        """The prompts of `data.train`, and its completions where the run learns from these."""
        path = self.config.data.train
        if self.config.data.mode == "online":
            _check_has_prompts(self.config)
            return self.prompts(path), None
        offline = self.completions(path, self.config.data)
        _check_imitated(self.config, algorithm, offline)
        _check_singles(self.config, algorithm, offline)
        # the run asks once more for what it draws together
        families(self.config, offline)
        return offline.prompts, offline

    def held_out(self, algorithm: Algorithm) -> tuple[PromptDataset | None, OfflineDataset | None]:
        """Prompts to sample from, and completions to compare, as `data.eval` and the algorithm have them.

        The prompts of pairs are sampled from, each once, where there are reward functions.
        """
        config = self.config
        path = config.data.eval
        if path is None:
            return None, None
        if algorithm.preference is None or not PAIR_COLUMNS.intersection(first_row(path).columns):
            rewarded = self.environments is not None and self.environments.gives_rewards
            judged_alone = config.reward.preference is not None and not config.reward.functions
            if judged_alone and not rewarded:
                raise ConfigError(
                    f"data.eval, {path}, has prompts alone, whose samples reward.functions would score; "
                    "reward.preference has nothing to compare them with: give reward.functions too (with "
                    "pairs.labels: preference), or pairs (chosen, rejected) in data.eval, or leave data.eval "
                    "out"
                )
            return self.prompts(path), None
        data = config.data
        if data.reward_column is None and LABELS.intersection(first_row(path).columns):
            # reward functions score the completions of data.train; held-out ones are compared by their labels
            data = data.model_copy(update={"reward_column": DataConfig.model_fields["reward_column"].default})
        pairs = self.completions(path, data)
        # a run takes these out of it once more; what is none is refused before it loads weights
        held_out_pairs(pairs.groups)
        if not config.reward.functions:
            # a judge has nothing to compare the samples with
            return None, pairs
        # the same words beside another picture are another prompt
        different: dict[Any, Prompt] = {}
        for prompt in pairs.prompts.prompts:
            different.setdefault((prompt.token_ids, prompt.images), prompt)
        return replace(pairs.prompts, prompts=tuple(different.values())), pairs

    def prompts(self, path: str) -> PromptDataset:
        """The prompts of a dataset, with the tools of their environment."""
        data, columns = self.config.data, first_row(path).columns
        change: Callable[[Row], Row] = lambda row: row  # noqa: E731
        chats = chats_column(columns, data.prompt_column)
        if data.prompt_column not in columns and chats is not None:
            change = partial(prompt_of_chat, prompt_column=data.prompt_column, column=chats)
        found = load_prompts(
            Path(path).expanduser(),
            self.tokenizer,
            prompt_column=data.prompt_column,
            image_column=data.image_column,
            max_prompt_tokens=data.max_prompt_tokens,
            long_prompts=data.long_prompts,
            processor=self.processor,
            change=with_tools(change, self.environments, self.conversation, data.prompt_column),
        )
        improvement = self.improvement()
        return found if improvement is None else improvement.prompts(found)

    def improvement(self) -> Improvement | None:
        """What has prompts ask to improve an answer of the data; None: nothing does."""
        data = self.config.data
        if data.improve_column is None:
            return None
        assert data.improve_prompt is not None
        return Improvement(Reviser(self.tokenizer, data.improve_prompt, frozenset(self.end_token_ids)), data)

    def completions(self, path: str, data: DataConfig) -> OfflineDataset:
        """The completions of a dataset, read as `data` says."""
        eos = self.tokenizer.eos_token_id
        found = load_offline(
            Path(path).expanduser(),
            self.tokenizer,
            data,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
            eos_token_id=eos if isinstance(eos, int) else self.end_token_ids[0],
            end_token_ids=self.end_token_ids,
            processor=self.processor,
        )
        improvement = self.improvement()
        return found if improvement is None else improvement.completions(found)


def _check_has_prompts(config: Config) -> None:
    """Raises ConfigError when completions are to be sampled, and the data has pairs without a prompt."""
    path, prompt = config.data.train, config.data.prompt_column
    columns = first_row(path).columns
    if {"chosen", "rejected"} <= set(columns) and prompt not in columns:
        raise ConfigError(
            f"{path} has chosen and rejected and no column {prompt}: to learn from them set data.mode: "
            "offline, with algorithm.name dpo for example; to sample completions give it the prompts"
        )


def _check_imitated(config: Config, algorithm: Algorithm, data: OfflineDataset) -> None:
    """Raises ConfigError when completions have no rewards, which the algorithm needs. Chats may have none."""
    row, name = first_row(data.source), config.data.reward_column
    if not data.imitates or name is None or ignores_rewards(algorithm):
        return
    chat = chats_column(row.columns, config.data.prompt_column) is not None
    if not chat and not any(t.turns and t.turns[-1] > 0 for g in data.groups for t in g.trajectories):
        require_named(row, "reward_column", name)


def _check_singles(config: Config, algorithm: Algorithm, data: OfflineDataset) -> None:
    """Raises ConfigError when the algorithm compares pairs and a line has a single completion, or when it
    compares at all and there are chats, which are for imitation."""
    single = next((g for g in data.groups if len(g.trajectories) == 1), None)
    offline = config.data.mode == "offline"
    if offline and config.pairs.labels == "preference" and not any(g.duels for g in data.groups):
        raise ConfigError(
            f"pairs.labels is preference, but {config.data.train} has no column probability, so no pair "
            "would have a label: set it to auto or hard"
        )
    if algorithm.preference is None or single is None:
        return
    name = config.algorithm["name"]
    chat = next((g for g in data.groups if any(t.turns and t.turns[-1] > 0 for t in g.trajectories)), None)
    if data.imitates or chat is not None:
        raise ConfigError(
            f"{config.data.train}, {(chat or single).prompt.id}: {name} compares better completions with "
            "worse ones, and a chat is neither: it is to be imitated; set algorithm.name=sft, or give pairs "
            "(chosen, rejected) or labels (completion, label), each with one message of the assistant"
        )
    if not algorithm.preference.form.takes_singles:
        raise ConfigError(
            f"{config.data.train}, {single.prompt.id}: {name} compares completions of one prompt, and here "
            "is a single one; for completions that are each labelled good or bad take algorithm.name kto, "
            "bco, nca or apo_zero"
        )
    if not all(0 <= reward <= 1 for reward in single.rewards):
        raise ConfigError(
            f"{config.data.train}, {single.prompt.id}: {name} reads the reward of a single completion as the "
            f"probability that it is good, which must lie between 0 and 1, got {single.rewards[0]:g}"
        )


def _check_scorers_see(config: Config) -> None:
    """Raises ConfigError: prompts have images, and a reward model of text alone is to score them."""
    judge = config.reward.preference
    for function in (*config.reward.functions, *([] if judge is None else [judge])):
        path: object = function.params.get("model")
        if function.path not in ("reward_model", "pair_rewards") or not isinstance(path, str):
            continue
        if SCORE_FILE not in load_model_config(path).to_dict():
            raise ConfigError(
                f"prompts have images, but {path}, the model of {function.path}, reads text alone: train "
                "one on a model that sees (task: reward_model)"
            )


def check_images(config: Config, algorithm: Algorithm, train: PromptDataset) -> None:
    if not any(prompt.images for prompt in train.prompts):
        if algorithm.perception is not None:
            raise ConfigError(
                f"a coefficient of perception is set, but no prompt of {config.data.train} has an image"
            )
        return
    if config.distributed.mode == "sharded":
        raise ConfigError(
            "prompts have images, and models that take images cannot be sharded: set "
            "distributed.mode=replicated"
        )
    _check_scorers_see(config)
    if algorithm.needs_prompt_value or algorithm.prompt_temperature is not None:
        raise ConfigError(
            f"prompts have images, but the prompt value or temperature that {config.algorithm['name']} "
            "learns depends on text only; set algorithm.name=awr with a group baseline"
        )
    if algorithm.critic is not None and config.critic.trunk == "own":
        raise ConfigError(
            "critic.trunk is own and prompts have images, but a critic with its own trunk sees text only; "
            "set critic.trunk=policy"
        )
