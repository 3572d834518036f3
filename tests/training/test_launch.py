"""Several processes: they equal one, end together with the right verdict, and leave nothing behind."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import alike
import psutil
import pytest
from safetensors.torch import load_file
from tiny_llava import world

from valor import stages
from valor.context import Context
from valor.errors import Interrupted, UserError
from valor.training import launch


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


def sft(tmp_path: Path, name: str, *, processes: int, pipeline_run: str = "") -> dict[str, float]:
    return dict(
        stages.run(
            "sft",
            settings_json=alike.sft_settings(processes=processes).model_dump_json(),
            context=Context(work_root=str(tmp_path / f"work-{processes}"), pipeline_run=pipeline_run),
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


def _config() -> str:
    import yaml

    from valor.training.processes import Node, accelerate_config

    return yaml.safe_dump(
        accelerate_config(alike.sft_settings(processes=2), node=Node(), zero_path=Path("unused"), cpu=True)
    )
