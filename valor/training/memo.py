"""The frozen vision tower, run once per image and not once per completion, generation and loss.

GRPO hands the model each image `num_generations` times, in generation and again in the loss, and SFT hands it over
in every epoch; the tower's answer never changes. The memo wraps `model.model.get_image_features` of the LLaVA family:
the tower's features come from a bounded store, the projector (which may be trained) runs once per unique image of the
batch. Left out: models without `vision_tower` and `multi_modal_projector` (Qwen-VL's merger sits inside its tower) and
images of several sizes; they run as they are. So does a tower of which each of several processes holds a share
(ZeRO-3): a hit in one and a miss in another would leave the second waiting for the first. With FSDP2 the tower stays
whole (`valor.training.processes`).
"""

import functools
import logging
from collections import OrderedDict
from typing import Any

from valor.training.prompts import digests

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 1 << 30


class TowerMemo:
    """The features that a frozen tower hands to the projector, by image content.

    Attributes:
        hits, misses: images served from the store, and images that ran through the tower.
    """

    def __init__(self, model: Any, *, limit_bytes: int = DEFAULT_LIMIT_BYTES):
        self._inner = model.model
        self._original = self._inner.get_image_features
        self._limit_bytes, self._bytes = limit_bytes, 0
        self._store: OrderedDict[tuple, Any] = OrderedDict()
        self._sharded: bool | None = None
        self._told = False
        self.hits = self.misses = 0

    @classmethod
    def attach(cls, model: Any, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> "TowerMemo | None":
        """Put a memo around a model's image features; None where the tower trains or the architecture has none."""
        inner: Any = getattr(model, "model", None)
        if not (hasattr(inner, "vision_tower") and hasattr(inner, "multi_modal_projector")):
            log.info("%s: not of the LLaVA family; its vision tower runs for every completion", type(model).__name__)
            return None
        if any(parameter.requires_grad for parameter in inner.vision_tower.parameters()):
            log.info("%s: its vision tower trains, so it runs for every completion", type(model).__name__)
            return None
        memo = cls(model, limit_bytes=limit_bytes)

        # `generate` filters its arguments by the signature, which wraps() keeps.
        @functools.wraps(memo._original)
        def get_image_features(pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
            return memo._image_features(pixel_values, *args, **kwargs)

        inner.get_image_features = get_image_features
        return memo

    def detach(self) -> None:
        """Give the model its own function back and drop the features."""
        self._inner.__dict__.pop("get_image_features", None)
        self._store.clear()
        self._bytes = 0

    def _image_features(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        plain = pixel_values.ndim == 4 and kwargs.get("image_sizes") is None and kwargs.get("return_dict", True)
        asked = any(kwargs.get(f"output_{what}") for what in ("hidden_states", "attentions"))
        if args or asked or not plain:
            self._say_left_out(pixel_values)
            return self._original(pixel_values, *args, **kwargs)
        if self._tower_is_sharded():
            return self._original(pixel_values, *args, **kwargs)
        keys = _keys(pixel_values, kwargs)
        place: dict[tuple, int] = {}
        features: list[Any] = []
        for row, key in enumerate(keys):
            if key not in place:
                place[key] = len(features)
                features.append(self._features(key, pixel_values[row : row + 1], kwargs))
        projected = self._inner.multi_modal_projector(torch.cat(features))
        rows: Any = [projected[place[key]] for key in keys]
        return BaseModelOutputWithPooling(pooler_output=rows)

    def _say_left_out(self, pixel_values: Any) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "%s: hands over its images, shape %s, in a way that is not LLaVA's; its vision tower runs for every "
                "completion",
                type(self._inner).__name__,
                tuple(pixel_values.shape),
            )

    def _tower_is_sharded(self) -> bool:
        """Tell, from the first image on, whether this process holds only a share of the tower; all find the same."""
        if self._sharded is None:
            self._sharded = is_sharded(self._inner.vision_tower)
            if self._sharded:
                log.warning(
                    "the vision tower is shared out over the processes, so it runs again for each image of each batch; "
                    "strategy ddp or fsdp2 keeps it whole and runs it once per image"
                )
        return self._sharded

    def _features(self, key: tuple, pixel_values: Any, kwargs: dict[str, Any]) -> Any:
        """Return the projector's input for one image, (1, tokens, width)."""
        if key in self._store:
            self.hits += 1
            self._store.move_to_end(key)
            return self._store[key]
        self.misses += 1
        features = self._run_tower(pixel_values, kwargs)
        self._store[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._limit_bytes and len(self._store) > 1:
            self._bytes -= self._store.popitem(last=False)[1].nbytes
        return features

    def _run_tower(self, pixel_values: Any, kwargs: dict[str, Any]) -> Any:
        """Run the tower alone on one image.

        One image at a time: a matrix product's rounding depends on its batch, and after a resume the store is
        refilled in other batches than before.
        """
        import torch

        caught = []
        projector, tower = self._inner.multi_modal_projector, self._inner.vision_tower
        hook = projector.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        training = tower.training
        tower.eval()
        try:
            # Features made in inference mode could not enter a loss later.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._original(pixel_values.clone(), **kwargs)
        finally:
            hook.remove()
            tower.train(training)
        return caught[0].detach()


def is_sharded(module: Any) -> bool:
    """Tell whether a parameter is a DTensor (FSDP2) or a partition of DeepSpeed's (ZeRO-3)."""
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in module.parameters())


def _keys(pixel_values: Any, kwargs: dict[str, Any]) -> list[tuple]:
    """Return a key per image: its content, and everything else that the tower's answer depends on."""
    import torch

    device = pixel_values.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    layer, strategy = kwargs.get("vision_feature_layer"), kwargs.get("vision_feature_select_strategy")
    how = (str(device), str(pixel_values.dtype), tuple(pixel_values.shape[1:]), autocast, dtype, str(layer), strategy)
    return [(digest, *how) for digest in digests(pixel_values)]
