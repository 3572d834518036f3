"""Run jobs side by side, each as a fork of a process that holds the libraries, in the order of what they need.

A job that was cut off continues where it was: its stage has its work in progress. One that fails takes along those that
need it; all others are run, then the run ends with the first one's error. Run again, everything finished is skipped.
Experiments may run side by side on one root: a job that another one is at is waited for. No job outlives its
experiments, however they end.
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from pipelines.experiments.execute import code_digest, execute
from pipelines.experiments.jobs import Job, with_ancestors
from valor import artifacts
from valor.errors import BY_EXIT_CODE, Interrupted, ResourceError, UserError, ValorError

VERDICT = "verdict.json"
"""Why a job ended without a result; gone once it is tried again."""
_LOCK = "lock"
"""Locked by the process that runs the job for as long as it lives."""
_GRACE_S = 30.0


def run(jobs: Sequence[Job], *, root: Path, cores: int, say: Callable[[str], None] = print) -> None:
    """Run every job that has no result yet.

    Args:
        jobs: in an order in which each comes after what it needs (`with_ancestors`).
        root: where results are kept.
        cores: how many may be busy at once.
        say: prints a line.

    Raises:
        UserError: a result is there that other code made.
        Interrupted: SIGTERM or Ctrl-C; the jobs have saved what they had.
        ValorError: a job failed; its log is named.
        ValueError: a job needs one that is neither done nor among the jobs.
    """
    code = code_digest()
    waiting = [job for job in jobs if not job.is_done(root)]
    require_made_by(jobs, root, code)
    listed = {job.key for job in jobs}
    for job in waiting:
        for output in job.inputs.values():
            if output.job.key not in listed and not output.job.is_done(root):
                raise ValueError(f"{job.name}: needs {output.job.name}, which is neither done nor among the jobs")
    say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done; results in {root}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.local.preload.training"])
    running: dict[Any, tuple[Job, float]] = {}
    total, begun = len(waiting), time.monotonic()
    failed: dict[str, tuple[Job, int]] = {}
    with _environment(root), _all_end(running):
        while waiting or running:
            for job in [job for job in waiting if any(i.job.key in failed for i in job.inputs.values())]:
                waiting.remove(job)
                failed[job.key] = (job, 0)
                say(f"{job.name}: not run, it needs what failed")
            for job in _ready(waiting, [job for job, _ in running.values()], root=root, cores=cores):
                waiting.remove(job)
                process = context.Process(target=_run_one, args=(job, root, code))
                process.start()
                running[process] = (job, time.monotonic())
            if not running:
                continue
            connection.wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                job, start = running.pop(process)
                process.join()
                if process.exitcode:
                    failed[job.key] = (job, process.exitcode)
                    if not (job.folder(root) / VERDICT).is_file():
                        _write_verdict(job, root, f"ended with status {process.exitcode}, so it was killed or broke")
                    say(f"{job.name}: FAILED, {_verdict(job, root)}")
                    continue
                done, spent = total - len(waiting) - len(running), time.monotonic() - begun
                say(f"[{done}/{total}, {spent / 60:.0f} min] {job.name}: {time.monotonic() - start:.0f} s")
    if failed:
        first, status = next(iter(failed.values()))
        # A job that somebody else told to end is a failure of that job, as is one that was killed; these experiments
        # go on. One that broke is neither a verdict nor a lack of anything.
        was_ended = status < 0 or status == Interrupted.exit_code
        kind = ResourceError if was_ended else BY_EXIT_CODE.get(status, ValorError)
        raise kind(f"{first.name}: {_verdict(first, root)}; its folder is {first.folder(root)}")


def verdict_on(job: Job, root: Path) -> str | None:
    """Return why a job has no result: its verdict, or that of what it needs; None if it has one or never failed."""
    if job.is_done(root):
        return None
    for needed in with_ancestors([job]):
        if not needed.is_done(root) and (verdict := _verdict(needed, root)):
            return f"{needed.name}: {verdict}"
    return None


def _run_one(job: Job, root: Path, code: str) -> None:
    # Stages run processes of their own; the kind of start is inherited otherwise.
    multiprocessing.set_start_method(None, force=True)
    # The fork server outlives SIGTERM; its forks must not, and they may wait before a stage listens to it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()
    try:
        _run_once(job, root, code)
    except Interrupted as error:
        raise SystemExit(error.exit_code) from None
    except ValorError as error:
        _write_verdict(job, root, str(error))
        raise SystemExit(error.exit_code) from None


def _run_once(job: Job, root: Path, code: str) -> None:
    """Run a job unless other experiments are at it, whose result is as good."""
    with _alone(job, root):
        if job.is_done(root):
            require_made_by([job], root, code)
            return
        (job.folder(root) / VERDICT).unlink(missing_ok=True)
        execute(job, root, code=code)


@contextlib.contextmanager
def _alone(job: Job, root: Path) -> Iterator[None]:
    """Be the only process at a job, after another one has ended; the kernel unlocks what a killed one held."""
    job.folder(root).mkdir(parents=True, exist_ok=True)
    with (job.folder(root) / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{job.name}: other experiments are at it; waiting for them", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    """End this process as `_all_end` would, should the experiments die without a chance to: killed, or out of memory.

    Their death closes the pipe behind `parent_process`; the fork server, whose child this is, ends by itself.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a job runs in a process of its own"

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def require_made_by(jobs: Sequence[Job], root: Path, code: str) -> None:
    """Raise UserError where a result that is there was made by other code."""
    for job in jobs:
        if job.is_done(root) and (made_by := job.record(root)["code"]) != code:
            raise UserError(
                f"{job.name}: was made by code {made_by}, and this is code {code}, so it cannot be compared with what "
                f"is to come; go on with that code, or delete {job.folder(root)}"
            )


def _ready(waiting: Sequence[Job], busy: Sequence[Job], *, root: Path, cores: int) -> Iterator[Job]:
    """Yield the jobs that can start now: what they need is there, and cores are free."""
    free = cores - sum(job.cores for job in busy)
    for job in list(waiting):
        fits = job.cores <= free or (not busy and free == cores)
        if fits and all(output.job.is_done(root) for output in job.inputs.values()):
            free -= job.cores
            yield job
        if free <= 0:
            return


def _write_verdict(job: Job, root: Path, verdict: str) -> None:
    job.folder(root).mkdir(parents=True, exist_ok=True)
    artifacts.write_json(job.folder(root) / VERDICT, {"job": job.name, "verdict": verdict})


def _verdict(job: Job, root: Path) -> str | None:
    path = job.folder(root) / VERDICT
    return artifacts.read_json(path).get("verdict", "failed, and did not say why") if path.is_file() else None


@contextlib.contextmanager
def _environment(root: Path) -> Iterator[None]:
    """Set what the fork server and its forks read, which are started within the block and inherit it."""
    ours = {
        "MLFLOW_EXPERIMENT_NAME": os.environ.get("MLFLOW_EXPERIMENT_NAME", "valor-experiments"),
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
        "VALOR_HOME": str(root),
        "VALOR_VERBOSE_ERRORS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _all_end(running: dict) -> Iterator[None]:
    """Let no job outlive this process: SIGTERM and Ctrl-C reach them, and they save what they have."""

    def stop(number: int, _: object) -> None:
        raise Interrupted("experiments: told to end; what is finished is kept, run again to continue")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            process.terminate()
        for process in running:
            process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
