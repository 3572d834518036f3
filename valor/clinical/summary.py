"""What a whole report asserts, in the form that rewards and metrics compare: presence, sides and zones per finding."""

import dataclasses
import functools
from collections.abc import Mapping

from valor.clinical.labeler import aggregate, contradictions, mentions
from valor.clinical.vocabulary import Label, Zone


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """One report's statements. Equal to itself alone, so that it can be a key.

    Attributes:
        labels: {finding: label} as `valor.clinical.labeler` gives it.
        sides: for each finding asserted or suspected, a subset of {"left", "right"}; bilateral is both.
        zones: likewise, a subset of {"upper", "mid", "lower"}.
        contradictions: the findings that it asserts and denies in one place.
    """

    labels: Mapping[str, Label]
    sides: Mapping[str, frozenset[str]]
    zones: Mapping[str, frozenset[Zone]]
    contradictions: frozenset[str] = frozenset()


def summarise(text: str, *, is_candidate: bool = False, pardoned: frozenset[str] = frozenset()) -> Summary:
    """Return the summary of a report; cached, since a reference is compared with every one of its candidates.

    Args:
        text: the report.
        is_candidate: its contradictions count as uncertain (`valor.clinical.labeler.labels_of`).
        pardoned: contradictions that do not: those of its reference, or a copy of the reference would not be right.
    """
    summary = _read(text)
    doubted = summary.contradictions - pardoned if is_candidate else frozenset()
    return _doubt(summary, doubted) if doubted else summary


@functools.lru_cache(maxsize=8192)
def _doubt(summary: Summary, findings: frozenset[str]) -> Summary:
    uncertain: dict[str, Label] = dict.fromkeys(findings, "uncertain")
    return dataclasses.replace(summary, labels={**summary.labels, **uncertain})


@functools.lru_cache(maxsize=8192)
def _read(text: str) -> Summary:
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
    labels = aggregate((mention.finding, mention.label) for mention in found)
    return Summary(labels=labels, sides=sides, zones=zones, contradictions=contradictions(text, found))
