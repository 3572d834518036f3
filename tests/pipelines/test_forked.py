"""Tasks forked from a loaded process: what a task of its own process would see, and how it ends."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from kfp import compiler, dsl
from kfp.dsl import base_component
from kfp.local import subprocess_task_handler

from pipelines.local import forked
from pipelines.local.child import GRACE_S
from valor.recipe import SECTION_OF_STAGE


@dsl.component(base_image="python", install_kfp_package=False, packages_to_install=[])
def probe(code: str):
    exec(code, {})


@dsl.component(base_image="python", install_kfp_package=False, packages_to_install=[])
def sft(code: str):
    exec(code, {})


@pytest.fixture(scope="module")
def run_task(tmp_path_factory):
    """Return what runs Python code as a KFP task does, in a fork, and gives its exit status."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", subprocess_task_handler.run_local_subprocess)
    forked.install()
    ancestors = subprocess_task_handler.run_local_subprocess.args[0]
    output = tmp_path_factory.mktemp("task") / "output.json"

    def run(code, component=probe, **env):
        request = {"inputs": {"parameterValues": {"code": code}}, "outputs": {"outputFile": str(output)}}
        arguments = ["--executor_input", json.dumps(request), "--function_to_execute", component.name]
        command = component.component_spec.implementation.container.command
        return subprocess_task_handler.run_local_subprocess([*command, *arguments], env)

    yield run
    monkeypatch.undo()
    for server in (ancestors.every, ancestors.training):
        server._stop()


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


@pytest.mark.parametrize(("component", "loaded"), [(probe, ["mlflow"]), (sft, ["torch", "trl", "mlflow"])])
def test_a_task_has_its_own_environment_and_its_libraries_from_the_start(run_task, tmp_path, component, loaded):
    told = tmp_path / "told.json"
    code = f"""
import json, os, signal, sys
facts = {{
    "image": os.environ.get("VALOR_IMAGE"), "loaded": [m for m in ("torch", "trl", "mlflow") if m in sys.modules],
    "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "sigint": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
    "group": os.getpgrp(), "runtime": os.environ.get("_KFP_RUNTIME"),
    "start": __import__("multiprocessing").get_start_method(),
}}
open({str(told)!r}, "w").write(json.dumps(facts))
"""
    assert run_task(code, component, VALOR_IMAGE="valor:test") == 0
    facts = json.loads(told.read_text())
    heard = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # not where a shell's `&` started the tests
    assert facts == {
        "image": "valor:test", "loaded": loaded, "sigterm": True, "sigint": heard,
        "group": os.getpgrp(), "runtime": "true", "start": "fork",
    }  # fmt: skip
    assert "VALOR_IMAGE" not in os.environ
    assert run_task(code, component) == 0
    assert json.loads(told.read_text())["image"] is None, "one task's environment is not the next one's"


def test_a_task_leaves_no_temporary_files(run_task, tmp_path):
    place, told = tmp_path / "temporary", tmp_path / "told"
    place.mkdir()
    code = f"""
import atexit, shutil, sys
open({str(told)!r}, "w").write(sys.argv[sys.argv.index("--component_module_path") + 1])
atexit.register(shutil.rmtree, {str(place)!r})
sys.exit(5)
"""
    assert run_task(code) == 5
    assert not place.exists()
    assert told.read_text().endswith("ephemeral_component.py")
    assert not os.path.exists(os.path.dirname(told.read_text()))


def test_tasks_of_several_threads_each_get_their_own_status(run_task):
    codes = [number % 3 for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda code: run_task(f"import sys; sys.exit({code})"), codes)) == codes


@pytest.mark.parametrize(("component", "which"), [(probe, "every"), (sft, "training")])
def test_the_tasks_ancestor_outlives_a_sigterm(run_task, component, which):
    assert run_task("pass", component) == 0, "it is loaded"
    ancestor = getattr(subprocess_task_handler.run_local_subprocess.args[0], which)._forkserver_pid
    os.kill(ancestor, signal.SIGTERM)
    assert run_task("import sys; sys.exit(4)", component) == 4
    assert getattr(subprocess_task_handler.run_local_subprocess.args[0], which)._forkserver_pid == ancestor


def test_the_training_libraries_load_while_the_data_is_checked(run_task):
    ancestors = forked._Ancestors()
    process = ancestors.context.Process(target=time.sleep, args=(0,))
    try:
        ancestors.start(process, task="ingest")
        assert ancestors.training._forkserver_pid is None
        process.join()
        process = ancestors.context.Process(target=time.sleep, args=(0,))
        ancestors.start(process, task="validate_data")
        assert ancestors.training._forkserver_pid is not None
        process.join()
        assert process.exitcode == 0
    finally:
        ancestors.every._stop()
        os.kill(ancestors.training._forkserver_pid, signal.SIGKILL)


def test_the_tasks_that_load_a_model_are_named_as_their_components():
    modules = [importlib.import_module(f"components.{stage}") for stage in SECTION_OF_STAGE]
    names = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, base_component.BaseComponent)
    }
    assert {*forked.TRAINING_TASKS, forked._BEFORE_TRAINING} <= names
    assert {name for name in names if name.startswith(("sft", "grpo", "predict"))} < forked.TRAINING_TASKS


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({begun!r}, "w").close()
time.sleep(120)
"""


@pytest.mark.slow
def test_a_task_that_ignores_sigterm_dies_with_a_killed_parent(tmp_path):
    @dsl.pipeline(name="stubborn")
    def stubborn():
        probe(code=STUBBORN.format(begun=str(tmp_path / "begun")))

    compiler.Compiler().compile(stubborn, str(tmp_path / "pipeline.yaml"))
    environment = {**os.environ, "VALOR_RUN_DIR": str(tmp_path), "VALOR_HOME": str(tmp_path), "VALOR_TRACKING": "off"}
    child = subprocess.Popen(
        [sys.executable, "-m", "pipelines.local.child", str(tmp_path / "pipeline.yaml"), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert child.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    below = psutil.Process(child.pid).children(recursive=True)
    assert len(below) >= 2, "the ancestor and the task"
    child.stdin.close()
    _, alive = psutil.wait_procs(below, timeout=GRACE_S - 3)
    assert alive, "the task has its grace"
    _, alive = psutil.wait_procs(alive, timeout=40)
    assert not alive
    assert child.wait(5) != 0


@pytest.mark.parametrize("which", ["every", "training"])
def test_every_module_is_loaded_before_a_fork_and_starts_no_python_thread(which):
    code = (
        f"import sys, threading; from pipelines.local import preload; import pipelines.local.preload.{which}; "
        f"missing = [m for m in preload.{which.upper()} if m not in sys.modules]; "
        "print([t.name for t in threading.enumerate()], missing, 'torch' in sys.modules)"
    )
    # MLflow leaves some of itself out where it sees a test.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", "CI")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == f"['MainThread'] [] {which == 'training'}"
