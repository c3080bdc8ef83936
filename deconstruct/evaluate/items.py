"""eval_items/STEP.TASK.jsonl.gz: the items that a number of the ledger is made of. Paired tests need them.

    {"doc_id", "correct", "loglikelihoods", facts such as "tokens", "skip", and the qualifiers of the task}

doc_id: which document or question. correct: whether the answer is right; null of what has no answer, such as text.
loglikelihoods: nats, of each answer, or of the text. The file is written before the ledger's records: where these are,
its items are.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from deconstruct.evaluate.evaluation import Item, Setting
from deconstruct.paths import write_whole
from deconstruct.run.workdir import Workdir


def write_items(run_dir: Workdir, step: int, task: str, setting: Setting, items: Iterable[Item]) -> None:
    """Puts the items of one setting into the file, for those of it that are there."""
    path = _path(run_dir, step, task)
    kept = [item for item in read_items(run_dir, step, task) if not setting.items() <= item.items()]
    rows = [*kept, *(_row(item, setting) for item in items)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, gzip.compress(lines.encode(), mtime=0))


def read_items(run_dir: Workdir, step: int, task: str) -> list[dict[str, Any]]:
    """All there is of a task at a step, in every setting; nothing where there is no file."""
    path = _path(run_dir, step, task)
    if not path.exists():
        return []
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def _row(item: Item, setting: Setting) -> dict[str, Any]:
    head = {"doc_id": item.doc_id, "correct": item.correct, "loglikelihoods": list(item.loglikelihoods)}
    return {**head, **item.facts, **setting}


def _path(run_dir: Workdir, step: int, task: str) -> epath.Path:
    return run_dir.items / f"{step}.{task}.jsonl.gz"
