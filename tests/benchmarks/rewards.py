"""The rewards: completions a second and core of the text rewards, all and each, and every reward's share of a step.

Reports are the phantom's, each scored once; with `--openi` also the Open-i collection's, against each other.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES
from lane import Work, reports_only
from race import alone, once

GROUP, BATCHES, BATCH = 8, 12, 400


def text_rate(reports: list[str], *, batch: int = BATCH) -> dict[str, Any]:
    """Return completions a second of one core through all default text rewards, G per reference, none seen before.

    Beside them, under `each`, is what each does alone; the words that one split the next finds split, as in a training.

    Args:
        reports: as many batches as they fill count.
        batch: completions per call.
    """
    from valor.recipe import GrpoTextSettings
    from valor.rewards.text import build

    functions, _ = build(GrpoTextSettings().rewards)
    spent: dict[str, list[float]] = {function.__name__: [] for function in functions}
    for start in range(0, len(reports) - batch + 1, batch):
        texts = reports[start : start + batch]
        references = [texts[i // GROUP * GROUP] for i in range(len(texts))]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        for function in functions:
            begin = time.process_time()
            function(completions, references)
            spent[function.__name__].append(time.process_time() - begin)
    together = [sum(seconds) for seconds in zip(*spent.values(), strict=True)]
    if not together:
        raise SystemExit(f"{len(reports)} reports, a batch takes {batch}")
    return {
        **_rate(together, batch),
        "words": sum(len(report.split()) for report in reports) / len(reports),
        "each": {name: _rate(seconds, batch) for name, seconds in spent.items()},
    }


def _rate(seconds: list[float], batch: int) -> dict[str, float]:
    """Return completions a second of batches that took so long."""
    # The first half fills the labeler's table of sentences, as the first steps of a training do.
    counted = [batch / spent for spent in seconds[len(seconds) // 2 :]]
    return {"median": statistics.median(counted), "low": min(counted), "high": max(counted)}


def openi(folder: Path) -> list[str]:
    """Return the reports of an Open-i folder that have a text."""
    from valor.data.manifest import report_text
    from valor.data.reports import parse_openi

    found = []
    for path in sorted(folder.rglob("*.xml")):
        report = parse_openi(path.read_bytes()).report
        if text := report_text(report.findings, report.impression):
            found.append(text)
    return found


def share(reward: str, *, architecture: str, rounds: int) -> dict[str, Any]:
    """Return the shares of a step's CPU time that a reward and its expert's image embedding take.

    Args:
        reward: `text` in a step of stage 1; `statements` or `paper` in one of stage 2.
        architecture: of policy and expert.
        rounds: steps after the first.
    """
    stage_2 = reward != "text"
    lane = alone(
        Work(variant="valor", architecture=architecture, reward=reward, projector_only=stage_2, steps=rounds + 1)
    )
    # The lane's rewards are summed over all its steps, the warm-up included, so its steps are too.
    total = lane.ready["rows_cpu"] + sum(lane.every)
    return {
        "work": vars(lane.work),
        "threads": 1,
        "share": lane.end["reward_cpu"] / total,
        "embedding_share": lane.end["embedding_cpu"] / total,
        "images_embedded": lane.end["images_embedded"],
        "images": lane.work.images,
    }


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--rounds", type=int, default=2, help="steps after the first (default 2)")
    parser.add_argument("--openi", type=Path, help="a folder with Open-i reports (*.xml), scored too")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    options = parser.parse_args()

    def rates() -> dict[str, Any]:
        phantom = [f"FINDINGS: {f} IMPRESSION: {i}" for f, i in reports_only(BATCHES * BATCH)]
        result = {"threads": 1, "phantom": text_rate(phantom)}
        if options.openi:
            result["openi"] = text_rate(openi(options.openi), batch=BATCH // 16)
        return result

    result = once("rewards-text", rates, options)
    for source in ("phantom", "openi"):
        if source in result:
            each = ", ".join(f"{name} {rate['median']:.0f}" for name, rate in result[source]["each"].items())
            print(f"  {source}: {result[source]['median']:.0f} completions/s/core ({each})", flush=True)
    for reward in ("text", "statements", "paper"):
        found = once(
            f"rewards-{reward}-share",
            lambda r=reward: share(r, architecture=options.architecture, rounds=options.rounds),
            options,
        )
        print(
            f"  {reward}: {found['share']:.1%} of a step, and {found['embedding_share']:.1%} to embed its"
            f" {found['images_embedded']} images",
            flush=True,
        )


if __name__ == "__main__":
    main()
