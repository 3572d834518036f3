"""A group's prompt, computed once and not once per completion, in generation and in the loss.

GRPO asks for G completions of one prompt. A prompt with an image is hundreds of tokens and a report under a hundred,
so most of what the language model computes is the same G times. Generation computes each unique prompt once and hands
its keys and values to all its completions. The loss packs completions that share a prompt into one row, the prompt
first, and a mask lets each completion see the prompt and itself (arXiv 2506.05433 has the idea and the proof that
gradients are the same). Both are the same function as before, in another order of summation; with dropout, though, the
completions of a row see their prompt through one mask and not through one each.

Left out: completions of one prompt in different micro-batches (`by_prompt` brings together what TRL deals at random);
attention other than full causal attention by SDPA; models with other inputs than text and images of one size (Qwen-VL,
LLaVA-NeXT). They run as they are.
"""

import copy
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_BRANCHES = 8
"""Completions in one row. Attention costs the row's length squared, also where the mask hides it."""


def digests(rows: "Tensor") -> list[bytes]:
    """Return a digest of each row's bytes."""
    import torch

    plain = rows.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in plain]


def alike(prompts: "Tensor", mask: "Tensor", images: Sequence[bytes], counts: Sequence[int]) -> list[list[int]]:
    """Return the rows that share a prompt and its images, as lists of row numbers in order of their first.

    Args:
        prompts: (B, P) token ids.
        mask: (B, P), 0 where a prompt is padded.
        images: a digest per image.
        counts: images per row.
    """
    groups: dict[tuple, list[int]] = {}
    start = 0
    for row, (ids, kept, count) in enumerate(zip(prompts.tolist(), mask.tolist(), counts, strict=True)):
        key = (tuple(ids), tuple(kept), *images[start : start + count])
        groups.setdefault(key, []).append(row)
        start += count
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Packed:
    """Completions behind their shared prompts: R rows of L = P - 1 + n * C tokens.

    A row is a prompt without its last token, then n branches; a branch is the prompt's last token and a completion
    without its last, so each of its C places predicts one token of the completion.

    Attributes:
        input_ids, position_ids: (R, L).
        attention_mask: (R, 1, L, L) bool, who sees whom.
        shift_labels: (R, L), the token that each place predicts, or -100.
        sources: of each packed row, a row of the batch that holds its prompt.
        places: (B,), of each completion its number among the R * n branches.
        prefix, length: P - 1 and C.
    """

    input_ids: "Tensor"
    position_ids: "Tensor"
    attention_mask: "Tensor"
    shift_labels: "Tensor"
    sources: list[int]
    places: "Tensor"
    prefix: int
    length: int

    def completions(self, values: "Tensor") -> "Tensor":
        """Return (B, C) of the (R, L) values at the completions' places."""
        return values[:, self.prefix :].reshape(-1, self.length)[self.places]


def pack(ids: "Tensor", mask: "Tensor", length: int, groups: Sequence[Sequence[int]]) -> Packed | None:
    """Pack completions of a length C behind their prompts; None where no prompt is shared or padding eats the gain.

    Args:
        ids: (B, P + C) token ids, prompts padded on the left, completions on the right.
        mask: (B, P + C), 0 where padded.
        length: C.
        groups: rows that share a prompt, from `alike`.
    """
    import torch

    rows = [list(group[i : i + MAX_BRANCHES]) for group in groups for i in range(0, len(group), MAX_BRANCHES)]
    branches, prefix = max(map(len, rows)), ids.size(1) - length - 1
    width = prefix + branches * length
    if branches == 1 or len(rows) * width >= ids.numel():
        return None
    device = ids.device
    # A row with fewer completions repeats its last one; nothing is read there.
    filled = torch.tensor([row + row[-1:] * (branches - len(row)) for row in rows], device=device)
    sources = filled[:, 0]

    def laid_out(values: Any, start: int) -> Any:
        """Return (R, L): the prefix, then each branch's `length` values from `start` on."""
        return torch.cat([values[sources, :prefix], values[filled, start : start + length].flatten(1)], dim=1)

    position = torch.arange(ids.size(1), device=device)
    branch = torch.arange(branches, device=device)
    positions = torch.cat([position[:prefix], position[prefix:-1].repeat(branches)])
    segments = torch.cat([position[:prefix] * 0 - 1, branch.repeat_interleave(length)])
    mine = (segments == segments[:, None]) | (segments == -1)
    sees = mine & (positions <= positions[:, None]) & laid_out(mask, prefix).bool()[:, None]
    # A padded place sees itself, or its softmax would be over nothing.
    sees |= torch.eye(width, dtype=torch.bool, device=device)
    labels = laid_out(ids.masked_fill(mask == 0, -100), prefix + 1)
    labels[:, :prefix] = -100
    places = torch.empty(len(ids), dtype=torch.long, device=device)
    for row, members in enumerate(rows):
        for column, member in enumerate(members):
            places[member] = row * branches + column
    return Packed(
        input_ids=laid_out(ids, prefix),
        position_ids=positions.expand(len(rows), -1),
        attention_mask=sees[:, None],
        shift_labels=labels,
        sources=[row[0] for row in rows],
        places=places,
        prefix=prefix,
        length=length,
    )


