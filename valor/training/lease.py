"""A lease: at most one process works on a stage's work in progress.

The lease is a small JSON file that names its holder (host, boot, PID namespace, process id and start time) and is
renewed while the holder lives. A holder that is dead, which its own host can tell, is taken over at once; a lease of
another host is waited for until it runs out, since a retried pod finds the lease of the one before. A container that
shares all but its process ids counts as another host. The hosts' clocks must agree to within a minute. On a local file
system the take-over itself is guarded by `flock`; on an object store two processes that take over in the same second
are told apart by reading back what was written.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from valor.errors import ServiceError, UserError, ValorError

log = logging.getLogger(__name__)

EXPIRES_S = 90.0
"""A holder on another host is believed alive this long after its last renewal."""
RENEW_S = 20.0
"""A holder renews this often."""
PATIENCE_S = 2 * EXPIRES_S
"""A lease of another host that is still renewed after this wait is of a holder at work."""


def this_process() -> dict[str, Any]:
    """Return who this process is: where its id is known, the id, and the start time, which tells a reused id apart."""
    return {**_here(), "pid": os.getpid(), "start": _start(os.getpid())}


def _start(pid: Any) -> int | None:
    """Return when a process started, in the kernel's ticks since boot; None where it is dead or a zombie.

    Not as a time of day, psutil's `create_time`: a step of the clock would move it, and a live holder look dead.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): after the name, which may hold spaces and brackets, the state is field 3 and the start field 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _here() -> dict[str, Any]:
    """Return where a process id names the same process as it does here: host, boot and PID namespace.

    Containers may share the host's name and its kernel, and know nothing of each other's processes.
    """
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
    }


def _is_here(holder: dict[str, Any]) -> bool:
    return all(holder.get(key) == value for key, value in _here().items())


def alive(holder: dict[str, Any], *, now: float) -> bool:
    """Say whether a lease's holder still works: certain on its own host, by the clock on another."""
    if not _is_here(holder):
        return now < float(holder.get("renewed", 0)) + EXPIRES_S
    start = _start(holder.get("pid"))
    return start is not None and start == holder.get("start")


class Lease:
    """Holds a lease while the `with` block runs, and renews it in the background.

    Args:
        read: returns the lease file's text, or "" where there is none.
        write: replaces the lease file as a whole.
        delete: removes the lease file.
        name: what the lease protects, for the error.
        clock: seconds since the epoch.
        sleep: waits for some seconds.
        holder: who holds it, where that is not this process but its parent.
    """

    def __init__(
        self,
        *,
        read: Callable[[], str],
        write: Callable[[str], None],
        delete: Callable[[], None],
        name: str,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        holder: dict[str, Any] | None = None,
    ):
        self._read, self._write, self._delete, self._name = read, write, delete, name
        self._clock, self._sleep = clock, sleep
        self.holder = this_process() if holder is None else holder
        self._done = threading.Event()

    @contextlib.contextmanager
    def held(self, guard: Path | None = None) -> Iterator["Lease"]:
        """Hold the lease, and give it to the block.

        Args:
            guard: a local file to lock during take-over, where the lease lies on a local file system.

        Raises:
            UserError: another live process of this host holds it.
            ServiceError: a process on another host holds it and keeps renewing it.
        """
        self._wait(guard)
        renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewer.start()
        try:
            yield self
        finally:
            self._done.set()
            renewer.join()
            if self._holder_is_me():
                self._delete()

    def _wait(self, guard: Path | None) -> None:
        """Take the lease, after one of another host has run out."""
        begun = since = self._clock()
        renewed = None
        while True:
            with _locked(guard):
                holder = _parse(self._read())
                # What this process did not see renewed for as long has run out, whatever the other host's clock says.
                if holder.get("renewed") != renewed:
                    renewed, since = holder.get("renewed"), self._clock()
                stale = self._clock() >= since + EXPIRES_S and not _is_here(holder)
                if not holder or self._is_me(holder) or stale or not alive(holder, now=self._clock()):
                    self._put()
                    if self._holder_is_me():
                        return
                    continue  # Another process took it in the same moment.
            busy = (
                f"{self._name}: process {holder.get('pid')} on {holder.get('host')} is training this very stage; "
                "wait for it or stop it, then run again"
            )
            if _is_here(holder):
                raise UserError(busy)
            if self._clock() >= begun + PATIENCE_S:
                raise ServiceError(busy)
            remaining = min(float(renewed or 0.0), since) + EXPIRES_S - self._clock()
            log.info(
                "%s: process %s on %s holds the lease; it runs out in %.0f s unless it is renewed",
                self._name, holder.get("pid"), holder.get("host"), remaining,
            )  # fmt: skip
            self._sleep(max(1.0, min(remaining, RENEW_S)))

    def require(self) -> None:
        """Raise ServiceError where another process has taken the lease over: it ran out while its store was away."""
        if not self._holder_is_me():
            raise ServiceError(
                f"{self._name}: another process took over while this one could not renew its lease; it goes on there"
            )

    def _put(self) -> None:
        self._write(json.dumps({**self.holder, "renewed": self._clock()}))

    def _holder_is_me(self) -> bool:
        return self._is_me(_parse(self._read()))

    def _is_me(self, holder: dict[str, Any]) -> bool:
        return all(holder.get(key) == value for key, value in self.holder.items())

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            # A store that fails for a moment is no reason to stop training: the lease outlives several renewals.
            with contextlib.suppress(OSError, ValorError):
                if not self._holder_is_me():
                    log.error("%s: another process has taken over; this one stops at its next checkpoint", self._name)
                    return
                self._put()


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Hold an exclusive `flock` on a file, where there is one."""
    if path is None:
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _parse(text: str) -> dict[str, Any]:
    """Return a lease file's content; a cut one counts as none."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
