"""Who is drawn: the phantom's subjects and studies, their ids, and the random streams that belong to each.

A study is drawn from `SeedSequence([seed, subject number, study number, purpose])` alone, so it comes out the same
in any order, process or shard. Subjects are numbered per split, so that one study more in `train` leaves `val` and
`test` as they were. Ids are an injective function of (seed, subject number): two seeds share none.
"""

import dataclasses
import enum
import hashlib

import numpy as np

from valor.errors import UserError
from valor.recipe import PhantomStudies

_FIRST_SUBJECT = {"train": 0, "val": 60_000, "test": 80_000}
_SUBJECTS_PER_SEED = 100_000
_SEEDS = 10**8
"""`valor.recipe.sections.PhantomSeed` keeps seeds below."""
_ID_SPACE = _SEEDS * _SUBJECTS_PER_SEED
_SCRAMBLE = 7_340_871_905_347
"""Prime to 10, so multiplication is a bijection on decimal ids and their order tells nothing of the split."""
_SECOND_STUDY_RATE = 0.15
_MAX_STUDIES = 4
"""Two of a subject, and the twin of each."""


class Stream(enum.IntEnum):
    """What a random stream is for; streams of one study are independent of each other."""

    SUBJECT = 0
    TRUTH = 1
    ACQUISITION = 2
    REPORT = 3
    HEADER = 4
    ANATOMY = 5
    POSE = 6
    MARKINGS = 7
    DEVICE = 8
    INDICATION = 9
    SITE = 10
    TWIN = 11
    FINDING = 100
    """Plus the finding's index in `vocabulary.FINDINGS`: adding one finding moves no other."""


@dataclasses.dataclass(frozen=True)
class StudyKey:
    """One study to draw.

    Attributes:
        subject_id: 15 digits, beginning with 10 as MIMIC-CXR's.
        study_id: 16 digits, beginning with 5.
        split: `train`, `val` or `test`.
        index: position in the plan.
        subject: the subject's number within the seed.
        ordinal: 0 for the subject's first study, 1 for the second.
        twin_of: the study_id of which this is the counterfactual twin, drawn from the same streams with one finding
            changed; "" where it is none.
    """

    subject_id: str
    study_id: str
    split: str
    index: int
    subject: int
    ordinal: int
    twin_of: str = ""

    @property
    def dicom_id(self) -> str:
        """The image's name in MIMIC-CXR's form: five groups of eight hex digits."""
        digest = hashlib.sha256(self.study_id.encode()).hexdigest()
        return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


def plan(settings: PhantomStudies) -> list[StudyKey]:
    """Return the studies that `settings` asks for: train, val, test, then twins; subjects disjoint by split.

    Raises:
        UserError: a count leaves the space of ids.
    """
    keys: list[StudyKey] = []
    for split, first in _FIRST_SUBJECT.items():
        keys += _split_keys(settings.seed, split, first, getattr(settings, split), start=len(keys))
    return keys + _twin_keys(settings, keys)


def generator(seed: int, subject: int, ordinal: int, stream: int) -> np.random.Generator:
    """Return the random stream of one study and purpose; SUBJECT streams take ordinal 0."""
    return np.random.default_rng(np.random.SeedSequence([seed, subject, ordinal, int(stream)]))


def _split_keys(seed: int, split: str, first: int, count: int, *, start: int) -> list[StudyKey]:
    limit = min((f for f in _FIRST_SUBJECT.values() if f > first), default=_SUBJECTS_PER_SEED) - first
    if not 0 <= count <= limit:
        raise UserError(f"data.phantom.{split} is {count}, expected 0 to {limit} studies; use a second seed for more")
    keys: list[StudyKey] = []
    subject = first
    while len(keys) < count:
        two = generator(seed, subject, 0, Stream.SUBJECT).random() < _SECOND_STUDY_RATE
        for ordinal in range(1 + two):
            if len(keys) < count:
                keys.append(_key(seed, split, subject, ordinal, index=start + len(keys)))
        subject += 1
    return keys


def _twin_keys(settings: PhantomStudies, keys: list[StudyKey]) -> list[StudyKey]:
    """Return the twins of the first test studies."""
    originals = [key for key in keys if key.split == "test"]
    return [
        dataclasses.replace(
            key,
            study_id=_study_id(settings.seed, key.subject, key.ordinal + _MAX_STUDIES // 2),
            index=len(keys) + i,
            twin_of=key.study_id,
        )
        for i, key in enumerate(originals[: settings.pairs])
    ]


def _key(seed: int, split: str, subject: int, ordinal: int, *, index: int) -> StudyKey:
    number = (seed * _SUBJECTS_PER_SEED + subject) * _SCRAMBLE % _ID_SPACE
    return StudyKey(f"10{number:013d}", _study_id(seed, subject, ordinal), split, index, subject, ordinal)


def _study_id(seed: int, subject: int, member: int) -> str:
    """Return the id of a subject's study, `member` below `_MAX_STUDIES`."""
    number = ((seed * _SUBJECTS_PER_SEED + subject) * _MAX_STUDIES + member) * _SCRAMBLE
    return f"5{number % (_ID_SPACE * _MAX_STUDIES):015d}"
