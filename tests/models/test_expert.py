import copy
import math

import numpy as np
import pytest
import torch
from tiny_llava import gate_of
from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel

from valor import artifacts
from valor.errors import IntegrityError, UserError
from valor.models.expert import Expert, require_dual_encoder
from valor.models.gate_file import GATE_FILE


def _save(clip, path):
    for part in clip:
        part.save_pretrained(path)
    artifacts.write_checkpoint_info(path, stage="fetch_models", parents={})
    return path


def _images(count, px=60):
    return list(np.random.default_rng(0).integers(0, 255, (count, px, px + 8), np.uint8))


def test_a_loaded_expert_embeds_as_the_saved_one(clip, expert, tmp_path):
    _save(clip, tmp_path)
    artifacts.write_json(tmp_path / GATE_FILE, gate_of(masked=["Edema"]))
    loaded = Expert.load(tmp_path)
    loaded.require_fit(tmp_path)
    assert torch.allclose(loaded.embed_images(_images(3)), expert.embed_images(_images(3)))
    assert torch.allclose(loaded.embed_texts(["No edema."]), expert.embed_texts(["No edema."]), atol=1e-6)
    assert loaded.gate["measured"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loaded_expert_lies_on_the_fastest_device(clip, tmp_path, monkeypatch, device):
    monkeypatch.setattr("valor.models.expert.fastest_device", lambda: device)
    assert Expert.load(_save(clip, tmp_path)).model.device.type == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_expert_on_a_gpu_takes_its_inputs_there_and_answers_on_the_cpu(clip, expert, tmp_path):
    loaded = Expert.load(_save(clip, tmp_path))
    assert loaded.model.device.type == "cuda"
    for found, here in (
        (loaded.embed_images(_images(3)), expert.embed_images(_images(3))),
        (loaded.embed_texts(["No edema."]), expert.embed_texts(["No edema."])),
    ):
        assert (found.device.type, found.dtype) == ("cpu", torch.float32)
        assert torch.allclose(found, here, atol=1e-3)


def test_embeddings_have_norm_1_and_do_not_depend_on_company(expert):
    images = expert.embed_images(_images(3))
    assert images.shape == (3, 32)
    assert images.dtype == torch.float32
    assert torch.allclose(images.norm(dim=1), torch.ones(3))
    assert torch.allclose(expert.embed_images(_images(3)[1:2])[0], images[1], atol=1e-5)
    texts = expert.embed_texts(["No edema.", "There is a large left pleural effusion.", "No edema."])
    assert torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])
    assert expert.embed_images([]).shape == expert.embed_texts([]).shape == (0, 32)


def test_a_texts_embedding_is_the_same_bits_in_whatever_company(clip, expert):
    more = ("", " in the lower zone", ", and the heart is enlarged", " with atelectasis of the lower lobe")
    texts = [f"There is a {side} pleural effusion{end}." for side in ("left", "right", "bilateral") for end in more]
    alone = torch.cat([expert.embed_texts([text]) for text in texts])
    together = Expert(*clip, gate={}).embed_texts(texts)
    assert torch.equal(alone, together)
    late = Expert(*clip, gate={})
    late.embed_texts(texts[5:])
    assert torch.equal(late.embed_texts(texts), together)
    image = expert.embed_images(_images(1)).expand(2, -1)
    report = " ".join(texts)
    (asked,) = Expert(*clip, gate={}).paper_similarity(image[:1], [report])
    assert Expert(*clip, gate={}).paper_similarity(image, [texts[3], report])[1] == asked


def test_in_batches_a_texts_embedding_is_the_same_but_for_rounding(clip, expert):
    texts = ["No edema.", "There is a large left pleural effusion.", "The heart is enlarged."]
    batched = Expert(*clip, gate={}).embed_texts(texts, batch=2)
    assert torch.allclose(batched, expert.embed_texts(texts), atol=1e-5)


def test_paper_similarity_is_the_mean_over_sentences(expert):
    image = expert.embed_images(_images(1))
    parts = ["There is edema.", "No pneumothorax.", "The heart is enlarged."]
    each = [expert.paper_similarity(image, [part])[0] for part in parts]
    (whole,) = expert.paper_similarity(image, ["FINDINGS: " + " ".join(parts)])
    assert whole == pytest.approx(sum(each) / 3, abs=1e-6)
    assert each[0] != pytest.approx(each[1], abs=1e-6)


def test_an_empty_report_has_no_similarity_and_a_very_long_one_has(expert):
    image = expert.embed_images(_images(2))
    empty, long = expert.paper_similarity(image, ["", "effusion " * 2000])
    assert math.isnan(empty)
    assert -1 <= long <= 1


def test_a_language_model_is_no_expert(tmp_path):
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'llama', which lacks get_image_features and get_text_features"):
        Expert.load(tmp_path)


def test_a_llava_is_no_expert_although_it_has_image_features(llava, tmp_path):
    llava[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="dual encoder"):
        require_dual_encoder(tmp_path)


def test_a_siglip_is_one(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SiglipConfig(text_config={**small, "vocab_size": 300}, vision_config={**small, "image_size": 32})
    SiglipModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        require_dual_encoder(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(UserError, match="no image processor"):
        require_dual_encoder(tmp_path)
    (tmp_path / "preprocessor_config.json").touch()
    require_dual_encoder(tmp_path)


def test_altered_weights_are_refused(clip, tmp_path):
    path = _save(clip, tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Expert.load(tmp_path)
    assert Expert.load(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("preprocessor_config.json", "[]", "image processor"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer.json", "x", "tokenizer"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_told_by_its_part(clip, tmp_path, name, content, part):
    (_save(clip, tmp_path) / name).write_text(content)
    with pytest.raises(IntegrityError, match=rf"^{tmp_path}: its {part} cannot be loaded \(\w+\); fetch or train"):
        Expert.load(tmp_path)


@pytest.mark.parametrize("part", ["visual_projection", "text_projection"])
def test_an_expert_whose_embeddings_are_no_numbers_is_refused(clip, expert, part):
    """A reward of them would teach nothing, and the stage would end as if it had."""
    assert expert.embed_images(_images(1)).isfinite().all()
    model, *rest = clip
    model = copy.deepcopy(model)
    getattr(model, part).weight.data[0, 0] = float("nan")
    broken = Expert(model, *rest, gate={})
    with pytest.raises(IntegrityError, match="embeddings hold a NaN or an infinity"):
        broken.paper_similarity(broken.embed_images(_images(1)), ["No edema."])


@pytest.mark.parametrize("part", ["image processor", "tokenizer"])
def test_parts_of_different_models_are_told_by_name(clip, tmp_path, part):
    model, tokenizer, image_processor = clip
    if part == "tokenizer":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["edema"])
    else:
        image_processor = copy.deepcopy(image_processor)
        image_processor.size = image_processor.crop_size = {"height": 24, "width": 24}
    mixed = Expert(model, tokenizer, image_processor, gate={})
    with pytest.raises(UserError, match=rf"^{tmp_path}: its {part} does not fit its weights \([\w ,]+\); save both"):
        mixed.require_fit(tmp_path)


@pytest.mark.parametrize(("encoder", "part"), [("visual", "image processor"), ("text", "tokenizer")])
def test_an_encoder_that_says_nothing_is_refused(clip, tmp_path, encoder, part):
    model, *rest = copy.deepcopy(clip)
    torch.nn.init.zeros_(getattr(model, f"{encoder}_projection").weight)
    with pytest.raises(UserError, match=f"behind its {part} is zero"):
        Expert(model, *rest, gate={}).require_fit(tmp_path)
