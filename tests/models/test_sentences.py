import pytest

from valor.clinical.labeler import label
from valor.models.sentences import moved_zones, reversed_polarity, sentences, swap_sides


def test_a_report_is_split_without_its_headings():
    report = "FINDINGS: Heart is 1.5 times normal. No effusion; lungs clear. IMPRESSION: Cardiomegaly."
    assert sentences(report) == ["Heart is 1.5 times normal.", "No effusion", "lungs clear.", "Cardiomegaly."]


@pytest.mark.parametrize("empty", ["", "  ", "FINDINGS:", "...", "FINDINGS: IMPRESSION: ."])
def test_an_empty_report_has_no_sentence(empty):
    assert sentences(empty) == []


def test_sides_are_swapped_with_their_case_and_back():
    text = "Left-sided effusion; right lung clear, LEFT port."
    assert swap_sides(text) == "Right-sided effusion; left lung clear, RIGHT port."
    assert swap_sides(swap_sides(text)) == text
    assert swap_sides("Upright film, bilateral effusions.") == "Upright film, bilateral effusions."


@pytest.mark.parametrize(
    "sentence",
    [
        "There is a small left pleural effusion.",
        "No pneumothorax.",
        "No rib fracture is seen.",
        "There is no evidence of pulmonary edema.",
        "The heart is enlarged.",
        "A nodule is seen in the left upper lung.",
        "Right pneumothorax is present.",
    ],
)
def test_polarity_is_reversed_in_the_labelers_eyes(sentence):
    edit = reversed_polarity(sentence)
    before, after = label(sentence), label(edit)
    flip = {"positive": "negative", "negative": "positive"}
    findings = [f for f in before if f != "No Finding"]
    assert findings
    assert {f: after.get(f) for f in findings} == {f: flip[before[f]] for f in findings}


@pytest.mark.parametrize("sentence", ["Possible pneumonia.", "Normal chest radiograph.", "The patient is rotated."])
def test_what_has_no_opposite_is_left_alone(sentence):
    assert reversed_polarity(sentence) == ""


def test_an_edit_reads_as_a_sentence():
    assert reversed_polarity("Right rib fracture.") == "No right rib fracture."
    assert reversed_polarity("No rib fracture is seen.") == "Rib fracture is seen."


def test_a_zone_moves_to_both_others_and_several_do_not():
    assert moved_zones("Upper lung nodule.") == ["Mid lung nodule.", "Lower lung nodule."]
    assert moved_zones("Opacity in the upper and lower zones.") == []
    assert moved_zones("No edema.") == []
