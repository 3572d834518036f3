from collections import Counter

import numpy as np
import pytest

from valor.clinical.labeler import label, mentions
from valor.clinical.vocabulary import FINDINGS, SIDES, ZONES
from valor.data.phantom import disease, wording
from valor.data.phantom.disease import DRAWN, SEVERITIES, Finding, draw_findings, truth_rows
from valor.data.phantom.report import decide, write_report
from valor.recipe import ReportNoise


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def population(count: int) -> list[tuple[Finding, ...]]:
    stream = rng(9)
    return [draw_findings(stream) for _ in range(count)]


def test_a_third_is_normal_and_every_finding_is_common_enough_to_learn():
    studies = population(4000)
    normal = np.mean([not {f.finding for f in study} - {"Support Devices"} for study in studies])
    assert 0.30 < normal < 0.40
    rates = Counter(f.finding for study in studies for f in study)
    assert set(rates) == set(DRAWN)
    assert all(0.05 < rates[name] / len(studies) < 0.30 for name in DRAWN)


def test_findings_co_occur_as_in_disease():
    studies = [{f.finding for f in study} for study in population(6000)]

    def rate(name: str, given: str | None = None) -> float:
        return float(np.mean([name in study for study in studies if given is None or given in study]))

    assert rate("Edema", "Cardiomegaly") > 2 * rate("Edema")
    assert rate("Pleural Effusion", "Atelectasis") > 1.5 * rate("Pleural Effusion")


def test_places_are_words_of_the_vocabulary():
    for finding in (f for study in population(1500) for f in study):
        assert finding.side in (None, *SIDES)
        assert finding.zone in (None, *ZONES)
        assert finding.severity in (None, *SEVERITIES)
        if finding.finding in ("Lung Lesion", "Pneumothorax", "Fracture"):
            assert finding.side in ("left", "right")


def test_truth_lists_every_class_and_follows_the_hierarchy():
    rows = {row["finding"]: row for row in truth_rows([Finding("Consolidation", "left", "upper", "mild")])}
    assert set(rows) == set(FINDINGS)
    assert {name for name, row in rows.items() if row["present"]} == {"Consolidation", "Pneumonia", "Lung Opacity"}
    assert {name for name, row in rows.items() if row["implied"]} == {"Pneumonia", "Lung Opacity"}
    assert rows["Lung Opacity"]["side"] == "left"
    only_effusion = {row["finding"] for row in truth_rows([Finding("Pleural Effusion", "left")]) if row["present"]}
    assert only_effusion == {"Pleural Effusion"}


@pytest.mark.parametrize(
    ("findings", "empty"),
    [((), True), ((Finding("Support Devices", kind="pacemaker"),), True), ((Finding("Fracture", "left"),), False)],
)
def test_no_finding_allows_devices_only(findings, empty):
    assert truth_rows(findings)[-1]["present"] is empty


@pytest.mark.parametrize("held_out", [False, True])
def test_a_report_without_noise_says_the_truth(quiet, held_out):
    """The labeler is the reader here; it was written apart from these wordings."""
    for number, study in enumerate(population(300)):
        findings, impression = write_report(study, quiet, rng(number), held_out_wording=held_out)
        text = f"{findings} {impression}"
        said = {name for name, value in label(text).items() if value == "positive"}
        drawn = {f.finding: f for f in study}
        wanted = {"Pneumonia" if n == "Consolidation" and n not in said else n for n in drawn}
        assert wanted <= said, (study, text)
        assert said <= set(drawn) | {"Pneumonia", "Lung Opacity", "No Finding"}, (study, text)
        for mention in mentions(text):
            if mention.finding in drawn and mention.side:
                assert mention.side == drawn[mention.finding].side, (study, text)
            if mention.finding in drawn and mention.zone:
                assert mention.zone == drawn[mention.finding].zone, (study, text)


def test_held_out_wordings_appear_only_when_asked_for(quiet):
    opacity = [Finding("Consolidation", "left", "upper", "severe")]
    held_out = "is consolidated"
    assert not any(held_out in write_report(opacity, quiet, rng(n))[0] for n in range(60))
    assert all(held_out in write_report(opacity, quiet, rng(n), held_out_wording=True)[0] for n in range(5))


def test_wording_varies_and_fits_a_small_model():
    texts = [" ".join(write_report(study, ReportNoise(), rng(n))) for n, study in enumerate(population(500))]
    words = [len(text.split()) for text in texts]
    assert np.percentile(words, 99) < 75
    assert 20 < np.median(words) < 50
    assert len(set(texts)) > 350


@pytest.mark.parametrize(
    ("field", "manner", "severity"),
    [
        ("omission", "omitted", "severe"),
        ("omission_subtle", "omitted", "mild"),
        ("template_contradiction", "denied", "moderate"),
        ("hedged_borderline", "hedged", "mild"),
    ],
)
def test_each_noise_rate_is_kept_and_zero_means_never(quiet, field, manner, severity):
    study = [Finding("Pleural Effusion", "left", None, severity)]

    def rate(noise: ReportNoise) -> float:
        stream = rng(2)
        return float(np.mean([decide(study, noise, stream)[0].manner == manner for _ in range(2000)]))

    assert rate(quiet) == 0
    assert abs(rate(quiet.model_copy(update={field: 0.3})) - 0.3) < 0.04


def test_omitted_is_silent_and_contradicted_is_denied(quiet):
    study = [Finding("Pleural Effusion", "left", None, "severe")]
    silent = [write_report(study, quiet.model_copy(update={"omission": 1.0}), rng(n)) for n in range(40)]
    assert not any("effusion" in findings for findings, _ in silent)
    denied = [write_report(study, quiet.model_copy(update={"template_contradiction": 1.0}), rng(n)) for n in range(40)]
    assert all(label(findings)["Pleural Effusion"] == "negative" for findings, _ in denied)


def test_a_wrong_side_is_wrong_in_both_sections(quiet):
    study = [Finding("Pneumothorax", "left", None, "severe")]
    findings, impression = write_report(study, quiet.model_copy(update={"wrong_side": 1.0}), rng(1))
    assert "right" in findings
    assert "right" in impression.lower()
    assert "left" not in findings
    assert "left" not in impression.lower()


def test_false_priors_come_at_their_rate(quiet):
    noise = quiet.model_copy(update={"false_prior": 0.25})
    texts = [write_report((), noise, rng(n))[0] for n in range(1000)]
    assert abs(np.mean(["prior" in text for text in texts]) - 0.25) < 0.05
    assert not any("prior" in write_report((), quiet, rng(n))[0] for n in range(100))


def test_every_drawn_finding_has_words():
    for name in set(DRAWN) - {"Support Devices"}:
        assert len(wording.FINDING[name]) > wording.HOLD_OUT_FROM
        assert wording.HEDGE[name]
        assert wording.NEGATIVE[name]
        assert wording.SHORT[name]
    assert set(wording.DEVICE) == set(disease.DEVICES)
