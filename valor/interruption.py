"""SIGTERM as an error, for long work that has something to clean away when it is told to end."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from valor.errors import Interrupted


@contextlib.contextmanager
def sigterm_interrupts(message: str) -> Iterator[None]:
    """Raise Interrupted at the first SIGTERM while the block runs, in the main thread: no other may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        # A second one must not stop the first from cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(message)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
