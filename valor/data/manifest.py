"""The dataset artifact's table: its columns, its rows in Python, its digest (docs/architecture.md, "Artifacts").

This module is the authority on the columns. A dataset's digest is over its rows' content (decoded pixels, text,
metadata), so neither the number of shards nor their order, nor the PNG or Parquet encoder, changes it. It leaves
out annotations and truth: those live in the evidence artifact, which no training stage receives.
"""

import dataclasses
import enum
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from valor import artifacts
from valor.errors import DataError, IntegrityError, shown

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
DATASET_INFO = "dataset.json"
QUARANTINE = "quarantine.parquet"

IMAGE_TYPE = pa.struct(
    [
        ("bytes", pa.binary()),
        ("path", pa.string()),
        ("dicom_id", pa.string()),
        ("view", pa.string()),
        ("transform", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string(), nullable=False),
        pa.field("subject_id", pa.string(), nullable=False),
        pa.field("images", pa.list_(IMAGE_TYPE), nullable=False),
        *(
            pa.field(name, pa.string())
            for name in ("findings", "impression", "indication", "comparison", "sex", "age_band", "device")
        ),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source_digest", pa.string(), nullable=False),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("study_id", "subject_id", "path", "reason", "scope", "detail")]
)


class Reason(enum.StrEnum):
    """Why an input was rejected."""

    UNDECODABLE = "undecodable"
    """Truncated, damaged, or no image file at all."""
    NOT_RADIOGRAPH = "not_radiograph"
    """A modality other than CR or DX, such as CT."""
    NOT_CHEST = "not_chest"
    COLOUR = "colour"
    MULTI_FRAME = "multi_frame"
    BLANK = "blank"
    MISSING_IMAGE = "missing_image"
    """The study names no image, or one whose file is absent."""
    MISSING_REPORT = "missing_report"
    UNREADABLE_REPORT = "unreadable_report"
    EMPTY_REPORT = "empty_report"
    """Neither findings nor impression says anything."""


class Rejected(Exception):
    """One input cannot be used; the run continues without it. `detail` holds no patient text."""

    def __init__(self, reason: Reason, detail: str = "", *, path: str = ""):
        super().__init__(f"{path or 'input'}: {reason}: {detail}")
        self.reason, self.detail, self.path = reason, detail, path


@dataclasses.dataclass(frozen=True)
class StudyImage:
    """One image of a study.

    Attributes:
        bytes: 8-bit grayscale PNG, bright is dense, longer side at most `data.image_px`.
        path: the source file, relative to the data root.
        dicom_id: the source's name of the image.
        view: `PA`, `AP`, `LATERAL`, `LL`, ..., `FRONTAL` where guessed, "" where the source does not tell.
        transform: JSON that maps stored pixels to these (see docs/data.md).
    """

    bytes: bytes
    path: str
    dicom_id: str
    view: str
    transform: str


@dataclasses.dataclass(frozen=True)
class Study:
    """One row of the dataset; the fields are its columns."""

    study_id: str
    subject_id: str
    images: tuple[StudyImage, ...]
    findings: str | None
    impression: str | None
    indication: str | None
    comparison: str | None
    sex: str | None
    age_band: str | None
    device: str | None
    split: str
    source_digest: str

    @property
    def text(self) -> str:
        """The report text that a model learns."""
        return report_text(self.findings, self.impression)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """One row of `quarantine.parquet`; `scope` is `study` where the whole study is lost, else `image`."""

    study_id: str
    subject_id: str
    path: str
    reason: str
    scope: str
    detail: str


def report_text(findings: str | None, impression: str | None) -> str:
    """Return "FINDINGS: ... IMPRESSION: ..."; a missing section is left out."""
    sections = (("FINDINGS", findings), ("IMPRESSION", impression))
    return " ".join(f"{name}: {text}" for name, text in sections if text)


def decode_image(png: bytes) -> np.ndarray:
    """Return a dataset image's pixels, (H, W) uint8, bright is dense."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L"))


def first_pixels(study: Study) -> np.ndarray:
    """Return the pixels of a study's first image (frontal where there is one).

    Raises:
        DataError: the study has no image, or one that cannot be decoded.
    """
    if not study.images:
        raise DataError(f"study {study.study_id}: has no image; ingest the data again, which leaves such studies out")
    try:
        return decode_image(study.images[0].bytes)
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow says with any of these that a file is no image, cut or altered.
        raise DataError(
            f"study {study.study_id}: image {study.images[0].path} cannot be decoded ({shown(str(error))}); ingest the "
            "data again"
        ) from None


def encode_image(pixels: np.ndarray) -> bytes:
    """Return (H, W) uint8 pixels as an 8-bit grayscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode="L").save(buffer, format="PNG")
    return buffer.getvalue()


def shard_paths(dataset: Path) -> list[Path]:
    """Return a dataset's Parquet shards in order.

    Raises:
        IntegrityError: `dataset` is no dataset artifact, or of another schema version.
    """
    info = artifacts.read_json(dataset / DATASET_INFO)
    if info.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError(
            f"{dataset}: dataset schema_version is {info.get('schema_version')}, this code reads {SCHEMA_VERSION}; "
            "ingest the data again"
        )
    return sorted(dataset.glob("shard-*.parquet"))


