"""Chats of several turns: the tokens, the mask, what each template makes of them, and the loss of `sft`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.algos.table import ALGORITHMS
from rlhf.config.data import DataConfig
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.data.chats import ChatTokenizer
from rlhf.data.completions import OfflineDataset, load_offline
from rlhf.data.rows import Row
from rlhf.metrics import merge
from rlhf.models.loading import LAYOUTS
from rlhf.models.pretrained import load_tokenizer
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.types import FinishReason, Group, Trajectory
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS
from tests.support import bandit_settings, learner_of, metrics_of, policy_of, train

ROOT = Path(__file__).parents[2]
EOS = 2


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


CHAT = [user("Three?"), says("yes"), user("Four?"), says("no")]
# one token is written as one character: ^ opens a message, $ ends it, _ is a line end
PROMPT = "^user_Three?$_^assistant_"
TOKENS = "yes$_^user_Four?$_^assistant_no$"
MASK = "11110000000000000000000000000111"
TURNS = "00001111111111111111111111111111"

MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OUTSIDE = MARKED.replace(
    "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
END_INSIDE = MARKED.replace(
    "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"
)
FORGETFUL = CHAT_TEMPLATE.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('#')[-1])"
)
"""Leaves out thoughts, which end with #, of all messages but the last, as templates of thinking models do."""


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., OfflineDataset]:
    def load(rows: list[dict[str, Any]], *, template: str | None = None, **settings: Any) -> OfflineDataset:
        if template is not None:
            tokenizer.chat_template = template
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        limit = settings.pop("max_completion_tokens", 64)
        section = DataConfig.model_validate({"train": str(file), "mode": "offline"} | settings)
        return load_offline(file, tokenizer, section, max_completion_tokens=limit, eos_token_id=EOS)

    return load


def only(dataset: OfflineDataset) -> tuple[Group, Trajectory]:
    [group] = dataset.groups
    [trajectory] = group.trajectories
    return group, trajectory


