"""Whole runs of the `valor` command on the micro recipe, each in a home of its own."""

import contextlib
import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "tests" / "recipes" / "micro.yaml"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished `valor run` left behind."""

    returncode: int
    output: str
    summary: dict

    def executed(self) -> set[str]:
        """The tasks that did work, less those that are never reused."""
        done = {name for name, task in self.summary["tasks"].items() if task["state"] == "done"}
        return done - {"preflight", "finalize"}

    def reused(self) -> set[str]:
        return set(self.summary["reused"])

    def path(self, task: str, output: str) -> Path:
        return Path(self.summary["tasks"][task]["paths"][output])


def valor_run(
    recipe: str | Path,
    *overrides: str,
    home: Path,
    cwd: Path,
    check: bool = True,
    terminal: bool = False,
    **env: str,
) -> Run:
    """Run `valor run` as a person would, and read its summary; with `terminal`, standard output is one."""
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe)]
    for override in overrides:
        command += ["--set", override]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VALOR_", "MLFLOW_"))}
    environment = {**inherited, "VALOR_HOME": str(home), **env}
    options: dict = {"cwd": cwd, "env": environment}
    code, output = (_on_a_terminal if terminal else _through_pipes)(command, options)
    if check:
        assert code == 0, output[-4000:]
    summaries = sorted((home / "runs").glob("*/summary.json"), key=lambda p: p.stat().st_mtime)
    summary = json.loads(summaries[-1].read_text(encoding="utf-8")) if summaries else {}
    return Run(returncode=code, output=output, summary=summary)


def _through_pipes(command: list[str], options: dict) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
    return done.returncode, done.stdout + done.stderr


def _on_a_terminal(command: list[str], options: dict) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    output = b""
    # Reading a terminal that nobody holds open any more is an error, not an end.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            output += data
    os.close(ours)
    return process.wait(timeout=900), output.decode(errors="replace")
