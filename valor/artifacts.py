"""Directories as artifacts: digests, atomic writes, the producer's stamp, checkpoints.

Every output of a stage is a directory with an `artifact.json`, written last: a directory without one is
not an artifact. Digests are sha256 in hex over content, never over paths, times or file order.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from valor.errors import IntegrityError, ResourceError, UserError, ValorError, shown

STAMP = "artifact.json"
CHECKPOINT_INFO = "valor.json"
MANIFEST = "_manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ZIP_WRITER = ("PytorchStreamWriter failed", "unexpected pos ", "iostream error")
_NOT_CONTENT = {STAMP, CHECKPOINT_INFO, MANIFEST}
_OWN_DIGEST = {"dataset": "dataset.json"}
"""Kinds whose digest is not that of their files, and the file that says it too."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_value(value: Any) -> str:
    """Return the sha256 of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_dir(path: Path) -> str:
    """Return the sha256 over the sorted (relative path, sha256) pairs of a directory's content files.

    `artifact.json`, `valor.json` and storage's manifest are left out: they tell of the content, they are not it.
    """
    return _digest_of({p: digest_file(path / p) for p in _files(path)})


def digest_manifest(manifest: Mapping[str, Any]) -> str:
    """Return what `digest_dir` gives for the directory that a manifest of `valor.storage` describes."""
    return _digest_of({Path(name): facts["sha256"] for name, facts in manifest["files"].items()})


def _digest_of(digests: Mapping[Path, str]) -> str:
    """Return a directory's digest from its files' (relative path: sha256)."""
    return digest_value([[p.as_posix(), digests[p]] for p in sorted(digests) if p.name not in _NOT_CONTENT])


def _files(path: Path) -> list[Path]:
    """Return the relative paths of a directory's files, the stamp left out."""
    return [p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name != STAMP]


def digest_code(parts: Iterable[str], libraries: Iterable[str]) -> str:
    """Return the sha256 of source files of `valor` (a module's file, or a package with all below it) and of versions.

    Args:
        parts: paths below the package `valor`, such as `models` or `data/manifest.py`.
        libraries: names of installed distributions.
    """
    root = Path(__file__).parent
    files = {
        file for part in parts for file in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))
    }
    sources = [[file.relative_to(root).as_posix(), digest_file(file)] for file in sorted(files)]
    return digest_value([sources, [[name, metadata.version(name)] for name in libraries]])


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically (temporary file, then rename)."""
    partial = path.with_name(path.name + ".partial")
    with full_disk_is_a_resource_error(path):
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a missing or broken one is an IntegrityError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            f"{path}: missing; the artifact is incomplete, run the stage that makes it again"
        ) from None
    except (ValueError, RecursionError) as error:
        # Cut, no UTF-8, or nested without end.
        raise IntegrityError(f"{path}: not JSON ({error}); run the stage that makes it again") from None
    if not isinstance(value, dict):
        raise IntegrityError(
            f"{path}: holds a JSON {type(value).__name__}, expected an object; run the stage that makes it again"
        )
    return value


@contextlib.contextmanager
def full_disk_is_a_resource_error(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" while writing `path` into a ResourceError."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        where = getattr(error, "filename", None) or path
        raise ResourceError(f"{where}: no space left on the device; free space there or move VALOR_HOME") from error


def _is_full_disk(error: Exception) -> bool:
    """Tell a full disk, which safetensors and torch's zip writer report with errors of their own."""
    if isinstance(error, ValorError):
        return False
    if isinstance(error, OSError):
        return error.errno in _FULL
    if type(error).__name__ == "SafetensorError":
        return any(f"(os error {number})" in str(error) for number in _FULL)
    # torch says where it failed and not why; short of a broken disk there is no other reason to write less than given.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ZIP_WRITER)


