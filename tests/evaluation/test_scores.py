import numpy as np
import pytest

from valor.clinical.labeler import label
from valor.clinical.vocabulary import OBSERVATIONS
from valor.evaluation import scores
from valor.evaluation.bootstrap import Sums
from valor.evaluation.inputs import Pair, Predictions, Present, Truth
from valor.evaluation.measures import measures
from valor.metrics import bleu, clinical

REFS = [
    "FINDINGS: There is a large left pleural effusion. The heart is enlarged.",
    "FINDINGS: No pleural effusion. No pneumothorax. Heart size is normal.",
    "FINDINGS: Right pneumothorax. IMPRESSION: Possible edema.",
]
HYPS = [
    "FINDINGS: There is a right pleural effusion. No pneumothorax.",
    "FINDINGS: There is a left pneumothorax.",
    "FINDINGS: Right pneumothorax. Mild edema.",
]


def present(*findings, side="left"):
    return {f: Present(sides=frozenset({side}), zone="", severity="") for f in findings}


def predictions(hyps=HYPS, refs=REFS, **changes):
    rows = [
        {"study_id": f"s{i}", "subject_id": f"p{i}", "reference": ref, "hypothesis": hyp, "hypothesis_tokens": 7,
         "truncated": False, "similarity": 0.5, "reference_similarity": 0.6, "attention": [],
         "image_box": [0.0, 0.0, 1.0, 1.0], **changes}
        for i, (ref, hyp) in enumerate(zip(refs, hyps, strict=True))
    ]  # fmt: skip
    return Predictions(name="sft", checkpoint_digest="c", dataset_digest="d", split="test", rows=rows)


def evaluate(one, truth=None, masks=None):
    references = {row["study_id"]: scores.read_report(row["reference"]) for row in one.rows}
    hypotheses = {row["study_id"]: scores.read_report(row["hypothesis"]) for row in one.rows}
    expected = scores.expectations(references, truth)
    table = scores.table(one, hypotheses, expected, masks or {})
    sums = Sums(scores.COLUMNS, table.sum(axis=0, keepdims=True))
    held = {
        source: [f for f in OBSERVATIONS if any(f in e.present for e in expected[source].values())]
        for source in expected
    }
    return {m.name: float(m.compute(sums)[0]) for m in measures(truth=truth is not None, findings=held)}


def test_counts_agree_with_the_clinical_metrics():
    found = evaluate(predictions())
    totals = clinical.counts(reference_labels=[label(r) for r in REFS], hypothesis_labels=[label(h) for h in HYPS])
    theirs = clinical.scores(totals.sum(axis=0))
    assert found["report_f1_micro"] == pytest.approx(theirs["micro_f1"])
    assert found["report_hallucination"] == pytest.approx(theirs["hallucination_rate"])
    assert found["report_omission"] == pytest.approx(theirs["omission_rate"])
    assert found["report_precision_micro"] == pytest.approx(1 - found["report_hallucination"])
    assert found["report_recall_micro"] == pytest.approx(1 - found["report_omission"])


def test_corpus_bleu_is_that_of_the_metric():
    found = evaluate(predictions())
    for name, value in bleu.bleu_corpus(refs=REFS, hyps=HYPS).items():
        assert found[f"report_{name}"] == pytest.approx(value)


def test_own_report_scores_full_and_silence_scores_nothing():
    same = evaluate(predictions(hyps=REFS))
    assert [same[f"report_{k}"] for k in ("f1_micro", "f1_macro", "rouge_l", "gleu", "bleu_4", "side_accuracy")] == [
        1
    ] * 6
    assert same["report_hallucination"] == same["report_omission"] == same["empty"] == 0
    silent = evaluate(predictions(hyps=["", "", ""]))
    assert silent["report_f1_micro"] == 0
    assert silent["report_omission"] == silent["empty"] == 1
    assert silent["report_abnormal_recall"] == 0
    assert silent["report_normal_recall"] == 1
    assert silent["report_bleu_1"] == silent["report_gleu"] == 0
    assert np.isnan(silent["report_hallucination"])


