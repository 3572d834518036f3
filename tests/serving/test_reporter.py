"""The registered model answers images, says no to what is none, and loads only what was registered."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from valor import artifacts
from valor.errors import IntegrityError, UserError
from valor.serving.reporter import Reporter, decode_base64


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_same_image_gives_the_same_report_as_the_pipeline(stored, checkpoint, dicom):
    from valor.data.dicom import read_dicom
    from valor.data.images import shrink
    from valor.data.manifest import decode_image, encode_image
    from valor.models.generate import generate_reports
    from valor.models.loading import fit_pixels, load_policy, prompt_of

    model, processor = load_policy(checkpoint)
    ingested = decode_image(encode_image(shrink(read_dicom(dicom)[0], image_px=96)[0]))
    expected = generate_reports(
        model,
        processor,
        [fit_pixels(ingested, processor)],
        prompt=prompt_of(checkpoint),
        max_new_tokens=12,
        batch_size=1,
    )
    uri, digest = stored
    reporter = Reporter.open(uri, sha256=digest, image_px=96)
    [report] = reporter.reports([dicom])
    assert report == expected[0].text
    # An already shrunken PNG is the same image, alone or in a batch.
    assert reporter.reports([png(ingested), dicom]) == [report, report]


@pytest.mark.parametrize("what", ["altered", "missing", "added", "another"])
def test_weights_that_were_not_registered_are_refused(stored, what):
    uri, digest = stored
    weights = Path(uri) / "model.safetensors"
    if what == "altered":
        alter(weights)
    elif what == "missing":
        weights.unlink()
    elif what == "added":
        (Path(uri) / "extra.safetensors").write_bytes(b"x")
    else:
        digest = "0" * 64
    with pytest.raises(IntegrityError):
        Reporter.open(uri, sha256=digest)


def test_bad_images_are_named_by_place_and_never_by_content(stored, dicom):
    uri, digest = stored
    reporter = Reporter.open(uri, sha256=digest)
    colour = png(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for bad in (b"", b"PATIENT NAME", dicom[: len(dicom) // 2], colour, b"\x89PNG\r\n\x1a\nrest"):
        with pytest.raises(UserError, match="image 1:") as caught:
            reporter.reports([dicom, bad])
        assert "PATIENT" not in str(caught.value)
    for bad in ("***", None, 3, "a"):
        with pytest.raises(UserError, match="image 4: not base64"):
            decode_base64(bad, 4)
    assert decode_base64(base64.b64encode(b"x").decode(), 0) == b"x"


@pytest.fixture
def version(stored, tmp_path, monkeypatch) -> str:
    """Register the stored checkpoint; return its models:/ uri."""
    from valor.stages import register as stage
    from valor.tracking import registry, store

    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "VALOR_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    uri, digest = stored
    run_id = store.client().create_run(store.experiment_id()).info.run_id
    candidate = registry.Candidate(
        model_name="served", checkpoint_uri=uri, checkpoint_digest=digest, evaluation_digest="e" * 64, tags={},
        code_path=stage._CODE_PATH, run_id=run_id,
        model_config={"checkpoint_uri": uri, "sha256": digest, "image_px": 96},
    )  # fmt: skip
    return f"models:/served/{registry.register(candidate, champion_digest='')}"


def test_a_version_loads_through_mlflow_and_is_small(version, stored, dicom, tmp_path):
    import mlflow
    import pandas as pd

    loaded = mlflow.pyfunc.load_model(version)
    answer = loaded.predict(pd.DataFrame({"image": [base64.b64encode(dicom).decode()]}))
    assert list(answer.columns) == ["report"]
    uri, digest = stored
    assert list(answer["report"]) == Reporter.open(uri, sha256=digest, image_px=96).reports([dicom])
    files = [p for p in (tmp_path / "home" / "mlartifacts").rglob("*") if p.is_file()]
    assert files
    assert sum(p.stat().st_size for p in files) < 20_000, "weights must not enter MLflow"
    assert artifacts.digest_dir(Path(uri)) == digest
    alter(Path(uri) / "model.safetensors")
    with pytest.raises(IntegrityError, match="altered"):
        mlflow.pyfunc.load_model(version)


@pytest.mark.slow
def test_mlflow_models_serve_answers_a_base64_dicom(version, dicom, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", version, "--env-manager", "local"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [*command, "-h", "127.0.0.1", "-p", str(port), "-w", "1"],
        env=environment, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "serve.log")
        status, answer = _ask(port, {"dataframe_records": [{"image": base64.b64encode(dicom).decode()}]})
        assert status == 200
        assert isinstance(answer["predictions"][0]["report"], str)
        secret = base64.b64encode(b"PATIENT JOHN DOE").decode()
        status, answer = _ask(port, {"dataframe_records": [{"image": secret}]})
        assert status == 400
        assert "image 0" in json.dumps(answer)
        assert secret[:8] not in json.dumps(answer)
        assert secret[:8] not in (tmp_path / "serve.log").read_text()
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def _ask(port: int, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
