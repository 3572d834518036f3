"""Each stage-1 reward against the opposite of what it claims to see."""

import os
import random
import subprocess
import sys
import typing

import numpy as np
import pytest

from valor.errors import UserError
from valor.recipe import GrpoTextSettings, TextReward, load
from valor.rewards.completions import completion_text
from valor.rewards.text import KNOWN, RUNAWAY, SHORT, build, is_report

REPORTS = (
    "FINDINGS: The heart is mildly enlarged. Small left pleural effusion with left basilar atelectasis. "
    "No pneumothorax. IMPRESSION: Small left pleural effusion and atelectasis.",
    "FINDINGS: Heart size is normal. Right upper lobe consolidation. No pleural effusion or pneumothorax. "
    "A right PICC is in place. IMPRESSION: Right upper lobe consolidation, likely pneumonia.",
    "FINDINGS: Moderate right apical pneumothorax. Displaced left rib fracture. No effusion. IMPRESSION: Pneumothorax.",
)
NORMAL = "FINDINGS: Heart size is normal. Lungs are clear. No effusion or pneumothorax. IMPRESSION: No acute disease."
RANGE = {
    "clinical_agreement_reward": (-1.0, 1.0),
    "gleu_reward": (0.0, 1.0),
    "length_reward": (0.0, 1.0),
    "repetition_reward": (0.0, 1.0),
}
NOISE = " ".join(
    random.Random(0).choices(
        ["effusion", "left", "the", "blip", "lung", "zork", "of", "no", "opacity", "right"], k=2000
    )
)


def flip_negations(text):
    return (
        text.replace("No pleural effusion or pneumothorax", "Pleural effusion and pneumothorax")
        .replace("No pneumothorax", "Pneumothorax")
        .replace("No effusion", "Effusion")
    )


def swap_sides(text):
    for a, b in (("left", "right"), ("Left", "Right")):
        text = text.replace(a, "\0").replace(b, a).replace("\0", b)
    return text


OPPOSITES = {
    "negations flipped": flip_negations,
    "sides swapped": swap_sides,
    "finding dropped": lambda text: text[: text.index("IMPRESSION")].replace("pleural effusion with left basilar ", "")
    .replace("Right upper lobe consolidation. ", "").replace("Moderate right apical pneumothorax. ", ""),
    "finding invented": lambda text: text + " Widened mediastinum and pulmonary edema.",
    "denied in the same breath": lambda text: text
    + " No left pleural effusion. No consolidation. No pneumonia. No pneumothorax.",
    "another patient": lambda text: REPORTS[(REPORTS.index(text) + 1) % len(REPORTS)],
    "declared normal": lambda text: NORMAL,
    "repeated": lambda text: " ".join([text] * 3),
    "empty": lambda text: "",
    "noise": lambda text: NOISE,
}  # fmt: skip
ALL = set(OPPOSITES)
SEES = {
    "clinical_agreement_reward": ALL - {"repeated"},
    "gleu_reward": ALL,
    "length_reward": {"repeated", "empty", "noise"},
    "repetition_reward": {"repeated", "empty", "noise"},
}


def score(name, candidate, reference, **kwargs):
    (function,), _ = build([TextReward(name=name)])
    return function([candidate], [reference], **kwargs)[0]


@pytest.mark.parametrize("reference", REPORTS)
@pytest.mark.parametrize(("name", "opposite"), [(n, o) for n in sorted(SEES) for o in sorted(SEES[n])])
def test_the_true_report_scores_higher_than_its_opposite(name, opposite, reference):
    wrong = OPPOSITES[opposite](reference)
    assert wrong != reference
    assert score(name, reference, reference) > score(name, wrong, reference)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_bounds_and_the_worst(name):
    low, high = RANGE[name]
    for reference in (*REPORTS, NORMAL, ""):
        values = [score(name, OPPOSITES[o](r), reference) for o in OPPOSITES for r in REPORTS]
        assert all(low <= value <= high for value in values)
    for reference in (*REPORTS, NORMAL):
        assert score(name, reference, reference) == pytest.approx(high)
        for nothing in ("", "  \n", NOISE, "XXXX ...", " ".join(["No effusion."] * 1000)):
            assert score(name, nothing, reference) == low


def test_clinical_prices():
    reference = REPORTS[0]

    def of(candidate):
        return score("clinical_agreement_reward", candidate, reference)

    effusion = "Small left pleural effusion."
    assert of(effusion) > of("Small pleural effusion.") > of("Small right pleural effusion.")
    assert of(effusion) > of("Possible left pleural effusion.") > of("No effusion.")
    assert of(effusion) > of(f"{effusion} Rib fracture.") > of(f"{effusion} Rib fracture. Pulmonary edema.")
    assert of("Left basilar atelectasis.") > of("Left upper lobe atelectasis.")
    # A paraphrase states the same; silence and a foreign text state nothing.
    paraphrase = (
        "Mild cardiomegaly. There is a small effusion on the left, with atelectasis at the left base. No pneumothorax."
    )
    assert of(paraphrase) == pytest.approx(1.0)
    assert of("The patient was examined upright.") == -1.0


