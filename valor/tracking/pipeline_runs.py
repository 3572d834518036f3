"""Parent and child runs: one parent per pipeline run, found by its tag from any process on any machine.

KFP's MLflow plugin may inject MLFLOW_RUN_ID. An injected run that has a parent is the task's own run and becomes
the stage's; any other becomes the pipeline's parent.
"""

import logging
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from valor.tracking import store

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)
PARENT = "mlflow.parentRunId"
RUNNER = "VALOR_RUNNER"
"""Environment variable: the process (`this_process`) without which a pipeline run is over, where there is one."""


def start_child(*, name: str, pipeline_run: str, tags: Mapping[str, str]) -> str:
    """Create (or adopt) a stage's run under its pipeline's parent and return its id.

    Runs of the same work that an earlier, killed process left open in this pipeline run are closed as KILLED.
    """
    client = store.client()
    injected = os.environ.get("MLFLOW_RUN_ID", "")
    tags = {**tags, "valor.process": this_process()}
    with store.service_errors("opening the run"):
        if injected and PARENT in client.get_run(injected).data.tags:
            set_tags(injected, tags)
            return injected
        if pipeline_run:
            tags[PARENT] = injected or parent(pipeline_run)
            if injected:
                client.set_tag(injected, "valor.pipeline_run", pipeline_run)
                client.set_tag(injected, "valor.role", "pipeline")
            _close_left_open(f"tags.`valor.work` = '{tags['valor.work']}' and tags.`{PARENT}` = '{tags[PARENT]}'")
        run = client.create_run(store.experiment_id(), tags={**tags, "mlflow.source.name": "valor"}, run_name=name)
    return run.info.run_id


def parent(pipeline_run: str) -> str:
    """Return the id of a pipeline run's parent, creating it where it is missing.

    Tasks that start at the same time may both create one; the oldest stays, so all agree without a lock.
    """
    found = find_parent(pipeline_run)
    if found is not None:
        return found.info.run_id
    _close_dead_processes()
    tags = {"valor.pipeline_run": pipeline_run, "valor.role": "pipeline", "mlflow.source.name": "valor"}
    if runner := os.environ.get(RUNNER):
        tags["valor.process"] = runner
    created = store.client().create_run(store.experiment_id(), tags=tags, run_name=pipeline_run)
    oldest = find_parent(pipeline_run)
    if oldest is not None and oldest.info.run_id != created.info.run_id:
        store.client().delete_run(created.info.run_id)
        return oldest.info.run_id
    return created.info.run_id


def find_parent(pipeline_run: str) -> "Run | None":
    """Return the parent run of a pipeline run, or None."""
    query = f"tags.`valor.pipeline_run` = '{_quoted(pipeline_run)}' and tags.`valor.role` = 'pipeline'"
    found = search(query)
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def search(query: str) -> list["Run"]:
    """Return the runs of all experiments that meet an MLflow filter, newest first.

    All, because a reader such as `valor lineage` knows the version and not the experiment that its runs went to.
    """
    experiments = [experiment.experiment_id for experiment in store.client().search_experiments()]
    return list(store.client().search_runs(experiments, filter_string=query, max_results=1000))


def set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags in as few requests as MLflow allows."""
    from mlflow.entities import RunTag

    items = [RunTag(key, value) for key, value in tags.items()]
    with store.service_errors("recording tags"):
        for start in range(0, len(items), 100):
            store.client().log_batch(run_id, tags=items[start : start + 100])


def finish(pipeline_run: str, status: str) -> None:
    """Close the parent as `status` and the children that are still open as KILLED."""
    with store.service_errors("closing the pipeline run"):
        found = find_parent(pipeline_run)
        if found is not None:
            _close_left_open(f"tags.`{PARENT}` = '{found.info.run_id}'")
            store.client().set_terminated(found.info.run_id, status)


def _close_left_open(query: str) -> None:
    for run in search(f"attributes.status = 'RUNNING' and {query}"):
        store.client().set_terminated(run.info.run_id, "KILLED")
        log.info("closed run %s, which a killed process left open", run.info.run_id)


def _close_dead_processes() -> None:
    """Close runs whose process, on this machine, is gone: SIGKILL leaves them open in earlier pipeline runs."""
    host = f"{socket.gethostname()}:"
    for run in search("attributes.status = 'RUNNING' and tags.`valor.process` LIKE '%'"):
        process = run.data.tags.get("valor.process", "")
        if process.startswith(host) and not _lives(process):
            store.client().set_terminated(run.info.run_id, "KILLED")


def this_process() -> str:
    """Return host, number and start time of this process: no other process will ever be called the same."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def _lives(process: str) -> bool:
    """Tell whether the process still runs; its start time guards against a number that was given out again."""
    import psutil

    _, pid, started = process.rsplit(":", 2)
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
    except psutil.NoSuchProcess:
        return False


def _quoted(text: str) -> str:
    return text.replace("'", "")
