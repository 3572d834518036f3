"""Shared prompts: the same probabilities, gradients and tokens with less work."""

import logging

import pytest
import torch
from tiny_llava import PROMPT, world
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from valor.data.manifest import read_studies
from valor.models.loading import load_policy, messages, model_pixels
from valor.recipe import GrpoTextSettings
from valor.training import prompts
from valor.training.memo import TowerMemo
from valor.training.policy import open_policy
from valor.training.prompts import SharedPrompts


@pytest.fixture
def policy():
    model, processor = load_policy(world().base)
    model.model.vision_tower.requires_grad_(False)
    return model, processor


def asked(processor, rows, *, images=1, prompt=PROMPT):
    """Return prompts of different lengths about the studies, `images` per prompt."""
    studies = read_studies(world().dataset, split="train")
    texts, pictures = [], []
    for row in rows:
        text = processor.apply_chat_template(messages(prompt + " Again." * (row % 2)), add_generation_prompt=True)
        texts.append(text.replace("<image>", "<image>" * images))
        pictures += [model_pixels(studies[row + i], processor) for i in range(images)]
    return processor(text=texts, images=pictures, return_tensors="pt", padding=True)


def batch(processor, rows, lengths, *, images=1):
    """Return TRL's inputs of the loss: prompts padded on the left, random completions padded on the right."""
    inputs = asked(processor, rows, images=images)
    length, generator = max(lengths), torch.Generator().manual_seed(4)
    completions = torch.randint(20, 90, (len(rows), length), generator=generator)
    kept = torch.arange(length) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": torch.cat([inputs["input_ids"], completions], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], kept.long()], dim=1),
        "pixel_values": inputs["pixel_values"],
        "num_images": [images] * len(rows),
        "length": length,
    }


