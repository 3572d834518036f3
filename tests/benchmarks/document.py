"""Writes docs/benchmarks.md and its figure from the results in build/benchmarks.

Only results of one code are shown, the newest; the page names those of other code without their figures.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES
from race import RESULTS

from pipelines.experiments.figures import axes_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIGURE = "images/benchmarks.svg"
Results = Mapping[str, Mapping[str, Any]]
_GPU = ("stock", "valor")
_ON_CPU = ("step-", "memory-", "rewards-")
"""How the names of `make bench`'s results begin."""

_ASKED = (
    ("step-checkpointing", "stock / valor", "Time of stock TRL over VALOR's, gradient checkpointing", "at least", 3.0),
    ("step-2048px", "stock / valor", "The same, source images of 2,048 px", "at least", 5.0),
    ("step-plain", "stock / valor", "Time of stock TRL over VALOR's, no checkpointing", "", 0.0),
    (
        "step-checkpointing",
        "valor / stock_floor",
        "VALOR's time over stock TRL with the features given",
        "at most",
        1.15,
    ),
    ("step-checkpointing", "valor / floor", "VALOR's time over VALOR's with the features given", "at most", 1.15),
    ("step-plain", "valor / stock_floor", "The same, no checkpointing, over stock TRL's", "at most", 1.15),
    ("step-plain", "valor / floor", "The same, no checkpointing, over VALOR's", "at most", 1.15),
)
"""Which ratios the page shows: result, ratio, words, and the target or none."""
_LEAST_RATE = 5_000
"""Completions a second and core, asked of all default text rewards together and of the rule-based one alone."""
_RULE_BASED = "clinical_agreement_reward"
_MOST_SHARE = 0.05
"""Of a step's time, asked of the rewards."""
_MEMORY_HEAD = (
    "G", "time, stock / VALOR", "stock, s/step", "VALOR, s/step", "memory, stock / VALOR", "stock, MB", "VALOR, MB",
)  # fmt: skip
_LABELS = {
    "stock": "stock TRL",
    "valor": "VALOR",
    "stock_floor": "stock TRL, features given",
    "floor": "VALOR, features given",
}


def of_one_code(results: Results) -> tuple[Results, list[str]]:
    """Return the results of the code of `make bench`'s newest, and the names of those of other code or of none.

    The GPU script's CPU form measures nothing that the page shows: it is in neither.
    """
    on_cpu = [result for name, result in results.items() if name.startswith(_ON_CPU) and "code" in result]
    if not on_cpu:
        raise SystemExit(f"{RESULTS}: no results that name their code; run `make bench`")
    code = max(on_cpu, key=lambda result: result["date"])["code"]
    shown = {name: result for name, result in results.items() if name.startswith(_ON_CPU) or _is_gpu(name)}
    kept = {name: result for name, result in shown.items() if result.get("code") == code}
    return kept, sorted(shown.keys() - kept.keys())


