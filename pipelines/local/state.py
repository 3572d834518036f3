"""What is known of a local run, from the events that its tasks write (`valor.progress`)."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Task:
    """One task of the run.

    Attributes:
        state: waiting, running, done, reused, failed or skipped.
        started, ended: seconds since the epoch, 0 where it has not happened.
        step, total, unit: how far it is.
        metrics: its latest numbers.
        values: its string outputs.
        paths: its output artifacts' paths by name.
        exit_code, error: of a failed task.
    """

    name: str
    state: str = "waiting"
    started: float = 0.0
    ended: float = 0.0
    step: int = 0
    total: int = 0
    unit: str = ""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    exit_code: int = 0
    error: str = ""

    def seconds(self, now: float) -> float:
        """Return the wall time so far."""
        return (self.ended or now) - self.started if self.started else 0.0


class RunState:
    """The tasks by name, in the order in which they are shown."""

    def __init__(self, names: Iterable[str]) -> None:
        self.expected = tuple(names)
        self.tasks = {name: Task(name) for name in self.expected}

    def apply(self, event: dict[str, Any]) -> bool:
        """Take in one event; return whether a task's state changed. Helpers that belong to no task are left out."""
        if not event["task"]:
            return False
        task = self.tasks.setdefault(event["task"], Task(event["task"]))
        before = task.state
        kind, now = event["event"], float(event["time"])
        if kind == "start":
            task.state, task.started, task.ended = "running", now, 0.0
        elif kind == "progress":
            task.step, task.total, task.unit = event["step"], event["total"], event["unit"]
            numbers = {k: v for k, v in event.items() if k not in ("time", "task", "event", "step", "total", "unit")}
            task.metrics = numbers or task.metrics
        elif kind == "end":
            task.state, task.ended = "done", now
            task.metrics, task.values = event["metrics"], event["values"]
        elif kind == "outputs":
            task.paths = event["paths"]
        elif kind == "reuse":
            task.state, task.paths, task.values = "reused", event["paths"], event["values"]
        elif kind == "fail":
            task.state, task.ended = "failed", now
            task.exit_code, task.error = event["exit_code"], event["error"]
        elif kind == "skip":
            task.state = "skipped"
        return task.state != before

    def failed(self) -> Task | None:
        """Return the task that failed first, if any."""
        failures = [task for task in self.tasks.values() if task.state == "failed"]
        return min(failures, key=lambda task: task.ended, default=None)

    def reused(self) -> list[str]:
        """Return the names of the reused tasks."""
        return [task.name for task in self.tasks.values() if task.state == "reused"]

    def dead(self) -> Task | None:
        """Return a task that began and, though the run is over, never ended: it was killed."""
        return next((task for task in self.tasks.values() if task.state == "running"), None)


class EventTail:
    """Reads whole new lines of a growing events file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the events written since the last call; a line that a full disk cut short is skipped."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        if not newline:
            return []
        self._offset += len(whole) + 1
        return [event for line in whole.splitlines() if (event := _parse(line))]


def _parse(line: bytes) -> dict[str, Any]:
    """Return a line's event; one that is no whole event counts as none."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) and {"time", "task", "event"} <= event.keys() else {}
