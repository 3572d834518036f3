import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_trees import SHARED, chest, dicom_bytes, mimic_tree, openi_tree

from valor.context import Context
from valor.data.adapters import mimic_cxr
from valor.data.manifest import SPLITS, iter_studies, read_studies, shard_paths
from valor.data.shards import plan_shards
from valor.errors import DataError, IntegrityError
from valor.recipe import DataSettings
from valor.stages.ingest import ingest
from valor.stages.validate_data import validate_data

LENIENT = {"min_studies": 2}


def shards_of(root, folder, *, annotations_root="", **settings):
    data = DataSettings(**settings)
    outputs = []
    for shard in plan_shards(str(root), annotations_root=annotations_root, settings=data)[0]:
        outputs.append(folder / f"shard-{shard.index}")
        ingest(
            data,
            root=str(root),
            annotations_root=annotations_root,
            shard=shard.to_json(),
            output=outputs[-1],
            context=Context(),
        )
    return outputs


def validated(shards, folder, **settings):
    places = {name: folder / name for name in ("dataset", "evidence", "data_docs")}
    settings = {"checks": LENIENT} | settings
    return validate_data(DataSettings(**settings), shards=shards, context=Context(), **places)


@pytest.fixture
def tree(tmp_path):
    return mimic_tree(tmp_path / "root")


@pytest.mark.parametrize(("name", "lawful"), [("holdout", False), ("val", True)])
def test_a_split_that_an_adapter_makes_up_stops_the_run(tree, tmp_path, monkeypatch, name, lawful):
    monkeypatch.setitem(mimic_cxr._SPLITS, "validate", name)
    shards = shards_of(tree.root, tmp_path, shards=1)
    if lawful:
        assert validated(shards, tmp_path).digests["dataset"]
    else:
        with pytest.raises(DataError, match="known_split: 3 of 13 rows"):
            validated(shards, tmp_path, checks={"min_studies": 0})


def test_the_dataset_is_whole_and_its_digest_does_not_depend_on_sharding(tree, tmp_path):
    digests = set()
    for count in (1, 3):
        folder = tmp_path / str(count)
        shards = shards_of(tree.root, folder, shards=count)
        result = validated(shards[::-1], folder)
        digests.add(result.digests["dataset"])
        info = json.loads((folder / "dataset" / "dataset.json").read_text())
        assert info["digest"] == result.digests["dataset"]
        assert info["studies"] == {"train": 6, "val": 3, "test": 4}
        assert {split: len(read_studies(folder / "dataset", split=split)) for split in SPLITS} == info["studies"]
        assert len(shard_paths(folder / "dataset")) == len(shards)
    assert len(digests) == 1


def test_the_digest_sees_new_content(tree, tmp_path):
    before = validated(shards_of(tree.root, tmp_path / "a"), tmp_path / "a").digests
    report = next(tree.root.rglob("*.txt"))
    report.write_text(report.read_text().replace("normal", "large"))
    after = validated(shards_of(tree.root, tmp_path / "b"), tmp_path / "b").digests
    assert before != after


def test_splits_are_disjoint_by_subject(tree, tmp_path):
    tree.add(60, subject=1, split="train")
    tree.add(61, subject=2)
    validated(shards_of(tree.root, tmp_path / "a"), tmp_path / "a")
    subjects = [
        {study.subject_id for study in read_studies(tmp_path / "a" / "dataset", split=split)} for split in SPLITS
    ]
    assert not subjects[0] & subjects[1] | subjects[0] & subjects[2] | subjects[1] & subjects[2]


