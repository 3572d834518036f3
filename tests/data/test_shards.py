import gzip
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_trees import SHARED, chest, dicom_bytes, mimic_tree, openi_tree

from valor.data.adapters import mimic_cxr, openi
from valor.data.manifest import Reason, Rejected
from valor.data.shards import Shard, plan_shards, read_shard
from valor.data.source import Source, index_root, split_of
from valor.errors import IntegrityError, UserError
from valor.recipe import DataSettings, PhantomStudies

SETTINGS = DataSettings(shards=4)


def digests(root, *, annotations_root="", settings=SETTINGS) -> dict[int, str]:
    shards, _ = plan_shards(str(root), annotations_root=str(annotations_root), settings=settings)
    return {shard.index: shard.digest for shard in shards}


def changed(before: dict[int, str], after: dict[int, str]) -> int:
    return sum(before.get(index) != after.get(index) for index in before.keys() | after.keys())


@pytest.fixture
def tree(tmp_path):
    return mimic_tree(tmp_path / "root")


def test_an_added_study_changes_one_shard(tree):
    before = digests(tree.root)
    assert digests(tree.root) == before
    tree.add(77, split="train")
    assert changed(before, digests(tree.root)) == 1


def test_an_added_study_without_official_split_changes_one_shard(tree):
    before = digests(tree.root)
    tree.add(78)
    assert changed(before, digests(tree.root)) == 1


def test_a_rewritten_file_changes_one_shard_and_a_foreign_file_none(tree):
    before = digests(tree.root)
    (tree.root / "index.html").write_text("listing")
    assert digests(tree.root) == before
    path = next(tree.root.rglob("*.dcm"))
    os.utime(path, ns=(1, 1))
    assert changed(before, digests(tree.root)) == 1


def test_a_moved_split_changes_one_shard(tree):
    before = digests(tree.root)
    table = tree.root / "mimic-cxr-2.0.0-split.csv"
    table.write_text(table.read_text().replace("train", "test", 1))
    assert changed(before, digests(tree.root)) == 1


def test_the_place_of_the_root_is_no_identity(tree, tmp_path):
    before = digests(tree.root)
    shutil.copytree(tree.root, tmp_path / "elsewhere")
    assert digests(tmp_path / "elsewhere") == before


