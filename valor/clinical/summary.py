"""What a whole report asserts, in the form that rewards and metrics compare: presence, sides and zones per finding."""

import dataclasses
import functools
from collections.abc import Mapping

from valor.clinical.labeler import labels_of, mentions
from valor.clinical.vocabulary import Label, Zone


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """One report's statements. Equal to itself alone, so that it can be a key.

    Attributes:
        labels: {finding: label} as `valor.clinical.labeler` gives it.
        sides: for each finding asserted or suspected, a subset of {"left", "right"}; bilateral is both.
        zones: likewise, a subset of {"upper", "mid", "lower"}.
    """

    labels: Mapping[str, Label]
    sides: Mapping[str, frozenset[str]]
    zones: Mapping[str, frozenset[Zone]]


@functools.lru_cache(maxsize=8192)
def summarise(text: str, *, is_candidate: bool = False) -> Summary:
    """Return the summary of a report; cached, since a reference is compared with every one of its candidates.

    Args:
        text: the report.
        is_candidate: what it asserts and denies at once counts as uncertain (`labels_of`).
    """
    found = mentions(text)
    sides: dict[str, frozenset[str]] = {}
    zones: dict[str, frozenset[Zone]] = {}
    for mention in found:
        if mention.label == "negative":
            continue
        if mention.side:
            named = ("left", "right") if mention.side == "bilateral" else (mention.side,)
            sides[mention.finding] = sides.get(mention.finding, frozenset()).union(named)
        if mention.zone:
            zones[mention.finding] = zones.get(mention.finding, frozenset()) | {mention.zone}
    return Summary(labels=labels_of(text, found, is_candidate=is_candidate), sides=sides, zones=zones)
