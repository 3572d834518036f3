"""Where the model looked while it wrote each finding: attention from a mention to the image.

For every positive mention the map is the attention of the positions that *predict* the mention's tokens (each one
left of its token) to the image tokens, averaged over positions, layers and heads, and normalised to sum 1. It is
attention, not attribution: a relative measure, compared between checkpoints and with a shuffled image.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from valor.models.loading import question

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_BUDGET_BYTES = 512 * 2**20
"""Attention of one batch over all layers and heads stays below this."""


def mention_maps(
    model: Any,
    processor: Any,
    images: Sequence["Image"],
    reports: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    prompt: str,
) -> list[list["np.ndarray"]]:
    """Return, per report and per character span, a (grid_h, grid_w) float32 map that sums to 1.

    Args:
        model: from `load_policy`; its attention implementation is set to `eager`, the only one that returns maps.
        processor: its processor.
        images: RGB images of the model's size, one per report.
        reports: the text that the model is made to read after the prompt.
        spans: character spans (start, end) in each report.
        prompt: the checkpoint's prompt.
    """
    import torch

    model.set_attn_implementation("eager")
    prefix = question(processor, prompt)
    wanted = [i for i, report_spans in enumerate(spans) if report_spans]
    maps: list[list[np.ndarray]] = [[] for _ in reports]
    step = _batch_size(model, processor, images, reports, prefix) if wanted else 1
    with torch.inference_mode():
        for start in range(0, len(wanted), step):
            batch = wanted[start : start + step]
            inputs = processor(
                text=[prefix + reports[i] for i in batch], images=[images[i] for i in batch],
                return_tensors="pt", padding=True,
            )  # fmt: skip
            inputs = inputs.to(model.device, dtype=model.dtype)
            # The inner model: what the head would say of every position is not asked.
            layers = model.model(**inputs, output_attentions=True, use_cache=False).attentions
            attention = torch.stack([layer.float().mean(dim=1) for layer in layers]).mean(dim=0)
            is_image = inputs["input_ids"] == model.config.image_token_id
            for row, i in enumerate(batch):
                offset = _report_start(processor, inputs["input_ids"][row], reports[i])
                maps[i] = [
                    _grid(attention[row][:, is_image[row]][_predicting(processor, reports[i], span, offset)])
                    for span in spans[i]
                ]
    return maps


def _batch_size(model: Any, processor: Any, images: Sequence[Any], reports: Sequence[str], prefix: str) -> int:
    text = model.config.get_text_config()
    longest = max(reports, key=len)
    length = processor(text=[prefix + longest], images=[images[0]], return_tensors="pt")["input_ids"].shape[1]
    per_report = text.num_hidden_layers * text.num_attention_heads * length**2 * 4
    return max(1, _BUDGET_BYTES // per_report)


def _report_start(processor: Any, input_ids: Any, report: str) -> int:
    """Return the position of the report's first token: padding is on the left, so count from the end."""
    return len(input_ids) - len(processor.tokenizer(report, add_special_tokens=False)["input_ids"])


def _predicting(processor: Any, report: str, span: tuple[int, int], offset: int) -> list[int]:
    """Return the positions whose next token lies in the character span."""
    encoded = processor.tokenizer(report, add_special_tokens=False, return_offsets_mapping=True)
    start, end = span
    inside = [k for k, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
    return [offset + k - 1 for k in inside]


def _grid(rows: Any) -> "np.ndarray":
    """Return the mean of (tokens, image tokens) attention rows as a square map that sums to 1."""
    mean = rows.mean(dim=0)
    side = round(len(mean) ** 0.5)
    return (mean / mean.sum()).reshape(side, -1).cpu().numpy().astype("float32")
