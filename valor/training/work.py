"""A training stage's work in progress: trainer checkpoints that survive the death of its pod.

`work_root/<digest of inputs, settings, code>` holds `checkpoint-<step>` directories, each complete once its
`checkpoint.json` (sha256 of every file, written last) is there; a lease (`valor.training.lease`); and, after a failure
that no retry can mend, a marker. `work_root` is a directory, where the trainer writes in place, or gs://, where it
writes to local scratch space and each checkpoint is copied up. The optimizer's and the generators' states in there are
torch files, read with `weights_only`; none of them enters an artifact.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from valor import artifacts, storage
from valor.errors import BY_EXIT_CODE, DataError, GuardStop, IntegrityError, ServiceError, UserError, ValorError
from valor.training.lease import Lease

log = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MARKER = "failed"
LEASE = "lease"
KEEP = 2
"""Checkpoints kept: the newest, and one to fall back to."""
FOR_GOOD = (UserError, DataError, GuardStop, IntegrityError)
"""Failures that the same inputs, settings and code would meet again."""


class Work:
    """One stage's work in progress, held by this process.

    Attributes:
        scratch: the local directory that the trainer writes `checkpoint-<step>` directories into.
    """

    def __init__(self, place: str, scratch: Path, lease: Lease):
        self.place, self.scratch, self._lease = place, scratch, lease
        self._remote = storage.is_remote(place)

    @property
    def ticket(self) -> dict[str, Any]:
        """What a process that works for this one needs to commit (`join_work`); JSON-able."""
        return {"place": self.place, "scratch": str(self.scratch), "holder": self._lease.holder}

    def require(self) -> None:
        """Raise ServiceError where another process has taken over: what it writes is not to be written over."""
        self._lease.require()

    def commit(self, step: int, *, good: bool = True) -> None:
        """Make `checkpoint-<step>` count: everything on disk first, then the manifest; drop old ones.

        Args:
            step: the trainer's step.
            good: no guard was near its limit; the last good one is kept for as long as none follows.

        Raises:
            ServiceError: another process has taken over.
        """
        self.require()
        name = f"checkpoint-{step}"
        path = self.scratch / name
        write_manifest(path, good=good)
        if self._remote:
            storage.put_dir(path, f"{self.place}/{name}")
        steps = self._steps()
        self._keep(*steps[:KEEP], next(filter(self._is_good, steps), None))

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint as a local directory; broken ones are deleted on the way."""
        for step in self._steps():
            path = self.scratch / f"checkpoint-{step}"
            try:
                if self._remote:
                    shutil.rmtree(path, ignore_errors=True)
                    storage.get_dir(f"{self.place}/{path.name}", path)
                verify_manifest(path)
            except (IntegrityError, UserError):
                self._delete(step)
            else:
                return path
        return None

    def keep_last_good(self) -> str:
        """Drop every checkpoint but the last good one, and return its place; "" where there is none."""
        good = next(filter(self._is_good, self._steps()), None)
        self._keep(good)
        return "" if good is None else f"{self.place}/checkpoint-{good}"

    def remove(self) -> None:
        """Remove all of it, after the block of `open_work`: the stage's artifact is stamped, nobody needs it again."""
        files = _Files(self.place)
        try:
            with _held(files, name=self.place):
                files.remove_all()
        except (UserError, ServiceError) as error:
            # The artifact stands. Another process may have begun the same stage, or the store be away.
            log.warning("%s: the work in progress stays (%s)", self.place, error)
            return
        if not files.remote:
            Path(f"{self.place}.lock").unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, complete or not, newest first."""
        names = {path.name for path in self.scratch.glob("checkpoint-*")}
        if self._remote:
            names |= {file.split("/")[0] for file in storage.list_files(self.place)}
        steps = (name.removeprefix("checkpoint-") for name in names if name.startswith("checkpoint-"))
        return sorted((int(step) for step in steps if step.isdigit()), reverse=True)

    def _is_good(self, step: int) -> bool:
        """Tell whether a checkpoint is complete and was good when it was committed; files are not read again."""
        uri = f"{self.place}/checkpoint-{step}/{MANIFEST}"
        try:
            return bool(json.loads(storage.read_bytes(uri))["good"]) if storage.exists(uri) else False
        except (ValueError, KeyError, TypeError):
            return False

    def _keep(self, *kept: int | None) -> None:
        for step in self._steps():
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        name = f"checkpoint-{step}"
        # Without its manifest a half-deleted checkpoint is plainly incomplete.
        (self.scratch / name / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        if self._remote:
            storage.delete_tree(f"{self.place}/{name}")


@contextlib.contextmanager
def open_work(work_root: str, *, identity: dict[str, Any], pipeline_run: str) -> Iterator[Work]:
    """Hold the work in progress of a stage. It outlives the block: `Work.remove` ends it once the artifact is stamped.

    Args:
        work_root: a directory or gs://.
        identity: inputs' digests, settings and code: what the result depends on.
        pipeline_run: id of the pipeline run; a failure for good ends further tries within it at once.

    Raises:
        UserError: the place cannot be made, or another live process of this host works on it.
        ServiceError: a process on another host works on it.
        GuardStop: a guard stopped the block, or an earlier try with the same identity in whichever run.
        ValorError: the verdict of an earlier try within the same pipeline run.
    """
    place = place_of(work_root, identity)
    files = _Files(place)
    with contextlib.ExitStack() as stack:
        if files.remote:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="valor-work-")))
        else:
            scratch = Path(place)
            with storage.writing(scratch):
                scratch.mkdir(parents=True, exist_ok=True)
                # The guard of the lease lies beside it.
                Path(f"{place}.lock").touch()
        work = Work(place, scratch, stack.enter_context(_held(files, name=place)))
        repeat_verdict(place, pipeline_run, holds=True)
        try:
            yield work
        except GuardStop as error:
            good = work.keep_last_good()
            kept = f"its last good checkpoint is {good}" if good else "it has no good checkpoint but its parent"
            stop = GuardStop(f"{error}; {kept}")
            _leave_marker(files, stop, pipeline_run)
            raise stop from error
        except FOR_GOOD as error:
            _leave_marker(files, error, pipeline_run)
            raise


def place_of(work_root: str, identity: dict[str, Any]) -> str:
    """Return where the work in progress of an identity lies."""
    return f"{work_root.rstrip('/')}/{artifacts.digest_value(identity)[:32]}"


def join_work(ticket: Mapping[str, Any]) -> Work:
    """Return the work in progress that another process holds, for one that works for it (`Work.ticket`)."""
    lease = _lease(_Files(ticket["place"]), name=ticket["place"], holder=ticket["holder"])
    return Work(ticket["place"], Path(ticket["scratch"]), lease)


def _lease(files: "_Files", *, name: str, holder: dict[str, Any] | None = None) -> Lease:
    return Lease(
        read=lambda: files.read(LEASE),
        write=lambda text: files.write(LEASE, text),
        delete=lambda: files.delete(LEASE),
        name=name,
        holder=holder,
    )


@contextlib.contextmanager
def _held(files: "_Files", *, name: str) -> Iterator[Lease]:
    guard = None
    if not files.remote:
        # Beside the place, not in it: the place itself is removed at the end.
        guard = Path(f"{files.place}.lock")
    with _lease(files, name=name).held(guard) as lease:
        yield lease


def repeat_verdict(place: str, pipeline_run: str, *, holds: bool = False) -> None:
    """Raise an earlier failure for good: any of the same pipeline run, a guard's stop of every run.

    A missing file may be there the next time. What collapsed would collapse again, and continued from its last good
    checkpoint all the more so.

    Args:
        place: of the work in progress (`place_of`).
        pipeline_run: id of the pipeline run.
        holds: the lease: a verdict that does not count any more is the holder's to forget.

    Raises:
        ValorError: the failure.
    """
    files = _Files(place)
    marker = _parse_marker(files.read(MARKER))
    if marker is None:
        return
    if pipeline_run and marker["pipeline_run"] == pipeline_run:
        raise BY_EXIT_CODE[marker["exit_code"]](f"{marker['error']} (failed for good in this run; not tried again)")
    if marker["exit_code"] == GuardStop.exit_code:
        raise GuardStop(
            f"{marker['error']} (stopped before with the same inputs, settings and code; not tried again: change a "
            f"setting, or delete {files.place} to begin anew)"
        )
    if holds:
        files.delete(MARKER)


def _parse_marker(text: str) -> dict[str, Any] | None:
    """Return a marker, None where there is none; one that says no verdict, such as a cut one, counts as none."""
    try:
        marker = json.loads(text)
        return marker if {"pipeline_run", "error"} <= marker.keys() and marker["exit_code"] in BY_EXIT_CODE else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _leave_marker(files: "_Files", error: ValorError, pipeline_run: str) -> None:
    """Keep the verdict for blind retries. Checkpoints stay, for a file that is mended."""
    files.write(MARKER, json.dumps({"pipeline_run": pipeline_run, "exit_code": error.exit_code, "error": str(error)}))


def write_manifest(path: Path, *, good: bool = True) -> None:
    """Write `checkpoint.json` with every file's sha256, after all of them have reached the disk."""
    files = {}
    with artifacts.full_disk_is_a_resource_error(path):
        for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            files[file.relative_to(path).as_posix()] = artifacts.digest_file(file)
        _sync_dir(path)
        artifacts.write_json(path / MANIFEST, {"files": files, "good": good})
        _sync_dir(path)


