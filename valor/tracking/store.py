"""The MLflow store: where it is, how it is opened safely, and what its failures become.

`MLFLOW_TRACKING_URI` names any store; without it SQLite in `VALOR_HOME` serves. `VALOR_TRACKING=off` turns
tracking into a no-op (nothing is recorded, nothing can be registered). It leaves credentials to MLflow's own
environment variables.
"""

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from valor.context import home
from valor.errors import ResourceError, ServiceError, UserError, ValorError

if TYPE_CHECKING:
    from mlflow import MlflowClient

REACH_TIMEOUT_S = 5.0
REACH_TRIES = 3
# MLflow's own (120 s, 7 tries with doubling waits) let a task hang for minutes on a server that is gone.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def enabled() -> bool:
    """Tell whether runs are recorded; `VALOR_TRACKING=off` turns that off."""
    return os.environ.get("VALOR_TRACKING", "").lower() != "off"


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite store in VALOR_HOME."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def experiment_name() -> str:
    """Return the experiment that runs go to: MLFLOW_EXPERIMENT_NAME (pipelines set it from `registry.experiment`)."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "valor"


def initialise_store() -> None:
    """Reach the store, and create it and the experiment where they are missing; do nothing when tracking is off.

    Raises:
        ServiceError: the store cannot be reached.
        UserError: the tracking URI is of a kind that MLflow cannot use.
    """
    if enabled():
        experiment_id()


def client() -> "MlflowClient":
    """Return this process's client of the store, opened under a lock that makes a fresh SQLite store only once."""
    if not enabled():
        raise UserError("VALOR_TRACKING is off: there is no MLflow store to ask; unset VALOR_TRACKING")
    return _open(tracking_uri(), os.getpid())


def experiment_id() -> str:
    """Return the experiment's id, creating it where it is missing."""
    return _experiment(tracking_uri(), experiment_name(), os.getpid())


def found(read: Callable[[], Any]) -> Any:
    """Return what MLflow has, or None where it has nothing by that name or id."""
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def has_run(run_id: str) -> bool:
    """Tell whether the store holds a run, undeleted."""
    run = found(lambda: client().get_run(run_id))
    return run is not None and run.info.lifecycle_stage == "active"


def shown_uri() -> str:
    """Return the tracking URI without a password, for messages."""
    return re.sub(r"//[^/@]*@", "//***@", tracking_uri())


@contextlib.contextmanager
def service_errors(action: str) -> Iterator[None]:
    """Turn a failure of the store into one line: ServiceError, ResourceError (full disk) or UserError (no driver)."""
    try:
        yield
    except ValorError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"MLflow at {shown_uri()} needs the library {error.name}; install it") from None
    except Exception as error:
        if not _is_store_failure(error):
            raise
        if "disk is full" in str(error) or "No space left" in str(error):
            raise ResourceError(f"{shown_uri()}: no space left while {action}; free space there") from error
        # The message may span lines and repeat what was sent; its type and code say enough, the log has the rest.
        code = getattr(error, "error_code", "")
        what = f"{type(error).__name__} {code}".strip()
        raise ServiceError(
            f"MLflow at {shown_uri()}: {what} while {action}; check the server and MLFLOW_TRACKING_URI"
        ) from error


def _is_store_failure(error: Exception) -> bool:
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | requests.RequestException | sqlalchemy.exc.SQLAlchemyError)


@functools.lru_cache(maxsize=4)
def _open(uri: str, pid: int) -> "MlflowClient":
    """Open the store. `pid` keeps a forked process from using its parent's connections."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    _check_reachable(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    with service_errors("opening the store"), _store_lock(uri):
        _check_database(uri)
        opened = mlflow.MlflowClient(uri)
        opened.search_experiments(max_results=1)
    return opened


@functools.lru_cache(maxsize=16)
def _experiment(uri: str, name: str, pid: int) -> str:
    opened = _open(uri, pid)
    with service_errors(f"opening the experiment {name!r}"), _store_lock(uri):
        found = opened.get_experiment_by_name(name)
        if found is None:
            # A server knows where its artifacts belong; an embedded store would put them in the current directory.
            location = (home() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return opened.create_experiment(name, artifact_location=location)
        if found.lifecycle_stage == "deleted":
            raise UserError(f"MLflow at {shown_uri()}: experiment {name!r} is deleted; restore it or name another")
        return found.experiment_id


def _check_reachable(uri: str) -> None:
    """Ask an HTTP server for any answer, so that one that is gone is known within seconds."""
    parts = urlsplit(uri)
    if parts.scheme in ("file", ""):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {uri!r}: MLflow has no file store any more; use sqlite:///PATH or a server"
        )
    if parts.scheme not in ("http", "https"):
        return
    import requests

    for left in reversed(range(REACH_TRIES)):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=REACH_TIMEOUT_S)
            return
        except requests.RequestException as error:
            if not left:
                raise ServiceError(
                    f"MLflow at {shown_uri()} does not answer ({type(error).__name__}, {REACH_TRIES} tries); start it, "
                    "or correct MLFLOW_TRACKING_URI"
                ) from error


def _check_database(uri: str) -> None:
    """Open a database once, so that one that cannot be opened is known at once: MLflow tries for 100 s."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    if urlsplit(uri).scheme.partition("+")[0] not in DATABASE_ENGINES:
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """Hold a lock beside an SQLite store: several processes that create its tables at once crash."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = (database.parent / f"{database.name}.lock").open("w")
    except OSError as error:
        raise ServiceError(f"MLflow at {uri}: {error.strerror}: {error.filename}; correct the path") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def registry_lock(model_name: str) -> Iterator[None]:
    """Hold a lock around read-compare-write of a registered model, in this home; MLflow has no such operation."""
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"registry-{re.sub('[^A-Za-z0-9_.-]', '_', model_name)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
