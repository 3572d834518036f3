import json

from pipelines.dag import task_names
from pipelines.local.state import EventTail, RunState
from pipelines.local.view import JsonView


def event(task, kind, time=1.0, **fields):
    return {"task": task, "event": kind, "time": time, **fields}


def test_a_task_goes_from_waiting_to_done():
    state = RunState(["sft"])
    assert state.apply(event("sft", "start", 10.0))
    assert not state.apply(event("sft", "progress", 11.0, step=1, total=4, unit="steps", loss=2.5))
    assert state.tasks["sft"].metrics == {"loss": 2.5}
    assert state.dead() is state.tasks["sft"]
    assert state.apply(event("sft", "end", 14.0, metrics={"loss": 1.0}, values={"v": "1"}))
    assert state.tasks["sft"].seconds(now=99.0) == 4.0
    assert state.dead() is None
    assert state.failed() is None


def test_the_first_failure_is_the_one_to_tell():
    state = RunState(["a", "b", "c"])
    state.apply(event("b", "start", 1.0))
    state.apply(event("b", "fail", 5.0, exit_code=3, error="late"))
    state.apply(event("a", "fail", 4.0, exit_code=2, error="early"))
    state.apply(event("c", "reuse", paths={}, values={}))
    assert state.failed().error == "early"
    assert state.reused() == ["c"]


def test_a_helper_of_no_task_is_not_shown():
    state = RunState(["sft"])
    assert not state.apply(event("", "progress", step=1, total=2, unit="steps"))
    assert list(state.tasks) == ["sft"]


def test_only_whole_lines_are_read(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    path.write_text(json.dumps(event("a", "start")) + "\n" + '{"task": "b"')
    assert [e["task"] for e in tail.read()] == ["a"]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(', "event": "start", "time": 1}\n')
    assert [e["task"] for e in tail.read()] == ["b"]


def test_a_line_that_a_full_disk_cut_is_skipped_and_the_next_ones_are_read(tmp_path):
    path = tmp_path / "events.jsonl"
    half = json.dumps(event("a", "start"))[:20]
    path.write_text("\n".join([half, half + json.dumps(event("b", "start")), "7", json.dumps(event("c", "start")), ""]))
    assert [e["task"] for e in EventTail(path).read()] == ["c"]


def test_away_from_a_terminal_only_changes_are_printed(capsys):
    state, view = RunState(task_names(1)), JsonView()
    state.apply(event("preflight", "start"))
    view.update(state, changed=[state.tasks["preflight"]], memory_bytes=3 << 20)
    view.update(state, changed=[], memory_bytes=3 << 20)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["task"] == "preflight"
    assert json.loads(line)["memory_mib"] == 3


def test_names_follow_the_dag():
    names = task_names(2)
    assert names[:3] == ["preflight", "ingest-0", "ingest-1"]
    assert names.index("gate") < names.index("register")
