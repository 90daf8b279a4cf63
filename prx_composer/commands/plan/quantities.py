"""Counts and rates as people write them; durations are in `schedule`."""

import re

from prx_composer.common.errors import UserError

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b(?:/s|ps)?", re.IGNORECASE)


def parse_count(text: str, what: str) -> int:
    """ "8.7M", "240k" or "1000" → a whole number ≥ 1; raises UserError, naming `what`, for anything else."""
    match = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    count = round(float(match[1]) * _POWERS[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(f"{what}: {text!r} is no number such as 8.7M, 240k or 1000.")
    return count


def parse_rate(text: str, what: str) -> float:
    """ "1GB/s" or "500MB/s" → bytes per second (decimal); raises UserError, naming `what`, for anything else or nothing."""
    match = _RATE.fullmatch(text.strip())
    rate = float(match[1]) * _POWERS[match[2].lower()] if match else 0.0
    if rate <= 0:
        raise UserError(f"{what}: {text!r} is no rate such as 1GB/s or 500MB/s.")
    return rate
