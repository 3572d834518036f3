import math

import pytest
import torch

from valor.clinical.hierarchy import SHARE
from valor.clinical.vocabulary import OBSERVATIONS, SIDES, ZONES
from valor.errors import UserError
from valor.models.statements import (
    FLOOR,
    ODDS,
    SIDED,
    ZONED,
    Margins,
    Statements,
    absent,
    assertions,
    in_zone,
    on_side,
    present,
)
from valor.recipe import GrpoVisionSettings


def _calibration(**likely):
    """All findings improbable but for those named; scale 0, so the image says nothing."""
    known = {f: {"scale": 0.0, "bias": -2.0} for f in OBSERVATIONS}
    return known | {f.replace("_", " "): {"scale": 0.0, "bias": bias} for f, bias in likely.items()}


@pytest.fixture
def score(expert):
    image = torch.nn.functional.normalize(torch.ones(1, 32), dim=1)

    def run(report, masked=(), calibration=None):
        statements = Statements(Margins(expert), calibration or _calibration(Pleural_Effusion=2.0), masked=masked)
        return statements.log_probability(image, [report])[0]

    return run


@pytest.mark.parametrize("finding", OBSERVATIONS)
def test_the_labeler_reads_each_canonical_statement_as_meant(finding):
    for text in present(finding):
        assert assertions(text)[finding][0] == "positive", text
    for text in absent(finding):
        assert assertions(text)[finding][0] == "negative", text
    for side in SIDES if finding in SIDED else ():
        for text in on_side(finding, side):
            assert assertions(text)[finding] == ("positive", side, None), text
    for zone in ZONES if finding in ZONED else ():
        for text in in_zone(finding, zone):
            assert assertions(text)[finding] == ("positive", None, zone), text


def test_the_likely_claim_beats_silence_and_denial(score):
    said = score("There is a pleural effusion.")
    assert said > score("There is no pleural effusion.")
    assert score("There is no pleural effusion.") == pytest.approx(score("The patient is rotated."))


def test_an_invented_finding_costs(score):
    assert score("There is a pleural effusion. There is edema.") < score("There is a pleural effusion.")


def test_length_repetition_and_wording_change_nothing(score):
    once = score("There is a pleural effusion.")
    assert score("There is a pleural effusion. " * 5) == pytest.approx(once)
    assert score("Pleural effusion is present. No edema. No pneumothorax.") == pytest.approx(once)


def test_a_hedge_lies_between(score):
    hedge = score("Possible pleural effusion.")
    assert score("No pleural effusion.") < hedge < score("There is a pleural effusion.")


def test_saying_both_is_a_hedge(score):
    both = score("There is a pleural effusion. There is no pleural effusion.")
    assert both == pytest.approx(score("Possible pleural effusion."))


def test_a_masked_finding_changes_nothing(score):
    masked = ("Fracture",)
    assert score("There is a fracture.", masked=masked) == pytest.approx(score("No fracture.", masked=masked))
    assert score("There is a fracture.") != pytest.approx(score("No fracture."))


def test_names_of_one_consolidation_are_one_finding(score):
    silent, three = score("No effusion."), "Pulmonary opacity. Consolidation. Pneumonia."
    assert score("Consolidation.") == pytest.approx(score("Pulmonary opacity. Consolidation."))
    # Improbable all: three names cost little more than one, and about as much as another wrong finding.
    assert silent > score("Fracture.") > score(three) > score("Fracture. Pneumothorax.")
    assert assertions("Pneumonia in the left lower lobe.")["Consolidation"] == ("positive", "left", "lower")
    assert assertions("Possible pneumonia. No consolidation.")["Consolidation"][0] == "uncertain"


def test_odds_move_where_naming_begins_to_pay(expert):
    image = torch.nn.functional.normalize(torch.ones(1, 32), dim=1)
    at_half = {"Edema": {"scale": 0.0, "bias": -0.7}}  # p = 0.33

    def pays(odds):
        statements = Statements(Margins(expert), at_half, masked=(), odds=odds)
        said, silent = statements.log_probability(image.expand(2, -1), ["Edema.", "No edema."])
        return said > silent

    assert pays(2.5)
    assert not pays(1.5)


