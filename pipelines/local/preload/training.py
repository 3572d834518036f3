"""Imported by the ancestor of tasks that train or run a model."""

from pipelines.local import preload

preload.load(preload.TRAINING)
