import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from study_trees import chest, dicom_bytes, mimic_tree

from valor.context import Context
from valor.data.manifest import QUARANTINE, decode_image, iter_studies, row_digest
from valor.data.shards import plan_shards
from valor.data.source import Source
from valor.recipe import DataSettings, PhantomStudies
from valor.stages.ingest import STUDIES, ingest


def ingested(root, output, **settings):
    """Ingest everything as one shard; return rows by study number, quarantine rows and metrics."""
    data = DataSettings(shards=1, **settings)
    (shard,), _ = plan_shards(str(root), annotations_root="", settings=data)
    result = ingest(data, root=str(root), annotations_root="", shard=shard.to_json(), output=output, context=Context())
    rows = {int(study.study_id[1:]): study for study in iter_studies([output / STUDIES])}
    return rows, pq.read_table(output / QUARANTINE).to_pylist(), result.metrics


@pytest.fixture
def tree(tmp_path):
    return mimic_tree(tmp_path / "root", train=2, val=0, test=0)


def test_a_row_holds_the_study(tree, tmp_path):
    tree.add(20, split="test", images={"abc": dicom_bytes(chest(20, rows=400, columns=300))})
    rows, quarantine, metrics = ingested(tree.root, tmp_path / "out", image_px=64)
    row = rows[20]
    assert (row.subject_id, row.split, row.sex, row.age_band, row.device) == ("10000020", "test", "F", "60-69", "Maker")
    assert row.findings == "Study 20: the heart is normal in size. No effusion."
    assert row.impression == "No acute process in 20."
    assert row.indication == "___ year old with cough"
    (image,) = row.images
    assert (image.dicom_id, image.view) == ("abc", "PA")
    assert image.path == "files/p10/p10000020/s50000020/abc.dcm"
    assert decode_image(image.bytes).shape == (64, 48)
    assert json.loads(image.transform)["rows"] == 400
    assert quarantine == []
    assert metrics == {"kept": 3, "quarantined": 0, "studies": 3}


REASONS = {
    "undecodable": {"images": {"x": dicom_bytes(chest(1))[:900]}},
    "not_radiograph": {"images": {"x": dicom_bytes(chest(1), Modality="CT")}},
    "colour": {"images": {"x": dicom_bytes(chest(1), PhotometricInterpretation="RGB", SamplesPerPixel=3)}},
    "multi_frame": {"images": {"x": dicom_bytes(chest(1), NumberOfFrames=2)}},
    "blank": {"images": {"x": dicom_bytes(np.full((40, 40), 9, np.uint16))}},
    "not_chest": {"images": {"x": dicom_bytes(chest(1), BodyPartExamined="HAND")}},
    "missing_image": {"images": {}},
    "missing_report": {"report": None},
    "empty_report": {"report": " FINAL REPORT\n FINDINGS: ___\n IMPRESSION: \n"},
}


def test_each_bad_study_is_quarantined_with_its_reason_and_the_run_continues(tree, tmp_path):
    for number, kind in enumerate(REASONS.values(), start=30):
        tree.add(number, **kind)
    rows, quarantine, metrics = ingested(tree.root, tmp_path / "out")
    assert sorted(rows) == [1, 2]
    assert {row["study_id"]: row["reason"] for row in quarantine} == {
        f"5{number:07d}": reason for number, reason in enumerate(REASONS, start=30)
    }
    assert {row["scope"] for row in quarantine} == {"study"}
    assert metrics["quarantined"] == len(REASONS)
    assert metrics["rejected_colour"] == 1


def test_an_empty_exposure_is_blank_however_its_noise_is_stretched(tree, tmp_path):
    noise = np.random.default_rng(0).normal(2000, 6, (512, 512)).astype(np.uint16)
    tree.add(30, images={"x": dicom_bytes(noise, window=None)})
    tree.add(31, images={"x": dicom_bytes(noise, window=(2048, 4096))})
    rows, quarantine, _ = ingested(tree.root, tmp_path / "a")
    assert sorted(rows) == [1, 2]
    assert [row["reason"] for row in quarantine] == ["blank", "blank"]
    rows, _, _ = ingested(tree.root, tmp_path / "b", checks={"min_image_std": 0.5})
    assert sorted(rows) == [1, 2, 30, 31]


def test_a_bad_image_costs_the_image_and_not_the_study(tree, tmp_path):
    images = {"a": dicom_bytes(chest(1))[:900], "b": dicom_bytes(chest(2)), "c": dicom_bytes(chest(3))}
    tree.add(30, images=images)
    rows, quarantine, metrics = ingested(tree.root, tmp_path / "one")
    assert [image.dicom_id for image in rows[30].images] == ["b"]
    assert [(row["path"][-5:], row["scope"]) for row in quarantine] == [("a.dcm", "image")]
    assert metrics["quarantined"] == 0
    rows, _, _ = ingested(tree.root, tmp_path / "two", max_views=2)
    assert [image.dicom_id for image in rows[30].images] == ["b", "c"]


def test_quarantine_and_logs_hold_no_report_text(tree, tmp_path, caplog, capfd):
    caplog.set_level("INFO")
    tree.add(30, report=" INDICATION: zebrafish\n", images={"x": dicom_bytes(chest(1))})
    tree.add(31, report=" FINDINGS: zebrafish.\n", images={"x": b"zebrafish"})
    _, quarantine, _ = ingested(tree.root, tmp_path / "out")
    assert len(quarantine) == 2
    captured = capfd.readouterr()
    assert "zebrafish" not in f"{quarantine}{caplog.text}{captured.out}{captured.err}"


def test_nothing_is_left_of_a_run_that_stops_half_way(tree, tmp_path, monkeypatch):
    read = Source.read

    def vanish(source, path):
        if "s50000002" in path:
            raise ConnectionError(path)
        return read(source, path)

    monkeypatch.setattr(Source, "read", vanish)
    with pytest.raises(ConnectionError):
        ingested(tree.root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_phantom_studies_come_through_the_same_door_with_their_truth(tmp_path):
    rows, quarantine, metrics = ingested(
        "phantom", tmp_path / "out", phantom=PhantomStudies(seed=424242, train=3, val=2, test=2, image_px=96)
    )
    assert metrics["kept"] == 7
    assert quarantine == []
    assert sorted(study.split for study in rows.values()) == ["test"] * 2 + ["train"] * 3 + ["val"] * 2
    assert all(study.text.startswith("FINDINGS: ") for study in rows.values())
    ids = {study.study_id for study in rows.values()}
    assert set(pq.read_table(tmp_path / "out" / "truth.parquet")["study_id"].to_pylist()) == ids
    assert set(pq.read_table(tmp_path / "out" / "annotations.parquet")["study_id"].to_pylist()) <= ids


def test_a_phantom_study_is_the_same_in_any_shard(tmp_path):
    phantom = PhantomStudies(seed=424242, train=3, val=2, test=2, image_px=96)
    digests = []
    for count in (1, 3):
        settings = DataSettings(shards=count, phantom=phantom)
        shards, _ = plan_shards("phantom", annotations_root="", settings=settings)
        outputs = [tmp_path / f"{count}-{shard.index}" for shard in shards]
        for shard, output in zip(shards, outputs, strict=True):
            ingest(
                settings,
                root="phantom",
                annotations_root="",
                shard=shard.to_json(),
                output=output,
                context=Context(),
            )
        digests.append(sorted(row_digest(study) for study in iter_studies(path / STUDIES for path in outputs)))
    assert digests[0] == digests[1]
