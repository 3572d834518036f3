"""The page about a dataset: verdict, checks, counts, quarantine. One HTML file without text or images of patients."""

from collections import Counter
from pathlib import Path

import jinja2
import pyarrow as pa

from valor.data.checks import SITE, Outcome
from valor.data.facts import Facts

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Dataset {{ digest[:12] }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd}td.n{text-align:right}
.pass{color:#176b34}.fail{color:#a31515;font-weight:600}
</style></head><body>
<h1>Dataset {{ digest[:12] }}</h1>
<p class="{{ 'pass' if passed else 'fail' }}">{{ verdict }}</p>
<h2>Checks</h2>
{% if outcomes %}<table><tr><th>check<th>of<th>expected<th>observed<th>verdict</tr>
{% for o in outcomes %}<tr><td>{{ o.check.name }}<td>{{ o.check.table }}.{{ o.check.column }}
<td>{{ o.check.limit() }}<td>{{ o.found() }}
<td class="{{ 'pass' if o.passed else 'fail' }}">{{ "passed" if o.passed else "failed" }}</tr>
{% endfor %}</table>
<p><a href="{{ site }}/index.html">Great Expectations' own pages</a></p>{% else %}<p>No check ran.</p>{% endif %}
<h2>Counts</h2>
<table>{% for name, value in overall.items() %}<tr><td>{{ name }}<td class="n">{{ "%.4g"|format(value) }}</tr>
{% endfor %}</table>
<h2>Images</h2>
{% if images %}<table><tr><th>fact<th>minimum<th>median<th>maximum</tr>{% for name, values in images.items() %}
<tr><td>{{ name }}{% for value in values %}<td class="n">{{ "%.4g"|format(value) }}{% endfor %}</tr>{% endfor %}</table>
{% else %}<p>None.</p>{% endif %}
<h2>Quarantine</h2>
{% if reasons %}<table><tr><th>reason<th>lost<th>inputs</tr>{% for (reason, scope), count in reasons %}
<tr><td>{{ reason }}<td>{{ scope }}<td class="n">{{ count }}</tr>{% endfor %}</table>{% else %}<p>Empty.</p>{% endif %}
</body></html>
"""
_IMAGE_FACTS = ("width", "height", "stored_rows", "stored_columns", "grey_mean", "grey_std", "contrast", "png_bytes")


def write_page(
    folder: Path, *, digest: str, facts: Facts, quarantine: pa.Table, outcomes: list[Outcome], verdict: str
) -> None:
    """Write `<folder>/index.html`."""
    pairs = zip(quarantine["reason"].to_pylist(), quarantine["scope"].to_pylist(), strict=True)
    images = facts.images
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    html = page.render(
        digest=digest,
        passed=bool(outcomes) and all(outcome.passed for outcome in outcomes),
        verdict=verdict,
        outcomes=outcomes,
        site=SITE,
        overall=facts.overall.iloc[0].to_dict(),
        images={
            name: (images[name].min(), images[name].median(), images[name].max())
            for name in (_IMAGE_FACTS if len(images) else ())
        },
        reasons=sorted(Counter(pairs).items()),
    )
    (folder / "index.html").write_text(html, encoding="utf-8")
