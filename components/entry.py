"""What every wrapper's body does: artifacts to paths, `valor.stages.run`, verdict to an exit code.

It runs inside the task. KFP ships only a wrapper's source, so the wrappers import this module from the installed
package. Nothing here decides anything about a stage.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from valor import progress, stages
from valor.artifacts import full_disk_is_a_resource_error, read_stamp, write_json
from valor.context import Context
from valor.errors import ValorError
from valor.startup import spare_the_collector

FAILED = "failed"
"""File in VALOR_RUN_DIR that says that a task of this run has failed."""


def task_label(task: str, shard: str = "") -> str:
    """Return the name under which a person sees the task; the members of a fan-out are numbered."""
    return f"{task}-{json.loads(shard)['index']}" if shard else task


def run_stage(
    stage: str,
    *,
    task: str,
    run: str,
    settings: str,
    metrics: Any,
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    values: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run a stage inside a KFP task and return its string outputs.

    Args:
        stage: one of `valor.stages.STAGES`.
        task: the task's name in the DAG, such as `predict-text`.
        run: id of the pipeline run; the local runner's VALOR_PIPELINE_RUN goes before it.
        settings: the stage's recipe section as JSON.
        metrics: the KFP Metrics artifact; its file is always written, since KFP never reuses a task without it.
        inputs: KFP artifacts by the stage's parameter name, or lists of them.
        outputs: KFP artifacts by the stage's parameter name; their metadata receives the content's digest.
        values: string parameters by name.

    Raises:
        SystemExit: with the error's exit code; the error's one line is on standard error.
    """
    spare_the_collector()
    outputs = dict(outputs or {})
    _stop_after_failure(task)
    try:
        context = Context.from_environment(pipeline_run=os.environ.get("VALOR_PIPELINE_RUN") or run, task=task)
    except ValorError as error:
        # The runner takes a task's exit code from its event.
        progress.set_task(task)
        progress.emit("fail", exit_code=error.exit_code, error=str(error))
        _fail(error.exit_code, str(error))
    try:
        result = stages.run(
            stage,
            settings_json=settings,
            context=context,
            inputs={name: _paths(value) for name, value in (inputs or {}).items()},
            outputs={name: Path(artifact.path) for name, artifact in outputs.items()},
            values=values,
        )
    except ValorError as error:
        _fail(error.exit_code, str(error))
    except Exception as error:
        _fail(1, f"{task}: {type(error).__name__}; the traceback is in the task's log")
    try:
        with full_disk_is_a_resource_error(Path(metrics.path)):
            for artifact in outputs.values():
                stamp = read_stamp(Path(artifact.path))
                artifact.metadata |= {"digest": stamp["digest"], "kind": stamp["kind"], "run": stamp["producer_run"]}
            _write_metrics(metrics, result.metrics)
    except ValorError as error:
        progress.emit("fail", exit_code=error.exit_code, error=str(error))
        _fail(error.exit_code, str(error))
    except Exception as error:
        line = f"{task}: {type(error).__name__} while its outputs were recorded"
        progress.emit("fail", exit_code=1, error=line)
        _fail(1, line)
    progress.emit("outputs", paths={name: artifact.path for name, artifact in outputs.items()})
    return dict(result.values)


def _paths(value: Any) -> Path | list[Path]:
    if isinstance(value, Sequence):
        return [Path(artifact.path) for artifact in value]
    return Path(value.path)


def _write_metrics(metrics: Any, values: Mapping[str, float]) -> None:
    """Log the finite metrics; KFP's metadata cannot hold nan or infinity, the file says null instead."""
    numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    for name, value in numbers.items():
        if value is not None:
            metrics.log_metric(name, value)
    path = Path(metrics.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, numbers)


def _stop_after_failure(task: str) -> None:
    """End at once where another task of this local run has failed: KFP would still run what does not depend on it."""
    run_dir = os.environ.get("VALOR_RUN_DIR")
    if run_dir and Path(run_dir, FAILED).exists():
        progress.set_task(task)
        progress.emit("skip")
        sys.exit(1)


def _fail(exit_code: int, line: str) -> None:
    """Mark the local run as failed and end with the exit code, also where a full disk takes neither mark nor line."""
    run_dir = os.environ.get("VALOR_RUN_DIR")
    if run_dir:
        with contextlib.suppress(OSError):
            Path(run_dir, FAILED).touch()
    with contextlib.suppress(OSError):
        print(f"valor: error: {line}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
