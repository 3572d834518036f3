"""Tasks as forks of a process that holds the libraries already (`pipelines.local.preload`).

`kfp.local` starts every task as `sh -c "... python3 -m kfp.dsl.executor_main ..."`, and each of some fifteen of them
would import torch, transformers and MLflow again, 5 to 7 s a time. A fork has them at once, and is otherwise what the
fresh process is: environment, standard streams, process group, exit status. Python's own fork server does the forking,
twice: most tasks need no torch, and the one that looks whether the data is there need not wait for it.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path

TRAINING_TASKS = frozenset({"fetch_models", "sft", "grpo_text", "grpo_vision", "predict", "predict_champion"})
_BEFORE_TRAINING = "validate_data"
_SOURCE = "ephemeral_component.py"
_STATUS = threading.Lock()
"""Held while exit statuses are read, which starting a process does too: a status can be read once."""


class _Ancestors:
    """The two processes that tasks are forks of."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.every, self.training = forkserver.ForkServer(), forkserver.ForkServer()
        self.every.set_forkserver_preload(["pipelines.local.preload.every"])
        self.training.set_forkserver_preload(["pipelines.local.preload.training"])

    def start(self, process: multiprocessing.process.BaseProcess, *, task: str) -> None:
        """Start a process of `context` as a fork of the ancestor that suits the task."""
        if task == _BEFORE_TRAINING:
            # The libraries load while the data is checked. A run that reuses this and all training never loads them.
            self.training.ensure_running()
        server = self.training if task in TRAINING_TASKS else self.every
        with _STATUS:
            # Python has one fork server, and this is where its processes ask for it.
            pythons = forkserver.connect_to_new_process
            forkserver.connect_to_new_process = server.connect_to_new_process
            try:
                process.start()
            finally:
                forkserver.connect_to_new_process = pythons


def install() -> None:
    """Make `kfp.local.SubprocessRunner` fork its tasks; what all of them need loads from now on, in the background."""
    from kfp.local import subprocess_task_handler

    ancestors = _Ancestors()
    ancestors.every.ensure_running()
    subprocess_task_handler.run_local_subprocess = functools.partial(_run, ancestors)


def _run(ancestors: _Ancestors, full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
    """Run a Python component's command in a fork and return its exit status, negative for a signal."""
    script = next(i for i, part in enumerate(full_command) if _SOURCE in part and '"$@"' in part)
    source, arguments = full_command[script + 1], list(full_command[script + 2 :])
    task = arguments[arguments.index("--function_to_execute") + 1]
    process = ancestors.context.Process(target=_execute, args=(source, arguments, dict(env_vars or {})))
    ancestors.start(process, task=task)
    connection.wait([process.sentinel])
    with _STATUS:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _execute(source: str, arguments: Sequence[str], env_vars: Mapping[str, str]) -> None:
    """Do in this process what KFP's shell command does in one of its own."""
    from kfp.dsl import executor_main

    # What the fork server has otherwise than a fresh process: it outlives SIGTERM, and its kind of start is inherited.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(env_vars)
    try:
        with tempfile.TemporaryDirectory() as directory:
            module = Path(directory, _SOURCE)
            module.write_text(source, encoding="utf-8")
            sys.argv = ["executor_main", "--component_module_path", str(module), *arguments]
            executor_main.executor_main()
    finally:
        # A fork leaves without them, and libraries remove their temporary files there.
        atexit._run_exitfuncs()
