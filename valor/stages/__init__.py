"""The stages, and `run`: the one way in for a test, `python -m valor STAGE`, a local KFP task and a container."""

import contextlib
import dataclasses
import importlib
import inspect
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from valor import artifacts, progress
from valor.context import Context
from valor.errors import ResourceError, UserError, ValorError
from valor.recipe import SECTION_OF_STAGE, parse_section
from valor.training.processes import node_of

STAGES = tuple(SECTION_OF_STAGE)
VERBOSE_ERRORS = "VALOR_VERBOSE_ERRORS"
"""Environment variable: 1 where an unexpected error's message may be shown, since no patient's text is in the data."""
_WITHHELD = f"(message withheld, it may quote a report; {VERBOSE_ERRORS}=1 shows it)"
Inputs = Mapping[str, "Path | list[Path]"]
_FAMILIES = {
    **dict.fromkeys(("base", "parent", "checkpoint"), "an image-text-to-text checkpoint"),
    **dict.fromkeys(("expert", "judge"), "a dual encoder"),
    **{name: f"the artifact {name}" for name in ("dataset", "evidence", "predictions", "evaluation", "verdict")},
}
"""What an input of that name takes, and what an artifact of that kind is."""


def _nothing() -> None: ...


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage returns.

    Attributes:
        metrics: numbers for MLflow and the KFP Metrics artifact.
        values: string outputs (parameters of the next tasks).
        digests: content digest per output, where the kind defines its own.
        notes: further text-free facts for the producer stamp.
        cleanup: called once the outputs are stamped and recorded: removes what a repeated try would have needed.
    """

    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cleanup: Callable[[], None] = _nothing


def run(
    stage: str,
    *,
    settings_json: str,
    context: Context,
    inputs: Inputs | None = None,
    outputs: Mapping[str, Path] | None = None,
    values: Mapping[str, str] | None = None,
) -> StageResult:
    """Run one stage with its log, progress events, MLflow child run and producer stamps.

    Args:
        stage: one of `STAGES`.
        settings_json: the stage's recipe section as JSON.
        context: places and the pipeline run's id.
        inputs: artifact directories by name (a list where the stage takes several).
        outputs: directories to make, by name.
        values: string parameters by name.

    Raises:
        UserError: a name is missing or unknown, or an output's place cannot be used; nothing has started then.
        ValorError: with the exit code that the command line returns.
    """
    from valor.tracking.runs import stage_run

    inputs, outputs, values = dict(inputs or {}), dict(outputs or {}), dict(values or {})
    progress.set_task(context.task or stage)
    with log_to_file(context.task or stage), _verdict(stage):
        progress.emit("start", stage=stage)
        settings = parse_section(stage, settings_json)
        function = function_of(stage)
        _check_names(stage, function, [*inputs, *outputs, *values])
        _check_numbers(stage, function, inputs)
        _check_outputs(stage, inputs, outputs)
        if node_of(settings).rank > 0:
            # The first node records and stamps what all of them make.
            return function(settings, **inputs, **outputs, **values, context=context)
        given = stamps_of(inputs, verify=True)
        _check_kinds(stage, given)
        parents = {name: stamp["digest"] for name, stamp in given.items()}
        with stage_run(stage, settings=settings, context=context, inputs=given, values=values) as tracked:
            result: StageResult = function(settings, **inputs, **outputs, **values, context=context)
            for path in outputs.values():
                artifacts.add_to_checkpoint_info(
                    path, code=tracked.code, producer_run=tracked.run_id, pipeline_run=context.pipeline_run
                )
            stamps = {
                name: artifacts.stamp(
                    path,
                    kind=name,
                    stage=stage,
                    digest=result.digests.get(name, ""),
                    task=context.task or stage,
                    producer_run=tracked.run_id,
                    pipeline_run=context.pipeline_run,
                    parents=parents,
                    settings_digest=artifacts.digest_value(json.loads(settings_json)),
                    code=tracked.code,
                    notes=dict(result.notes),
                )
                for name, path in outputs.items()
            }
            tracked.finish(result=result, outputs=stamps, paths=outputs)
        result.cleanup()
        progress.emit("end", metrics={k: float(v) for k, v in result.metrics.items()}, values=dict(result.values))
    return result


def function_of(stage: str) -> Callable[..., StageResult]:
    """Return the function of a stage."""
    return getattr(importlib.import_module(f"valor.stages.{stage}"), stage)


def _check_names(stage: str, function: Callable[..., StageResult], given: Sequence[str]) -> None:
    """Raise UserError where inputs, outputs and values are not, each once, what the stage's function takes."""
    own = ("settings", "context")
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name not in own]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    problems = {
        "lacks": [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in given],
        "does not take": [name for name in given if name in own or not (takes_any or name in named)],
        "takes only once": [name for name in named if given.count(name) > 1],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"{stage}: {problem} {', '.join(names)}; it takes {', '.join(named)}")


def _check_numbers(stage: str, function: Callable[..., StageResult], inputs: Inputs) -> None:
    """Raise UserError where an input is a list and the stage takes one directory, or the other way round."""
    parameters = inspect.signature(function).parameters
    for name, value in inputs.items():
        annotation = parameters[name].annotation if name in parameters else None
        if annotation in (Path, Path | None) and isinstance(value, list):
            raise UserError(f"{stage}: {name} is given {len(value)} times, and it takes one; give it once")
        if annotation == list[Path] and not isinstance(value, list):
            raise UserError(f"{stage}: {name} is a list, and one directory was given; give it as --input-list")


