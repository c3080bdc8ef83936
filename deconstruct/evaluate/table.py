"""A table of runs side by side: perplexity by context, next to what the paper found.

    python -m deconstruct.evaluate.table runs/table

`make table` trains what it shows. The paper's column is WikiText perplexity at 500m parameters and 15 B tokens
(arXiv:2510.11602, table 4, context 2048): the order of the rows can be compared, the numbers cannot.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from etils import epath

from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

PAPER = {
    ("standard", "uniform"): 38.1,
    ("mlp", "uniform"): 993.5,
    ("approximate", "uniform"): 47.9,
    ("non_approximate", "uniform"): 9025.9,
    ("rnd_emb_qk", "uniform"): 84.8,
    ("fixed_seq_qk", "uniform"): 79.1,
    ("static_emb_qk", "uniform"): 79.9,
    ("mlp", "even"): 45.8,
    ("approximate", "even"): 39.4,
    ("non_approximate", "even"): 39.4,
    ("rnd_emb_qk", "even"): 39.3,
    ("fixed_seq_qk", "even"): 38.5,
    ("static_emb_qk", "even"): 38.7,
}


def read_runs(folder: str) -> list[dict[str, Any]]:
    """One entry per run that was evaluated: variant, layout, step, and perplexity by context at its latest step."""
    runs = []
    for path in sorted(epath.Path(folder).iterdir()):
        run_dir = Workdir(path)
        if not run_dir.config_file.exists():
            continue
        records = [
            r
            for r in read_jsonl(run_dir.evaluations)
            if r["metric"] == "perplexity" and r["text"] == "validation" and not r["skip"]
        ]
        if records:
            config, step = run_dir.read_config(), max(r["step"] for r in records)
            perplexity = {r["context"]: r["value"] for r in records if r["step"] == step}
            runs.append({"variant": config.variant, "layout": config.layout, "step": step, "perplexity": perplexity})
    if not runs:
        raise UserError(f"{folder}: no evaluated run in it; `make table` makes them")
    return runs


def as_markdown(runs: list[dict[str, Any]]) -> str:
    """Best first, by the longest context."""
    contexts = sorted({context for run in runs for context in run["perplexity"]})
    heads = ["variant", "layout", *(f"context {context}" for context in contexts), "paper (500m)"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(contexts) + 1) + "|"]
    for run in sorted(runs, key=lambda run: run["perplexity"].get(contexts[-1], float("inf"))):
        values = [f"{run['perplexity'][c]:.2f}" if c in run["perplexity"] else "" for c in contexts]
        paper = PAPER.get((run["variant"], run["layout"]), "")
        lines.append("| " + " | ".join([run["variant"], run["layout"], *values, str(paper)]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Perplexity of runs side by side.")
    parser.add_argument("folder", help="a folder of workdirs")
    folder = parser.parse_args().folder
    try:
        if not epath.Path(folder).is_dir():
            raise UserError(f"{folder}: there is no such folder")
        print(as_markdown(read_runs(folder)))
    except UserError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
