"""The data gate: expectations over the tables of facts, run by Great Expectations, with its Data Docs.

Great Expectations sees numbers and ids only (`valor.data.facts`). Expectations over facts that derive from text run
with `BOOLEAN_ONLY`, so that not even lengths are quoted; their failing rows are counted here. It leaves out profiling
and drift: the limits come from the recipe.
"""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor.data.facts import Facts
from valor.data.manifest import SPLITS
from valor.recipe import DataSettings

if TYPE_CHECKING:
    import pandas as pd

SITE = "great_expectations"


@dataclasses.dataclass(frozen=True)
class Check:
    """One expectation: values of `column` in `table` lie in [low, high], or are unique, or are in a set.

    Attributes:
        name: short name in messages.
        table: studies, images or overall.
        fix: what to do when it fails.
        from_text: whether the column derives from report text.
    """

    name: str
    table: str
    column: str
    fix: str
    low: float | None = None
    high: float | None = None
    unique: bool = False
    values: tuple[str, ...] = ()
    from_text: bool = False

    def failing(self, frame: "pd.DataFrame") -> int:
        """Return how many rows break the expectation."""
        column = frame[self.column]
        if self.unique:
            return int(column.duplicated(keep=False).sum())
        if self.values:
            return int((~column.isin(self.values)).sum())
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return int((~column.between(low, high)).sum())

    def limit(self) -> str:
        """Return the expectation in words."""
        if self.unique:
            return "unique"
        if self.values:
            return f"one of {', '.join(self.values)}"
        low = "" if self.low is None else f"at least {self.low:g}"
        high = "" if self.high is None else f"at most {self.high:g}"
        return " and ".join(part for part in (low, high) if part)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one check: `failing` of `rows`; `observed` is the value of an overall check."""

    check: Check
    passed: bool
    failing: int
    rows: int
    observed: float | None

    def found(self) -> str:
        """Return what was seen: the value of an overall check, else how many rows fail."""
        return f"{self.failing} of {self.rows} fail" if self.observed is None else f"{self.observed:.4g}"

    def message(self) -> str:
        """Return the failure in one line, without values of single studies."""
        check = self.check
        if self.observed is not None:
            return f"{check.name}: {check.column} is {self.observed:g}, expected {check.limit()}; {check.fix}"
        return (
            f"{check.name}: {self.failing} of {self.rows} rows of {check.table} have a {check.column} that is not "
            f"{check.limit()}; {check.fix}"
        )


def checks(settings: DataSettings) -> list[Check]:
    """Return the gate's checks with the recipe's limits."""
    limits = settings.checks
    look = "read quarantine.parquet for the reasons"
    again = "ingest the data again with this recipe"
    return [
        *(
            Check(
                f"enough_{split}_studies",
                "overall",
                f"{split}_studies",
                low=limits.min_studies,
                fix="add studies, change data.split_fractions or lower data.checks.min_studies",
            )
            for split in SPLITS
        ),
        Check("quarantine", "overall", "quarantined_fraction", high=limits.max_quarantined_fraction, fix=look),
        Check(
            "repeated_reports",
            "overall",
            "duplicate_report_fraction",
            high=limits.max_duplicate_report_fraction,
            fix="look for templates or copied files in the source",
        ),
        Check(
            "empty_findings",
            "overall",
            "empty_findings_fraction",
            high=limits.max_empty_findings_fraction,
            fix="look at the section headings of the source's reports",
        ),
        Check("unique_studies", "studies", "study_id", unique=True, fix="remove the copies from the source"),
        Check("known_split", "studies", "split", values=SPLITS, fix="map it in the data set's adapter"),
        Check(
            "disjoint_subjects",
            "studies",
            "subject_splits",
            low=1,
            high=1,
            fix="mend the source's split table: a subject belongs to one split",
        ),
        Check("views", "studies", "images", low=1, high=settings.max_views, fix=again),
        Check("report_says_something", "studies", "report_words", low=1, from_text=True, fix=again),
        Check("image_contrast", "images", "contrast", low=limits.min_image_std, fix=again),
        Check("image_size", "images", "longer_side", low=limits.min_image_px, high=settings.image_px, fix=again),
    ]


def run(facts: Facts, *, settings: DataSettings, docs: Path) -> list[Outcome]:
    """Run every check and build Great Expectations' Data Docs in `docs/great_expectations`."""
    wanted = checks(settings)
    passed: dict[str, bool] = {}
    context, site = _context(docs / SITE)
    source = context.data_sources.add_pandas("dataset")
    batches = {
        name: source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name) for name in facts.tables()
    }
    for from_text in (False, True):
        for table, frame in facts.tables().items():
            chosen = [check for check in wanted if check.table == table and check.from_text == from_text]
            if chosen:
                passed |= _run_suite(context, site, batches[table], frame, chosen, from_text=from_text)
    _trim(docs / SITE)
    return [_outcome(check, passed[check.name], facts.tables()[check.table]) for check in wanted]


def _outcome(check: Check, passed: bool, frame: "pd.DataFrame") -> Outcome:
    observed = float(frame[check.column].iloc[0]) if check.table == "overall" else None
    failing = 0 if passed else check.failing(frame)
    return Outcome(check=check, passed=passed, failing=failing, rows=len(frame), observed=observed)


def _context(folder: Path) -> tuple[Any, str]:
    """Return an in-memory Great Expectations context whose docs go to `folder`, without analytics."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    # Before the import, which itself logs hundreds of lines.
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for name in list(context.get_site_names()):
        context.delete_data_docs_site(name)
    context.add_data_docs_site(
        site_name=SITE,
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)},
        },
    )
    return context, SITE


def _run_suite(
    context: Any, site: str, batch: Any, frame: "pd.DataFrame", chosen: list[Check], *, from_text: bool
) -> dict[str, bool]:
    """Run the checks of one table and return check name -> passed."""
    import great_expectations as gx

    name = f"{chosen[0].table}_from_text" if from_text else chosen[0].table
    suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=[_expectation(check) for check in chosen]))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=name,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=[site])],
            result_format="BOOLEAN_ONLY" if from_text else "BASIC",
        )
    )
    (result,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    return {item.expectation_config.meta["check"]: bool(item.success) for item in result.results}


def _expectation(check: Check) -> Any:
    from great_expectations import expectations as gxe

    meta = {"check": check.name}
    if check.unique:
        return gxe.ExpectColumnValuesToBeUnique(column=check.column, meta=meta)
    if check.values:
        return gxe.ExpectColumnValuesToBeInSet(column=check.column, value_set=list(check.values), meta=meta)
    return gxe.ExpectColumnValuesToBeBetween(column=check.column, min_value=check.low, max_value=check.high, meta=meta)


def _trim(folder: Path) -> None:
    """Remove the site's fonts and pictures, 4 MB that say nothing about the data."""
    for name in ("fonts", "images"):
        shutil.rmtree(folder / "static" / name, ignore_errors=True)
