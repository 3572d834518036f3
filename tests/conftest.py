from valor.startup import spare_the_collector

spare_the_collector()


def pytest_collection_modifyitems(items):
    """Put whole runs first: they are the longest files, and a worker that starts one last keeps the others waiting."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)
