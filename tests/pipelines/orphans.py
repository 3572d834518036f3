"""A job of experiments that are killed: its process and theirs."""

import multiprocessing
import time
from multiprocessing.connection import Connection

from pipelines.experiments import run


def experiments(pipe: Connection) -> None:
    """Start a job as experiments do, and wait for it."""
    job = multiprocessing.get_context("forkserver").Process(target=work, args=(pipe,))
    job.start()
    job.join()


def work(pipe: Connection) -> None:
    """Tell the process id, then work for longer than any test."""
    run._end_with_parent()
    pipe.send(multiprocessing.current_process().pid)
    time.sleep(600)
