"""Tasks forked from a loaded process: what a task of its own process would see, and how it ends."""

import json
import os
import signal
import subprocess
import sys

import pytest
from kfp import dsl
from kfp.local import subprocess_task_handler

from pipelines.local import forked


@dsl.component(base_image="python", install_kfp_package=False, packages_to_install=[])
def probe(code: str):
    exec(code, {})


@pytest.fixture(scope="module")
def run_task(tmp_path_factory):
    """Return what runs Python code as a KFP task does, in a fork, and gives its exit status."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", subprocess_task_handler.run_local_subprocess)
    forked.install()
    container = probe.component_spec.implementation.container
    output = tmp_path_factory.mktemp("task") / "output.json"

    def run(code, **env):
        request = {"inputs": {"parameterValues": {"code": code}}, "outputs": {"outputFile": str(output)}}
        arguments = ["--executor_input", json.dumps(request), "--function_to_execute", "probe"]
        return subprocess_task_handler.run_local_subprocess([*container.command, *arguments], env)

    yield run
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_a_task_ends_as_a_process_of_its_own_would(run_task, code, status):
    assert run_task(code) == status


def test_a_task_has_its_own_environment_and_the_libraries_from_the_start(run_task, tmp_path):
    told = tmp_path / "told.json"
    code = f"""
import json, os, signal, sys
facts = {{
    "image": os.environ.get("VALOR_IMAGE"), "loaded": [m for m in ("torch", "trl", "mlflow") if m in sys.modules],
    "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "sigint": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
    "group": os.getpgrp(), "runtime": os.environ.get("_KFP_RUNTIME"),
}}
open({str(told)!r}, "w").write(json.dumps(facts))
"""
    assert run_task(code, VALOR_IMAGE="valor:test") == 0
    facts = json.loads(told.read_text())
    assert facts == {
        "image": "valor:test", "loaded": ["torch", "trl", "mlflow"], "sigterm": True, "sigint": True,
        "group": os.getpgrp(), "runtime": "true",
    }  # fmt: skip
    assert "VALOR_IMAGE" not in os.environ
    assert run_task(code) == 0
    assert json.loads(told.read_text())["image"] is None, "one task's environment is not the next one's"


def test_a_task_leaves_no_temporary_files(run_task, tmp_path):
    place = tmp_path / "temporary"
    place.mkdir()
    code = f"import atexit, shutil; atexit.register(shutil.rmtree, {str(place)!r}); import sys; sys.exit(5)"
    assert run_task(code) == 5
    assert not place.exists()


def test_what_is_loaded_before_a_fork_starts_no_python_thread():
    code = "import threading; from pipelines.local import preload; print([t.name for t in threading.enumerate()])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "['MainThread']"


def test_every_module_that_is_to_be_loaded_exists():
    from importlib.util import find_spec

    from pipelines.local.preload import MODULES

    assert [name for name in MODULES if find_spec(name) is None] == []
