"""`deconstruct report DIR`: of one run, what it has learned, in a few lines; of folders of runs, a page.

deconstruct report runs/quickstart                 # a workdir: a few lines
deconstruct report runs/study --output=study       # a folder of workdirs: study/report.html, report.md and pictures
deconstruct report runs/study runs/recall          # two folders, one page
"""

from __future__ import annotations

import argparse

from etils import epath

from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="the workdir of a run, or folders of them")
    parser.add_argument("--output", metavar="DIR", help="of folders: where the page goes (default: DIR/report)")
    parser.add_argument(
        "--bench",
        metavar="FILE",
        help="of a folder: times a token by length, as `deconstruct bench contexts --json` prints them",
    )


def run(arguments: argparse.Namespace) -> int:
    first = arguments.folders[0]
    if len(arguments.folders) == 1 and Workdir(first).config_file.exists():
        for name in ("output", "bench"):
            if getattr(arguments, name):
                raise UserError(f"--{name}: a page is of a folder of runs, and {first} is one run")
        from deconstruct.report.one_run import report

        print(report(first))
        return 0
    from deconstruct.compare.command import check_packages, read_bench

    check_packages()
    from deconstruct.report.sections import write_page
    from deconstruct.report.study import read_study

    bench, study = read_bench(arguments.bench), read_study(arguments.folders)
    output = epath.Path(arguments.output or f"{first.rstrip('/')}/report")
    for line in write_page(study, bench, output):
        print(line)
    return 0