def test_an_annotation_changes_its_study_s_shard(tree, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    columns = ("study_id", "dicom_id", "finding", "side", "zone", "severity", "shape", "mask")
    rows = [dict.fromkeys(columns, "x") | {"study_id": f"5{number:07d}"} for number in (1, 2)]
    pq.write_table(pa.Table.from_pylist(rows[:1]), notes / "annotations.parquet")
    before = digests(tree.root, annotations_root=notes)
    assert changed(digests(tree.root), before) == 1
    rows[0]["finding"] = "Edema"
    pq.write_table(pa.Table.from_pylist(rows[:1]), notes / "annotations.parquet")
    assert changed(before, digests(tree.root, annotations_root=notes)) == 1


def test_annotations_that_cannot_be_are_refused(tree, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        digests(tree.root, annotations_root=tmp_path / "absent")
    pq.write_table(pa.table({"study_id": ["1"]}), tmp_path / "truth.parquet")
    with pytest.raises(UserError, match="column 'finding' is missing"):
        digests(tree.root, annotations_root=tmp_path)


def test_shards_cover_every_study_once(tree):
    shards, count = plan_shards(str(tree.root), annotations_root="", settings=SETTINGS)
    found = [
        study.study_id
        for shard in shards
        for part in read_shard(shard, root=str(tree.root), annotations_root="", settings=SETTINGS)
        for study in part.studies
    ]
    assert len(found) == len(set(found)) == count == 13


def test_data_that_changed_after_preflight_is_refused(tree):
    shards, _ = plan_shards(str(tree.root), annotations_root="", settings=SETTINGS)
    for number in range(90, 102):
        tree.add(number)
    with pytest.raises(IntegrityError, match="changed during the run"):
        list(read_shard(shards[0], root=str(tree.root), annotations_root="", settings=SETTINGS))


def test_missing_and_foreign_roots_are_user_errors(tree, tmp_path):
    with pytest.raises(UserError, match="no such data root"):
        digests(tmp_path / "absent")
    with pytest.raises(UserError, match="no study in the layout 'openi'"):
        digests(tree.root, settings=DataSettings(layout="openi"))


@pytest.mark.parametrize("text", ["", "[]", '{"index": 0}', '{"index": 2, "count": 2, "digest": ""}'])
def test_a_malformed_shard_is_a_user_error(text):
    with pytest.raises(UserError, match="shard"):
        Shard.from_json(text)


def test_phantom_digest_sees_seed_noise_and_added_studies():
    def of(**fields):
        return digests("phantom", settings=DataSettings(shards=4, phantom=PhantomStudies(**fields)))

    small = {"train": 40, "val": 10, "test": 10}
    before = of(**small)
    assert of(**small) == before
    assert changed(before, of(**(small | {"train": 41}))) == 1
    assert changed(before, of(**small, seed=2)) == 4
    assert changed(before, of(**small, noise={"wrong_side": 0.5})) == 4


def test_official_split_wins_and_a_subject_s_new_study_follows_it(tree):
    tree.add(50, subject=1)
    tree.add(51, subject=51)
    _, studies = index_root(str(tree.root), settings=SETTINGS)
    split = {study.study_id: study.split for study in studies}
    assert split["50000001"] == split["50000050"] == "train"
    assert split["50000008"] == "val"
    assert split["50000051"] == split_of("10000051", settings=SETTINGS)


@pytest.mark.parametrize("name", ["Test", " test", "valid", "val", "holdout"])
def test_an_unknown_official_split_is_refused_and_never_drawn_again(tree, name):
    table = tree.root / "mimic-cxr-2.0.0-split.csv"
    table.write_text(table.read_text().replace(",test", f",{name}", 1))
    with pytest.raises(UserError, match=f"mimic-cxr-2.0.0-split.csv: split is '{name}', expected one of train"):
        digests(tree.root)


def test_a_study_without_a_split_in_the_table_is_drawn_by_hash(tree):
    table = tree.root / "mimic-cxr-2.0.0-split.csv"
    table.write_text(table.read_text().replace(",test", ",", 1))
    _, studies = index_root(str(tree.root), settings=SETTINGS)
    assert next(s for s in studies if s.study_id == "50000010").split == split_of("10000010", settings=SETTINGS)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("dicom_id,study_id,Split\na,50000001,test\n", "column 'split' is missing"),
        ("dicom_id;study_id;split\na;50000001;test\n", "column 'study_id' is missing"),
        ("", "column 'study_id' is missing"),
        ("dicom_id,study_id,split\na,50000001,test\nb,50000002", "split.csv:3: the row is cut short"),
        (f"dicom_id,study_id,split\na,{'5' * 140_000},test\n", "split.csv:2: field larger than field limit"),
        ("study_id,split\n50000001,train\n50000001,test\n", "split.csv: study 50000001 is in train and in test"),
        ("\ufeffstudy_id,split\n50000001,test\n50000001,test\n", None),
    ],
)
def test_a_table_that_cannot_be_read_whole_is_refused(tree, table, words):
    (tree.root / "mimic-cxr-2.0.0-split.csv").write_text(table)
    if words:
        with pytest.raises(UserError, match=words):
            digests(tree.root)
    else:
        _, studies = index_root(str(tree.root), settings=SETTINGS)
        assert next(s for s in studies if s.study_id == "50000001").split == "test"


@pytest.mark.parametrize(
    "data", [b"no gzip", gzip.compress(b"study_id,split\n50000001,test\n" * 99)[:-20]], ids=["other bytes", "cut short"]
)
def test_a_damaged_gzip_table_is_refused_by_its_name(tree, data):
    (tree.root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"split\.csv\.gz: no whole gzip file"):
        digests(tree.root)


