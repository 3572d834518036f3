"""The race: lanes in processes of their own take turns, step by step, and only ratios within a round are kept.

Results are JSON files in build/benchmarks (git-ignored); what has one for the present code, options and machine is not
run again.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lane import LOGGED, Work

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "build" / "benchmarks"


def _print(line: str) -> None:
    print(line, flush=True)


@dataclasses.dataclass
class Lane:
    """What one lane said.

    Attributes:
        work: what it did.
        ready, end: its first and last event.
        every: seconds per step: CPU time of the process, on a GPU time by the clock.
    """

    work: Work
    ready: dict[str, Any]
    end: dict[str, Any]
    every: list[float]

    @property
    def seconds(self) -> list[float]:
        """Seconds per step that counts (the first is a warm-up), decoding and shrinking its images included.

        VALOR does both for all images before it trains; stock TRL does them inside its steps, and reports 0 here.
        """
        rows = self.ready["rows_wall" if self.work.device == "cuda" else "rows_cpu"]
        return [seconds + rows / self.work.steps for seconds in self.every[1:]]

    @property
    def above_model_mb(self) -> float:
        """Peak memory above what the process held once the model was built."""
        return self.end["peak_mb"] - self.end["model_mb"]


def race(
    works: Mapping[str, Work], *, threads: int = 1, profile: str = "", say: Callable[[str], None] = _print
) -> dict[str, Lane]:
    """Run lanes of equal length in turns, in rotating order, and return what they said.

    Raises:
        RuntimeError: a lane ended early; its own words are on the standard error.
    """
    steps = {work.steps for work in works.values()}
    if len(steps) != 1:
        raise ValueError(f"lanes of {sorted(steps)} steps; a race needs equal lengths")
    names = list(works)
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_lane(work, threads, profile)) for name, work in works.items()}
        ready = {name: _event(process, "ready") for name, process in processes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for step in range(steps.pop()):
            turn = step % len(names)
            for name in names[turn:] + names[:turn]:
                _go(processes[name])
                seconds[name].append(_event(processes[name], "step")["seconds"])
            say(f"  step {step + 1}: " + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names))
        for process in processes.values():
            _go(process)
        ends = {name: _event(process, "end") for name, process in processes.items()}
    return {name: Lane(works[name], ready[name], ends[name], seconds[name]) for name in names}


def alone(work: Work, *, threads: int = 1, profile: str = "", say: Callable[[str], None] = _print) -> Lane:
    """Run one lane by itself; with `profile`, write what cProfile saw to that path."""
    return race({work.variant: work}, threads=threads, profile=profile, say=say)[work.variant]


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, and the least and the greatest."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each), "rounds": len(each)}


def require_same_training(lanes: Mapping[str, Lane]) -> dict[str, float]:
    """Return the greatest differences between the first lane and the others in what they logged.

    A GRPO loss on the policy's own samples is near 0 by construction, so beside losses to 1e-5, gradient norms,
    entropies and rewards must agree to 1e-3 of their value.

    Raises:
        AssertionError: the lanes did not do the same work.
    """
    first, *others = lanes.values()
    worst = dict.fromkeys(LOGGED, 0.0)
    for other in others:
        for mine, theirs in zip(first.end["history"], other.end["history"], strict=True):
            for key in LOGGED:
                # What is not a number compares as false and would pass as no difference.
                if not (math.isfinite(mine[key]) and math.isfinite(theirs[key])):
                    raise AssertionError(f"the lanes {', '.join(lanes)} logged {key}: {mine[key]}, {theirs[key]}")
                scale = 1.0 if key == "loss" else max(abs(mine[key]), 1e-12)
                worst[key] = max(worst[key], abs(mine[key] - theirs[key]) / scale)
    if worst["loss"] > 1e-5 or max(worst.values()) > 1e-3:
        raise AssertionError(f"the lanes {', '.join(lanes)} did not train alike: {worst}")
    return worst


_NO_OPTIONS = ("again", "only", "profile", "size")
"""Options that choose what is run, not how."""


def code_digest() -> str:
    """Return the sha256 of all of `valor` and of the benchmarks that measure.

    All of `valor`, since a module left out, however far from training, would let a result outlive its code. The
    libraries belong to the machine: they differ between one with a GPU and one without.
    """
    from valor import artifacts

    paths = (path for path in sorted(HERE.glob("*.py")) if path.stem != "document" and not path.match("test_*"))
    own = [[path.name, artifacts.digest_file(path)] for path in paths]
    return artifacts.digest_value([artifacts.digest_code(["."], libraries=()), own])


def once(name: str, measure: Callable[[], dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return a benchmark's result: the one on disk where code, options and machine are the same, else a new one.

    Args:
        name: the result's, unlike any other's.
        measure: makes the result.
        options: of the script; `again` asks for a new result.
    """
    path = RESULTS / f"{name}.json"
    chosen = {key: str(value) for key, value in vars(options).items() if key not in _NO_OPTIONS}
    key = {"code": code_digest(), "options": chosen, "machine": machine()}
    if path.exists() and not options.again:
        result = json.loads(path.read_text(encoding="utf-8"))
        if key == {part: result.get(part) for part in key}:
            print(f"{name}: measured before ({result['date']})", flush=True)
            return result
    print(f"{name} ...", flush=True)
    start = time.monotonic()
    # With the time in UTC, so that the newest of a day's results is known, wherever each was made.
    result = {**measure(), **key, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    result["took_s"] = round(time.monotonic() - start)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def machine() -> str:
    """Return the processor, how many of it, the GPU where there is one, and the libraries, in words."""
    import torch
    import transformers
    import trl

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} x {cpu}, {gpu}Python {platform.python_version()}, {libraries}"


@contextlib.contextmanager
def _lane(work: Work, threads: int, profile: str) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [
        sys.executable,
        str(HERE / "lane.py"),
        json.dumps(dataclasses.asdict(work)),
        *([profile] if profile else []),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _go(process: "subprocess.Popen[str]") -> None:
    print(file=process.stdin, flush=True)


def _event(process: "subprocess.Popen[str]", kind: str) -> dict[str, Any]:
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RuntimeError(f"a lane ended early with exit code {process.wait()}; see its words above")
    event = json.loads(line)
    if event["event"] != kind:
        raise RuntimeError(f"a lane said {event['event']!r}, expected {kind!r}")
    return event
