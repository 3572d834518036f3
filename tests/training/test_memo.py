"""The tower's memo: the same answers with less work."""

import logging

import pytest
import torch
from tiny_llava import world
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from valor.data.manifest import read_studies
from valor.models.loading import load_policy, messages, model_pixels, prompt_of
from valor.training.memo import TowerMemo


@pytest.fixture
def policy():
    model, processor = load_policy(world().base)
    model.model.vision_tower.requires_grad_(False)
    return model, processor


def batch(processor, rows: list[int], dtype=torch.float32):
    studies = read_studies(world().dataset, split="train")
    text = processor.apply_chat_template(messages(prompt_of(world().base)), add_generation_prompt=True)
    texts = [text + studies[i].text for i in range(len(rows))]
    images = [model_pixels(studies[row], processor) for row in rows]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    return {**inputs.to(dtype=dtype), "labels": inputs["input_ids"]}


def count_tower_images(model) -> list[int]:
    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return seen


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_same_loss_and_gradients_and_each_image_once(policy):
    model, processor = policy
    inputs = batch(processor, [0, 0, 1, 1, 0])
    expected, expected_gradients = loss_and_gradients(model, inputs)
    assert any("multi_modal_projector" in name for name in expected_gradients)
    seen = count_tower_images(model)
    memo = TowerMemo.attach(model)
    for _ in range(2):
        found, gradients = loss_and_gradients(model, inputs)
        assert found == pytest.approx(expected, abs=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    assert sum(seen) == 2 == memo.misses


def test_another_image_is_another_answer(policy):
    model, processor = policy
    memo = TowerMemo.attach(model)
    losses = [model(**batch(processor, [row])).loss.item() for row in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert (memo.misses, memo.hits) == (2, 1)


def test_right_and_cheap_under_activation_checkpointing(policy):
    model, processor = policy
    inputs = batch(processor, [0, 1])
    expected, expected_gradients = loss_and_gradients(model, inputs)
    TowerMemo.attach(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    seen = count_tower_images(model)
    found, gradients = loss_and_gradients(model, inputs)
    assert sum(seen) == 2
    assert found == pytest.approx(expected, abs=1e-6)
    assert not any("vision_tower" in name for name in gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_generates_the_same_report(policy):
    model, processor = policy
    inputs = batch(processor, [0, 0])
    del inputs["labels"]
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    memo = TowerMemo.attach(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), plain)
    assert memo.misses == 1


def test_a_changed_projector_is_seen_at_once(policy):
    model, processor = policy
    inputs = batch(processor, [0])
    TowerMemo.attach(model)
    before = model(**inputs).loss.item()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(2)
    assert model(**inputs).loss.item() != before


def test_autocast_and_dtype_are_part_of_the_key(policy):
    model, processor = policy
    memo = TowerMemo.attach(model)
    inputs = batch(processor, [0])
    full = model(**inputs).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).loss.item() != full
    assert memo.misses == 2
    assert model(**inputs).loss.item() == full
    assert memo.hits == 1


def test_features_made_in_inference_mode_can_enter_a_loss(policy):
    model, processor = policy
    inputs = batch(processor, [0])
    expected, _ = loss_and_gradients(model, inputs)
    TowerMemo.attach(model)
    with torch.inference_mode():
        model(**inputs)
    loss, gradients = loss_and_gradients(model, inputs)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradients


def test_the_store_is_bounded(policy):
    model, processor = policy
    one = 9 * 32 * 4
    memo = TowerMemo.attach(model, limit_bytes=2 * one)
    for row in (0, 1, 2, 0):
        model(**batch(processor, [row]))
    assert memo._bytes <= 2 * one
    assert memo.misses == 4
    model(**batch(processor, [2]))
    assert memo.hits == 1


def test_a_training_tower_gets_no_memo_and_detach_gives_the_function_back(policy):
    model, _ = policy
    own = model.model.get_image_features
    memo = TowerMemo.attach(model)
    assert model.model.get_image_features != own
    memo.detach()
    assert model.model.get_image_features == own
    model.model.vision_tower.requires_grad_(True)
    assert TowerMemo.attach(model) is None


@pytest.mark.parametrize("sign", ["device_mesh", "ds_id"])
def test_a_tower_shared_out_over_processes_runs_each_time_and_the_log_says_so(policy, caplog, sign):
    model, processor = policy
    memo = TowerMemo.attach(model)
    inputs = batch(processor, [0])
    setattr(next(model.model.vision_tower.parameters()), sign, object())
    seen = count_tower_images(model)
    losses = [model(**inputs).loss.item() for _ in range(2)]
    assert sum(seen) == 2
    assert (memo.hits, memo.misses) == (0, 0)
    assert caplog.text.count("the vision tower is shared out over the processes") == 1
    memo.detach()
    assert model(**inputs).loss.item() == pytest.approx(losses[0], abs=1e-6)


def test_several_images_per_prompt(policy):
    model, processor = policy
    studies = read_studies(world().dataset, split="train")
    text = processor.apply_chat_template(messages(prompt_of(world().base)), add_generation_prompt=True)
    text = text.replace("<image>", "<image><image>") + studies[0].text
    images = [[model_pixels(studies[row], processor) for row in pair] for pair in ([0, 1], [1, 0], [0, 1])]
    inputs = processor(text=[text] * 3, images=images, return_tensors="pt", padding=True)
    inputs["labels"] = inputs["input_ids"]
    expected = model(**inputs).logits
    assert not torch.allclose(expected[0], expected[1]), "the images' order matters"
    memo = TowerMemo.attach(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert memo.misses == 2


def test_under_autocast_as_close_as_bfloat16_is(policy):
    model, processor = policy
    inputs = batch(processor, [0, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        TowerMemo.attach(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0.02, atol=0.05)


def test_the_log_says_why_there_is_no_memo(policy, caplog):
    model, _ = policy
    model.model.vision_tower.requires_grad_(True)
    with caplog.at_level(logging.INFO):
        assert TowerMemo.attach(model) is None
        assert TowerMemo.attach(torch.nn.Linear(1, 1)) is None
    assert "LlavaForConditionalGeneration: its vision tower trains" in caplog.text
    assert "Linear: not of the LLaVA family" in caplog.text


def test_a_model_that_cuts_images_into_tiles_runs_as_it_is_and_the_log_says_so(caplog):
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 8,
        },
        text_config={
            "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
        },
        image_grid_pinpoints=[[64, 32], [32, 64]], image_token_index=63,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    model.model.vision_tower.requires_grad_(False)
    tiles = {"pixel_values": torch.rand(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])}
    count = len(model.model.get_image_features(**tiles).pooler_output[0])
    inputs = {"input_ids": torch.tensor([[1, *[63] * count, 2]]), "attention_mask": torch.ones(1, count + 2), **tiles}
    expected = model(**inputs).logits
    memo = TowerMemo.attach(model)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert (memo.hits, memo.misses) == (0, 0)
    assert caplog.text.count("LlavaNextModel: hands over its images, shape (1, 3, 3, 32, 32), in a way") == 1
