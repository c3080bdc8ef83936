"""Runs by configuration: those that differ in their seed alone are a group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from deconstruct.attention.registry import VARIANTS
from deconstruct.config import Config, known_keys
from deconstruct.evaluate.table import differing_keys, value_of
from deconstruct.layout import LAYOUTS, STANDARD
from deconstruct.run.workdir import Workdir, find_workdirs, named
from deconstruct.spelling import split_list
from deconstruct.types import UserError

# Keys that say how a run was carried out, and not what it computes, last bits aside.
CARRIED_OUT = (
    *("seed", "checkpoint_every", "log_every", "accumulation", "mesh.", "checkpoint.", "faults."),
    *("model.remat", "model.scan"),
)
# Keys that are given where a variant reads them, and stay at their defaults where none does.
FILLED_IN = ("model.fixed_length", "model.end_of_text", "extensions")


class Run(NamedTuple):
    name: str
    run_dir: Workdir
    config: Config


class Group(NamedTuple):
    """Runs of one configuration. `values`: of the keys in which the groups differ, in the order of config.py."""

    values: dict[str, str]
    runs: list[Run]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def label(self) -> str:
        """The values, each with its key but for variant and layout, which speak for themselves."""
        said = [value if key in ("variant", "layout") else f"{key}={value}" for key, value in self.values.items()]
        return ", ".join(said) or self.config.variant


def read_runs(folders: Iterable[str]) -> list[Run]:
    """The runs that some folders are, or hold. Raises UserError for a folder without any."""
    return [Run(name, run_dir, run_dir.read_config()) for name, run_dir in named(find_workdirs(folders))]


def grouped(runs: list[Run]) -> list[Group]:
    """In the order of the paper's variants and of the layouts. Raises UserError where a group has a seed twice."""
    configs = [run.config for run in runs]
    keys = [key for key in differing_keys(configs) if not key.startswith(CARRIED_OUT) and _is_chosen(key, configs)]
    groups: dict[tuple[str, ...], Group] = {}
    for run in runs:
        values = tuple(str(value_of(run.config, key)) for key in keys)
        groups.setdefault(values, Group(dict(zip(keys, values, strict=True)), [])).runs.append(run)
    for group in groups.values():
        by_seed: dict[int, Run] = {}
        for run in group.runs:
            if (other := by_seed.setdefault(run.config.seed, run)) is not run:
                raise UserError(
                    f"{other.run_dir.folder} and {run.run_dir.folder} are of one configuration and one seed "
                    f"({run.config.seed}); leave one of them out"
                )
    return sorted(groups.values(), key=_place)


def find_baseline(groups: list[Group], text: str | None) -> Group:
    """The group that `KEY=VALUE,...` picks; without a text standard attention, or the first. Raises UserError."""
    if text is None:
        return next((group for group in groups if group.config.variant == STANDARD), groups[0])
    wanted = {}
    for entry in split_list(text):
        key, equals, value = entry.partition("=")
        if not equals or key not in known_keys():
            raise UserError(f"--baseline={text}: expected KEY=VALUE,..., such as variant=standard")
        wanted[key] = value
    fits = [g for g in groups if all(str(value_of(g.config, key)) == value for key, value in wanted.items())]
    if len(fits) != 1:
        among = "; ".join(group.label for group in fits or groups)
        raise UserError(f"--baseline={text}: fits {len(fits)} groups, and should fit one of: {among}")
    return fits[0]


def _is_chosen(key: str, configs: list[Config]) -> bool:
    """Whether configurations that read the key differ in it."""
    return key not in FILLED_IN or len({value_of(c, key) for c in configs} - {value_of(Config(), key)}) > 1


def _place(group: Group) -> tuple[int, int, str]:
    variants, layouts = list(VARIANTS), list(LAYOUTS)
    variant, layout = group.config.variant, group.config.layout
    return (
        variants.index(variant) if variant in variants else len(variants),
        layouts.index(layout) if layout in layouts else len(layouts),
        group.label,
    )