def by_prompt(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a generation's micro-batches with the completions of a prompt next to each other, in the same sizes.

    An optimizer step that takes all of them is the same step, unless the loss averages over a micro-batch. They stay as
    they are where a value has not one entry per completion, as with several images per prompt.

    Args:
        batches: TRL's, dicts of equal keys: tensors and lists by completion, numbers of the whole generation, None.
    """
    import torch

    size, rows = len(batches[0]["prompt_ids"]), len(batches[0]["prompt_ids"]) * len(batches)
    whole: dict[str, Any] = {}
    for key, value in batches[0].items():
        if isinstance(value, list):
            whole[key] = [one for batch in batches for one in batch[key]]
        elif isinstance(value, torch.Tensor) and value.ndim:
            whole[key] = torch.cat([batch[key] for batch in batches])
        else:
            continue
        if len(whole[key]) != rows:
            return list(batches)
    groups = alike(whole["prompt_ids"], whole["prompt_mask"], digests(whole["pixel_values"]), whole["num_images"])
    order = [row for group in groups for row in group]

    def part(value: Any, start: int) -> Any:
        chosen = order[start : start + size]
        return value[chosen] if isinstance(value, torch.Tensor) else [value[row] for row in chosen]

    return [
        {**batch, **{key: part(value, i * size) for key, value in whole.items()}} for i, batch in enumerate(batches)
    ]


def can_share(model: Any) -> bool:
    """Tell whether the model is one whose prompts can be shared: LLaVA with full causal attention by SDPA."""
    config = model.config
    if config.model_type != "llava" or config.text_config._attn_implementation != "sdpa":
        return False
    kinds = getattr(config.text_config, "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and not getattr(config.text_config, "sliding_window", None)


def packed_log_probabilities(
    model: Any,
    input_ids: "Tensor",
    attention_mask: "Tensor",
    length: int,
    *,
    pixel_values: "Tensor",
    num_images: Sequence[int],
) -> "tuple[Tensor, Tensor | None] | None":
    """Return log-probabilities and entropies (B, C) of completions, or None where packing would save nothing.

    Args:
        model: with TRL's fused head.
        input_ids, attention_mask: (B, P + C).
        length: C.
        pixel_values: (images, channels, H, W).
        num_images: images per row.
    """
    prompt = input_ids.size(1) - length
    groups = alike(input_ids[:, :prompt], attention_mask[:, :prompt], digests(pixel_values), num_images)
    packed = pack(input_ids, attention_mask, length, groups)
    if packed is None:
        return None
    output = model(
        input_ids=packed.input_ids,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        pixel_values=_images_of(pixel_values, num_images, packed.sources),
        shift_labels=packed.shift_labels,
        fused_lm_head=True,
    )
    # A reference model's head leaves the entropy out.
    entropy = None if output.entropy is None else packed.completions(output.entropy)
    return packed.completions(output.log_probs), entropy


class SharedPrompts:
    """Wraps a model's `generate`: each unique prompt is computed once, whatever the number of its completions."""

    def __init__(self, model: Any):
        self._model, self._original = model, model.generate

    @classmethod
    def attach(cls, model: Any) -> "SharedPrompts | None":
        """Wrap the model's `generate`; None where its prompts cannot be shared."""
        if not can_share(model):
            log.info(
                "%s: computes a prompt once per completion; sharing it takes LLaVA with full attention by SDPA",
                type(model).__name__,
            )
            return None
        shared = cls(model)

        @functools.wraps(shared._original)
        def generate(**kwargs: Any) -> Any:
            return shared._original(**(shared._prefilled(**kwargs) or kwargs))

        model.generate = generate
        return shared

    def detach(self) -> None:
        """Give the model its own function back."""
        self._model.__dict__.pop("generate", None)

    def _is_plain(self, generation_config: Any) -> bool:
        """Tell whether each row becomes one completion, in a cache of the usual kind."""
        asked = copy.deepcopy(generation_config)
        # What a request leaves open, `generate` takes from the model.
        asked.update(**self._model.generation_config.to_dict(), defaults_only=True)
        one_each = (asked.num_beams or 1) == (asked.num_return_sequences or 1) == 1
        return one_each and not asked.cache_implementation

    def _prefilled(
        self,
        *,
        input_ids: "Tensor",
        attention_mask: "Tensor",
        pixel_values: "Tensor | None" = None,
        generation_config: Any = None,
        **others: Any,
    ) -> dict[str, Any] | None:
        """Return arguments with the prompts' keys and values in a cache, or None where nothing can be shared."""
        import torch

        from valor.models.cache import roomy_cache

        count, left_over = divmod(0 if pixel_values is None else len(pixel_values), len(input_ids))
        if pixel_values is None or others or not count or left_over or not self._is_plain(generation_config):
            return None
        groups = alike(input_ids, attention_mask, digests(pixel_values), [count] * len(input_ids))
        if len(groups) == len(input_ids):
            return None
        sources = [group[0] for group in groups]
        row_of = {member: row for row, group in enumerate(groups) for member in group}
        cache = roomy_cache(self._model)
        mask = attention_mask[sources, :-1]
        self._model(
            input_ids=input_ids[sources, :-1],
            attention_mask=mask,
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
            pixel_values=_images_of(pixel_values, [count] * len(input_ids), sources),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(torch.tensor([row_of[i] for i in range(len(input_ids))], device=input_ids.device))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "generation_config": generation_config,
        }


def _images_of(pixel_values: "Tensor", num_images: Sequence[int], rows: Sequence[int]) -> "Tensor":
    """Return the images of some rows, in the rows' order."""
    import torch

    images = pixel_values.split(list(num_images))
    return torch.cat([images[row] for row in rows])
