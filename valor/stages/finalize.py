"""Finalize: link the runs that a pipeline run executed or reused to its parent, and write a summary without text.

Never cached. An artifact's stamp names the pipeline run that made it: another one's was reused.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor import artifacts as artifact_dirs
from valor.context import Context
from valor.recipe import RegistrySettings
from valor.stages import StageResult, stamps_of
from valor.tracking.runs import code_identity

log = logging.getLogger(__name__)
_MOUNTS = {"/gcs": "gs://", "/minio": "minio://", "/s3": "s3://"}


def finalize(
    settings: RegistrySettings, *, summary: Path, context: Context, **artifacts: "Path | list[Path]"
) -> StageResult:
    """Link runs and summarise.

    Args:
        settings: the recipe's `registry` section.
        summary: the directory to make: `summary.json` (tasks with their runs, digests and metrics).
        context: names the pipeline run.
        artifacts: every artifact of the pipeline run, by name.

    Returns:
        metrics `tasks_executed` and `tasks_reused`.
    """
    from valor.tracking import links, store

    stamps = stamps_of(artifacts)
    made_by = links.producers(stamps) if store.enabled() else {}
    tasks = _tasks(stamps, made_by, context.pipeline_run)
    if store.enabled() and context.pipeline_run:
        tags = _tags(settings, context, artifacts.get("evaluation")) | _verdict(artifacts.get("verdict"))
        links.link(context.pipeline_run, stamps, tasks, tags=tags)
    facts = {
        "pipeline_run": context.pipeline_run,
        "model_name": settings.model_name,
        "tasks": tasks,
        "artifacts": {name: stamp["digest"] for name, stamp in stamps.items()},
    }
    with artifact_dirs.atomic_dir(summary) as folder:
        artifact_dirs.write_json(folder / "summary.json", facts)
    reused = sum(task["reused"] for task in tasks.values())
    log.info("%d tasks executed, %d reused", len(tasks) - reused, reused)
    return StageResult(metrics={"tasks_executed": len(tasks) - reused, "tasks_reused": reused})


def _tasks(
    stamps: Mapping[str, Mapping[str, Any]], made_by: Mapping[str, Mapping[str, float]], pipeline_run: str
) -> dict[str, dict[str, Any]]:
    """Return, per task, its runs, whether all of them were reused, its outputs' digests and its metrics."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, stamp in sorted(stamps.items()):
        task = tasks.setdefault(
            stamp.get("task") or stamp["stage"],
            {"stage": stamp["stage"], "runs": [], "reused": True, "outputs": {}, "metrics": {}},
        )
        run_id = stamp.get("producer_run", "")
        if run_id and run_id not in task["runs"]:
            task["runs"].append(run_id)
        task["reused"] = task["reused"] and stamp.get("pipeline_run", "") != pipeline_run
        task["outputs"][name] = stamp["digest"]
        task["metrics"] |= made_by.get(run_id, {})
    return tasks


def _tags(settings: RegistrySettings, context: Context, evaluation: "Path | list[Path] | None") -> dict[str, str]:
    """Return the parent's tags: the model's name, and where those who may see text and images find them."""
    tags = {"valor.model_name": settings.model_name}
    if "://" in context.restricted_uri or Path(context.restricted_uri or "-").is_dir():
        tags["valor.restricted_uri"] = context.restricted_uri
    if isinstance(evaluation, Path):
        tags["valor.evaluation_uri"] = _shown_place(evaluation)
    return tags


def _verdict(verdict: "Path | list[Path] | None") -> dict[str, str]:
    """Return the parent's tags that a list of runs is read by: the code's commit and the gate's decision."""
    code = code_identity()
    tags = {"valor.commit": code["commit"] + ("-dirty" if code["dirty"] else "")}
    if isinstance(verdict, Path):
        tags["valor.verdict"] = artifact_dirs.read_json(verdict / "verdict.json")["verdict"]
    return tags


def _shown_place(folder: Path) -> str:
    """Return where an artifact is for somebody outside the task; KFP shows buckets to a task as mounts."""
    for mount, scheme in _MOUNTS.items():
        if folder.is_relative_to(mount):
            return f"{scheme}{folder.relative_to(mount)}"
    return str(folder.absolute())
