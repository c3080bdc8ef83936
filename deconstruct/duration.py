"""Seconds as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:07, 12:00, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
