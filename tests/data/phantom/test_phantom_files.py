import csv
import io
import shutil
import subprocess
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.pixels import pixel_array

from valor.data import masks
from valor.data.dicom import read_dicom
from valor.data.phantom import draw, plan, write
from valor.data.phantom.headers import dicom_bytes
from valor.data.phantom.image import to_display
from valor.data.reports import parse_mimic
from valor.recipe import PhantomStudies

SETTINGS = PhantomStudies(seed=41, train=30, val=3, test=6, image_px=96)


@pytest.fixture(scope="module")
def studies():
    return [draw(key, SETTINGS) for key in plan(SETTINGS)]


@pytest.fixture(scope="module")
def written(tmp_path_factory, studies):
    root = tmp_path_factory.mktemp("phantom")
    write(iter(studies), root=root / "data", annotations_root=root / "truth", settings=SETTINGS)
    return root


def rows(written, name):
    with (written / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_stored_pixels_are_lossless_in_every_polarity_class_and_syntax(studies):
    kinds = Counter()
    for study in studies:
        dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(study, seed=SETTINGS.seed)))
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        stored = pixel_array(dataset)
        assert ((4095 - stored if inverted else stored) == study.pixels).all()
        kinds.update([dataset.PhotometricInterpretation, dataset.Modality, dataset.file_meta.TransferSyntaxUID.name])
    assert len(kinds) == 7  # two polarities, two classes, three transfer syntaxes


def test_the_real_reader_shows_what_samples_show(studies):
    for study in studies[:12]:
        radiograph, header = read_dicom(dicom_bytes(study, seed=SETTINGS.seed))
        assert np.abs(radiograph.pixels * 255 - to_display(study.pixels)).max() < 1.1
        assert header.view == study.view
        assert header.sex == study.sex


def test_headers_are_de_identified_and_twelve_bit(studies):
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(studies[0], seed=SETTINGS.seed)))
    assert dataset.PatientName == ""
    assert dataset.PatientIdentityRemoved == "YES"
    assert dataset.PatientID == studies[0].key.subject_id
    assert (dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit) == (16, 12, 11)
    assert not any(element.tag.is_private for element in dataset)


def test_header_never_names_a_finding(studies):
    for study in studies:
        text = str(pydicom.dcmread(io.BytesIO(dicom_bytes(study, seed=SETTINGS.seed)), stop_before_pixels=True)).lower()
        assert not any(f.finding.lower() in text or (f.kind and f.kind in text) for f in study.truth)


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dicom3tools is not installed")
def test_an_independent_validator_finds_no_error(written):
    files = sorted((written / "data").rglob("*.dcm"))[:10]
    for path in files:
        found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in found.stderr + found.stdout, found.stderr


def test_layout_is_that_of_mimic_cxr(written, studies):
    records, lists = rows(written, "cxr-record-list.csv"), rows(written, "cxr-study-list.csv")
    assert len(records) == len(lists) == len(studies)
    for record, listed in zip(records, lists, strict=True):
        subject, study = record["subject_id"], record["study_id"]
        assert record["path"] == f"files/p{subject[:2]}/p{subject}/s{study}/{record['dicom_id']}.dcm"
        assert listed["path"] == f"files/p{subject[:2]}/p{subject}/s{study}.txt"
        assert (written / "data" / record["path"]).is_file()
        assert (written / "data" / listed["path"]).is_file()
    splits = Counter(row["split"] for row in rows(written, "mimic-cxr-2.0.0-split.csv"))
    assert splits == {"train": 30, "validate": 3, "test": 6}
    assert {row["ViewPosition"] for row in rows(written, "mimic-cxr-2.0.0-metadata.csv")} <= {"PA", "AP"}


def test_the_real_parser_reads_the_reports(written, studies):
    for study in studies:
        text = (written / "data" / f"files/p10/p{study.key.subject_id}/s{study.key.study_id}.txt").read_text()
        report = parse_mimic(text)
        assert (report.findings, report.impression) == (study.findings, study.impression)


def test_truth_and_masks_lie_apart_and_are_exact(written, studies):
    assert not list((written / "data").rglob("*.parquet"))
    truth = pq.read_table(written / "truth" / "truth.parquet").to_pylist()
    assert len(truth) == 14 * len(studies)
    found = pq.read_table(written / "truth" / "annotations.parquet").to_pylist()
    expected = {(study.key.study_id, name): mask for study in studies for name, mask in study.masks.items()}
    assert {(row["study_id"], row["finding"]) for row in found} == set(expected)
    for row in found:
        assert (masks.decode(row["mask"], row["shape"]) == expected[row["study_id"], row["finding"]]).all()
    present = {(row["study_id"], row["finding"]) for row in truth if row["present"] and not row["implied"]}
    assert present == set(expected)


def test_files_repeat_byte_for_byte(studies):
    again = draw(studies[1].key, SETTINGS)
    assert dicom_bytes(again, seed=SETTINGS.seed) == dicom_bytes(studies[1], seed=SETTINGS.seed)


def test_an_empty_shard_writes_empty_tables(tmp_path):
    write([], root=tmp_path / "data", annotations_root=tmp_path / "truth", settings=SETTINGS)
    assert pq.read_table(tmp_path / "truth" / "truth.parquet").num_rows == 0
    assert (tmp_path / "data" / "cxr-record-list.csv").read_text().count("\n") == 1
