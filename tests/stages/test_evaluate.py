import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valor import artifacts
from valor.context import Context
from valor.errors import IntegrityError
from valor.evaluation.predict import TABLE
from valor.recipe import EvaluationSettings
from valor.stages.evaluate import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
import handmade

SETTINGS = EvaluationSettings(bootstrap_samples=200, page_studies=10)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return handmade.build_inputs(tmp_path_factory.mktemp("inputs"), studies=24, image_px=128)


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "evaluation"
    result = evaluate(SETTINGS, **inputs, evaluation=out, context=Context())
    return out, result


def test_better_reports_score_better(evaluated):
    out, result = evaluated
    metrics = handmade.read_json(out / "metrics.json")
    assert metrics["studies"] == 24
    assert metrics["truth"] is True
    assert set(metrics["differences"]) == {"text-sft", "vision-text", "vision-sft"}
    for key in ("truth_f1_micro", "report_rouge_l", "grounding_difference"):
        assert metrics["differences"]["vision-sft"][key]["low"] > 0
    assert metrics["differences"]["vision-sft"]["report_hallucination"]["high"] < 0
    assert result.metrics["vision/truth_f1_micro"] == metrics["checkpoints"]["vision"]["truth_f1_micro"]["value"]
    assert not any("edema" in key for key in result.metrics)


def test_intervals_hold_their_values_and_differences_are_of_the_values(evaluated):
    metrics = handmade.read_json(evaluated[0] / "metrics.json")
    for found in metrics["checkpoints"].values():
        for cell in found.values():
            assert cell["value"] is None or cell["low"] <= cell["value"] + 0.2
            assert cell["value"] is None or cell["low"] <= cell["high"]
    vision, sft = (metrics["checkpoints"][name] for name in ("vision", "sft"))
    for key, cell in metrics["differences"]["vision-sft"].items():
        if cell["value"] is not None:
            assert cell["value"] == pytest.approx(vision[key]["value"] - sft[key]["value"])


def test_a_twin_counts_for_its_pair_and_for_nothing_else(inputs, evaluated, tmp_path):
    ids = sorted(pq.read_table(inputs["dataset"] / "shard-00000.parquet")["study_id"].to_pylist())
    evidence = handmade.empty_evidence(tmp_path / "evidence")
    for name in ("truth", "annotations"):
        (evidence / f"{name}.parquet").write_bytes((inputs["evidence"] / f"{name}.parquet").read_bytes())
    pair = {"study_id": ids[1], "twin_of": ids[0], "finding": "Edema", "change": "added"}
    pq.write_table(pa.Table.from_pylist([pair]), evidence / "pairs.parquet")
    evaluate(SETTINGS, **{**inputs, "evidence": evidence}, evaluation=tmp_path / "out", context=Context())
    metrics = handmade.read_json(tmp_path / "out" / "metrics.json")
    assert metrics["studies"] == 23
    assert metrics["checkpoints"]["sft"]["flip_rate"]["value"] in (0, 1)
    assert handmade.read_json(evaluated[0] / "metrics.json")["checkpoints"]["sft"]["flip_rate"]["value"] is None


def test_repeated_gives_the_same_bytes(inputs, evaluated, tmp_path):
    evaluate(SETTINGS, **inputs, evaluation=tmp_path / "again", context=Context())
    assert artifacts.digest_dir(tmp_path / "again") == artifacts.digest_dir(evaluated[0])


def test_only_the_page_holds_text(inputs, evaluated):
    out, _ = evaluated
    reports = [
        sentence
        for path in inputs["predictions"][:3]
        for row in pq.read_table(path / TABLE).to_pylist()
        for sentence in (row["reference"][:40], row["hypothesis"][:40])
        if len(sentence) > 20
    ]
    assert any(report in (out / "evaluation.html").read_text(encoding="utf-8") for report in reports)
    for name in ("metrics.json", "table.json", "summary.json", "summary.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert not any(report in text for report in reports)
        assert "base64" not in text
    table = pq.read_table(out / "scores.parquet")
    texts = [field.name for field in table.schema if str(field.type) in ("string", "large_string", "binary")]
    assert texts == ["checkpoint", "study_id", "subject_id"]
    assert table.num_rows == 3 * 24


def test_page_shows_the_worst_and_a_spread(evaluated):
    html = (evaluated[0] / "evaluation.html").read_text(encoding="utf-8")
    assert html.count('<article class="card"') == 10
    assert "10 of 24 studies: the 5 with the most errors" in html


def test_real_data_has_neither_truth_nor_masks(inputs, tmp_path):
    evidence = handmade.empty_evidence(tmp_path / "evidence")
    evaluate(SETTINGS, **{**inputs, "evidence": evidence}, evaluation=tmp_path / "out", context=Context())
    metrics = handmade.read_json(tmp_path / "out" / "metrics.json")
    assert metrics["truth"] is False
    assert not any(key.startswith("truth_") for key in metrics["measures"])
    assert metrics["checkpoints"]["sft"]["grounding_ratio"]["value"] is None
    assert "clinical performance" not in (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert "grounding_ratio" not in json.dumps(handmade.read_json(tmp_path / "out" / "table.json"))


def test_a_champion_is_compared(inputs, tmp_path):
    rows = pq.read_table(inputs["predictions"][0] / TABLE).to_pylist()
    champion = handmade.write_predictions(tmp_path / "champion", "champion", rows, checkpoint_digest="c" * 64)
    predictions = [*inputs["predictions"][:3], champion]
    evaluate(SETTINGS, **{**inputs, "predictions": predictions}, evaluation=tmp_path / "out", context=Context())
    metrics = handmade.read_json(tmp_path / "out" / "metrics.json")
    assert metrics["differences"]["sft-champion"]["truth_f1_micro"] == {"value": 0, "low": 0, "high": 0, "defined": 1}
    assert metrics["differences"]["vision-champion"] == metrics["differences"]["vision-sft"]


def test_another_dataset_is_refused_and_leaves_nothing(inputs, tmp_path):
    rows = pq.read_table(inputs["predictions"][0] / TABLE).to_pylist()
    other = handmade.write_predictions(tmp_path / "sft", "sft", rows, checkpoint_digest="c", digest="e" * 64)
    with pytest.raises(IntegrityError, match="predict again"):
        evaluate(SETTINGS, **{**inputs, "predictions": [other]}, evaluation=tmp_path / "out", context=Context())
    assert not (tmp_path / "out").exists()