def iter_studies(paths: Iterable[Path], *, split: str = "", batch_size: int = 64) -> Iterator[Study]:
    """Yield the studies of Parquet shards in stored order, holding at most `batch_size` in memory.

    Raises:
        IntegrityError: a shard is no Parquet file, is damaged, or lacks a column.
    """
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                _require_columns(path, file.schema_arrow)
                for batch in file.iter_batches(batch_size=batch_size, columns=SCHEMA.names):
                    yield from (study_of(row) for row in batch.to_pylist() if not split or row["split"] == split)
        except (MemoryError, pa.lib.ArrowCancelled):
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            # Damage within a column is an OSError without a number; what the system says has one.
            if getattr(error, "errno", None) is not None:
                raise
            raise IntegrityError(
                f"{path}: cannot be read as Parquet ({type(error).__name__}); ingest the data again"
            ) from None


def _require_columns(path: Path, schema: pa.Schema) -> None:
    """Raise IntegrityError where a shard's columns are not those of `SCHEMA`; others may be there."""
    for column in SCHEMA:
        found = schema.field(column.name).type if column.name in schema.names else None
        if found is None or not _as_stored(found).equals(_as_stored(column.type)):
            raise IntegrityError(
                f"{path}: column {column.name} is {found or 'missing'}, expected {column.type}; ingest the data again"
            )


def _as_stored(kind: pa.DataType) -> pa.DataType:
    """Return a type as Parquet gives it back to whoever wrote it: the name of a list's items is the writer's."""
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def read_studies(dataset: Path, *, split: str) -> list[Study]:
    """Return a dataset's studies of one split (`train`, `val`, `test`), sorted by study_id; all in memory.

    Raises:
        IntegrityError: the shards are damaged, or hold another number of studies than `dataset.json` says.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    studies = sorted(iter_studies(shard_paths(dataset), split=split), key=lambda study: study.study_id)
    expected, found = _counts(dataset)[split], len({study.study_id for study in studies})
    if not len(studies) == found == expected:
        raise IntegrityError(
            f"{dataset}: its shards hold {len(studies)} rows of {found} studies in split {split!r}, {DATASET_INFO} "
            f"says {expected}; ingest the data again"
        )
    return studies


def _counts(dataset: Path) -> dict[str, int]:
    """Return how many studies each split of a dataset has, from its `dataset.json`."""
    counts = artifacts.read_json(dataset / DATASET_INFO).get("studies")
    if not isinstance(counts, dict) or any(not isinstance(counts.get(split), int) for split in SPLITS):
        raise IntegrityError(
            f"{dataset / DATASET_INFO}: studies does not count those of {', '.join(SPLITS)}; ingest the data again"
        )
    return counts


def in_share(studies: Iterable[Study], share: tuple[float, float]) -> list[Study]:
    """Return the studies of the subjects whose hash, in [0, 1), lies from the first bound up to the second."""

    def place(subject_id: str) -> float:
        return int(hashlib.sha256(f"share:{subject_id}".encode()).hexdigest()[:13], 16) / 16**13

    return [study for study in studies if share[0] <= place(study.subject_id) < share[1]]


def choose_studies(every: list[Study], *, studies: int, seed: int) -> list[Study]:
    """Return `studies` of these drawn by `seed`, in their order; all where `studies` is 0 or there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(every))[: studies or None]
    return [every[i] for i in sorted(chosen)]


def other_subjects(subjects: Sequence[str]) -> list[int]:
    """Return for each study the index of a study of another subject: the first one about half the list further on.

    Where there is one subject only, a study is its own twin and the comparison says nothing.
    """
    count = len(subjects)
    return [
        next((j for k in range(count) if subjects[j := (i + count // 2 + k) % count] != subjects[i]), i)
        for i in range(count)
    ]


def study_of(row: dict[str, Any]) -> Study:
    """Build a Study from a row of the table."""
    return Study(**{**row, "images": tuple(StudyImage(**image) for image in row["images"])})


def row_digest(study: Study) -> str:
    """Return the sha256 of a study's content; images enter as their decoded pixels, not as PNG bytes."""
    row = dataclasses.asdict(study)
    for image in row["images"]:
        pixels = decode_image(image.pop("bytes"))
        image["pixels"] = [*pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()]
    return artifacts.digest_value(row)


def dataset_digest(row_digests: Iterable[str]) -> str:
    """Return the digest of a dataset from its rows' digests, in any order."""
    return artifacts.digest_value({"schema_version": SCHEMA_VERSION, "rows": sorted(row_digests)})


class TableWriter:
    """Writes rows to a Parquet file in row groups, so that a shard's images never sit in memory together."""

    def __init__(self, path: Path, schema: pa.Schema, *, rows_per_group: int = 128):
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema, self._rows_per_group = schema, rows_per_group
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Any) -> None:
        """Add one row, a dataclass whose fields are the schema's columns."""
        self._rows.append(dataclasses.asdict(row))
        if len(self._rows) >= self._rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
