"""`deconstruct report DIR`: of one run, what it has learned, in a few lines; of a folder of runs, a page."""

from __future__ import annotations

import argparse

from deconstruct.report.one_run import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the workdir of a run, or a folder of them")


def run(arguments: argparse.Namespace) -> int:
    print(report(arguments.folder))
    return 0
