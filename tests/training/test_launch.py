"""Several processes: they equal one, end together with the right verdict, and leave nothing behind."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import alike
import psutil
import pytest
from safetensors.torch import load_file
from tiny_llava import world
from torch.distributed import DistBackendError

from valor import artifacts, stages
from valor.context import Context
from valor.errors import GuardStop, Interrupted, ResourceError, UserError, ValorError
from valor.stages import worker
from valor.training import launch
from valor.training.processes import Node, accelerate_config
from valor.training.work import open_work


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Let `accelerate launch` start this folder's `alike` in a mode."""

    def mode(name: str) -> None:
        monkeypatch.setenv("VALOR_TEST_WORKER", name)

    monkeypatch.setattr(launch, "WORKER", "alike")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(
        "VALOR_TEST_WORLD", json.dumps({k: str(v) for k, v in world()._asdict().items()} | {"out": str(tmp_path)})
    )
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return mode


def sft(tmp_path: Path, name: str, *, processes: int, nodes: int = 1, pipeline_run: str = "") -> dict[str, float]:
    work_root = tmp_path / f"work-{nodes * processes}"
    return dict(
        stages.run(
            "sft",
            settings_json=alike.sft_settings(processes=processes, nodes=nodes).model_dump_json(),
            context=Context(work_root=str(work_root), pipeline_run=pipeline_run),
            inputs={"dataset": world().dataset, "base": world().base},
            outputs={"checkpoint": tmp_path / name},
        ).metrics
    )


def distance(one: Path, other: Path) -> float:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def _terminate_at(sign: Path) -> None:
    while not sign.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_two_processes_equal_one_also_when_they_are_told_to_end_within_a_later_epoch(tmp_path, workers, monkeypatch):
    workers("interrupt")
    threading.Thread(target=_terminate_at, args=(tmp_path / "at-stop",), daemon=True).start()
    with pytest.raises(Interrupted, match=f"told to end at step {alike.STOP} of {alike.STEPS}"):
        sft(tmp_path, "two", processes=2)
    workers("all")
    assert sft(tmp_path, "two", processes=2)["resumed_from_step"] == alike.STOP
    assert not [path for path in (tmp_path / "work-2").iterdir()]
    one = sft(tmp_path, "one", processes=1)
    assert one["resumed_from_step"] == 0
    alike.draw_by_place(monkeypatch.setattr)
    for kind in ("text", "vision"):
        alike.train_grpo(kind, processes=1, path=tmp_path / f"one-{kind}", world=world()._asdict())
    assert distance(tmp_path / "one", world().base) > 1e-4
    for name in ("two", "fsdp2"):
        assert distance(tmp_path / "one", tmp_path / name) < 1e-6, name
    for kind in ("text", "vision"):
        found = distance(tmp_path / f"one-{kind}", tmp_path / kind)
        moved = distance(tmp_path / f"one-{kind}", world().parent)
        assert found < 1e-6 < 1e-4 < moved, kind


@pytest.mark.slow
def test_the_first_verdict_of_any_process_is_the_stages_and_ends_the_others(tmp_path, workers):
    workers("fail")
    begun = time.monotonic()
    with pytest.raises(UserError, match="process 1: no such study"):
        sft(tmp_path, "two", processes=2, pipeline_run="r")
    assert time.monotonic() < begun + 500
    with pytest.raises(UserError, match=r"process 1: no such study .*not tried again"):
        sft(tmp_path, "two", processes=2, pipeline_run="r")
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_from_one_that_fails(tmp_path, workers):
    """The others end for their lost connection, which is no verdict of the stage's."""
    workers("die-in-step")
    with pytest.raises(ResourceError, match=r"^sft: one of its processes ended without a word .*lack of memory"):
        sft(tmp_path, "two", processes=2)


