"""Work in progress: complete checkpoints count, broken ones do not, verdicts last for a pipeline run."""

# ruff: noqa: PT012 - what fails here is a block: a process that did something and then died.

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from valor import storage
from valor.errors import (
    DataError,
    GuardStop,
    IntegrityError,
    Interrupted,
    ResourceError,
    ServiceError,
    UserError,
)
from valor.training.work import MANIFEST, Work, open_work

IDENTITY = {"stage": "sft", "inputs": {"dataset": "d"}, "settings": {}, "code": "c"}


def opened(root: Path, *, pipeline_run: str = "run-1", identity: dict = IDENTITY):
    return open_work(str(root), identity=identity, pipeline_run=pipeline_run)


def write(work: Work, step: int, content: str = "weights") -> Path:
    path = work.scratch / f"checkpoint-{step}"
    (path / "part").mkdir(parents=True)
    (path / "model.safetensors").write_text(content)
    (path / "part" / "optimizer.pt").write_text(f"step {step}")
    return path


class Died(Exception):
    """Stands for the death of the process: nothing of VALOR's runs after it."""


def leave(root: Path, *steps: int, pipeline_run: str = "run-1") -> Path:
    """Commit checkpoints, then die; return the place."""
    with pytest.raises(Died), opened(root, pipeline_run=pipeline_run) as work:
        for step in steps:
            write(work, step)
            work.commit(step)
        raise Died
    return work.scratch


@pytest.mark.parametrize("place", ["/proc/valor/work", "/dev/null/work"])
def test_a_place_that_cannot_be_made_is_the_users_to_change(place):
    with (
        pytest.raises(UserError, match=rf"^{place}/\w+: cannot be written .*; choose another place"),
        opened(Path(place)),
    ):
        pass


def test_a_committed_checkpoint_is_found_again(tmp_path):
    leave(tmp_path, 10, 20)
    with opened(tmp_path) as work:
        latest = work.latest()
        assert latest.name == "checkpoint-20"
        assert (latest / "part" / "optimizer.pt").read_text() == "step 20"


def test_what_succeeded_is_kept_until_it_is_removed(tmp_path):
    with opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
    with opened(tmp_path) as work:
        assert work.latest().name == "checkpoint-10"
    work.remove()
    assert list(tmp_path.iterdir()) == []


def test_work_that_another_process_continues_is_not_removed(tmp_path):
    with opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
    context = multiprocessing.get_context("spawn")
    entered, leave_now = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), entered, leave_now))
    process.start()
    assert entered.wait(30)
    work.remove()
    assert (work.scratch / "checkpoint-10" / MANIFEST).exists()
    leave_now.set()
    process.join(30)
    work.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_uncommitted_checkpoint_does_not_count(tmp_path):
    with pytest.raises(Died), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
        write(work, 20)
        raise Died
    with opened(tmp_path) as work:
        assert work.latest().name == "checkpoint-10"
        assert not (work.scratch / "checkpoint-20").exists()


MANIFESTS = ('{"files"', "[]", "{}", '{"files": {}}', '{"files": []}', "\udcff")


@pytest.mark.parametrize("damage", ["alter", "cut", "remove", *MANIFESTS])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    newest = leave(tmp_path, 10, 20) / "checkpoint-20"
    file = newest / "model.safetensors"
    if damage == "alter":
        file.write_text("wEights")
    elif damage == "cut":
        file.write_text("wei")
    elif damage == "remove":
        file.unlink()
    else:
        (newest / MANIFEST).write_text(damage, errors="surrogateescape")
    with opened(tmp_path) as work:
        assert work.latest().name == "checkpoint-10"


def test_all_damaged_is_a_fresh_start(tmp_path):
    (leave(tmp_path, 10) / "checkpoint-10" / "model.safetensors").unlink()
    with opened(tmp_path) as work:
        assert work.latest() is None


def test_two_checkpoints_are_kept(tmp_path):
    with opened(tmp_path) as work:
        for step in (5, 10, 15, 20):
            write(work, step)
            work.commit(step)
        assert sorted(p.name for p in work.scratch.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]


@pytest.mark.parametrize("part", ["stage", "inputs", "settings", "code"])
def test_other_inputs_settings_or_code_is_other_work(tmp_path, part):
    leave(tmp_path, 10)
    with opened(tmp_path, identity={**IDENTITY, part: "other"}) as work:
        assert work.latest() is None


@pytest.mark.parametrize("verdict", [UserError, DataError, GuardStop, IntegrityError])
def test_a_failure_for_good_ends_a_retry_in_the_same_run_at_once(tmp_path, verdict):
    with pytest.raises(verdict), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
        raise verdict("loss is nan at step 3")
    entered = False
    with pytest.raises(verdict, match=r"loss is nan at step 3.*not tried again"), opened(tmp_path):
        entered = True
    assert not entered


