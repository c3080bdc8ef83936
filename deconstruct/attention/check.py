"""`dc.check`: whether a form or a mixer keeps to its contract, as a table of ten rows.

It tries the class inside its mixer at a tiny size; nothing is registered, and it need not be.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deconstruct.attention.form import Form
from deconstruct.attention.mixer import Mixer
from deconstruct.attention.rows import ROWS
from deconstruct.attention.subject import FailedError, NotApplicableError, Subject
from deconstruct.attention.trial import alone
from deconstruct.attention.variants import find_variant, options_of, variant_of
from deconstruct.types import UserError

OK, FAILED, NOT_APPLICABLE = "ok", "failed", "not applicable"


class Row(NamedTuple):
    name: str
    status: str  # ok, failed or not applicable
    detail: str  # the largest error, or what is wrong, or why there is nothing to check


class Report:
    """What was found: `passed`, `rows`, `seconds`; printed, or as a cell's last line, it is a table."""

    def __init__(self, name: str, rows: tuple[Row, ...], seconds: float):
        self.name, self.rows, self.seconds = name, rows, seconds

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the rows that failed."""
        return tuple(row.name for row in self.rows if row.status == FAILED)

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        found = "passed" if self.passed else f"failed: {', '.join(self.failed)}"
        lines = [f"{row.name:<10}  {row.status:<14}  {row.detail}" for row in self.rows]
        return "\n".join([f"{self.name}: {found} ({self.seconds:.1f} s)", "", *lines])

    __repr__ = __str__


def check(what: str | type[Form] | type[Mixer], **options: Any) -> Report:
    """Checks a form or mixer, registered or not, or a variant by its name: `check(Mine, size=64)`,
    `check("static_embedding/mine(size=64)")`.

    Raises UserError for what is neither, and for an option it does not have. Whatever goes wrong in its code is a
    failed row.
    """
    begin = time.perf_counter()
    subject = _subject(what, options)
    rows = []
    # Products are not rounded to fewer bits than their inputs have, which an accelerator does unless asked.
    with alone(), jax.default_matmul_precision("highest"):
        for name in ROWS:
            rows.append(_row(name, subject))
            if rows[-1].status == FAILED:
                subject.failed.add(name)
    return Report(subject.name, tuple(rows), time.perf_counter() - begin)


def _subject(what: str | type[Form] | type[Mixer], options: dict[str, Any]) -> Subject:
    if isinstance(what, str):
        if options:
            raise UserError(f"check({what!r}): options are spelled in the name, {what}({next(iter(options))}=...)")
        return Subject(find_variant(what), what)
    if not isinstance(what, type):
        raise UserError(f"check({what!r}): expected a class, or the name of a variant")
    known = options_of(what)
    for option in options:
        if option not in known:
            offers = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"check({what.__name__}): the option {option} is unknown; {offers}")
    return Subject(variant_of(what, options), getattr(what, "name", what.__name__))


def _row(name: str, subject: Subject) -> Row:
    function, needs = ROWS[name]
    lacking = [need for need in needs if need in subject.failed]
    if lacking:
        return Row(name, NOT_APPLICABLE, f"not checked, since {lacking[0]} failed")
    try:
        return Row(name, OK, function(subject))
    except NotApplicableError as error:
        return Row(name, NOT_APPLICABLE, str(error))
    except FailedError as error:
        return Row(name, FAILED, str(error))
    except Exception as error:  # the user's code may fail in any way
        return Row(name, FAILED, _one_line(error))


def _one_line(error: Exception) -> str:
    """The error, and where in the user's code it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame.filename)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = next(iter(str(error).strip().splitlines()), "")
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{said}{where}"


def _ours(filename: str) -> bool:
    package = Path(__file__).resolve().parents[1]
    path = Path(filename)
    return path.is_relative_to(package) or "site-packages" in path.parts or path.parts[:1] == ("<frozen",)
