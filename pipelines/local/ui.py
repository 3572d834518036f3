"""MLflow's user interface on this home's store."""

import os
import socket
import sys

from pipelines.local import processes
from valor.context import home
from valor.errors import UserError
from valor.tracking.store import client, tracking_uri

GRACE_S = 5.0
"""How long MLflow and its workers have between SIGTERM and SIGKILL."""


def serve(*, port: int) -> int:
    """Run `mlflow ui` on the store until it is stopped; return its exit status, 0 after Ctrl-C.

    Raises:
        UserError: the tracking URI is a server already, nothing ran in this home yet, or the port is taken.
    """
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        raise UserError("MLFLOW_TRACKING_URI is a server; open it in a browser")
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(f"{home()}: no run yet; `valor run phantom` makes one, VALOR_HOME names another home")
    _require_free(port)
    # Its tables, in case MLflow was updated since; and MLflow's environment as everywhere (no telemetry).
    client()
    # MLflow's judges and optimisers, eight processes that wait for work which nobody here gives them.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"MLflow on http://127.0.0.1:{port}/#/experiments in some seconds (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    return processes.run_until_signal(command, grace_s=GRACE_S)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        # As MLflow's server binds: a port that a closed connection still holds is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; give another one: valor ui --port {port + 1}") from None
