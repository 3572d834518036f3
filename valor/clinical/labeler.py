"""A rule labeler for the 14 CheXpert classes: what a report says, with side, zone and place in the text.

`mentions` reads each sentence on its own (`valor.clinical.scope`); `label` aggregates per finding as the CheXpert
labeler does: positive over uncertain over negative. Policies, all tested: "no new X" is uncertain; "likely",
"consistent with" and "unchanged" leave X positive; "possible", "may", "suggests", "concern for", "X or Y",
"cannot be excluded" and "borderline" make it uncertain; "resolved", "removed", "absent", "none", "gone", "ruled out"
negative, before X or behind it; clear lungs deny opacity, consolidation, atelectasis and edema; "history of X" says
nothing.

"X is unlikely", "less likely", "doubtful", "not suspected" and "not confirmed" are uncertain. The CheXpert labeler and
NegBio (Peng et al. 2018), which it builds on, read between them "less likely X", "doubt X", "suspected X" and "X cannot
be confirmed" as doubts, and have no rule of their own for "unlikely". Nor have they one for "evidence against X", which
is negative here as "no evidence of X" is for all three: it says no less.

Left out: references between sentences ("Pneumothorax. None."), spelling mistakes, languages other than English, and
findings outside the 14 classes (emphysema, granuloma, hernia), so "No Finding" means none of the thirteen.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from valor.clinical.scope import Reading, read_sentence
from valor.clinical.vocabulary import FINDINGS, Label, Side, Zone

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"
_RANK: Mapping[Label, int] = {"negative": 0, "uncertain": 1, "positive": 2}
_HEADINGS = ("findings?", "impressions?", "conclusion", "comparison", "technique", "opinion")
# "Pneumothorax? No." is one sentence.
_ANSWERED = r"(?<!\?(?= ?(?:no|no evidence|none|negative|not seen|absent|unlikely) *(?:[.;]|$)))"
# Every alternative begins with a character and looks back after it: `re` then skips to the next such character.
_SENTENCE_END = re.compile(
    rf"[.!?](?<!\bvs.)(?!\d){_ANSWERED}|;|\n(?:\s*\n|(?=\s*(?:\d+[.)]|[-*]) ))|"
    + "|".join(rf"{name[0]}(?<=\b{name[0]}){name[1:]} ?:" for name in _HEADINGS)
)
# Ends where a mention starts, for what stands between it and the denial, or where a predicate of an organ ends ("bones
# without acute abnormality").
_QUALIFIED = re.compile(
    r"\b(large|sizable|sizeable|significant|substantial|gross|massive|tension|additional|other|further"
    r"|acute|active|new|overt|frank|florid|focal|lobar|confluent|displaced|loculated|layering|suspicious)"
    r" (?:(?!no\b)[\w-]+ ){0,2}[\w-]*\Z",
    re.IGNORECASE,
)
_ALWAYS_FOCAL = ("Consolidation", "Lung Lesion")
_EXCEPTING = re.compile(
    r"\b(?:otherwise|aside from|apart from|other than|except|besides|exception of)\b", re.IGNORECASE
)
# To the end of its line, or of its sentence in a text of one line: what follows there may be its only finding.
_UNREAD = re.compile(
    r"\b(?:indication|history|clinical (?:history|information)|reason for exam(?:ination)?) ?:"
    rf"(?:[^\n]*(?=\n)|(?:(?!\b(?:{'|'.join(_HEADINGS)}) ?:)"
    r"(?:[^\n.;?!]|[.?](?=\w)|(?<=\b\w)\.|(?<=\b(?:dr|mr|pt))\.))*)"
)


class Mention(NamedTuple):
    """One statement about one finding.

    Attributes:
        finding: one of the 14 classes; "No Finding" for a global statement such as "no acute disease".
        label: positive, negative or uncertain.
        side: left, right, bilateral, or None where the clause names none (always None for heart and mediastinum).
        zone: upper, mid, lower, or None where the clause names none or several.
        start, end: the characters `text[start:end]` that name it.
    """

    finding: str
    label: Label
    side: Side | None
    zone: Zone | None
    start: int
    end: int


def mentions(text: str) -> list[Mention]:
    """Return the statements of a report in the order of the text; an empty list where it makes none."""
    return [
        Mention(finding, label, side, zone, offset + start, offset + end)
        for offset, readings in _sentences(text)
        for finding, label, side, zone, start, end in readings
    ]


def label(text: str) -> dict[str, Label]:
    """Return {finding: label} of a report in the vocabulary's order; an unmentioned finding is absent.

    "No Finding" is positive where the text says something and nothing but devices is positive or uncertain.
    """
    return aggregate((finding, value) for _, readings in _sentences(text) for finding, value, *_ in readings)


def aggregate(statements: Iterable[tuple[str, Label]]) -> dict[str, Label]:
    """Aggregate (finding, label) statements of one report: positive over uncertain over negative."""
    best: dict[str, Label] = {}
    for finding, value in statements:
        if finding not in best or _RANK[value] > _RANK[best[finding]]:
            best[finding] = value
    said = bool(best)
    best.pop(NO_FINDING, None)
    if said and all(value == "negative" for finding, value in best.items() if finding != SUPPORT_DEVICES):
        best[NO_FINDING] = "positive"
    return {finding: best[finding] for finding in FINDINGS if finding in best}


def labels_of(text: str, found: Sequence[Mention], *, is_candidate: bool) -> dict[str, Label]:
    """Return `label`'s answer; of a candidate, "uncertain" for its `contradictions`.

    CheXpert's aggregation lets the assertion win, so a reward that read a candidate so would pay for "effusion" and for
    "no effusion" in one breath. A reference is taken at its word, or hedging would be told to be right.

    Args:
        text: the report.
        found: its `mentions`.
        is_candidate: whether a model wrote it.
    """
    labels = aggregate((mention.finding, mention.label) for mention in found)
    if is_candidate:
        labels.update(dict.fromkeys(contradictions(text, found), "uncertain"))
    return labels


def contradictions(text: str, found: Sequence[Mention]) -> frozenset[str]:
    """Return the findings that a report with the mentions `found` asserts and denies in the same place.

    Places are the same unless both name sides, or both zones, that differ. "No large effusion" denies a size, "no acute
    fracture" an age, and "the lungs are otherwise clear" what was not named: none contradicts what it leaves.
    """
    asserted = {mention.finding for mention in found if mention.label == "positive"}
    return frozenset(
        denial.finding
        for denial in found
        if denial.label == "negative"
        and denial.finding in asserted
        and any(_contradicts(denial, other) for other in found)
        and not _leaves_some(text, denial)
    )


def _leaves_some(text: str, denial: Mention) -> bool:
    """Tell "no large effusion", "lungs otherwise clear" and "clear lungs aside from scarring" from a whole denial."""
    qualifier = _QUALIFIED.search(text, 0, denial.start) or _QUALIFIED.search(text, 0, denial.end)
    # There is no other consolidation than a focal one; an opacity may be diffuse.
    if qualifier and not (qualifier[1].lower() == "focal" and denial.finding in _ALWAYS_FOCAL):
        return True
    start = max(text.rfind(mark, 0, denial.start) for mark in ".;?!") + 1
    ends = [end for mark in ".;?!" if (end := text.find(mark, denial.end)) >= 0]
    return bool(_EXCEPTING.search(text, start, min(ends, default=len(text))))


def _contradicts(denial: Mention, other: Mention) -> bool:
    if other.label != "positive" or other.finding != denial.finding:
        return False
    zones = {denial.zone, other.zone}
    elsewhere = {denial.side, other.side} == {"left", "right"} or (None not in zones and len(zones) == 2)
    return not elsewhere


def _sentences(text: str) -> Iterable[tuple[int, tuple[Reading, ...]]]:
    """Yield (offset, readings) of each sentence; spans of the readings are relative to the offset."""
    lowered = _lower(text)
    # The words come first because the pattern is slow, and nearly every report has a colon.
    if any(word in lowered for word in ("indication", "history", "clinical information", "reason for exam")):
        lowered = _UNREAD.sub(lambda m: " " * len(m.group()), lowered)
    start = 0
    for end in _SENTENCE_END.finditer(lowered):
        if end.start() > start:
            yield start, _read(lowered[start : end.start()])
        start = end.end()
    if start < len(lowered):
        yield start, _read(lowered[start:])


def _lower(text: str) -> str:
    """Lower-case without moving characters: a few Unicode letters grow when lowered."""
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(c if len(c.lower()) != 1 else c.lower() for c in text)
    return lowered


# Reports repeat their sentences, and sampled completions of one study even more so.
_read = functools.lru_cache(maxsize=32768)(read_sentence)
