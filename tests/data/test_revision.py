"""Second answers: what stands behind a first one, what of it is learned, and who is asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algos.preference.two_roles import srpo
from rlhf.collect.pairing import Pairing
from rlhf.config.data import DataConfig
from rlhf.config.load import make_config
from rlhf.config.pairs import PairsConfig
from rlhf.data.prompts import PromptDataset
from rlhf.data.revision import Improvement, Reviser
from rlhf.learn.contrasts import contrasts_of
from rlhf.models.pretrained import load_tokenizer
from rlhf.types import Duel, Group, Prompt
from tests.support import group


@pytest.fixture(scope="module")
def reviser(tiny_model_dir: Path) -> Reviser:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    assert isinstance(tokenizer.eos_token_id, int)
    return Reviser(tokenizer, "Better?", frozenset({tokenizer.eos_token_id}))


def ids(reviser: Reviser, text: str) -> list[int]:
    tokenizer: Any = reviser.tokenizer
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_is_asked_by_a_message_of_the_user(reviser: Reviser):
    content = [{"role": "user", "content": "Capital of Norway?"}]
    tokenizer: Any = reviser.tokenizer
    [eos] = reviser.end_token_ids
    whole = tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
    prompt = Prompt("p", tuple(whole), content)
    asked = reviser.asked_again(prompt, [*ids(reviser, "Rome."), eos])
    # what the template itself writes of the whole chat
    turns = [*content, {"role": "assistant", "content": "Rome."}, {"role": "user", "content": "Better?"}]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode([*whole, *asked]).replace(tokenizer.decode([eos]), "") == written.replace(
        tokenizer.decode([eos]), ""
    )


def test_behind_a_text_stands_a_text_and_the_first_answer_does_not_end(reviser: Reviser):
    prompt, [eos] = Prompt("p", tuple(ids(reviser, "2 + 2 =")), "2 + 2 ="), reviser.end_token_ids
    assert reviser.asked_again(prompt, [*ids(reviser, "5"), eos]) == tuple(ids(reviser, "5Better?"))
    # one that was cut has no end
    assert reviser.asked_again(prompt, ids(reviser, "5")) == tuple(ids(reviser, "5Better?"))
    again = reviser.prompt(prompt, ids(reviser, "5"))
    assert again.token_ids == tuple(ids(reviser, "2 + 2 =5Better?")) and again.content == "2 + 2 ="


def improvement(reviser: Reviser, **changes: Any) -> Improvement:
    made = {"train": "x", "improve_prompt": "Better?", "improve_column": "draft", **changes}
    return Improvement(reviser, DataConfig.model_validate(made))


def questions(reviser: Reviser, *drafts: str, **columns: str) -> PromptDataset:
    made = [
        Prompt(f"p:{i}", tuple(ids(reviser, "2+2=")), "2+2=", {"draft": draft, **columns})
        for i, draft in enumerate(drafts)
    ]
    return PromptDataset(tuple(made), ("draft", *columns), skipped=0, source=Path("p"))


def test_a_prompt_goes_on_with_the_answer_to_improve_which_rewards_see_apart(reviser: Reviser):
    made = improvement(reviser).prompts(questions(reviser, "5"))
    [prompt] = made.prompts
    assert prompt.token_ids == tuple(ids(reviser, "2+2=5Better?")) and prompt.content == "2+2="
    assert prompt.columns == {"draft": "5", "reference": "5"} and made.columns == ("draft", "reference")
    assert prompt.question_tokens == 4
    # the next answer is asked for behind the last one alone
    again = reviser.prompt(prompt, ids(reviser, "33"))
    assert again.token_ids == tuple(ids(reviser, "2+2=33Better?")) and again.question_tokens == 4


def test_a_prompt_that_gets_too_long_with_its_answer_is_refused_or_left_out(reviser: Reviser):
    two = questions(reviser, "5", "55555")
    with pytest.raises(
        ValueError, match=r"p, p:1: with the answer to improve .* has 16 tokens, more than .* 12"
    ):
        improvement(reviser, max_prompt_tokens=12).prompts(two)
    left = improvement(reviser, max_prompt_tokens=12, long_prompts="skip").prompts(two)
    assert len(left) == 1 and left.skipped == 1


def test_what_an_improvement_needs_is_told(reviser: Reviser):
    with pytest.raises(ValueError, match="improve_column is 'other', which is not among the columns draft"):
        improvement(reviser, improve_column="other").prompts(questions(reviser, "5"))
    with pytest.raises(ValueError, match="as 'reference', but there is a column of that name too"):
        improvement(reviser).prompts(questions(reviser, "5", reference="4"))
    with pytest.raises(ValueError, match="p:0: column 'draft' must be non-empty text"):
        improvement(reviser).prompts(questions(reviser, ""))
    given: dict[str, Any] = {
        "run_dir": "r",
        "steps": 1,
        "model": {"path": "m"},
        "algorithm": {"name": "grpo"},
    }
    given["reward"] = {"functions": [{"path": "length"}]}
    with pytest.raises(ValueError, match=r"say in which words, as data\.improve_prompt="):
        make_config({**given, "data": {"train": "x", "improve_column": "draft"}})


def pair(reviser: Reviser) -> Group:
    made = group("x", [7], [[3], [4, 5]], [1.0, 0.0])
    return Group(made.prompt, made.trajectories, duels=(Duel(0, 1, 1.0),))


def test_a_pair_becomes_six_of_which_the_second_answers_alone_are_learned(reviser: Reviser):
    six = reviser.revised(pair(reviser)).trajectories
    asked = tuple(ids(reviser, "Better?"))
    assert [t.token_ids for t in six] == [
        (3,),
        (4, 5),
        (3, *asked, 3),
        (3, *asked, 4, 5),
        (4, 5, *asked, 3),
        (4, 5, *asked, 4, 5),
    ]
    learned = [[token for token, on in zip(t.token_ids, t.loss_mask, strict=True) if on] for t in six]
    assert learned == [[3], [4, 5]] * 3
    assert six[3].turns == (0,) * (1 + len(asked)) + (1, 1)
    assert [t.rollout_logprobs is None for t in six] == [False, False, True, True, True, True]
    assert [t.reward for t in six] == [1.0, 0.0] * 3


def test_pairing_makes_them_of_the_pair_alone(reviser: Reviser):
    algorithm = srpo()
    assert algorithm.preference is not None
    pairing = Pairing(PairsConfig(), algorithm, reviser=reviser)
    three = group("x", [7], [[3], [4, 5], [6]], [0.0, 0.5, 1.0])
    [paired], metrics = pairing([three])
    # the middle one is not in the pair, and the better one is the second that is left
    assert [t.token_ids[-1] for t in paired.trajectories] == [3, 6] * 3 and metrics["pairs/groups"].value == 1
    contrasts, _ = contrasts_of([paired], algorithm.preference)
    # + 6|3 - 3|3, + 3|6 - 6|6, and both half with 6 - 3
    assert contrasts.sequence.tolist() == [3, 2, 4, 5, 3, 4, 1, 0]
    assert contrasts.coefficient.tolist() == [1, -1, 1, -1, 0.5, -0.5, 0.5, -0.5]
    assert contrasts.target.tolist() == [1, 0, 1] and contrasts.share.tolist() == [0.25, 0.25, 0.5]
    assert torch.equal(contrasts.weight, contrasts.share)


def test_several_pairs_of_a_prompt_are_refused(reviser: Reviser):
    pairing = Pairing(PairsConfig(rule="all"), srpo(), reviser=reviser)
    with pytest.raises(ValueError, match="gives 3 pairs of one prompt"):
        pairing([group("x", [7], [[3], [4, 5], [6]], [0.0, 0.5, 1.0])])
