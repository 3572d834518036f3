"""The lease: one live holder, dead ones taken over."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from valor.errors import ServiceError, UserError
from valor.training import lease
from valor.training.lease import Lease, alive, this_process


class Box:
    """A place for the lease's text."""

    def __init__(self, holder: dict | None = None):
        self.text = json.dumps(holder) if holder else ""

    def lease(self) -> Lease:
        return Lease(read=lambda: self.text, write=self.write, delete=lambda: self.write(""), name="work/abc")

    def lease_at(self, clock: "Clock") -> Lease:
        return Lease(
            read=lambda: self.text, write=self.write, delete=lambda: self.write(""), name="work/abc",
            clock=clock, sleep=clock.sleep,
        )  # fmt: skip

    def write(self, text: str) -> None:
        self.text = text


class Clock:
    """A clock that only sleeping moves; `tick` runs after each sleep."""

    def __init__(self, now: float, tick=lambda _now: None):
        self.now, self.tick = now, tick

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.tick(self.now)


def on_another_host(renewed: float) -> dict:
    return {**this_process(), "host": "some-other-pod", "pid": 7, "renewed": renewed}


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def holder_of(process) -> dict:
    return {**this_process(), "pid": process.pid, "start": lease._start(process.pid), "renewed": time.time()}


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_step_of_the_clock_does_not_make_a_live_holder_look_dead(other_process, monkeypatch, step_s):
    """psutil adds the time of boot, which the kernel moves with the clock."""
    holder = holder_of(other_process)
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + step_s)
    assert alive(holder, now=time.time() + step_s)
    other_process.kill()
    other_process.wait()
    assert not alive(holder, now=time.time() + step_s)


def test_a_process_whose_name_holds_brackets_and_spaces_has_its_start(tmp_path):
    program = tmp_path / "a ) b (c) 1"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        assert 0 <= lease._start(process.pid) - lease._start(os.getpid()) < 100 * 3600 * 24
    finally:
        process.kill()
        process.wait()
    assert lease._start(process.pid) is None
    assert lease._start("abc") is None


def test_held_while_the_block_runs_and_gone_after():
    box = Box()
    with box.lease().held():
        assert json.loads(box.text)["pid"] == this_process()["pid"]
    assert box.text == ""


def test_a_live_holder_is_respected_and_named(other_process):
    box = Box(holder_of(other_process))
    expected = rf"work/abc: process {other_process.pid} on .* is training this very stage"
    with pytest.raises(UserError, match=expected), box.lease().held():
        pass
    assert json.loads(box.text)["pid"] == other_process.pid


def test_a_dead_holder_is_taken_over_at_once(other_process):
    box = Box(holder_of(other_process))
    other_process.kill()
    other_process.wait()
    with box.lease().held():
        assert json.loads(box.text)["pid"] == this_process()["pid"]


def test_a_killed_holder_that_nobody_reaped_is_dead(other_process):
    holder = holder_of(other_process)
    other_process.kill()
    end = time.monotonic() + 10
    while psutil.Process(other_process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(holder, now=time.time())


def test_a_reused_process_id_is_another_process(other_process):
    holder = holder_of(other_process)
    assert alive(holder, now=time.time())
    assert not alive({**holder, "start": holder["start"] - 100}, now=time.time())


@pytest.mark.parametrize("elsewhere", [{"host": "some-other-pod"}, {"boot": "another"}, {"pid_namespace": 1}])
def test_another_host_is_believed_until_its_lease_runs_out(elsewhere):
    holder = {**this_process(), "start": 0.0, **elsewhere, "renewed": 1000.0}
    assert alive(holder, now=1000 + lease.EXPIRES_S - 1)
    assert not alive(holder, now=1000 + lease.EXPIRES_S + 1)


@pytest.mark.parametrize(("renewed", "waits"), [(1000.0, 90), (950.0, 40), (900.0, 0), (5000.0, 90)])
def test_a_dead_host_is_waited_for_until_its_lease_runs_out(caplog, renewed, waits):
    caplog.set_level("INFO")
    box, clock = Box(on_another_host(renewed)), Clock(1000.0)
    with box.lease_at(clock).held():
        assert json.loads(box.text)["pid"] == this_process()["pid"]
    assert clock.now - 1000 == pytest.approx(waits), "5000 is a clock that runs ahead"
    assert ("process 7 on some-other-pod" in caplog.text) is (waits > 0)
    assert (f"runs out in {waits} s" in caplog.text) is (waits > 0)


def test_a_container_that_shares_host_and_kernel_but_no_process_ids_is_waited_for():
    held = {**this_process(), "pid_namespace": 1, "pid": 7, "start": 0.0}
    box, clock = Box({**held, "renewed": 1000.0}), Clock(1000.0)
    clock.tick = lambda now: box.write(json.dumps({**held, "renewed": now}))
    with pytest.raises(ServiceError, match="process 7 on "), box.lease_at(clock).held():
        pass
    box.write(json.dumps({**held, "renewed": clock.now}))
    clock.tick, stopped = (lambda _now: None), clock.now
    with box.lease_at(clock).held():
        assert clock.now - stopped == pytest.approx(lease.EXPIRES_S)


def test_a_host_that_keeps_renewing_is_at_work():
    box = Box(on_another_host(1000.0))
    clock = Clock(1000.0, tick=lambda now: box.write(json.dumps(on_another_host(now))))
    with pytest.raises(ServiceError, match="process 7 on some-other-pod"), box.lease_at(clock).held():
        pass
    assert lease.PATIENCE_S <= clock.now - 1000 < lease.PATIENCE_S + lease.RENEW_S
    assert json.loads(box.text)["pid"] == 7


def test_a_host_that_ends_meanwhile_lets_go_at_once():
    box = Box(on_another_host(1000.0))
    clock = Clock(1000.0, tick=lambda _now: box.write(""))
    with box.lease_at(clock).held():
        assert clock.now == 1000 + lease.RENEW_S


def test_a_holder_renews(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    box = Box()
    with box.lease().held():
        first = json.loads(box.text)["renewed"]
        end = time.monotonic() + 5
        while json.loads(box.text)["renewed"] == first and time.monotonic() < end:
            time.sleep(0.01)
        assert json.loads(box.text)["renewed"] > first


def test_a_cut_lease_counts_as_none():
    box = Box()
    box.text = '{"host": "x", "pi'
    with box.lease().held():
        assert json.loads(box.text)["pid"] == this_process()["pid"]


def test_a_lease_that_another_took_is_not_deleted():
    box = Box()
    other = {**this_process(), "pid": 1, "start": 0.0, "renewed": 0.0}
    with box.lease().held():
        box.text = json.dumps(other)
    assert json.loads(box.text) == other
