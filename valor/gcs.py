"""Objects of Google Cloud Storage by their gs://BUCKET/NAME: the only code that talks to it.

STORAGE_EMULATOR_HOST is honoured. Requests are tried again for a while; what fails then is one of VALOR's errors:
UserError (nothing there), ResourceError (full disk) or ServiceError. Permissions and life-cycle rules are left out,
which belong to the bucket.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.errors import ServiceError, UserError, ValorError

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Bucket, Client

RETRY_S = 60.0
"""For how long one request is tried again before it is a ServiceError."""
DOWNLOAD_RETRY_S = 900.0
"""The same for a whole download, whose clock starts with the first byte of a file of many GB."""
_REQUEST_S = 30.0


def exists(uri: str) -> bool:
    """Tell whether there is an object at `uri`, or one below it."""
    with _errors(uri):
        return _blob(uri).exists(timeout=_REQUEST_S, retry=_retry()) or bool(_blobs(uri, limit=1))


def listing(uri: str) -> list[tuple[str, int, str]]:
    """Return (name relative to `uri`, size in bytes, generation) of all objects below `uri`."""
    with _errors(uri):
        found = [(blob.name.removeprefix(prefix(uri)), blob.size, str(blob.generation)) for blob in _blobs(uri)]
    return [row for row in found if row[0]]


def read_bytes(uri: str) -> bytes:
    """Return an object's content; raise UserError where there is none."""
    with _errors(uri):
        return _blob(uri).download_as_bytes(timeout=_REQUEST_S, retry=_retry())


def download(uri: str, target: Path) -> None:
    """Write an object's content to a local file; raise UserError where there is none."""
    with _errors(uri):
        _blob(uri).download_to_filename(str(target), timeout=_REQUEST_S, retry=_retry(DOWNLOAD_RETRY_S))


def upload(local: str | Path, uri: str) -> None:
    """Put a local file's content at `uri`."""
    with _errors(uri):
        _blob(uri).upload_from_filename(str(local), timeout=_REQUEST_S, retry=_retry())


def upload_text(text: str, uri: str, content_type: str) -> None:
    """Put text at `uri`."""
    with _errors(uri):
        _blob(uri).upload_from_string(text, content_type, timeout=_REQUEST_S, retry=_retry())


def delete(uri: str) -> None:
    """Delete an object; nothing there is no error."""
    with contextlib.suppress(UserError), _errors(uri):
        _blob(uri).delete(timeout=_REQUEST_S, retry=_retry())


def prefix(uri: str) -> str:
    """Return what the names of all objects below `uri` begin with: "" for a whole bucket, else it ends with "/"."""
    name = _split(uri)[1]
    return f"{name}/" if name else ""


def _split(uri: str) -> tuple[str, str]:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: names no bucket; expected gs://BUCKET/PREFIX")
    return bucket, name.strip("/")


def _bucket(uri: str) -> "Bucket":
    return _client(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid()).bucket(_split(uri)[0])


def _blob(uri: str) -> "Blob":
    return _bucket(uri).blob(_split(uri)[1] or "/")


def _blobs(uri: str, limit: int | None = None) -> list["Blob"]:
    bucket = _bucket(uri)
    return list(
        bucket.client.list_blobs(bucket, prefix=prefix(uri), max_results=limit, timeout=_REQUEST_S, retry=_retry())
    )


@functools.lru_cache(maxsize=2)
def _client(emulator: str, pid: int) -> "Client":
    """Return the client; a changed emulator, or a fork, gets one of its own."""
    try:
        from google.cloud import storage
    except ImportError:
        raise UserError("gs:// needs google-cloud-storage; pip install 'valor-rrg[gcp]'") from None
    return storage.Client()


def _retry(seconds: float = 0.0) -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(seconds or RETRY_S)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn what the client raises into VALOR's errors."""
    try:
        with artifacts.full_disk_is_a_resource_error(Path(uri)):
            yield
    except (ValorError, ImportError):
        raise
    except Exception as error:
        from google.api_core.exceptions import NotFound
        from google.auth.exceptions import GoogleAuthError

        if isinstance(error, NotFound):
            raise UserError(f"{uri}: no such file, or no such bucket") from None
        if not _is_client_failure(error):
            raise
        fix = "set GOOGLE_APPLICATION_CREDENTIALS" if isinstance(error, GoogleAuthError) else "try again later"
        what = f"Google Cloud Storage failed after retries ({type(error).__name__})"
        raise ServiceError(f"{uri}: {what}; {fix}") from error


def _is_client_failure(error: Exception) -> bool:
    import requests
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return isinstance(error, GoogleAPIError | GoogleAuthError | requests.RequestException | ConnectionError)