def test_what_a_guard_stopped_is_not_tried_again_by_any_run(tmp_path):
    with pytest.raises(GuardStop, match=r"last good checkpoint is .*/checkpoint-10$"), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
        write(work, 20)
        work.commit(20, good=False)
        raise GuardStop("nan")
    for pipeline_run in ("run-2", ""):
        with pytest.raises(GuardStop, match=rf"^nan.*checkpoint-10 .*delete {work.place} to begin anew"):
            opened(tmp_path, pipeline_run=pipeline_run).__enter__()
    assert [path.name for path in work.scratch.glob("checkpoint-*")] == ["checkpoint-10"]
    with opened(tmp_path, identity={**IDENTITY, "settings": {"learning_rate": 1}}) as other:
        assert other.latest() is None


@pytest.mark.parametrize("text", ['{"pipeline', "{}", "[]", "null", "\udcff", '{"pipeline_run": "", "exit_code": []}'])
def test_a_marker_that_says_no_verdict_counts_as_none(tmp_path, text):
    with pytest.raises(GuardStop), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
        raise GuardStop("nan")
    (work.scratch / "failed" / "failed.json").write_text(text, errors="surrogateescape")
    with opened(tmp_path) as work:
        assert work.latest().name == "checkpoint-10"


def test_a_guard_that_finds_no_good_checkpoint_points_to_the_parent(tmp_path):
    with pytest.raises(GuardStop, match="no good checkpoint but its parent"), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10, good=False)
        write(work, 20)
        raise GuardStop("nan")
    assert list(work.scratch.glob("checkpoint-*")) == []


def test_the_last_good_checkpoint_outlives_the_doubtful_ones_behind_it(tmp_path):
    with opened(tmp_path) as work:
        for step, good in ((5, True), (10, True), (15, False), (20, False), (25, False)):
            write(work, step)
            work.commit(step, good=good)
        assert sorted(p.name for p in work.scratch.glob("checkpoint-*")) == [
            "checkpoint-10", "checkpoint-20", "checkpoint-25",
        ]  # fmt: skip
        assert work.latest().name == "checkpoint-25", "a killed stage continues from the newest all the same"
        for step in (30, 35):
            write(work, step)
            work.commit(step)
        assert sorted(p.name for p in work.scratch.glob("checkpoint-*")) == ["checkpoint-30", "checkpoint-35"]


def test_a_file_that_is_mended_costs_no_checkpoint(tmp_path):
    with pytest.raises(IntegrityError), opened(tmp_path, pipeline_run="run-1") as work:
        write(work, 10)
        work.commit(10)
        raise IntegrityError("config.json: cut")
    with opened(tmp_path, pipeline_run="run-2") as work:
        assert work.latest().name == "checkpoint-10"


def test_a_process_that_lost_its_lease_commits_nothing(tmp_path):
    with opened(tmp_path) as work:
        write(work, 10)
        lease = work.scratch / "lease" / "lease.json"
        lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "renewed": time.time()}))
        with pytest.raises(ServiceError, match="another process took over"):
            work.commit(10)
        assert work.latest() is None
    assert "elsewhere" in lease.read_text(), "the lease of the other stays"


def test_a_lease_that_is_let_go_before_it_is_read_is_none(tmp_path, monkeypatch):
    place = leave(tmp_path, 10)
    held = place / "lease" / "lease.json"
    held.parent.mkdir(exist_ok=True)
    held.write_text(json.dumps({"host": "elsewhere", "renewed": time.time()}))
    read = storage.read_bytes

    def late(uri: str) -> bytes:
        monkeypatch.setattr(storage, "read_bytes", read)
        held.unlink()
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", late)
    with opened(tmp_path):
        assert json.loads(held.read_text())["host"] != "elsewhere"


def test_outside_a_pipeline_every_try_counts(tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"^cut$"), opened(tmp_path, pipeline_run=""):
            raise DataError("cut")


@pytest.mark.parametrize("failure", [ServiceError, ResourceError, Interrupted, KeyboardInterrupt])
def test_what_a_retry_may_mend_leaves_no_marker_and_keeps_checkpoints(tmp_path, failure):
    with pytest.raises(failure), opened(tmp_path) as work:
        write(work, 10)
        work.commit(10)
        raise failure("later")
    with opened(tmp_path) as work:
        assert work.latest().name == "checkpoint-10"


def _hold(root: str, entered, leave_now) -> None:
    with opened(Path(root)):
        entered.set()
        leave_now.wait(30)


def test_a_second_process_is_turned_away_and_the_first_is_not_harmed(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, leave_now = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), entered, leave_now))
    process.start()
    assert entered.wait(30)
    with pytest.raises(UserError, match="is training this very stage"), opened(tmp_path):
        pass
    leave_now.set()
    process.join(30)
    assert process.exitcode == 0
    with opened(tmp_path):
        pass


def test_a_killed_process_is_followed_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, never = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), entered, never))
    process.start()
    assert entered.wait(30)
    process.kill()
    process.join(30)
    with opened(tmp_path) as work:
        holder = json.loads((work.scratch / "lease" / "lease.json").read_text())
        assert holder["pid"] != process.pid
