"""No reward, metric or labeler may know the phantom: not its grammar, not its truth, not by way of another module."""

import grimp
import pytest

PACKAGES = ("valor.rewards", "valor.metrics", "valor.clinical")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("valor", cache_dir=None)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_path_to_the_phantom(graph, package):
    members = {package, *graph.find_descendants(package)}
    phantom = {"valor.data.phantom", *graph.find_descendants("valor.data.phantom")}
    reached = {m: sorted(phantom & graph.find_upstream_modules(m)) for m in members}
    assert {m: r for m, r in reached.items() if r} == {}


def test_the_check_can_fail(graph):
    assert "valor.data.phantom.wording" in graph.find_upstream_modules("valor.data.phantom.report")


@pytest.mark.parametrize("package", PACKAGES)
def test_phantom_is_not_named_in_the_sources(package):
    """Neither by a dynamic import."""
    import importlib
    from pathlib import Path

    folder = Path(importlib.import_module(package).__file__).parent
    naming = [p.name for p in sorted(folder.glob("*.py")) if "phantom" in p.read_text(encoding="utf-8").lower()]
    assert naming == []
