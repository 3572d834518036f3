import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from valor.models.cache import ROOM, roomy_cache
from valor.models.generate import generate_reports
from valor.models.loading import messages


@pytest.fixture
def inputs(llava):
    _, processor = llava
    text = processor.apply_chat_template(messages("Go."), add_generation_prompt=True)
    images = [torch.full((3, 48, 48), value, dtype=torch.uint8) for value in (20, 200)]
    return processor(text=[text] * 2, images=images, return_tensors="pt", padding=True)


@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
def test_generation_is_the_same_to_the_last_bit(llava, inputs, how):
    model, _ = llava
    found = []
    for cache in (DynamicCache(config=model.config.get_text_config()), roomy_cache(model)):
        torch.manual_seed(3)
        with torch.no_grad():
            output = model.generate(
                **inputs, **how, max_new_tokens=ROOM + 10, min_new_tokens=ROOM + 10, past_key_values=cache,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        found.append((output.sequences, torch.stack(output.logits)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def states(tokens: int, *, first: float = 0.0) -> torch.Tensor:
    return torch.arange(first, first + 2 * 3 * tokens * 4).view(2, 3, tokens, 4)


def test_tokens_are_written_behind_the_others_and_copied_once_per_room(llava):
    layer = roomy_cache(llava[0]).layers[0]
    plain = DynamicLayer()
    places = []
    for step in range(2 * ROOM):
        new = states(5 if step == 0 else 1, first=step)
        for found, expected in zip(layer.update(new, -new), plain.update(new, -new), strict=True):
            assert torch.equal(found, expected)
        places.append(layer.keys.data_ptr())
    assert len(set(places)) == 2
    assert layer.get_seq_length() == 5 + 2 * ROOM - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.crop(-2),
        lambda cache: cache.reset(),
    ],
    ids=["select", "reorder", "repeat", "crop", "reset"],
)
def test_what_generation_does_to_a_cache_is_not_written_over(llava, change):
    kept = []
    for cache in (DynamicCache(config=llava[0].config.get_text_config()), roomy_cache(llava[0])):
        cache.update(states(5), -states(5), 0)
        change(cache)
        rows = cache.layers[0].keys.size(0) if cache.layers[0].is_initialized else 2
        new = torch.full((rows, 3, 1, 4), 7.0)
        kept.append(cache.update(new, -new, 0))
    for expected, found in zip(*kept, strict=True):
        assert torch.equal(found, expected)


def test_a_model_that_names_its_cache_keeps_it(llava, monkeypatch):
    model, processor = llava
    images = [torch.full((3, 48, 48), 90, dtype=torch.uint8)]
    how = {"prompt": "Go.", "max_new_tokens": 4, "batch_size": 2}
    expected = generate_reports(model, processor, images, **how)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert generate_reports(model, processor, images, **how) == expected
