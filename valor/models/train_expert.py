"""The phantom's expert: a tiny CLIP taught by image-report pairs of subjects of its own, sentence by sentence.

First its tower learns the findings of the reports (`valor.models.tower`), then both encoders learn by the sigmoid loss
(SigLIP, arXiv 2303.15343) which sentences are true of which image: the batch's own sentences, their edits (sides
swapped, polarity reversed, zones moved) and general statements. Whether a sentence is true of another study's image is
read from that study's report; where the report cannot tell, the pair is left out (`valor.models.readings`).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.clinical.vocabulary import OBSERVATIONS, SIDES, ZONES
from valor.models import expert_gate, statements
from valor.models.expert import Expert
from valor.models.gate_file import GATE_FILE
from valor.models.optimise import batches, fit
from valor.models.readings import agreement, signature
from valor.models.sentences import moved_zones, reversed_polarity, sentences, swap_sides
from valor.models.tiny import build_clip
from valor.models.tower import augment, normalised, pretrain
from valor.models.train_base import draw, never, reporter
from valor.recipe import ModelSettings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_BATCH = 32
_OWN, _GENERAL, _TEXTS = 32, 24, 112
"""Texts of a step: the batch's own sentences, general statements, and with the opposites of both at most so many."""
_MAX_POSITIVE_WEIGHT = 8.0
_PAIR_WEIGHT = 2.0
_FIRST_SCALE = 10.0
_HELD_OUT_SEED = 500_000
"""Added to the expert's seed: the held-out subjects are those of another seed."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """All texts of the training, tokenized once.

    Attributes:
        ids, mask: (T, L) int64.
        truth: (N, T) int8: 1 the study's report agrees, -1 it contradicts, 0 it cannot tell.
        own: per study the indices of its sentences.
        opposites: (P, 2) int64 pairs of texts that cannot both be true: a text and its edit.
        general: indices of the general statements.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    truth: "torch.Tensor"
    own: list[list[int]]
    opposites: "torch.Tensor"
    general: list[int]


def train_expert(settings: ModelSettings, *, path: Path, leads: bool = True, check: Callable[[], None] = never) -> None:
    """Train the expert, measure its gate on held-out subjects, and write both to `path`, atomically.

    The arguments are those of `train_base`.
    """
    own = settings.phantom_expert
    images, reports = draw(own.seed, own.subjects, size_px=own.image_px, check=check)
    parts = [sentence for report in reports for sentence in sentences(report)]
    model, tokenizer, processor = build_clip(own, [*parts, *_general()], seed=settings.seed)
    tower_steps = own.steps // 2
    pretrain(
        model.vision_model,
        images,
        reports,
        steps=tower_steps,
        seed=settings.seed,
        after=reporter(leads, check, total=own.steps, unit="expert steps"),
    )
    after = reporter(leads, check, total=own.steps, start=tower_steps, unit="expert steps")
    align(model, gather(reports, tokenizer), images, steps=own.steps - tower_steps, seed=settings.seed, after=after)
    expert = Expert(model, tokenizer, processor, gate={"measured": False})
    gate = _measure(expert, settings, check)
    log.info("%s", expert_gate.show(gate))
    with artifacts.atomic_dir(path) as partial:
        for part in (model, tokenizer, processor):
            part.save_pretrained(partial)
        artifacts.write_json(partial / GATE_FILE, gate)
        artifacts.write_checkpoint_info(
            partial, stage="fetch_models", parents={}, origin="phantom", settings=own.model_dump()
        )


def gather(reports: Sequence[str], tokenizer: Any) -> Texts:
    """Collect the reports' sentences, their edits and the general statements, and read each against each report."""
    import torch

    number: dict[str, int] = {}
    own = [[number.setdefault(s, len(number)) for s in sentences(report) if signature(s)] for report in reports]
    general = [number.setdefault(text, len(number)) for text in _general()]
    opposites = set()
    for text in list(number):
        # Sorted: the order of a set of strings differs between processes, and it numbers the texts.
        for edit in sorted({swap_sides(text), reversed_polarity(text), *moved_zones(text)} - {text, ""}):
            if signature(edit) not in (frozenset(), signature(text)):
                opposites.add(tuple(sorted((number[text], number.setdefault(edit, len(number))))))
    encoded = tokenizer(list(number), padding=True, truncation=True, return_tensors="pt")
    truth = torch.from_numpy(agreement(reports, [signature(text) for text in number]))
    pairs = torch.tensor(sorted(opposites))
    return Texts(encoded["input_ids"], encoded["attention_mask"], truth, own, pairs, general)


