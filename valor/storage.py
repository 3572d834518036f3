"""Files and directories at a place that is a local path or gs://BUCKET/PREFIX: one way to read and write both.

A directory is put whole or not at all: its files go first and a manifest (`_manifest.json`: size and sha256 of each
file) last, so a directory without a manifest is work that somebody did not finish. Reading one back verifies it.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from valor import artifacts, gcs
from valor.artifacts import MANIFEST
from valor.errors import IntegrityError, ServiceError, UserError

log = logging.getLogger(__name__)

_NOT_OURS = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
)  # fmt: skip
"""What the system says of a place that can be no directory, or not this user's."""


def is_remote(uri: str | Path) -> bool:
    """Tell whether `uri` is in Google Cloud Storage."""
    return str(uri).startswith("gs://")


def join(uri: str | Path, *parts: str) -> str:
    """Return `uri` with relative path parts appended."""
    return "/".join([str(uri).rstrip("/"), *(_safe(part) for part in parts)])


def exists(uri: str | Path) -> bool:
    """Tell whether there is a file, or a directory that holds one, at `uri`."""
    return gcs.exists(str(uri)) if is_remote(uri) else _local(uri).exists()


def is_complete(uri: str | Path) -> bool:
    """Tell whether the directory at `uri` was put whole, that is, whether its manifest is there."""
    return exists(join(uri, MANIFEST))


def list_files(uri: str | Path) -> list[str]:
    """Return the sorted relative paths of all files below `uri`; a missing directory has none."""
    return [name for name, _, _ in listing(uri)]


def listing(uri: str | Path) -> list[tuple[str, int, str]]:
    """Return (relative path, size in bytes, stamp) of all regular files below `uri`, sorted by path.

    Raises UserError for a name that is no UTF-8.

    The stamp changes when the file does: the time of modification in ns, or the object's generation.
    """
    if is_remote(uri):
        return sorted((_safe(name), size, stamp) for name, size, stamp in gcs.listing(str(uri)))
    root, rows = _local(uri), []
    for folder, names in _walk(root):
        for name in names:
            path = Path(folder, name)
            try:
                found = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nothing, or to itself, is no file
                    raise _unreadable(error, root) from error
                continue
            if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
                continue
            rows.append((_utf8(path.relative_to(root).as_posix(), root), found.st_size, str(found.st_mtime_ns)))
    return sorted(rows)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files), links to directories followed; a folder that cannot be read is an error."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _unreadable(error, root) from error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:  # a link back to a folder above it, or a second link to the same
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        yield folder, names


def _utf8(name: str, root: Path) -> str:
    """Return a file's name; one in another encoding could be written to no table."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{root}: the file name {name!a} is no UTF-8; rename the file") from None
    return name


def _unreadable(error: OSError, root: Path) -> ServiceError:
    return ServiceError(
        f"{error.filename}: {error.strerror} while listing {root}; mend the access or the mount, then run again"
    )


def get_kept(uri: str | Path, local: str | Path) -> bool:
    """Copy a directory that was kept at `uri` to `local`; return False where there is none or it is damaged."""
    if not is_complete(uri):
        return False
    try:
        get_dir(uri, local)
    except IntegrityError as error:
        log.warning("%s; it is made again", error)
        _delete(join(uri, MANIFEST))
        return False
    return True


def keep(local: str | Path, uri: str | Path) -> None:
    """Put a directory at `uri` unless a whole one is there: another task made the same, and may be reading it."""
    if not is_complete(uri):
        put_dir(local, uri)


def read_bytes(uri: str | Path) -> bytes:
    """Return a file's content; raise UserError where there is none."""
    if is_remote(uri):
        return gcs.read_bytes(str(uri))
    try:
        return _local(uri).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{uri}: no such file") from None


def put_file(local: str | Path, uri: str | Path) -> None:
    """Copy a local file to `uri`, in place of what is there, atomically."""
    if is_remote(uri):
        gcs.upload(local, str(uri))
        return
    target = _local(uri)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(local, partial)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def put_dir(local: str | Path, uri: str | Path) -> dict[str, Any]:
    """Copy a local directory to `uri` (files first, manifest last) and return the manifest.

    What was at `uri` stops being complete before the first file is replaced; files that the new directory does not
    hold are removed. Symbolic links are followed.
    """
    source = Path(local)
    if not source.is_dir():
        raise UserError(f"{local}: no such directory")
    names = [name for name in list_files(source) if name != MANIFEST]
    manifest = {"files": {name: _facts(source / name) for name in names}}
    old = set(list_files(uri))
    if MANIFEST in old:
        _delete(join(uri, MANIFEST))
    for name in names:
        put_file(source / name, join(uri, name))
    for name in sorted(old - set(names) - {MANIFEST}):
        _delete(join(uri, name))
    _put_json(manifest, join(uri, MANIFEST))
    return manifest


