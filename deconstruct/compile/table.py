"""Many configs for many topologies: each compiled in a process of its own, what came out kept in a file of JSON lines.

A compiler that dies takes its process along and leaves a line that says so, which the next call tries again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from deconstruct.types import UserError

REFUSED = 2  # the exit status of a mistake of the user's

log = logging.getLogger(__name__)

Record = dict[str, Any]
Key = tuple[str, str, str, int, str]


def fill(arguments: argparse.Namespace, programs: list[str]) -> int:
    """Compiles what the file does not hold yet, and prints all it holds as a table. Returns 1 where a process died."""
    path = Path(arguments.table)
    records = read(path)
    cells = list(itertools.product(arguments.topology, programs, arguments.config))
    for number, (topology, program, config) in enumerate(cells, 1):
        cell = {"config": config, "overrides": arguments.overrides, "topology": topology, "slices": arguments.slices}
        cell["program"] = program
        if "failed" not in records.get(_key(cell), {"failed": ""}):
            continue
        log.info("%d of %d: %s of %s for %s", number, len(cells), program, config, topology)
        records[_key(cell)] = record = _compile(cell)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(as_text(list(records.values())))
    return 1 if any("failed" in record for record in records.values()) else 0


def read(path: Path) -> dict[Key, Record]:
    """The last record of each cell. Raises UserError for a line that is none."""
    records = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
            records[_key(record)] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"--table={path}: line {number} is no result of compiling; remove it") from error
    return records


def _key(record: Record) -> Key:
    overrides = " ".join(record["overrides"])
    return record["config"], overrides, record["topology"], record["slices"], record["program"]


def _compile(cell: Record) -> Record:
    words = [f"--config={cell['config']}", *cell["overrides"], f"--topology={cell['topology']}"]
    words += [f"--slices={cell['slices']}", f"--programs={cell['program']}", "--json"]
    command = [sys.executable, "-m", "deconstruct", "compile", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.strip():
        return json.loads(done.stdout)
    said = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("deconstruct compile: ")
    return (
        {**cell, "refused": said} if done.returncode == REFUSED else {**cell, "failed": f"{said} ({done.returncode})"}
    )


def as_text(records: list[Record]) -> str:
    width = max([len(_experiment(record)) for record in records], default=0) + 2
    lines = [
        f"{'config':<{width}}{'topology':<16}{'program':<10}{'data x fsdp x tensor':<22}{'arguments':>10}{'temps':>8}"
        f"{'peak GB':>9}{'of':>6}{'GFLOPs':>10}{'sent MB':>9}{'seconds':>9}"
    ]
    for record in records:
        slices = f" x {record['slices']}" if record["slices"] > 1 else ""
        line = f"{_experiment(record):<{width}}{record['topology'] + slices:<16}{record['program']:<10}"
        if "bytes" not in record:
            lines.append(line + next(record[key] for key in ("refused", "failed", "reason") if key in record))
            continue
        needed, mesh = record["bytes"], " x ".join(map(str, record["mesh"].values()))
        sent = sum(found["bytes"] for found in record["collectives"].values())
        lines.append(
            f"{line}{mesh:<22}{needed['arguments'] / 1e9:>10.2f}{needed['temporaries'] / 1e9:>8.2f}"
            f"{needed['peak'] / 1e9:>9.2f}{record['memory'] / 1e9:>6.1f}{record['flops'] / 1e9:>10,.0f}"
            f"{sent / 1e6:>9,.0f}{record['seconds']['compile']:>9,.0f}{'' if record['fits'] else '  does not fit'}"
        )
    return "\n".join(lines)


def _experiment(record: Record) -> str:
    file, _, argument = record["config"].partition(":")
    return " ".join([Path(file).name, argument, *record["overrides"]])
