import os
import tempfile

# Before torch is imported: its threads do not survive a fork, and a forked stage would wait for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"

from valor.startup import spare_the_collector

spare_the_collector()
# A test that names no home must not write into the user's own.
_home = tempfile.TemporaryDirectory(prefix="valor-tests-")
os.environ["VALOR_HOME"] = _home.name


def pytest_collection_modifyitems(items):
    """Put the pipelines' tests and whole runs first.

    They are the longest files: a worker that starts one last keeps the others waiting.
    """
    order = ("pipelines", "end_to_end")
    items.sort(key=lambda item: next((i for i, part in enumerate(order) if part in item.path.parts), len(order)))
