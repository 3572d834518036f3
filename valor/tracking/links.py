"""Links between a pipeline run's parent and the runs behind its artifacts, executed now or reused.

- on the parent: `valor.task.<task>` (JSON `{"runs", "reused"}`), its checkpoints as MLflow model inputs, and the
  evaluation's metrics, so that pipeline runs can be compared by their parents alone;
- on a run: `valor.used_by.<pipeline run>` = the parent's id, so that one search finds all that a pipeline run used.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from valor.tracking import graph, pipeline_runs, store

_RUNS_SHOWN = 50
"""A tag holds 8,000 characters; a fan-out may have more runs than that."""


def producers(stamps: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the metrics of each run that made one of the stamped artifacts; runs of another store are left out."""
    from mlflow.exceptions import MlflowException

    found = {}
    with store.service_errors("reading the producing runs"):
        for run_id in sorted({stamp.get("producer_run", "") for stamp in stamps.values()} - {""}):
            try:
                found[run_id] = dict(store.client().get_run(run_id).data.metrics)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
    return found


def link(
    pipeline_run: str,
    stamps: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    tags: Mapping[str, str],
) -> None:
    """Link the parent of a pipeline run with the runs of its tasks.

    Args:
        pipeline_run: its id.
        stamps: the stamps of its artifacts.
        tasks: per task `runs`, `reused`, `stage` and `metrics`.
        tags: further tags of the parent.
    """
    known = producers(stamps)
    with store.service_errors("linking runs to the pipeline run"):
        parent = pipeline_runs.parent(pipeline_run)
        tags = dict(tags)
        for name, task in tasks.items():
            shown = {"runs": task["runs"][:_RUNS_SHOWN], "reused": task["reused"]}
            tags[f"valor.task.{name}"] = json.dumps(shown, sort_keys=True)
            for run_id in task["runs"]:
                if run_id in known:
                    pipeline_runs.set_tags(run_id, {f"valor.used_by.{pipeline_run}": parent})
        pipeline_runs.set_tags(parent, tags)
        models = {name: stamp for name, stamp in stamps.items() if stamp.get("kind") in graph.MODEL_KINDS}
        graph.log_inputs(store.client(), parent, models)
        _log_evaluation(parent, tasks)


def _log_evaluation(parent: str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    from mlflow.entities import Metric

    numbers: dict[str, float] = {}
    for task in tasks.values():
        if task["stage"] == "evaluate":
            numbers |= task["metrics"]
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in sorted(numbers.items())]
    for start in range(0, len(metrics), 500):
        store.client().log_batch(parent, metrics=metrics[start : start + 500])
