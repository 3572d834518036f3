import json
import os
import subprocess
import sys

import torch

from valor.models import train_expert
from valor.models.tiny import build_clip
from valor.recipe import PhantomExpert

SMALL = PhantomExpert(
    image_px=24, patch_px=12, vision_width=32, vision_layers=1, text_width=32, text_layers=1, vocab=300
)
REPORTS = ["There is a left upper lung nodule. No edema.", "No acute abnormality.", "There is edema."] * 4


def _texts():
    _, tokenizer, _ = build_clip(SMALL, REPORTS, seed=0)
    return train_expert.gather(REPORTS, tokenizer), tokenizer


def test_texts_hold_the_sentences_their_opposites_and_who_agrees():
    texts, tokenizer = _texts()
    words = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in texts.ids]
    for expected in ("there is a right upper lung nodule.", "there is no left upper lung nodule.",
                     "there is a left lower lung nodule."):  # fmt: skip
        assert expected in words
    own = words.index("there is a left upper lung nodule.")
    assert texts.own[0][0] == own
    assert texts.truth[:3, own].tolist() == [1, -1, -1]
    for first, second in texts.opposites.tolist():
        assert not ((texts.truth[:, first] == 1) & (texts.truth[:, second] == 1)).any()


PRINT_TEXTS = """
import sys; sys.path.insert(0, sys.argv[1])
from test_train_expert import _texts
texts, _ = _texts()
print([texts.ids.tolist(), texts.truth.tolist(), texts.opposites.tolist()])
"""


def test_the_texts_are_the_same_in_a_process_with_another_order_of_sets():
    texts, _ = _texts()
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_TEXTS, os.path.dirname(__file__)],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert json.loads(printed) == [texts.ids.tolist(), texts.truth.tolist(), texts.opposites.tolist()]


def test_alignment_brings_true_sentences_above_their_opposites():
    model, tokenizer, processor = build_clip(SMALL, REPORTS, seed=0)
    texts = train_expert.gather(REPORTS, tokenizer)
    images = torch.full((len(REPORTS), 24, 24), 100, dtype=torch.uint8)
    images[0::3, :12, 12:] = 250
    images[2::3, 12:] = 10
    train_expert.align(model, texts, images, steps=200, seed=0)
    expert = train_expert.Expert(model, tokenizer, processor, gate={"measured": False})
    nodule, normal, edema = expert.embed_images([image.numpy() for image in images[:3]])
    claims = expert.embed_texts(["There is pulmonary edema.", "There is no pulmonary edema."])
    assert edema @ claims[0] > edema @ claims[1]
    assert normal @ claims[1] > normal @ claims[0]
    sides = expert.embed_texts(["There is a left upper lung nodule.", "There is a right upper lung nodule."])
    assert nodule @ sides[0] > nodule @ sides[1]
