import json

import pytest

from valor.context import Context
from valor.errors import IntegrityError, UserError
from valor.recipe import GateRule, GateSettings
from valor.stages.gate import gate

F1 = GateRule(metric="truth_f1_micro", against="sft", margin=0.02)
OMISSION = GateRule(metric="truth_omission", against="sft", margin=0.03, higher_is_better=False)
CHAMPION = GateRule(metric="truth_f1_micro", against="champion", margin=0.02)


def cell(value, low, high, defined=1.0):
    return {"value": value, "low": low, "high": high, "defined": defined}


@pytest.fixture
def judge(tmp_path):
    """Run the gate on an evaluation with the given vision - sft (and champion) differences."""

    def run(
        *rules,
        f1=(0.05, 0.01, 0.09),
        omission=(0.0, -0.02, 0.02),
        champion=None,
        digest="",
        candidate="vision",
        **settings,
    ):
        measure = {"label": "x", "group": "g", "form": "percent", "finding": ""}
        differences = {"vision-sft": {"truth_f1_micro": cell(*f1), "truth_omission": cell(*omission)}}
        digests = {"sft": "a" * 64, "vision": "b" * 64}
        if champion:
            differences["vision-champion"] = {"truth_f1_micro": cell(*champion)}
            digests["champion"] = "c" * 64
        evaluation = tmp_path / "evaluation"
        evaluation.mkdir(exist_ok=True)
        metrics = {
            "checkpoints": {name: {} for name in digests}, "checkpoint_digests": digests, "differences": differences,
            "measures": {"truth_f1_micro": {**measure, "higher_is_better": True},
                         "truth_omission": {**measure, "higher_is_better": False}},
            "dataset_digest": "d" * 64, "studies": 500, "subjects": 430, "bootstrap": {"confidence": 0.95},
        }  # fmt: skip
        (evaluation / "metrics.json").write_text(json.dumps(metrics))
        out = tmp_path / "verdict"
        result = gate(
            GateSettings(candidate=candidate, rules=rules, **settings),
            evaluation=evaluation, verdict=out, champion_digest=digest, context=Context(),
        )  # fmt: skip
        return (
            result.values["verdict"],
            json.loads((out / "verdict.json").read_text()),
            (out / "verdict.md").read_text(),
        )

    return run


def test_too_few_subjects_refuse_whatever_the_intervals_say(judge):
    verdict, value, text = judge(F1, OMISSION, min_subjects=431)
    assert verdict == value["verdict"] == "refuse"
    assert "430 subjects were judged, at least 431 are needed" in text
    assert judge(F1, OMISSION, min_subjects=430)[0] == "pass"


def test_within_the_margins_passes(judge):
    verdict, value, text = judge(F1, OMISSION)
    assert verdict == value["verdict"] == "pass"
    assert [rule["holds"] for rule in value["rules"]] == [True, True]
    assert value["candidate_digest"] == "b" * 64
    assert "+5.0 points [+1.0, +9.0] (95% interval); its worst bound +1.0 is within the limit -2.0" in text


@pytest.mark.parametrize(
    ("differences", "holds"),
    [
        ({"f1": (0.0, -0.0199, 0.02)}, [True, True]),
        ({"f1": (0.0, -0.0201, 0.02)}, [False, True]),
        ({"omission": (0.0, -0.05, 0.0299)}, [True, True]),
        ({"omission": (0.0, -0.05, 0.0301)}, [True, False]),
        ({"f1": (0.05, -0.03, 0.13)}, [False, True]),
    ],
)
def test_the_worst_bound_decides_not_the_value(judge, differences, holds):
    verdict, value, _ = judge(F1, OMISSION, **differences)
    assert [rule["holds"] for rule in value["rules"]] == holds
    assert verdict == ("pass" if all(holds) else "refuse")


def test_refusing_is_a_result_with_its_evidence(judge):
    verdict, value, text = judge(F1, f1=(-0.08, -0.1, -0.06))
    assert verdict == "refuse"
    assert value["rules"][0]["difference"] == cell(-0.08, -0.1, -0.06)
    assert "**refused**" in text
    assert "beyond the limit -2.0" in text


def test_champion_rules_wait_for_a_champion(judge):
    verdict, value, text = judge(F1, CHAMPION)
    assert verdict == "pass"
    assert value["rules"][1]["holds"] is None
    assert "not applicable" in text
    assert judge(F1, CHAMPION, champion=(0.0, -0.01, 0.01), digest="c" * 64)[0] == "pass"
    assert judge(F1, CHAMPION, champion=(-0.05, -0.09, -0.01), digest="c" * 64)[0] == "refuse"


def test_only_champion_rules_without_a_champion_let_the_first_version_in(judge):
    assert judge(CHAMPION)[0] == "pass"


def test_the_champion_must_be_the_one_that_was_evaluated(judge):
    with pytest.raises(IntegrityError, match="evaluate again"):
        judge(F1, digest="c" * 64)
    with pytest.raises(IntegrityError, match="evaluate again"):
        judge(F1, champion=(0.0, 0.0, 0.0), digest="f" * 64)


def test_no_evidence_is_no_pass(judge):
    verdict, value, _ = judge(F1, f1=(None, None, None))
    assert verdict == "refuse"
    assert "undefined" in value["rules"][0]["explanation"]


def test_a_difference_that_many_draws_leave_undefined_is_no_pass(judge):
    assert judge(F1, f1=(0.05, 0.01, 0.09, 0.95))[0] == "pass"
    verdict, value, text = judge(F1, f1=(0.05, 0.01, 0.09, 0.949))
    assert verdict == "refuse"
    assert value["rules"][0]["holds"] is False
    assert "defined in only 94.9% of bootstrap draws, 95% are needed" in text


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((), "gate.rules is empty"),
        ((GateRule(metric="f1", against="sft", margin=0.1),), "known are truth_f1_micro, truth_omission"),
        ((GateRule(metric="truth_omission", against="sft", margin=0.1),), "set higher_is_better: false"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_the_users_mistake(judge, rules, words):
    with pytest.raises(UserError, match=words):
        judge(*rules)


def test_a_candidate_is_not_compared_with_itself(judge):
    with pytest.raises(UserError, match="compared with itself"):
        judge(F1, candidate="sft")


def test_a_candidate_that_was_not_evaluated_is_named(judge):
    with pytest.raises(UserError, match="'text' was not evaluated"):
        judge(F1, candidate="text")
