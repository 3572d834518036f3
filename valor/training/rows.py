"""Training rows for TRL: conversational prompts with an image, the reference report, the study's id.

Each image is decoded once and kept at the model's size, 8-bit grayscale: in memory, or, above a limit, in a file
that the system pages in. TRL asks for a row `num_generations` times per step, so a row must cost next to nothing.
Training sees the `train` split's images and reports, and nothing else of a study.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.data.manifest import Study, choose_studies, first_pixels, in_share, read_studies
from valor.errors import DataError, UserError
from valor.models.loading import messages, model_pixels

MEMORY_LIMIT_BYTES = 1 << 30
_SPECIAL = 8


def training_studies(dataset: Path, *, studies: int, seed: int, share: tuple[float, float] = (0.0, 1.0)) -> list[Study]:
    """Return the studies to train on: all, or `studies` of them drawn by `seed`, sorted by study_id.

    Args:
        dataset: the dataset artifact.
        studies: how many; 0 means all.
        seed: of the draw.
        share: only subjects whose hash, in [0, 1), lies from the first bound up to the second.

    Raises:
        UserError: there are no training studies, or fewer than asked for.
    """
    every = in_share(read_studies(dataset, split="train"), share)
    if not every:
        part = "" if share == (0.0, 1.0) else f" with a subject in share {share[0]:g} to {share[1]:g}"
        raise UserError(f"{dataset}: no study in split 'train'{part}; training needs some")
    if studies > len(every):
        raise UserError(f"{dataset}: has {len(every)} training studies, the recipe asks for studies={studies}")
    return choose_studies(every, studies=studies, seed=seed)


def require_no_image_token(studies: Sequence[Study], processor: Any) -> None:
    """Raise DataError where a report holds the processor's image token: it would look for an image to each."""
    for study in studies:
        if processor.image_token in study.text:
            raise DataError(
                f"study {study.study_id}: its report holds {processor.image_token!r}, which stands for an image "
                "here; take it out of the report and ingest the data again"
            )


def require_reports_fit(studies: Sequence[Study], processor: Any, *, room: int) -> None:
    """Raise DataError where a report has more than `room` tokens, what is left of a model's context."""
    for study in studies:
        # A token has at least one byte, but for a few special ones: next to no report needs to be counted.
        if len(study.text.encode()) + _SPECIAL <= room:
            continue
        tokens = len(processor.tokenizer(study.text)["input_ids"])
        if tokens > room:
            raise DataError(
                f"study {study.study_id}: its report has {tokens} tokens, and the model's context leaves {room} beside "
                "prompt and image; shorten the report and ingest the data again"
            )


class Pixels:
    """The studies' images at the model's size: (N, H, W) uint8, bright is dense.

    Raises:
        DataError: a study has no image, or one that cannot be decoded.
        ResourceError: the folder of temporary files has no room for them.
    """

    def __init__(self, studies: Sequence[Study], processor: Any, *, limit_bytes: int = MEMORY_LIMIT_BYTES):
        import numpy as np

        first = np.asarray(model_pixels(studies[0], processor).convert("L"))
        shape = (len(studies), *first.shape)
        if int(np.prod(shape)) <= limit_bytes:
            self._gray = np.empty(shape, np.uint8)
        else:
            # The mapping keeps the nameless file open for as long as it is needed.
            folder = Path(tempfile.gettempdir())
            with artifacts.full_disk_is_a_resource_error(folder), tempfile.TemporaryFile(dir=folder) as file:
                # Written through a mapping, a full disk would be no error but SIGBUS.
                os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
                self._gray = np.memmap(file, np.uint8, "w+", shape=shape)
        for i, study in enumerate(studies):
            self._gray[i] = np.asarray(model_pixels(study, processor).convert("L"))

    def image(self, i: int) -> Any:
        """Return image `i` as RGB."""
        from PIL import Image

        return Image.fromarray(self._gray[i]).convert("RGB")


def sft_rows(studies: Sequence[Study], processor: Any, *, prompt: str) -> Any:
    """Return a `datasets.Dataset` of prompt, completion and image: loss falls on the report alone.

    Raises:
        DataError: an image cannot be decoded.
    """
    pixels = Pixels(studies, processor)
    return _dataset(
        len(studies),
        lambda i: {
            "prompt": messages(prompt),
            "completion": [{"role": "assistant", "content": studies[i].text}],
            "image": pixels.image(i),
        },
    )


def grpo_rows(
    studies: Sequence[Study],
    processor: Any,
    *,
    prompt: str,
    embed: Callable[[list[Any]], Any] | None = None,
    seen: Sequence[int] = (),
) -> Any:
    """Return a `datasets.Dataset` of prompt, image, study_id and either `reference` or `image_embed`, (D,) float32.

    Args:
        studies: the training studies.
        processor: the policy's processor.
        prompt: the question.
        embed: stage 2's expert, (H, W) uint8 images to (N, D); its rows carry no reference report, so no reward can
            read one. An image is embedded when it is first asked for.
        seen: whose image the expert sees for each study; () means its own.
    """
    pixels = Pixels(studies, processor)
    embeds: dict[int, Any] = {}

    def row(i: int) -> dict[str, Any]:
        fields = {"prompt": messages(prompt), "image": pixels.image(i), "study_id": studies[i].study_id}
        if embed is None:
            return {**fields, "reference": studies[i].text}
        shown = seen[i] if seen else i
        if shown not in embeds:
            embeds[shown] = embed([first_pixels(studies[shown])])[0].numpy()
        return {**fields, "image_embed": embeds[shown]}

    return _dataset(len(studies), row)


class _Rows:
    """Makes the rows of a batch of row numbers, for `datasets.Dataset.with_transform`.

    `datasets` pickles a transform to tell cached tables apart, of which there are none here, and with it would go all
    that rows are made from: every image, and in stage 2 the expert. So its state is none, and a copy is itself.
    """

    def __init__(self, row: Callable[[int], dict[str, Any]]):
        self._row = row

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = [self._row(i) for i in batch["row"]]
        return {key: [one[key] for one in made] for key in made[0]}

    def __getstate__(self) -> None:
        return None

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Rows":
        return self


def _dataset(length: int, row: Callable[[int], dict[str, Any]]) -> Any:
    """Return a `datasets.Dataset` whose rows are made when they are read."""
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(length))}).with_transform(_Rows(row))