@pytest.mark.parametrize(
    ("others", "invention", "cost", "worth_saying_from"),
    [
        (0, 2.5, 0.88, 0.37), (1, 2.5, 0.63, 0.39), (5, 2.5, 0.17, 0.33),
        (0, 4.0, 1.25, 0.46), (1, 4.0, 1.00, 0.50), (5, 4.0, 0.27, 0.44),
    ],
)  # fmt: skip
def test_prices_are_those_of_the_documentation(others, invention, cost, worth_saying_from):
    """The table of docs/rewards.md."""
    rest = ["Pneumothorax", "Rib fracture", "Pleural effusion", "Pleural thickening", "Pacemaker."][:others]
    without = ". ".join(rest) or "Normal chest radiograph."
    named = ". ".join(["Cardiomegaly", *rest])
    (function,), _ = build([TextReward(name="clinical_agreement_reward", options={"invention": invention})])
    spent, gained = (
        function([right], [right])[0] - function([wrong], [right])[0]
        for right, wrong in ((without, named), (named, without))
    )
    assert spent == pytest.approx(cost, abs=0.006)
    assert spent / (spent + gained) == pytest.approx(worth_saying_from, abs=0.006)


def test_a_reference_is_taken_at_its_word():
    reference = "Left pleural effusion. No pleural effusion."
    sure, hedged = (
        score("clinical_agreement_reward", text, reference)
        for text in ("Left pleural effusion.", "Possible left pleural effusion.")
    )
    assert sure == 1.0 > hedged


@pytest.mark.parametrize(
    "reference",
    [
        "Old healed rib fracture. No acute fracture.",
        "Mild pulmonary edema. No overt alveolar edema.",
        "Left basilar atelectasis. The lungs are otherwise clear.",
        "The mediastinal contours are normal. Mild prominence of the superior mediastinum.",
        "Small right pleural effusion. Does not appear to be an empyema.",
        "Lungs are hyperexpanded but clear. Biapical scarring noted.",
    ],
)
def test_a_copy_of_the_reference_is_right(reference):
    assert score("clinical_agreement_reward", reference, reference) == 1.0


def test_a_copy_of_a_phantom_report_is_right():
    from valor.data.phantom.disease import draw_findings
    from valor.data.phantom.report import write_report
    from valor.recipe import ReportNoise

    rng = np.random.default_rng(0)
    for number in range(200):
        findings, impression = write_report(draw_findings(rng), ReportNoise(), rng, held_out_wording=bool(number % 2))
        report = f"FINDINGS: {findings} IMPRESSION: {impression}"
        assert score("clinical_agreement_reward", report, report) == 1.0


def test_a_candidate_contradicts_itself_only_where_its_reference_does():
    def of(candidate, reference):
        return score("clinical_agreement_reward", candidate, reference)

    plain, torn = "Left effusion. Left rib fracture.", "Left effusion. No effusion. Left rib fracture."
    both = "Left effusion. No effusion. Left rib fracture. No fracture."
    assert of(torn, torn) == of(plain, torn) == 1.0
    # The reference's own contradiction excuses no other.
    assert of(both, torn) < 1.0
    # And without one, none is excused: it earns what "possible" does.
    assert of(torn, plain) == of("Possible left effusion. Left rib fracture.", plain) < of(plain, plain) == 1.0
    # In either order, and with any denial.
    for denial in ("No effusion.", "Effusion: none.", "Effusion has resolved.", "Effusion ruled out."):
        assert of(f"{plain} {denial}", plain) == of(f"{denial} {plain}", plain) < 1.0


def test_names_of_one_consolidation_are_one_finding():
    def of(candidate, reference):
        return score("clinical_agreement_reward", candidate, reference)

    three = "Right lower lobe opacity. Right lower lobe consolidation. Pneumonia in the right lower lobe."
    consolidation, opacity = "Right lower lobe consolidation.", "Right lower lobe opacity."
    effusion = "Left pleural effusion."
    # Wrong, three names cost little more than another wrong finding, and less than two.
    assert of(NORMAL, NORMAL) > of(effusion, NORMAL) > of(three, NORMAL)
    assert of(three, NORMAL) > of(f"{effusion} Rib fracture.", NORMAL)
    # Right, the broader name is no invention, and the narrower one is nearly right.
    assert of(f"{opacity} {consolidation}", consolidation) == of(consolidation, consolidation) == 1.0
    assert of(consolidation, consolidation) > of(three, consolidation) > of(opacity, consolidation)
    assert of(opacity, consolidation) > of("Pulmonary edema.", consolidation) > of(effusion, consolidation)
    # A side is compared under the broader name too.
    assert of("Right opacity.", "Right consolidation.") > of("Left opacity.", "Right consolidation.")


