"""Runs a training stage in a process of its own and kills it with SIGKILL after its first committed checkpoint."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from valor.context import Context


def run_and_kill(function, settings, *, work_root: Path, seed: int, **paths: Path) -> int:
    """Return the step of the newest committed checkpoint at the moment of death."""
    # A fork: it has torch and TRL loaded already, and dies all the same.
    process = multiprocessing.get_context("fork").Process(
        target=function, args=(settings,), kwargs={**paths, "context": Context(work_root=str(work_root))}
    )
    process.start()
    end = time.monotonic() + 120
    while not committed(work_root):
        assert process.is_alive(), "the stage ended without a checkpoint"
        assert time.monotonic() < end, "no checkpoint within 120 s"
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the stage ended before it could be killed: give it more steps"
    return max(committed(work_root))


def committed(work_root: Path) -> list[int]:
    return [int(path.parent.name.split("-")[1]) for path in work_root.glob("*/checkpoint-*/checkpoint.json")]


def survives_a_kill(function, settings, *, tmp_path: Path, seed: int, **paths: Path) -> dict[str, float]:
    """Check that a killed and continued stage ends with the weights of an undisturbed one, bit by bit."""
    undisturbed, continued, killed = (tmp_path / name for name in ("undisturbed", "continued", "killed"))
    work = tmp_path / "work"
    step = run_and_kill(function, settings, work_root=work, seed=seed, checkpoint=killed, **paths)
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