def plain(model, given):
    """Return what TRL computes: every row by itself."""
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, : -given["length"]] = -100
    inputs = {key: given[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    output = model(**inputs, labels=labels, fused_lm_head=True)
    return output.log_probs[:, -given["length"] :], output.entropy[:, -given["length"] :]


def packed(model, given):
    return prompts.packed_log_probabilities(
        model,
        given["input_ids"],
        given["attention_mask"],
        given["length"],
        pixel_values=given["pixel_values"],
        num_images=given["num_images"],
    )


def gradients(model, answers):
    weights = torch.linspace(-1, 1, answers[0].numel()).view_as(answers[0])
    model.zero_grad()
    (answers[0] * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "one prompt": ([0, 0, 0, 0], [5, 7, 6, 7], 1),
    "two prompts of other lengths, mixed": ([0, 1, 0, 1, 1, 0, 0], [5, 7, 1, 7, 3, 7, 2], 1),
    "more completions than a row holds": ([2] * 11, [4] * 11, 1),
    "two images per prompt": ([0, 1, 0, 1], [3, 4, 4, 2], 2),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_same_probabilities_entropies_and_gradients(policy, case, checkpointing):
    model, processor = policy
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    given = batch(processor, CASES[case][0], CASES[case][1], images=CASES[case][2])
    expected = plain(model, given)
    expected_gradients = gradients(model, expected)
    TowerMemo.attach(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    found = packed(model, given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_completion_sees_no_other(policy):
    model, processor = policy
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    given = batch(processor, [0, 0, 0], [6, 6, 6])
    before = packed(model, given)[0]
    given["input_ids"][1, -3] = 99
    after = packed(model, given)[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_under_autocast_as_close_as_bfloat16_is(policy):
    model, processor = policy
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    given = batch(processor, [0, 1, 0, 1], [5, 5, 5, 5])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(model, given)[0], plain(model, given)[0], rtol=0.02, atol=0.05)


def test_the_same_words_about_another_image_are_another_prompt(policy):
    _, processor = policy
    inputs = asked(processor, [0, 2, 0])
    images = prompts.digests(inputs["pixel_values"])
    assert prompts.alike(inputs["input_ids"], inputs["attention_mask"], images, [1, 1, 1]) == [[0, 2], [1]]


def test_nothing_is_packed_where_nothing_is_shared(policy):
    model, processor = policy
    assert packed(model, batch(processor, [0, 1, 2, 3], [5, 5, 5, 5])) is None


def count_tokens(model):
    seen = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("sample", [False, True])
def test_generates_the_same_tokens_from_fewer(policy, sample, images):
    model, processor = policy
    inputs = asked(processor, [0, 1, 0, 1, 0, 0], images=images)
    config = model.generation_config
    config.do_sample, config.max_new_tokens = sample, 9
    torch.manual_seed(3)
    expected = model.generate(**inputs, generation_config=config)
    shared = SharedPrompts.attach(model)
    seen = count_tokens(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    prompt = inputs["input_ids"].size(1)
    assert seen[0] == 2 * (prompt - 1), "each of the two prompts once"
    assert seen[1] == 6
    shared.detach()
    seen.clear()
    model.generate(**inputs, generation_config=config)
    assert seen[0] == 6 * prompt


def test_another_cache_is_left_alone(policy):
    model, processor = policy
    inputs = asked(processor, [0, 0])
    config = model.generation_config
    config.do_sample, config.max_new_tokens = False, 4
    expected = model.generate(**inputs, generation_config=config)
    SharedPrompts.attach(model)
    config.cache_implementation = "static"
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)


@pytest.mark.parametrize("where", ["the request", "the model"])
@pytest.mark.parametrize(("name", "value"), [("num_beams", 2), ("num_return_sequences", 2)])
def test_beams_and_several_sequences_of_a_row_are_left_alone(policy, name, value, where):
    model, processor = policy
    inputs = asked(processor, [0, 0])
    config = GenerationConfig(do_sample=name == "num_return_sequences", max_new_tokens=4)
    setattr(config if where == "the request" else model.generation_config, name, value)
    torch.manual_seed(3)
    expected = model.generate(**inputs, generation_config=config)
    SharedPrompts.attach(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_where_weights_are_shared_out_every_process_computes_the_same_passes(tmp_path, strategy, caplog):
    settings = GrpoTextSettings(strategy=strategy, processes=2)
    with caplog.at_level(logging.INFO):
        chosen, speedups = open_policy(
            "grpo_text",
            settings,
            dataset=world().dataset,
            parent=world().parent,
            output_dir=tmp_path,
            projector_only=False,
        )
    alone = strategy == "ddp"
    assert ("generate" in vars(chosen.model)) == alone
    assert [type(speedup) for speedup in speedups] == [TowerMemo, *[SharedPrompts] * alone]
    assert (f"strategy {strategy}: generation computes a prompt once per completion" in caplog.text) != alone


@pytest.mark.parametrize(
    "change", [{"_attn_implementation": "eager"}, {"sliding_window": 8}, {"layer_types": ["sliding_attention"]}]
)
def test_other_attention_shares_nothing_and_the_log_says_so(policy, change, caplog):
    model, _ = policy
    assert prompts.can_share(model)
    for name, value in change.items():
        setattr(model.config.text_config, name, value)
    with caplog.at_level(logging.INFO):
        assert SharedPrompts.attach(model) is None
    assert "sharing it takes LLaVA with full attention" in caplog.text


def dealt(counts: list[list[int]]) -> list[dict]:
    """Return micro-batches as TRL deals them: what a row holds is its number, its prompt is the number modulo 2."""
    return [
        {
            "prompt_ids": torch.tensor(rows)[:, None] % 2,
            "prompt_mask": torch.ones(len(rows), 1, dtype=torch.long),
            "pixel_values": torch.zeros(len(rows), 3, 2, 2),
            "num_images": [1] * len(rows),
            "advantages": torch.tensor(rows, dtype=torch.float32),
            "num_items_in_batch": torch.tensor(7),
            "old_per_token_logps": None,
        }
        for rows in counts
    ]


def test_micro_batches_hold_whole_groups_and_every_completion_once():
    found = prompts.by_prompt(dealt([[3, 0, 1], [2, 5, 4]]))
    assert [batch["advantages"].tolist() for batch in found] == [[3, 1, 5], [0, 2, 4]]
    assert [batch["prompt_ids"].flatten().tolist() for batch in found] == [[1, 1, 1], [0, 0, 0]]
    assert found[1]["num_items_in_batch"] == 7
    assert found[1]["old_per_token_logps"] is None


def test_micro_batches_stay_where_a_value_is_not_by_completion():
    given = dealt([[3, 0, 1], [2, 5, 4]])
    given[0]["pixel_values"] = torch.zeros(6, 3, 2, 2)
    assert [batch["advantages"].tolist() for batch in prompts.by_prompt(given)] == [[3, 0, 1], [2, 5, 4]]
