"""Reports for images from outside: bytes of a DICOM or PNG file in, text out, on the pixels that training used.

A checkpoint is taken from the model store and verified against its digest before a weight is read. Greedy decoding,
so the same bytes always give the same report. It leaves out batching across requests and limits on concurrency and
body size, which belong to the server and the ingress in front of it.
"""

import base64
import binascii
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts, storage
from valor.errors import IntegrityError, UserError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
BATCH_SIZE = 8
MAX_NEW_TOKENS = 128
"""Used where the checkpoint does not say what it was trained with."""


class Reporter:
    """A verified checkpoint, ready to write reports.

    Args:
        checkpoint: a local, verified directory.
        image_px: longer side in pixels that the dataset's images were shrunk to; 0 leaves them as they come.
    """

    def __init__(self, checkpoint: Path, *, image_px: int):
        from valor.models.loading import load_policy, prompt_of

        info = artifacts.load_checkpoint_info(checkpoint, verify=False)
        self._model, self._processor = load_policy(checkpoint)
        self._prompt = prompt_of(checkpoint)
        self._max_new_tokens = int((info.get("settings") or {}).get("max_new_tokens") or MAX_NEW_TOKENS)
        self._image_px = image_px

    @classmethod
    def open(cls, checkpoint_uri: str, *, sha256: str, image_px: int = 0) -> "Reporter":
        """Load a checkpoint from the model store.

        Args:
            checkpoint_uri: a directory or gs://, as `register` wrote it.
            sha256: the digest that the registered version names.
            image_px: see the class.

        Raises:
            IntegrityError: a file is altered or missing, or the directory is not the one the version names.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if storage.is_remote(checkpoint_uri):
                folder = storage.get_dir(checkpoint_uri, Path(scratch) / "checkpoint")
                found = artifacts.digest_dir(folder)
            else:
                folder = Path(checkpoint_uri)
                found = artifacts.digest_manifest(storage.verify_dir(folder))
            if found != sha256:
                raise IntegrityError(
                    f"{checkpoint_uri}: its digest is {found}, the registered version names {sha256}; the model store "
                    "was altered, restore it from a backup"
                )
            return cls(folder, image_px=image_px)

    def reports(self, images: Sequence[bytes]) -> list[str]:
        """Return one report per image.

        Args:
            images: bytes of DICOM (CR or DX) or PNG files, grayscale; a PNG shows dense tissue bright.

        Raises:
            UserError: an image cannot be read; names it by its place in the list, never by content.
        """
        from valor.models.generate import generate_reports
        from valor.models.loading import fit_pixels

        pixels = [fit_pixels(self._pixels(data, place), self._processor) for place, data in enumerate(images)]
        generated = generate_reports(
            self._model,
            self._processor,
            pixels,
            prompt=self._prompt,
            max_new_tokens=self._max_new_tokens,
            batch_size=BATCH_SIZE,
        )
        return [report.text for report in generated]

    def _pixels(self, data: bytes, place: int) -> "np.ndarray":
        """Return (h, w) uint8, bright is dense, as ingest would have made it."""
        from valor.data.dicom import read_dicom
        from valor.data.images import read_raster, shrink
        from valor.data.manifest import Rejected

        try:
            is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
            radiograph = read_raster(data) if is_png else read_dicom(data)[0]
        except Rejected as error:
            raise UserError(f"image {place}: {error}; send a grayscale chest DICOM (CR or DX) or PNG") from None
        return shrink(radiograph, image_px=self._image_px or max(radiograph.pixels.shape))[0]


def decode_base64(text: Any, place: int) -> bytes:
    """Return the bytes of one base64 value; raise UserError that names its place where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise UserError(f"image {place}: not base64; send the file's bytes in standard base64") from None
