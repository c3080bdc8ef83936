"""The paper's tables 1 to 4, with one's own numbers before the paper's: `ours (paper's)`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deconstruct.compare.comparison import Comparison
from deconstruct.compare.tables import difference_rows, mean_and_spread
from deconstruct.evaluate.paper import TABLES, TASKS, accuracy_table, perplexity_by_context
from deconstruct.report.recall import Recall, state_bytes
from deconstruct.report.study import BASELINE, Cell, Family, Study

# Column of the paper -> (task, metric) of the ledger, and how much larger the paper writes it.
COLUMNS = {task: (task, "acc", 100.0) for task in TASKS} | {
    "wikitext_ppl": ("wikitext", "word_perplexity", 1.0),
    "lambada_ppl": ("lambada_openai", "perplexity", 1.0),
    "lambada_acc": ("lambada_openai", "acc", 100.0),
}
HEADS = {"average": "average", "wikitext_ppl": "WikiText ppl", "lambada_ppl": "LAMBADA ppl", "lambada_acc": "LAMBADA %"}


class Table(NamedTuple):
    """Cells are text; the first column is what a row is of. `own`: whether anything in it is one's own."""

    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]
    own: bool = True


def tables(study: Study) -> list[Table]:
    """1 to 3, by shape, and 4."""
    found = [_accuracies(number, study.families.get(number)) for number in TABLES]
    return [*found, _contexts(study.families.get(1))]


def differences(one: Comparison) -> Table:
    heads, rows = difference_rows(one)
    note = (
        f"{one.measure.name}, less {one.baseline.label}, in nats a token. Over items: these runs on other documents; "
        "over seeds and items: runs of other seeds as well. p is Holm's, for all rows together."
    )
    return Table("Differences from standard attention", note, heads, rows)


def recall(found: Recall) -> Table:
    one = found.accuracy
    heads, rows = difference_rows(one)
    own = [[mean_and_spread(row, one.measure), f"{state_bytes(row.group):,}"] for row in one.rows]
    note = (
        "Answers that get the greatest logit, in percent ± deviation over seeds; what decoding keeps of a document, in "
        f"bytes at 16 bit; and the difference from {one.baseline.label}, in points. p is Holm's, for all rows together."
    )
    rows = [[*row[:2], *cells, *row[2:]] for row, cells in zip(rows, own, strict=True)]
    return Table("Recall by variant", note, [*heads[:2], "accuracy %", "state bytes", *heads[2:]], rows)


def _accuracies(number: int, family: Family | None) -> Table:
    paper = accuracy_table(number)
    main = family.main() if family else None
    rows, own = [], False
    for variant, layout, skip in dict.fromkeys([*paper, *_own_rows(family)]):
        cells = [_name((variant, layout)) + (", skipped" if skip else "")]
        accuracies: list[list[float]] = []
        for column in [*TASKS, "average", *list(COLUMNS)[len(TASKS) :]]:
            printed = paper.get((variant, layout, skip), {}).get(column)
            values: list[float] = []
            if column == "average":
                values = list(np.mean(accuracies, 0)) if len(accuracies) == len(TASKS) else []
            elif family is not None:
                task, metric, scale = COLUMNS[column]
                values = [scale * value for value in family.values((variant, layout), task, metric, skip)]
                if column in TASKS and values:
                    accuracies.append(values)
            own = own or bool(values)
            cells.append(beside(values, printed))
        if main is not None and family is not None:
            values = _perplexities(family, (variant, layout), main.get("context"), skip)
            own = own or bool(values)
            cells.append(beside(values, None))
        rows.append(cells)
    heads = ["", *TASKS, *HEADS.values()]
    if main is not None:
        heads.append(f"validation ppl at {main.get('context')}")
    note = "Accuracies in percent, zero-shot. ours ± deviation over seeds (the paper's)."
    if family is None:
        note = "No runs of this shape here: the paper's numbers alone."
    return Table(f"Table {number}: {TABLES[number][1]}", note, heads, rows, own)


def _own_rows(family: Family | None) -> list[tuple[str, str, str]]:
    return [(*cell, "") for cell in family.groups] if family else []


def _contexts(family: Family | None) -> Table:
    paper = perplexity_by_context()
    own = {m.get("context") for m in family.perplexities()} if family else set()
    contexts = sorted(own | {context for row in paper.values() for context in row})
    rows = []
    for cell in dict.fromkeys([*paper, *(family.groups if family else [])]):
        values = [_perplexities(family, cell, context, "") if family else [] for context in contexts]
        printed = [paper.get(cell, {}).get(context) for context in contexts]
        rows.append([_name(cell), *map(beside, values, printed)])
    note = (
        "ours, on the validation text, ± deviation over seeds (the paper's: WikiText at 500m). Texts and sizes differ: "
    )
    note += "compare the order, and how a row falls."
    return Table("Table 4: perplexity by context", note, ["", *map(str, contexts)], rows, bool(own))


def _perplexities(family: Family, cell: Cell, context: int, skip: str) -> list[float]:
    measure = next((m for m in family.perplexities(skip) if m.get("context") == context), None)
    if measure is None or cell not in family.having(measure):
        return []
    return [measure.shown(family.found[name][measure].value) for name in family.names(cell)]


def beside(values: list[float], printed: float | None) -> str:
    """`ours ± deviation (paper's)`, with what there is of it."""
    own = short(float(np.mean(values))) if values else ""
    if len(values) > 1:
        own += f" ± {np.std(values, ddof=1):.2g}"
    return " ".join(filter(None, [own, "" if printed is None else f"({short(printed)})"]))


def short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _name(cell: Cell) -> str:
    return cell[0] if cell == BASELINE else f"{cell[0]}, {cell[1]}"
