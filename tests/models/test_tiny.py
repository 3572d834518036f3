import numpy as np
import pytest
import torch
from PIL import Image
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from valor.models.generate import generate_reports
from valor.models.loading import load_policy, messages, save_policy


def _image(seed=0, px=48):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (px, px), np.uint8)).convert("RGB")


def test_a_saved_llava_comes_back_the_same(llava, tmp_path):
    model, processor = llava
    save_policy(model, processor, tmp_path, stage="fetch_models", parents={}, prompt="Describe.")
    again, its_processor = load_policy(tmp_path)
    text = processor.apply_chat_template(messages("Describe."), add_generation_prompt=True)
    one = processor(text=[text], images=[_image()], return_tensors="pt")
    two = its_processor(text=[text], images=[_image()], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**one).logits, again(**two).logits)
    assert again.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_an_image_becomes_its_patches_and_changes_the_answer(llava):
    model, processor = llava
    text = processor.apply_chat_template(messages("Describe."), add_generation_prompt=True)
    inputs = processor(text=[text, text], images=[_image(0), _image(1)], return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    assert not torch.allclose(logits[0], logits[1])


def test_it_writes_reports_of_a_batch(llava):
    reports = generate_reports(*llava, [_image(i) for i in range(3)], prompt="Go.", max_new_tokens=4, batch_size=2)
    assert len(reports) == 3
    assert all(r.tokens <= 4 for r in reports)


def test_trl_can_use_the_processor_for_conversations_with_an_image(llava):
    _, processor = llava
    example = {
        "prompt": prepare_multimodal_messages(messages("Describe."), images=[_image()]),
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "No edema."}]}],
    }
    assert is_conversational(example)
    rendered = apply_chat_template(example, processor)
    assert rendered["prompt"].endswith("<|assistant|>")
    assert rendered["completion"] == "No edema.</s>"


WORDS = ["no", "large", "left", "upper", "pleural", "effusion", "or", "consolidation", "is", "seen"]


def _embed(model, tokenizer, texts):
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.get_text_features(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).pooler_output


@pytest.mark.parametrize("place", range(len(WORDS)))
def test_changing_any_word_changes_the_embedding(clip, place):
    model, tokenizer, _ = clip
    other = [*WORDS[:place], "heart", *WORDS[place + 1 :]]
    one, two = _embed(model, tokenizer, [" ".join(WORDS), " ".join(other)])
    assert (one - two).abs().max() > 1e-4


def test_with_the_end_token_2_what_follows_the_largest_id_would_be_invisible(clip):
    model, tokenizer, _ = clip
    start, end, large = tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer) - 1
    assert end == model.text_model.eos_token_id != 2

    def embeddings():
        with torch.no_grad():
            rows = [[start, large, 30, end], [start, large, 40, end]]
            return model.get_text_features(input_ids=torch.tensor(rows)).pooler_output

    one, two = embeddings()
    assert not torch.allclose(one, two, atol=1e-4)
    model.text_model.eos_token_id = 2
    try:
        one, two = embeddings()
    finally:
        model.text_model.eos_token_id = end
    assert torch.allclose(one, two, atol=1e-6)


def test_padding_does_not_change_an_embedding(clip):
    model, tokenizer, _ = clip
    alone = _embed(model, tokenizer, ["no edema"])[0]
    beside = _embed(model, tokenizer, ["no edema", " ".join(WORDS)])[0]
    assert torch.allclose(alone, beside, atol=1e-5)
