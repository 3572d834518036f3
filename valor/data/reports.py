"""Sections of a radiology report: MIMIC-CXR's free text and Open-i's XML.

MIMIC-CXR: the rule of the official section parser (MIT-LCP/mimic-cxr, txt/section_parser.py): a heading is a
newline, one space, capitals and a colon. `findings` and `impression` are taken by their headings; a report with
neither gives its last paragraph as findings. Open-i: `AbstractText[@Label]` (Demner-Fushman et al. 2016).

White space is folded; redactions (`XXXX`, `___`) stay as published, since a model must meet the language as it
is, but a section made of nothing else counts as missing. Reports in languages other than English are left out.
"""

import re
from dataclasses import dataclass

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from valor.data.manifest import Reason, Rejected

_HEADING = re.compile(r"\n ([A-Z ()/,-]+):(?=\s|$)")
"""The official rule, but the white space is not consumed: an empty section must not hide the next heading."""
_SAYS_SOMETHING = re.compile(r"[A-Za-z]{2,}")
_REDACTION = re.compile(r"\b[Xx]{2,}\b|_{2,}")

_NAMES = {
    "findings": ("findings", "finding", "report", "chest findings", "findings in the chest"),
    "impression": ("impression", "impressions", "conclusion", "conclusions", "summary", "opinion"),
    "indication": (
        "indication",
        "indications",
        "history",
        "clinical history",
        "clinical information",
        "clinical indication",
        "reason for exam",
        "reason for examination",
        "reason for study",
    ),
    "comparison": ("comparison", "comparisons", "comparison film", "comparison study"),
}
_SECTION_OF_NAME = {name: section for section, names in _NAMES.items() for name in names}
_BOTH = {"findings and impression", "findings/impression", "impression and findings", "impression/findings"}


@dataclass(frozen=True)
class Report:
    """The sections VALOR keeps; None where the report has none or only redactions."""

    findings: str | None = None
    impression: str | None = None
    indication: str | None = None
    comparison: str | None = None


@dataclass(frozen=True)
class OpenIRecord:
    """What one Open-i XML file tells: its id, its report, its images in published order with captions."""

    uid: str
    report: Report
    images: tuple[tuple[str, str], ...]


def parse_mimic(text: str) -> Report:
    """Return the sections of a MIMIC-CXR report; every one None where it says nothing."""
    # A leading newline lets a heading on the first line count as one.
    text = "\n" + text.replace("\r\n", "\n")
    headings = list(_HEADING.finditer(text))
    sections: dict[str, str] = {}
    for number, match in enumerate(headings, start=1):
        end = headings[number].start() if number < len(headings) else len(text)
        body = clean(text[match.end() : end])
        name = _section_name(match[1])
        if name and body:  # a later section of the same name is an addendum's and replaces it, as in the official rule
            sections[name] = body
    if "findings" not in sections and "impression" not in sections:
        _take_last_paragraph(sections, text, headings)
    return Report(**sections)


def parse_openi(data: bytes) -> OpenIRecord:
    """Return the record of one Open-i XML file.

    Raises:
        Rejected: not XML, or XML with entity tricks.
    """
    try:
        root = defusedxml.ElementTree.fromstring(data)
    except (defusedxml.ElementTree.ParseError, DefusedXmlException, ValueError) as error:
        raise Rejected(Reason.UNREADABLE_REPORT, f"{type(error).__name__}: no well-formed XML") from None
    sections: dict[str, str] = {}
    for element in root.iter("AbstractText"):
        name = _section_name(element.get("Label") or "")
        body = clean("".join(element.itertext()))
        if name and body:
            sections[name] = f"{sections[name]} {body}" if name in sections else body
    identity = root.find("uId")
    images = tuple(
        (element.get("id") or "", " ".join((element.findtext("caption") or "").split()))
        for element in root.iter("parentImage")
        if element.get("id")
    )
    uid = (identity.get("id") if identity is not None else "") or ""
    return OpenIRecord(uid=uid, report=Report(**sections), images=images)


def clean(text: str) -> str | None:
    """Fold white space; None where nothing but redactions and punctuation is left."""
    folded = " ".join(text.split())
    return folded if _SAYS_SOMETHING.search(_REDACTION.sub("", folded)) else None


def _section_name(heading: str) -> str:
    """Return VALOR's name of a heading, "" for a section that is not kept."""
    name = " ".join(heading.lower().split())
    return "findings" if name in _BOTH else _SECTION_OF_NAME.get(name, "")


def _take_last_paragraph(sections: dict[str, str], text: str, headings: list[re.Match[str]]) -> None:
    """Make findings of what follows the last section's first paragraph, or of all of a report without headings."""
    if not headings:
        first, rest = "", re.sub(r"^\s*(FINAL REPORT|WET READ)\s*$", "", text, flags=re.MULTILINE)
    else:
        first, _, rest = text[headings[-1].end() :].lstrip("\n ").partition("\n \n")
    findings = clean(rest)
    if not findings:
        return
    sections["findings"] = findings
    name = _section_name(headings[-1][1]) if headings else ""
    if name:
        sections.pop(name, None)
        body = clean(first)
        if body:
            sections[name] = body
