"""The last words of a local run: exit code, error line, summary."""

import json
import shutil
import sys

import pytest

from pipelines.dag import task_names
from pipelines.local.closing import close
from pipelines.local.runner import Ending
from pipelines.local.state import RunState
from valor.recipe import load


def event(task, kind, **fields):
    return {"task": task, "event": kind, "time": 1.0, **fields}


def whole_run(tmp_path, verdict):
    """Return the state after every task ran; `verdict` is the gate's."""
    state = RunState(task_names(2))
    for name in task_names(2)[:2] + task_names(2)[3:]:  # the second shard was empty
        state.apply(event(name, "start"))
        values = {"gate": {"verdict": verdict}, "register": {"version": "3"}}.get(name, {})
        if name == "register" and verdict == "refuse":
            state.tasks[name].state = "waiting"
            continue
        state.apply(event(name, "end", metrics={}, values=values))
    state.apply(event("fetch_models-base", "progress", step=1, total=2, unit="steps"))  # a helper's own name
    state.tasks["sft"].state = state.tasks["ingest-0"].state = "reused"
    evaluation, judged = tmp_path / "evaluation", tmp_path / "verdict"
    for folder in (evaluation, judged):
        folder.mkdir()
    table = {
        "columns": [], "labels": {}, "contrast": "", "contrast_label": "", "confidence": 0.95,
        "studies": 2, "subjects": 2, "truth": True, "rows": [],
    }  # fmt: skip
    (evaluation / "table.json").write_text(json.dumps(table))
    (judged / "verdict.md").write_text("omission rose by 0.2, the margin is 0.05\n")
    rules = [{"applicable": True}, {"applicable": True}, {"applicable": False}]
    (judged / "verdict.json").write_text(json.dumps({"rules": rules}))
    state.tasks["validate_data"].paths = {"data_docs": str(tmp_path / "docs")}
    state.tasks["evaluate"].paths = {"evaluation": str(evaluation)}
    state.tasks["gate"].paths = {"verdict": str(judged)}
    return state


def ended(tmp_path, state, *, status=0, signal=0):
    ending = Ending(state=state, status=status, peak_bytes=1 << 30, seconds=61.0, signal=signal)
    code = close(load("phantom"), ending, home=tmp_path, run_dir=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["exit_code"] == code
    return code


def test_a_whole_run_names_page_version_and_reuse(tmp_path, capsys):
    assert ended(tmp_path, whole_run(tmp_path, "pass")) == 0
    text = capsys.readouterr().out
    assert "evaluation.html" in text
    assert "valor-phantom/3" in text
    assert "reused:   ingest, sft" in text
    assert "make ui" in text
    assert "gate      passed: 2 rules hold, 1 not applicable without a champion" in text
    assert str(tmp_path / "docs" / "index.html") in text


@pytest.mark.parametrize("active", [True, False])
def test_the_command_is_named_as_it_has_to_be_typed(tmp_path, capsys, monkeypatch, active):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if active else None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    ended(tmp_path, whole_run(tmp_path, "pass"))
    command = "valor" if active else ".venv/bin/valor"
    assert f"({command} lineage valor-phantom/3)" in capsys.readouterr().out


def test_a_refusal_is_exit_code_4_with_its_reasons(tmp_path, capsys):
    assert ended(tmp_path, whole_run(tmp_path, "refuse")) == 4
    printed = capsys.readouterr()
    assert "the margin is 0.05" in printed.out
    assert "evaluation.html" in printed.out
    assert "no new version" in printed.out


@pytest.mark.parametrize(("code", "tail"), [(3, False), (1, True)])
def test_only_an_unexpected_failure_shows_its_log(tmp_path, capsys, code, tail):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "sft.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
    state = RunState(task_names(1))
    state.apply(event("sft", "start"))
    state.apply(event("sft", "fail", exit_code=code, error="sft: it broke"))
    assert ended(tmp_path, state, status=1) == code
    error = capsys.readouterr().err
    assert error.startswith("valor: error: sft: it broke\n")
    assert ("Traceback" in error) is tail
    assert ("sft.log" in error) is tail


def test_a_signal_and_a_silent_death_have_codes_of_their_own(tmp_path, capsys):
    state = RunState(task_names(1))
    state.apply(event("sft", "start"))
    assert ended(tmp_path, state, status=1, signal=15) == 143
    assert ended(tmp_path, state, status=1) == 6
    assert "sft" in capsys.readouterr().err


def test_a_run_that_never_started_its_tasks_is_no_success(tmp_path):
    assert ended(tmp_path, RunState(task_names(1))) == 1


def test_a_failed_exit_handler_is_no_success(tmp_path, capsys):
    assert ended(tmp_path, whole_run(tmp_path, "pass"), status=1) == 1
    assert "exit handler" in capsys.readouterr().err


def test_without_an_event_the_childs_exit_status_is_the_verdict(tmp_path, capsys):
    state = RunState(task_names(1))
    state.apply(event("sft", "start"))
    assert ended(tmp_path, state, status=7) == 7
    assert "exit code 7" in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_hides_no_failure(tmp_path, capsys):
    (tmp_path / "summary.json").mkdir()
    state = RunState(task_names(1))
    state.apply(event("sft", "fail", exit_code=3, error="sft: too few studies"))
    failed = Ending(state=state, status=1, peak_bytes=0, seconds=1.0)
    assert close(load("phantom"), failed, home=tmp_path, run_dir=tmp_path) == 3
    assert capsys.readouterr().err == "valor: error: sft: too few studies\n"
    whole = Ending(state=whole_run(tmp_path, "pass"), status=0, peak_bytes=0, seconds=1.0)
    with pytest.raises(OSError, match="summary"):
        close(load("phantom"), whole, home=tmp_path, run_dir=tmp_path)


def test_a_killed_pipeline_process_is_a_resource_error(tmp_path, capsys):
    assert ended(tmp_path, RunState(task_names(2)), status=-9) == 6
    error = capsys.readouterr().err
    assert "killed by signal 9" in error
    assert error.count("\n") == 1
