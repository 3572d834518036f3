"""Where a model comes from: a hub id at a pinned revision, a local directory or gs://.

Only safetensors, JSON and tokenizer files are taken, never pickles or code. A hub id needs a full commit hash: a
branch or tag can move under a finished run.
"""

import re
import shutil
from pathlib import Path

from valor.errors import ServiceError, UserError

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*.txt", "vocab.txt", "merges.txt")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def resolve(source: str, *, revision: str, setting: str, path: Path) -> str:
    """Copy a model's files into the existing directory `path` and return where they came from, without credentials.

    Args:
        source: `gs://...`, an existing local directory, or a hub id.
        revision: commit hash of a hub id; must be empty otherwise.
        setting: the recipe's key, such as `models.base`, for errors.
        path: an empty directory.

    Raises:
        UserError: no such model, no pinned revision, or no safetensors among its files.
        ServiceError: the hub cannot be reached.
    """
    check(source, revision=revision, setting=setting)
    if source.startswith("gs://"):
        _from_storage(source, path)
    elif Path(source).is_dir():
        _copy(Path(source), path)
    else:
        _from_hub(source, revision=revision, setting=setting, path=path)
        source = f"hf://{source}@{revision}"
    if not list(path.glob("*.safetensors")):
        raise UserError(
            f"{setting} is {source!r}: holds no *.safetensors file; convert the model's weights to safetensors"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{setting} is {source!r}: holds no config.json; give a directory that save_pretrained wrote")
    return source


def check(source: str, *, revision: str, setting: str) -> None:
    """Refuse what `resolve` would refuse without looking inside a model; `phantom` is trained and needs nothing.

    Raises:
        UserError: no such directory, or a hub id without a commit hash.
    """
    if source == "phantom" or source.startswith("gs://") or Path(source).is_dir():
        return
    if source.startswith(("/", ".", "~")) or not _HUB_ID.match(source):
        raise UserError(f"{setting} is {source!r}: no such directory; give a directory, gs://, a hub id or phantom")
    if not _COMMIT.match(revision):
        raise UserError(
            f"{setting}_revision is {revision!r} for the hub id {source!r} (no such directory): give the full commit "
            "hash, 40 hex digits, since a branch or tag can move"
        )


def _from_storage(uri: str, path: Path) -> None:
    import tempfile

    from valor import artifacts, storage

    with tempfile.TemporaryDirectory() as scratch:
        whole = storage.get_dir(
            uri, Path(scratch) / "model", manifest=storage.exists(storage.join(uri, artifacts.MANIFEST))
        )
        _copy(whole, path)


def _copy(source: Path, path: Path) -> None:
    from valor import artifacts

    with artifacts.full_disk_is_a_resource_error(path):
        for pattern in (*ALLOWED, "*.safetensors.index.json"):
            for file in source.glob(pattern):
                if file.is_file() and file.name not in (artifacts.STAMP, artifacts.MANIFEST):
                    shutil.copyfile(file, path / file.name)


def _from_hub(source: str, *, revision: str, setting: str, path: Path) -> None:
    from huggingface_hub import errors, snapshot_download

    try:
        local = snapshot_download(source, revision=revision, allow_patterns=list(ALLOWED))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{setting}: the hub has no {source!r} at {revision}, or access needs HF_TOKEN") from error
    except (errors.EntryNotFoundError, errors.HTTPError, OSError) as error:
        reason = type(error).__name__
        raise ServiceError(
            f"{setting}: {source!r} cannot be fetched from the hub ({reason}); try again or mirror it to gs://"
        ) from error
    _copy(Path(local), path)
