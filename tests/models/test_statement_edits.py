"""Stage 2's `statements` on many reports against edits of them, by an expert that is sure of what the image shows."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "rewards"))
from report_edits import edited_reports

from valor.clinical.vocabulary import OBSERVATIONS, SIDES
from valor.models.statements import SIDED, Margins, Statements, assertions

SURE = 4.0


def of_an_expert_that_agrees(report: str) -> dict:
    """Return a calibration by which the image shows what the report asserts, at its side, and nothing else."""
    asserted = assertions(report)
    calibration = {}
    for finding in OBSERVATIONS:
        label, side, _ = asserted.get(finding, ("negative", None, None))
        bias = {"positive": SURE, "uncertain": 0.0, "negative": -SURE}[label]
        calibration[finding] = {"scale": 0.0, "bias": bias}
        if finding in SIDED and side:
            sides = [SURE if one == side else 0.0 for one in SIDES]
            calibration[finding]["side"] = {"scale": 0.0, "bias": sides, "prior": [1 / len(SIDES)] * len(SIDES)}
    return calibration


def claims(report: str) -> dict:
    """Return what a report asserts without doubt, with its side where sides are asked."""
    read = assertions(report)
    found = {finding: read[finding] for finding in OBSERVATIONS if read.get(finding, ("",))[0] == "positive"}
    return {finding: side if finding in SIDED else None for finding, (_, side, _) in found.items()}


@pytest.fixture
def gains(expert):
    """Score each report and its edit by the expert that agrees with the report."""
    image = torch.nn.functional.normalize(torch.ones(2, 32), dim=1)
    margins = Margins(expert)

    def run(kind):
        found = []
        for report, edited in edited_reports("phantom", kind):
            statements = Statements(margins, of_an_expert_that_agrees(report), masked=())
            true, changed = statements.log_probability(image, [report, edited])
            found.append((true - changed, claims(report) == claims(edited)))
        return found

    return run


@pytest.mark.parametrize(
    ("kind", "least"),
    [("findings denied", 90), ("denials asserted", 90), ("a finding dropped", 90), ("a finding invented", 90),
     ("another patient's", 150), ("empty", 90), ("sides swapped", 60), ("words of all reports", 150)],
)  # fmt: skip
def test_what_the_image_does_not_show_scores_lower(gains, kind, least):
    seen = [gain for gain, same in gains(kind) if not same]
    assert len(seen) >= least
    assert min(seen) > 0


@pytest.mark.parametrize("kind", ["said three times", "a sentence dropped"])
def test_length_and_repetition_change_nothing_where_the_same_is_asserted(gains, kind):
    unchanged = [gain for gain, same in gains(kind) if same]
    assert len(unchanged) >= 45
    assert max(map(abs, unchanged)) < 1e-5
