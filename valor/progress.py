"""Progress of long work, as events that a person or the local runner can follow.

Where `VALOR_RUN_DIR` is set (the local runner sets it), events are appended to `events.jsonl` there;
elsewhere a JSON line goes to standard output, at most one per 30 s and task. Events hold numbers and names
of stages only, never text of a report.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

_QUIET_S = 30.0
_TASK = "VALOR_TASK"
_last_print = 0.0


def set_task(task: str) -> None:
    """Name the task that the events of this process, and of those it starts, belong to, such as `predict-text`."""
    os.environ[_TASK] = task


def emit(event: str, **fields: Any) -> None:
    """Record one event (`start`, `progress`, `end`, `fail`) of the current task.

    A place that cannot be written, such as a full disk, loses the event: work does not fail for its progress, and an
    error on its way is not replaced by this one.
    """
    line = json.dumps({"time": round(time.time(), 3), "task": os.environ.get(_TASK, ""), "event": event, **fields})
    with contextlib.suppress(OSError):
        _write(line)


def _write(line: str) -> None:
    run_dir = os.environ.get("VALOR_RUN_DIR")
    if run_dir:
        # One O_APPEND write per line keeps lines whole when shards report at the same time.
        descriptor = os.open(os.path.join(run_dir, "events.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)
    else:
        print(line, file=sys.stdout, flush=True)


def report(step: int, total: int, *, unit: str = "steps", **metrics: float) -> None:
    """Report that `step` of `total` units are done; cheap enough to call after each one."""
    global _last_print
    now = time.monotonic()
    interval = 1.0 if os.environ.get("VALOR_RUN_DIR") else _QUIET_S
    if step < total and now - _last_print < interval:
        return
    _last_print = now
    emit("progress", step=step, total=total, unit=unit, **{k: round(float(v), 5) for k, v in metrics.items()})