def test_annotations_go_to_the_evidence_and_never_to_the_dataset(tree, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    columns = ("study_id", "dicom_id", "finding", "side", "zone", "severity", "shape", "mask")
    rows = [dict.fromkeys(columns, "box") | {"study_id": f"5{number:07d}"} for number in (12, 1, 777)]
    pq.write_table(pa.Table.from_pylist(rows), notes / "annotations.parquet")
    shards = shards_of(tree.root, tmp_path / "a", annotations_root=str(notes))
    validated(shards, tmp_path / "a")
    kept = pq.read_table(tmp_path / "a" / "evidence" / "annotations.parquet")["study_id"].to_pylist()
    assert kept == ["50000001", "50000012"]
    assert pq.read_table(tmp_path / "a" / "evidence" / "truth.parquet").num_rows == 0
    assert not any(
        "annotations" in path.name or "truth" in path.name for path in (tmp_path / "a" / "dataset").iterdir()
    )


FAILURES = {
    "enough_val_studies": {"checks": {"min_studies": 4}},
    "image_contrast": {"checks": LENIENT | {"min_image_std": 250.0}},
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_gate_names_the_check_and_leaves_the_evidence(name, tree, tmp_path):
    shards = shards_of(tree.root, tmp_path)
    with pytest.raises(DataError, match=rf"^data gate: {name}: [^\n]*; [^\n]*index.html$"):
        validated(shards, tmp_path, **FAILURES[name])
    docs = tmp_path / "data_docs"
    assert "failed" in (docs / "index.html").read_text()
    assert pq.read_table(docs / "studies_facts.parquet").num_rows == 13
    assert list((docs / "great_expectations" / "validations").rglob("*.html"))
    assert not (tmp_path / "dataset").exists()


def tampered(tree, tmp_path, change):
    """Ingest one shard and change its rows, as a fault in a source or a foreign shard would."""
    (shard,) = shards_of(tree.root, tmp_path, shards=1)
    table = pq.read_table(shard / "studies.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard / "studies.parquet")
    return [shard]


def test_faulty_rows_fail_with_their_count(tree, tmp_path):
    shards = tampered(tree, tmp_path, lambda rows: rows[0].update(study_id=rows[1]["study_id"]))
    with pytest.raises(DataError, match="unique_studies: 2 of 13 rows of studies have a study_id that is not unique"):
        validated(shards, tmp_path)


def test_the_untampered_shard_passes(tree, tmp_path):
    assert validated(tampered(tree, tmp_path, lambda rows: None), tmp_path).metrics["studies"] == 13


def test_all_rejected_is_a_data_error_with_the_commonest_reason(tmp_path):
    tree = mimic_tree(tmp_path / "root", train=0, val=0, test=0)
    for number in range(5):
        tree.add(number, images={"x": dicom_bytes(chest(number), Modality="CT")})
    tree.add(9, report="")
    with pytest.raises(DataError, match=r"all studies were rejected, most often for not_radiograph \(5 inputs\)"):
        validated(shards_of(tree.root, tmp_path), tmp_path)
    assert "not_radiograph" in (tmp_path / "data_docs" / "index.html").read_text()


def test_a_shard_of_another_image_size_is_refused(tree, tmp_path):
    shards = shards_of(tree.root, tmp_path, image_px=64)
    with pytest.raises(IntegrityError, match="image_px is 64, expected 192; ingest this shard again"):
        validated(shards, tmp_path)


def test_no_report_text_in_data_docs(tmp_path):
    tree = mimic_tree(tmp_path / "root")
    tree.add(40, report=" FINDINGS: zebrafish in lung.\n", split="train")
    shards = shards_of(tree.root, tmp_path)
    assert any("zebrafish" in (study.findings or "") for study in iter_studies(s / "studies.parquet" for s in shards))
    result = validated(shards, tmp_path)
    for path in (tmp_path / "data_docs").rglob("*"):
        assert not path.is_file() or b"zebrafish" not in path.read_bytes()
    assert "zebrafish" not in f"{result}"


@pytest.mark.skipif(not (SHARED / "openi").is_dir(), reason="no shared data")
def test_the_300_real_openi_reports_pass_the_gate(tmp_path):
    root = openi_tree(tmp_path / "root")
    settings = {"layout": "openi", "max_views": 2, "image_px": 64}
    shards = shards_of(root, tmp_path, **settings)
    result = validated(shards, tmp_path, **settings, checks={})
    assert result.metrics["studies"] == 297
    assert result.notes["quarantine"] == {"missing_image": 3}
    studies = [study for split in SPLITS for study in read_studies(tmp_path / "dataset", split=split)]
    assert sum(len(study.images) == 2 for study in studies) == 265
    words = set(re.findall(r"[a-z]{9,}", " ".join(study.text for study in studies).lower())) - {"radiology"}
    docs = b" ".join(p.read_bytes() for p in (tmp_path / "data_docs").rglob("*.html")).decode().lower()
    assert not {"cardiomediastinal", "pneumothorax", "effusion"} & set(re.findall(r"[a-z]+", docs))
    assert len(words) > 200