def page(results: Results, others: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        results: of one code.
        others: names of what has a result of other code only.
    """
    places = _places(results, _ON_CPU)
    one_place = len(places) == 1
    written = f" on {places[0]}." if one_place else "; each section says when and where it was measured."

    def where(prefix: str) -> str:
        own = _places(results, prefix)
        return "" if one_place or not own else f"Measured on {'; '.join(own)}.\n\n"

    return f"""\
# Benchmarks

Written by `make bench`{written}
A step's ratio is of one run: processes of one thread take turns step by step, and the median of the rounds' ratios is
kept, with the least and the greatest. Times are CPU seconds of the process, so other work on the machine moves them
little. The code's digest is `{next(iter(results.values()))["code"]}`.{_others(others)}

![A step's time, stock TRL and VALOR]({FIGURE})

## A GRPO step

{where("step-")}{ARCHITECTURES["small"].words}, random weights, one prompt (two with 2,048 px)
with G = 8 completions of 64 tokens a step, every image new to the run. *Stock* is `trl.GRPOTrainer` as TRL's
documentation shows it, on the same pixels. VALOR's time includes each image's decoding and shrinking, which it does
once. Before a ratio counts, losses must agree to 1e-5 at every step, and gradient norms, entropies and rewards to 1e-3.

{_table(("", "ratio", "asked", "met"), _ratio_rows(results))}

{_differences(results)}

Two things make the difference (docs/training.md): the frozen tower runs once per image, and a group's prompt is
computed once per group. The features-given steps, with no image work and no tower, show what a new image still costs:
against TRL's own such step, and against VALOR's, whose language model does half the work. An image seen before costs
next to nothing.

## The projector alone, by group size

{where("memory-")}What trains in stage 2, with gradient checkpointing and a reward that costs nothing; the expert's
time is in the next section. Time is as above, with VALOR's decoding and shrinking. Memory is the process's peak above
what the built model holds: activations, gradients, the optimizer's state, images; median, least and greatest of three
processes of each kind.

{_table(_MEMORY_HEAD, _memory_rows(results))}

## Rewards

{where("rewards-")}{_table(("", "figure", "asked", "met"), _reward_rows(results))}{_on_rewards(results)}

## On a GPU

{_gpu(results)}

```
python tests/benchmarks/gpu.py           # 0.5B and LLaVA-1.5-7B, bfloat16 autocast, 336 px, one GPU
python tests/benchmarks/gpu.py --device cpu --size tiny --rounds 1 --tokens 8 --source-px 64
```

Before it times bfloat16, one step in float32 on the same device must agree as above, with few and short completions.
It prints completion tokens/s, the share of the GPU's peak, peak memory and the ratio to stock TRL, and this page shows
what it leaves in `build/benchmarks/`. A step's time is by the clock, with VALOR's decoding and shrinking of its images.

## Commands

`make bench` runs what follows and writes this page. What has a result for the present code, options and machine is not
run again. Each command takes `--help`; results are in `build/benchmarks/`.

```
python tests/benchmarks/step.py          # --only step-2048px, --rounds 5, --profile PATH
python tests/benchmarks/memory.py        # --only 8
python tests/benchmarks/rewards.py       # --openi FOLDER scores Open-i reports too
python tests/benchmarks/document.py
```
"""


def figure(results: Results, path: Path) -> None:
    """Write an SVG: a bar per variant and comparison, as long as its step takes, stock TRL's being 100%."""
    names = {
        "step-checkpointing": "gradient checkpointing",
        "step-2048px": "checkpointing,\n2,048 px sources",
        "step-plain": "no checkpointing",
    }
    shown = [name for name in names if name in results]
    with axes_of(path, "Time of a GRPO step, stock TRL's being 100%", height=0.9 + 0.7 * len(shown)) as axes:
        for row, name in enumerate(shown):
            result = results[name]
            share = 100 * result["seconds"]["valor"] / result["seconds"]["stock"]
            faster = f"{result['ratios']['stock / valor']['median']:.1f}x faster"
            for at, width, colour, words in (
                (row - 0.2, 100, "#8c959f", _LABELS["stock"]),
                (row + 0.2, share, "#0969da", f"{_LABELS['valor']}, {faster}"),
            ):
                axes.barh(at, width, height=0.36, color=colour)
                axes.text(width + 1, at, words, verticalalignment="center")
        axes.set_yticks(range(len(shown)), [names[name] for name in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 125)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="%")


def _is_gpu(name: str) -> bool:
    return name.startswith("gpu-") and name.endswith("-cuda")


def _places(results: Results, prefix: str | tuple[str, ...]) -> list[str]:
    """Return the days and machines of the results whose names begin with the prefix, each once."""
    found = (result for name, result in results.items() if name.startswith(prefix))
    return sorted({f"{result['date'][:10]}: {result['machine']}" for result in found})


def _others(names: Sequence[str]) -> str:
    return f"\n\nNot measured with this code: {', '.join(names)}." if names else ""


def _ratio_rows(results: Results) -> list[str]:
    rows = []
    for name, key, words, bound, target in _ASKED:
        value = results.get(name, {}).get("ratios", {}).get(key)
        if value is None:
            continue
        met = value["median"] >= target if bound == "at least" else value["median"] <= target
        rows.append(_row(words, _spread(value), asked=f"{bound} {target:g}" if bound else "", met=met))
    return rows


def _row(words: str, figure: str, *, asked: str, met: bool) -> str:
    """Return a row of a figure, what was asked of it or "", and whether it met that."""
    return f"| {words} | {figure} | {asked} | {('yes' if met else '**no**') if asked else ''} |"


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    if not rows:
        return "Not measured yet."
    return "\n".join(["| " + " | ".join(head) + " |", "| --- " * len(head) + "|", *rows])


def _differences(results: Results) -> str:
    steps = [result["differences"] for name, result in results.items() if name.startswith(("step-", "memory-"))]
    if not steps:
        return ""
    loss, norm = (max(found[key] for found in steps) for key in ("loss", "grad_norm"))
    return f"The greatest difference seen: {loss:.1e} in a loss, {norm:.1e} of a gradient norm."


def _memory_rows(results: Results) -> list[str]:
    rows = []
    for name in sorted(name for name in results if name.startswith("memory-")):
        found = results[name]
        ratios, held = found["ratios"], found["above_model_mb"]
        rows.append(
            f"| {found['work']['generations']} | {ratios['stock / valor']['median']:.2f}x"
            f" | {found['seconds']['stock']:.1f} | {found['seconds']['valor']:.1f}"
            f" | {_ranged(ratios['memory, stock / valor'], '.2f', 'x')}"
            f" | {_ranged(held['stock'], '.0f')} | {_ranged(held['valor'], '.0f')} |"
        )
    return rows


def _ranged(spread: Mapping[str, float], form: str, unit: str = "") -> str:
    low, median, high = (format(spread[key], form) for key in ("low", "median", "high"))
    return f"{median}{unit} ({low} to {high})"


def _reward_rows(results: Results) -> list[str]:
    rows = []
    for source, of in (("phantom", "phantom reports"), ("openi", "Open-i reports")):
        if rate := results.get("rewards-text", {}).get(source):
            together = f"All four default text rewards on {of} of {rate['words']:.0f} words"
            rows.append(_rate_row(together, rate, asked=True))
            for name, each in rate["each"].items():
                words = f"`{name}` alone{', the rule-based one' if name == _RULE_BASED else ''}"
                rows.append(_rate_row(f"{words}, on {of}", each, asked=name == _RULE_BASED))
    if text := results.get("rewards-text-share"):
        rows.append(_share_row("The text rewards' share of a step of stage 1", text["share"], f"{text['share']:.2%}"))
    for kind in ("statements", "paper"):
        if expert := results.get(f"rewards-{kind}-share"):
            own, whole = expert["share"], expert["share"] + expert["embedding_share"]
            words = f"The expert's reward's share of a step of stage 2, `similarity: {kind}`"
            rows.append(_share_row(words, own, f"{own:.1%}"))
            rows.append(_share_row("The same with its embeddings of images, all of them new", whole, f"{whole:.1%}"))
    return rows


def _rate_row(words: str, rate: Mapping[str, float], *, asked: bool) -> str:
    figure = _ranged(rate, ",.0f")
    bound = f"at least {_LEAST_RATE:,}" if asked else ""
    return _row(f"{words}, completions a second and core", figure, asked=bound, met=rate["median"] >= _LEAST_RATE)


def _share_row(words: str, share: float, figure: str) -> str:
    return _row(words, figure, asked=f"under {_MOST_SHARE:.0%}", met=share < _MOST_SHARE)


def _on_rewards(results: Results) -> str:
    """Return what the rewards' table needs said, with a blank line before each paragraph."""
    paragraphs = []
    if "rewards-text" in results:
        paragraphs.append(
            "The text rewards score each completion in the recipe's order, and the words that one split the next finds"
            " split."
        )
    experts = [found for kind in ("statements", "paper") if (found := results.get(f"rewards-{kind}-share"))]
    if experts:
        counts = "; ".join(sorted({f"{one['images_embedded']} times for {one['images']} images" for one in experts}))
        paragraphs.append(
            "The expert, a CLIP ViT-B/16 with its text encoder, is as large as the policy's tower and over twice its"
            f" language model. It embedded {counts}, all of them new: an image seen before is not embedded again."
        )
    return "".join(f"\n\n{paragraph}" for paragraph in paragraphs)


def _gpu(results: Results) -> str:
    found = {name: result for name, result in results.items() if _is_gpu(name)}
    if not found:
        return "No GPU was at hand: the figures have not been measured with this code. The script's CPU form is tested:"
    rows = []
    for result in found.values():
        size, stock, ours = (ARCHITECTURES[result["work"]["architecture"]].words, *map(result["figures"].get, _GPU))
        shares = (one["of_peak"] for one in (stock, ours))
        of_peak = " / ".join("unknown" if share is None else f"{share:.1%}" for share in shares)
        rows.append(
            f"| {size} | {result['device']} | {result['ratio']:.2f}x | "
            f"{stock['completion_tokens_per_s']:.0f} / {ours['completion_tokens_per_s']:.0f} | {of_peak} | "
            f"{stock['peak_mb'] * 1e6 / 2**30:.1f} / {ours['peak_mb'] * 1e6 / 2**30:.1f} |"
        )
    head = ("model", "device", "time, stock / VALOR", "completion tokens/s", "of the peak FLOP/s", "peak memory, GiB")
    words = (
        f"Measured on {'; '.join(_places(found, 'gpu-'))}. Of each pair the first is stock TRL, the second VALOR. The "
        "share of the peak is of the work that stock TRL does, so the first is its MFU; VALOR spares most of that "
        "work. Stock TRL holds frozen weights in float32 and casts them at each use, VALOR holds them in bfloat16."
    )
    return f"{_table(head, rows)}\n\n{words} The commands:"


def _spread(value: Mapping[str, float]) -> str:
    return _ranged(value, ".2f", "x")


def main() -> None:
    """Write the page and the figure."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    every = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    results, others = of_one_code(every)
    (DOCS / "benchmarks.md").write_text(page(results, others), encoding="utf-8")
    figure(results, DOCS / FIGURE)
    print(f"wrote {DOCS / 'benchmarks.md'} and {DOCS / FIGURE}")


if __name__ == "__main__":
    main()
