"""Run `valor` as a person would: a process, its exit code and what it printed."""

import subprocess
from pathlib import Path

import pytest
from local_runs import command, environment


@pytest.fixture
def valor(tmp_path):
    """Return a function that runs `valor ARGUMENTS` in a fresh home."""

    def call(*arguments: str, home: Path = tmp_path / "home") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=environment(home), capture_output=True, text=True, timeout=120, cwd=tmp_path
        )

    return call
