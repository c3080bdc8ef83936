"""`deconstruct report DIR`: of one run, what it has learned, in a few lines; of a folder of runs, a page.

deconstruct report runs/quickstart                 # a workdir: a few lines
deconstruct report runs/study --output=study       # a folder of workdirs: study/report.html, report.md and pictures
"""

from __future__ import annotations

import argparse

from etils import epath

from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the workdir of a run, or a folder of them")
    parser.add_argument("--output", metavar="DIR", help="of a folder: where the page goes (default: DIR/report)")
    parser.add_argument(
        "--bench",
        metavar="FILE",
        help="of a folder: times a token by length, as `deconstruct bench contexts --json` prints them",
    )


def run(arguments: argparse.Namespace) -> int:
    if Workdir(arguments.folder).config_file.exists():
        for name in ("output", "bench"):
            if getattr(arguments, name):
                raise UserError(f"--{name}: a page is of a folder of runs, and {arguments.folder} is one run")
        from deconstruct.report.one_run import report

        print(report(arguments.folder))
        return 0
    from deconstruct.compare.command import check_packages, read_bench

    check_packages()
    from deconstruct.report.sections import write_page
    from deconstruct.report.study import read_study

    bench, study = read_bench(arguments.bench), read_study(arguments.folder)
    output = epath.Path(arguments.output or f"{arguments.folder.rstrip('/')}/report")
    for line in write_page(study, bench, output):
        print(line)
    return 0
