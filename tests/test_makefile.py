import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_make_alone_explains_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = make().stdout
    for target in phony.group(1).split():
        assert f"make {target} " in shown


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "bin/valor run phantom"),
        ("test", "-m pytest"),
        ("check", "lint-imports"),
        ("compile", "--target vertex"),
        ("bench", "tests/benchmarks/document.py"),
        ("ui", "bin/valor ui"),
    ],
)
def test_a_target_sets_itself_up_in_its_own_environment(target, command, tmp_path):
    dry = make("--dry-run", target, f"VENV={tmp_path / 'venv'}").stdout
    assert command in dry
    assert f"-m venv {tmp_path / 'venv'}" in dry
    assert "-c constraints.txt" in dry
    if target == "compile":
        assert "torch==" not in dry, "a laptop compiles without torch"


def test_an_older_python_is_refused_with_the_way_out(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = make("demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert refused.returncode != 0
    assert "older than Python 3.11" in refused.stderr + refused.stdout
