"""The procedural chest phantom (docs/phantom.md): plan, draw, write, samples."""

from valor.data.phantom.keys import StudyKey, plan
from valor.data.phantom.layout import write
from valor.data.phantom.studies import PhantomStudy, draw, samples

__all__ = ["PhantomStudy", "StudyKey", "draw", "plan", "samples", "write"]
