"""How far a candidate report agrees with its reference on the 13 CheXpert observations, their sides and zones.

Presence is 1 (positive), 0.5 (uncertain) or 0. Shared presence earns, missed and invented presence cost, and an
attribute that the reference states earns when right and costs when wrong. "Nothing found" on both sides earns too,
and so does each denial in common. The score is 1 less the shortfall from what the reference itself would earn.

Positives weigh more than denials because a reward that pays for "empty equals empty" teaches silence.
"""

import dataclasses
import functools
import math

from valor.clinical.summary import Summary
from valor.clinical.vocabulary import OBSERVATIONS

_PRESENCE = {"positive": 1.0, "uncertain": 0.5}


@dataclasses.dataclass(frozen=True)
class AgreementWeights:
    """What each kind of agreement earns and each kind of error costs (all >= 0)."""

    true_positive: float = 3.0
    omission: float = 3.0
    invention: float = 1.5
    side: float = 0.5
    zone: float = 0.5
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
    for finding in OBSERVATIONS:
        expected = reference.labels.get(finding)
        stated = candidate.labels.get(finding)
        if expected is None and stated is None:
            continue
        due, given = _PRESENCE.get(expected or "", 0.0), _PRESENCE.get(stated or "", 0.0)
        total += weights.true_positive * min(due, given)
        total -= weights.omission * max(due - given, 0.0) + weights.invention * max(given - due, 0.0)
        if due and given:
            total += weights.side * _overlap(reference.sides.get(finding), candidate.sides.get(finding))
            total += weights.zone * _overlap(reference.zones.get(finding), candidate.zones.get(finding))
        elif expected == stated == "negative":
            total += weights.denial
    if reference.labels.get("No Finding") == candidate.labels.get("No Finding") == "positive":
        total += weights.normal
    return total


def _overlap(expected: frozenset[str] | None, stated: frozenset[str] | None) -> float:
    """Return 1 for the same places, -1 for disjoint ones, 0 where either report names none."""
    if not expected or not stated:
        return 0.0
    return 2.0 * len(expected & stated) / len(expected | stated) - 1.0
