"""What ends a run without a traceback: a mistake that is the user's to mend, and a request to stop."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Says which YAML path is wrong, what was given, what is allowed and what to do."""


class UserErrors(UserError):
    """Several of them."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join([f"{len(problems)} things must be mended.", *(f"✗ {problem}" for problem in problems)]))
        self.problems = problems


def problems_of(error: UserError) -> list[str]:
    """The messages in it, one per mistake."""
    return error.problems if isinstance(error, UserErrors) else [str(error)]


def raise_all(problems: list[str]) -> None:
    """Raises one UserError with all of these messages, if there are any; each is said once."""
    problems = list(dict.fromkeys(problems))
    if problems:
        raise UserError(problems[0]) if len(problems) == 1 else UserErrors(problems)


@contextmanager
def at_path(path: str, *also: type[Exception]) -> Iterator[None]:
    """What is wrong with a value of the recipe, or with the file that it names, becomes a UserError with its YAML path.

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
    """Collects mistakes, so that all of them are said at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A UserError inside of this context is kept for later."""
        try:
            yield
        except UserError as error:
            self.found.extend(problems_of(error))

    def raise_any(self) -> None:
        raise_all(self.found)


class TrainingInterrupted(Exception):
    """The run was asked to stop and did; says where it goes on."""


def nearest(name: str, allowed: list[str]) -> str:
    """ " Did you mean …?" if something is close, and all that is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Allowed: {', '.join(sorted(allowed))}."
