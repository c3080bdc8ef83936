"""From a study to its page: a section for each shape of model, with findings, pictures and tables."""

from __future__ import annotations

from typing import Any

from etils import epath

from deconstruct.compare.tables import noise_floor
from deconstruct.report import page, tables
from deconstruct.report.figures import pictures, recall_pictures
from deconstruct.report.findings import findings
from deconstruct.report.recall import Recall
from deconstruct.report.study import Family, Study

TITLE = "Attention taken apart, beside the paper"


def write_page(study: Study, bench: dict[str, Any] | None, output: epath.Path) -> list[str]:
    """Writes report.html, report.md and the pictures. `bench`: times a token by length. Returns the verdicts, a line
    each, and where the page is."""
    sections = [_section(family, bench) for family in study.families.values()]
    if study.recall is not None:
        sections.append(_recall(study.recall))
    opening = [
        f"What the runs in {study.folder} say of the seven findings of “Deconstructing Attention” (arXiv:2510.11602): "
        "its numbers beside ours, which are of other sizes, text and training. A verdict holds for these runs at their "
        "scale.",
        *([f"Not evaluated, and left out: {', '.join(study.without)}."] if study.without else []),
    ]
    shown = tables.tables(study)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(page.as_html(TITLE, opening, sections, shown))
    (output / "report.md").write_text(page.as_markdown(TITLE, opening, sections, shown))
    page.save_pictures(output, sections)
    said = []
    for section in sections:
        said += [section.title, *(f"  {one.number}. {one.title}: {one.said}" for one in section.findings)]
    return [*said, f"{output}: report.html, report.md and pictures"]


def _section(family: Family, bench: dict[str, Any] | None) -> page.Section:
    main = family.main()
    one = family.comparison(main) if main else None
    config = family.config
    runs = sum(len(group.runs) for group in family.groups.values())
    steps = sorted(set(family.steps.values()))
    trained = f"{steps[-1]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    opening = [
        f"{runs} runs of {len(family.groups)} configurations: {config.model.num_layers} layers, width "
        f"{config.model.hidden_size:,}, {config.model.num_heads} heads; {trained} of {config.batch_size:,} "
        f"sequences of {config.sequence_length:,} tokens.",
        *([noise_floor(one)] if one is not None else []),
    ]
    return page.Section(
        {1: "Qwen2.5 blocks", 2: "Qwen3 blocks", 3: "Qwen2.5 blocks, grouped queries"}[family.table],
        opening,
        findings(family),
        pictures(family, bench),
        [tables.differences(one)] if one is not None and len(one.rows) > 1 else [],
    )


def _recall(found: Recall) -> page.Section:
    config = found.groups[0].config
    runs = sum(len(group.runs) for group in found.groups)
    opening = [
        f"{runs} runs of {len(found.groups)} configurations on documents made to be recalled from, {found.documents}: "
        f"{config.model.num_layers} layers, {config.steps:,} steps of {config.batch_size:,} documents of "
        f"{config.sequence_length:,} tokens.",
        noise_floor(found.accuracy),
    ]
    return page.Section("Recall", opening, [], recall_pictures(found), [tables.recall(found)])
