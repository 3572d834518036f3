"""MLflow's user interface on this home's store."""

import os
import sys

from pipelines.local import processes
from valor.context import home
from valor.errors import UserError
from valor.tracking.store import initialise_store, tracking_uri

GRACE_S = 5.0
"""How long MLflow and its workers have between SIGTERM and SIGKILL."""


def serve(*, port: int) -> int:
    """Run `mlflow ui` on the store until it is stopped; return its exit status, 0 after Ctrl-C.

    Raises:
        UserError: the tracking URI is a server already, or nothing ran in this home yet.
    """
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        raise UserError("MLFLOW_TRACKING_URI is a server; open it in a browser")
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(f"{home()}: no run yet; `valor run phantom` makes one, VALOR_HOME names another home")
    initialise_store()
    # MLflow's judges and optimisers, eight processes that wait for work which nobody here gives them.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]
    return processes.run_until_signal(command, grace_s=GRACE_S)
