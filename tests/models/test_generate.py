"""Which tokens end a report, in generation as in TRL's training."""

import numpy as np
import pytest
import torch
from PIL import Image

from valor.models.generate import end_tokens, generate_reports

OTHER = 7


@pytest.mark.parametrize(
    ("named", "expected"), [(None, [3]), (3, [3]), (OTHER, [3, OTHER]), ([OTHER, 3], {3, OTHER}), ([], [3])]
)
def test_what_ends_a_report_is_the_tokenizers_token_and_all_that_the_model_names(llava, monkeypatch, named, expected):
    model, processor = llava
    assert processor.tokenizer.eos_token_id == 3
    monkeypatch.setattr(model.generation_config, "eos_token_id", named)
    found = end_tokens(model, processor.tokenizer)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("last", [3, OTHER])
@pytest.mark.parametrize("named", [None, OTHER])
def test_a_report_ends_where_trl_would_end_it(llava, monkeypatch, named, last):
    model, processor = llava
    monkeypatch.setattr(model.generation_config, "eos_token_id", named)
    steps = []

    def say(_, scores):
        """Two tokens of no meaning, then the one asked for."""
        steps.append(len(scores))
        return torch.full_like(scores, -100.0).index_fill(1, torch.tensor([11 if len(steps) < 3 else last]), 0.0)

    image = Image.fromarray(np.zeros((48, 48, 3), np.uint8))
    (report,) = generate_reports(
        model, processor, [image], prompt="Go.", max_new_tokens=6, batch_size=1, logits_processor=[say]
    )
    ends = last == 3 or named == OTHER
    assert (report.tokens, report.truncated) == ((2, False) if ends else (6, True))
    assert len(steps) == (3 if ends else 6)
