"""What ends a run without a traceback: a mistake that is the user's to mend, or a request to stop.

What is shown to people names no secrets: `redacted` hides values by the names that secrets have, and passwords in addresses.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: says which YAML path is wrong, what was given, what is allowed and what to do.

    Args:
        problems: one message, or several of as many mistakes.
    """

    def __init__(self, *problems: str):
        several = [f"{len(problems)} things must be mended.", *(f"✗ {problem}" for problem in problems)]
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(several))
        self.problems = list(problems)


class UnknownName(str):
    """A mistake that is none if code which could not be imported registers the name."""


def problems_of(error: UserError) -> list[str]:
    """Return the messages of an error, one per mistake."""
    return error.problems


def raise_all(problems: list[str]) -> None:
    """Raise one UserError with all of these messages, if there are any; each is said once."""
    if problems:
        raise UserError(*dict.fromkeys(problems))


@contextmanager
def at_path(path: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what is wrong with a value of the recipe, or with the file that it names, into a UserError with its YAML path.

    Args:
        also: kinds of errors beside OSError, ValueError and LookupError: those that reading a malformed file may end in.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, *also) as error:
        raise UserError(f"{path}: {error}") from error


class Problems:
    """Collect mistakes, so that all of them are said at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep a UserError that is raised inside of this context for later."""
        try:
            yield
        except UserError as error:
            self.found.extend(problems_of(error))

    def raise_any(self) -> None:
        raise_all(self.found)


class TrainingInterrupted(Exception):
    """A run that was asked to stop and did; says where it goes on."""


def listed(said: list[str]) -> str:
    """Return the first five of several mistakes, and how many more there are."""
    return "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")


def first(things: Iterable[Any], count: int = 3) -> str:
    """Return "a, b, c and 5 more"."""
    names = [str(thing) for thing in things]
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def nearest(name: str, allowed: list[str]) -> str:
    """Return " Did you mean …?" if something is close, and all that is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(sorted(allowed))}."


HIDDEN = "<hidden>"

_SECRETS = {"password", "passwd", "pwd", "passphrase", "passwords", "secret", "secrets", "token", "apikey", "credential"}
_SECRETS |= {"credentials", "authorization"}
_KEYS = {"api", "access", "private", "secret", "account", "encryption", "signing"}  # … key
_OF_TEXT = {"bos", "eos", "pad", "unk", "cls", "sep", "mask", "image", "special"}  # … token: what a tokenizer knows, no secret
_ADDRESS = re.compile(r"(?<=://)([^\s/@:]*):([^\s/@]+)@")
_ASSIGNMENT = re.compile(r"""([A-Za-z][\w.-]*)(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,}\]&"']+)""")


def redacted(value: Any) -> Any:
    """Return a copy of a recipe, or of any part of it, to be shown: what a key names as a secret is `<hidden>`.

    Secrets are the values of `password`, `token`, `hf_token`, `api_key`, `clientSecret` and the like, whatever they contain, and
    the password in an address (`https://user:password@host`). Those of `max_tokens`, `tokenizer` or `pad_token` are none. True,
    false and nothing stay: they tell no secret.
    """
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(key, item) else redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return _ADDRESS.sub(rf"\1:{HIDDEN}@", value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Return a command, or a file that cannot be parsed, with every secret in `name=value` and `name: value` hidden."""

    def hide(match: re.Match[str]) -> str:
        name, between, value = match.groups()
        secret = _names_secret(name) and value.lower() not in ("true", "false", "null", "none", "~", "")
        return f"{name}{between}{HIDDEN if secret else redacted_text(value) if '=' in value else value}"

    return _ASSIGNMENT.sub(hide, redacted(text))


def _is_secret(key: Any, value: Any) -> bool:
    return _names_secret(str(key)) and not isinstance(value, bool) and value not in (None, "", [], {})


def _names_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    *before, last = re.split(r"[^a-z0-9]+", words.strip("_-. "))
    qualifier = before[-1] if before else ""
    if last == "token":
        return qualifier not in _OF_TEXT
    return last in _SECRETS or (last == "key" and qualifier in _KEYS)
