import pytest
import torch

from valor.clinical.vocabulary import OBSERVATIONS
from valor.errors import UserError
from valor.models.expert import Expert
from valor.models.tiny import build_clip
from valor.recipe import PhantomExpert
from valor.rewards.expert import LOWEST_SIMILARITY, LOWEST_STATEMENTS, expert_reward, is_repetitive

TEXTS = ["There is a left pleural effusion.", "No pneumothorax."]
REPORT = "FINDINGS: There is a left pleural effusion. No pneumothorax. IMPRESSION: Left pleural effusion."
REPEATED = "There is edema. " * 3


@pytest.fixture(scope="module")
def expert():
    settings = PhantomExpert(
        image_px=48, patch_px=12, vision_width=32, vision_layers=1, text_width=32, text_layers=1, vocab=300
    )
    calibration = {f: {"scale": 1.0, "bias": -2.0} for f in OBSERVATIONS}
    gate = {"measured": True, "masked": ["Fracture"], "calibration": calibration}
    return Expert(*build_clip(settings, TEXTS, seed=0), gate=gate)


@pytest.fixture(params=["paper", "statements"])
def kind(request):
    return request.param


def _embeds(count, dim=32):
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=1).tolist()


def test_it_has_a_name_and_takes_what_trl_passes(expert, kind):
    reward = expert_reward(expert, kind)
    assert reward.__name__ == f"expert_{kind}_reward"
    conversation = [[{"role": "assistant", "content": REPORT}]]
    passed = {"prompts": [[]], "image": [None], "study_id": ["s"], "trainer_state": None}
    as_messages = reward(completions=conversation, image_embed=_embeds(1), **passed)
    assert as_messages == reward(completions=[REPORT], image_embed=_embeds(1))


def test_reports_that_state_nothing_and_repetitive_ones_rank_last(expert, kind):
    lowest = {"paper": LOWEST_SIMILARITY, "statements": LOWEST_STATEMENTS}[kind]
    bad = ["", "FINDINGS:", REPEATED, "the the " * 50]
    scores = expert_reward(expert, kind)([*bad, REPORT, "No acute disease."], image_embed=_embeds(6))
    assert scores[:4] == [lowest] * 4
    assert min(scores[4:]) > lowest
    # Where silence is denial, words that state nothing would be a normal report.
    said = expert_reward(expert, kind)(["Qwerty.", "The of zork blip lung."], image_embed=_embeds(2))
    assert [score == lowest for score in said] == [kind == "statements"] * 2


def test_a_truncated_report_ranks_last_only_if_the_end_is_known(expert, kind):
    ids = [[5, 6, 3], [5, 6, 7]]
    asked = {"completions": [REPORT, REPORT], "image_embed": _embeds(1) * 2, "completion_ids": ids}
    whole, cut = expert_reward(expert, kind, eos_token_ids=[3])(**asked)
    assert cut < whole
    assert len(set(expert_reward(expert, kind)(**asked))) == 1


def test_the_image_decides(expert, kind):
    one, two = expert_reward(expert, kind)([REPORT, REPORT], image_embed=_embeds(2))
    assert one != pytest.approx(two)


def test_an_expert_without_a_gate_rewards_by_the_paper_alone(expert):
    bare = Expert(expert.model, expert.tokenizer, expert.image_processor, gate={"measured": False})
    with pytest.raises(UserError, match="similarity: paper"):
        expert_reward(bare, "statements")
    assert expert_reward(bare, "paper")([REPORT], image_embed=_embeds(1))


def test_a_sentence_may_come_in_findings_and_impression():
    assert not is_repetitive(REPORT)
    assert not is_repetitive("There is edema. " * 2)
    assert is_repetitive(REPEATED)
    assert is_repetitive("no edema no edema no edema no edema no edema no edema")
