"""Local runs as a person sees them: processes, exit codes, what is printed and what is left."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_runs import command, environment, tiny_run

from pipelines.local import runner
from valor.recipe import load

pytestmark = pytest.mark.slow


def summary(home):
    runs = sorted((home / "runs").iterdir())
    return json.loads((runs[-1] / "summary.json").read_text())


def states(home):
    return {name: task["state"] for name, task in summary(home)["tasks"].items()}


def test_a_missing_data_root_is_one_line_with_exit_code_2(valor, tmp_path):
    result = valor(*tiny_run("data.root=/no/such/place", "publish_text=false"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "/no/such/place" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    home = tmp_path / "home"
    assert states(home)["preflight"] == "failed"
    assert states(home)["fetch_models"] == "waiting", "nothing expensive starts after a failed look"
    assert (home / "runs" / summary(home)["run"] / "logs" / "preflight.log").exists()


def test_unchanged_shards_are_reused(valor, tmp_path):
    home = tmp_path / "home"
    first = valor(*tiny_run())
    assert first.returncode == 3, first.stderr
    assert "data gate" in first.stderr
    assert "note: VALOR_TRACKING is off" in first.stdout
    assert states(home)["ingest-0"] == states(home)["ingest-1"] == "done"
    assert states(home)["fetch_models"] == "waiting"
    assert valor(*tiny_run("sft.trainer.max_steps=3")).returncode == 3
    assert summary(home)["reused"] == ["ingest-0", "ingest-1"]
    assert summary(home)["peak_memory_bytes"] > 50 << 20


def start(home, log):
    return subprocess.Popen(
        command(*tiny_run("data.phantom.train=4000", "data.phantom.image_px=512")),
        env=environment(home),
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=home.parent,
    )


def wait_for_a_task(home, process):
    """Wait until a shard is being ingested; return every process below the run."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None
        events = "".join(path.read_text() for path in home.glob("runs/*/events.jsonl"))
        if '"ingest-0", "event": "progress"' in events or '"ingest-0", "event": "start"' in events:
            return psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    raise AssertionError("no task started in 90 s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_whole_tree_within_seconds(tmp_path, number):
    home = tmp_path / "home"
    with (tmp_path / "log").open("w") as log:
        process = start(home, log)
        below = wait_for_a_task(home, process)
        assert len(below) >= 3, "the child, the fork server and a task"
        begun = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(timeout=20) == 143
    assert time.monotonic() - begun < 15
    _, alive = psutil.wait_procs(below, timeout=1)
    assert not alive
    assert "interrupted" in (tmp_path / "log").read_text()
    assert summary(home)["exit_code"] == 143


MICRO = Path(__file__).parents[1] / "recipes" / "micro.yaml"
STEPS = 20_000
"""More than the test waits for, and no save is due before the last of them."""


def interrupt_sft(home):
    """Run the whole DAG until SFT has reported twice, then SIGTERM; return SFT's events."""
    home.mkdir(exist_ok=True)
    settings = ("--set", f"sft.trainer.max_steps={STEPS}", "--set", f"sft.trainer.save_steps={STEPS}")
    before = set(home.glob("runs/*"))
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command("run", str(MICRO), *settings), env=environment(home), stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 300
        while len(steps := [event for event in events(home, before) if event["event"] == "progress"]) < 2:
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, "SFT has not trained within 300 s"
            time.sleep(0.2)
        assert steps[-1]["step"] < STEPS
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    return events(home, before)


def events(home, before):
    lines = [line for run in set(home.glob("runs/*")) - before for line in read_lines(run / "events.jsonl")]
    return [event for event in map(json.loads, lines) if event["task"] == "sft"]


def read_lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_training_stage_told_to_end_saves_its_step_and_goes_on_from_it(tmp_path):
    home = tmp_path / "home"
    failure = interrupt_sft(home)[-1]
    assert failure["exit_code"] == 143
    step = int(re.search(rf"told to end at step (\d+) of {STEPS}", failure["error"])[1])
    (manifest,) = home.glob("work/*/checkpoint-*/checkpoint.json")
    assert manifest.parent.name == f"checkpoint-{step}"
    assert next(event["step"] for event in interrupt_sft(home) if event["event"] == "progress") == step + 1


def test_a_second_ctrl_c_changes_nothing(tmp_path):
    home = tmp_path / "home"
    with (tmp_path / "log").open("w") as log:
        process = start(home, log)
        wait_for_a_task(home, process)
        os.kill(process.pid, signal.SIGINT)
        deadline = time.monotonic() + 20
        while not any("finish_pipeline" in line for line in command_lines_below(process)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 143
    assert summary(home)["exit_code"] == 143
    assert "Traceback" not in (tmp_path / "log").read_text()


def command_lines_below(process):
    lines = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(child.cmdline()))
    return lines


WITH_A_WORKER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def watched(code):
    """Start a process that runs `python -c CODE` the way that `valor ui` runs MLflow."""
    inner = f"[sys.executable, '-c', {code!r}]"
    script = f"import sys; from pipelines.local.processes import run_until_signal as r; sys.exit(r({inner}, grace_s=3))"
    return subprocess.Popen([sys.executable, "-c", script])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 0)])
def test_a_signal_ends_a_watched_command_with_its_workers(number, status):
    process = watched(WITH_A_WORKER)
    deadline = time.monotonic() + 20
    while len(below := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(timeout=10) == status
    _, alive = psutil.wait_procs(below, timeout=1)
    assert not alive


def test_a_watched_command_that_ends_by_itself_tells_its_status():
    assert watched("import sys; sys.exit(3)").wait(timeout=20) == 3


def test_a_killed_parent_takes_its_tree_with_it_and_frees_the_home(valor, tmp_path):
    home = tmp_path / "home"
    with (tmp_path / "log").open("w") as log:
        process = start(home, log)
        below = wait_for_a_task(home, process)
        second = valor(*tiny_run())
        assert second.returncode == 2
        assert f"process {process.pid}" in second.stderr
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
    third = valor(*tiny_run("data.root=/no/such/place", "publish_text=false"))
    assert "/no/such/place" in third.stderr, "the lock died with its holder"


def is_task(process):
    """Tell a fork of the fork server from the server; a process that has ended meanwhile is none."""
    try:
        return all("multiprocessing.forkserver" in " ".join(p.cmdline()) for p in (process, process.parent()))
    except psutil.NoSuchProcess:
        return False


def test_a_killed_task_is_a_resource_error_that_names_it(tmp_path):
    home = tmp_path / "home"
    with (tmp_path / "log").open("w") as log:
        process = start(home, log)
        below = wait_for_a_task(home, process)
        for task in below:
            if is_task(task):
                task.kill()
        assert process.wait(timeout=180) == 6
    text = (tmp_path / "log").read_text()
    assert "ingest-" in text
    assert "killed" in text


@pytest.mark.parametrize(("publish", "shown"), [("true", "1"), ("false", None)])
def test_messages_of_errors_are_shown_only_where_the_recipe_publishes_text(tmp_path, monkeypatch, publish, shown):
    monkeypatch.delenv("VALOR_VERBOSE_ERRORS", raising=False)
    recipe = load("phantom", [f"publish_text={publish}"])
    below = runner._environment(recipe, place=tmp_path, run_dir=tmp_path)
    assert below.get("VALOR_VERBOSE_ERRORS") == shown
