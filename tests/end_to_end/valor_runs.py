"""Whole runs of the `valor` command on the micro recipe, each in a home of its own."""

import dataclasses
import json
import os
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


def valor_run(recipe: str | Path, *overrides: str, home: Path, cwd: Path, check: bool = True, **env: str) -> Run:
    """Run `valor run` as a person would, and read its summary."""
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe)]
    for override in overrides:
        command += ["--set", override]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VALOR_", "MLFLOW_"))}
    environment = {**inherited, "VALOR_HOME": str(home), **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    output = done.stdout + done.stderr
    if check:
        assert done.returncode == 0, output[-4000:]
    summaries = sorted((home / "runs").glob("*/summary.json"), key=lambda p: p.stat().st_mtime)
    summary = json.loads(summaries[-1].read_text(encoding="utf-8")) if summaries else {}
    return Run(returncode=done.returncode, output=output, summary=summary)
