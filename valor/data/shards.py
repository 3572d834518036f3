"""Shards of a source: which subjects each holds, its digest, and the way through its studies.

A subject belongs to one shard by hash. A shard's digest is over its studies' files (path, size, stamp), splits and
views, and over their annotations, so that a new or changed study changes one shard's digest. `root: phantom` draws
the studies: there the digest is over the keys to draw, the settings and the phantom's own code.
"""

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.data.source import Source, SourceStudy, index_root
from valor.errors import IntegrityError, UserError
from valor.recipe import DataSettings

PHANTOM = "phantom"
_BATCH = 64
"""Phantom studies drawn to disk at a time."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One part of the source, as `preflight` hands it to `ingest`."""

    index: int
    count: int
    digest: str

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """Parse the `shard` parameter; raise UserError where it is something else."""
        try:
            shard = cls(**json.loads(text))
        except (TypeError, ValueError):
            raise UserError(
                f'shard is {text[:80]!r}, expected JSON such as {{"index": 0, "count": 2, "digest": "..."}}'
            ) from None
        if not 0 <= shard.index < shard.count:
            raise UserError(f"shard index is {shard.index}, expected 0 to {shard.count - 1}")
        return shard

    def to_json(self) -> str:
        """Return the `shard` parameter."""
        return artifacts.canonical_json(dataclasses.asdict(self))

    def holds(self, subject_id: str) -> bool:
        """Tell whether a subject's studies are in this shard."""
        return shard_of(subject_id, count=self.count) == self.index


@dataclasses.dataclass(frozen=True)
class Part:
    """Studies of a shard that can be read now.

    Attributes:
        source: where they are.
        annotations_root: where their annotations are, "" for none.
        studies: in order of study_id, each with its split.
        total: the number of studies of the whole shard.
    """

    source: Source
    annotations_root: str
    studies: list[SourceStudy]
    total: int


def shard_of(subject_id: str, *, count: int) -> int:
    """Return a subject's shard, 0 to `count` - 1."""
    return int(hashlib.sha256(f"shard:{subject_id}".encode()).hexdigest()[:12], 16) % count


def plan_shards(root: str, *, annotations_root: str, settings: DataSettings) -> tuple[list[Shard], int]:
    """Return the shards that hold studies, each with its digest, and the number of all studies.

    Raises:
        UserError: nothing is at `root`, or nothing in the recipe's layout.
    """
    if root == PHANTOM:
        members = [(key.subject_id, _key_identity(key)) for key in _keys(settings)]
        common: Any = _phantom_identity(settings)
    else:
        members = _members(index_root(root, settings=settings)[1], annotations_root=annotations_root)
        common = settings.layout
    parts: list[list[Any]] = [[] for _ in range(settings.shards)]
    for subject_id, member in members:
        parts[shard_of(subject_id, count=settings.shards)].append(member)
    shards = [
        Shard(index=index, count=settings.shards, digest=_digest(common, part))
        for index, part in enumerate(parts)
        if part
    ]
    return shards, len(members)


def read_shard(shard: Shard, *, root: str, annotations_root: str, settings: DataSettings) -> Iterator[Part]:
    """Yield a shard's studies: real data at once, phantom studies in batches whose files vanish after their turn.

    Raises:
        IntegrityError: the source is no longer what `preflight` saw.
    """
    if root == PHANTOM:
        yield from _draw(shard, settings=settings)
        return
    source, studies = index_root(root, settings=settings)
    mine = sorted((s for s in studies if shard.holds(s.subject_id)), key=lambda s: s.study_id)
    found = _digest(settings.layout, [m for _, m in _members(mine, annotations_root=annotations_root)])
    _check(shard, found, root=root)
    yield Part(source=source, annotations_root=annotations_root, studies=mine, total=len(mine))


def _draw(shard: Shard, *, settings: DataSettings) -> Iterator[Part]:
    from valor.data import phantom

    keys = sorted((key for key in _keys(settings) if shard.holds(key.subject_id)), key=lambda key: key.study_id)
    _check(shard, _digest(_phantom_identity(settings), [_key_identity(key) for key in keys]), root=PHANTOM)
    layout = settings.model_copy(update={"layout": "mimic_cxr"})
    for start in range(0, len(keys), _BATCH):
        with tempfile.TemporaryDirectory(prefix="valor-phantom-") as folder:
            root, annotations_root = Path(folder, "root"), Path(folder, "annotations")
            drawn = (phantom.draw(key, settings.phantom) for key in keys[start : start + _BATCH])
            phantom.write(drawn, root=root, annotations_root=annotations_root, settings=settings.phantom)
            source, studies = index_root(str(root), settings=layout)
            studies = sorted(studies, key=lambda study: study.study_id)
            yield Part(source=source, annotations_root=str(annotations_root), studies=studies, total=len(keys))


def _check(shard: Shard, found: str, *, root: str) -> None:
    if found != shard.digest:
        raise IntegrityError(
            f"{root}: shard {shard.index} of {shard.count} is now {found[:12]}, preflight saw {shard.digest[:12]}: "
            "the data or its settings changed during the run; run again"
        )


def _digest(common: Any, members: Iterable[Any]) -> str:
    return artifacts.digest_value([common, sorted(members, key=str)])


def _members(studies: Iterable[SourceStudy], *, annotations_root: str) -> list[tuple[str, Any]]:
    """Return (subject_id, what identifies the study) of each study."""
    notes = _annotation_digests(annotations_root)
    return [(s.subject_id, [s.study_id, s.split, s.stamp, notes.get(s.study_id, "")]) for s in studies]


def _annotation_digests(annotations_root: str) -> Mapping[str, str]:
    """Return study_id -> digest of its rows in the annotation tables."""
    from valor.data import evidence

    rows: dict[str, list[str]] = {}
    for name in evidence.TABLES if annotations_root else ():
        for row in evidence.read_table(annotations_root, name).to_pylist():
            rows.setdefault(row["study_id"], []).append(hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest())
    return {study_id: artifacts.digest_value(sorted(digests)) for study_id, digests in rows.items()}


def _keys(settings: DataSettings) -> list[Any]:
    from valor.data import phantom

    return phantom.plan(settings.phantom)


def _key_identity(key: Any) -> list[str]:
    # The position in the plan is left out: one study more in `train` moves those of `val` and changes none of them.
    return [key.subject_id, key.study_id, key.split]


def _phantom_identity(settings: DataSettings) -> list[Any]:
    # The counts are left out: each key says for itself whether it is drawn.
    return [settings.phantom.model_dump(exclude={"train", "val", "test", "pairs"}), _phantom_code_digest()]


@functools.cache
def _phantom_code_digest() -> str:
    """Return the digest of the code that draws phantoms: another drawing is other data."""
    folder = Path(__file__).parent
    paths = sorted([*(folder / PHANTOM).rglob("*.py"), *folder.glob("masks.py")])
    return artifacts.digest_value([[path.name, artifacts.digest_file(path)] for path in paths])
