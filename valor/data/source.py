"""Where studies come from: a data root with its listing, and the studies that a data set's adapter sees in it."""

import csv
import dataclasses
import gzip
import hashlib
import importlib
import io
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from valor import artifacts, storage
from valor.data.manifest import SPLITS
from valor.data.reports import Report
from valor.errors import UserError
from valor.recipe import DataSettings


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """An image file of a study: its path under the root, its name and its view ("" where unknown)."""

    path: str
    dicom_id: str
    view: str = ""


@dataclasses.dataclass(frozen=True)
class SourceStudy:
    """A study as the listing shows it; nothing of it is read yet.

    Attributes:
        split: the official split, "" where the source has none for it.
        report: the report's path under the root, "" where there is none.
        stamp: digest of what the listing and the tables say about the study.
    """

    study_id: str
    subject_id: str
    split: str
    report: str
    images: tuple[SourceImage, ...]
    stamp: str


class Adapter(Protocol):
    """One data set's layout; a module of `valor.data.adapters` with these two functions."""

    def index(self, source: "Source") -> list[SourceStudy]:
        """Return the studies that the listing shows."""

    def read(self, source: "Source", study: SourceStudy) -> tuple[Report, tuple[SourceImage, ...]]:
        """Return a study's report and its images, frontal first; raise Rejected where there is no usable report."""


class Source:
    """A data root (a directory or gs://) with its listing."""

    def __init__(self, root: str):
        self.root = root
        self.files: dict[str, tuple[int, str]] = {path: (size, stamp) for path, size, stamp in storage.listing(root)}
        """Path under the root -> size in bytes, and a stamp (mtime or generation)."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return storage.read_bytes(storage.join(self.root, path))

    def table(self, ending: str, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (path, row) of the CSV (or .csv.gz) files whose names end in `ending`; nothing where there is none.

        Raises:
            UserError: a file is cut, lacks one of `columns`, or a row ends before it.
        """
        for path in sorted(self.files):
            if path.endswith((f"{ending}.csv", f"{ending}.csv.gz")):
                data = self.read(path)
                try:
                    data = gzip.decompress(data) if path.endswith(".gz") else data
                except (OSError, EOFError, zlib.error):
                    raise UserError(f"{path}: no whole gzip file; fetch the table again") from None
                text = data.decode("utf-8-sig", errors="replace")
                reader = csv.DictReader(io.StringIO(text))
                try:
                    missing = [column for column in columns if column not in (reader.fieldnames or ())]
                    if missing:
                        raise UserError(f"{path}: column {missing[0]!r} is missing; mend the table's first line")
                    for row in reader:
                        if any(row[column] is None for column in columns):
                            raise UserError(f"{path}:{reader.line_num}: the row is cut short; mend the table")
                        yield path, row
                except csv.Error as error:
                    raise UserError(f"{path}:{reader.line_num + 1}: {error}; mend the table") from None

    def stamp(self, paths: Iterable[str], facts: Any) -> str:
        """Return the digest of a study's files and of `facts` that tables say about it."""
        return artifacts.digest_value([sorted([path, *self.files[path]] for path in paths), facts])


def split_of(subject_id: str, *, settings: DataSettings) -> str:
    """Return the split of a subject without an official one, by hash, in proportions `split_fractions`."""
    fractions = settings.split_fractions
    place = int(hashlib.sha256(f"split:{settings.seed}:{subject_id}".encode()).hexdigest()[:12], 16) / 16**12
    edge = 0.0
    for split, fraction in zip(SPLITS, fractions, strict=True):
        edge += fraction / sum(fractions)
        if place < edge:
            return split
    return SPLITS[-1]


def adapter(layout: str) -> Adapter:
    """Return the adapter module of a layout."""
    return importlib.import_module(f"valor.data.adapters.{layout}")  # type: ignore[return-value]


def index_root(root: str, *, settings: DataSettings) -> tuple[Source, list[SourceStudy]]:
    """List a data root and return its studies, each with its split.

    Raises:
        UserError: nothing is there, or nothing in the layout of the recipe.
    """
    source = Source(root)
    if not source.files:
        raise UserError(f"{root}: no such data root, or it is empty; set data.root to a directory or a gs:// address")
    studies = adapter(settings.layout).index(source)
    if not studies:
        raise UserError(
            f"{root}: {len(source.files)} files but no study in the layout {settings.layout!r}; "
            "set data.layout to the data set's own (docs/data.md shows both)"
        )
    return source, _with_splits(studies, settings=settings)


def _with_splits(studies: list[SourceStudy], *, settings: DataSettings) -> list[SourceStudy]:
    """Give each study its official split, else its subject's official split, else one by hash of the subject."""
    of_subject = {study.subject_id: study.split for study in studies if study.split}
    return [
        study
        if study.split
        else dataclasses.replace(
            study, split=of_subject.get(study.subject_id) or split_of(study.subject_id, settings=settings)
        )
        for study in studies
    ]
