import pytest
from study_trees import SHARED

from valor.data.manifest import Reason, Rejected
from valor.data.reports import Report, clean, parse_mimic, parse_openi

FULL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 \n INDICATION:  ___F with cough  // pneumonia?
 \n COMPARISON:  ___
 \n FINDINGS: \n \n The heart is big.
  Note: no effusion.
 \n IMPRESSION:
 \n Bad.
"""


def test_sections_of_a_full_report():
    assert parse_mimic(FULL) == Report(
        findings="The heart is big. Note: no effusion.",
        impression="Bad.",
        indication="___F with cough // pneumonia?",
        comparison=None,
    )


def test_line_ends_do_not_matter():
    assert parse_mimic(FULL.replace("\n", "\r\n")) == parse_mimic(FULL)


def test_capitals_inside_a_line_are_no_heading():
    report = parse_mimic(" FINDINGS: Clear. IMPRESSION: is not here\n IMPRESSION: Here.")
    assert report.findings == "Clear. IMPRESSION: is not here"
    assert report.impression == "Here."


@pytest.mark.parametrize("heading", ["IMPRESSION", "CONCLUSION", "SUMMARY"])
def test_names_of_the_impression(heading):
    assert parse_mimic(f" FINDINGS: Clear.\n {heading}: Fine.").impression == "Fine."


def test_an_empty_section_does_not_hide_the_next():
    assert parse_mimic(" FINDINGS:\n IMPRESSION: Fine.") == Report(impression="Fine.")


def test_impression_is_not_taken_for_findings():
    assert parse_mimic(" INDICATION: Cough.\n \n IMPRESSION: Fine.").findings is None


def test_a_report_with_neither_heading_gives_its_last_paragraph():
    report = parse_mimic(" FINAL REPORT\n HISTORY: Cough for days.\n \n Heart is normal. No\n effusion.\n")
    assert report == Report(findings="Heart is normal. No effusion.", indication="Cough for days.")
    assert parse_mimic("                FINAL REPORT\n Heart is normal.").findings == "Heart is normal."


@pytest.mark.parametrize(
    "text", ["", " \n \n", " FINDINGS: ___ \n IMPRESSION: .", " FINAL REPORT\n", " HISTORY: Cough."]
)
def test_reports_that_say_nothing(text):
    report = parse_mimic(text)
    assert (report.findings, report.impression) == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("XXXX, XXXX.", None), ("___ .", None), (" A\n b cd ", "A b cd"), ("XXXX year-old", "XXXX year-old")],
)
def test_clean_keeps_redactions_within_words_only(text, expected):
    assert clean(text) == expected


def openi(findings: str = "Clear.", uid: str = "CXR7") -> bytes:
    return (
        f'<eCitation><uId id="{uid}"/><Abstract><AbstractText Label="FINDINGS">{findings}</AbstractText>'
        '<AbstractText Label="IMPRESSION">Fine &amp; well.</AbstractText><AbstractText Label="COMPARISON"/></Abstract>'
        '<parentImage id="CXR7_IM-1-1001"><caption> PA and\n lateral </caption></parentImage>'
        '<parentImage id="CXR7_IM-1-2001"/></eCitation>'
    ).encode()


def test_openi_record():
    record = parse_openi(openi())
    assert record.uid == "CXR7"
    assert record.report == Report(findings="Clear.", impression="Fine & well.")
    assert record.images == (("CXR7_IM-1-1001", "PA and lateral"), ("CXR7_IM-1-2001", ""))


def test_openi_without_findings():
    assert parse_openi(openi(findings="XXXX")).report == Report(impression="Fine & well.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<eCitation>",
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><eCitation>&b;</eCitation>',
    ],
)
def test_broken_or_malicious_xml_is_rejected(data):
    with pytest.raises(Rejected) as caught:
        parse_openi(data)
    assert caught.value.reason is Reason.UNREADABLE_REPORT


@pytest.mark.skipif(not (SHARED / "openi").is_dir(), reason="no shared data")
def test_the_300_real_reports():
    records = [parse_openi(path.read_bytes()) for path in sorted((SHARED / "openi" / "ecgen-radiology").glob("*.xml"))]
    assert len(records) == 300
    assert sum(record.report.findings is None for record in records) == 42
    assert sum(record.report.impression is None for record in records) == 2
    assert sum(len(record.images) for record in records) == 580
    assert all(record.report.findings or record.report.impression for record in records)
