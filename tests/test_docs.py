"""The pages: links lead somewhere, the README is short, and every verb, key and floor is told of."""

import re
from pathlib import Path

import pytest

from deconstruct.cli import VERBS
from deconstruct.config import known_keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    linked = {link.partition("#")[0] for link in LINK.findall(text)}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_every_verb_and_every_key_is_told_of():
    verbs, keys = ((ROOT / "docs" / name).read_text() for name in ("command-line.md", "configuration.md"))
    assert not [verb for verb in VERBS if f"deconstruct {verb}" not in verbs]
    assert not [key for key in known_keys() if f"`{key}`" not in keys]


def test_every_floor_stands_in_the_table():
    from tests.test_imports import FLOORS

    text = (ROOT / "docs" / "architecture.md").read_text()
    names = [
        re.findall(r"`([a-z_]+)(?:/|\.py)`", line.split("|")[1]) for line in text.splitlines() if line[:3] == "| `"
    ]
    assert [set(row) for row in reversed(names)] == FLOORS
