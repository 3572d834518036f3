"""Places that the environment names: a wrong one is told by its variable before a stage works there."""

import pytest

from valor.context import Context
from valor.errors import UserError


@pytest.mark.parametrize("variable", ["VALOR_WORK_ROOT", "VALOR_MODELS_ROOT"])
@pytest.mark.parametrize("value", ["gs://", "gs:", "gs:///prefix"])
def test_a_bucket_has_a_name(monkeypatch, variable, value):
    """Without one the work would go to a local folder `gs:`, and be lost with the pod."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"^{variable} is '{value}', which names no bucket; set it to gs://BUCKET"):
        Context.from_environment()
    monkeypatch.setenv(variable, "gs://bucket")
    assert "gs://bucket" in (Context.from_environment().work_root, Context.from_environment().models_root)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("s3://bucket/x", "set it to a directory or gs://"),
        ("GS://b/x", "set it to a directory or gs://"),
        ("/" + 300 * "n", "File name too long"),
    ],
)
def test_a_place_that_is_none_is_told_by_its_variable(monkeypatch, value, words):
    monkeypatch.setenv("VALOR_WORK_ROOT", value)
    with pytest.raises(UserError, match=rf"^VALOR_WORK_ROOT.*{words}"):
        Context.from_environment()


def test_a_place_may_be_a_file_address(monkeypatch, tmp_path):
    monkeypatch.setenv("VALOR_WORK_ROOT", f"file://{tmp_path}/work")
    assert Context.from_environment().work_root == f"{tmp_path}/work"


def test_an_empty_variable_is_an_unset_one(monkeypatch, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    monkeypatch.setenv("VALOR_WORK_ROOT", "")
    monkeypatch.setenv("VALOR_HOME", str(taken))
    with pytest.raises(UserError, match=rf"^VALOR_HOME: {taken} is a file"):
        Context.from_environment()


@pytest.mark.parametrize("variable", ["VALOR_WORK_ROOT", "VALOR_HOME"])
@pytest.mark.parametrize("below", ["", "/some/where"])
def test_a_place_is_not_below_a_file(monkeypatch, tmp_path, variable, below):
    for name in ("VALOR_WORK_ROOT", "VALOR_MODELS_ROOT"):
        monkeypatch.delenv(name, raising=False)
    taken = tmp_path / "taken"
    monkeypatch.setenv(variable, f"{taken}{below}")
    assert Context.from_environment().work_root.startswith(str(taken))
    taken.write_text("")
    with pytest.raises(UserError, match=rf"^{variable}: {taken} is a file; set it to a directory"):
        Context.from_environment()
