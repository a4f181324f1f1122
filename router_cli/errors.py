"""Every failure a user can meet, one class each, with the exit code it ends the command with.

    RouterError                 1   something failed
    ├── UsageError              2   the command line is wrong
    │   └── SettingsError       2   a setting is wrong, whatever it came from
    ├── InputError              1   a file given as input cannot be used
    ├── OutputError             1   a result cannot be written
    ├── ModelError              1   a model or adapter cannot be found or loaded
    ├── TeacherError            1   the teacher's endpoint refuses for good
    │   ├── CredentialsError    1   no key, or a key that the endpoint refuses
    │   └── BudgetReached       3   one more request could cost more than --max-cost allows
    ├── TrainingError           1   training cannot start or go on
    └── PartialError            3   ended well, but some rows are missing from the result

Ctrl-C ends with 130. An answer of a model that cannot be used is data, not an exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router_cli.schema import Usage


class RouterError(Exception):
    """A failure with one line for the user: what is wrong, what was expected, what to do."""

    exit_code = 1


class UsageError(RouterError):
    """The command line does not make sense."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is unknown, of the wrong type or out of bounds."""


class InputError(RouterError):
    """An input file is missing, unreadable or has a bad line."""


class OutputError(RouterError):
    """A result cannot be written: no space, no permission, or another process holds it."""


class ModelError(RouterError):
    """A model, tokenizer or adapter cannot be found, fetched or loaded."""


class TeacherError(RouterError):
    """The teacher's endpoint gave an answer that no retry will change.

    `spent` is what the question had used before that: an invalid answer is paid for, though nothing came of it.
    """

    spent: Usage | None = None


class CredentialsError(TeacherError):
    """There is no API key, or the endpoint refuses it."""


class BudgetReached(TeacherError):
    """The worst case of the next request does not fit into `label.max_cost`; nothing was sent for it."""

    exit_code = 3


class TrainingError(RouterError):
    """Training cannot start or continue with this data or these settings."""


class PartialError(RouterError):
    """The command did what it could; rows are missing from the result and stand recorded elsewhere."""

    exit_code = 3