def verify_manifest(path: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        IntegrityError: the manifest is missing, cut or lists nothing, or a file is missing or altered.
    """
    expected = artifacts.read_json(path / MANIFEST).get("files")
    if not isinstance(expected, dict) or not expected:
        raise IntegrityError(f"{path / MANIFEST}: lists no files, so it is no complete checkpoint; delete {path}")
    for name, digest in expected.items():
        if not (path / name).is_file() or artifacts.digest_file(path / name) != digest:
            raise IntegrityError(f"{path / name}: missing or altered since it was written")


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Files:
    """The lease and the marker: small text files beside the checkpoints, each in a folder of its own."""

    def __init__(self, place: str):
        self.place, self.remote = place, storage.is_remote(place)

    def read(self, name: str) -> str:
        """Return a file's text, "" where there is none; asking first would not do, its holder may let go in between.

        What is no UTF-8 comes back as no JSON either.
        """
        try:
            return storage.read_bytes(self._uri(name)).decode(errors="replace")
        except UserError:
            return ""

    def write(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            storage.put_file(file.name, self._uri(name))

    def delete(self, name: str) -> None:
        storage.delete_tree(f"{self.place}/{name}")

    def remove_all(self) -> None:
        storage.delete_tree(self.place)

    def _uri(self, name: str) -> str:
        return f"{self.place}/{name}/{name}.json"
