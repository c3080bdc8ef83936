"""The paper's own numbers: tables 1 to 4 of arXiv:2510.11602, as facts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TASKS = ("arc_easy", "boolq", "copa", "piqa", "sciq", "rte", "hellaswag")
TABLES = {
    1: ("table1_500m_mha", "500m, as many key heads as query heads"),
    2: ("table2_1.7b", "1.7b, Qwen3 blocks"),
    3: ("table3_500m_gqa", "500m, grouped queries"),
}
LAYOUTS = {"uniform": "uniform", "hybrid": "even"}  # its word -> ours


@functools.cache
def paper_tables() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("paper_tables.json").read_text())


def row_of(name: str) -> tuple[str, str, str]:
    """(variant, layout, skip) of a row such as `standard`, `hybrid/mlp` or `skip/mlp`, which is a hybrid's."""
    kind, _, variant = name.rpartition("/")
    return (variant, "even", "block") if kind == "skip" else (variant, LAYOUTS.get(kind, "uniform"), "")


def accuracy_table(number: int) -> dict[tuple[str, str, str], dict[str, float | None]]:
    """Of table 1, 2 or 3: (variant, layout, skip) -> its numbers, accuracies in percent. Not those of guessing."""
    rows = paper_tables()[TABLES[number][0]]
    return {
        row_of(name): {column: _value(entry) for column, entry in row.items()}
        for name, row in rows.items()
        if name not in ("random_guess", "majority")
    }


def perplexity_by_context() -> dict[tuple[str, str], dict[int, float]]:
    """Table 4: (variant, layout) -> WikiText perplexity by context, at 500m."""
    table = paper_tables()["table4_500m_wikitext_ppl_by_context"]
    rows = {row_of(name)[:2]: values for name, values in table.items() if name != "lengths"}
    return {row: dict(zip(table["lengths"], values, strict=True)) for row, values in rows.items()}


def _value(entry: Any) -> float | None:
    return entry["value"] if isinstance(entry, dict) else entry