def align(model: Any, texts: Texts, images: "torch.Tensor", *, steps: int, seed: int, after: Any = None) -> None:
    """Train both encoders of a CLIP by the sigmoid loss between images and texts.

    Args:
        model: a CLIPModel.
        texts: from `gather`.
        images: (N, H, W) uint8.
        steps: optimizer steps.
        seed: of order, augmentation and the choice of texts.
        after: see `fit`.
    """
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    order = batches(len(images), _BATCH, seed=seed)
    share = (texts.truth == 1).float().sum(0) / (texts.truth != 0).float().sum(0).clamp_min(1)
    positive = ((1 - share) / share.clamp_min(1e-3)).clamp(1.0, _MAX_POSITIVE_WEIGHT)
    offset = torch.nn.ParameterDict({"bias": torch.nn.Parameter(torch.tensor(0.0))})
    torch.nn.init.constant_(model.logit_scale, math.log(_FIRST_SCALE))

    def loss_of(_: int) -> "torch.Tensor":
        rows = next(order)
        chosen = _choose(texts, rows.tolist(), generator)
        pixels = augment(normalised(images[rows]), generator, strength=0.4)
        logits = model.logit_scale.exp() * _cosines(model, pixels, texts, chosen) + offset["bias"]
        truth = texts.truth[rows][:, chosen].float()
        weight = torch.where(truth > 0, positive[chosen], (truth < 0).float())
        single = (functional.softplus(-truth * logits) * weight).sum() / weight.sum().clamp_min(1)
        return single + _PAIR_WEIGHT * _pair_loss(logits, truth, _pairs_within(texts.opposites, chosen))

    model.train()
    fit([model, offset], loss_of, steps=steps, after=after)
    model.eval()


def _cosines(model: Any, pixels: "torch.Tensor", texts: Texts, chosen: "torch.Tensor") -> "torch.Tensor":
    """Return (N, K) cosines of normalised images (N, 1, H, W) with K chosen texts."""
    from torch.nn.functional import normalize

    mask = texts.mask[chosen]
    longest = int(mask.sum(dim=1).max())
    image = model.get_image_features(pixel_values=pixels.expand(-1, 3, -1, -1)).pooler_output
    text = model.get_text_features(input_ids=texts.ids[chosen, :longest], attention_mask=mask[:, :longest])
    return normalize(image, dim=-1) @ normalize(text.pooler_output, dim=-1).T


def _choose(texts: Texts, rows: list[int], generator: "torch.Generator") -> "torch.Tensor":
    """Draw a step's texts, sorted: own sentences, general statements, and opposites of either, each at most once."""
    import torch

    def some(pool: list[int], count: int) -> list[int]:
        order = torch.randperm(len(pool), generator=generator)[:count].tolist()
        return [pool[i] for i in order]

    chosen = some(sorted({text for row in rows for text in texts.own[row]}), _OWN) + some(texts.general, _GENERAL)
    touched = torch.isin(texts.opposites, torch.tensor(sorted(set(chosen)))).any(dim=1)
    others = sorted(set(texts.opposites[touched].flatten().tolist()) - set(chosen))
    return torch.tensor(sorted({*chosen, *some(others, _TEXTS - len(set(chosen)))}))


def _pairs_within(opposites: "torch.Tensor", chosen: "torch.Tensor") -> "torch.Tensor":
    """Return the (P, 2) columns of the opposites that are both among the sorted indices `chosen`."""
    import torch

    return torch.searchsorted(chosen, opposites[torch.isin(opposites, chosen).all(dim=1)])


def _pair_loss(logits: "torch.Tensor", truth: "torch.Tensor", pairs: "torch.Tensor") -> "torch.Tensor":
    """Return the logistic loss of telling a text from its opposite, over the images whose reports tell.

    Of two opposites the first and the second are true equally often in the loss, whatever their frequencies: a
    sigmoid alone learns that denials are frequent, and then prefers them to findings that are there.
    """
    from torch.nn.functional import softplus

    difference = logits[:, pairs[:, 0]] - logits[:, pairs[:, 1]]
    direction = (truth[:, pairs[:, 0]] - truth[:, pairs[:, 1]]) / 2
    first, second = (direction == 1).float(), (direction == -1).float()
    losses = softplus(-direction * difference)
    share = first.sum(dim=0, keepdim=True) / (first + second).sum(dim=0, keepdim=True).clamp_min(1)
    weight = first * (1 - share).clamp_min(0.1) + second * share.clamp_min(0.1)
    return (losses * weight).sum() / weight.sum().clamp_min(1)


def _general() -> list[str]:
    """Return the canonical statements in all wordings."""
    presence = [text for f in OBSERVATIONS for text in (*statements.present(f), *statements.absent(f))]
    sides = [text for f in statements.SIDED for side in SIDES for text in statements.on_side(f, side)]
    zones = [text for f in statements.ZONED for zone in ZONES for text in statements.in_zone(f, zone)]
    return [text for text in (*presence, *sides, *zones) if signature(text)]


def _measure(expert: Expert, settings: ModelSettings, check: Callable[[], None]) -> dict[str, Any]:
    from torch import cat

    own = settings.phantom_expert
    pixels, reports = draw(own.seed + _HELD_OUT_SEED, own.held_out_subjects, size_px=own.image_px, check=check)
    embeds = cat([expert.embed_images([image.numpy() for image in part]) for part in pixels.split(64)])
    return expert_gate.measure(expert, embeds, reports, settings.expert_gate)