def test_the_wrong_side_is_a_match_of_the_finding_but_not_of_the_side():
    found = evaluate(predictions())
    assert found["report_recall_pleural_effusion"] == 1
    assert found["report_side_accuracy"] == pytest.approx(1 / 2)


def test_pneumonia_names_the_consolidation_that_is_there_and_is_one_error_where_there_is_none():
    truth = Truth(
        findings=("Consolidation", "Pneumonia"),
        studies={"s0": present("Consolidation"), "s1": {}},
        implied={"s0": frozenset({"Pneumonia"}), "s1": frozenset()},
    )
    text = "Left pneumonia."
    found = evaluate(predictions(hyps=[text, text], refs=REFS[:2]), truth)
    assert found["truth_recall_consolidation"] == found["truth_side_accuracy"] == 1
    assert found["truth_hallucination"] == pytest.approx(1 / 2)
    assert found["truth_omission"] == 0
    silent = evaluate(predictions(hyps=["Left opacity.", "Clear lungs."], refs=REFS[:2]), truth)
    assert silent["truth_omission"] == 1


@pytest.mark.parametrize("invented", ["Probable pneumonia.", "Consolidation.", "Left opacity.", "Edema."])
def test_an_invention_raises_no_score(invented):
    studies = {"s0": present("Consolidation"), "s1": {}, "s2": present("Edema")}
    truth = Truth(findings=OBSERVATIONS, studies=studies, implied={
        "s0": frozenset({"Pneumonia", "Lung Opacity"}), "s1": frozenset(), "s2": frozenset({"Lung Opacity"}),
    })  # fmt: skip
    texts = ["Left consolidation.", "Clear lungs.", "Pulmonary edema."]
    before = evaluate(predictions(hyps=texts), truth)
    after = evaluate(predictions(hyps=[f"{text} {invented}" for text in texts]), truth)
    assert after["truth_f1_micro"] < before["truth_f1_micro"] == 1
    for name in ("truth_f1_macro", "truth_precision_macro"):
        # An opacity that is not there may be any kind of opacity, so no finding's own row holds it.
        assert after[name] < before[name] == 1 or (invented == "Left opacity." and after[name] == 1)
    if invented == "Probable pneumonia.":
        assert after["truth_precision_consolidation"] == pytest.approx(1 / 3)


def test_all_names_of_a_consolidation_that_is_not_there_are_one_error():
    truth = Truth(findings=OBSERVATIONS, studies={"s0": {}, "s1": present("Edema")}, implied={
        "s0": frozenset(), "s1": frozenset({"Lung Opacity"}),
    })  # fmt: skip
    many = "Left lower lobe opacity. Left lower lobe consolidation, compatible with pneumonia."
    found = evaluate(predictions(hyps=[many, f"Pulmonary edema. {many}"], refs=REFS[:2]), truth)
    assert found["truth_hallucination"] == pytest.approx(2 / 3)
    assert found["report_hallucination"] > 0.5
    two = evaluate(predictions(hyps=[f"{many} Atelectasis.", "Pulmonary edema."], refs=REFS[:2]), truth)
    assert two["truth_hallucination"] == pytest.approx(2 / 3)


def test_truth_and_report_are_judged_apart():
    truth = Truth(
        findings=("Pleural Effusion", "Pneumothorax", "Edema"),
        studies={"s0": present("Pleural Effusion", side="right"), "s1": present("Pneumothorax"), "s2": {}},
        implied={"s0": frozenset(), "s1": frozenset(), "s2": frozenset()},
    )
    found = evaluate(predictions(), truth)
    # The reports of s1 and s2 are wrong, the model is right about s1.
    assert found["truth_recall_pneumothorax"] == 1
    assert found["report_recall_pneumothorax"] == 1
    assert found["truth_precision_pneumothorax"] == pytest.approx(1 / 2)
    assert found["truth_hallucination"] == pytest.approx(2 / 4)
    assert found["truth_omission"] == 0
    assert found["truth_side_accuracy"] == 1


