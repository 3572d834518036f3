"""Small phantom settings shared by the phantom's tests."""

import pytest

from valor.recipe import PhantomStudies, ReportNoise

QUIET = ReportNoise(
    omission=0, omission_subtle=0, template_contradiction=0, wrong_side=0, false_prior=0, hedged_borderline=0
)


@pytest.fixture
def small() -> PhantomStudies:
    return PhantomStudies(seed=41, train=10, val=3, test=6, image_px=96)


@pytest.fixture
def quiet() -> ReportNoise:
    return QUIET
