"""MLflow runs: one parent per pipeline run, one child per executed stage.

A stage's run carries its settings as parameters, its numbers as metrics, and its inputs and outputs by digest
(`valor.tracking.graph`). It never carries text or images, except the evaluation page where the recipe sets
`publish_text`. Outside a pipeline a stage's run stands alone. With `VALOR_TRACKING=off` nothing is recorded.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from valor import artifacts
from valor.context import Context
from valor.errors import Interrupted, ServiceError, ValorError
from valor.tracking import graph, pipeline_runs, store
from valor.tracking.store import initialise_store

__all__ = ["StageRun", "finish_pipeline", "initialise_store", "log_metrics", "stage_run"]
log = logging.getLogger(__name__)

MAX_PARAMS = 200
MAX_PARAM_CHARS = 500
_FLUSH_S = 2.0
_RETRY_S = 60.0
_PLACES = ("root", "annotations_root")
_STATUS = {"FINISHED": "FINISHED", "SUCCEEDED": "FINISHED", "KILLED": "KILLED", "CANCELLED": "KILLED"}
"""MLflow's status of a finished pipeline run; every other state is FAILED."""
_PUBLISHED = {
    "evaluate": ("summary.md", "summary.json"),
    "gate": ("verdict.json", "verdict.md"),
    "register": ("registration.json", "lineage.json"),
    "finalize": ("summary.json",),
}
_PUBLISHED_WITH_TEXT = {"evaluate": ("evaluation.html",)}

_active: "StageRun | None" = None


class Result(Protocol):
    """What is recorded of a `valor.stages.StageResult`, which this layer must not import."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers by name."""

    @property
    def values(self) -> Mapping[str, str]:
        """String outputs by name."""


@dataclasses.dataclass
class StageRun:
    """The run of one stage.

    Attributes:
        stage: the stage's name.
        run_id: MLflow's id, or "" when tracking is off.
        code: `commit`, `dirty` and `image` of the code that runs.
        publish_text: whether pages with text may go to MLflow.
    """

    stage: str
    run_id: str
    code: dict[str, Any]
    publish_text: bool = False
    _pending: list[Any] = dataclasses.field(default_factory=list)
    _next_flush: float = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics, in batches. A store that is away for a while holds nothing up: they are kept for later."""
        if not self.run_id:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(float(v))]
        if time.monotonic() < self._next_flush:
            return
        self._next_flush = time.monotonic() + _FLUSH_S
        try:
            self.flush()
        except ServiceError as error:
            self._next_flush = time.monotonic() + _RETRY_S
            log.warning("%s; %d metrics are kept and sent later", error, len(self._pending))

    def flush(self) -> None:
        """Send the metrics that wait; raise ServiceError when the store does not take them."""
        with store.service_errors("recording metrics"):
            while self._pending:
                batch = self._pending[:500]
                store.client().log_batch(self.run_id, metrics=batch)
                del self._pending[: len(batch)]

    def finish(
        self,
        *,
        result: Result,
        outputs: Mapping[str, Mapping[str, Any]],
        paths: Mapping[str, Path] | None = None,
    ) -> None:
        """Record what the stage made.

        Args:
            result: its metrics and values.
            outputs: the producer stamp of each output.
            paths: the output directories, whose publishable pages are logged.
        """
        if not self.run_id:
            return
        self.log_metrics(result.metrics, step=0)
        self.flush()
        tags = graph.output_tags(outputs, result.values)
        if outputs:
            tags["valor.settings_digest"] = str(next(iter(outputs.values())).get("settings_digest", ""))
        with store.service_errors("recording outputs"):
            tags |= graph.log_outputs(store.client(), self.run_id, store.experiment_id(), outputs)
            pipeline_runs.set_tags(self.run_id, tags)
            for path in self._publishable(paths or {}):
                store.client().log_artifact(self.run_id, str(path))

    def _publishable(self, paths: Mapping[str, Path]) -> list[Path]:
        names = _PUBLISHED.get(self.stage, ())
        if self.publish_text:
            names += _PUBLISHED_WITH_TEXT.get(self.stage, ())
        return [folder / name for folder in paths.values() for name in names if (folder / name).is_file()]


@contextlib.contextmanager
def stage_run(
    stage: str,
    *,
    settings: Any,
    context: Context,
    inputs: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, str],
) -> Iterator[StageRun]:
    """Open the MLflow run of a stage; close it as FINISHED, FAILED or, when interrupted, KILLED.

    Args:
        stage: the stage's name.
        settings: its recipe section (pydantic).
        context: pipeline run and task.
        inputs: the producer stamp of each input.
        values: string parameters.

    Raises:
        ServiceError: MLflow cannot be reached.
    """
    global _active
    code = code_identity()
    run_id = _start(stage, settings, context, inputs, values, code) if store.enabled() else ""
    run = StageRun(stage=stage, run_id=run_id, code=code, publish_text=bool(getattr(settings, "publish_text", False)))
    previous, _active = _active, run
    try:
        yield run
    except BaseException as error:
        _end_failed(run, error)
        raise
    else:
        if run_id:
            with store.service_errors("closing the run"):
                store.client().set_terminated(run_id, "FINISHED")
    finally:
        _active = previous


def log_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Record metrics of the stage that runs in this process; does nothing outside a stage."""
    if _active is not None:
        _active.log_metrics(metrics, step)


