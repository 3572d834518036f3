"""One SQLite store for all tests of tracking: making its tables takes seconds, and tests use names of their own."""

import os
from pathlib import Path

import pytest

from valor.tracking import store


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    saved = dict(os.environ)
    os.environ.update(VALOR_HOME=str(home))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "VALOR_TRACKING"):
        os.environ.pop(name, None)
    store.initialise_store()
    os.environ.clear()
    os.environ.update(saved)
    return home


@pytest.fixture
def home(session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VALOR_HOME", str(session_home))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "VALOR_TRACKING", "VALOR_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    # Registering runs code under MLflow that points its globals at the store; another test may have moved them.
    import mlflow

    mlflow.set_tracking_uri(store.tracking_uri())
    return session_home
