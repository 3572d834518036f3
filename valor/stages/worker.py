"""One of several processes that train a stage together: `python -m valor.stages.worker FOLDER`.

`accelerate launch` starts it (`valor.training.launch`). It runs the stage's function and nothing of what
`valor.stages.run` does around it: its parent does that. The first worker alone reports, commits and writes.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from valor import artifacts
from valor.context import Context
from valor.errors import Interrupted, ValorError
from valor.recipe import parse_section
from valor.stages import function_of, print_traceback
from valor.startup import spare_the_collector
from valor.tracking.runs import attached
from valor.training import launch


def main(folder: Path) -> int:
    """Train the task in the folder; return the exit code, and leave a verdict there unless it is 0."""
    spare_the_collector()
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    rank = int(os.environ["RANK"])
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    lost = False
    try:
        _train(folder, first=rank == 0)
    except ValorError as error:
        exit_code, line = error.exit_code, str(error)
        print_traceback(error)
    except Exception as error:
        # Its text may quote data, so only its type leaves the log.
        exit_code, line = 1, f"process {rank}: {type(error).__name__}; the traceback is in the task's log"
        lost = launch.is_lost_connection(error)
        print_traceback(error)
    else:
        return 0
    with contextlib.suppress(OSError):
        launch.write_verdict(folder, rank=rank, exit_code=exit_code, error=line, lost=lost)
    return exit_code


def _train(folder: Path, *, first: bool) -> None:
    task = artifacts.read_json(folder / launch.TASK)
    stage, context = task["stage"], Context(**task["context"])
    paths = {name: Path(path) for name, path in task["paths"].items()}
    with launch.joined(folder, task["ticket"]), attached(stage, task["mlflow_run"] if first else ""):
        try:
            result = function_of(stage)(parse_section(stage, task["settings"]), **paths, context=context)
        except BaseException:
            if first:
                # torch's launcher ends the others once one has left, and this one's last numbers are to be sent yet.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
    if first:
        artifacts.write_json(folder / launch.RESULT, dict(result.metrics))


def leave(exit_code: int) -> NoReturn:
    """End this process."""
    if exit_code:
        # No farewell to the others: they may wait for this one in an operation that will never be complete.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    import torch

    torch.distributed.destroy_process_group()
    sys.exit()


def _end_with_parent() -> None:
    """End this process at once when the parent has gone, which closes the pipe that is everybody's standard input."""
    while os.read(0, 1024):
        pass
    os._exit(Interrupted.exit_code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
