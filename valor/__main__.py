"""Run one stage by hand: `python -m valor STAGE --settings JSON|@FILE --input NAME=PATH ... --output NAME=PATH ...`.

It needs only the inputs that it names and VALOR_WORK_ROOT (or VALOR_HOME), as a fresh pod would have them.
"""

import argparse
import sys
from pathlib import Path

from valor import artifacts, stages
from valor.context import Context
from valor.errors import Interrupted, UserError, ValorError, shown
from valor.startup import spare_the_collector


def main(arguments: list[str] | None = None) -> int:
    """Run a stage; return its exit code."""
    spare_the_collector()
    options = _parser().parse_args(arguments)
    try:
        result = stages.run(
            options.stage,
            settings_json=_settings(options.settings),
            context=Context.from_environment(pipeline_run=options.run, task=options.task or options.stage),
            inputs=_inputs(options.input, lists=options.input_list),
            outputs=_outputs(options.output),
            values=dict(_pairs(options.value)),
        )
    except ValorError as error:
        print(f"valor: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"valor: error: {options.stage}: interrupted; run again", file=sys.stderr)
        return Interrupted.exit_code
    except Exception as error:
        # `stages.run` has printed the traceback, without messages that may quote data.
        print(f"valor: error: {options.stage}: {type(error).__name__}; see the traceback", file=sys.stderr)
        return 1
    for name, value in sorted(result.values.items()):
        print(f"{name}={value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m valor", description=__doc__)
    parser.add_argument("stage", choices=stages.STAGES, help="the stage to run")
    parser.add_argument("--settings", default="{}", help="the stage's recipe section as JSON, or @FILE that holds it")
    for name, text in (
        ("input", "NAME=PATH of an input artifact; a name given twice is a list"),
        ("input-list", "NAME=PATH of an input that is a list, also with one member"),
        ("output", "NAME=PATH of an output artifact"),
        ("value", "NAME=VALUE of a string parameter"),
    ):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="NAME=...", help=text)
    parser.add_argument("--run", default="", help="id of the pipeline run that this belongs to")
    parser.add_argument("--task", default="", help="the task's name, such as predict-text; default is the stage")
    return parser


def _settings(text: str) -> str:
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    try:
        if not path.is_file():
            raise UserError(
                f"--settings {text}: {'no file' if path.exists() else 'no such file'}; expected one of JSON"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--settings {text}: not UTF-8 text ({error.reason}); expected JSON") from None
    except OSError as error:
        raise UserError(f"--settings {shown(text)}: cannot be read ({error.strerror}); expected JSON") from None


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UserError(f"{text}: expected NAME=VALUE, such as dataset=/tmp/dataset")
        pairs.append((name, value))
    return pairs


def _inputs(texts: list[str], *, lists: list[str]) -> dict[str, Path | list[Path]]:
    inputs: dict[str, Path | list[Path]] = {}
    for name, value in _pairs(texts):
        path, earlier = Path(value).absolute(), inputs.get(name)
        if earlier is None:
            inputs[name] = path
        else:
            inputs[name] = [*(earlier if isinstance(earlier, list) else [earlier]), path]
    for name, value in _pairs(lists):
        members = inputs.setdefault(name, [])
        if not isinstance(members, list):
            raise UserError(f"--input-list {name}: also given as --input; use one of them")
        members.append(Path(value).absolute())
    return inputs


def _outputs(texts: list[str]) -> dict[str, Path]:
    """Return the outputs' places; a folder that VALOR did not write is refused, since the output would replace it."""
    outputs: dict[str, Path] = {}
    for name, value in _pairs(texts):
        path = Path(value).absolute()
        if name in outputs:
            raise UserError(f"--output {name}: given twice ({outputs[name]} and {path}); give one place")
        # A training that was killed before its stamp has left a checkpoint, which the next try replaces.
        ours = any((path / file).is_file() for file in (artifacts.STAMP, artifacts.CHECKPOINT_INFO))
        if path.is_dir() and not ours and any(path.iterdir()):
            raise UserError(
                f"--output {name}={path}: holds files and no {artifacts.STAMP}, and the output would replace them; "
                "choose another place, or empty it"
            )
        outputs[name] = path
    return outputs


if __name__ == "__main__":
    sys.exit(main())
