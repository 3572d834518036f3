"""The gate on a real, untrained dual encoder: the images' embeddings are made of its own statements."""

import numpy as np
import pytest
import torch

from valor.clinical.labeler import mentions
from valor.clinical.vocabulary import OBSERVATIONS
from valor.models import expert_gate
from valor.models.calibration import calibrate_presence
from valor.models.statements import Statements, absent, assertions, present
from valor.recipe import ExpertGate

EFFUSION, EDEMA = "Pleural Effusion", "Edema"
REPORTS = [
    "FINDINGS: There is a left pleural effusion. No edema.",
    "FINDINGS: There is a right pleural effusion. No edema.",
    "FINDINGS: No pleural effusion. There is pulmonary edema.",
    "FINDINGS: No pleural effusion. No edema.",
] * 10


@pytest.fixture
def images(expert):
    """Images whose cosines with the statements say what their report says."""

    def direction(finding):
        return expert.embed_texts(present(finding)).mean(0) - expert.embed_texts(absent(finding)).mean(0)

    left, right = expert.embed_texts(["There is a left pleural effusion.", "There is a right pleural effusion."])
    directions = torch.stack([direction(EFFUSION), direction(EDEMA), left - right])
    wanted = []
    for report in REPORTS:
        is_left, is_right = "a left" in report, "a right" in report
        wanted.append([2 * (is_left or is_right) - 1, 2 * ("is pulmonary edema" in report) - 1, is_left - is_right])
    noise = 0.05 * torch.randn(len(REPORTS), 3, generator=torch.Generator().manual_seed(0))
    rows = (torch.tensor(wanted) + noise) @ torch.linalg.pinv(directions).T
    return torch.nn.functional.normalize(rows, dim=1)


def test_an_expert_that_sees_passes_and_is_calibrated(expert, images):
    gate = expert_gate.measure(expert, images, REPORTS, ExpertGate(min_negation=0.5))
    row = gate["findings"][EFFUSION]
    assert row["positives"] == 20
    assert row["auc"] > 0.95
    assert row["deletion"] > 0.9
    assert row["pays"] > 0.9
    assert row["pays_falsely"] < 0.1
    assert row["side_swap"] > 0.9
    assert EFFUSION not in gate["masked"]
    statements = Statements(expert_gate.Margins(expert), gate["calibration"], masked=gate["masked"])
    p = statements.probability(images)[:, OBSERVATIONS.index(EFFUSION)]
    assert p[:2].min() > 0.5 > p[2:4].max()
    assert float(p.mean()) == pytest.approx(0.5, abs=0.05)


class Denies:
    """Stands for an expert that saw more denials than findings, and prefers them whatever the image."""

    def embed_texts(self, texts, *, batch=1):
        return torch.tensor([[float(all(m.label == "negative" for m in mentions(text)))] for text in texts])


def test_whoever_always_denies_or_always_asserts_is_right_in_half_of_the_negations():
    read = [assertions(report) for report in REPORTS]
    for sign, right in ((1.0, "negative"), (-1.0, "positive")):
        _, negations = expert_gate._sentence_tests(Denies(), sign * torch.ones(len(REPORTS), 1), REPORTS, read)
        for finding in (EFFUSION, EDEMA):
            row = expert_gate._negation(negations[finding])
            assert row[f"negation_{right}"] == 1
            assert row["negation"] == 0.5
            verdict = expert_gate._verdict(
                finding, {"auc": 0.99, "deletion": 0.99, "side_swap": 0.99, **row}, ExpertGate()
            )
            assert verdict["masked"] == "negation 0.50 < 0.85"


def test_reports_without_a_sentence_leave_the_noise_of_wording_a_number(expert, images):
    reports = [*REPORTS[:-4], *["FINDINGS: SINGLE FRONTAL VIEW OF THE CHEST:"] * 4]
    noise = expert_gate.measure(expert, images, reports, ExpertGate(min_negation=0))["paraphrase_noise"]
    assert noise["paper"] >= 0


def test_a_finding_that_no_report_denies_is_denied_where_it_is_not():
    reports = ["There is a rib fracture. No edema.", "There is pulmonary edema."] * 10
    read = [assertions(report) for report in reports]
    _, negations = expert_gate._sentence_tests(Denies(), torch.ones(len(reports), 1), reports, read)
    assert negations["Fracture"] == {"positive": [False] * 10, "negative": [True] * 10}
    everywhere = ["There is a rib fracture."] * 10
    _, negations = expert_gate._sentence_tests(
        Denies(), torch.ones(10, 1), everywhere, [assertions(report) for report in everywhere]
    )
    assert expert_gate._negation(negations["Fracture"])["negation"] == 0.25
    few = {"positive": [False] * 7, "negative": [True] * 300}
    assert expert_gate._negation(few)["negation"] == 0.5
    assert expert_gate._negation({"positive": [True] * 3, "negative": [True] * 4})["negation"] is None
    assert expert_gate._negation({"positive": [], "negative": [True] * 9})["negation"] == 0.75


