"""Runs a training stage in a process of its own and kills it with SIGKILL after its first committed checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from valor.context import Context

CODE = """
import sys
from pathlib import Path
from valor.context import Context
from valor.recipe import parse_section
stage, settings, work_root, *paths = sys.argv[1:]
function = getattr(__import__(f"valor.stages.{stage}", fromlist=[stage]), stage)
paths = {name: Path(path) for name, path in (pair.split("=", 1) for pair in paths)}
function(parse_section(stage, settings), **paths, context=Context(work_root=work_root))
"""


def run_and_kill(stage: str, settings, *, work_root: Path, seed: int, **paths: Path) -> int:
    """Return the step of the newest committed checkpoint at the moment of death."""
    command = [sys.executable, "-c", CODE, stage, settings.model_dump_json(), str(work_root)]
    command += [f"{name}={path}" for name, path in paths.items()]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not committed(work_root):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < end, "no checkpoint within 120 s"
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the stage ended before it could be killed: give it more steps"
    return max(committed(work_root))


def committed(work_root: Path) -> list[int]:
    return [int(path.parent.name.split("-")[1]) for path in work_root.glob("*/checkpoint-*/checkpoint.json")]


def survives_a_kill(function, settings, *, tmp_path: Path, seed: int, **paths: Path) -> dict[str, float]:
    """Check that a killed and continued stage ends with the weights of an undisturbed one, bit by bit."""
    undisturbed, continued, killed = (tmp_path / name for name in ("undisturbed", "continued", "killed"))
    work = tmp_path / "work"
    step = run_and_kill(function.__name__, settings, work_root=work, seed=seed, checkpoint=killed, **paths)
    assert not killed.exists()
    result = function(settings, **paths, checkpoint=continued, context=Context(work_root=str(work)))
    assert 0 < step <= result.metrics["resumed_from_step"] < result.metrics["steps"]
    assert any(work.iterdir())
    result.cleanup()
    assert not any(work.iterdir())
    function(settings, **paths, checkpoint=undisturbed, context=Context(work_root=str(tmp_path / "other")))
    assert_same_weights(undisturbed, continued)
    return result.metrics


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, such as {different[0]}"
