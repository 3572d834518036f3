"""Every way to deny a finding, for every finding: read as a denial, and paid as one."""

import pytest

from valor.clinical.labeler import label
from valor.clinical.vocabulary import OBSERVATIONS
from valor.rewards.agreement import AgreementWeights
from valor.rewards.text import clinical_agreement

NOUNS = {
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Cardiomegaly": "cardiomegaly",
    "Lung Opacity": "pulmonary opacity",
    "Lung Lesion": "pulmonary nodule",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
    "Support Devices": "support device",
}
# Each denial beside the assertion that looks most like it.
DENIED = {
    "No {x}.": "Now {x}.",
    "Without {x}.": "With {x}.",
    "No evidence of {x}.": "Evidence of {x}.",
    "Evidence against {x}.": "Evidence for {x}.",
    "Findings argue against {x}.": "Findings argue for {x}.",
    "Absent {x}.": "Recent {x}.",
    "Resolved {x}.": "Unresolved {x}.",
    "Interval resolution of left {x}.": "No interval resolution of left {x}.",
    "The study rules out {x}.": "The study points out {x}.",
    "Lack of {x}.": "Lot of {x}.",
    "Nothing to suggest {x}.": "Nothing but {x}.",
    "Left {x} absent.": "Left {x} present.",
    "{x} is absent.": "{x} is not absent.",
    "{x}: absent.": "{x}: present.",
    "{x}: none.": "{x}: yes.",
    "{x} - none.": "{x} - yes.",
    "{x} (none).": "{x} (large).",
    "{x}: No.": "{x}: Now.",
    "{x}? No.": "{x} still. No mediastinal shift.",
    "{x}: no evidence.": "{x}: good evidence.",
    "{x}: negative.": "{x}: positive.",
    "{x}: not seen.": "{x}: well seen.",
    "{x} is not present.": "{x} is present.",
    "{x} isn't visible.": "{x} is visible.",
    "{x} is no longer seen.": "{x} is again seen.",
    "{x} has not been identified.": "{x} has now been identified.",
    "{x} was never seen.": "{x} was ever seen.",
    "{x} does not appear to be present.": "{x} does appear to be present.",
    "{x} is not there.": "{x} is still there.",
    "{x} (not seen).": "{x} (not seen on the prior).",
    "{x} with interval resolution.": "{x} with partial resolution.",
    "Unable to identify {x}.": "Able to identify {x}.",
    "{x} ruled out.": "{x} pointed out.",
    "{x} has been ruled out.": "{x} has been pointed out.",
    "{x} excluded.": "{x} included.",
    "{x} is gone.": "{x} is largely gone.",
    "{x} has disappeared.": "{x} has appeared.",
    "{x} resolved.": "{x} unresolved.",
    "{x} has resolved.": "{x} has not resolved.",
    "Left {x} has now resolved.": "Left {x} has now partially resolved.",
    "{x} has completely resolved.": "{x} has not completely resolved.",
    "{x} has since entirely resolved.": "{x} has nearly entirely resolved.",
    "{x}, now cleared.": "{x}, not cleared.",
    "Left {x} has been removed.": "Left {x} has not been removed.",
    "{x} is not identifiable.": "{x} is identifiable.",
    "Lacking {x}.": "Lasting {x}.",
    "{x} would not be expected.": "{x} was not expected.",
    "{x} did not recur.": "{x} did recur.",
    "{x}? Negative.": "{x}? Positive.",
    "{x}? No evidence.": "{x} still. No evidence of mediastinal shift.",
    "{x}: false.": "{x}: true.",
    "{x} is ruled-out.": "{x} is pointed-out.",
    "{x}-free lungs.": "{x}-bearing lungs.",
    "Hardly any {x}.": "Hardly new {x}.",
    "We cannot see {x}.": "We can now see {x}.",
    "Couldn't identify {x}.": "Did identify {x}.",
    "{x} is not demonstrable.": "{x} is demonstrable.",
    "{x} is out of the question.": "{x} is beyond question.",
}
DOUBTED = {
    "{x} is unlikely.": "{x} is likely.",
    "Left {x} unlikely.": "Left {x} likely.",
    "Unlikely {x}.": "Likely {x}.",
    "Findings unlikely to represent {x}.": "Findings likely to represent {x}.",
    "{x} is less likely.": "{x} is most likely.",
    "Less likely {x}.": "Most likely {x}.",
    "{x} is not likely.": "{x} is quite likely.",
    "{x} is doubtful.": "{x} is definite.",
    "I doubt {x}.": "No doubt {x}.",
    "{x} not suspected.": "{x} not subtle.",
    "{x} is not clinically suspected.": "{x} is clinically evident.",
    "{x} cannot be confirmed.": "{x} is confirmed.",
    "{x} cannot be ruled out.": "{x} is pointed out.",
    "{x} cannot be ruled-out.": "{x} is pointed-out.",
    "{x} may not be identified on this study.": "{x} may now be identified on this study.",
    "{x} is not excluded.": "{x} is not exceptional.",
    "{x} has not yet been excluded.": "{x} has not yet been treated.",
    "{x} needs to be ruled out.": "{x} needs to be drained.",
}


