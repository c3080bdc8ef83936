"""At which step runs are compared: where they have had as many steps, tokens, FLOPs or seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deconstruct.compare.groups import Run
from deconstruct.costs import accounting
from deconstruct.run.jsonl import read_jsonl
from deconstruct.types import UserError

BUDGETS = {
    "end": "the last step that is evaluated",
    "steps": "updates",
    "tokens": "tokens of training",
    "flops": "FLOPs of training that are needed",
    "seconds": "seconds spent in steps, without compiling, waiting for data and saving",
}
TOLERANCE = 0.02  # how far from the common budget a run may have been evaluated


def spent(run: Run, steps: Sequence[int], budget: str) -> np.ndarray:
    """float64 [steps]: what the run had had of the budget after each of some steps."""
    config, done = run.config, np.asarray(steps, np.float64)
    if budget in ("end", "steps"):
        return done
    if budget == "tokens":
        return done * config.batch_size * config.sequence_length
    if budget == "flops":
        return done * accounting.train_flops(config.model, config.batch_size, config.sequence_length).needed
    logged = [record for record in read_jsonl(run.run_dir.metrics) if "seconds" in record]
    if not logged:
        raise UserError(f"--match=seconds: {run.run_dir.metrics} does not say how long its steps took")
    seconds = np.cumsum([record["seconds"].get("step", 0.0) for record in logged])
    return np.interp(done, [0, *(record["step"] for record in logged)], [0, *seconds])


def matched(runs: list[Run], budget: str) -> dict[str, int]:
    """Run -> the evaluated step nearest to the largest budget that all runs have reached. Raises UserError where a run
    was not evaluated near it."""
    evaluated = {run.name: _evaluated(run) for run in runs}
    if budget == "end":
        return {name: steps[-1] for name, steps in evaluated.items()}
    had = {run.name: spent(run, evaluated[run.name], budget) for run in runs}
    common = min(float(amounts[-1]) for amounts in had.values())
    chosen = {}
    for run in runs:
        amounts = had[run.name]
        nearest = int(np.argmin(np.abs(amounts - common)))
        if abs(amounts[nearest] - common) > TOLERANCE * common:
            per_step = amounts[-1] / evaluated[run.name][-1]
            raise UserError(
                f"--match={budget}: all runs have had {common:.4g} {budget}, and {run.name} was not evaluated near "
                f"that; `deconstruct evaluate --workdir={run.run_dir.folder} --step={round(common / per_step)}` (or "
                "the checkpoint next to it, or --step=all) does so; --match=end takes the last of each"
            )
        chosen[run.name] = evaluated[run.name][nearest]
    return chosen


def _evaluated(run: Run) -> list[int]:
    steps = sorted({record["step"] for record in read_jsonl(run.run_dir.evaluations)})
    if not steps:
        raise UserError(f"{run.run_dir.folder}: not evaluated yet; `deconstruct evaluate` does so")
    return steps