def test_asserting_everything_does_not_pay():
    everything = (
        "Cardiomegaly. Widened mediastinum. Bilateral opacities. Nodule. Edema. Consolidation. Pneumonia. Atelectasis. "
        "Pneumothorax. Pleural effusion. Pleural thickening. Fracture. Pacemaker."
    )
    partial = "Small left pleural effusion. No pneumothorax."
    for reference in REPORTS:
        assert score("clinical_agreement_reward", everything, reference) < 0.2
    assert score("clinical_agreement_reward", everything, REPORTS[0]) < score(
        "clinical_agreement_reward", partial, REPORTS[0]
    )


def test_normal_reference_pays_for_normal_and_not_for_silence():
    assert score("clinical_agreement_reward", NORMAL, NORMAL) == 1.0
    one = score("clinical_agreement_reward", NORMAL + " Small left effusion.", NORMAL)
    two = score("clinical_agreement_reward", NORMAL + " Small left effusion. Fracture.", NORMAL)
    assert 1.0 > one > two > -1.0


def test_length_bounds():
    reference = "one two three four five six seven eight nine ten"
    lengths = {n: score("length_reward", " ".join(["word"] * n), reference) for n in (3, 6, 10, 15, 20, 30)}
    assert lengths == pytest.approx({3: 0.5, 6: 1, 10: 1, 15: 1, 20: 2 - 20 / 15, 30: 0})


def test_a_repeating_reference_is_its_own_measure():
    twice = "No acute disease. Lungs are clear. No acute disease."
    assert score("repetition_reward", twice, twice) == 1.0
    assert score("repetition_reward", twice, "Lungs are clear. No acute disease today.") < 1.0


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_truncated_completions_score_worst(name):
    low, high = RANGE[name]
    (function,), _ = build([TextReward(name=name)], eos_token_ids=[2])
    two = [REPORTS[0], REPORTS[0]]
    assert function(two, two, completion_ids=[[5, 6, 7], [5, 6, 2]]) == [low, high]
    assert function(two, two, completion_ids=[[], [5, 2]]) == [low, high]
    assert function(two, two) == [high, high]
    (unaware,), _ = build([TextReward(name=name)])
    assert unaware(two, two, completion_ids=[[5, 6, 7], [5, 6, 2]]) == [high, high]


def test_build_names_weights_and_signature():
    functions, weights = build([*GrpoTextSettings().rewards, TextReward(name="gleu_reward", weight=2.0)])
    names = [f.__name__ for f in functions]
    assert len(set(names)) == len(names) == 5
    assert names[-1] == "gleu_reward_2"
    assert weights == [1.0, 0.1, 0.2, 0.2, 2.0]
    chat = [[{"role": "assistant", "content": [{"type": "text", "text": NORMAL}]}]]
    for function in functions:
        plain = function(prompts=["p"], completions=[NORMAL], reference=[NORMAL], trainer_state=None)
        assert plain == function(chat, [NORMAL]) == function([NORMAL], [NORMAL])
        assert all(type(value) is float for value in plain)


def test_a_recipe_can_name_every_reward_and_no_other():
    assert sorted(typing.get_args(TextReward.model_fields["name"].annotation)) == sorted(KNOWN)
    with pytest.raises(UserError, match=r"'gleu_reward'.*blue_reward"):
        load("phantom", ["grpo_text.rewards=[{name: blue_reward}]"])


def test_completion_text():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([]) == ""


def test_is_report():
    assert is_report(NORMAL, NORMAL)
    assert is_report(" ".join(["word"] * RUNAWAY * SHORT), "short")
    assert not is_report(" ".join(["word"] * (RUNAWAY * SHORT + 1)), "short")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (TextReward(name="gleu_reward", options={"n": 2}), "unknown option; gleu_reward has no options"),
        (TextReward(name="length_reward", options={"lo": 2}), "length_reward has low, high"),
        (TextReward(name="length_reward", options={"low": 2, "high": 1}), "expected 0 < low <= high"),
        (TextReward(name="clinical_agreement_reward", options={"omission": -1}), "expected 0 or more"),
        (TextReward(name="clinical_agreement_reward", options={"true_positive": 0}), "expected more"),
    ],
)
def test_a_wrong_recipe_is_a_users_mistake(reward, message):
    with pytest.raises(UserError, match=message):
        build([reward])


def test_options_change_the_price():
    wrong = REPORTS[0] + " Rib fracture."
    dear = TextReward(name="clinical_agreement_reward", options={"invention": 6.0})
    (cheap_reward, dear_reward), _ = build([TextReward(name="clinical_agreement_reward"), dear])
    assert dear_reward([wrong], [REPORTS[0]]) < cheap_reward([wrong], [REPORTS[0]])


def test_a_reward_is_the_same_to_the_last_bit_in_another_process():
    program = (
        "from valor.rewards.agreement import AgreementWeights\n"
        "from valor.rewards.text import clinical_agreement\n"
        f"reports = {(' '.join(REPORTS), *REPORTS)!r}\n"
        "weights = AgreementWeights(true_positive=1.1, omission=2.3, invention=0.7, side=0.13, zone=0.17)\n"
        "print([clinical_agreement(a, b, weights).hex() for a in reports for b in reports])\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in range(1, 5)
    }  # fmt: skip
    assert len(answers) == 1
