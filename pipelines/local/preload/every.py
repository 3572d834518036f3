"""Imported by the ancestor of tasks that need no torch."""

from pipelines.local import preload

preload.load(preload.EVERY)
