"""The whole recipe on a tree of DICOM files, then again after each kind of change: exactly what depends on it runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from study_trees import chest, dicom_bytes
from valor_runs import MICRO, Run, valor_run

from valor import artifacts, stages
from valor.context import Context
from valor.data import phantom
from valor.data.manifest import QUARANTINE
from valor.recipe import SECTION_OF_STAGE, load

pytestmark = pytest.mark.slow

EVERYTHING = {
    "ingest-0", "ingest-1", "validate_data", "fetch_models", "sft", "grpo_text", "grpo_vision", "predict-sft",
    "predict-text", "predict-vision", "predict-champion", "evaluate", "gate", "register",
}  # fmt: skip
AFTER_A_CHAMPION = {"predict-champion", "evaluate", "gate", "register"}
BAD = {
    "undecodable": (dicom_bytes(chest(1))[:900], "FINDINGS: No effusion."),
    "not_radiograph": (dicom_bytes(chest(2), Modality="CT"), "FINDINGS: No effusion."),
    "colour": (dicom_bytes(chest(3), PhotometricInterpretation="RGB", SamplesPerPixel=3), "FINDINGS: No effusion."),
    "empty_report": (dicom_bytes(chest(4)), "FINDINGS: ___"),
}
"""Studies that cannot be used, by the reason that quarantine gives: file and report."""
POD_INPUTS = {
    "ingest-0": {},
    "validate_data": {"shards": [("ingest-0", "output"), ("ingest-1", "output")]},
    "fetch_models": {},
    "sft": {"dataset": ("validate_data", "dataset"), "base": ("fetch_models", "base")},
    "grpo_text": {"dataset": ("validate_data", "dataset"), "parent": ("sft", "checkpoint")},
    "grpo_vision": {
        "dataset": ("validate_data", "dataset"),
        "parent": ("grpo_text", "checkpoint"),
        "expert": ("fetch_models", "expert"),
    },
    "predict-vision": {
        "dataset": ("validate_data", "dataset"),
        "checkpoint": ("grpo_vision", "checkpoint"),
        "judge": ("fetch_models", "judge"),
    },
    "predict-champion": {"dataset": ("validate_data", "dataset"), "judge": ("fetch_models", "judge")},
    "evaluate": {
        "dataset": ("validate_data", "dataset"),
        "evidence": ("validate_data", "evidence"),
        "predictions": [(f"predict-{name}", "predictions") for name in ("sft", "text", "vision", "champion")],
    },
    "gate": {"evaluation": ("evaluate", "evaluation")},
}
"""What each task is given, as (task, output) of the first run; `register` and `finalize` need that run's tracking."""
NOT_REPEATED = {"data_docs"}
"""Outputs that hold the time of day."""


def write_tree(place: Path, *, studies: int) -> None:
    """Put the recipe's first phantom studies where a hospital would, leaving files alone that are there already."""
    settings = load(MICRO).data.phantom
    keys = phantom.plan(settings)[:studies]
    fresh = place / f"fresh-{studies}"
    phantom.write(
        [phantom.draw(key, settings) for key in keys],
        root=fresh / "mimic",
        annotations_root=fresh / "truth",
        settings=settings,
    )
    for source in (path for path in fresh.rglob("*") if path.is_file()):
        target = place / source.relative_to(fresh)
        if not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def write_bad_studies(place: Path) -> None:
    """Put studies that cannot be used among the good ones."""
    for number, (image, report) in enumerate(BAD.values(), start=1):
        folder = place / "mimic" / "files" / "p19" / f"p1900000{number}"
        (folder / f"s5900000{number}").mkdir(parents=True)
        (folder / f"s5900000{number}" / f"bad-{number}.dcm").write_bytes(image)
        (folder / f"s5900000{number}.txt").write_text(f" FINAL REPORT\n {report}\n", encoding="utf-8")