def get_dir(uri: str | Path, local: str | Path, *, manifest: bool = True) -> Path:
    """Copy the directory at `uri` to `local`, replacing it atomically, and return `local`.

    Args:
        uri: where it is.
        local: the directory to make; the manifest is not copied into it.
        manifest: require and verify the manifest; without, take whatever files are there (an outside directory).

    Raises:
        IntegrityError: no manifest, or a file is missing or altered.
        UserError: there is nothing at `uri`.
    """
    expected = read_manifest(uri)["files"] if manifest else dict.fromkeys(list_files(uri))
    if not expected:
        raise UserError(f"{uri}: no such directory, or an empty one")
    with artifacts.atomic_dir(Path(local)) as folder:
        for name, facts in expected.items():
            target = folder / _safe(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _get_file(join(uri, name), target, required=facts is not None)
            if facts is not None and _facts(target) != facts:
                raise IntegrityError(_altered(join(uri, name), _facts(target), facts))
    return Path(local)


def verify_dir(uri: str | Path) -> dict[str, Any]:
    """Compare a local directory with its manifest, file by file, and return the manifest.

    Raises:
        IntegrityError: no manifest, or a file is missing, altered or added.
        UserError: there is nothing at `uri`, or it is remote (get it first).
    """
    if is_remote(uri):
        raise UserError(f"{uri}: only a local directory can be verified in place; get it first")
    manifest = read_manifest(uri)
    found = {name: _facts(_local(uri) / name) for name in list_files(uri) if name != MANIFEST}
    for name in sorted(found.keys() | manifest["files"].keys()):
        if found.get(name) != manifest["files"].get(name):
            raise IntegrityError(_altered(join(uri, name), found.get(name), manifest["files"].get(name)))
    return manifest


def read_manifest(uri: str | Path) -> dict[str, Any]:
    """Return the manifest of a directory: `{"files": {relative path: {"size", "sha256"}}}`."""
    place = join(uri, MANIFEST)
    if not exists(place):
        if not exists(uri):
            raise UserError(f"{uri}: no such directory")
        raise IntegrityError(f"{place}: missing; whoever wrote {uri} did not finish, write it again")
    try:
        value = json.loads(read_bytes(place))
        for name in value["files"]:
            _safe(name)
        return value
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{place}: not a manifest; write {uri} again") from None


def delete_tree(uri: str | Path) -> None:
    """Delete everything at and below `uri`, the manifest first; nothing there is no error."""
    if not is_remote(uri):
        path = _local(uri)
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        return
    if not gcs.prefix(str(uri)):
        raise UserError(f"{uri}: will not delete a whole bucket; name a directory in it")
    for name in sorted(list_files(uri), key=lambda name: name != MANIFEST):
        _delete(join(uri, name))


@contextlib.contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Turn what the system says against writing at a local place into an error that names it.

    Raises:
        UserError: the place cannot be made, or not by this user.
        ResourceError: the disk is full.
        ServiceError: any other reason, as a mount has them.
    """
    try:
        with artifacts.full_disk_is_a_resource_error(Path(place)):
            yield
    except OSError as error:
        words = f"{place}: cannot be written ({error.strerror})"
        if error.errno in _NOT_OURS:
            raise UserError(f"{words}; choose another place, or mend the access") from error
        raise ServiceError(f"{words}; mend the mount, then run again") from error


def _local(uri: str | Path) -> Path:
    text = str(uri)
    if "://" in text and not text.startswith("file://"):
        raise UserError(f"{uri}: storage is a local path or gs://BUCKET/PREFIX")
    return Path(text.removeprefix("file://"))


def _safe(name: str) -> str:
    """Return a relative path that cannot leave its directory."""
    if not artifacts.stays_inside(name):
        raise IntegrityError(f"{name!r}: a file name in storage that leaves its directory; refuse the directory")
    return name


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": artifacts.digest_file(path)}


def _altered(place: str, found: dict[str, Any] | None, expected: dict[str, Any] | None) -> str:
    def shown(facts: dict[str, Any] | None) -> str:
        return f"{facts['size']} bytes, sha256 {facts['sha256']}" if facts else "no such file"

    return f"{place}: holds {shown(found)}, the manifest says {shown(expected)}; it was altered, put it again"


def _put_json(value: Any, uri: str) -> None:
    if is_remote(uri):
        gcs.upload_text(json.dumps(value, indent=2, sort_keys=True), uri, "application/json")
        return
    _local(uri).parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(_local(uri), value)


def _get_file(uri: str, target: Path, *, required: bool) -> None:
    try:
        if is_remote(uri):
            gcs.download(uri, target)
        else:
            shutil.copyfile(_local(uri), target)
    except (FileNotFoundError, UserError):
        if required:
            raise IntegrityError(f"{uri}: missing, the manifest names it; put the directory again") from None
        raise


def _delete(uri: str) -> None:
    if is_remote(uri):
        gcs.delete(uri)
    else:
        _local(uri).unlink(missing_ok=True)
