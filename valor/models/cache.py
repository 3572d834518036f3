"""A cache of keys and values with room for the tokens to come.

transformers' dynamic layer copies all that it holds for every new token, on a CPU over a quarter of the time of
sampling; its static one attends to the whole room. Here a new token is written behind the others, and what the model
sees is a view that ends with it: the same numbers, bit by bit.
"""

from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from torch import Tensor

ROOM = 64
"""Tokens that fit behind the present ones before all are copied again."""


def roomy_cache(model: Any) -> DynamicCache:
    """Return an empty cache for a model's generation; not for passes that a gradient flows through.

    Layers that are more than a list of keys and values (sliding windows, say) stay transformers' own.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, tokens, features), as views of the larger tensors they lie in."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: "Tensor", value_states: "Tensor", *_: Any, **__: Any) -> tuple["Tensor", "Tensor"]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._behind("keys", self.keys, key_states)
        self.values = self._behind("values", self.values, value_states)
        return self.keys, self.values

    def _behind(self, name: str, held: Any, new: "Tensor") -> "Tensor":
        start = held.size(-2) if held.numel() else 0
        end = start + new.size(-2)
        room, view = self._rooms.get(name, (None, None))
        # Whoever reorders, repeats or crops the batch puts another tensor in the view's place.
        if room is None or view is not held or end > room.size(-2):
            room = new.new_empty(*new.shape[:-2], end + ROOM, new.size(-1))
            if start:
                room[..., :start, :] = held
        room[..., start:end, :] = new
        self._rooms[name] = room, room[..., :end, :]
        return self._rooms[name][1]
