"""What every result file says beside its numbers: when, on what machine, with which versions, by which command."""

import datetime
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "diffusers", "transformers")


def processor() -> str:
    """Name of the CPU, as far as the system says."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def circumstances() -> dict[str, Any]:
    """The head of a result file."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": " ".join(["python", *sys.argv]),
    }