def _node(rank: int, port: int, root: Path) -> None:
    """Be one of two nodes: what it made is in its own folder, and its exit status is the verdict's."""
    node = {"PET_NNODES": "2", "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in node.items()}, VALOR_RUN_DIR=str(root / f"run-{rank}"))
    try:
        sft(root, f"node-{rank}", processes=1, nodes=2)
    except ValorError as error:
        os._exit(error.exit_code)


def two_nodes(root: Path) -> list[int]:
    """Return the exit statuses of two nodes on this machine that train with one process each, over one work root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    nodes = [context.Process(target=_node, args=(rank, port, root)) for rank in (0, 1)]
    for node in nodes:
        node.start()
    try:
        for node in nodes:
            node.join(300)
        return [node.exitcode for node in nodes]
    finally:
        for node in nodes:
            node.kill()


@pytest.mark.slow
def test_two_nodes_equal_one_and_the_first_alone_writes(tmp_path, workers):
    workers("train")
    world()
    assert two_nodes(tmp_path) == [0, 0]
    assert not (tmp_path / "node-1").exists()
    assert artifacts.read_stamp(tmp_path / "node-0")["stage"] == "sft"
    assert list((tmp_path / "work-2").iterdir()) == []
    sft(tmp_path, "one", processes=1)
    assert distance(tmp_path / "one", tmp_path / "node-0") < 1e-6 < 1e-4 < distance(tmp_path / "one", world().base)


@pytest.mark.slow
def test_a_node_that_fails_ends_the_other(tmp_path, workers):
    workers("fail-in-step")
    world()
    first, second = two_nodes(tmp_path)
    assert first not in (None, 0), "it ends for its lost connection"
    assert second == UserError.exit_code
    assert not [path for path in tmp_path.glob("node-*")]


@pytest.mark.slow
def test_no_worker_outlives_its_parent(tmp_path, workers):
    workers("wait")
    (tmp_path / "accelerate.yaml").write_text(_config())
    pids = []

    class Died:
        def is_set(self) -> bool:
            found = [path.read_text() for path in tmp_path.glob("*.pid")]
            if len(found) == 2 and all(found):
                pids.extend(int(pid) for pid in found)
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):
        launch._run_workers(tmp_path, Died())
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


_LAUNCHER = """
import subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_that_hears_nothing_is_ended_by_force(monkeypatch):
    monkeypatch.setattr(launch, "_END_S", 0.2)
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    stuck = psutil.Process(int(launcher.stdout.readline()))
    launch._end(launcher)
    assert launcher.returncode == -signal.SIGKILL
    _, left = psutil.wait_procs([stuck], timeout=10)
    for process in left:
        process.kill()
    assert not left


def test_the_first_worker_sends_its_last_numbers_although_the_others_have_left(tmp_path, monkeypatch):
    handlers = []

    def fail(*_, **__):
        raise GuardStop("loss is nan")

    @contextlib.contextmanager
    def attached(_stage, run_id):
        try:
            yield
        finally:
            handlers.append((run_id, signal.getsignal(signal.SIGTERM)))

    monkeypatch.setattr(worker, "function_of", lambda _: fail)
    monkeypatch.setattr(worker, "attached", attached)
    ticket = {"place": str(tmp_path), "scratch": str(tmp_path), "holder": {}}
    settings = alike.sft_settings(processes=2).model_dump_json()
    task = {"stage": "sft", "settings": settings, "paths": {}, "context": {}, "ticket": ticket, "mlflow_run": "run"}
    artifacts.write_json(tmp_path / launch.TASK, task)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for first in (False, True):
            with pytest.raises(GuardStop):
                worker._train(tmp_path, first=first)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == [("", before), ("run", signal.SIG_IGN)]


def test_another_node_ends_at_once_with_what_ended_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_run_workers", lambda *_: pytest.fail("it would wait for the first node"))
    monkeypatch.setattr(launch, "node_of", lambda _: Node(rank=1, address="first", port=1))
    given = {"inputs": {}, "checkpoint": tmp_path, "context": Context(), "work_root": str(tmp_path)}
    with pytest.raises(GuardStop), open_work(str(tmp_path), identity={"stage": "sft"}, pipeline_run=""):
        raise GuardStop("loss is nan")
    with pytest.raises(GuardStop, match=r"loss is nan; it has no good checkpoint .* not tried again"):
        launch.train("sft", alike.sft_settings(processes=2), identity={"stage": "sft"}, **given)


def _config() -> str:
    import yaml

    return yaml.safe_dump(
        accelerate_config(alike.sft_settings(processes=2), node=Node(), zero_path=Path("unused"), cpu=True)
    )


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321"), True),
        (DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("shapes do not fit"), False),
        # Of a tracker or a store, not of another worker.
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (BrokenPipeError(32, "Broken pipe"), False),
    ],
)
def test_a_lost_worker_is_told_from_a_lost_service(error, lost):
    assert launch.is_lost_connection(error) == lost
