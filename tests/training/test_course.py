"""The course that the training stages share: whose code its work in progress belongs to."""

import shutil
from pathlib import Path

import pytest

from valor import artifacts
from valor.training import course


def digest_of_code(root: Path, monkeypatch, stage: str = "sft") -> str:
    """Return the digest of a copy of the package, as a stage's identity holds it."""
    monkeypatch.setattr(artifacts, "__file__", str(root / "artifacts.py"))
    return artifacts.digest_code([part.format(stage=stage) for part in course._CODE], ())


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("recipe/trainer_defaults.py", True),
        ("training/advantages.py", True),
        ("stages/sft.py", True),
        ("stages/gate.py", False),
        ("serving/reporter.py", False),
    ],
)
def test_code_that_changes_the_weights_changes_the_place_of_work(tmp_path, monkeypatch, file, counts):
    package = tmp_path / "valor"
    shutil.copytree(Path(artifacts.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of_code(package, monkeypatch)
    with (package / file).open("a") as source:
        source.write("\n# Another line.\n")
    assert (digest_of_code(package, monkeypatch) != before) == counts
