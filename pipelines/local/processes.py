"""The process tree under a local command: its memory, its signals and its end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from valor.errors import Interrupted

POLL_S = 0.25


def memory_bytes(pid: int) -> int:
    """Return the memory of a process and of everything below it, in bytes.

    Proportional set size where the kernel tells it (pages that processes share count once), else resident size.
    """
    import psutil

    total = 0
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            try:
                total += process.memory_full_info().pss
            except (AttributeError, psutil.AccessDenied):
                total += process.memory_info().rss
    return total


def end_tree(child: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """End a process group's leader and everything below it: SIGTERM, and after `grace_s` SIGKILL."""
    import psutil

    below = _tree(child.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=grace_s)
    psutil.wait_procs(below, timeout=max(deadline - time.monotonic(), 0.1))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in below:
        # A helper that left the group; psutil checks that the pid was not given to another process meanwhile.
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait()


def run_until_signal(command: Sequence[str], *, grace_s: float) -> int:
    """Run a command until it ends or a signal comes, then end its whole tree; return its status.

    Ctrl-C is how a person ends such a command, so it returns 0; another signal returns 143.
    """
    with signals() as caught:
        child = subprocess.Popen(command, start_new_session=True)
        try:
            while child.poll() is None and not caught:
                time.sleep(POLL_S)
        finally:
            end_tree(child, grace_s=grace_s)
    if caught:
        return 0 if caught[0] == signal.SIGINT else Interrupted.exit_code
    return child.returncode


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tree(pid: int) -> list:
    import psutil

    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
