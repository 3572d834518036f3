"""The expert: a frozen dual encoder (CLIP, SigLIP) that says how well a report fits an image.

A text encoder reads at most 77 tokens (SigLIP 64), less than many reports and more than nearly every sentence, so
reports are scored sentence by sentence. The expert's gate and calibration lie beside the weights in
`expert_gate.json` (`valor.models.expert_gate`, `valor.models.gate_file`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.errors import IntegrityError, UserError
from valor.models import gate_file
from valor.models.loading import damage_is_an_integrity_error, fastest_device, fit_pixels
from valor.models.sentences import sentences

if TYPE_CHECKING:
    import numpy as np
    import torch

BATCH = 64
"""Images or texts in one pass, where nothing hangs on the last bit."""
_BESIDE = {
    "tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt", "*.model"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
_TEXT_MEMO = 20_000
"""Sentences whose embeddings are kept; reports of one group say much the same."""


def require_dual_encoder(path: Path) -> None:
    """Raise UserError unless the checkpoint embeds both images and texts, and has what prepares either."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model configuration that transformers knows ({type(error).__name__})") from None
    kind: Any = AutoModel._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, list | tuple) else kind
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(kind, name)]
    if missing:
        raise UserError(
            f"{path}: model_type is {config.model_type!r}, which lacks {' and '.join(missing)}; the expert must be a "
            "dual encoder of images and texts such as clip or siglip"
        )
    # transformers would make an empty tokenizer of its own and say nothing.
    for part, patterns in _BESIDE.items():
        if not any(file for pattern in patterns for file in path.glob(pattern)):
            raise UserError(f"{path}: no {part} ({' or '.join(patterns)}); save it beside the weights")


class Expert:
    """A frozen dual encoder.

    Attributes:
        gate: the content of `expert_gate.json`; {"measured": False} where the expert came without one.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, *, gate: dict[str, Any]):
        self.model, self.tokenizer, self.image_processor = (
            model.eval().requires_grad_(False),
            tokenizer,
            image_processor,
        )
        self.gate = gate
        self._texts: dict[str, torch.Tensor] = {}
        self._width = 0

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> "Expert":
        """Load a checkpoint directory in float32, onto the accelerator where there is one; embeddings come to the CPU.

        Raises:
            UserError: the checkpoint is no dual encoder, or lacks its tokenizer or image processor.
            IntegrityError: weights are missing or are not those that `valor.json` names, or a file is damaged.
        """
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        require_dual_encoder(path)
        artifacts.load_checkpoint_info(path, verify=verify)
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with damage_is_an_integrity_error(path, "weights"):
            model, info = AutoModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
            )
        if info["missing_keys"]:
            name = sorted(info["missing_keys"])[0]
            raise IntegrityError(
                f"{path}: {len(info['missing_keys'])} tensors are missing, the first is {name}; fetch it again"
            )
        gate = gate_file.read(path)
        with damage_is_an_integrity_error(path, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        if tokenizer.pad_token is None:
            raise UserError(f"{path}: its tokenizer names no pad_token, so sentences cannot share a batch; set one")
        with damage_is_an_integrity_error(path, "image processor"):
            image_processor = AutoImageProcessor.from_pretrained(path, **safe)
        return cls(model.to(fastest_device()), tokenizer, image_processor, gate=gate)

    def require_fit(self, path: Path) -> None:
        """Embed an image and a text: parts that do not belong together fail here, not hours later by a shape.

        Raises:
            UserError: the image processor or the tokenizer of the checkpoint at `path` is not its weights' own.
        """
        import numpy as np
        import torch

        tokens, embedded = len(self.tokenizer), self.model.config.text_config.vocab_size
        if tokens > embedded:
            raise UserError(
                f"{path}: its tokenizer does not fit its weights ({tokens} tokens, of which they embed {embedded}); "
                "save both from one model"
            )
        parts: dict[str, Callable[[], torch.Tensor]] = {
            "image processor": lambda: self.embed_images([np.zeros((32, 32), np.uint8)]),
            "tokenizer": lambda: self.embed_texts(["normal"]),
        }
        for part, embed in parts.items():
            try:
                embeds = embed()
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}: its {part} does not fit its weights ({type(error).__name__}); save both from one model"
                ) from error
            if not embeds.any():
                raise UserError(f"{path}: the embedding behind its {part} is zero, so it tells nothing apart")

    def embed_images(self, images: Sequence["np.ndarray"]) -> "torch.Tensor":
        """Embed (H, W) uint8 images, bright is dense, each cut to its central square; return (N, D) float32, norm 1."""
        import torch

        sizes = SimpleNamespace(image_processor=self.image_processor)
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = [fit_pixels(image, sizes) for image in images[start : start + BATCH]]
                pixels = self.image_processor(images=batch, return_tensors="pt")["pixel_values"]
                rows.append(
                    self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output.cpu()
                )
        return _unit(torch.cat(rows)) if rows else torch.zeros(0, self._dim())

    def embed_texts(self, texts: Sequence[str], *, batch: int = 1) -> "torch.Tensor":
        """Embed sentences (cut at the encoder's limit); return (N, D) float32, norm 1. Embeddings are kept by text.

        Args:
            texts: N sentences.
            batch: how many pass at once. One by one an embedding depends on its text alone, bit by bit: which texts are
                new, and so share a batch, is another question in a stage that was stopped and continued. Where
                thousands are read once, `BATCH` takes a fifth of the time.
        """
        import torch

        if len(self._texts) > _TEXT_MEMO:
            self._texts.clear()
        new = sorted({text for text in texts if text not in self._texts}, key=len)
        with torch.inference_mode():
            for start in range(0, len(new), batch):
                part = new[start : start + batch]
                embeds = _unit(self.model.get_text_features(**self._tokens(part)).pooler_output.cpu())
                self._texts.update(zip(part, embeds, strict=True))
        return torch.stack([self._texts[text] for text in texts]) if texts else torch.zeros(0, self._dim())

    def paper_similarity(self, image_embeds: "torch.Tensor", reports: Sequence[str], *, batch: int = 1) -> list[float]:
        """Return per report the mean cosine of its sentences with the image, in [-1, 1]; nan for an empty report.

        Args:
            image_embeds: (N, D) from `embed_images`, one row per report.
            reports: N texts.
            batch: new sentences that pass at once (`embed_texts`).
        """
        split = [sentences(report) for report in reports]
        flat = self.embed_texts([sentence for parts in split for sentence in parts], batch=batch)
        similarities, start = [], 0
        for row, parts in zip(image_embeds, split, strict=True):
            own = flat[start : start + len(parts)]
            start += len(parts)
            similarities.append(float((own @ row).mean()) if parts else float("nan"))
        return similarities

    def _tokens(self, batch: list[str]) -> Any:
        text_config = self.model.config.text_config
        # SigLIP was trained with every text padded to the full length and no mask.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        encoded = self.tokenizer(
            batch,
            padding=padding,
            truncation=True,
            max_length=text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return {
            name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask") if name in encoded
        }

    def _dim(self) -> int:
        if not self._width:
            self._width = self.embed_texts(["normal"]).shape[1]
        return self._width


def _unit(rows: "torch.Tensor") -> "torch.Tensor":
    """Scale rows to norm 1.

    Raises:
        IntegrityError: an embedding is no number; as a reward it would teach nothing, and nobody would see it.
    """
    if not rows.isfinite().all():
        raise IntegrityError(
            "the expert's embeddings hold a NaN or an infinity: its weights are damaged; fetch or train it again"
        )
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
