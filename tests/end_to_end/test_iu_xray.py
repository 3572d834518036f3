"""The built-in recipe for Open-i on its real reports, with drawn images under their real names."""

import json
from pathlib import Path

import pytest
from study_trees import SHARED, openi_tree
from valor_runs import Run, valor_run

from valor.data.reports import parse_openi

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "openi").is_dir(), reason="no shared data"),
]

# Tiny models and few steps, and a gate that only asks for numbers: what is tested is the way, not the result.
SMALL = (
    "data.image_px=96",
    "evaluation.bootstrap_samples=50",
    "evaluation.page_studies=5",
    "models.phantom_base={subjects: 16, vision_width: 32, vision_layers: 2, text_width: 32, text_layers: 2, "
    "vocab: 400, tower_steps: 3, language_steps: 3}",
    "models.phantom_expert={subjects: 16, held_out_subjects: 12, vision_width: 32, vision_layers: 2, text_width: 32, "
    "text_layers: 2, vocab: 400, steps: 3}",
    "sft.trainer={max_steps: 3, per_device_train_batch_size: 4}",
    "grpo_text.trainer={max_steps: 2, per_device_train_batch_size: 8, num_generations: 4}",
    "grpo_vision.trainer={max_steps: 2, per_device_train_batch_size: 8, num_generations: 4}",
    "grpo_text.max_new_tokens=16",
    "grpo_vision.max_new_tokens=16",
    "predict={max_new_tokens: 16, batch_size: 32}",
    "gate.rules=[{metric: report_f1_micro, against: sft, margin: 1.0}]",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("iu_xray")


@pytest.fixture(scope="module")
def finished(place: Path) -> Run:
    root = openi_tree(place / "openi")
    return valor_run("iu_xray", f"data.root={root}", *[f"{s}" for s in SMALL], home=place / "home", cwd=place)


def test_recipe_runs_to_the_gate_on_real_reports(finished: Run):
    metrics = finished.summary["tasks"]["validate_data"]["metrics"]
    assert metrics["studies"] > 280
    assert finished.summary["tasks"]["gate"]["values"]["verdict"] == "pass"
    evaluation = json.loads((finished.path("evaluate", "evaluation") / "metrics.json").read_text(encoding="utf-8"))
    assert "report_f1_micro" in json.dumps(evaluation)
    assert "truth_f1_micro" not in json.dumps(evaluation), "real reports come without truth"


def test_no_report_text_leaves_the_restricted_places(finished: Run, place: Path):
    sentences = set()
    for file in (place / "openi").rglob("*.xml"):
        report = parse_openi(file.read_bytes()).report
        for text in (report.findings, report.impression):
            sentences |= {s.strip() for s in (text or "").split(".") if len(s.split()) >= 7}
    assert len(sentences) > 300
    home = place / "home"
    public = [home / "mlflow.db", *(home / "mlartifacts").rglob("*"), *(home / "runs").rglob("*")]
    texts = {path: path.read_bytes().decode("utf-8", errors="replace") for path in public if path.is_file()}
    assert any("metrics" in text for text in texts.values())
    leaks = {path.name for path, text in texts.items() for sentence in sentences if sentence in text}
    assert not leaks
    page = (finished.path("evaluate", "evaluation") / "evaluation.html").read_text(encoding="utf-8")
    assert any(sentence in page for sentence in sentences), "the restricted page is where the text belongs"