def run(place: Path, *overrides: str, **options: bool) -> Run:
    places = (f"data.root={place / 'mimic'}", f"data.annotations_root={place / 'truth'}", "data.public=true")
    return valor_run(MICRO, *places, *overrides, home=place / "home", cwd=place, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for one home and the data beside it."""
    return tmp_path_factory.mktemp("reuse")


@pytest.fixture(scope="module")
def first(place: Path) -> Run:
    write_tree(place, studies=29)
    write_bad_studies(place)
    return run(place)


@pytest.fixture(scope="module")
def second(place: Path, first: Run) -> Run:
    return run(place, terminal=True)


@pytest.fixture(scope="module")
def refused(place: Path, second: Run) -> Run:
    """A rule on what untrained models leave undefined: no evidence, so no version."""
    rules = "[{metric: truth_side_accuracy, against: sft, margin: 1.0}]"
    return run(place, f"gate.rules={rules}", check=False)


@pytest.fixture(scope="module")
def third(place: Path, refused: Run) -> Run:
    """Other weights of the stage-1 rewards."""
    return run(place, "grpo_text.rewards=[{name: clinical_agreement_reward, weight: 0.5}, {name: gleu_reward}]")


@pytest.fixture(scope="module")
def fourth(place: Path, third: Run) -> Run:
    """One study more at the same address."""
    write_tree(place, studies=30)
    return run(place, "grpo_text.rewards=[{name: clinical_agreement_reward, weight: 0.5}, {name: gleu_reward}]")


def test_first_run_executes_everything_and_registers(first: Run):
    assert first.executed() == EVERYTHING
    assert first.reused() == set()
    assert first.summary["tasks"]["register"]["values"]["version"] == "1"
    assert (first.path("evaluate", "evaluation") / "evaluation.html").stat().st_size > 10_000
    assert "valor-micro" in first.output
    assert "make ui" in first.output


def test_studies_that_cannot_be_used_are_counted_and_the_run_goes_on(first: Run):
    metrics = first.summary["tasks"]["validate_data"]["metrics"]
    assert (metrics["studies"], metrics["quarantined_studies"]) == (29, len(BAD))
    table = pq.read_table(first.path("validate_data", "dataset") / QUARANTINE).to_pylist()
    assert sorted(row["reason"] for row in table) == sorted(BAD)


@pytest.fixture
def hidden_home(place: Path, first: Run) -> Iterator[Path]:
    """Move the first run's home away, so that nothing of it can be reached where it was."""
    away = (place / "home").rename(place / "away")
    yield away
    away.rename(place / "home")


@pytest.mark.parametrize("task", POD_INPUTS)
def test_a_task_needs_its_declared_inputs_and_nothing_else(task, first, hidden_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.delenv("VALOR_HOME", raising=False)

    def copied(source: tuple[str, str] | list) -> Path | list[Path]:
        if isinstance(source, list):
            return [copied(one) for one in source]
        made = hidden_home / first.path(*source).relative_to(hidden_home.with_name("home"))
        return shutil.copytree(made, tmp_path / "inputs" / "-".join(source))

    stage, _, name = task.partition("-")
    outputs = [output for output in first.summary["tasks"][task]["paths"]]
    result = stages.run(
        stage,
        settings_json=load(MICRO).section_json(SECTION_OF_STAGE[stage]),
        context=Context(task=task, pipeline_run="pod", work_root=str(tmp_path / "work")),
        inputs={given: copied(source) for given, source in POD_INPUTS[task].items()},
        outputs={output: tmp_path / output for output in outputs},
        values=_values(stage, name, first, root=hidden_home.parent),
    )
    for output in set(outputs) - NOT_REPEATED:
        there = hidden_home / first.path(task, output).relative_to(hidden_home.with_name("home"))
        assert artifacts.read_stamp(tmp_path / output)["digest"] == artifacts.read_stamp(there)["digest"], output
    assert result.values == {k: v for k, v in first.summary["tasks"][task]["values"].items() if k in result.values}
    assert {path.name for path in tmp_path.iterdir()} <= {"inputs", "work", *outputs}


def _values(stage: str, name: str, first: Run, *, root: Path) -> dict[str, str]:
    looked = first.summary["tasks"]["preflight"]["values"]
    shard = json.dumps(json.loads(looked["shards"])[0], sort_keys=True)
    return {
        "ingest": {"root": str(root / "mimic"), "annotations_root": str(root / "truth"), "shard": shard},
        "fetch_models": {"models_digest": looked["models_digest"]},
        "predict": {"name": name},
        "gate": {"champion_digest": ""},
    }.get(stage, {})


def test_new_champion_reruns_only_what_compares_with_it(second: Run):
    assert second.executed() == AFTER_A_CHAMPION
    assert second.reused() == EVERYTHING - AFTER_A_CHAMPION
    assert "reused:" in second.output
    assert second.summary["tasks"]["register"]["values"]["version"] == "1", "the same weights are the same version"


def test_a_terminal_shows_the_tasks_live(second: Run):
    assert "\x1b[" in second.output
    assert "memory" in second.output
    assert "reused" in second.output
    assert '{"task"' not in second.output


def test_a_refusal_is_a_result_with_its_reasons_and_exit_code_4(refused: Run):
    assert refused.returncode == 4
    assert refused.executed() == {"gate"}
    assert "truth_side_accuracy" in refused.output
    assert "no new version: the gate refused the candidate" in refused.output
    assert "Traceback" not in refused.output
    assert (refused.path("gate", "verdict") / "verdict.md").exists(), "the evidence is kept"


def test_edited_reward_reruns_stage_one_and_what_follows(third: Run):
    assert third.executed() == {
        "grpo_text", "grpo_vision", "predict-text", "predict-vision", "evaluate", "gate", "register",
    }  # fmt: skip
    assert {"ingest-0", "ingest-1", "validate_data", "fetch_models", "sft", "predict-sft"} <= third.reused()


def test_added_study_is_seen_and_reaches_everything_but_its_neighbours(first: Run, fourth: Run):
    kept = [name for name in ("ingest-0", "ingest-1") if name in fourth.reused()]
    assert len(kept) == 1, "one study lies in one shard"
    assert fourth.executed() == EVERYTHING - {"fetch_models", *kept}
    before = first.summary["tasks"]["validate_data"]["metrics"]["studies"]
    assert fourth.summary["tasks"]["validate_data"]["metrics"]["studies"] == before + 1
