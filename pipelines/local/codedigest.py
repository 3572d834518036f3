"""A digest of the code that can change what a stage makes: locally, it takes the place of the image digest.

It covers the source files that the stage's module imports (transitively, inside `valor`, function-level imports
included; grimp reads the syntax tree), package data beside them, and the installed versions of the libraries
that compute. It leaves out what the entry `valor.stages` itself imports: tracking and progress record a stage's
work and cannot change it. What a module reaches by a computed name is in `REACHED_BY_NAME`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from valor.artifacts import digest_value
from valor.recipe import SECTION_OF_STAGE

LIBRARIES = (
    "accelerate", "datasets", "defusedxml", "great-expectations", "jinja2", "numpy", "pandas", "peft", "pillow",
    "pyarrow", "pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm", "rouge-score",
    "sacrebleu", "safetensors", "scikit-learn", "scipy", "tokenizers", "torch", "transformers", "trl",
)  # fmt: skip
REACHED_BY_NAME = {"valor.data.source": "valor.data.adapters", "valor.stages.register": "valor.serving"}
"""Modules that import or read members of a package by a computed name: all of the package counts."""
_ENTRY = "valor.stages"
_DATA_SUFFIXES = {".json", ".html", ".css", ".js", ".yaml"}


def code_digest(stage: str) -> str:
    """Return the sha256 (hex) of a stage's code and of the libraries under it."""
    if stage not in SECTION_OF_STAGE:
        return digest_value([stage])
    return digest_value({"files": _file_digests(imported_modules(stage)), "libraries": _versions()})


def imported_modules(stage: str) -> set[str]:
    """Return the modules of `valor` that a stage's module imports, itself and their packages included."""
    graph = _graph()
    start = f"{_ENTRY}.{stage}"
    if start not in graph.modules:
        return {_ENTRY, "valor"}
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        if module != _ENTRY:
            waiting.extend(graph.find_modules_directly_imported_by(module))
        if module in REACHED_BY_NAME:
            waiting.extend(graph.find_descendants(REACHED_BY_NAME[module]))
    return found


@functools.cache
def _graph():  # type: ignore[no-untyped-def]
    import grimp

    return grimp.build_graph("valor", cache_dir=None)


def _file_digests(modules: set[str]) -> list[list[str]]:
    """Return sorted (path inside the package, sha256) of the modules' files and of the data beside them."""
    root = Path(str(importlib.util.find_spec("valor").origin)).parent.parent  # type: ignore[union-attr]
    files: set[Path] = set()
    for module in modules:
        base = root.joinpath(*module.split("."))
        source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        files.add(source)
        files |= {path for path in source.parent.iterdir() if path.suffix in _DATA_SUFFIXES}
    return sorted([path.relative_to(root).as_posix(), _file_digest(path)] for path in files)


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    return versions
