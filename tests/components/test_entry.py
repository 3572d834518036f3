import errno
import json
import math

import pytest
from kfp import dsl

from components import entry
from components.entry import run_stage, task_label
from valor import progress, stages
from valor.__main__ import main as by_hand
from valor.artifacts import read_stamp
from valor.errors import DataError
from valor.recipe import load


@pytest.fixture
def metrics(tmp_path):
    return dsl.Metrics(name="metrics", uri=str(tmp_path / "metrics"))


@pytest.fixture(autouse=True)
def no_tracking(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))


def ingest(tmp_path, metrics, settings):
    shards = run_stage(
        "preflight",
        task="preflight",
        run="7",
        settings=settings,
        metrics=metrics,
        values={
            "root": "phantom",
            "annotations_root": "",
            "public": "false",
            "publish_text": "false",
            "model_name": "m",
            "models": load("phantom").section_json("models"),
            "gate": load("phantom").section_json("gate"),
            "vision": load("phantom").section_json("grpo_vision"),
        },
    )["shards"]
    output = dsl.Dataset(name="output", uri=str(tmp_path / "shard"))
    run_stage(
        "ingest",
        task="ingest-0",
        run="7",
        settings=settings,
        metrics=metrics,
        outputs={"output": output},
        values={"root": "phantom", "annotations_root": "", "shard": json.dumps(json.loads(shards)[0])},
    )
    return output


def test_a_stage_fills_metadata_and_metrics(tmp_path, metrics):
    settings = json.dumps({"phantom": {"train": 2, "val": 1, "test": 1, "image_px": 64}, "shards": 1, "image_px": 32})
    output = ingest(tmp_path, metrics, settings)
    stamp = read_stamp(tmp_path / "shard")
    assert output.metadata["digest"] == stamp["digest"]
    assert stamp["pipeline_run"] == "7"
    assert json.loads((tmp_path / "metrics").read_text())["kept"] == 4
    assert metrics.metadata["kept"] == 4


def test_an_error_becomes_its_exit_code_and_one_line(metrics, capfd):
    with pytest.raises(SystemExit) as ended:
        run_stage("ingest", task="t", run="7", settings='{"image_px": 1}', metrics=metrics)
    assert ended.value.code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("valor: error: ")
    assert "image_px" in last


def test_a_wrong_place_is_told_to_the_runner_too(tmp_path, metrics, monkeypatch, capfd):
    """It takes a task's exit code from its event."""
    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("VALOR_WORK_ROOT", "gs://")
    with pytest.raises(SystemExit) as ended:
        run_stage("ingest", task="ingest-0", run="7", settings="{}", metrics=metrics)
    assert ended.value.code == 2
    assert capfd.readouterr().err.strip().startswith("valor: error: VALOR_WORK_ROOT is 'gs://'")
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["task"], event["event"], event["exit_code"]) == ("ingest-0", "fail", 2)


def test_after_a_failure_the_other_tasks_of_a_local_run_end_at_once(tmp_path, metrics, monkeypatch):
    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path))

    def refuse(*_args, **_kwargs):
        raise DataError("no")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "run", refuse)
        with pytest.raises(SystemExit) as first:
            run_stage("ingest", task="ingest-0", run="7", settings="{}", metrics=metrics)
    with pytest.raises(SystemExit) as second:
        run_stage("ingest", task="ingest-1", run="7", settings="{}", metrics=metrics)
    assert (first.value.code, second.value.code) == (3, 1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["task"], e["event"]) for e in events] == [("ingest-1", "skip")]


def test_the_exit_code_survives_a_run_directory_that_cannot_be_written(tmp_path, metrics, monkeypatch, capfd):
    def refuse(*_args, **_kwargs):
        progress.emit("fail", exit_code=3, error="no")
        raise DataError("the data gate refused")

    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr(stages, "run", refuse)
    with pytest.raises(SystemExit) as ended:
        run_stage("ingest", task="ingest-0", run="7", settings="{}", metrics=metrics)
    assert ended.value.code == 3
    assert capfd.readouterr().err == "valor: error: the data gate refused\n"


def test_metrics_that_find_the_disk_full_are_a_resource_error(metrics, monkeypatch, capfd):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/metrics")

    monkeypatch.setattr(stages, "run", lambda *_args, **_kwargs: stages.StageResult())
    monkeypatch.setattr(entry, "write_json", full)
    with pytest.raises(SystemExit) as ended:
        run_stage("gate", task="gate", run="", settings="{}", metrics=metrics)
    assert ended.value.code == 6
    assert "/tmp/metrics: no space left" in capfd.readouterr().err


SECRET = "Mrs Doe has a large left effusion"


def quote_a_report(*_args, **_kwargs):
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise RuntimeError(f"cannot read {SECRET!r}") from error


@pytest.mark.parametrize("way", ["component", "by hand"])
def test_an_unexpected_error_shows_frames_and_types_but_no_text(metrics, monkeypatch, capfd, way):
    monkeypatch.delenv("VALOR_VERBOSE_ERRORS", raising=False)
    monkeypatch.setattr("valor.stages.gate.gate", quote_a_report)
    assert fail_the_gate(way, metrics) == 1
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed
    assert "builtins.KeyError" in printed
    assert printed.index("builtins.KeyError") < printed.index("builtins.RuntimeError")
    assert "in quote_a_report" in printed
    assert "VALOR_VERBOSE_ERRORS=1" in printed


@pytest.mark.parametrize("way", ["component", "by hand"])
def test_messages_are_shown_where_text_may_be(metrics, monkeypatch, capfd, way):
    monkeypatch.setenv("VALOR_VERBOSE_ERRORS", "1")
    monkeypatch.setattr("valor.stages.gate.gate", quote_a_report)
    assert fail_the_gate(way, metrics) == 1
    assert f"RuntimeError: cannot read {SECRET!r}" in capfd.readouterr().err


def test_an_error_of_valors_own_keeps_its_message_but_not_what_led_to_it(metrics, monkeypatch, capfd):
    def refuse(*_args, **_kwargs):
        try:
            quote_a_report()
        except RuntimeError as error:
            raise DataError("study 17: no findings") from error

    monkeypatch.setattr("valor.stages.gate.gate", refuse)
    assert fail_the_gate("component", metrics) == 3
    printed = capfd.readouterr().err
    assert "DataError: study 17: no findings" in printed
    assert "builtins.RuntimeError" in printed
    assert SECRET not in printed


def fail_the_gate(way, metrics):
    if way == "by hand":
        return by_hand(["gate"])
    with pytest.raises(SystemExit) as ended:
        run_stage("gate", task="gate", run="", settings="{}", metrics=metrics)
    return ended.value.code


def test_numbers_that_are_no_numbers_stay_out_of_kfp_but_in_the_file(tmp_path, metrics, monkeypatch):
    result = stages.StageResult(metrics={"good": 1.0, "none": math.nan, "much": math.inf})
    monkeypatch.setattr(stages, "run", lambda *_args, **_kwargs: result)
    run_stage("gate", task="gate", run="", settings="{}", metrics=metrics)
    assert metrics.metadata == {"good": 1.0}
    assert json.loads((tmp_path / "metrics").read_text()) == {"good": 1.0, "none": None, "much": None}


def test_members_of_a_fan_out_are_numbered():
    assert task_label("ingest", '{"index": 3, "count": 8}') == "ingest-3"
    assert task_label("sft") == "sft"