def _check_outputs(stage: str, inputs: Inputs, outputs: Mapping[str, Path]) -> None:
    """Raise UserError where an output would replace an input or cannot be made, before work is spent on it."""
    given = [(name, path) for name, value in inputs.items() for path in (value if isinstance(value, list) else [value])]
    for i, (name, path) in enumerate(outputs.items()):
        place = path.resolve()
        for other, taken in [*given, *list(outputs.items())[:i]]:
            # The finished output takes the place of all that is there.
            if place.is_relative_to(taken.resolve()) or taken.resolve().is_relative_to(place):
                raise UserError(f"{stage}: {name}={path} and {other}={taken} overlap; choose another place for {name}")
        try:
            if path.exists() and not path.is_dir():
                raise NotADirectoryError("a file is there")
            path.parent.mkdir(parents=True, exist_ok=True)
            with artifacts.full_disk_is_a_resource_error(path), tempfile.TemporaryDirectory(dir=path.parent):
                pass
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise UserError(f"{stage}: {name}={path}: cannot be made ({reason}); choose another place") from None


def _check_kinds(stage: str, given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where an input is another kind of artifact, as when two of them were swapped."""
    for place, stamp in given.items():
        wanted, found = _FAMILIES.get(place.partition(".")[0]), _FAMILIES.get(stamp.get("kind", ""))
        if wanted and found and wanted != found:
            raise UserError(
                f"{stage}: {place} is given {stamp['kind']!r}, which {stamp['stage']} made, expected {wanted}; "
                "look whether two inputs are swapped"
            )


def stamps_of(inputs: Inputs, *, verify: bool = False) -> dict[str, dict[str, Any]]:
    """Return the producer stamps of the inputs; the members of a list are numbered `name.0`, `name.1`, ...

    Raises:
        IntegrityError: with `verify`, a file is not what its producer stamped.
    """
    places: dict[str, Path] = {}
    for name, path in inputs.items():
        places |= {f"{name}.{i}": member for i, member in enumerate(path)} if isinstance(path, list) else {name: path}
    stamps = {name: artifacts.read_stamp(path) for name, path in places.items()}
    if verify:
        for name, stamp in stamps.items():
            artifacts.verify_files(places[name], stamp)
    return stamps


@contextlib.contextmanager
def _verdict(stage: str) -> Iterator[None]:
    """Report a failure as one event with its exit code; the traceback goes to the log."""
    try:
        with artifacts.full_disk_is_a_resource_error(Path(stage)):
            yield
    except ValorError as error:
        progress.emit("fail", exit_code=error.exit_code, error=str(error))
        print_traceback(error)
        raise
    except MemoryError as error:
        wrapped = ResourceError(f"{stage}: out of memory; lower the batch size in the recipe or use a larger machine")
        progress.emit("fail", exit_code=wrapped.exit_code, error=str(wrapped))
        print_traceback(error)
        raise wrapped from error
    except Exception as error:
        # An unexpected error's text may quote data, so only its type leaves the log.
        progress.emit("fail", exit_code=1, error=f"{stage}: {type(error).__name__}; the traceback is in the task's log")
        print_traceback(error)
        raise


def print_traceback(error: BaseException) -> None:
    """Print the traceback; a full disk under the log does not replace the error.

    An unexpected error may quote a report, so of each one in the chain only frames and type are printed, unless
    VALOR_VERBOSE_ERRORS is 1. VALOR's own errors hold no text of a patient.
    """
    with contextlib.suppress(OSError):
        if os.environ.get(VERBOSE_ERRORS) == "1":
            traceback.print_exception(error)
        else:
            sys.stderr.write("".join(_text_free_traceback(error)))


def _text_free_traceback(error: BaseException) -> list[str]:
    """Return the traceback's lines, the first error of the chain first, as Python prints them but without messages."""
    chain, link = [error], _earlier(error)
    while link is not None and link not in chain:
        chain.append(link)
        link = _earlier(link)
    lines = []
    for link in reversed(chain):
        message = str(link) if isinstance(link, ValorError) else _WITHHELD
        lines += ["Traceback (most recent call last):\n", *traceback.format_tb(link.__traceback__)]
        lines.append(f"{type(link).__module__}.{type(link).__qualname__}: {message}\n\n")
    return lines


def _earlier(error: BaseException) -> BaseException | None:
    """Return the error that led to this one, if it is to be shown."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextlib.contextmanager
def log_to_file(task: str) -> Iterator[None]:
    """Send this process's output to `VALOR_RUN_DIR/logs/<task>.log` where the local runner asks for it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    # A line per image.
    logging.getLogger("openjpeg").setLevel(logging.WARNING)
    run_dir = os.environ.get("VALOR_RUN_DIR")
    if not run_dir:
        yield
        return
    log_path = Path(run_dir) / "logs" / f"{task}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    with artifacts.full_disk_is_a_resource_error(log_path):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab", buffering=0)
    saved = os.dup(1), os.dup(2)
    with log:
        # Descriptors, not sys.stdout: C libraries and worker processes write there too.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        for stream, number, old in zip((sys.stdout, sys.stderr), (1, 2), saved, strict=True):
            _flush_or_drop(stream, number)
            os.dup2(old, number)
            os.close(old)


def _flush_or_drop(stream: TextIO, number: int) -> None:
    """Flush a stream; what its full disk does not take is dropped, lest it appear on the restored descriptor."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
        stream.flush()