def test_a_metadata_table_without_views_is_refused(tree):
    (tree.root / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,View\na,PA\n")
    with pytest.raises(UserError, match=r"metadata\.csv: column 'ViewPosition' is missing"):
        digests(tree.root)


def test_hashed_split_is_stable_and_in_proportion():
    splits = [split_of(str(subject), settings=SETTINGS) for subject in range(4000)]
    assert splits == [split_of(str(subject), settings=SETTINGS) for subject in range(4000)]
    assert [splits.count(name) / 4000 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert splits != [split_of(str(subject), settings=DataSettings(seed=5)) for subject in range(4000)]


def test_mimic_reads_gzipped_tables_and_puts_frontal_views_first(tmp_path):
    tree = mimic_tree(tmp_path, train=0, val=0, test=0)
    images = {
        name: dicom_bytes(chest(seed), ViewPosition=view)
        for seed, (name, view) in enumerate([("a", "LATERAL"), ("b", None), ("c", "AP")])
    }
    tree.add(1, images=images)
    study = mimic_cxr.index(Source(str(tree.root)))[0]
    by_header = mimic_cxr.read(Source(str(tree.root)), study)[1]
    assert [image.dicom_id for image in by_header] == ["c", "b", "a"]
    (tree.root / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(
        gzip.compress(b"dicom_id,study_id,ViewPosition\na,50000001,pa\nb,50000001,LL\nc,50000001,\n")
    )
    source = Source(str(tree.root))
    by_table = mimic_cxr.read(source, mimic_cxr.index(source)[0])[1]
    assert [(image.dicom_id, image.view) for image in by_table] == [("a", "PA"), ("c", "AP"), ("b", "LL")]


def test_mimic_without_report_is_rejected(tmp_path):
    tree = mimic_tree(tmp_path, train=0, val=0, test=0)
    tree.add(1, report=None)
    source = Source(str(tree.root))
    with pytest.raises(Rejected) as caught:
        mimic_cxr.read(source, mimic_cxr.index(source)[0])
    assert caught.value.reason is Reason.MISSING_REPORT


def test_openi_views_follow_order_and_caption(tmp_path):
    (tmp_path / "ecgen-radiology").mkdir()
    images = "".join(f'<parentImage id="CXR7_{n}"><caption>{{caption}}</caption></parentImage>' for n in range(3))
    body = f'<eCitation><uId id="CXR7"/><AbstractText Label="FINDINGS">Clear.</AbstractText>{images}</eCitation>'
    path = tmp_path / "ecgen-radiology" / "7.xml"
    for caption, views in (("PA and lateral", ["FRONTAL", "LATERAL", ""]), ("Portable chest", ["FRONTAL", "", ""])):
        path.write_text(body.format(caption=caption))
        source = Source(str(tmp_path))
        (study,) = openi.index(source)
        _, found = openi.read(source, study)
        assert [image.view for image in found] == views
    path.write_text(body.replace("CXR7", "CXR8", 1))
    with pytest.raises(Rejected) as caught:
        openi.read(source, study)
    assert caught.value.reason is Reason.UNREADABLE_REPORT


@pytest.mark.skipif(not (SHARED / "openi").is_dir(), reason="no shared data")
def test_openi_indexes_the_real_files_with_their_images(tmp_path):
    root = openi_tree(tmp_path / "o", limit=40)
    settings = DataSettings(layout="openi", shards=3)
    _, studies = index_root(str(root), settings=settings)
    assert len(studies) == 40
    assert sum(len(study.images) for study in studies) == len(list((root / "NLMCXR_png").iterdir()))
    before = digests(root, settings=settings)
    next((root / "NLMCXR_png").iterdir()).unlink()
    assert changed(before, digests(root, settings=settings)) == 1
