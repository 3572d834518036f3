import numpy as np

from valor.clinical.vocabulary import OBSERVATIONS
from valor.models.readings import agreement, mirrored, mirrored_targets, signature, targets

REPORTS = [
    "There is a left pleural effusion. No pneumothorax.",
    "No acute cardiopulmonary abnormality.",
    "Possible pneumonia. There is pleural effusion.",
]


def _agreement(*texts):
    return agreement(REPORTS, [signature(text) for text in texts]).T.tolist()


def test_wording_does_not_make_a_true_sentence_false():
    assert _agreement("The pneumothorax is absent.", "There is no pneumothorax.") == [[1, 1, 1], [1, 1, 1]]


def test_opposites_sides_and_silence_contradict():
    assert _agreement("There is pneumothorax.") == [[-1, -1, -1]]
    assert _agreement("Left pleural effusion.") == [[1, -1, 0]]
    assert _agreement("Right pleural effusion.") == [[-1, -1, 0]]


def test_a_sentence_agrees_only_as_a_whole():
    assert _agreement("Left pleural effusion and cardiomegaly.") == [[-1, -1, -1]]


def test_what_is_uncertain_cannot_be_judged():
    assert _agreement("There is pneumonia.") == [[-1, -1, 0]]
    assert _agreement("Possible pneumonia.")[0][2] == 1


def test_a_sentence_without_findings_is_never_judged():
    assert _agreement("The patient is rotated.") == [[0, 0, 0]]


def test_mirroring_exchanges_sides_and_is_its_own_inverse():
    assert mirrored(signature("Left pleural effusion.")) == signature("Right pleural effusion.")
    values, _ = targets(REPORTS)
    assert not np.array_equal(mirrored_targets(values), values)
    assert np.array_equal(mirrored_targets(mirrored_targets(values)), values)


def test_targets_are_the_reports_and_unknown_places_weigh_nothing():
    values, weights = (array.reshape(3, len(OBSERVATIONS), 7) for array in targets(REPORTS))
    effusion, pneumonia = OBSERVATIONS.index("Pleural Effusion"), OBSERVATIONS.index("Pneumonia")
    assert values[0, effusion, :4].tolist() == [1, 1, 0, 0]
    assert weights[0, effusion, :4].tolist() == [1, 1, 1, 1]
    assert weights[2, effusion].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert not weights[2, pneumonia].any()
    assert not values[1].any()
    assert weights[1].all()
