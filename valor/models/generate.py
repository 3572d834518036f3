"""Reports of a batch of images: shared by evaluation and serving, so both say the same."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from valor.models.loading import question

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class Generated:
    """A report: its text, its length in tokens, and whether the token limit cut it."""

    text: str
    tokens: int
    truncated: bool


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end a report: the tokenizer's and all that the model names, as TRL has it."""
    named = model.generation_config.eos_token_id
    of_model = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([tokenizer.eos_token_id, *of_model]))


def generate_reports(
    model: Any,
    processor: Any,
    images: Sequence["Image"],
    *,
    prompt: str,
    max_new_tokens: int,
    batch_size: int,
    logits_processor: Sequence[Any] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Write one greedy report per image.

    Args:
        model: from `load_policy`, in evaluation mode.
        processor: its processor.
        images: RGB images of the model's size (`fit_pixels`).
        prompt: the checkpoint's prompt.
        max_new_tokens: length limit in tokens.
        batch_size: images per forward pass.
        logits_processor: transformers' hooks into the next token's logits.
        progress: called with (done, total) images.
    """
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if logits_processor:
        how["logits_processor"] = list(logits_processor)
    return _write(model, processor, images, how, prompt=prompt, batch_size=batch_size, progress=progress)


def sample_reports(
    model: Any,
    processor: Any,
    images: Sequence["Image"],
    *,
    samples: int,
    seed: int,
    prompt: str,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Generated]]:
    """Sample `samples` reports per image at temperature 1; `batch_size` counts reports, the rest is as above."""
    import torch

    how = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    repeated = [image for image in images for _ in range(samples)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flat = _write(model, processor, repeated, how, prompt=prompt, batch_size=batch_size, progress=progress)
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _write(
    model: Any,
    processor: Any,
    images: Sequence["Image"],
    how: dict[str, Any],
    *,
    prompt: str,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Generated]:
    import torch

    from valor.models.cache import roomy_cache

    text = question(processor, prompt)
    end_ids = end_tokens(model, processor.tokenizer)
    how = {**how, "eos_token_id": end_ids}
    reports: list[Generated] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = list(images[start : start + batch_size])
            inputs = processor(text=[text] * len(batch), images=batch, return_tensors="pt", padding=True)
            inputs = inputs.to(model.device, dtype=model.dtype)
            cache = None if model.generation_config.cache_implementation else roomy_cache(model)
            output = model.generate(**inputs, **how, past_key_values=cache)
            for row in output[:, inputs["input_ids"].shape[1] :].tolist():
                end = next((i for i, token in enumerate(row) if token in end_ids), None)
                kept = row if end is None else row[:end]
                decoded = processor.tokenizer.decode(kept, skip_special_tokens=True).strip()
                reports.append(Generated(text=decoded, tokens=len(kept), truncated=end is None))
            if progress:
                progress(len(reports), len(images))
    return reports
