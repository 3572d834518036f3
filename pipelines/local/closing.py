"""The end of a local run: `summary.json`, and what a person reads last."""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.local.state import RunState, Task
from valor.artifacts import read_json, write_json
from valor.errors import BY_EXIT_CODE, GateRefused, Interrupted, ResourceError
from valor.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.local.runner import Ending

TAIL_LINES = 30


def close(recipe: Recipe, ending: "Ending", *, home: Path, run_dir: Path) -> int:
    """Write the summary, print how the run ended and return the exit code."""
    code, error = _verdict(ending, run_dir=run_dir)
    try:
        write_json(run_dir / "summary.json", _summary(ending, exit_code=code, error=error, run_dir=run_dir))
    except OSError:
        # A full disk does not hide how the run failed; a run that went well is not whole without its summary.
        if not code:
            raise
    if code and code != GateRefused.exit_code:
        _print_failure(ending.state.failed(), code=code, error=error, run_dir=run_dir)
    else:
        _print_result(recipe, ending, refused=error, home=home)
    return code


def _verdict(ending: "Ending", *, run_dir: Path) -> tuple[int, str]:
    """Return the run's exit code and its one line."""
    state = ending.state
    if ending.signal:
        return Interrupted.exit_code, (
            "interrupted; everything was ended. Run again: finished tasks are reused, a stage in training goes on from "
            "its last save, and another task begins again"
        )
    failed = state.failed()
    if failed:
        return failed.exit_code, failed.error
    if ending.status in BY_EXIT_CODE:
        return ending.status, f"pipeline: ended with exit code {ending.status}; see {_log(run_dir, 'pipeline')}"
    if ending.status < 0:
        return ResourceError.exit_code, (
            f"pipeline: its process was killed by signal {-ending.status}, most often for want of memory "
            f"(peak {ending.peak_bytes / 2**30:.1f} GiB); run again to continue"
        )
    dead = state.dead()
    if dead:
        return ResourceError.exit_code, (
            f"{dead.name}: ended without a word, so it was killed, most often for want of memory or disk "
            f"(peak {ending.peak_bytes / 2**30:.1f} GiB); its log is {_log(run_dir, dead.name)}"
        )
    waiting = [name for name in state.expected if state.tasks[name].state == "waiting" and not _may_wait(name)]
    if ending.status or waiting:
        what = f"{', '.join(waiting)} did not run" if waiting else "the exit handler failed"
        return 1, f"pipeline: {what}; see {_log(run_dir, 'pipeline')}"
    gate = state.tasks["gate"]
    if _gate_verdict(gate) != "pass":
        return GateRefused.exit_code, "gate: refused the candidate; the evidence is kept"
    return 0, ""


def _may_wait(task: str) -> bool:
    """Tell whether a run can be whole without a task: a refused version, or a shard that the source left empty."""
    return task == "register" or task.startswith("ingest-")


def _gate_verdict(gate: Task) -> str:
    """Return pass or refuse: a fresh task names its value `verdict`, a reused one KFP's `Output`."""
    return gate.values.get("verdict") or gate.values.get("Output", "")


def _summary(ending: "Ending", *, exit_code: int, error: str, run_dir: Path) -> dict[str, Any]:
    now = time.time()
    return {
        "run": run_dir.name,
        "exit_code": exit_code,
        "error": error,
        "seconds": round(ending.seconds, 1),
        "peak_memory_bytes": ending.peak_bytes,
        "reused": ending.state.reused(),
        "tasks": {
            task.name: {
                "state": task.state,
                "seconds": round(task.seconds(now), 1),
                "metrics": task.metrics,
                "values": task.values,
                "paths": task.paths,
            }
            for task in ending.state.tasks.values()
        },
    }


def _print_failure(failed: Task | None, *, code: int, error: str, run_dir: Path) -> None:
    """Print a failure: one line; for an unexpected one also the end of its log."""
    print(f"valor: error: {error}", file=sys.stderr)
    if code != 1:
        return
    log = _log(run_dir, failed.name if failed else "pipeline")
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(["", f"the last lines of {log}:", *lines[-TAIL_LINES:]]), file=sys.stderr)


def _print_result(recipe: Recipe, ending: "Ending", *, refused: str, home: Path) -> None:
    state = ending.state
    print()
    evaluation = Path(state.tasks["evaluate"].paths["evaluation"])
    print(_stage_table(evaluation))
    print()
    verdict = Path(state.tasks["gate"].paths["verdict"])
    if refused:
        print((verdict / "verdict.md").read_text(encoding="utf-8"))
    else:
        print(f"gate      passed: {_rules(read_json(verdict / 'verdict.json'))}   ({verdict / 'verdict.md'})")
    print(f"page      {evaluation / 'evaluation.html'}")
    print(f"data      {Path(state.tasks['validate_data'].paths['data_docs']) / 'index.html'}")
    print(f"model     {_model(recipe, state, refused)}")
    if state.reused():
        print(f"reused:   {', '.join(_folded(state.reused()))}")
    print(f"took      {ending.seconds:.0f} s, peak memory {ending.peak_bytes / 2**30:.2f} GiB")
    print(f"MLflow    {_valor()} ui   (or: make ui)")
    if refused:
        print(f"valor: {refused}", file=sys.stderr)


def _stage_table(evaluation: Path) -> str:
    from valor.evaluation.table import render_text

    return render_text(read_json(evaluation / "table.json"))


def _model(recipe: Recipe, state: RunState, refused: str) -> str:
    if refused:
        return "no new version: the gate refused the candidate"
    register = state.tasks["register"]
    version = register.values.get("version") or register.values.get("Output", "")
    return f"{recipe.registry.model_name}/{version}   ({_valor()} lineage {recipe.registry.model_name}/{version})"


def _rules(verdict: Mapping[str, Any]) -> str:
    applied = [rule for rule in verdict["rules"] if rule["applicable"]]
    waived = len(verdict["rules"]) - len(applied)
    return f"{len(applied)} rules hold" + (f", {waived} not applicable without a champion" if waived else "")


def _valor() -> str:
    """Return the command as a person has to type it here: an environment that is not active is not on the path."""
    if shutil.which("valor"):
        return "valor"
    program = Path(sys.executable).with_name("valor")
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def _folded(names: list[str]) -> list[str]:
    """Return the names with a fan-out's members as one: ingest-0, ingest-1 -> ingest."""
    return list(dict.fromkeys("ingest" if name.startswith("ingest-") else name for name in names))


def _log(run_dir: Path, task: str) -> Path:
    return run_dir / "logs" / f"{task}.log"
