"""Run a recipe on this machine: compile, start the child that runs kfp.local, follow its events, tell how it ended.

The parent only watches. Everything that computes is below the child (`pipelines.local.child`), in a session of its
own, so that one signal ends it.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.compiling import compile_recipe
from pipelines.dag import task_names
from pipelines.local import closing, processes
from pipelines.local.child import GRACE_S
from pipelines.local.state import EventTail, RunState
from pipelines.local.view import make_view
from valor.context import home
from valor.errors import UserError
from valor.recipe import Recipe
from valor.stages import VERBOSE_ERRORS
from valor.tracking.pipeline_runs import RUNNER, this_process
from valor.tracking.store import enabled

POLL_S = 0.25
MEMORY_S = 3.0
"""Between two looks at the tree's memory: the kernel walks page tables for it."""
CLOSE_TRACKING_S = 15.0


@dataclasses.dataclass
class Ending:
    """How a run ended: its state, the child's exit status, its peak memory, and the signal that stopped it (or 0)."""

    state: RunState
    status: int
    peak_bytes: int
    seconds: float
    signal: int = 0


def run(recipe: Recipe) -> int:
    """Run a recipe; return the exit code (docs/architecture.md, "Errors and exit codes").

    Raises:
        UserError: another run works in this home, or the machine lacks the training libraries.
    """
    _require_training_libraries()
    place = home()
    # Reports and images of patients may come to lie here.
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A second Ctrl-C must not keep the first one from ending in a summary, so signals are caught to the very end.
    with _only_run_in(place), processes.signals() as caught:
        run_id = f"{recipe.name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')[:-3]}"
        run_dir = place / "runs" / run_id
        (run_dir / "logs").mkdir(parents=True)
        pipeline = run_dir / "pipeline.yaml"
        compile_recipe(recipe, target="local", output=pipeline)
        print(f"run {run_id}: logs in {run_dir / 'logs'}", flush=True)
        if not enabled():
            print("note: VALOR_TRACKING is off, and a version needs MLflow: the run will end at register", flush=True)
        ending = _follow(recipe, pipeline, place=place, run_dir=run_dir, caught=caught)
        return closing.close(recipe, ending, home=place, run_dir=run_dir)


def _follow(recipe: Recipe, pipeline: Path, *, place: Path, run_dir: Path, caught: list[int]) -> Ending:
    """Start the child and show its events until it ends or a signal comes."""
    state, view, tail = RunState(task_names(recipe.data.shards)), make_view(), EventTail(run_dir / "events.jsonl")
    begun, peak, last_memory = time.monotonic(), 0, 0.0
    memory = 0
    with (
        contextlib.closing(view),
        _child(recipe, pipeline, place=place, run_dir=run_dir) as child,
    ):
        while not caught:
            ended = child.poll() is not None
            if time.monotonic() - last_memory >= MEMORY_S:
                memory, last_memory = processes.memory_bytes(child.pid), time.monotonic()
                peak = max(peak, memory)
            changed = {event["task"] for event in tail.read() if state.apply(event)}
            view.update(state, changed=[state.tasks[name] for name in sorted(changed)], memory_bytes=memory)
            if ended:
                break
            time.sleep(POLL_S)
    if caught:
        _close_tracking(run_dir.name, environment=_environment(recipe, place=place, run_dir=run_dir))
    return Ending(
        state=state,
        status=child.returncode,
        peak_bytes=peak,
        seconds=time.monotonic() - begun,
        signal=caught[0] if caught else 0,
    )


def _environment(recipe: Recipe, *, place: Path, run_dir: Path) -> dict[str, str]:
    """Return the environment of everything below this process."""
    environment = {
        **os.environ,
        "VALOR_HOME": str(place),
        "VALOR_RUN_DIR": str(run_dir),
        "VALOR_PIPELINE_RUN": run_dir.name,
        RUNNER: this_process(),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.setdefault("MLFLOW_EXPERIMENT_NAME", recipe.registry.experiment)
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Threads that spin while they wait starve whoever they wait for: on two busy cores SFT took ten times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if recipe.publish_text:
        environment.setdefault(VERBOSE_ERRORS, "1")
    if {recipe.models.base, recipe.models.expert, recipe.models.judge} <= {"phantom", ""}:
        # Nothing comes from a model hub: without this, libraries wait for one that may not be reachable.
        environment.setdefault("HF_HUB_OFFLINE", "1")
    return environment


@contextlib.contextmanager
def _child(recipe: Recipe, pipeline: Path, *, place: Path, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child; whatever happens, its whole tree is gone at the end of the block."""
    command = [sys.executable, "-m", "pipelines.local.child", str(pipeline), str(place)]
    with (run_dir / "logs" / "pipeline.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(recipe, place=place, run_dir=run_dir),
            start_new_session=True,
        )
    try:
        yield child
    finally:
        processes.end_tree(child, grace_s=GRACE_S)


def _close_tracking(run_id: str, *, environment: dict[str, str]) -> None:
    """Mark the MLflow run as killed: the exit handler was ended with everything else. A slow store is let be."""
    code = "import sys; from valor.tracking.runs import finish_pipeline; finish_pipeline(sys.argv[1], 'KILLED')"
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", code, run_id],
            env=environment,
            capture_output=True,
            timeout=CLOSE_TRACKING_S,
            check=False,
            # In a session of its own: a terminal sends Ctrl-C to the whole foreground group.
            start_new_session=True,
        )


@contextlib.contextmanager
def _only_run_in(place: Path) -> Iterator[None]:
    """Hold the home's lock: two runs at once would share a cache, a store and work in progress."""
    with (place / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{place}: another `valor run` works here (process {lock.read().strip() or '?'}); "
                "wait for it, or set VALOR_HOME to another directory"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _require_training_libraries() -> None:
    import importlib.util

    for library in ("torch", "transformers", "trl", "mlflow", "psutil"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed; a local run needs pip install 'valor-rrg[train]'")
