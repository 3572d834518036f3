"""How far a candidate report agrees with its reference on the 13 CheXpert observations, their sides and zones.

Presence is 1 (positive), 0.5 (uncertain) or 0. Shared presence earns, missed and invented presence cost, and an
attribute that the reference states earns when right and costs when wrong. "Nothing found" on both sides earns too,
and so does each denial in common. The score is 1 less the shortfall from what the reference itself would earn.

A finding stands for its ancestors, and the names along one line share one finding's worth (`valor.clinical.hierarchy`).
Without that, "consolidation ... likely pneumonia" was two findings, three with "opacity": wrong, it cost three times an
invented effusion, and stage 1 taught silence about consolidations.

Positives weigh more than denials because a reward that pays for "empty equals empty" teaches silence.
"""

import dataclasses
import functools
import math

from valor.clinical.hierarchy import NAMES, SHARE
from valor.clinical.summary import Summary
from valor.clinical.vocabulary import OBSERVATIONS

_PRESENCE = {"positive": 1.0, "uncertain": 0.5}


@dataclasses.dataclass(frozen=True)
class AgreementWeights:
    """What each kind of agreement earns and each kind of error costs (all >= 0)."""

    true_positive: float = 3.0
    omission: float = 3.0
    invention: float = 2.5
    side: float = 1.5
    zone: float = 1.5
    denial: float = 0.1
    normal: float = 1.0


def agreement(reference: Summary, candidate: Summary, weights: AgreementWeights) -> float:
    """Return a score in (-1, 1]: 1 for all that the reference earns of itself, negative once errors outweigh that."""
    attainable = _attainable(reference, weights)
    shortfall = attainable - _sum(reference, candidate, weights)
    # A normal reference earns little of itself; an invention must not cost its candidates many times more for that.
    score = 1.0 - shortfall / max(attainable, weights.true_positive + weights.normal)
    return score if score >= 0 else math.tanh(score)


@functools.lru_cache(maxsize=1024)
def _attainable(reference: Summary, weights: AgreementWeights) -> float:
    """Return what a reference earns of itself; cached, since it is compared with every one of its candidates."""
    return _sum(reference, reference, weights)


def _sum(reference: Summary, candidate: Summary, weights: AgreementWeights) -> float:
    total = 0.0
    due, given = _said(reference), _said(candidate)
    # Dictionaries in the order of the text: a set's order, and with it a sum's last bit, changes between processes.
    for finding in due | given:
        expected, stated = due.get(finding, _UNSAID), given.get(finding, _UNSAID)
        shared = min(expected.presence, stated.presence)
        earned = weights.true_positive * shared
        earned -= weights.omission * max(expected.presence - stated.presence, 0.0)
        earned -= weights.invention * max(stated.presence - expected.presence, 0.0)
        # A hedge earns no more of its place than of its finding, or it would pay where neither answer does.
        earned += shared * weights.side * _overlap(expected.sides, stated.sides)
        earned += shared * weights.zone * _overlap(expected.zones, stated.zones)
        total += SHARE.get(finding, 1.0) * earned
    for finding in OBSERVATIONS:
        if reference.labels.get(finding) == candidate.labels.get(finding) == "negative":
            total += weights.denial
    if reference.labels.get("No Finding") == candidate.labels.get("No Finding") == "positive":
        total += weights.normal
    return total


@dataclasses.dataclass(slots=True)
class _Said:
    """How sure a report is of a finding (0, 0.5 or 1), by this or a narrower name, and where it puts it."""

    presence: float = 0.0
    sides: frozenset[str] = frozenset()
    zones: frozenset[str] = frozenset()


_UNSAID = _Said()


@functools.lru_cache(maxsize=1024)
def _said(summary: Summary) -> dict[str, _Said]:
    said: dict[str, _Said] = {}
    for finding, label in summary.labels.items():
        presence = _PRESENCE.get(label, 0.0)
        for name in NAMES.get(finding, ()) if presence else ():
            entry = said.setdefault(name, _Said())
            entry.presence = max(entry.presence, presence)
            entry.sides |= summary.sides.get(finding, frozenset())
            entry.zones |= summary.zones.get(finding, frozenset())
    return said


def _overlap(expected: frozenset[str], stated: frozenset[str]) -> float:
    """Return 1 for the same places, -1 for disjoint ones, 0 where either report names none."""
    if not expected or not stated:
        return 0.0
    return 2.0 * len(expected & stated) / len(expected | stated) - 1.0
