"""Many reports, and edits that make each of them worse."""

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
from study_trees import SHARED

from valor.clinical.hierarchy import NAMES, ancestors
from valor.clinical.labeler import Mention, mentions
from valor.data.manifest import report_text
from valor.data.phantom.disease import draw_findings
from valor.data.phantom.report import write_report
from valor.data.reports import parse_openi
from valor.models.sentences import moved_zones, reversed_polarity, sentences, swap_sides
from valor.recipe import ReportNoise

OPENI = SHARED / "openi" / "ecgen-radiology"
CLAIMS = {
    "Enlarged Cardiomediastinum": "The mediastinum is widened.",
    "Cardiomegaly": "The heart is enlarged.",
    "Lung Lesion": "There is a nodule in the right upper lobe.",
    "Edema": "There is pulmonary edema.",
    "Consolidation": "There is a consolidation in the left lower lobe.",
    "Pneumonia": "There is right lower lobe pneumonia.",
    "Atelectasis": "There is left basilar atelectasis.",
    "Pneumothorax": "There is a right pneumothorax.",
    "Pleural Effusion": "There is a left pleural effusion.",
    "Fracture": "There is a right rib fracture.",
    "Support Devices": "A left chest tube is in place.",
}
"""A sentence that asserts a finding and, but for broader names of it, nothing else."""
NOISE = " ".join(
    random.Random(0).choices(
        ["effusion", "left", "the", "blip", "lung", "zork", "of", "no", "opacity", "right"], k=2000
    )
)


def phantom_reports() -> list[str]:
    rng = np.random.default_rng(20)
    return [
        report_text(*write_report(draw_findings(rng), ReportNoise(), rng, held_out_wording=bool(number % 2)))
        for number in range(200)
    ]


def openi_reports() -> list[str]:
    parsed = (parse_openi(path.read_bytes()).report for path in sorted(OPENI.glob("*.xml")))
    texts = [report_text(report.findings, report.impression) for report in parsed]
    return [text for text in texts if text]


@functools.cache
def in_other_words() -> list[tuple[str, str]]:
    """Return (report, the same in held-out wordings) of 300 phantom patients, of findings that have a side.

    The labeler reads both alike, denials aside, or the second would not be as good a report.
    """
    faithful = ReportNoise(
        omission=0, omission_subtle=0, wrong_side=0, hedged_borderline=0, template_contradiction=0, false_prior=0
    )
    rng, pairs = np.random.default_rng(5), []
    while len(pairs) < 300:
        findings = draw_findings(rng)
        report, other = (
            report_text(*write_report(findings, faithful, rng, held_out_wording=held_out)) for held_out in (False, True)
        )
        if sided(report) and said(report) == said(other):
            pairs.append((report, other))
    return pairs


# What a report says, as far as the clinical reward claims to see it


def said(text: str) -> set[tuple[str, str, str | None, str | None]]:
    return {(mention.finding, mention.label, mention.side, mention.zone) for mention in asserted(text)}


def sided(text: str) -> list[str]:
    """Return the findings that a text asserts on the left or on the right."""
    return sorted({mention.finding for mention in asserted(text) if mention.side in ("left", "right")})


def asserted(text: str) -> list[Mention]:
    """Return what a text asserts or suspects."""
    return [mention for mention in mentions(text) if mention.label != "negative" and mention.finding in NAMES]


def named(text: str) -> set[str]:
    """Return the findings that a text asserts or suspects, by this or a narrower name."""
    return {name for mention in asserted(text) for name in NAMES[mention.finding]}


def is_positive(sentence: str) -> bool:
    return any(mention.label == "positive" for mention in asserted(sentence))


def names_one_side(text: str) -> bool:
    """Tell whether a finding is on one side alone, by whatever name; on both, a swap confuses no more than sizes."""
    sides: dict[str, set[str]] = {}
    for mention in asserted(text):
        for name in NAMES[mention.finding] if mention.side else ():
            sides.setdefault(name, set()).add(str(mention.side))
    return any(found in ({"left"}, {"right"}) for found in sides.values())


def loses_an_assertion(report: str, edited: str) -> bool:
    """Tell whether an edit takes away an assertion of a finding, and asserts no narrower name of it.

    Names of one finding are not compared (docs/labeler.md): "compatible with pneumonia ... no consolidation" still
    asserts the consolidation, and so in full what the report asserts.
    """
    before, after = (Counter(mention.finding for mention in asserted(text)) for text in (report, edited))
    return any(not any(finding in ancestors(name) for name in after) for finding in before - after)


# The edits: of a report, the reports it is among, and its number in them