def test_it_tells_how_often_the_reward_prefers_a_report_to_its_opposites(expert, images):
    prefers = expert_gate.measure(expert, images, REPORTS, ExpertGate(min_negation=0))["prefers"]
    assert set(prefers) == {"deletion", "negation", "side_swap", "another"}
    assert min(prefers.values()) > 0.9
    assert expert_gate.measure(expert, -images, REPORTS, ExpertGate())["prefers"] == {}


def test_an_expert_that_sees_the_opposite_is_masked_and_named(expert, images):
    gate = expert_gate.measure(expert, -images, REPORTS, ExpertGate())
    assert gate["findings"][EFFUSION]["auc"] < 0.05
    assert EFFUSION in gate["masked"]
    assert "auc 0.0" in gate["findings"][EFFUSION]["masked"]
    assert "auc 0.0" in expert_gate.show(gate)


def test_a_rare_finding_is_seen_in_more_cases_than_its_naming_pays():
    rng = np.random.default_rng(0)
    says = ["positive"] * 20 + ["negative"] * 380
    margin = rng.normal(size=400) + 1.8 * (np.arange(400) < 20)
    row, _ = calibrate_presence(margin, says)
    common, _ = calibrate_presence(np.concatenate([margin, *[margin[:20]] * 19]), says + says[:20] * 19)
    assert row["pays"] + 0.2 < row["deletion"]
    assert row["pays_falsely"] < 0.05
    assert common["pays"] >= common["deletion"]


def test_an_expert_that_sees_noise_is_masked(expert):
    noise = torch.randn(len(REPORTS), 32, generator=torch.Generator().manual_seed(1))
    gate = expert_gate.measure(expert, torch.nn.functional.normalize(noise, dim=1), REPORTS, ExpertGate())
    assert {EFFUSION, EDEMA} <= set(gate["masked"])


def test_a_finding_without_cases_is_masked(expert, images):
    gate = expert_gate.measure(expert, images, REPORTS, ExpertGate())
    assert gate["findings"]["Fracture"]["masked"] == "too few cases"
    assert "Fracture" not in gate["calibration"]


def test_a_failed_side_swap_masks_the_side_alone(expert, images):
    thresholds = ExpertGate(min_negation=0).model_copy(update={"min_side_swap": 1.01})
    gate = expert_gate.measure(expert, images, REPORTS, thresholds)
    assert EFFUSION not in gate["masked"]
    assert EFFUSION in gate["masked_sides"]
    assert "side" not in gate["calibration"][EFFUSION]


def test_its_numbers_reach_the_stages_metrics(expert, images):
    gate = expert_gate.measure(expert, images, REPORTS, ExpertGate())
    values = expert_gate.metrics(gate)
    assert values["expert_masked_findings"] == len(gate["masked"])
    assert values["expert_macro_auc"] > 0.9
    assert 0 <= values["expert_deletion_paper"] <= 1


def test_the_noise_between_paraphrases_is_that_of_wording_alone(expert, images):
    """Reports that say the same in the same words differ by nothing; a rewording of half of them is noise."""
    same = expert_gate.measure(expert, images, REPORTS, ExpertGate(min_negation=0))["paraphrase_noise"]
    reworded = [r.replace("There is pulmonary", "Pulmonary") if i % 8 > 3 else r for i, r in enumerate(REPORTS)]
    reworded = [r.replace("There is a left", "Left").replace("There is a right", "Right") if i % 8 > 3 else r
                for i, r in enumerate(reworded)]  # fmt: skip
    other = expert_gate.measure(expert, images, reworded, ExpertGate(min_negation=0))["paraphrase_noise"]
    assert same["paper"] == pytest.approx(0, abs=1e-6)
    assert other["paper"] > 1e-4
    assert same["statements"] > 0


def test_an_expert_whose_findings_are_all_masked_has_no_noise_of_statements(expert, images):
    gate = expert_gate.measure(expert, -images, REPORTS, ExpertGate())
    assert gate["paraphrase_noise"]["statements"] is None
