"""What a person sees while a local run works: a live table on a terminal, JSON lines elsewhere."""

import json
import sys
import time
from typing import Any, Protocol

from pipelines.local.state import RunState, Task

QUIET_S = 30.0
SHOWN_METRICS = 8
"""Of a task's numbers, the first: stages put those to watch first; all are in summary.json and MLflow."""
_MARKS = {
    "waiting": "[dim]·[/]", "running": "[cyan]▶[/]", "done": "[green]✓[/]", "reused": "[blue]↺[/]",
    "failed": "[red]✗[/]", "skipped": "[dim]-[/]",
}  # fmt: skip
_BAR = 24


class View(Protocol):
    """Shows a run's state."""

    def update(self, state: RunState, *, changed: list[Task], memory_bytes: int) -> None:
        """Show the state; `changed` are the tasks whose state differs from the last call."""

    def close(self) -> None:
        """Leave the screen as it is."""


def make_view() -> View:
    """Return the live table where standard output is a terminal, JSON lines elsewhere."""
    return LiveView() if sys.stdout.isatty() else JsonView()


class JsonView:
    """One JSON line per change of a task's state, and one per 30 s for what is running."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def update(self, state: RunState, *, changed: list[Task], memory_bytes: int) -> None:
        """Print what changed, and the running tasks where 30 s have passed."""
        due = time.monotonic() - self._last >= QUIET_S
        lines = list(changed)
        if due:
            lines += [task for task in state.tasks.values() if task.state == "running" and task not in changed]
        for task in lines:
            print(json.dumps(_line(task, state, memory_bytes)), flush=True)
        if lines or due:
            self._last = time.monotonic()

    def close(self) -> None:
        """Nothing to leave."""


class LiveView:
    """A table that redraws itself four times a second (rich)."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(refresh_per_second=4)
        self._live.start()

    def update(self, state: RunState, *, changed: list[Task], memory_bytes: int) -> None:
        """Redraw."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold", caption=f"memory {memory_bytes / 2**30:.2f} GiB")
        for heading in ("", "task", "progress", "", "time"):
            table.add_column(heading, no_wrap=True)
        for task in state.tasks.values():
            table.add_row(_MARKS[task.state], task.name, _bar(task), _key_metric(task), _clock(task))
        self._live.update(table)

    def close(self) -> None:
        """Stop redrawing; the last table stays."""
        self._live.stop()


def _line(task: Task, state: RunState, memory_bytes: int) -> dict[str, Any]:
    over = sum(other.state in ("done", "reused", "skipped") for other in state.tasks.values())
    line: dict[str, Any] = {"time": time.strftime("%H:%M:%S"), "task": task.name, "state": task.state}
    line |= {"tasks": f"{over}/{len(state.tasks)}", "seconds": round(task.seconds(time.time()), 1)}
    if task.total:
        line |= {"step": task.step, "total": task.total, "unit": task.unit}
    if task.metrics:
        line["metrics"] = {name: float(f"{value:.4g}") for name, value in list(task.metrics.items())[:SHOWN_METRICS]}
    return line | {"memory_mib": memory_bytes >> 20}


def _bar(task: Task) -> str:
    if task.state == "reused":
        return "[blue]reused[/]"
    if task.state != "running" or not task.total:
        return "" if task.state == "waiting" else task.state
    filled = round(_BAR * min(task.step / task.total, 1.0))
    return f"[cyan]{'━' * filled}[/][dim]{'─' * (_BAR - filled)}[/] {task.step}/{task.total} {task.unit}"


def _key_metric(task: Task) -> str:
    """Return the first number of a task: stages put the one to watch first."""
    return next((f"{name} {value:.4g}" for name, value in task.metrics.items()), "")


def _clock(task: Task) -> str:
    seconds = int(task.seconds(time.time()))
    return f"{seconds // 60}:{seconds % 60:02d}" if task.started else ""
