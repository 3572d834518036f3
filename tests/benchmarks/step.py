"""A GRPO step against TRL's own and against the floor: the same step with the vision features given.

Prints and keeps ratios; every comparison first shows that its variants trained alike.
"""

import argparse
from typing import Any

from architectures import ARCHITECTURES
from lane import Work
from race import alone, once, race, ratio, require_same_training

COMPARISONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "step-checkpointing": ({"checkpointing": True}, ("stock", "valor", "stock_floor", "floor")),
    "step-plain": ({"checkpointing": False}, ("stock", "valor", "stock_floor", "floor")),
    "step-2048px": ({"source_px": 2048, "prompts": 2}, ("stock", "valor")),
}
"""By name: what differs from a plain Work, and who races."""


def compare(changes: dict[str, Any], variants: tuple[str, ...], *, architecture: str, rounds: int) -> dict[str, Any]:
    """Return ratios of step time, and how closely the variants trained alike."""
    works = {name: Work(variant=name, architecture=architecture, steps=rounds + 1, **changes) for name in variants}
    lanes = race(works)
    times = {name: lane.seconds for name, lane in lanes.items()}
    result = {"work": vars(works["valor"]), "differences": require_same_training(lanes), "threads": 1}
    result["seconds"] = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    result["ratios"] = {"stock / valor": ratio(times["stock"], times["valor"])}
    for other in ("stock_floor", "floor"):
        if other in times:
            result["ratios"][f"valor / {other}"] = ratio(times["valor"], times[other])
    return result


def main() -> None:
    """Run the comparisons that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="steps that count, after one that does not (default 3)")
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison (default: all)")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--profile", metavar="PATH", help="instead: run VALOR's steps alone and write a cProfile there")
    options = parser.parse_args()
    if options.profile:
        alone(
            Work(variant="valor", architecture=options.architecture, steps=options.rounds + 1), profile=options.profile
        )
        return
    for name, (changes, variants) in COMPARISONS.items():
        if options.only in (None, name):
            result = once(
                name,
                lambda c=changes, v=variants: compare(c, v, architecture=options.architecture, rounds=options.rounds),
                options,
            )
            for what, value in result["ratios"].items():
                print(f"  {what}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})", flush=True)


if __name__ == "__main__":
    main()
