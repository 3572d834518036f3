"""The labeler on 300 real reports, with the human indexers' MeSH codes as a weak reference."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from study_trees import SHARED

from valor.clinical.labeler import label, mentions
from valor.rewards.agreement import AgreementWeights
from valor.rewards.text import clinical_agreement

ROOT = SHARED / "openi" / "ecgen-radiology"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="the Open-i sample is not beside the checkout")

CODES = {
    "Cardiomegaly": r"Cardiomegaly",
    "Lung Opacity": r"Opacity/lung|Airspace Disease|Infiltrate|Density/lung|Cicatrix/lung|Markings/lung",
    "Lung Lesion": r"Nodule|Mass|Neoplasm|Opacity/.*round",
    "Atelectasis": r"Pulmonary Atelectasis",
    "Pleural Effusion": r"Pleural Effusion|Costophrenic Angle/.*blunt",
    "Fracture": r"Fractures|Spinal Fractures",
    "Support Devices": r"Implanted Medical|Catheters|Tube|Surgical Instr|Stents|Medical Device",
}
LEAST_AGREEMENT = 0.95


@pytest.fixture(scope="module")
def reports():
    found = []
    for path in sorted(ROOT.glob("*.xml")):
        root = ElementTree.parse(path).getroot()
        sections = {a.get("Label"): a.text or "" for a in root.iter("AbstractText")}
        text = f"FINDINGS: {sections.get('FINDINGS', '')}\n\nIMPRESSION: {sections.get('IMPRESSION', '')}"
        found.append((text, [m.text or "" for m in root.iter("major")]))
    return found


@pytest.mark.parametrize("finding", CODES)
def test_agrees_with_the_indexers(reports, finding):
    cells = [
        (label(text).get(finding) in ("positive", "uncertain"), any(re.match(CODES[finding], m) for m in major))
        for text, major in reports
    ]
    agreement = sum(ours == theirs for ours, theirs in cells) / len(cells)
    found = sum(ours and theirs for ours, theirs in cells) / sum(theirs for _, theirs in cells)
    assert agreement >= LEAST_AGREEMENT
    # Chance agreement is high for rare findings: what the indexers saw must be found, too.
    assert found >= 0.8


def test_indexed_as_normal_has_no_finding(reports):
    normal = [label(text) for text, major in reports if major == ["normal"]]
    assert sum("No Finding" in labels for labels in normal) / len(normal) >= 0.97


def test_a_copy_of_a_report_is_right(reports):
    stating = [text for text, _ in reports if mentions(text)]
    assert len(stating) >= 299
    assert [text for text in stating if clinical_agreement(text, text, AgreementWeights()) != 1.0] == []


def test_spans_lie_in_the_text(reports):
    for text, _ in reports:
        for mention in mentions(text):
            assert text[mention.start : mention.end].strip()
