"""The predictions artifact: one row per study, from which everything a reviewer sees derives without the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.clinical.labeler import Mention, mentions
from valor.data.manifest import Study, first_pixels, other_subjects
from valor.models.expert import BATCH
from valor.models.loading import square_box

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from valor.models.expert import Expert
    from valor.models.generate import Generated

TABLE = "predictions.parquet"
INFO = "predictions.json"


def schema() -> Any:
    """Return the Arrow schema of `predictions.parquet`.

    `attention` has one entry per positive mention in the hypothesis: `grid` and `shuffled` are float32 maps of
    grid_h * grid_w cells, each summing to 1, for the study's image and for another study's. `image_box` is the part of
    the dataset image that the grid covers, (x0, y0, x1, y1) as fractions.
    """
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    mention = pa.struct(
        [("finding", pa.string()), ("label", pa.string()), ("side", pa.string()), ("start", pa.int32()),
         ("end", pa.int32()), ("grid", floats), ("grid_h", pa.int32()), ("grid_w", pa.int32()), ("shuffled", floats)]
    )  # fmt: skip
    return pa.schema(
        [("study_id", pa.string()), ("subject_id", pa.string()), ("reference", pa.string()),
         ("hypothesis", pa.string()), ("hypothesis_tokens", pa.int32()), ("truncated", pa.bool_()),
         ("similarity", pa.float64()), ("reference_similarity", pa.float64()), ("attention", pa.list_(mention)),
         ("image_box", pa.list_(pa.float64()))]
    )  # fmt: skip


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows into an existing directory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema()), path / TABLE)


def write_info(path: Path, *, name: str, **info: Any) -> dict[str, float]:
    """Write whose predictions the directory's table holds, and return how many studies, cut reports and mean tokens."""
    import pyarrow.parquet as pq

    columns = pq.read_table(path / TABLE, columns=["hypothesis_tokens", "truncated"]).to_pydict()
    studies = len(columns["truncated"])
    artifacts.write_json(path / INFO, {"name": name, "studies": studies, **info})
    if not studies:
        return {"studies": 0}
    tokens = sum(columns["hypothesis_tokens"]) / studies
    return {"studies": studies, "truncated": sum(columns["truncated"]), "mean_tokens": tokens}


def similarities(judge: "Expert", studies: Sequence[Study], reports: Sequence[str]) -> list[tuple[float, float]]:
    """Return the judge's (hypothesis, reference) similarity per study; nan for an empty report."""
    embeds = judge.embed_images([first_pixels(study) for study in studies])
    hypotheses = judge.paper_similarity(embeds, list(reports), batch=BATCH)
    references = judge.paper_similarity(embeds, [study.text for study in studies], batch=BATCH)
    return list(zip(hypotheses, references, strict=True))


def likeliest(
    expert: "Expert", studies: Sequence[Study], candidates: Sequence[Sequence["Generated"]]
) -> list["Generated"]:
    """Return of each study's candidates the one whose statements the expert finds likeliest; unusable ones last.

    Raises:
        UserError: the expert has no measured gate.
    """
    from valor.models.statements import Statements
    from valor.rewards.expert import unusable

    embeds = expert.embed_images([first_pixels(study) for study in studies])
    statements, chosen = Statements.of(expert), []
    for embed, reports in zip(embeds, candidates, strict=True):
        texts = [report.text for report in reports]
        scores = statements.log_probability(embed.expand(len(reports), -1), texts)
        last = unusable(texts, [report.truncated for report in reports], must_state=True)
        chosen.append(min(zip(last, scores, reports, strict=True), key=lambda one: (one[0], -one[1]))[2])
    return chosen


def positive_mentions(reports: Sequence[str]) -> list[list[Mention]]:
    """Return each report's mentions of findings that it asserts."""
    return [[m for m in mentions(r) if m.label == "positive" and m.finding != "No Finding"] for r in reports]


def attention_rows(
    model: Any,
    processor: Any,
    images: Sequence["Image"],
    reports: Sequence[str],
    *,
    subjects: Sequence[str],
    prompt: str,
) -> list[list[dict[str, Any]]]:
    """Return the `attention` column: a map per positive mention, and its twin under another subject's image."""
    from valor.evaluation.attention import mention_maps

    found = positive_mentions(reports)
    spans = [[(m.start, m.end) for m in row] for row in found]
    own = mention_maps(model, processor, images, reports, spans, prompt=prompt)
    others = [images[i] for i in other_subjects(subjects)]
    shuffled = mention_maps(model, processor, others, reports, spans, prompt=prompt)
    return [
        [_entry(*parts) for parts in zip(row, maps, twins, strict=True)]
        for row, maps, twins in zip(found, own, shuffled, strict=True)
    ]


def rows(
    studies: Sequence[Study],
    generated: Sequence["Generated"],
    similarity: Sequence[tuple[float, float]],
    attention: Sequence[list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Return the table's rows in the order of `studies`."""
    return [
        {
            "study_id": study.study_id,
            "subject_id": study.subject_id,
            "reference": study.text,
            "hypothesis": report.text,
            "hypothesis_tokens": report.tokens,
            "truncated": report.truncated,
            "similarity": ours,
            "reference_similarity": theirs,
            "attention": maps,
            "image_box": list(square_box(*first_pixels(study).shape)),
        }
        for study, report, (ours, theirs), maps in zip(studies, generated, similarity, attention, strict=True)
    ]


def _entry(mention: Mention, grid: "np.ndarray", shuffled: "np.ndarray") -> dict[str, Any]:
    return {
        "finding": mention.finding,
        "label": mention.label,
        "side": mention.side,
        "start": mention.start,
        "end": mention.end,
        "grid": grid.ravel(),
        "grid_h": grid.shape[0],
        "grid_w": grid.shape[1],
        "shuffled": shuffled.ravel(),
    }
