import pytest

from valor.models.expert import Expert
from valor.models.tiny import build_clip, build_llava
from valor.recipe import PhantomBase, PhantomExpert

REPORTS = (
    "FINDINGS: There is a small left pleural effusion. The heart is normal in size. IMPRESSION: Left pleural effusion.",
    "FINDINGS: No pleural effusion or pneumothorax. The heart is enlarged. IMPRESSION: Cardiomegaly.",
    "FINDINGS: There is a moderate right pneumothorax. No consolidation. IMPRESSION: Right pneumothorax.",
    "FINDINGS: Lungs are clear. No pneumothorax. IMPRESSION: No acute cardiopulmonary abnormality.",
)
SMALL_BASE = PhantomBase(
    subjects=8, image_px=48, patch_px=12, vision_width=32, vision_layers=1, text_width=32, text_layers=1, vocab=300
)
SMALL_EXPERT = PhantomExpert(
    subjects=8, image_px=48, patch_px=12, vision_width=32, vision_layers=1, text_width=32, text_layers=1, vocab=300
)


@pytest.fixture(scope="session")
def reports():
    return REPORTS


@pytest.fixture(scope="session")
def llava():
    return build_llava(SMALL_BASE, REPORTS, seed=0)


@pytest.fixture(scope="session")
def clip():
    return build_clip(SMALL_EXPERT, REPORTS, seed=0)


@pytest.fixture
def expert(clip):
    return Expert(*clip, gate={"measured": False})
