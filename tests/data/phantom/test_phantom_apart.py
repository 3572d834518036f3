"""Nothing that learns or scores may know the phantom's grammar, truth or drawing."""

import ast
import inspect
from pathlib import Path

import pytest

import valor
from valor import stages

ROOT = Path(valor.__file__).parent
FORBIDDEN = ("rewards", "metrics", "clinical", "training", "evaluation", "serving")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_phantom_in_what_learns_or_scores(package):
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    assert not [path.name for path in files if any("data.phantom" in name for name in imports(path))]


@pytest.mark.parametrize(
    "part", ["rewards", "training", *(f"stages/{s}.py" for s in ("sft", "grpo_text", "grpo_vision"))]
)
def test_what_trains_reads_no_evidence(part):
    """Truth and annotations are the evaluation's."""
    files = sorted((ROOT / part).glob("**/*.py")) or [ROOT / part]
    read = {
        name for path in files for name in imports(path) if name.startswith(("valor.evaluation", "valor.data.phantom"))
    }
    assert read == set()
    takes = inspect.signature(stages.function_of(files[0].stem)).parameters if part.endswith(".py") else {}
    assert "evidence" not in takes
    assert "evidence" in inspect.signature(stages.function_of("evaluate")).parameters, "where it is read"


def test_models_learn_from_what_the_phantom_hands_out_and_from_nothing_else_of_it():
    files = sorted((ROOT / "models").glob("**/*.py"))
    used = {name for path in files for name in imports(path) if "data.phantom" in name}
    assert used == {"valor.data.phantom.samples"}


def test_the_check_sees_an_import():
    assert any("data.phantom" in name for name in imports(Path(__file__).with_name("test_phantom_keys.py")))
