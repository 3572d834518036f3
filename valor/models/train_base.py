"""The phantom's base: a tiny LLaVA that has learned from radiographs and reports of its own, as a LLaVA of size has.

First its tower learns the findings of the reports, then projector and language model learn to write the reports of the
images, the tower frozen. All subjects are the base's own (`models.phantom_base.seed`); SFT brings it to other ones.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts, progress
from valor.data.manifest import report_text
from valor.models.loading import question, save_policy
from valor.models.optimise import batches, fit
from valor.models.tiny import build_llava
from valor.models.tower import normalised, patch_tokens, pretrain, to_batch
from valor.recipe import ModelSettings, PhantomStudies

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SOURCE_PX = 192
"""Studies are drawn at this size and shrunk to the model's, as ingest and the loader do."""
_LANGUAGE_BATCH = 16
_TOWER_BATCH = 64
_EMBEDDING_LR = 6e-3
"""Of what is no hidden matrix: with the usual 1e-3 the embeddings hold the reports back (docs/development.md)."""


def never() -> None:
    """Check nothing: what stands for the orphan's check where there is no parent."""


def train_base(settings: ModelSettings, *, path: Path, leads: bool = True, check: Callable[[], None] = never) -> None:
    """Train the base and write its checkpoint to `path`, atomically.

    Args:
        settings: the recipe's `models` section.
        path: the directory to make.
        leads: report progress.
        check: called between subjects and steps; what it raises ends the training.
    """
    own = settings.phantom_base
    images, reports = draw(own.seed, own.subjects, size_px=own.image_px, check=check)
    model, processor = build_llava(own, reports, seed=settings.seed)
    steps = own.tower_steps + own.language_steps
    pretrain(
        model.model.vision_tower,
        images,
        reports,
        steps=own.tower_steps,
        seed=settings.seed,
        after=reporter(leads, check, total=steps, unit="base steps"),
    )
    teach_reports(
        model,
        processor,
        images,
        reports,
        prompt=settings.prompt,
        steps=own.language_steps,
        seed=settings.seed,
        after=reporter(leads, check, total=steps, start=own.tower_steps, unit="base steps"),
    )
    with artifacts.atomic_dir(path) as partial:
        save_policy(
            model.eval(),
            processor,
            partial,
            stage="fetch_models",
            parents={},
            prompt=settings.prompt,
            origin="phantom",
            settings=own.model_dump(),
        )


def teach_reports(
    model: Any,
    processor: Any,
    images: "torch.Tensor",
    reports: Sequence[str],
    *,
    prompt: str,
    steps: int,
    seed: int,
    after: Callable[[int, float], None] | None = None,
) -> None:
    """Teach projector and language model of a LLaVA to write the reports of images, its tower frozen.

    The tower sees each image once, so a step costs what the language model does.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        images: (N, H, W) uint8 at the model's size.
        reports: their N reports.
        prompt: the question that they answer.
        steps: optimizer steps of 16 reports.
        seed: of the order.
        after: see `fit`.
    """
    import torch
    from torch.nn import functional

    tokenizer = processor.tokenizer
    asked = question(processor, prompt)
    before, behind = (tokenizer(part)["input_ids"] for part in asked.split(processor.image_token))
    encoded = tokenizer([report + tokenizer.eos_token for report in reports], padding=True, padding_side="right")
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    language, projector, head = model.model.language_model, model.model.multi_modal_projector, model.lm_head
    with torch.no_grad():
        seen = [patch_tokens(model.model.vision_tower, normalised(part)) for part in images.split(_TOWER_BATCH)]
    features = torch.cat(seen)
    order = batches(len(reports), _LANGUAGE_BATCH, seed=seed)

    def loss_of(_: int) -> "torch.Tensor":
        rows = next(order)
        longest = int(mask[rows].sum(dim=1).max())
        own, kept = ids[rows, :longest], mask[rows, :longest]
        words = [torch.tensor(part).expand(len(rows), -1) for part in (before, behind)]
        first, second, last = (language.embed_tokens(part) for part in (*words, own))
        embeds = torch.cat([first, projector(features[rows]), second, last], dim=1)
        start = embeds.shape[1] - longest
        hidden = language(
            inputs_embeds=embeds, attention_mask=functional.pad(kept, (start, 0), value=1)
        ).last_hidden_state
        wanted = own.masked_fill(kept == 0, -100)
        return functional.cross_entropy(head(hidden[:, start - 1 : -1]).transpose(1, 2), wanted)

    language.train()
    fit([language, projector], loss_of, steps=steps, adam_lr=_EMBEDDING_LR, after=after)
    language.eval()


def draw(seed: int, subjects: int, *, size_px: int, check: Callable[[], None] = never) -> tuple[Any, list[str]]:
    """Return (images (N, size, size) uint8 tensor, N report texts) of a phantom's training split."""
    from valor.data.phantom import samples

    studies = PhantomStudies(seed=seed, train=subjects, val=0, test=0, image_px=SOURCE_PX)
    images, reports = [], []
    for image, findings, impression in samples(studies, "train"):
        check()
        images.append(to_batch([image], size_px=size_px))
        reports.append(report_text(findings, impression))
    import torch

    return torch.cat(images), reports


def reporter(
    leads: bool, check: Callable[[], None], *, total: int, unit: str, start: int = 0
) -> Callable[[int, float], None]:
    """Return what `fit` calls after each step: progress, a line in the log now and then, and the orphan's end."""

    def after(step: int, loss: float) -> None:
        check()
        if leads:
            progress.report(start + step, total, unit=unit, loss=loss)
        if step % 100 == 0:
            log.info("%s: %d of %d, loss %.4f", unit, start + step, total, loss)

    return after
