"""Text that the policy must not forget: its likelihood is added to every update (PPO-ptx).

    loss += ptx.coef * mean of -logprob over the tokens of `ptx.samples` texts

    text           {"text": "..."}                          every token but the first is learned
    completions    {"prompt": ..., "completion": "..."}     the completion is, and its end; the prompt is not

Which texts an update takes depends on the seed and its number alone, so there is nothing to save.

Differences from PPO-max (arXiv:2307.04964): 1. the paper mixes with a weight that it does not state and its
code has it off, so the weight must be given; 2. the mean is over all tokens of the update, of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.config import PtxConfig
from rlhf.data import load_prompts, order
from rlhf.distributed import World, derive_seed
from rlhf.metrics import Mean, Metrics, merge
from rlhf.packing import Unit, fill, pack
from rlhf.policy import Policy
from rlhf.reward_model_data import completion_ids
from rlhf.sharding import in_step


@dataclass(frozen=True, slots=True)
class Text:
    """`given` is read, `learned` is learned; both have a token at least."""

    given: tuple[int, ...]
    learned: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.given) + len(self.learned)


def load_texts(section: PtxConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Text]:
    """Raises ValueError with file and line: a column is missing, a text is empty, or longer than allowed."""
    assert section.path is not None
    plain = section.kind == "text"
    rows = load_prompts(
        Path(section.path).expanduser(),
        tokenizer,
        prompt_column="text" if plain else "prompt",
        max_prompt_tokens=max_tokens,
    )
    if not plain and "completion" not in rows.columns:
        raise ValueError(f"{section.path}: ptx.kind completions needs a column completion beside the prompt")
    texts: list[Text] = []
    for row in rows.prompts:
        if plain:
            text = Text(row.token_ids[:1], row.token_ids[1:])
        else:
            text = Text(row.token_ids, completion_ids(tokenizer, str(row.columns["completion"])))
        if not text.learned or text.tokens > max_tokens:
            raise ValueError(
                f"{section.path}, {row.id}: a text must have 2 to {max_tokens} tokens "
                f"(learner.microbatch_tokens), got {text.tokens}"
            )
        texts.append(text)
    return texts


class Pretraining:
    """Adds the gradient of the texts' loss to that of an update."""

    def __init__(
        self,
        texts: Sequence[Text],
        section: PtxConfig,
        policy: Policy,
        world: World,
        *,
        seed: int,
        budget: int,
    ) -> None:
        """`budget`: tokens of one forward pass."""
        assert section.coef is not None and section.samples is not None
        self.texts, self.policy, self.world = texts, policy, world
        self.coef, self.samples = section.coef, section.samples
        self.seed, self.budget = derive_seed(seed, "ptx") % 2**32, budget

    def accumulate(self, update: int) -> Metrics:
        """`update`: its number, from 0, over the whole run."""
        draw = order(self.seed, len(self.texts), update * self.samples, self.samples)
        total = sum(len(self.texts[i].learned) for i in draw)
        mine = [self.texts[i] for i in draw[self.world.rank :: self.world.size]]
        units = [Unit(i, 0, 1, text.tokens) for i, text in enumerate(mine)]
        parts: list[Metrics] = [{"ptx/loss": Mean(0.0, 0.0)}]
        for several in in_step(fill(units, self.budget), self.policy.model, self.world):
            if several is None:
                torch.autograd.backward([self.policy.idle()])
                continue
            parts.append(self._one_pass([mine[unit.group] for unit in several], total))
        return merge(parts)

    def _one_pass(self, texts: Sequence[Text], total: int) -> Metrics:
        device = self.policy.model.device
        packed = pack(
            [torch.tensor(t.given, device=device) for t in texts],
            [[torch.tensor(t.learned, device=device)] for t in texts],
        )
        logprob = self.policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
        assert logprob is not None
        loss = -logprob.sum()
        torch.autograd.backward([self.coef * loss / total])
        return {"ptx/loss": Mean(loss.item(), float(len(logprob)))}
