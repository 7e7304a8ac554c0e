"""Secrets in settings are masked by what they are, wherever they are written or shown."""

from __future__ import annotations

import pytest

from rlhf.config.load import make_config
from rlhf.config.section import masked
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.remote import Client, RemoteReward
from rlhf.rewards.workers.environment import environment
from tests.config.test_config import settings


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ({"headers": {"X-Anything": "s3cret"}}, {"headers": {"X-Anything": "***"}}),
        ({"params": {"api_key": "s3cret"}}, {"params": {"api_key": "***"}}),
        ({"key_variable": "MY_KEY"}, {"key_variable": "MY_KEY"}),
        ({"password": "s3cret", "db_password": "s3cret"}, {"password": "***", "db_password": "***"}),
        ({"token": "s3cret", "hf_token": "s3cret"}, {"token": "***", "hf_token": "***"}),
        ({"urls": ["http://me:s3cret@host/x"]}, {"urls": ["http://me:***@host/x"]}),
        ({"url": "https://h/x?a=1&api_key=s3cret&b=2"}, {"url": "https://h/x?a=1&api_key=***&b=2"}),
        ({"url": "https://h/x?key=s3cret#part"}, {"url": "https://h/x?key=***#part"}),
        ({"max_tokens": 5, "special_tokens": "keep"}, {"max_tokens": 5, "special_tokens": "keep"}),
        ({"pad_token": "</s>"}, {"pad_token": "</s>"}),
        ({"text": "a:b@c ?key=1", "secret": ""}, {"text": "a:b@c ?key=1", "secret": ""}),
    ],
)  # fmt: skip
def test_secrets_are_masked_and_nothing_else(written: dict[str, object], shown: dict[str, object]) -> None:
    assert masked(written) == shown


def test_config_yaml_has_no_secret_and_a_masked_one_is_not_sent() -> None:
    params = {"url": "http://me:s3cret@host:1/score", "headers": {"Authorization": "s3cret"}}
    config = make_config(settings() | {"reward": {"functions": [{"path": "remote", "params": params}]}})
    assert "s3cret" not in config.to_yaml() and "Authorization: '***'" in config.to_yaml()
    # the run itself has it
    assert config.reward.functions[0].params == params
    for changed in (masked(params), {"headers": masked(params)["headers"]}):
        with pytest.raises(ValueError, match="a secret in its params is masked"):
            environment(RewardSpec("remote", params=changed))


def test_errors_of_a_service_do_not_show_its_password() -> None:
    client = Client(
        "http://me:s3cret@127.0.0.1:1/?api_key=s3cret", headers={}, seconds=1.0, attempts=1, pause=0.0
    )
    with pytest.raises(RuntimeError, match="no answer in 1 attempts") as error:
        client.post({})
    assert "s3cret" not in str(error.value)


def test_a_key_with_a_line_end_is_used_without_it_or_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret\n")
    scorer = RemoteReward("http://host/", key_variable="MY_KEY")
    assert scorer.client.headers["Authorization"] == "Bearer s3cret"
    monkeypatch.setenv("MY_KEY", "s3cret\nX-Other: 1")
    with pytest.raises(ValueError, match="MY_KEY, named by key_variable, must hold a key") as error:
        RemoteReward("http://host/", key_variable="MY_KEY")
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match="the header X must be one line") as error:
        RemoteReward("http://host/", headers={"X": "s3cret\n"})
    assert "s3cret" not in str(error.value)
