"""Who reads `expert_gate.json` reads it by one schema: a damaged one masks nothing in silence."""

import json

import pytest
from tiny_llava import gate_of

from valor.errors import IntegrityError
from valor.models import gate_file

WHOLE = gate_of(calibration={"Edema": {"scale": 1.0, "bias": 0.0}}, masked=["Fracture"])


def test_a_gate_is_read_as_it_was_written(tmp_path):
    assert gate_file.read(tmp_path) == {"measured": False}
    (tmp_path / gate_file.GATE_FILE).write_text(json.dumps(WHOLE))
    assert gate_file.read(tmp_path) == WHOLE
    (tmp_path / gate_file.GATE_FILE).write_text('{"measured": false}')
    assert gate_file.read(tmp_path) == {"measured": False}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not JSON"),
        (json.dumps(WHOLE)[:40], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the file is"),
        ("{}", "measured is"),
        (json.dumps(WHOLE | {"measured": "no"}), "measured is 'no'"),
        (json.dumps({key: WHOLE[key] for key in WHOLE if key != "masked"}), "masked is"),
        (json.dumps(WHOLE | {"masked": ["edema"]}), r"masked\.0 is 'edema': no finding"),
        (json.dumps(WHOLE | {"masked": "Edema"}), "masked is 'Edema'"),
        (json.dumps(WHOLE | {"calibration": {"Edema": {}}}), r"calibration\.Edema\.scale is"),
        (json.dumps(WHOLE | {"calibration": {"Edema": {"scale": float("inf"), "bias": 0.0}}}), "calibration"),
        (json.dumps(WHOLE | {"paraphrase_noise": {"paper": float("nan"), "statements": None}}), "paraphrase_noise"),
        (json.dumps(WHOLE | {"paraphrase_noise": {"paper": -1.0, "statements": None}}), "paraphrase_noise"),
        (json.dumps(WHOLE | {"findings": {"Edema": {"auc": 7.0}}}), r"findings\.Edema"),
    ],
)
def test_a_damaged_gate_is_refused_by_its_file_and_key(tmp_path, content, told):
    (tmp_path / gate_file.GATE_FILE).write_text(content)
    with pytest.raises(IntegrityError, match=rf"expert_gate\.json: {told}.*measure it again"):
        gate_file.read(tmp_path)
