import json
import re
import shutil
import subprocess

import handmade
import pyarrow.parquet as pq
import pytest

from valor.context import Context
from valor.evaluation.predict import TABLE
from valor.recipe import EvaluationSettings
from valor.stages.evaluate import evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    "--dump-dom",
]
ATTACK = "No edema. <script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }}"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def page(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "evaluation"
    evaluate(EvaluationSettings(bootstrap_samples=50), **small, evaluation=out, context=Context())
    return (out / "evaluation.html").read_text(encoding="utf-8")


def browse(html, tmp_path, driver="", *flags):
    """Return the document after its scripts ran, and what the console said.

    A driver runs in a copy without the policy, which admits the page's own script only.
    """
    if driver:
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        html = html.replace("</body>", f"<script>{driver}</script></body>")
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_holds_everything_and_asks_nobody(page):
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    assert page.count('<article class="card"') == 24
    assert "say nothing of clinical performance" in page
    assert "Restricted." in page


def test_foreign_text_is_escaped(small, tmp_path):
    attacked = []
    for path in small["predictions"][:3]:
        rows = [
            {**row, "reference": ATTACK, "hypothesis": ATTACK, "attention": []}
            for row in pq.read_table(path / TABLE).to_pylist()
        ]
        attacked.append(handmade.write_predictions(tmp_path / path.name, path.name, rows, checkpoint_digest="c"))
    evaluate(
        EvaluationSettings(bootstrap_samples=20), **{**small, "predictions": attacked},
        evaluation=tmp_path / "evaluation", context=Context(),
    )  # fmt: skip
    html = (tmp_path / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title" in html
    assert "<script>document" not in html
    assert "<img src=x" not in html
    assert "{{ 7*7 }}" in html
    if CHROMIUM:
        dom, console = browse(html, tmp_path)
        assert "<title>VALOR evaluation" in dom
        assert not console


@needs_chromium
def test_runs_under_its_policy_without_a_complaint(page, tmp_path):
    dom, console = browse(page, tmp_path)
    assert not console
    assert ">24 of 24 studies</output>" in dom


@needs_chromium
@pytest.mark.parametrize("width", [500, 1000, 1400])
def test_only_tables_scroll_sideways(page, tmp_path, width):
    driver = """
      const out = document.createElement("pre"); out.id = "result";
      out.textContent = JSON.stringify([document.documentElement.scrollWidth, window.innerWidth]);
      document.body.append(out);
    """
    dom, _ = browse(page, tmp_path, driver, f"--window-size={width},900")
    needed, there = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom).group(1))
    assert needed <= there


@needs_chromium
def test_the_policy_stops_any_other_script(page, tmp_path):
    dom, console = browse(page.replace("</main>", "</main><script>document.title = 'owned'</script>"), tmp_path)
    assert "<title>VALOR evaluation" in dom
    assert console


@needs_chromium
def test_filter_hides_cards_and_order_sorts_them(page, tmp_path):
    driver = """
      const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change")); };
      const shown = () => Array.from(document.querySelectorAll(".card:not([hidden])"));
      const out = {};
      set("finding", "Pleural Effusion"); set("outcome", "omitted"); set("stage", "sft");
      out.omitted = shown().map((c) => JSON.parse(c.dataset.outcomes).sft.omitted.includes("Pleural Effusion"));
      out.right = Array.from(document.querySelectorAll(".card")).filter((c) => JSON.parse(c.dataset.outcomes).sft.omitted.includes("Pleural Effusion")).length;
      document.getElementById("reset").click();
      out.all = shown().length;
      set("order", "errors-vision");
      out.errors = shown().map((c) => JSON.parse(c.dataset.numbers)["errors-vision"]);
      set("order", "study");
      out.studies = shown().map((c) => c.dataset.study);
      const result = document.createElement("pre"); result.id = "result"; result.textContent = JSON.stringify(out); document.body.append(result);
    """  # noqa: E501
    dom, console = browse(page, tmp_path, driver)
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom).group(1))
    assert not console
    assert 0 < found["right"] == len(found["omitted"]) < found["all"] == 24
    assert all(found["omitted"])
    assert found["errors"] == sorted(found["errors"], reverse=True) != sorted(found["errors"])
    assert found["studies"] == sorted(found["studies"])


@needs_chromium
def test_a_marked_phrase_shows_where_the_model_looked(page, tmp_path):
    driver = """
      const button = document.querySelector("button.seg.matched[data-ratio]"), card = button.closest(".card");
      const state = () => [card.querySelector(".heat").hidden, button.getAttribute("aria-pressed"), card.querySelector(".caption").textContent.length > 20];
      const out = [state()];
      button.click(); out.push(state());
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"})); out.push(state());
      const result = document.createElement("pre"); result.id = "result"; result.textContent = JSON.stringify(out); document.body.append(result);
    """  # noqa: E501
    dom, _ = browse(page, tmp_path, driver)
    before, looking, after = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom).group(1))
    assert before == after == [True, "false", False]
    assert looking == [False, "true", True]
