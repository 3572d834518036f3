"""What a user may get wrong: one line on the screen, the right exit code, no traceback."""

from pathlib import Path

import pytest
from study_trees import mimic_tree
from valor_runs import MICRO, valor_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("override", "exit_code", "says"),
    [
        ("data.rot=/x", 2, "did you mean 'root'"),
        ("sft.trainer.learning_rat=1", 2, "did you mean 'learning_rate'"),
        ("data.root=/no/such/place", 2, "data.public: true"),
    ],
)
def test_settings_that_cannot_work(override: str, exit_code: int, says: str, tmp_path: Path):
    run = valor_run(MICRO, override, home=tmp_path / "home", cwd=tmp_path, check=False)
    assert run.returncode == exit_code, run.output
    assert says in run.output
    assert "Traceback" not in run.output
    assert run.output.count("valor: error:") == 1


def test_all_studies_rejected(tmp_path: Path):
    tree = mimic_tree(tmp_path / "mimic")
    for report in (tmp_path / "mimic").rglob("s*.txt"):
        report.write_text("", encoding="utf-8")
    run = valor_run(
        MICRO, f"data.root={tree.root}", "publish_text=false", home=tmp_path / "home", cwd=tmp_path, check=False
    )
    assert run.returncode == 3, run.output
    assert "Traceback" not in run.output
    assert run.executed() <= {"ingest-0", "ingest-1"}, "nothing trains on rejected data"


def test_unreachable_tracking_server(tmp_path: Path):
    run = valor_run(MICRO, home=tmp_path / "home", cwd=tmp_path, check=False, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert run.returncode == 5, run.output
    assert "127.0.0.1:9" in run.output
    assert "Traceback" not in run.output