@contextlib.contextmanager
def attached(stage: str, run_id: str) -> Iterator[None]:
    """Record this process's metrics in a run that its parent has opened and will close; "" records nothing.

    Raises:
        ServiceError: the store does not take the last of them. After an error of the block that is a line in the log.
    """
    global _active
    _active = StageRun(stage=stage, run_id=run_id, code={})
    try:
        yield
    except BaseException:
        try:
            _active.flush()
        except ValorError as second:
            log.warning("%s; %d metrics are lost", second, len(_active._pending))
        raise
    else:
        _active.flush()
    finally:
        _active = None


def active() -> StageRun | None:
    """Return the run of the stage that runs in this process, or None outside a stage."""
    return _active


def finish_pipeline(pipeline_run: str, status: str) -> None:
    """Close a pipeline run: its parent becomes FINISHED, FAILED or KILLED, children left running KILLED.

    This is the exit handler's part; a run that never reached MLflow has nothing to close. Leases of training stages
    need nothing here: they end with their holder.

    Args:
        pipeline_run: its id.
        status: MLflow's word, or KFP's final state of the pipeline (SUCCEEDED, FAILED, CANCELLED).
    """
    if store.enabled() and pipeline_run:
        pipeline_runs.finish(pipeline_run, _STATUS.get(status.upper(), "FAILED"))


@functools.cache
def code_identity() -> dict[str, Any]:
    """Return the code's `commit`, whether its tree was `dirty`, and the `image` it runs in ("" where unknown).

    VALOR_COMMIT (baked into images) comes before git; VALOR_IMAGE is set for every task (`pipelines.targets`).
    """
    commit, dirty = os.environ.get("VALOR_COMMIT", ""), False
    if not commit:
        found = _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
        commit, dirty = found.removesuffix("-dirty"), found.endswith("-dirty")
    return {"commit": commit, "dirty": dirty, "image": os.environ.get("VALOR_IMAGE", "")}


def _git(*arguments: str) -> str:
    """Ask git about the checkout that tracks this file; "" for an installed copy, even inside another checkout."""
    here = Path(__file__)
    try:
        for command in (("ls-files", "--error-unmatch", here.name), arguments):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=20, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _start(
    stage: str,
    settings: Any,
    context: Context,
    inputs: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, str],
    code: Mapping[str, Any],
) -> str:
    """Create the run with its tags, parameters and input edges; return its id."""
    settings_tree = settings.model_dump(mode="json")
    identity = {k: v for k, v in settings_tree.items() if k not in _PLACES}
    task = context.task or stage
    parents = {name: stamp["digest"] for name, stamp in inputs.items()}
    tags = {
        "valor.stage": stage,
        "valor.task": task,
        "valor.pipeline_run": context.pipeline_run,
        "valor.work": artifacts.digest_value([task, identity, parents, dict(values)]),
        "valor.settings_digest": artifacts.digest_value(identity),
        "valor.commit": code["commit"] + ("-dirty" if code["dirty"] else ""),
        "valor.image": code["image"],
        "mlflow.source.git.commit": code["commit"],
    }
    tags |= graph.input_tags(inputs, values)
    run_id = pipeline_runs.start_child(name=task, pipeline_run=context.pipeline_run, tags=tags)
    with store.service_errors("recording inputs"):
        # A place's default in the settings is not where the task read: a caller gives places as values.
        _log_params(run_id, identity | {name: values[name] for name in _PLACES if values.get(name)})
        graph.log_inputs(store.client(), run_id, inputs)
    return run_id


def _log_params(run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(k, v[:MAX_PARAM_CHARS]) for k, v in list(_flat(settings).items())[:MAX_PARAMS]]
    for start in range(0, len(params), 100):
        store.client().log_batch(run_id, params=params[start : start + 100])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as `section.key` -> text; lists stay whole, as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _end_failed(run: StageRun, error: BaseException) -> None:
    """Close the run after `error`, which stays the one that is reported even when MLflow is gone too."""
    if not run.run_id:
        return
    killed = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
    tags = {"valor.error": type(error).__name__}
    if isinstance(error, ValorError):
        # Only VALOR's own messages are known to hold no text of a patient.
        tags = {"valor.error": str(error)[:1000], "valor.exit_code": str(error.exit_code)}
    try:
        run.flush()
        pipeline_runs.set_tags(run.run_id, tags)
        with store.service_errors("closing the run"):
            store.client().set_terminated(run.run_id, "KILLED" if killed else "FAILED")
    except ValorError as second:
        log.warning("the run of %s stays open in MLflow: %s", run.stage, second)