def test_the_recipes_odds_are_the_rewards():
    assert GrpoVisionSettings().odds == ODDS


def test_one_mistake_is_bounded(score):
    calibration = _calibration(Edema=-50.0, Pleural_Effusion=2.0)
    right, wrong = score("No edema.", calibration=calibration), score("There is edema.", calibration=calibration)
    assert right - wrong <= -FLOOR / sum(SHARE.get(finding, 1.0) for finding in OBSERVATIONS) + 1e-6


def test_the_side_pays_when_the_image_agrees_and_costs_when_not(expert):
    calibration = _calibration(Pleural_Effusion=2.0)
    calibration["Pleural Effusion"]["side"] = {"scale": 20.0, "bias": [0.0] * 3, "prior": [0.4, 0.4, 0.2]}
    margins = Margins(expert)
    statements = Statements(margins, calibration, masked=())
    left = expert.embed_texts(["Left pleural effusion."])
    assert margins.sides(left)[0, OBSERVATIONS.index("Pleural Effusion")].argmax() == SIDES.index("left")
    reports = ["Left pleural effusion.", "There is a pleural effusion.", "Right pleural effusion."]
    right, none, wrong = statements.log_probability(left.expand(3, -1), reports)
    assert right > none > wrong


@pytest.mark.parametrize("odds", [1.0, 1.5, 3.0])
def test_a_finding_is_worth_naming_from_one_probability_on_wherever_it_is_put(expert, odds):
    image = expert.embed_texts(["Left lower lobe consolidation."])
    column, margins = OBSERVATIONS.index("Consolidation"), Margins(expert)
    sides = margins.sides(image)[0, column].argsort(descending=True).tolist()
    zones = margins.zones(image)[0, column].argsort(descending=True).tolist()
    best, worst = ([SIDES[sides[i]].capitalize(), f"consolidation in the {ZONES[zones[i]]} lung zone."] for i in (0, 2))
    named = [" ".join(best), f"{best[0]} consolidation.", "There is a consolidation.", " ".join(worst)]
    pays = 1 / (1 + odds)
    for probability in (0.1, pays - 0.02, pays + 0.02, 0.55, 0.65, 0.9, 0.99):
        bias = math.log(probability / (1 - probability))
        calibration = _calibration(Consolidation=bias, Lung_Opacity=bias)
        calibration["Consolidation"]["side"] = {"scale": 50.0, "bias": [0.0] * 3, "prior": [1 / 3] * 3}
        calibration["Consolidation"]["zone"] = {"scale": 50.0, "bias": [0.0] * 3, "prior": [1 / 3] * 3}
        statements = Statements(margins, calibration, masked=(), odds=odds)
        assert statements.probability(image)[0, column] == pytest.approx(probability)
        *scores, silent = statements.log_probability(image.expand(5, -1), [*named, "No consolidation."])
        assert [score > silent for score in scores] == [probability > pays] * len(named), probability
        if probability > pays:
            assert scores == sorted(scores, reverse=True)
            assert scores[0] > scores[-1]


def test_scores_of_a_batch_are_those_of_each_alone(expert):
    statements = Statements(Margins(expert), _calibration(Edema=1.0), masked=())
    images = torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    reports = ["There is edema.", "No acute abnormality.", "Left pneumothorax."]
    alone = [statements.log_probability(images[i : i + 1], [reports[i]])[0] for i in range(3)]
    assert statements.log_probability(images, reports) == pytest.approx(alone)


def test_all_masked_is_an_error(expert):
    with pytest.raises(UserError, match="passed its gate for no finding"):
        Statements(Margins(expert), _calibration(), masked=OBSERVATIONS)


def test_an_unmeasured_gate_is_an_error_that_names_the_way_out(expert):
    with pytest.raises(UserError, match="similarity: paper"):
        Statements.of(expert)


def test_left_and_right_mentions_make_bilateral_and_two_zones_none():
    text = "Left lower opacity in the left lower zone. Opacity in the right upper zone."
    assert assertions(text)["Lung Opacity"] == ("positive", "bilateral", None)
