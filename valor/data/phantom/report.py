"""The phantom's reports: FINDINGS and IMPRESSION of what a hurried radiologist might write about the truth.

Truth is exact, reports are not: `ReportNoise` sets how often a finding goes unmentioned, is contradicted by a
template normal, is put on the wrong side, is compared with a prior that does not exist, or is hedged while mild.
What the report says follows from one `Statement` per finding, so findings and impression never disagree.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from valor.data.phantom import wording
from valor.data.phantom.disease import DRAWN, OTHER_SIDE, Finding
from valor.recipe import ReportNoise

_ORDER = (
    "Cardiomegaly",
    "Enlarged Cardiomediastinum",
    "Edema",
    "Consolidation",
    "Atelectasis",
    "Lung Lesion",
    "Pneumothorax",
    "Pleural Effusion",
    "Fracture",
    "Support Devices",
)
_NEGATIVE_RATE = {
    "Cardiomegaly": 0.9,
    "Enlarged Cardiomediastinum": 0.5,
    "Edema": 0.5,
    "Consolidation": 0.7,
    "Atelectasis": 0.1,
    "Lung Lesion": 0.15,
    "Pneumothorax": 0.9,
    "Pleural Effusion": 0.9,
    "Fracture": 0.35,
}
_IMPRESSION_LIMIT = 3


@dataclasses.dataclass(frozen=True)
class Statement:
    """What the report says of one finding: `stated`, `hedged`, `denied` or `omitted`, and as what."""

    finding: Finding
    manner: str


def decide(findings: Sequence[Finding], noise: ReportNoise, rng: np.random.Generator) -> list[Statement]:
    """Return one statement per finding, with the noise applied.

    The rates are per finding: first a contradiction, then omission (`omission_subtle` for mild findings), then
    the wrong side (sided findings only), then hedging of mild ones.
    """
    statements = []
    for finding in findings:
        contradicted, omitted, swapped, hedged = rng.random(4)
        mild = finding.severity == "mild"
        if contradicted < noise.template_contradiction and finding.finding in wording.NEGATIVE:
            statements.append(Statement(finding, "denied"))
        elif omitted < (noise.omission_subtle if mild else noise.omission):
            statements.append(Statement(finding, "omitted"))
        else:
            if swapped < noise.wrong_side and finding.side in OTHER_SIDE:
                finding = dataclasses.replace(finding, side=OTHER_SIDE[finding.side])
            statements.append(Statement(finding, "hedged" if mild and hedged < noise.hedged_borderline else "stated"))
    return sorted(statements, key=lambda s: _ORDER.index(s.finding.finding))


def write_report(
    findings: Sequence[Finding], noise: ReportNoise, rng: np.random.Generator, *, held_out_wording: bool = False
) -> tuple[str, str]:
    """Return (findings, impression) as plain sentences.

    Args:
        held_out_wording: use the held-out template wherever a finding has one, instead of never.
    """
    statements = decide(findings, noise, rng)
    writer = _Writer(rng, held_out_wording)
    said = [s for s in statements if s.manner in ("stated", "hedged")]
    prior = rng.random() < noise.false_prior
    sentences = writer.findings(statements)
    if prior:
        sentences.insert(0 if rng.random() < 0.5 else len(sentences), writer.prior(said))
    return " ".join(sentences), " ".join(writer.impression(said))


class _Writer:
    def __init__(self, rng: np.random.Generator, held_out: bool):
        self.rng, self.held_out = rng, held_out

    def findings(self, statements: Sequence[Statement]) -> list[str]:
        by_name = {s.finding.finding: s for s in statements}
        denied = {name for name, s in by_name.items() if s.manner == "denied"}
        free = [name for name in DRAWN if name in _NEGATIVE_RATE and name not in by_name]
        wanted = denied | {name for name in free if self.rng.random() < _NEGATIVE_RATE[name]}
        normal_lungs = not any(name in by_name for name in ("Edema", "Consolidation", "Atelectasis", "Lung Lesion"))
        if normal_lungs and self.rng.random() < 0.7:
            wanted -= {"Edema", "Consolidation", "Atelectasis", "Lung Lesion"}
            clear = self.choose(wording.CLEAR_LUNGS)
        else:
            clear = ""
        sentences: list[str] = []
        for name in _ORDER:
            if name == "Edema" and clear:
                sentences.append(clear)
            statement = by_name.get(name)
            if statement and statement.manner in ("stated", "hedged"):
                sentences.append(self.positive(statement))
            elif name in wanted:
                sentences.append(self.negative(name, wanted))
        return [s for s in sentences if s]

    def impression(self, said: Sequence[Statement]) -> list[str]:
        serious = [s for s in said if s.finding.finding != "Support Devices"]
        if not serious:
            return [self.choose(wording.NORMAL)]
        rank = {"severe": 0, "moderate": 1, "mild": 2}
        kept = sorted(serious, key=lambda s: rank[s.finding.severity or "mild"])[:_IMPRESSION_LIMIT]
        return [self.short(s) for s in serious if s in kept]

    def prior(self, said: Sequence[Statement]) -> str:
        stated = [s.finding.finding for s in said if s.manner == "stated"]
        nouns = [wording.NOUN[name] for name in stated if name in wording.NOUN]
        if not nouns:
            return self.choose(wording.PRIOR_SAME)
        return self.choose(wording.PRIOR_FINDING).format(noun=nouns[int(self.rng.integers(len(nouns)))])

    def positive(self, statement: Statement) -> str:
        finding = statement.finding
        if finding.finding == "Support Devices":
            return self.fill(self.choose(wording.DEVICE[finding.kind]), finding)
        if statement.manner == "hedged":
            return self.fill(self.choose(wording.HEDGE[finding.finding]), finding)
        plural = finding.side == "bilateral" and finding.finding in wording.PLURAL
        basal = finding.finding != "Atelectasis" or finding.zone == "lower"
        source = wording.PLURAL if plural and basal else wording.FINDING
        return self.fill(self.choose(source[finding.finding]), finding)

    def short(self, statement: Statement) -> str:
        finding = statement.finding
        if statement.manner == "hedged":
            return self.fill(wording.HEDGE[finding.finding][0], finding)
        plural = finding.side == "bilateral" and finding.finding in wording.SHORT_PLURAL
        basal = finding.finding != "Atelectasis" or finding.zone == "lower"
        source = wording.SHORT_PLURAL if plural and basal else wording.SHORT
        return self.fill(self.choose(source[finding.finding]), finding)

    def negative(self, name: str, wanted: set[str]) -> str:
        for pair, templates in wording.PAIR_NEGATIVE.items():
            if name in pair and set(pair) <= wanted:
                return self.choose(templates) if name == pair[0] else ""
        return self.choose(wording.NEGATIVE[name])

    def choose(self, templates: Sequence[str]) -> str:
        if len(templates) > wording.HOLD_OUT_FROM:
            templates = templates[-1:] if self.held_out else templates[:-1]
        return templates[int(self.rng.integers(len(templates)))]

    def fill(self, template: str, finding: Finding) -> str:
        text = template.format(**self.words(finding))
        return text[0].upper() + text[1:]

    def words(self, finding: Finding) -> Mapping[str, str]:
        severity, zone, side = finding.severity or "mild", finding.zone or "lower", finding.side or ""
        places = wording.BILATERAL_ZONE_WORDS if side == "bilateral" else wording.ZONE_WORDS
        degree = self.choose(wording.DEGREE[severity])
        return {
            "side": side,
            "zone": zone,
            "place": self.choose(places[zone]).format(side=side),
            "size": self.choose(wording.SIZE[severity]),
            "degree": degree,
            "degree_ly": degree.removesuffix("ed") + ("edly" if degree == "marked" else "ly"),
            "basal": {"lower": "basilar", "mid": "mid lung", "upper": "upper lobe"}[zone],
            "mass": {"mild": "small nodule", "moderate": "nodule", "severe": "large mass"}[severity],
            "noun": "mass" if severity == "severe" else "nodule",
            "break_": {"mild": "minimally ", "moderate": "", "severe": "markedly "}[severity] + "displaced",
        }
