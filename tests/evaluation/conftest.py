import handmade
import pytest


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Paths of a small evaluation's inputs: 24 drawn studies."""
    return handmade.build_inputs(tmp_path_factory.mktemp("small"), studies=24, image_px=128)
