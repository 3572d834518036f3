"""Small JSON files beside artifacts: what is no such file is told by its name."""

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
    whole = artifacts.stamp(tmp_path, kind="dataset", stage="validate_data")
    assert artifacts.read_stamp(tmp_path) == whole
    artifacts.write_json(tmp_path / artifacts.STAMP, {key: value for key, value in whole.items() if key != left_out})
    with pytest.raises(IntegrityError, match=rf"artifact\.json: {left_out} is None"):
        artifacts.read_stamp(tmp_path)
