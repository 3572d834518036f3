from valor.startup import spare_the_collector

spare_the_collector()


def pytest_collection_modifyitems(items):
    """Put whole runs first and the pipelines' tests next.

    Whole runs are the longest files, and a worker that starts one last keeps the others waiting. KFP compiles slowly in
    a process that holds transformers: it looks through every module for the source of a component.
    """
    order = ("end_to_end", "pipelines")
    items.sort(key=lambda item: next((i for i, part in enumerate(order) if part in item.path.parts), len(order)))
