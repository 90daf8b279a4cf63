"""Secrets are not shown: values by the names that secrets have, and passwords in addresses."""

import re
from typing import Any

HIDDEN = "<hidden>"

_SECRETS = {"password", "passwd", "pwd", "passphrase", "passwords", "secret", "secrets", "token", "apikey", "credential"}
_SECRETS |= {"credentials", "authorization"}
_KEYS = {"api", "access", "private", "secret", "account", "encryption", "signing"}  # … key
_OF_TEXT = {"bos", "eos", "pad", "unk", "cls", "sep", "mask", "image", "special"}  # … token: what a tokenizer knows, no secret
_ADDRESS = re.compile(r"(?<=://)([^\s/@:]*):([^\s/@]+)@")
_ASSIGNMENT = re.compile(r"""([A-Za-z][\w.-]*)(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,}\]&"']+)""")


def redacted(value: Any) -> Any:
    """A copy of a recipe, or of any part of it, to be shown: what a key names as a secret is `<hidden>`.

    Secret are values of `password`, `token`, `hf_token`, `api_key`, `clientSecret` and the like, whatever they contain, and the
    password in an address (`https://user:password@host`); not `max_tokens`, `tokenizer` or `pad_token`. True, false and nothing
    stay: they tell no secret.
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN if _names_secret(str(key)) and not _tells_nothing(item) else redacted(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return _without_passwords(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """The same for a command, or for a file that cannot be parsed: for every `name=value` and `name: value` in it."""

    def hide(match: re.Match[str]) -> str:
        name, between, value = match.groups()
        secret = _names_secret(name) and value.lower() not in ("true", "false", "null", "none", "~", "")
        return f"{name}{between}{HIDDEN if secret else redacted_text(value) if '=' in value else value}"

    return _ASSIGNMENT.sub(hide, _without_passwords(text))


def _without_passwords(text: str) -> str:
    return _ADDRESS.sub(rf"\1:{HIDDEN}@", text)


def _tells_nothing(value: Any) -> bool:
    return value is None or isinstance(value, bool) or value in ("", [], {})


def _names_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    *before, last = re.split(r"[^a-z0-9]+", words.strip("_-. "))
    qualifier = before[-1] if before else ""
    if last == "token":
        return qualifier not in _OF_TEXT
    return last in _SECRETS or (last == "key" and qualifier in _KEYS)
