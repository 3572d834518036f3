"""A stage's digest follows the code that it imports, and no other code."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import valor
from pipelines.local import codedigest
from valor.recipe import SECTION_OF_STAGE

PRINT = (
    "import json, sys; sys.path.insert(0, sys.argv[1]);"
    "from pipelines.local.codedigest import code_digest; from valor.recipe import SECTION_OF_STAGE;"
    "print(json.dumps({s: code_digest(s) for s in SECTION_OF_STAGE}))"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the sources that a test may edit."""
    root = Path(valor.__file__).parents[1]
    folder = tmp_path_factory.mktemp("sources")
    for package in ("valor", "components", "pipelines"):
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def digests(folder):
    done = subprocess.run(
        [sys.executable, "-c", PRINT, str(folder)], check=True, capture_output=True, text=True, cwd=folder
    )
    return json.loads(done.stdout)


def changed_by(copy, path, text="\n# edited\n"):
    """Return the stages whose digest changes when a file of the copy is edited."""
    before, file = digests(copy), copy / path
    original = file.read_text()
    try:
        file.write_text(original + text)
        after = digests(copy)
    finally:
        file.write_text(original)
    return {stage for stage in SECTION_OF_STAGE if before[stage] != after[stage]}


def test_a_place_is_no_identity(copy):
    assert digests(copy) == {stage: codedigest.code_digest(stage) for stage in SECTION_OF_STAGE}


def test_an_edited_reward_changes_the_rewarded_stage_and_no_data_task(copy):
    changed = changed_by(copy, "valor/rewards/text.py")
    assert "grpo_text" in changed
    assert not changed & {"preflight", "ingest", "validate_data", "fetch_models", "sft", "predict", "evaluate", "gate"}


def test_an_edited_adapter_changes_ingest_though_it_is_imported_by_name(copy):
    changed = changed_by(copy, "valor/data/adapters/openi.py")
    assert "ingest" in changed
    assert not changed & {"sft", "grpo_text", "grpo_vision", "predict", "gate"}


@pytest.mark.parametrize("module", ["page", "measures"])
def test_an_edited_evaluation_changes_evaluate_and_no_training(copy, module):
    changed = changed_by(copy, f"valor/evaluation/{module}.py")
    assert "evaluate" in changed
    assert not changed & {"ingest", "sft", "grpo_text", "grpo_vision", "predict"}


def test_an_edit_that_nothing_imports_changes_nothing(copy):
    assert changed_by(copy, "valor/__main__.py") == set()


def test_library_versions_count(monkeypatch):
    before = codedigest.code_digest("sft")
    monkeypatch.setattr(codedigest, "_versions", lambda: {"torch": "0.0"})
    assert codedigest.code_digest("sft") != before


def test_every_library_that_computes_counts_installed_or_not(monkeypatch):
    pyproject = tomllib.loads((Path(valor.__file__).parents[1] / "pyproject.toml").read_text())
    named = {re.split("[<>=]", line)[0] for line in pyproject["project"]["optional-dependencies"]["train"]}
    # They record and watch a stage's work, and draw pages that no stage writes.
    assert named - set(codedigest.LIBRARIES) == {"mlflow", "psutil", "matplotlib"}
    monkeypatch.setattr(codedigest, "LIBRARIES", ("torch", "no-such-library"))
    versions = codedigest._versions.__wrapped__()
    assert versions["no-such-library"] == "absent"
    assert versions["torch"] not in ("", "absent")


def test_every_import_by_name_is_declared():
    """The entry reaches stages by name, which is what the digest starts from; all others must be in the table."""
    root = Path(valor.__file__).parent
    found = {
        f"valor.{path.relative_to(root).with_suffix('').as_posix().replace('/', '.')}"
        for path in root.rglob("*.py")
        if "import_module(" in path.read_text()
    }
    assert found - {"valor.stages.__init__"} <= set(codedigest.REACHED_BY_NAME)
