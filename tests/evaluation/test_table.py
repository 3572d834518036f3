import pytest

from valor.evaluation import table


def cell(value, low, high):
    return {"value": value, "low": low, "high": high, "defined": 1.0}


@pytest.fixture
def metrics():
    measure = {"group": "g", "finding": "", "form": "percent", "higher_is_better": True}
    sft = {"truth_f1_micro": cell(0.5, 0.4, 0.6), "length": cell(40, 38, 42), "truth_f1_edema": cell(0.1, 0, 0.2)}
    vision = {"truth_f1_micro": cell(0.62, 0.5, 0.7), "length": cell(41.5, 39, 43), "truth_f1_edema": cell(0.2, 0, 0.3)}
    difference = {
        "truth_f1_micro": cell(0.12, 0.034, 0.2), "length": cell(1.5, -1, 4), "truth_f1_edema": cell(0.1, 0.01, 0.2)
    }  # fmt: skip
    return {
        "checkpoints": {"sft": sft, "vision": vision},
        "differences": {"vision-sft": difference},
        "measures": {
            "truth_f1_micro": {**measure, "label": "F1, micro"},
            "length": {**measure, "label": "Tokens per report", "form": "number", "higher_is_better": None},
            "truth_f1_edema": {**measure, "label": "F1", "finding": "Edema"},
        },
        "bootstrap": {"confidence": 0.95},
        "studies": 500,
        "subjects": 430,
        "truth": True,
    }


def test_text_lines_up_and_marks_what_excludes_zero(metrics):
    lines = table.render_text(table.build(metrics)).splitlines()
    assert [head.strip() for head in lines[0].split("|")[1:-1]] == [
        "metric",
        "SFT",
        "+ vision",
        "vision - SFT [95% CI]",
    ]
    assert "| F1, micro, % (truth) | 50.0 |     62.0 |" in lines[2]
    assert lines[2].endswith(" +12.0 [+3.4, +20.0] + |")
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[3].endswith(" +1.500 [-1.000, +4.000]   |")
    assert "say nothing of clinical performance" in lines[-1]


def test_single_findings_stay_out_and_headlines_can_be_all(metrics):
    metrics["measures"]["truth_precision_macro"] = {
        **metrics["measures"]["truth_f1_micro"],
        "label": "Precision, macro",
    }
    for part in (*metrics["checkpoints"].values(), *metrics["differences"].values()):
        part["truth_precision_macro"] = part["truth_f1_micro"]
    built = table.build(metrics)
    assert [row["metric"] for row in built["rows"]] == ["truth_f1_micro", "length", "truth_precision_macro"]
    assert "Precision, macro" not in table.render_text(built)
    assert "Precision, macro" in table.render_text(built, full=True)


def test_single_findings_that_changed_are_named_under_the_table(metrics):
    built = table.build(metrics)
    assert [row["finding"] for row in built["findings"]] == ["Edema"]
    said = "F1 of single findings, vision - SFT, %: worse: none; better: Edema +10.0 [+1.0, +20.0]."
    assert said in table.render_text(built).splitlines()
    metrics["differences"]["vision-sft"]["truth_f1_edema"] = cell(-0.1, -0.2, -0.01)
    assert "worse: Edema -10.0 [-20.0, -1.0]; better: none." in table.render_text(table.build(metrics))
    metrics["differences"]["vision-sft"]["truth_f1_edema"] = cell(-0.1, -0.2, 0.01)
    assert "worse: none; better: none." in table.render_text(table.build(metrics))


def test_nothing_is_said_of_truth_where_there_is_none(metrics):
    assert "clinical performance" not in table.render_text(table.build({**metrics, "truth": False}))


def test_one_checkpoint_alone_has_no_difference(metrics):
    metrics["checkpoints"].pop("vision")
    metrics["differences"] = {}
    built = table.build(metrics)
    assert built["contrast"] == ""
    assert "[95% CI]" not in table.render_text(built)


@pytest.mark.parametrize(
    ("low", "high", "higher", "expected"),
    [(0.1, 0.2, True, "better"), (0.1, 0.2, False, "worse"), (-0.2, -0.1, True, "worse"), (-0.2, -0.1, False, "better"),
     (-0.1, 0.1, True, ""), (0.1, 0.2, None, "changed"), (0.0, 0.2, True, "")],
)  # fmt: skip
def test_direction_needs_an_interval_beyond_zero(low, high, higher, expected):
    assert table.direction(cell((low + high) / 2, low, high), higher) == expected


def test_undefined_numbers_read_as_such():
    assert table.number(None, "percent") == "n/a"
    assert table.direction(cell(None, None, None), True) == ""