def partial_of(path: Path) -> Path:
    """Return where `atomic_dir` writes: always the same place, so that a killed writer's rest goes with the next one.

    Hidden, and named so that it is nobody else's: a user may well keep an `out.partial` beside `out`.
    """
    return path.with_name(f".{path.name}.valor-partial")


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that takes its place when the block succeeds, and vanishes when it fails."""
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_is_a_resource_error(path):
            partial.mkdir(parents=True)
            yield partial
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def stamp(path: Path, *, kind: str, stage: str, digest: str = "", **fields: Any) -> dict[str, Any]:
    """Write `artifact.json` into a finished output directory and return it.

    `digest` is the content digest where the kind defines its own (a dataset's row digest); else `digest_dir`. `files`
    lists names, sizes and sha256: a file that is gone or cut is seen without reading everything (`has_its_files`), and
    who reads the artifact verifies it (`verify_files`).

    Raises:
        ValueError: there is no file to stamp.
    """
    digests = {p: digest_file(path / p) for p in _files(path)}
    if not digests:
        raise ValueError(f"{path}: holds no file, so there is nothing to stamp")
    files = {p.as_posix(): {"size": (path / p).stat().st_size, "sha256": found} for p, found in digests.items()}
    value = {"kind": kind, "stage": stage, "digest": digest or _digest_of(digests), "files": files, **fields}
    write_json(path / STAMP, value)
    return value


def read_stamp(path: Path) -> dict[str, Any]:
    """Return the `artifact.json` of a directory.

    Raises:
        UserError: the directory itself is missing.
        IntegrityError: the stamp is missing, or does not say what it stamps.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such artifact directory")
    value = read_json(path / STAMP)
    for key in ("kind", "stage", "digest"):
        if not isinstance(value.get(key), str):
            raise IntegrityError(
                f"{path / STAMP}: {key} is {value.get(key)!r}, expected a text; run the stage that makes it again"
            )
    if not _is_listing(value.get("files")):
        raise IntegrityError(
            f"{path / STAMP}: files is no listing of the artifact's files by relative name, with size and sha256; run "
            "the stage that makes it again"
        )
    return value


def _is_listing(files: Any) -> bool:
    """Tell whether a stamp's `files` lists some, by names that stay within the directory."""
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            stays_inside(name)
            and isinstance(facts, dict)
            and isinstance(facts.get("size"), int)
            and isinstance(facts.get("sha256"), str)
            for name, facts in files.items()
        )
    )


def stays_inside(name: str) -> bool:
    """Tell whether a relative file name cannot leave the directory that it is joined to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def has_its_files(path: Path, stamp: Mapping[str, Any]) -> bool:
    """Tell whether every file that a directory's stamp lists is there in its size; content is not read."""
    sizes = {name: facts["size"] for name, facts in stamp["files"].items()}
    return sizes.items() <= _sizes(path).items()


def verify_files(path: Path, stamp: Mapping[str, Any]) -> None:
    """Compare an artifact's files with its stamp. Weights are left out: they are verified where they are loaded.

    Raises:
        IntegrityError: a file is missing or altered, or the digest is that of another artifact.
    """
    for name, facts in stamp["files"].items():
        if not name.endswith(".safetensors") and (
            not (path / name).is_file() or digest_file(path / name) != facts["sha256"]
        ):
            raise IntegrityError(
                f"{path / name}: missing or altered since {stamp['stage']} wrote it; remove {path} and run again to "
                "make it anew"
            )
    if own := _OWN_DIGEST.get(stamp["kind"]):
        digest = read_json(path / own).get("digest")
    else:
        digest = _digest_of({Path(name): facts["sha256"] for name, facts in stamp["files"].items()})
    if stamp["digest"] != digest:
        raise IntegrityError(
            f"{path / STAMP}: digest is {stamp['digest']!r}, its content has {digest!r}; remove {path} and run "
            "again to make it anew"
        )


def _sizes(path: Path) -> dict[str, int]:
    return {p.as_posix(): (path / p).stat().st_size for p in _files(path)}


def weight_digests(path: Path) -> dict[str, str]:
    """Return {file name: sha256} of a checkpoint's safetensors files.

    Raises:
        IntegrityError: there is none, or an index names weights beside them, which nobody would verify.
    """
    files = {p.name: digest_file(p) for p in sorted(path.glob("*.safetensors"))}
    if not files:
        raise IntegrityError(f"{path}: holds no *.safetensors file; a checkpoint is what save_pretrained writes")
    for index in path.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {""}
        if strange := sorted(map(str, names - files.keys())):
            raise IntegrityError(f"{index}: names {shown(strange[0])!r}, which is no weights file beside it")
    return files


def write_checkpoint_info(path: Path, *, stage: str, parents: Mapping[str, str], **fields: Any) -> dict[str, Any]:
    """Write `valor.json` beside the weights (see docs/architecture.md, "Artifacts") and return it."""
    value = {"stage": stage, "parents": dict(parents), "weights": weight_digests(path), **fields}
    write_json(path / CHECKPOINT_INFO, value)
    return value


def add_to_checkpoint_info(path: Path, **fields: Any) -> None:
    """Add what only the stage's caller knows (code, producing run) to `valor.json`; no checkpoint, no effect."""
    info = path / CHECKPOINT_INFO
    if info.exists():
        write_json(info, {**read_json(info), **fields})


def load_checkpoint_info(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return a checkpoint's `valor.json`; with `verify`, compare every weight file with its recorded sha256.

    Raises:
        IntegrityError: a weight file is missing, added or altered.
    """
    info = read_json(path / CHECKPOINT_INFO)
    if not isinstance(info.get("weights"), dict):
        raise IntegrityError(
            f"{path / CHECKPOINT_INFO}: weights is {shown(repr(info.get('weights')))}, expected sha256 by file; fetch "
            "or train the checkpoint again"
        )
    if verify:
        found, expected = weight_digests(path), info["weights"]
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise IntegrityError(
                    f"{path / name}: sha256 is {found.get(name, 'missing')}, {CHECKPOINT_INFO} says "
                    f"{expected.get(name, 'no such file')}; the weights were altered or cut, fetch or train them again"
                )
    return info
