"""The documents: links lead somewhere, the command table is complete, the decisions are listed."""

import re
from pathlib import Path

import pytest

from entrenar.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| `entrenar (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [command.name for command in app.registered_commands]


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))
    assert re.findall(r"\((0\d+-[\w-]+\.md)\)", index) == pages


def test_the_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md") if page.parent.name != "decisions"]
    assert [page for page in pages if f"({page})" not in readme] == []


def test_the_glossary_is_short_and_sorted() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    words = [word.lower() for word, _ in rows[1:]]
    assert 0 < len(words) <= 50
    assert words == sorted(set(words))
