"""Training the phantom's base, expert and judge, each in a process of its own: `python -m valor.models.train JOB`.

The parent (`train_phantoms`) starts all at once, each on one thread. A child writes its checkpoint directory atomically
and ends when its parent is gone; SIGTERM to the parent ends all.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.errors import BY_EXIT_CODE, Interrupted, ResourceError, ValorError
from valor.interruption import sigterm_interrupts
from valor.recipe import ModelSettings
from valor.startup import spare_the_collector

log = logging.getLogger(__name__)
_POLL_S = 0.2
_JUDGE_SEED_OFFSET = 1_000_003


def train_phantoms(
    jobs: Mapping[str, tuple[dict[str, Any], Path]], *, work: Path, done: Callable[[str], object]
) -> None:
    """Train the models of `jobs` concurrently.

    Args:
        jobs: kind (`base`, `expert`, `judge`) to (the recipe's models section as a dict, directory to make).
        work: an existing directory for the job files; none of them stays.
        done: called with the kind as soon as its directory is complete, so that it outlives a kill of the others.

    Raises:
        ValorError: what the first child that failed raised.
        Interrupted: SIGTERM.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    children: dict[str, subprocess.Popen[bytes]] = {}
    told_to_end = "fetch_models: told to end while training phantom models; run again to train them"
    with sigterm_interrupts(told_to_end), _files_vanish(jobs, work), _children_end(children):
        for kind, (settings, path) in jobs.items():
            job = work / f"{kind}.job.json"
            fields = {"kind": kind, "settings": settings, "path": str(path), "leads": not children}
            artifacts.write_json(job, {**fields, "parent": os.getpid()})
            children[kind] = subprocess.Popen([sys.executable, "-m", "valor.models.train", str(job)], env=environment)
        waiting = dict(children)
        while waiting:
            for kind, child in list(waiting.items()):
                code = child.poll()
                if code is not None:
                    _check(kind, code, work)
                    done(kind)
                    del waiting[kind]
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _children_end(children: Mapping[str, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    try:
        yield
    finally:
        for child in children.values():
            if child.poll() is None:
                child.terminate()
                child.wait()


@contextlib.contextmanager
def _files_vanish(jobs: Mapping[str, tuple[dict[str, Any], Path]], work: Path) -> Iterator[None]:
    """Remove the job files, and what a child that was killed had begun to write."""
    try:
        yield
    finally:
        for kind, (_, path) in jobs.items():
            for file in work.glob(f"{kind}.job.*"):
                file.unlink(missing_ok=True)
            shutil.rmtree(artifacts.partial_of(path), ignore_errors=True)


def _check(kind: str, code: int, work: Path) -> None:
    if code < 0:
        raise ResourceError(
            f"fetch_models: training the phantom {kind} was killed by signal {-code}; was memory short?"
        )
    if code:
        report = work / f"{kind}.job.error"
        line = (
            report.read_text(encoding="utf-8")
            if report.exists()
            else f"training the phantom {kind} failed, see the log"
        )
        raise BY_EXIT_CODE.get(code, ValorError)(line)


def main(job_path: Path) -> int:
    """Run one job in this process and return its exit code."""
    spare_the_collector()
    job = json.loads(job_path.read_text(encoding="utf-8"))
    check = stop_when_orphaned(job["parent"])
    try:
        check()
        _train(job, check)
    except Interrupted as error:
        return error.exit_code
    except ValorError as error:
        job_path.with_suffix(".error").write_text(str(error), encoding="utf-8")
        return error.exit_code
    return 0


def _train(job: Mapping[str, Any], check: Callable[[], None]) -> None:
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)
    settings = settings_of(job["kind"], ModelSettings.model_validate(job["settings"]))
    if job["kind"] == "base":
        from valor.models.train_base import train_base

        train_base(settings, path=Path(job["path"]), leads=job["leads"], check=check)
    else:
        from valor.models.train_expert import train_expert

        train_expert(settings, path=Path(job["path"]), leads=job["leads"], check=check)


def settings_of(kind: str, settings: ModelSettings) -> ModelSettings:
    """Return the settings to train a model by: a judge is an expert of its own subjects, from another seed."""
    if kind != "judge":
        return settings
    return settings.model_copy(
        update={"phantom_expert": settings.phantom_judge, "seed": settings.seed + _JUDGE_SEED_OFFSET}
    )


def stop_when_orphaned(parent: int) -> Callable[[], None]:
    """Return a check that raises Interrupted once process `parent` (killed with no chance to say so) is gone."""

    def check() -> None:
        if os.getppid() != parent:
            raise Interrupted("fetch_models: the parent process is gone")

    return check


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
