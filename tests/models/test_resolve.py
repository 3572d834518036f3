import pytest

from valor import storage
from valor.errors import ServiceError, UserError
from valor.models.resolve import resolve


@pytest.fixture
def model(clip, tmp_path):
    source = tmp_path / "source"
    for part in clip:
        part.save_pretrained(source)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling.py").write_text("import os")
    (source / "artifact.json").write_text("{}")
    return source


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    path.mkdir()
    return path


def _resolve(source, target, revision=""):
    return resolve(str(source), revision=revision, setting="models.base", path=target)


def test_a_local_model_comes_without_pickles_code_and_stamps(model, target):
    assert _resolve(model, target) == str(model)
    names = {file.name for file in target.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py", "artifact.json"}


def test_pickled_weights_alone_are_refused(model, target):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"models\.base .*no \*\.safetensors"):
        _resolve(model, target)


@pytest.mark.parametrize("place", ["/no/such/place", "./nowhere", "~/x", "a b", "a/b/c"])
def test_a_missing_directory_is_named(place, target):
    with pytest.raises(UserError, match="no such directory"):
        _resolve(place, target)


@pytest.mark.parametrize("revision", ["", "main", "v1.0", "abc123"])
def test_a_hub_id_needs_a_commit_hash(revision, target):
    with pytest.raises(UserError, match=r"models\.base_revision is .*40 hex digits"):
        _resolve("org/model", target, revision=revision)


def test_a_hub_out_of_reach_is_a_service_error(target, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="cannot be fetched from the hub"):
        _resolve("org/model", target, revision="0" * 40)


def test_a_model_that_storage_holds_is_verified(model, target, tmp_path):
    store = tmp_path / "store"
    storage.put_dir(model, store)
    _resolve(store, target)
    assert (target / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
