"""Several processes for one training stage: `accelerate launch`, its configuration, and what becomes of the workers.

The stage's own process (the parent) holds the work in progress, records and stamps. Where the stage asks for more than
one process it loads no model but starts `accelerate launch`, which starts one worker per GPU (`valor.stages.worker`).
The workers train together; the first of them commits checkpoints and writes the artifact. Parent and workers share a
folder: the task, the first worker's numbers, a worker's verdict, and the parent's wish that they end. Their standard
input is a pipe from the parent, so that they end with it even where it was killed.

Several nodes are started by somebody else, each with this same stage (`valor.training.processes`). Left out: elastic
training and restarts; a retry continues.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from valor import artifacts, storage
from valor.context import Context
from valor.errors import BY_EXIT_CODE, Interrupted, ResourceError, UserError, ValorError
from valor.recipe import TrainStage
from valor.training.processes import accelerate_config, node_of, zero3_config
from valor.training.work import Work, join_work, open_work, place_of, repeat_verdict

WORKER = "valor.stages.worker"
TASK, RESULT, TOLD = "task.json", "result.json", "told-to-end"
"""Files of the shared folder; `verdict-<rank>.json` beside them."""
_POLL_S = 0.2
_END_S = 10.0
_OF_A_PROCESS_GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Environment variables that a cluster sets for its own way of starting; the configuration says the same by itself."""


@dataclasses.dataclass(frozen=True)
class Team:
    """What a worker knows of the others: the work in progress that the parent holds, and whether they are told to end.

    Attributes:
        work: commits for the parent's lease.
        folder: shared with the parent.
    """

    work: Work
    folder: Path

    def is_set(self) -> bool:
        """Tell whether the parent was told to end; under the name of an event's method, for which it stands."""
        return (self.folder / TOLD).exists()


_team: Team | None = None


def team() -> Team | None:
    """Return the team that this process trains in, or None in a stage's own process."""
    return _team


@contextlib.contextmanager
def joined(folder: Path, ticket: Mapping[str, Any]) -> Iterator[None]:
    """Make this process a worker while the block runs.

    Args:
        folder: shared with the parent.
        ticket: of the parent's work in progress (`Work.ticket`).
    """
    global _team
    _team = Team(join_work(ticket), folder)
    try:
        yield
    finally:
        _team = None


def train(
    stage: str,
    settings: TrainStage,
    *,
    identity: dict[str, Any],
    inputs: Mapping[str, Path],
    checkpoint: Path,
    context: Context,
    work_root: str,
) -> tuple[dict[str, float], Callable[[], None]]:
    """Train a stage with several processes; see `valor.training.course.train` for what it returns and raises.

    Raises:
        ValorError: of the worker that failed first.
        Interrupted: SIGTERM; the workers have left a checkpoint.
    """
    import torch

    from valor.tracking.runs import active
    from valor.training.callbacks import sigterm

    node = node_of(settings)
    if settings.nodes > 1 and storage.is_remote(work_root):
        raise UserError(f"nodes is {settings.nodes}: VALOR_WORK_ROOT is {work_root}, expected a folder of all nodes")
    with contextlib.ExitStack() as stack:
        if node.rank == 0:
            work = stack.enter_context(open_work(work_root, identity=identity, pipeline_run=context.pipeline_run))
            ticket, cleanup = work.ticket, work.remove
        else:
            place = place_of(work_root, identity)
            # The first node ends with it, and would never be there to train with.
            repeat_verdict(place, context.pipeline_run)
            ticket, cleanup = {"place": place, "scratch": place, "holder": {}}, _nothing
        told = stack.enter_context(sigterm())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="valor-launch-")))
        run = active()
        task = {
            "stage": stage,
            "settings": settings.model_dump_json(),
            "paths": {name: str(path) for name, path in {**inputs, "checkpoint": checkpoint}.items()},
            "context": dataclasses.asdict(context),
            "ticket": ticket,
            "mlflow_run": run.run_id if run else "",
        }
        artifacts.write_json(folder / TASK, task)
        artifacts.write_json(folder / "zero3.json", zero3_config())
        config = accelerate_config(
            settings, node=node, zero_path=folder / "zero3.json", cpu=not torch.accelerator.is_available()
        )
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        status = _run_workers(folder, told)
        if status:
            raise _failure(stage, settings, folder, status=status, told=told.is_set())
        result = folder / RESULT
        return (artifacts.read_json(result) if result.exists() else {}), cleanup


def _run_workers(folder: Path, told: Any) -> int:
    """Start the launcher, tell its workers when to end, and return its exit status."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml"),
        "--module", WORKER, str(folder),
    ]  # fmt: skip
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_PROCESS_GROUP and not name.startswith("PET_")
    }
    # A session of its own: torch's launcher gives its workers 30 s after a signal to the group, which may be too few
    # for the end of a step and a checkpoint. They learn it from the folder.
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        while launcher.poll() is None:
            if told.is_set():
                (folder / TOLD).touch()
            time.sleep(_POLL_S)
        return launcher.returncode
    finally:
        _end(launcher)


def _end(launcher: "subprocess.Popen[bytes]") -> None:
    """End the launcher and its workers where they still run: by their standard input, and by force where that fails.

    torch starts each worker in a session of its own, so no signal to a group reaches them, and a launcher that is
    killed leaves them behind: one that is stuck in a kernel would keep its GPU when the lease is another's already.
    """
    import psutil

    assert launcher.stdin is not None
    family: list[psutil.Process] = []
    if launcher.poll() is None:
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    launcher.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(_END_S)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


def write_verdict(folder: Path, *, rank: int, exit_code: int, error: str, lost: bool = False) -> None:
    """Leave a worker's failure for the parent; `lost` where another worker's end was all that ailed it."""
    verdict = {"exit_code": exit_code, "error": error, "lost": lost, "time": time.time()}
    artifacts.write_json(folder / f"verdict-{rank}.json", verdict)


def is_lost_connection(error: Exception) -> bool:
    """Tell whether an error says no more than that another process is gone."""
    from torch.distributed import DistBackendError, DistNetworkError

    if isinstance(error, DistBackendError | DistNetworkError):
        return True
    # gloo has no class of its own for it; a store's or tracker's lost connection is an OSError.
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gone)


def _failure(stage: str, settings: TrainStage, folder: Path, *, status: int, told: bool) -> ValorError:
    """Return what the first worker that failed said. Where one ends, the others fail for their lost connection."""
    verdicts = [artifacts.read_json(path) for path in folder.glob("verdict-*.json")]
    if own := [verdict for verdict in verdicts if not verdict["lost"]]:
        first = min(own, key=lambda verdict: (verdict["exit_code"] == 1, verdict["time"]))
        return BY_EXIT_CODE.get(first["exit_code"], ValorError)(first["error"])
    if told:
        return Interrupted(f"{stage}: told to end before its first checkpoint; run again")
    who = "one of its processes" if verdicts else f"its {settings.processes} processes"
    return ResourceError(
        f"{stage}: {who} ended without a word (accelerate launch: exit status {status}); was one killed for lack of "
        "memory? The log says more"
    )


def _nothing() -> None: ...