def test_an_implied_finding_is_neither_match_nor_omission():
    with_implied = Truth(
        findings=OBSERVATIONS,
        studies={f"s{i}": present("Edema") for i in range(3)},
        implied={f"s{i}": frozenset({"Lung Opacity"}) for i in range(3)},
    )
    refs = ["FINDINGS: Pulmonary edema."] * 3
    silent_on_it = evaluate(predictions(refs=refs, hyps=["Pulmonary edema."] * 3), with_implied)
    naming_it = evaluate(predictions(refs=refs, hyps=["Pulmonary edema. There is a lung opacity."] * 3), with_implied)
    assert silent_on_it["truth_f1_micro"] == naming_it["truth_f1_micro"] == 1
    assert naming_it["report_hallucination"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("change", "original", "twin", "told_apart"),
    [
        ("added", "The lungs are clear.", "There is a left pneumothorax.", True),
        ("added", "The lungs are clear.", "The lungs are clear.", False),
        ("added", "There is a left pneumothorax.", "There is a left pneumothorax.", False),
        ("added", "There is a left pneumothorax.", "The lungs are clear.", False),
        ("moved", "There is a right pneumothorax.", "There is a left pneumothorax.", True),
        ("moved", "There is a left pneumothorax.", "There is a right pneumothorax.", False),
        ("moved", "There is a pneumothorax.", "There is a pneumothorax.", False),
    ],
)
def test_a_pair_is_told_apart_by_reports_that_are_right_about_both_images(change, original, twin, told_apart):
    before = present("Pneumothorax", side="right") if change == "moved" else {}
    truth = Truth(
        findings=("Pneumothorax",),
        studies={"a": before, "b": present("Pneumothorax")},
        implied={"a": frozenset(), "b": frozenset()},
    )
    said = {"a": scores.read_report(original), "b": scores.read_report(twin)}
    pair = Pair(study="a", twin="b", finding="Pneumothorax", change=change)
    assert scores.flipped(pair, said, truth) is told_apart
    removed = Pair(study="b", twin="a", finding="Pneumothorax", change="removed" if change == "added" else change)
    assert scores.flipped(removed, said, truth) is told_apart


def test_devices_make_no_study_abnormal():
    refs = ["A left chest wall pacemaker is seen. The lungs are clear."] * 3
    found = evaluate(predictions(refs=refs, hyps=["There is a pacemaker."] * 3))
    assert found["report_normal_recall"] == 1
    assert np.isnan(found["report_abnormal_recall"])


def test_a_missing_similarity_is_left_out_not_zero():
    one = predictions()
    one.rows[0]["similarity"] = float("nan")
    assert evaluate(one)["similarity"] == pytest.approx(0.5)


def test_grounding_counts_only_findings_that_are_there_and_outlined():
    grid = np.zeros((4, 4))
    grid[0, 0] = 1
    mask = np.zeros((40, 40), dtype=np.float32)
    mask[:10, :10] = 1
    entry = {"label": "positive", "side": "", "start": 0, "end": 1, "grid": grid.ravel().tolist(), "grid_h": 4,
             "grid_w": 4, "shuffled": [1 / 16] * 16}  # fmt: skip
    one = predictions()
    one.rows[0]["attention"] = [{**entry, "finding": "Pleural Effusion"}, {**entry, "finding": "Edema"}]
    one.rows[1]["attention"] = [{**entry, "finding": "Pneumothorax"}]
    masks = {"s0": {"Pleural Effusion": mask, "Edema": mask}, "s1": {"Pneumothorax": mask}}
    found = evaluate(one, masks=masks)
    assert found["grounding_ratio"] == pytest.approx(16)
    assert found["grounding_shuffled"] == pytest.approx(1)
    assert found["grounding_difference"] == pytest.approx(15)
    assert np.isnan(evaluate(predictions(), masks=masks)["grounding_ratio"])
