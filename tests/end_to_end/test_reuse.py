"""The whole recipe on a tree of DICOM files, then again after each kind of change: exactly what depends on it runs."""

import shutil
from pathlib import Path

import pytest
from valor_runs import MICRO, Run, valor_run

from valor.data import phantom
from valor.recipe import load

pytestmark = pytest.mark.slow

EVERYTHING = {
    "ingest-0", "ingest-1", "validate_data", "fetch_models", "sft", "grpo_text", "grpo_vision", "predict-sft",
    "predict-text", "predict-vision", "predict-champion", "evaluate", "gate", "register",
}  # fmt: skip
AFTER_A_CHAMPION = {"predict-champion", "evaluate", "gate", "register"}


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


def run(place: Path, *overrides: str) -> Run:
    places = (f"data.root={place / 'mimic'}", f"data.annotations_root={place / 'truth'}", "data.public=true")
    return valor_run(MICRO, *places, *overrides, home=place / "home", cwd=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for one home and the data beside it."""
    return tmp_path_factory.mktemp("reuse")


@pytest.fixture(scope="module")
def first(place: Path) -> Run:
    write_tree(place, studies=29)
    return run(place)


@pytest.fixture(scope="module")
def second(place: Path, first: Run) -> Run:
    return run(place)


@pytest.fixture(scope="module")
def third(place: Path, second: Run) -> Run:
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


def test_new_champion_reruns_only_what_compares_with_it(second: Run):
    assert second.executed() == AFTER_A_CHAMPION
    assert second.reused() == EVERYTHING - AFTER_A_CHAMPION
    assert "reused:" in second.output
    assert second.summary["tasks"]["register"]["values"]["version"] == "1", "the same weights are the same version"


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
