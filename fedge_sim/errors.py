"""Every error that a user can meet, typed, with the exit code that it ends a run with."""

import difflib
from collections.abc import Iterable


class FedgeError(Exception):
    """Base of all errors raised on purpose: one line that says what to do."""

    exit_code = 1


class ConfigError(FedgeError):
    """A setting is wrong: the message names table, key, value and what is allowed."""

    exit_code = 2

    @classmethod
    def at(cls, table: str, key: str, value: object, problem: str) -> "ConfigError":
        """Return the error for ``[table] key = value`` with what is allowed.

        Parameters
        ----------
        table, key : str
            Where the value stands, the table's name being the one below ``tool.flwr``.
        value : object
            The value as it was given.
        problem : str
            What is allowed, or what to do.
        """
        return cls(f"[{table}] {key} = {as_toml(value)}: {problem}")


class DataError(FedgeError):
    """A dataset cannot be read, or does not fit the clients that were asked for."""

    exit_code = 2


class RosterError(FedgeError):
    """A client of the topology is served by no node."""


class RoundError(FedgeError):
    """A round cannot go on: a leaf server got too few usable replies."""


class WorkerError(FedgeError):
    """No actor can be started, or none is left."""


class StalledError(FedgeError):
    """No client got done for too long: what was under way cannot be waited for."""

    exit_code = 3


class StateError(FedgeError):
    """A client's state cannot be kept: the disk, the files, or its form; the message says which."""


class CheckpointError(FedgeError):
    """A checkpoint cannot be written, or cannot be gone on from."""


class CannotCompileError(FedgeError):
    """A training step cannot be compiled here; it can be done without."""


class CannotVectoriseError(FedgeError):
    """Clients with this network cannot be trained side by side: the message says why."""


class TimelineError(FedgeError):
    """A run's timeline cannot be found, read, or drawn."""

    exit_code = 2


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the closest known word, else the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"


def as_toml(value: object) -> str:
    """Return a value much as TOML writes it, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
