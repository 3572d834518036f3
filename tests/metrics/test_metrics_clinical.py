"""Clinical counts and rates, by hand."""

import numpy as np
import pytest

from valor.clinical.labeler import label
from valor.clinical.vocabulary import FINDINGS, OBSERVATIONS
from valor.metrics.clinical import by_finding, clinical, counts, positives, scores, study_errors, truth_labels

P, N, U = "positive", "negative", "uncertain"
REFERENCE = [{"Edema": P, "Cardiomegaly": P}, {"No Finding": P, "Edema": N}, {"Pneumothorax": U}]
HYPOTHESIS = [{"Edema": P, "Fracture": P}, {"No Finding": P}, {"Pneumothorax": P}]


def test_counts():
    cells = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS)
    assert cells.shape == (3, 14, 3)
    assert cells.dtype == np.int64
    assert cells[0, FINDINGS.index("Edema")].tolist() == [1, 0, 0]
    assert cells[0, FINDINGS.index("Fracture")].tolist() == [0, 1, 0]
    assert cells[0, FINDINGS.index("Cardiomegaly")].tolist() == [0, 0, 1]
    assert cells[2, FINDINGS.index("Pneumothorax")].tolist() == [1, 0, 0]
    assert cells.sum() == 5  # with "No Finding" of the second study


def test_uncertain_as_zeros():
    cells = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS, uncertain="zeros")
    assert cells[2, FINDINGS.index("Pneumothorax")].tolist() == [0, 1, 0]
    assert positives([{"Edema": U}], uncertain="zeros").sum() == 0
    assert positives([{"Edema": U}], uncertain="ones").sum() == 1


def test_unjudged_findings_count_as_nothing():
    judged = [{"Edema"}, set(OBSERVATIONS), set()]
    cells = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS, judged=judged)
    assert cells[0].sum() == 1
    assert cells[2].sum() == 0


def test_scores_by_hand():
    totals = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS).sum(axis=0)
    figures = scores(totals)  # tp 2, fp 1, fn 1; "No Finding" has no part
    assert figures["micro_precision"] == pytest.approx(2 / 3)
    assert figures["micro_recall"] == pytest.approx(2 / 3)
    assert figures["micro_f1"] == pytest.approx(2 / 3)
    assert figures["hallucination_rate"] == pytest.approx(1 / 3)
    assert figures["omission_rate"] == pytest.approx(1 / 3)
    assert figures["macro_f1"] == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_scores_take_any_leading_shape():
    cells = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS)
    draws = np.array([[0, 1, 2], [0, 0, 1]])
    figures = scores(cells[draws].sum(axis=1))
    assert figures["micro_f1"].shape == (2,)
    assert figures["micro_f1"][0] == pytest.approx(2 / 3)
    assert figures["micro_f1"][1] == pytest.approx(4 / (4 + 2 + 2))


def test_rates_without_a_denominator_are_nan():
    figures = scores(np.zeros((14, 3)))
    assert all(np.isnan(value) for value in figures.values())


def test_silence_halves_no_rate():
    """Saying nothing shows as omission, not as a good hallucination rate."""
    totals = counts(reference_labels=REFERENCE, hypothesis_labels=[{}] * 3).sum(axis=0)
    assert scores(totals)["omission_rate"] == 1.0
    assert np.isnan(scores(totals)["hallucination_rate"])


def test_by_finding_and_study_errors():
    cells = counts(reference_labels=REFERENCE, hypothesis_labels=HYPOTHESIS)
    table = by_finding(cells.sum(axis=0))
    assert list(table) == list(FINDINGS)
    assert table["Edema"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1, "asserted": 1}
    assert np.isnan(table["Fracture"]["recall"])
    assert table["Fracture"]["precision"] == 0.0
    assert study_errors(cells).tolist() == [[True, True], [False, False], [False, False]]


def test_external_truth():
    truth = truth_labels({"Edema": True, "Cardiomegaly": False, "Support Devices": True})
    assert truth == {"Edema": P, "Cardiomegaly": N, "Support Devices": P}
    assert truth_labels({"Edema": False, "Support Devices": True})["No Finding"] == P
    cells = counts(reference_labels=[truth], hypothesis_labels=[label("Cardiomegaly. No edema.")])
    assert scores(cells.sum(axis=0))["micro_f1"] == 0.0


def test_clinical_of_texts():
    text = "Cardiomegaly with edema. No pneumothorax."
    assert clinical(refs=[text] * 3, hyps=[text, "Cardiomegaly.", "No edema. Normal heart size."]) == pytest.approx(
        [1.0, 2 / 3, 0.0]
    )
    assert clinical(refs=["Lungs are clear."], hyps=["No effusion."]) == [1.0]


def test_different_numbers_of_studies_are_refused():
    with pytest.raises(ValueError, match="3 reference and 1 hypothesis"):
        counts(reference_labels=REFERENCE, hypothesis_labels=[{}])
