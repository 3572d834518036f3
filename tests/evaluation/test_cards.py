import pytest

from valor.evaluation import cards, scores
from valor.evaluation.scores import Expected

TEXT = "FINDINGS: Left pleural effusion. No pneumothorax. Mild edema. IMPRESSION: Possible opacity."


def expect(*present, judged=("Pleural Effusion", "Pneumothorax", "Edema", "Cardiomegaly")):
    return Expected(present=frozenset(present), judged=frozenset(judged), sides={})


def kinds(text, expected):
    parts = cards.segments(text, scores.read_report(text), expected)
    assert "".join(part["text"] for part in parts) == text
    return [(part["kind"], *part["findings"]) for part in parts if part["kind"]]


def test_each_mention_is_judged():
    found = kinds(TEXT, expect("Pleural Effusion", "Pneumothorax"))
    assert found == [
        ("matched", "Pleural Effusion"),
        ("denied", "Pneumothorax"),
        ("hallucinated", "Edema"),
        ("unjudged", "Lung Opacity"),
    ]


def test_a_narrower_name_says_the_finding_that_truth_knows_and_no_other():
    truth = Expected(frozenset({"Consolidation"}), frozenset({"Consolidation", "Edema"}), {}, knows_appearances=True)
    assert kinds("Possible pneumonia.", truth) == [("matched", "Pneumonia")]
    assert cards.outcome(scores.read_report("Pneumonia."), truth)["matched"] == ["Consolidation"]
    assert kinds("Right opacity.", truth) == [("unjudged", "Lung Opacity")]
    report = Expected(truth.present, truth.judged, {})
    assert cards.outcome(scores.read_report("Pneumonia."), report)["omitted"] == ["Consolidation"]


def test_a_true_denial_is_plain():
    assert kinds("No pneumothorax.", expect()) == []
    assert kinds("No acute disease.", expect()) == []
    assert kinds("No acute cardiopulmonary disease.", expect("Edema"))[0][0] == "denied"


def test_outcome_counts_findings_not_mentions():
    statement = scores.read_report("Pleural effusion. The effusion is large. No edema.")
    found = cards.outcome(statement, expect("Edema", "Pleural Effusion"))
    assert found == {"matched": ["Pleural Effusion"], "hallucinated": [], "omitted": ["Edema"]}


@pytest.mark.parametrize("text", ["", "Nothing to say", "Edema", "😀 edema. É effusion"])
def test_segments_join_to_the_report(text):
    kinds(text, expect())
