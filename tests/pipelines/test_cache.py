import json

import pytest
from kfp import dsl

from pipelines.local.cache import DigestCache
from valor.artifacts import stamp


def dataset(tmp_path, name, content="x"):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "rows").write_text(content)
    digest = stamp(folder, kind="dataset", stage="validate_data")["digest"]
    return dsl.Dataset(name="dataset", uri=str(folder), metadata={"digest": digest})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("VALOR_TRACKING", "off")
    return DigestCache(str(tmp_path / "cache"))


def key(cache, image="valor-python:abc", **arguments):
    return cache.compute_key("comp-sft", image, ["python3"], {"task": "sft", **arguments})


def test_equal_content_at_another_path_is_the_same_work(cache, tmp_path):
    here, there = dataset(tmp_path, "run1/dataset"), dataset(tmp_path, "run2/dataset")
    assert key(cache, dataset=here) == key(cache, dataset=there)
    assert key(cache, shards=[here]) == key(cache, shards=[there])


def test_other_content_order_settings_or_code_is_other_work(cache, tmp_path):
    a, b = dataset(tmp_path, "a", "a"), dataset(tmp_path, "b", "b")
    assert key(cache, dataset=a) != key(cache, dataset=b)
    assert key(cache, shards=[a, b]) != key(cache, shards=[b, a])
    assert key(cache, settings="{}") != key(cache, settings='{"seed":1}')
    assert key(cache, dataset=a) != key(cache, dataset=a, image="valor-python:def")


def test_the_image_that_a_task_is_told_splits_no_work_that_its_image_does_not(cache):
    def told(image):
        return cache.compute_key("comp-sft", image, ["python3"], {"task": "sft"}, {"VALOR_IMAGE": image})

    assert told("valor-python:abc") == told("valor-python:abc")
    assert told("valor-python:abc") != told("valor-python:def")


def test_places_and_runs_do_not_count_but_the_champion_does(cache):
    first = key(cache, run="1", root="/a", checkpoint_uri="/models/a", checkpoint_digest="d")
    assert first == key(cache, run="2", root="/b", checkpoint_uri="/models/b", checkpoint_digest="d")
    assert first != key(cache, run="1", root="/a", checkpoint_uri="/models/a", checkpoint_digest="e")


def test_what_mlflow_does_not_know_is_made_again(cache, tmp_path, monkeypatch):
    name = key(cache)
    cache.put(name, {"output": dataset(tmp_path, "again")})
    assert cache.get(name) is not None, "without tracking there is nothing to know"
    monkeypatch.setenv("VALOR_TRACKING", "on")
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    assert cache.get(name) is None, "it was made without tracking"


def test_a_hit_is_reported_with_its_outputs(cache, tmp_path):
    made = dataset(tmp_path, "made")
    name = cache.compute_key("comp-ingest", "i", [], {"task": "ingest", "shard": '{"index": 2}'})
    cache.put(name, {"output": made, "Output": "pass"})
    assert cache.get(name)["output"].metadata == made.metadata
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["task"], event["event"], event["values"]) == ("ingest-2", "reuse", {"Output": "pass"})
    assert event["paths"] == {"output": made.path}


@pytest.mark.parametrize("what", ["gone", "cut", "grown", "added", "untouched"])
def test_a_file_that_is_gone_or_of_another_size_is_a_miss(cache, tmp_path, what):
    made = dataset(tmp_path, "made", "some rows")
    name = key(cache)
    cache.put(name, {"output": made})
    rows = tmp_path / "made" / "rows"
    if what == "gone":
        rows.unlink()
    elif what == "added":
        (tmp_path / "made" / "note").write_text("a file that the stamp does not list is no part of the artifact")
    elif what != "untouched":
        rows.write_text({"cut": "some", "grown": "some rows more"}[what])
    assert (cache.get(name) is None) == (what in ("gone", "cut", "grown"))


def test_a_directory_that_vanished_or_changed_hands_is_a_miss(cache, tmp_path):
    made = dataset(tmp_path, "made")
    name = key(cache)
    cache.put(name, {"output": made})
    (tmp_path / "made" / "rows").write_text("other")
    stamp(tmp_path / "made", kind="dataset", stage="validate_data")
    assert cache.get(name) is None
    (tmp_path / "made" / "artifact.json").unlink()
    assert cache.get(name) is None
    assert not (tmp_path / "events.jsonl").exists()
