"""The report as one HTML page that asks nothing of a network, and as Markdown with pictures beside it."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from deconstruct.compare.tables import markdown
from deconstruct.report.figures import Picture
from deconstruct.report.findings import Finding
from deconstruct.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"shown": "good", "shown in part": "part", "otherwise here": "bad"}  # verdict -> class; others are grey
STYLE = """
:root { color-scheme: light; --line: #d8dce2; --soft: #f5f6f8; --ink: #1c2733; --grey: #5d6875; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--ink); background: #fff;
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 0 0 .3rem; font-size: 1.05rem; line-height: 1.35; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
.note, figcaption, .runs { color: var(--grey); font-size: .88rem; }
.finding { border: 1px solid var(--line); border-left: .4rem solid #9aa4b0; border-radius: .3rem; padding: .8rem 1rem;
           margin: .8rem 0; }
.finding.good { border-left-color: #2e8b57; } .finding.part { border-left-color: #c98a00; }
.finding.bad { border-left-color: #b23b3b; }
.verdict { font-weight: 600; } .finding ul { margin: .4rem 0; padding-left: 1.1rem; } .finding p { margin: .3rem 0; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { background: var(--soft); } thead th:first-child { background: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .5rem; }
.panels svg { width: 100%; height: auto; } .panels.one { max-width: 46rem; }
figure { margin: 1rem 0; } details { margin: .8rem 0; } summary { cursor: pointer; }
"""


class Section(NamedTuple):
    """Of one shape of model: what its runs say."""

    title: str
    opening: list[str]
    findings: list[Finding]
    pictures: list[Picture]
    tables: list[Table]


def as_html(title: str, opening: list[str], sections: list[Section], tables: list[Table]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in opening)]
    parts.append("<nav>" + "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections))
    parts.append('<a href="#tables">The paper\'s tables</a></nav>')
    for section in sections:
        parts.append(f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>')
        parts += [f"<p>{html.escape(line)}</p>" for line in section.opening]
        parts += [_finding(finding) for finding in section.findings]
        parts += [_picture(picture) for picture in section.pictures]
        parts += [_table(table) for table in section.tables]
    parts.append('<h2 id="tables">The paper\'s tables, and ours</h2>')
    parts += [_table(table) for table in tables]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def as_markdown(title: str, opening: list[str], sections: list[Section], tables: list[Table]) -> str:
    """Pictures are those that `save_pictures` writes beside it."""
    parts = [f"# {title}", *opening]
    for section in sections:
        parts += [f"## {section.title}", *section.opening]
        for one in section.findings:
            evidence = "\n".join(f"- {line}" for line in one.evidence)
            runs = f"Runs: {', '.join(one.runs)}." if one.runs else ""
            parts += [f"### {one.number}. {one.title}", f"Paper: {one.claim}", f"**{one.said}** when {one.criterion}."]
            parts += [text for text in (evidence, runs) if text]
        for picture in section.pictures:
            images = "\n".join(f"![{label or picture.title}]({file})" for file, label, _ in _files(section, picture))
            parts += [f"### {picture.title}", images, picture.caption]
        parts += [_as_text(table) for table in section.tables]
    parts += ["## The paper's tables, and ours", *(_as_text(table) for table in tables)]
    return "\n\n".join(parts) + "\n"


def save_pictures(folder: epath.Path, sections: list[Section]) -> None:
    for section in sections:
        for picture in section.pictures:
            for file, _, figure in _files(section, picture):
                figure.savefig(str(folder / file), dpi=150)


def _files(section: Section, picture: Picture) -> list[tuple[str, str, Figure]]:
    """(file, what it is of, figure)"""
    named = []
    for label, figure in picture.panels:
        parts = (_anchor(section.title), picture.name, _anchor(label))
        named.append((f"{'-'.join(filter(None, parts))}.png", label, figure))
    return named


def _finding(one: Finding) -> str:
    evidence = "".join(f"<li>{html.escape(line)}</li>" for line in one.evidence)
    runs = f'<details class="runs"><summary>{len(one.runs)} runs</summary>{html.escape(", ".join(one.runs))}</details>'
    return (
        f'<section class="finding {COLOURS.get(one.verdict, "")}"><h3>{one.number}. {html.escape(one.title)}</h3>'
        f'<p class="note">Paper: {html.escape(one.claim)}</p>'
        f'<p><span class="verdict">{html.escape(one.said)}</span> '
        f'<span class="note">(when {html.escape(one.criterion)})</span></p>'
        f"<ul>{evidence}</ul>{runs if one.runs else ''}</section>"
    )


def _picture(picture: Picture) -> str:
    panels = "".join(f"<div>{_svg(figure, label or picture.title)}</div>" for label, figure in picture.panels)
    one = " one" if len(picture.panels) == 1 else ""
    return (
        f'<figure><h3>{html.escape(picture.title)}</h3><div class="panels{one}">{panels}</div>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _svg(figure: Figure, label: str) -> str:
    """The picture as part of a page: no header, no addresses of its metadata, names that no other picture has."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    own = f"f{id(figure):x}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{own}", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    body = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    note, title = f'<p class="note">{html.escape(table.note)}</p>', html.escape(table.title)
    if not table.own:
        return f"<details><summary>{title}</summary>{note}{body}</details>"
    return f"<h3>{title}</h3>{note}{body}"


def _as_text(table: Table) -> str:
    return "\n\n".join([f"### {table.title}", table.note, markdown(table.heads, table.rows)])


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
