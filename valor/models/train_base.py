"""The phantom's base: a tiny LLaVA whose tower has seen radiographs and whose language part has read reports.

The two have not met: joining them is what SFT is for. All subjects are the base's own (`models.phantom_base.seed`).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from valor import artifacts, progress
from valor.data.manifest import report_text
from valor.models.loading import messages, save_policy
from valor.models.optimise import batches, fit
from valor.models.tiny import build_llava
from valor.models.tower import pretrain, to_batch
from valor.recipe import ModelSettings, PhantomStudies

log = logging.getLogger(__name__)

SOURCE_PX = 192
"""Studies are drawn at this size and shrunk to the model's, as ingest and the loader do."""
_LANGUAGE_BATCH = 16


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
    reports: Sequence[str],
    *,
    prompt: str,
    steps: int,
    seed: int,
    after: Callable[[int, float], None] | None = None,
) -> None:
    """Teach a LLaVA's language model to write reports after the prompt, the image's place left out."""
    import torch
    from torch.nn import functional

    tokenizer = processor.tokenizer
    asked = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
    asked = asked.replace(processor.image_token, "")
    texts = [asked + report + tokenizer.eos_token for report in reports]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    start = len(tokenizer(asked)["input_ids"])
    language, head = model.model.language_model, model.lm_head
    order = batches(len(reports), _LANGUAGE_BATCH, seed=seed)

    def loss_of(_: int) -> "torch.Tensor":
        rows = next(order)
        longest = int(mask[rows].sum(dim=1).max())
        own, seen = ids[rows, :longest], mask[rows, :longest]
        hidden = language(input_ids=own, attention_mask=seen).last_hidden_state
        wanted = own.masked_fill(seen == 0, -100)[:, start:]
        return functional.cross_entropy(head(hidden[:, start - 1 : -1]).transpose(1, 2), wanted)

    language.train()
    fit([language], loss_of, steps=steps, muon_lr=0.01, after=after)
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