def put(frame, finding):
    text = frame.format(x=NOUNS[finding])
    return text[0].upper() + text[1:]


@pytest.mark.parametrize("finding", OBSERVATIONS)
def test_denials_deny_and_what_looks_like_them_asserts(finding):
    assert {frame: label(put(frame, finding)).get(finding) for frame in DENIED} == dict.fromkeys(DENIED, "negative")
    assert {frame: label(put(frame, finding)).get(finding) for frame in DOUBTED} == dict.fromkeys(DOUBTED, "uncertain")
    assertions = [*DENIED.values(), *DOUBTED.values()]
    found = {frame: label(put(frame, finding)).get(finding) for frame in assertions}
    assert found == dict.fromkeys(assertions, "positive")


@pytest.mark.parametrize("finding", OBSERVATIONS)
@pytest.mark.parametrize("among_others", [False, True])
def test_no_denial_earns_more_than_no(finding, among_others):
    rest = f" Moderate right {NOUNS['Fracture' if finding != 'Fracture' else 'Pneumothorax']}." if among_others else ""

    def of(frame):
        return clinical_agreement(put("Left {x}.", finding) + rest, put(frame, finding) + rest, AgreementWeights())

    no, perhaps, yes = of("No {x}."), of("Possible left {x}."), of("Left {x}.")
    assert no < perhaps < yes == 1.0
    assert [frame for frame in DENIED if of(frame) > no] == []
    assert [frame for frame in DOUBTED if of(frame) > perhaps] == []


@pytest.mark.parametrize(
    ("text", "denied", "asserted"),
    [
        ("Effusion, pneumothorax: none.", {"Pleural Effusion", "Pneumothorax"}, set()),
        ("Effusion and pneumothorax absent.", {"Pleural Effusion", "Pneumothorax"}, set()),
        ("Small effusion and pneumothorax have resolved.", {"Pleural Effusion", "Pneumothorax"}, set()),
        ("Pneumothorax, no effusion.", {"Pleural Effusion"}, {"Pneumothorax"}),
        ("Pneumothorax: no, effusion: small.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Pneumothorax: no\nEffusion: small", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("There is no\neffusion.", {"Pleural Effusion"}, set()),
        ("Small effusion, pneumothorax: none.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Effusion: small, pneumothorax: none.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Effusion persists, pneumothorax absent.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Effusion and resolved pneumothorax.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Pneumothorax has resolved and effusion is seen.", {"Pneumothorax"}, {"Pleural Effusion"}),
        ("Pneumothorax resolved after placement of chest tube.", {"Pneumothorax"}, {"Support Devices"}),
        ("Opacity, unlikely to represent pneumonia.", set(), {"Lung Opacity"}),
        ("Pneumonia is unlikely given the effusion.", set(), {"Pleural Effusion"}),
        ("Pneumonia is less likely than atelectasis.", set(), {"Atelectasis"}),
        ("The left base is excluded from the film, right effusion.", set(), {"Pleural Effusion"}),
        ("Small effusion with no mediastinal shift.", set(), {"Pleural Effusion"}),
        ("Pneumonia? No effusion.", {"Pleural Effusion"}, {"Pneumonia"}),
        ("Effusion may have resolved.", set(), set()),
        ("Effusion, the costophrenic angle is not visible.", set(), {"Pleural Effusion"}),
        ("Effusion at the costophrenic angle is not visible.", {"Pleural Effusion"}, set()),
        ("Opacity in the left lower lung is not visible.", {"Lung Opacity"}, set()),
        ("No evidence against pneumonia.", set(), set()),
    ],
)
def test_a_denial_reaches_what_it_is_said_of(text, denied, asserted):
    found = {finding: value for finding, value in label(text).items() if finding != "No Finding"}
    assert {finding for finding, value in found.items() if value == "negative"} == denied
    assert {finding for finding, value in found.items() if value == "positive"} == asserted
