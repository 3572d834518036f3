"""The process that runs the compiled DAG with kfp.local: `python -m pipelines.local.child PIPELINE_YAML HOME`.

It leads a process group of its own, so that the parent can end it with everything below it. Its standard input is a
pipe from the parent: when that closes (the parent was killed), it ends the group itself. KFP's own output and
whatever a task prints outside its stage go to this process's output, which the parent keeps in `logs/pipeline.log`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from components.entry import FAILED
from valor import progress
from valor.artifacts import full_disk_is_a_resource_error
from valor.errors import Interrupted, ValorError
from valor.startup import spare_the_collector

GRACE_S = 22.0
"""How long tasks have between SIGTERM and SIGKILL: a training stage takes up to 20 s to end a step and save it
(`valor.training.callbacks`); every other task ends at once."""


def main() -> None:
    """Run the pipeline; exit with 0, 1 (a task failed, its own event says why) or a ValorError's code."""
    spare_the_collector()
    pipeline_path, home = Path(sys.argv[1]), Path(sys.argv[2])
    _end_with_parent()
    progress.set_task("pipeline")
    try:
        with full_disk_is_a_resource_error(home):
            _run(pipeline_path, home)
    except ValorError as error:
        progress.emit("fail", exit_code=error.exit_code, error=str(error))
        sys.exit(error.exit_code)


def _run(pipeline_path: Path, home: Path) -> None:
    from kfp import components, local

    from pipelines.local import cache, forked
    from valor.tracking.runs import initialise_store

    forked.install()
    # Several tasks that open a fresh SQLite store at once crash, so it is made before any of them.
    initialise_store()
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(home / "pipeline"),
        workspace_root=str(Path(os.environ["VALOR_RUN_DIR"]) / "workspace"),
        raise_on_error=True,
        enable_caching=True,
        cache_root=str(home / "cache"),
    )
    cache.install(home / "cache")
    pipeline = components.load_component_from_file(str(pipeline_path))
    pipeline()


def _end_with_parent() -> None:
    """Watch the parent's pipe from a thread; tasks get an empty standard input instead of it."""
    pipe = os.dup(0)
    os.set_inheritable(pipe, False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # A handler, not SIG_IGN: tasks would inherit an ignored signal through exec.
    signal.signal(signal.SIGTERM, _on_sigterm)
    threading.Thread(target=_watch, args=(pipe,), name="parent-watch", daemon=True).start()


def _on_sigterm(_signal: int, _frame: object) -> NoReturn:
    """Leave KFP's loop; tasks that its thread pool still starts end at once, because the run has failed."""
    with contextlib.suppress(OSError):
        Path(os.environ["VALOR_RUN_DIR"], FAILED).touch()
    sys.exit(Interrupted.exit_code)


def _watch(pipe: int) -> None:
    while os.read(pipe, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
