"""Exit codes and the errors that carry them.

An error says what, where, the value and the fix, in one line that holds no patient text. The exit code is
the contract of the command line; on a cluster the same verdict is an output or a marker.
"""


class ValorError(Exception):
    """Base of every error that VALOR raises on purpose; `exit_code` is the process's exit status."""

    exit_code = 1


class UserError(ValorError):
    """A user's mistake: unknown recipe key, missing path, impossible setting."""

    exit_code = 2


class DataError(ValorError):
    """Data failed its checks."""

    exit_code = 3


class GateRefused(ValorError):
    """The gate refused the candidate; a normal, explained result."""

    exit_code = 4


class ServiceError(ValorError):
    """An outside service (MLflow, storage) failed after retries."""

    exit_code = 5


class ResourceError(ValorError):
    """Local resources are exhausted: disk or memory."""

    exit_code = 6


class IntegrityError(ValorError):
    """A hash or signature does not match."""

    exit_code = 7


class GuardStop(ValorError):
    """A training guard stopped the stage."""

    exit_code = 8


class Interrupted(ValorError):
    """The stage was told to end (SIGTERM, SIGINT)."""

    exit_code = 143


BY_EXIT_CODE: dict[int, type[ValorError]] = {
    cls.exit_code: cls
    for cls in (UserError, DataError, GateRefused, ServiceError, ResourceError, IntegrityError, GuardStop, Interrupted)
}


def shown(text: str, *, limit: int = 120) -> str:
    """Return a value's text as an error shows it: one line, at most `limit` characters of it."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."