def written(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The tokens, one character each."""
    _, opening, end = SPECIAL_TOKENS
    text = str(tokenizer.decode(list(ids)))
    return text.replace(opening, "^").replace(end, "$").replace("\n", "_")


def digits(values: tuple[int, ...] | tuple[bool, ...]) -> str:
    return "".join(str(int(value)) for value in values)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [*CHAT, user("and five?")]},
        {"messages": [message | {"name": None, "tool_calls": None} for message in CHAT]},
        {"messages": [user([{"type": "text", "text": "Three?"}]), *CHAT[1:]]},
        # as UltraChat: the first message stands beside the chat
        {"messages": CHAT, "prompt": "Three?"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "Three?", "completion": CHAT[1:]},
    ],
)
def test_every_message_of_the_assistant_is_learned(
    load: Callable[..., OfflineDataset], tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
):
    group, trajectory = only(load([row]))
    assert written(tokenizer, group.prompt.token_ids) == PROMPT
    assert written(tokenizer, trajectory.token_ids) == TOKENS
    assert (digits(trajectory.loss_mask), digits(trajectory.turns)) == (MASK, TURNS)
    assert trajectory.reward == 1.0 and trajectory.rollout_logprobs is None
    assert group.prompt.content == CHAT[:1] and group.prompt.columns == {}


@pytest.mark.parametrize("template", [MARKED, END_OUTSIDE, END_INSIDE])
def test_marks_in_the_template_give_the_same_tokens_and_mask(
    load: Callable[..., OfflineDataset], template: str
):
    assert only(load([{"messages": CHAT}])) == only(load([{"messages": CHAT}], template=template))


def test_a_system_message_belongs_to_the_prompt(
    load: Callable[..., OfflineDataset], tokenizer: PreTrainedTokenizerBase
):
    group, trajectory = only(load([{"messages": [{"role": "system", "content": "Hm"}, *CHAT]}]))
    assert written(tokenizer, group.prompt.token_ids) == "^system_Hm$_" + PROMPT
    assert written(tokenizer, trajectory.token_ids) == TOKENS


def test_a_tools_answer_is_not_learned(
    load: Callable[..., OfflineDataset], tokenizer: PreTrainedTokenizerBase
):
    tool = {"role": "tool", "content": "7"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": None}]}
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['tool_calls'][0]['name'] if message.tool_calls else message['content'])",
    )
    _, trajectory = only(load([{"messages": [*CHAT[:1], call, tool, says("no")]}], template=template))
    assert written(tokenizer, trajectory.token_ids) == "f$_^tool_7$_^assistant_no$"
    assert digits(trajectory.loss_mask) == "11000000000000000000000111"
    assert digits(trajectory.turns) == "00111111111111111111111111"


def test_a_chat_of_one_turn_is_what_a_prompt_and_a_completion_are(load: Callable[..., OfflineDataset]):
    chat = only(load([{"messages": CHAT[:2], "reward": 0.5}]))
    assert chat == only(load([{"prompt": CHAT[:1], "completion": "yes", "reward": 0.5}]))


def test_a_chat_that_was_cut_has_no_end(
    load: Callable[..., OfflineDataset], tokenizer: PreTrainedTokenizerBase
):
    _, trajectory = only(load([{"messages": CHAT, "finish_reason": "length"}]))
    assert written(tokenizer, trajectory.token_ids) == TOKENS.removesuffix("$")
    assert digits(trajectory.loss_mask) == MASK.removesuffix("1")


def test_a_template_without_ends_of_turns_gets_one_behind_the_last(
    load: Callable[..., OfflineDataset], tokenizer: PreTrainedTokenizerBase
):
    template = CHAT_TEMPLATE.replace("<|im_end|>", "").replace("<|im_start|>", "")
    _, trajectory = only(load([{"messages": CHAT}], template=template))
    assert written(tokenizer, trajectory.token_ids) == "yes_user_Four?_assistant_no_$"
    assert digits(trajectory.loss_mask) == "11110000000000000000000001111"


def test_models_that_take_images_refuse_whole_chats(tokenizer: PreTrainedTokenizerBase):
    tokens = ChatTokenizer(tokenizer, EOS, frozenset({EOS}), takes_images=True)
    with pytest.raises(ValueError, match=r"data.jsonl:1: the model takes images"):
        tokens.trajectory(Row("data.jsonl:1", "data.jsonl:1", {}), CHAT, 1.0, FinishReason.STOP)


def test_chats_with_the_same_prompt_stay_apart(load: Callable[..., OfflineDataset]):
    other = [*CHAT[:3], says("maybe")]
    for rows in (
        [{"messages": CHAT}, {"messages": other}],
        [{"prompt": CHAT[:1], "completion": chat[1:]} for chat in (CHAT, other)],
    ):
        assert [len(g.trajectories) for g in load(rows).groups] == [1, 1]


def test_rewards_of_chats_are_read_where_there_are_any(load: Callable[..., OfflineDataset]):
    for column, reward in (("reward", 0.25), ("score", -3.0), ("score", None)):
        _, trajectory = only(load([{"messages": CHAT, column: reward}], reward_column=column))
        assert trajectory.reward == reward
    assert only(load([{"messages": CHAT}], reward_column=None))[1].reward is None
    assert load([{"messages": CHAT}]).imitates and not load([{"messages": CHAT, "reward": 1}]).imitates


def test_limits_hold_for_the_prompt_and_for_all_that_follows(load: Callable[..., OfflineDataset]):
    rows = [{"messages": CHAT}, {"messages": [*CHAT, user("five?"), says("no")]}]
    short: dict[str, Any] = {"max_completion_tokens": len(TOKENS), "max_prompt_tokens": len(PROMPT)}
    data = load(rows, long_prompts="skip", **short)
    assert len(data.groups) == 1 and data.skipped == 1
    with pytest.raises(ValueError, match=r"1 lines are longer than .*data.jsonl:2"):
        load(rows, **short)
    with pytest.raises(ValueError, match=r"2 lines are longer than .*data.jsonl:1"):
        load(rows, **short | {"max_prompt_tokens": len(PROMPT) - 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT[:1]}, "'messages' has no message of the assistant to learn from"),
        ({"messages": CHAT[1:]}, "begins with a message of the assistant, and there is no prompt"),
        ({"messages": "hi"}, "'messages' must be a list of chat messages, got 'hi'"),
        ({"messages": ["hi"]}, "message 0 is 'hi'"),
        (
            {"messages": [*CHAT, user(None)]},
            "needs text under 'content' in each message, but message 4 has None",
        ),
        (
            {"messages": [user([{"type": "image", "image": "a.png"}]), says("a")]},
            "message 0 has an image, and whole chats are of text alone",
        ),
        ({"messages": [user("a"), says(" ")]}, "message 1 is the assistant's and empty"),
        ({"prompt": "a", "completion": CHAT}, "must begin with a message of the assistant, .* 'user'; put"),
        ({"messages": CHAT, "finish_reason": "abort"}, "'finish_reason' must be stop or length"),
    ],
)
def test_a_wrong_chat_is_refused_with_its_place(
    load: Callable[..., OfflineDataset], row: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as found:
        load([row])
    assert "data.jsonl:1" in str(found.value)


def test_a_template_that_leaves_out_earlier_thoughts_is_refused(load: Callable[..., OfflineDataset]):
    chat = [user("Three?"), says("hm#yes"), *CHAT[2:]]
    with pytest.raises(ValueError, match=r"data.jsonl:1: .*does not write the first 2 messages"):
        load([{"messages": chat}], template=FORGETFUL)
    # a single turn, or no thought, is written alike in both
    assert len(load([{"messages": chat[:2]}, {"messages": CHAT}], template=FORGETFUL).groups) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            MARKED.replace("== 'assistant'", "== 'nobody'"),
            "marks of the chat template do not show what the assistant says",
        ),
        (
            CHAT_TEMPLATE + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}",
            "template refuses the prompt: too long",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    load: Callable[..., OfflineDataset], template: str, message: str
):
    with pytest.raises(ValueError, match=f"data.jsonl:1: .*{message}"):
        load([{"messages": CHAT}], template=template)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dpo", {"messages": CHAT}),
        ("kto", {"messages": CHAT[:2]}),
        ("kto", {"messages": CHAT, "reward": 1}),
    ],
)
def test_an_algorithm_that_compares_refuses_chats(
    tmp_path: Path, tiny_model_dir: Path, name: str, row: dict[str, Any]
):
    settings = bandit_settings(tmp_path, tiny_model_dir, data={"mode": "offline"})
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    settings["algorithm"] = {"name": name}
    settings["reward"] = {}
    settings["rollout"]["max_completion_tokens"] = 64
    with pytest.raises(ConfigError, match=f"{name} compares better completions with worse ones"):
        load_inputs(make_config(settings))


def test_sft_trains_on_chats_and_the_check_says_that_their_reward_is_one(
    tmp_path: Path, tiny_model_dir: Path
):
    settings = bandit_settings(tmp_path, tiny_model_dir, steps=2, data={"mode": "offline"})
    settings |= {"algorithm": {"name": "sft"}, "reward": {}}
    settings["rollout"]["max_completion_tokens"] = 64
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    config = make_config(settings)
    said = "\n".join(describe(config, load_inputs(config)))
    assert "rewards      1 for every completion of the data\n" in said
    train(settings)
    first, second = metrics_of(tmp_path)
    assert second["loss/policy"] < first["loss/policy"]


FORMATS = {
    "pairs": [1.0, 0.0],
    "pairs with the prompt in both": [1.0, 0.0],
    "pairs with a soft label": [1.0, 0.0],
    "labels": [1.0],
    "lists": [1.0, 0.0, 0.5],
    "one completion": [1.0],
    "completions alone": [1.0],
    "chats": [1.0],
    "chats of ShareGPT": [1.0],
}


def test_every_format_of_the_page_is_read_as_it_says(load: Callable[..., OfflineDataset]):
    section = (ROOT / "docs" / "training.md").read_text().split("### Formats of data to learn from")[1]
    cells = [line.split(" | ") for line in section.split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert [row[0].removeprefix("| ") for row in cells] == list(FORMATS)
    for name, (_, line, *_rest) in zip(FORMATS, cells, strict=True):
        [group] = load([json.loads(line.strip("`"))]).groups
        assert [t.reward for t in group.trajectories] == FORMATS[name], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_learns_the_mean_over_the_assistants_tokens(
    load: Callable[..., OfflineDataset], tiny_model_dir: Path, layout: str
):
    policy = policy_of(tiny_model_dir, packing=layout, dtype=torch.float64)
    plain = policy_of(tiny_model_dir, packing="padded", dtype=torch.float64).model
    groups = load([{"messages": CHAT}, {"messages": [user("Go"), says("a"), user("on"), says("bc")]}]).groups

    logprobs: list[torch.Tensor] = []
    for group in groups:
        [trajectory] = group.trajectories
        ids = torch.tensor([*group.prompt.token_ids, *trajectory.token_ids])
        with torch.no_grad():
            logits = plain(ids[None]).logits[0, :-1]
        chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        after_prompt = chosen[len(group.prompt.token_ids) - 1 :]
        logprobs.append(after_prompt[torch.tensor([c == "1" for c in digits(trajectory.loss_mask)])])
    # yes$ no$ and a$ bc$: 4 + 3 and 2 + 3 tokens
    assert [len(part) for part in logprobs] == [7, 5]
    expected = -torch.cat(logprobs).mean()

    learner, builder = learner_of(policy, ALGORITHMS["sft"]())
    experience = builder.build(list(groups), kl_coef=0.0)
    counts = learner.counts(experience, [0, 1])
    assert (counts.tokens, counts.sequences) == (12, 2)
    loss = merge(learner.accumulate(experience, [0, 1], counts, 0.0))["loss/policy"].value
    assert loss == pytest.approx(expected.item(), rel=1e-6)
