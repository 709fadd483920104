"""Documents agree with the code: the map's functions and drawing, links, versions."""

import re
import tomllib
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SnapshotBank
from tools import draw_architecture

REPOSITORY = Path(__file__).parents[2]
MAP = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("examples/*/*.md"), *REPOSITORY.glob("kernels/**/*.md")]
)


def test_functions_that_the_map_names_are_where_it_says():
    named = re.findall(r"`([\w/]+\.py)`: `(\w+)`", MAP)
    assert len(named) > 10
    for path, name in named:
        code = (REPOSITORY / "refine_titan" / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if not link.startswith(("https://", "http://", "#")):
            assert (page.parent / unquote(link.partition("#")[0])).exists(), link


def test_map_is_the_first_link_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([^)]+)\)", readme)[0] == "docs/architecture.md"


def test_drawing_is_current():
    assert draw_architecture.TARGET.read_text(encoding="utf-8") == draw_architecture.render(), "run python tools/draw_architecture.py"


def test_drawing_has_the_snapshots_of_the_scoring_pass():
    shard = ContextShard.of_rank(draw_architecture.DOCUMENTS, group=None)
    positions = SnapshotBank.boundaries(shard, draw_architecture.STRIDE)
    assert list(positions) == draw_architecture.snapshots()
    bank = SnapshotBank(shard, draw_architecture.STRIDE, positions, layers=[])
    for start in draw_architecture.STARTS:
        assert draw_architecture.last_snapshot(start) == bank.boundary_before(start)[0]


def test_drawing_says_what_it_shows_to_those_who_do_not_see_it():
    root = ElementTree.fromstring(draw_architecture.render())
    names = {child.tag.rpartition("}")[2]: child for child in root}
    labels = root.get("aria-labelledby").split()
    assert root.get("role") == "img" and labels == [names["title"].get("id"), names["desc"].get("id")]
    assert "prefers-color-scheme: dark" in names["style"].text


def test_citation_and_changelog_name_the_version():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert version in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
