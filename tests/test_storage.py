"""Storage, the same contract on a local path and on a gs:// bucket of an emulator on loopback."""

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from valor import artifacts, gcs, storage
from valor.data.shards import plan_shards
from valor.errors import IntegrityError, ResourceError, ServiceError, UserError
from valor.recipe import DataSettings

HAS_EMULATOR = all(importlib.util.find_spec(name) for name in ("gcp_storage_emulator", "google.cloud.storage"))


@pytest.fixture(scope="session")
def emulator():
    if not HAS_EMULATOR:
        pytest.skip("gcp-storage-emulator is not installed")
    from gcp_storage_emulator.server import create_server

    port = _free_port()
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="valor-test"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(params=["local", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    url = request.getfixturevalue("emulator")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    return f"gs://valor-test/{tmp_path.name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "made"
    (path / "sub").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"one")
    (path / "sub" / "b with space.json").write_text("{}")
    (path / "empty").write_bytes(b"")
    return path


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_directory_comes_back_as_it_went(place, folder, tmp_path):
    assert not storage.exists(place)
    assert storage.list_files(place) == []
    manifest = storage.put_dir(folder, place)
    assert storage.exists(place)
    assert storage.is_complete(place)
    assert storage.list_files(place) == sorted([storage.MANIFEST, *content(folder)])
    assert manifest["files"]["a.bin"]["sha256"] == artifacts.digest_file(folder / "a.bin")
    back = storage.get_dir(place, tmp_path / "back")
    assert content(back) == content(folder)
    assert artifacts.digest_dir(back) == artifacts.digest_dir(folder)


def test_putting_another_directory_leaves_nothing_of_the_old(place, folder, tmp_path):
    storage.put_dir(folder, place)
    (folder / "a.bin").unlink()
    (folder / "new").write_text("new")
    storage.put_dir(folder, place)
    assert content(storage.get_dir(place, tmp_path / "back")) == content(folder)


def test_the_manifest_comes_last_and_goes_first(place, folder, monkeypatch):
    storage.put_dir(folder, place)
    before = storage.put_file

    def fail_on_the_second(local, uri):
        if uri.endswith("empty"):
            raise ConnectionError("gone")
        before(local, uri)

    monkeypatch.setattr(storage, "put_file", fail_on_the_second)
    with pytest.raises(ConnectionError):
        storage.put_dir(folder, place)
    assert not storage.is_complete(place)
    with pytest.raises(IntegrityError, match="did not finish"):
        storage.get_dir(place, folder.parent / "back")


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_what_was_altered_is_not_handed_out(place, folder, tmp_path, how):
    storage.put_dir(folder, place)
    if how == "altered":
        (tmp_path / "other").write_bytes(b"two")
        storage.put_file(tmp_path / "other", storage.join(place, "a.bin"))
    else:
        storage.delete_tree(place)
        (tmp_path / storage.MANIFEST).write_text(json.dumps({"files": {"a.bin": {"size": 3, "sha256": "0" * 64}}}))
        storage.put_file(tmp_path / storage.MANIFEST, storage.join(place, storage.MANIFEST))
    with pytest.raises(IntegrityError, match=r"a\.bin"):
        storage.get_dir(place, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "..\\outside", ""])
def test_a_manifest_cannot_write_outside_its_directory(place, folder, tmp_path, name):
    storage.put_dir(folder, place)
    (tmp_path / storage.MANIFEST).write_text(json.dumps({"files": {name: {"size": 3, "sha256": "0" * 64}}}))
    storage.put_file(tmp_path / storage.MANIFEST, storage.join(place, storage.MANIFEST))
    with pytest.raises(IntegrityError, match="leaves its directory"):
        storage.get_dir(place, tmp_path / "deep" / "back")
    with pytest.raises(IntegrityError):
        storage.join(place, name)


