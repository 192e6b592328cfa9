"""The errors olmozoo raises on bad input. Each is also the built-in error that a caller would expect."""

from __future__ import annotations

from collections.abc import Iterable


class OlmozooError(Exception):
    """Base of every error that olmozoo raises on purpose."""


class ConfigError(OlmozooError, ValueError):
    """A config field is missing, unknown where it matters, or has a value that no model can have."""


class FixedFieldError(ConfigError, AttributeError):
    """A config field that cannot change was set."""


class CheckpointError(OlmozooError, ValueError):
    """A checkpoint folder is broken or does not fit its config."""


class HubError(OlmozooError, OSError):
    """A repository or one of its files could not be downloaded and is not in the cache."""


class InputError(OlmozooError, ValueError):
    """An argument of a call (ids, masks, caches, generation settings) does not fit."""


class MissingBackendError(OlmozooError, ImportError):
    """A framework that is not installed was asked for."""


def raise_problems(headline: str, problems: Iterable[str], kind: type[OlmozooError] = CheckpointError) -> None:
    """Raise one error that lists every problem, if there is any."""
    problems = list(problems)
    if problems:
        raise kind(f"{headline}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


class TrainingError(OlmozooError, ArithmeticError):
    """A training run cannot go on: its loss or a gradient is not finite."""