def rewritten(report: str, edit: Callable[[int, str], str]) -> str:
    """Return a report with each of its sentences, by number, replaced by `edit`'s answer; the headings stay."""
    at, parts = 0, []
    for number, sentence in enumerate(sentences(report)):
        start = report.index(sentence, at)
        parts += [report[at:start], edit(number, sentence)]
        at = start + len(sentence)
    return "".join([*parts, report[at:]])


def reversed_or_same(sentence: str) -> str:
    return reversed_polarity(sentence) or sentence


def with_all_reversed(report: str, reports: list[str], number: int) -> str:
    return rewritten(report, lambda _, sentence: reversed_or_same(sentence))


def with_denials_asserted(report: str, reports: list[str], number: int) -> str:
    return rewritten(report, lambda _, s: s if is_positive(s) else reversed_or_same(s))


def with_findings_denied(report: str, reports: list[str], number: int) -> str:
    return rewritten(report, lambda _, s: reversed_or_same(s) if is_positive(s) else s)


def with_sides_swapped(report: str, reports: list[str], number: int) -> str:
    return rewritten(report, lambda _, sentence: swap_sides(sentence))


def with_a_side_swapped(report: str, reports: list[str], number: int) -> str:
    """Put one finding on the other side, wherever the report names it, and what shares its sentences with it."""
    wrong = random.Random(number).choice(sided(report))
    return rewritten(report, lambda _, sentence: swap_sides(sentence) if wrong in sided(sentence) else sentence)


def with_a_zone_moved(report: str, reports: list[str], number: int) -> str:
    """Put the first finding with a zone into another one; no edit where it says that zone otherwise too ("basilar")."""
    zoned = [sentence for sentence in sentences(report) if is_positive(sentence) and moved_zones(sentence)]
    wrong = named(zoned[0]) if zoned else set()
    edited = rewritten(report, lambda _, s: moved_zones(s)[0] if wrong & named(s) and moved_zones(s) else s)
    before, after = ({m.zone for m in asserted(text) if m.finding in wrong} for text in (report, edited))
    return report if before & after else edited


def without_a_sentence(report: str, reports: list[str], number: int) -> str:
    """Drop a positive sentence: where there is one, a sentence whose finding no other repeats."""
    positive = [at for at, sentence in enumerate(sentences(report)) if is_positive(sentence)]
    drops = [rewritten(report, lambda at, sentence, p=p: "" if at == p else sentence) for p in positive]
    drops = [dropped for dropped in drops if named(dropped) != named(report)] or drops
    return random.Random(number).choice(drops) if drops else report


def without_a_finding(report: str, reports: list[str], number: int) -> str:
    findings = sorted(named(report))
    dropped = random.Random(number).choice(findings) if findings else ""
    return rewritten(report, lambda _, sentence: "" if dropped in named(sentence) else sentence)


def with_an_invention(report: str, reports: list[str], number: int) -> str:
    rng = random.Random(number)
    claim = CLAIMS[rng.choice(sorted(CLAIMS.keys() - named(report)))]
    place = rng.randrange(len(sentences(report)))
    return rewritten(report, lambda at, sentence: f"{claim} {sentence}" if at == place else sentence)


def in_another_order(words: list[str], number: int) -> str:
    random.Random(number).shuffle(words)
    return " ".join(words)


def another_patients(report: str, reports: list[str], number: int) -> str:
    """Return the next report of other findings."""
    return next(other for other in reports[number:] + reports[:number] if named(other) != named(report))


EDITS: Mapping[str, Callable[[str, list[str], int], str]] = {
    "all reversed": with_all_reversed,
    "denials asserted": with_denials_asserted,
    "findings denied": with_findings_denied,
    "sides swapped": with_sides_swapped,
    "a sentence dropped": without_a_sentence,
    "a finding dropped": without_a_finding,
    "a finding invented": with_an_invention,
    "another patient's": another_patients,
    "empty": lambda report, reports, number: "",
    "noise": lambda report, reports, number: NOISE,
    "said three times": lambda report, reports, number: " ".join([report] * 3),
}
SALADS: Mapping[str, Callable[[str, list[str], int], str]] = {
    "words shuffled": lambda report, reports, number: in_another_order(report.split(), number),
    "words of all reports": lambda report, reports, number: " ".join(
        random.Random(number).choices(" ".join(reports).split(), k=len(report.split()))
    ),
}
"""Noise of a report's own length, which no bound on the length sees."""


@functools.cache
def edited_reports(source: str, kind: str) -> list[tuple[str, str]]:
    """Return (report, edited) of the reports that an edit changes."""
    reports = {"phantom": phantom_reports, "openi": openi_reports}[source]()
    edit = {**EDITS, **SALADS}[kind]
    edits = [(report, edit(report, reports, number)) for number, report in enumerate(reports)]
    return [(report, edited) for report, edited in edits if edited != report]
