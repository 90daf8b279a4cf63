"""What leaves the machine, or is shown to others, holds no secret, and hides nothing else."""

import pytest

from prx_composer.common.errors import HIDDEN, redacted, redacted_text

SECRETS = ["password", "db_password", "token", "hf_token", "auth-token", "accessToken", "secret", "client_secret", "api_key"]
SECRETS += ["apiKey", "WANDB_API_KEY", "aws_secret_access_key", "credentials", "Authorization", "passphrase", "private_key"]
HARMLESS = ["max_tokens", "tokenizer", "pad_token", "eos_token", "token_id", "num_tokens", "key", "keys", "qk_norm", "author"]
HARMLESS += ["caption_key", "passes", "secretary", "tokens_per_second"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_hidden_wherever_it_is(name: str) -> None:
    assert redacted({"loggers": [{"x": {name: "abc", "n": 1}}]}) == {"loggers": [{"x": {name: HIDDEN, "n": 1}}]}
    assert redacted({name: 1234}) == {name: HIDDEN} and redacted({name: {"user": "me", "pass": "abc"}}) == {name: HIDDEN}
    for command in (f"train.py a.yaml loggers.x.{name}=abc seed=1", f"train.py 'loggers={{x: {{{name}: abc}}}}' seed=1"):
        shown = redacted_text(command)
        assert "abc" not in shown and shown.count(HIDDEN) == 1 and shown.endswith("seed=1")
    assert "abc" not in redacted_text(f'{name}: "abc def"\nseed: 1')


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_else_is_hidden(name: str) -> None:
    recipe = {name: "abc", "train_loader": {name: 7, "path": "s3://bucket/data"}, "callbacks": False}
    assert redacted(recipe) == recipe
    assert redacted_text(f"train.py a.yaml {name}=abc x.{name}=7") == f"train.py a.yaml {name}=abc x.{name}=7"


def test_what_tells_no_secret_stays() -> None:
    recipe = {"token": None, "password": "", "use": {"token": True, "secret": False}}
    assert redacted(recipe) == recipe and redacted_text("a.token=true b.token=null") == "a.token=true b.token=null"


def test_a_password_in_an_address_is_hidden() -> None:
    address = "postgresql://me:p:a@host:5432/db"
    assert redacted({"tracking_uri": address}) == {"tracking_uri": f"postgresql://me:{HIDDEN}@host:5432/db"}
    assert redacted_text(f"loggers.mlflow.tracking_uri={address}") == (
        f"loggers.mlflow.tracking_uri=postgresql://me:{HIDDEN}@host:5432/db"
    )
    assert redacted("http://localhost:5000/a@b") == "http://localhost:5000/a@b"
