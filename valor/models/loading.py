"""Loading and saving the vision-language model, and the one way from a dataset image to its pixels.

Works with checkpoints of the LLaVA family on the PIL image processors. Qwen-VL goes through the same calls, but its
video processor needs torchvision, which the CPU tests do not have.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.data.manifest import Study, first_pixels
from valor.errors import IntegrityError, UserError, ValorError, shown

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

PROMPT_FILE = "prompt.json"
"""A content file and not part of `valor.json`: the prompt is in the checkpoint's digest."""


def load_policy(path: Path, *, verify: bool = True) -> tuple[Any, Any]:
    """Load a checkpoint artifact.

    Args:
        path: a directory with what `save_pretrained` writes and `valor.json`.
        verify: compare the weights with the sha256 in `valor.json`.

    Returns:
        The model in evaluation mode and its processor, padding on the left.

    Raises:
        IntegrityError: the weights are not those that `valor.json` names, or a file beside them is damaged.
        UserError: the directory holds no image-text-to-text model, or as for `load_processor`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    artifacts.load_checkpoint_info(path, verify=verify)
    with damage_is_an_integrity_error(path, "configuration"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(
            f"{path}: model_type is {config.model_type!r}, which reads no image; the base must be an image-text-to-text"
            " model such as llava"
        )
    # transformers' type hints do not know that `output_loading_info` returns a pair.
    loader: Any = AutoModelForImageTextToText
    with damage_is_an_integrity_error(path, "weights"):
        model, info = loader.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers only warns about weights that are missing and draws them at random.
    missing = sorted(info["missing_keys"])
    if missing:
        raise IntegrityError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch it again")
    return model.eval(), load_processor(path)


def load_processor(path: Path) -> Any:
    """Load a checkpoint's processor, padding on the left, and see that its prompt asks about one image.

    Raises:
        UserError: a package that it needs is not installed, it has no chat template, or prompt and template ask about
            no image or several.
        IntegrityError: a file is damaged.
    """
    from transformers import AutoProcessor

    with damage_is_an_integrity_error(path, "processor"):
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
    if not processor.chat_template:
        raise UserError(f"{path}: has no chat template; save one beside the base (processor.chat_template)")
    with damage_is_an_integrity_error(path, "chat template"):
        text = question(processor, prompt_of(path))
    if (images := text.count(processor.image_token)) != 1:
        raise UserError(
            f"{path}: prompt and chat template make a question on {images} images, expected 1: set a models.prompt "
            f"without {processor.image_token!r}, and a template that has it once"
        )
    return processor


@contextlib.contextmanager
def damage_is_an_integrity_error(path: Path, part: str) -> Iterator[None]:
    """Name the checkpoint and its part where transformers fails on a file: it raises whatever the damage leads to.

    What it says stays out of the message: it may quote a tokenizer, which has learned from reports.
    """
    try:
        yield
    except (ValorError, MemoryError):
        raise
    except ImportError as error:
        name = f" ({error.name})" if error.name else ""
        raise UserError(
            f"{path}: its {part} needs a package that is not installed{name}; the traceback names it"
        ) from error
    except Exception as error:
        # Of torch's own errors only the one that tells of other shapes is the file's: a full device is not. What the
        # system says of a file has a number, which safetensors writes into its text.
        of_torch = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error)
        of_system = getattr(error, "errno", None) is not None or "(os error " in str(error)
        if of_torch or of_system:
            raise
        raise IntegrityError(
            f"{path}: its {part} cannot be loaded ({type(error).__name__}); fetch or train the checkpoint again"
        ) from error


def fastest_device() -> str:
    """Return where a model answers fastest: this process's `cuda` device, or `cpu` where there is none.

    By rank, since the trainer sets the current device only once it is built: an expert loaded before would share the
    first GPU with those of all other processes.
    """
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def save_policy(
    model: Any,
    processor: Any,
    path: Path,
    *,
    stage: str,
    parents: Mapping[str, str],
    prompt: str,
    weights: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Write a complete checkpoint (weights, processor, generation config, prompt, `valor.json`) and return its info.

    `weights` is the whole state dict of a model that holds only its share of it.
    """
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # How the last call padded and cut would be saved too, and a resumed stage may have made none.
        backend.no_padding()
        backend.no_truncation()
    with artifacts.full_disk_is_a_resource_error(path):
        model.save_pretrained(path, state_dict=weights)
        processor.save_pretrained(path)
    write_prompt(path, prompt)
    return artifacts.write_checkpoint_info(path, stage=stage, parents=parents, **fields)


def write_prompt(path: Path, prompt: str) -> None:
    """Write the prompt beside a checkpoint's weights."""
    artifacts.write_json(path / PROMPT_FILE, {"prompt": prompt})


def prompt_of(path: Path) -> str:
    """Return the prompt that a checkpoint was trained with."""
    prompt = artifacts.read_json(path / PROMPT_FILE).get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise IntegrityError(f"{path / PROMPT_FILE}: prompt is {shown(repr(prompt))}, expected a text; fetch it again")
    return prompt


def messages(prompt: str) -> list[dict[str, Any]]:
    """Return the conversation that asks for a report on one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def question(processor: Any, prompt: str) -> str:
    """Return the text that asks for a report on one image, as the chat template renders it; the report follows it."""
    return processor.apply_chat_template(messages(prompt), add_generation_prompt=True)


def pixel_size(processor: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels that the image processor hands to the model."""
    image_processor = processor.image_processor
    for size in (getattr(image_processor, "crop_size", None), image_processor.size):
        if size and size.get("height"):
            return int(size["height"]), int(size["width"])
        if size and size.get("shortest_edge"):
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise UserError(f"{type(image_processor).__name__}: has neither crop_size nor size with a height")


def square_box(height: int, width: int) -> tuple[float, float, float, float]:
    """Return the central square of an image as (x0, y0, x1, y1) fractions: what the model is shown."""
    side = min(height, width)
    x0, y0 = (width - side) / 2 / width, (height - side) / 2 / height
    return x0, y0, 1 - x0, 1 - y0


def fit_pixels(pixels: "np.ndarray", processor: Any) -> "Image":
    """Return (H, W) uint8 as an RGB image of exactly the model's size, from the central square.

    The processor then has nothing left to resize, however often it is called.
    """
    from PIL import Image

    height, width = pixels.shape
    x0, y0, x1, y1 = square_box(height, width)
    rows, columns = pixel_size(processor)
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    return Image.fromarray(pixels).resize((columns, rows), Image.Resampling.LANCZOS, box=box).convert("RGB")


def model_pixels(study: Study, processor: Any) -> "Image":
    """Return a study's first image at the model's size; see `first_pixels` for what it raises."""
    return fit_pixels(first_pixels(study), processor)
