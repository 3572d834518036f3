"""The same chain through an MLflow server, whose API refuses what an embedded store lets pass."""

import os
import subprocess
import sys
import time

import pytest
import requests

from valor.tracking import lineage, runs

from small_pipeline import SmallPipeline, free_port  # isort: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def server(home, tmp_path, monkeypatch):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "-h", "127.0.0.1", "-p", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "art"),
    ]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            try:
                requests.get(f"{url}/health", timeout=2)
                break
            except requests.RequestException:
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


def test_register_finalize_and_lineage_through_a_server(server, tmp_path, monkeypatch):
    run = SmallPipeline(tmp_path, "served", monkeypatch)
    made = run.judged(run.until_checkpoint())
    version = run.register(made)
    assert run.register(made, task="register-again") == version
    lineage.chain(run.model_name, version).require_agreement()
    run.task("finalize", **{name: made[name] for name in ("shards", "dataset", "checkpoint", "evaluation", "verdict")})
    runs.finish_pipeline("served", "SUCCEEDED")
    assert any(path.name == "lineage.json" for path in (tmp_path / "art").rglob("*"))
