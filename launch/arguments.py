"""What the launchers share: their options stand before --, the arguments of `deconstruct train` behind it."""

from __future__ import annotations

import argparse
import re

LONGEST_NAME = 40  # what Kubernetes allows for a name, 63, less what JobSet appends to it


def make_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options] -- arguments of deconstruct train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the arguments of `deconstruct train`; ends with status 2 where either is missing."""
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    cut = words.index("--") if "--" in words else len(words)
    arguments, train = parser.parse_args(words[:cut]), words[cut + 1 :]
    if not train:
        parser.error("expected -- and the arguments of deconstruct train")
    return arguments, train


def name_of_run(parser: argparse.ArgumentParser, given: str | None, train: list[str]) -> str:
    """`given`, or the last part of --workdir as a name that Kubernetes takes."""
    workdir = next((word.partition("=")[2] for word in train if word.startswith("--workdir=")), "")
    name = given or re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", name):
        parser.error(
            f"--name={name}: expected lower-case letters, digits and -, beginning with a letter, {LONGEST_NAME} at most"
        )
    return name