def test_single_files_and_listings(place, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    uri = storage.join(place, "dir/file")
    with pytest.raises(UserError, match="no such file"):
        storage.read_bytes(uri)
    storage.put_file(tmp_path / "file", uri)
    assert storage.read_bytes(uri) == b"abc"
    [(name, size, stamp)] = storage.listing(place)
    assert (name, size) == ("dir/file", 3)
    assert storage.listing(place)[0][2] == stamp
    (tmp_path / "file").write_bytes(b"abd")
    storage.put_file(tmp_path / "file", uri)
    assert storage.listing(place)[0][2] != stamp


def test_a_listing_follows_links_ends_in_loops_and_hides_no_failure(tmp_path, monkeypatch):
    (tmp_path / "disk2").mkdir()
    (tmp_path / "disk2" / "b").write_text("b")
    root = tmp_path / "root"
    (root / "p10").mkdir(parents=True)
    (root / "p10" / "a").write_text("a")
    (root / "p11").symlink_to(tmp_path / "disk2")
    (root / "p10" / "up").symlink_to(root)
    (root / "itself").symlink_to("itself")
    (root / "nothing").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    assert storage.list_files(root) == ["p10/a", "p11/b"]
    assert storage.list_files(tmp_path / "none") == []
    scandir = os.scandir

    def broken(path):
        if str(path).endswith("p10"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(ServiceError, match="p10: Input/output error while listing"):
        storage.list_files(root)


def test_a_file_name_that_no_table_could_hold_is_the_users_to_mend(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.dcm")).touch()
    with pytest.raises(UserError, match=r"file name 'M\\udcfcller.dcm' is no UTF-8"):
        storage.list_files(tmp_path)


def test_what_is_kept_is_put_once_and_made_again_where_it_is_damaged(place, folder, tmp_path):
    uri = f"{place}/kept"
    assert not storage.get_kept(uri, tmp_path / "none")
    storage.keep(folder, uri)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.bin").write_text("other")
    storage.keep(other, uri)
    assert storage.get_kept(uri, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    storage.put_file(other / "a.bin", f"{uri}/a.bin")
    assert not storage.get_kept(uri, tmp_path / "damaged")
    storage.keep(other, uri)
    assert storage.get_kept(uri, tmp_path / "anew")
    assert content(tmp_path / "anew") == content(other)


def test_deleting_spares_neighbours_and_may_be_repeated(place, folder):
    storage.put_dir(folder, storage.join(place, "run"))
    storage.put_dir(folder, storage.join(place, "run-2"))
    storage.delete_tree(storage.join(place, "run"))
    storage.delete_tree(storage.join(place, "run"))
    assert not storage.exists(storage.join(place, "run"))
    assert storage.is_complete(storage.join(place, "run-2"))


def test_an_outside_directory_needs_no_manifest_if_asked(place, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    storage.put_file(tmp_path / "file", storage.join(place, "sub/file"))
    with pytest.raises(IntegrityError):
        storage.get_dir(place, tmp_path / "back")
    assert content(storage.get_dir(place, tmp_path / "back", manifest=False)) == {"sub/file": b"abc"}
    with pytest.raises(UserError, match="no such directory"):
        storage.get_dir(storage.join(place, "nothing"), tmp_path / "back", manifest=False)


def test_verify_in_place(folder, tmp_path):
    place = tmp_path / "store"
    storage.put_dir(folder, place)
    storage.verify_dir(place)
    (place / "added").write_text("x")
    with pytest.raises(IntegrityError, match="added"):
        storage.verify_dir(place)


def test_other_schemes_and_whole_buckets_are_refused(monkeypatch):
    with pytest.raises(UserError, match="gs://BUCKET"):
        storage.list_files("s3://bucket/x")
    with pytest.raises(UserError, match="whole bucket"):
        storage.delete_tree("gs://bucket")
    with pytest.raises(UserError, match="names no bucket"):
        storage.delete_tree("gs://")


@pytest.mark.skipif(not HAS_EMULATOR, reason="google-cloud-storage is not installed")
def test_a_service_that_is_gone_is_a_service_error(monkeypatch):
    monkeypatch.setattr(gcs, "RETRY_S", 1.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{_free_port()}")
    with pytest.raises(ServiceError) as caught:
        storage.read_bytes("gs://valor-test/x")
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_resource_error(folder, tmp_path):
    (folder / "big").write_bytes(os.urandom(200_000))
    script = "import sys; from valor import storage; storage.put_dir(sys.argv[1], sys.argv[2])"
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = f"mount -t tmpfs -o size=64k tmpfs {mount} && exec {sys.executable} -c '{script}' {folder} {mount}/store"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    if done.stderr.startswith(("unshare:", "mount:", "sh:")):
        pytest.skip("cannot mount a tmpfs here")
    assert ResourceError.__name__ in done.stderr
    assert "no space left" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_torch_that_finds_the_disk_full_is_a_resource_error(size):
    import torch

    with (
        pytest.raises(ResourceError, match="/scratch: no space left on the device"),
        artifacts.full_disk_is_a_resource_error(Path("/scratch")),
    ):
        torch.save({"moments": torch.ones(size)}, "/dev/full")


@pytest.mark.parametrize("number", [28, 122])
def test_safetensors_that_finds_the_disk_or_the_quota_full_is_a_resource_error(number):
    from safetensors import SafetensorError

    full = SafetensorError(f"Error while serializing: I/O error: no room (os error {number})")
    with pytest.raises(ResourceError), artifacts.full_disk_is_a_resource_error(Path("/scratch")):
        raise full
    for other in (SafetensorError("header too large"), RuntimeError("PytorchStreamReader failed: no such file")):
        with pytest.raises(type(other)), artifacts.full_disk_is_a_resource_error(Path("/scratch")):
            raise other


def test_a_stage_on_a_full_disk_ends_with_its_exit_code_though_nothing_can_be_recorded(tmp_path):
    mount = tmp_path / "tiny"
    mount.mkdir()
    settings = json.dumps({"phantom": {"train": 60, "val": 1, "test": 1, "image_px": 256}, "shards": 1})
    (tmp_path / "settings.json").write_text(settings)
    (shard,), _ = plan_shards("phantom", annotations_root="", settings=DataSettings.model_validate_json(settings))
    (tmp_path / "shard.json").write_text(shard.to_json())
    # The disk is full before the stage begins: its log and events have no place either.
    command = f"""mount -t tmpfs -o size=1m tmpfs {mount} &&
        mkdir -p {mount}/run/logs && : > {mount}/run/events.jsonl && : > {mount}/run/logs/ingest.log &&
        cat /dev/zero > {mount}/fill 2> {tmp_path}/full;
        mountpoint -q {mount} && exec {sys.executable} -m valor ingest --settings @{tmp_path}/settings.json \
        --value root=phantom --value annotations_root= --value shard="$(cat {tmp_path}/shard.json)" \
        --output output={mount}/shard"""
    environment = {
        **os.environ,
        "VALOR_RUN_DIR": f"{mount}/run",
        "VALOR_HOME": f"{mount}/home",
        "VALOR_TRACKING": "off",
    }
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, env=environment)
    if not (tmp_path / "full").exists():
        pytest.skip("cannot mount a tmpfs here")
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("valor: error: ")
    assert "no space left" in done.stderr
    assert done.stdout == ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, UserError), (errno.EROFS, UserError), (errno.EIO, ServiceError), (errno.ENOSPC, ResourceError)],
)
def test_what_the_system_says_against_writing_names_the_place(tmp_path, monkeypatch, number, kind):
    (tmp_path / "a").write_text("a")

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.shutil, "copyfile", refused)
    with pytest.raises(kind, match=rf"{tmp_path}/there/b: .*; "):
        storage.put_file(tmp_path / "a", tmp_path / "there" / "b")


def test_a_store_that_cannot_be_made_is_the_users_to_change(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("b")
    with pytest.raises(UserError, match=r"^/proc/valor/store/b: cannot be written .*choose another place"):
        storage.keep(tmp_path / "a", "/proc/valor/store")
