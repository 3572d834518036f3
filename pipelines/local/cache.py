"""Reuse by content: KFP's local cache, keyed by the digests of the inputs and not by their paths.

KFP's own key takes an artifact's path, which is new in every run, and the places where data lies. Here an artifact
counts by the digest in its metadata, and places and labels of a run do not count at all; the source's identity is
in the shard's digest, the champion's in `checkpoint_digest`, and the code's in the image string (`codedigest`).
"""

import functools
import threading
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.local import cache as kfp_cache

from components.entry import task_label
from valor import progress
from valor.artifacts import has_its_files, read_stamp
from valor.errors import IntegrityError, UserError
from valor.tracking import store

PLACES = frozenset({"run", "root", "annotations_root", "checkpoint_uri", "champion_uri"})
"""Arguments that say where something is, or which run asks for it."""


class DigestCache(kfp_cache.LocalCache):
    """KFP's file cache with content keys; it also reports every reuse as a progress event."""

    def __init__(self, cache_root: str) -> None:
        super().__init__(cache_root)
        self._labels: dict[str, str] = {}
        self._labels_lock = threading.Lock()

    @staticmethod
    def _serialize_value_for_key(value: Any) -> Any:
        if isinstance(value, dsl.Artifact) and value.metadata.get("digest"):
            return {"digest": value.metadata["digest"]}
        if isinstance(value, list):
            return [DigestCache._serialize_value_for_key(member) for member in value]
        if isinstance(value, dict):
            return {name: DigestCache._serialize_value_for_key(member) for name, member in value.items()}
        return kfp_cache.LocalCache._serialize_value_for_key(value)

    def compute_key(self, component_name: str, image: str, full_command: list[str], arguments: dict[str, Any],
                    env_vars: dict[str, str] | None = None, custom_cache_key: str | None = None) -> str:  # fmt: skip
        """Return the key of a task, and remember which task asked."""
        identity = {name: value for name, value in arguments.items() if name not in PLACES}
        key = super().compute_key(component_name, image, full_command, identity, env_vars, custom_cache_key)
        with self._labels_lock:
            self._labels[key] = task_label(arguments.get("task", component_name), arguments.get("shard", ""))
        return key

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the outputs of an earlier task, or None: there is none, its files changed, MLflow lost its run."""
        outputs = super().get(key)
        if outputs is None or not all(_is_whole(value) for value in outputs.values()):
            return None
        paths = {name: value.path for name, value in outputs.items() if isinstance(value, dsl.Artifact)}
        values = {name: value for name, value in outputs.items() if isinstance(value, str)}
        with self._labels_lock:
            label = self._labels[key]
        progress.emit("reuse", task=label, paths=paths, values=values)
        return outputs


def install(cache_root: Path) -> None:
    """Make kfp.local use a DigestCache; call it after `kfp.local.init(enable_caching=True, cache_root=...)`."""
    kfp_cache._cache_singleton = DigestCache(str(cache_root))
    kfp_cache._cache_singleton_root = str(cache_root)


def _is_recorded(run_id: str) -> bool:
    """Tell whether MLflow knows who made an output: without that a version made from it has no lineage."""
    return not store.enabled() or (bool(run_id) and _has_run(run_id))


_has_run = functools.cache(store.has_run)


def _is_whole(value: Any) -> bool:
    """Tell whether an output has its metadata's digest and its stamp's files; values and metrics always have."""
    if isinstance(value, list):
        return all(_is_whole(member) for member in value)
    if not isinstance(value, dsl.Artifact) or not value.metadata.get("digest"):
        return True
    try:
        stamp = read_stamp(Path(value.path))
        whole = stamp["digest"] == value.metadata["digest"] and has_its_files(Path(value.path), stamp)
        return whole and _is_recorded(stamp.get("producer_run", ""))
    except (IntegrityError, UserError):
        return False
