"""Small JSON files beside artifacts: what is no such file is told by its name."""

import contextlib
import json

import pytest

from valor import artifacts
from valor.data.manifest import DATASET_INFO, shard_paths
from valor.errors import IntegrityError

NO_OBJECT = (b"[]", b"null", b"3", b"", b'{"kind"', b'{"kind": "\xff"}', b"[" * 100_000)


@pytest.mark.parametrize("content", NO_OBJECT)
def test_what_is_no_json_object_is_named(tmp_path, content):
    for name, read in ((artifacts.STAMP, artifacts.read_stamp), (DATASET_INFO, shard_paths)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IntegrityError, match=rf"{name}: .*; run the stage that makes it again"):
            read(tmp_path)


@pytest.mark.parametrize("left_out", ["kind", "stage", "digest"])
def test_a_stamp_says_what_it_stamps(tmp_path, left_out):
    (tmp_path / "rows.txt").write_text("rows")
    whole = artifacts.stamp(tmp_path, kind="dataset", stage="validate_data")
    assert artifacts.read_stamp(tmp_path) == whole
    artifacts.write_json(tmp_path / artifacts.STAMP, {key: value for key, value in whole.items() if key != left_out})
    with pytest.raises(IntegrityError, match=rf"artifact\.json: {left_out} is None"):
        artifacts.read_stamp(tmp_path)


FACTS = {"size": 4, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [None, {}, [1], "x", {"rows.txt": 3}, {"rows.txt": {"size": 4}}, {"rows.txt": {**FACTS, "size": "4"}},
     {"/etc/hostname": FACTS}, {"../rows.txt": FACTS}, {"a/../../rows.txt": FACTS}],
)  # fmt: skip
def test_a_stamp_lists_files_within_its_directory(tmp_path, files):
    """Without a list nothing would be verified; one that leads out of the directory would be followed."""
    (tmp_path / "rows.txt").write_text("rows")
    whole = artifacts.stamp(tmp_path, kind="report", stage="evaluate")
    artifacts.write_json(tmp_path / artifacts.STAMP, {**whole, "files": files})
    with pytest.raises(IntegrityError, match=r"artifact\.json: files is no listing .*; run the stage"):
        artifacts.read_stamp(tmp_path)


def test_nothing_is_stamped_that_holds_no_file(tmp_path):
    with pytest.raises(ValueError, match="holds no file"):
        artifacts.stamp(tmp_path, kind="report", stage="evaluate")


@pytest.mark.parametrize("weights", [None, [], "x"])
def test_a_checkpoints_info_names_its_weights(tmp_path, weights):
    artifacts.write_json(tmp_path / artifacts.CHECKPOINT_INFO, {"stage": "sft", "weights": weights})
    with pytest.raises(IntegrityError, match=r"valor\.json: weights is .*, expected sha256 by file"):
        artifacts.load_checkpoint_info(tmp_path, verify=False)


@pytest.mark.parametrize("kind", ["report", "dataset"])
@pytest.mark.parametrize("digest", ["0" * 64, ""])
def test_a_digest_is_that_of_the_content(tmp_path, kind, digest):
    """It names work in progress, cached results and parents: another artifact's would mix them up."""
    (tmp_path / "rows.txt").write_text("rows")
    artifacts.write_json(tmp_path / DATASET_INFO, {"digest": "1" * 64})
    whole = artifacts.stamp(tmp_path, kind=kind, stage="made", digest="1" * 64 if kind == "dataset" else "")
    artifacts.verify_files(tmp_path, artifacts.read_stamp(tmp_path))
    artifacts.write_json(tmp_path / artifacts.STAMP, {**whole, "digest": digest})
    with pytest.raises(IntegrityError, match=rf"artifact\.json: digest is '{digest}', its content has '\w+'; remove"):
        artifacts.verify_files(tmp_path, artifacts.read_stamp(tmp_path))


def test_an_index_that_names_weights_elsewhere_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert list(artifacts.weight_digests(tmp_path)) == ["model.safetensors"]
    for shards in ({"a": "../other/model.safetensors"}, {"a": "gone.safetensors"}, "x"):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(IntegrityError, match=r"index\.json: names .* no weights file beside it"):
            artifacts.weight_digests(tmp_path)


def test_a_directory_takes_its_place_whole_or_not_at_all_and_leaves_a_users_alone(tmp_path):
    out, users = tmp_path / "out", tmp_path / "out.partial"
    users.mkdir()
    (users / "notes.txt").touch()
    for name in ("first", "second"):
        # What a killed writer left is nobody's and goes.
        artifacts.partial_of(out).mkdir()
        (artifacts.partial_of(out) / "rest").touch()
        with artifacts.atomic_dir(out) as partial:
            (partial / name).touch()
        assert [path.name for path in out.iterdir()] == [name]
    with contextlib.suppress(KeyError), artifacts.atomic_dir(out) as partial:
        (partial / "third").touch()
        raise KeyError
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "out",
        "out.partial",
        "out.partial/notes.txt",
        "out/second",
    ]
