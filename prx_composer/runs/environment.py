"""environment.jsonl: what every start of a run ran on and with. Host, user and secrets are not in it."""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from prx_composer.common.secrets import redacted_text

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.jsonl"
PACKAGES = ("prx-composer", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "transformers", "diffusers", "numpy")


def describe(arguments: list[str], batch: int, spent: float) -> dict[str, Any]:
    """Asks all ranks; call it on all.

    Args:
        arguments: the command, as in sys.argv.
        batch: steps, and `spent`: seconds of training, before this start.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "batch": batch,
        "spent": round(spent, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redacted_text(shlex.join([Path(arguments[0]).name, *arguments[1:]])) if arguments else "",
        "ranks": dist.get_world_size(),
        "devices": dict(Counter(dist.all_gather_object(device))),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,  # pyright: ignore[reportAttributeAccessIssue]
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record(folder: Path, batch: int, spent: float) -> None:
    """Adds a line for this start, on rank 0; a file that cannot be written is no reason not to train."""
    line = json.dumps(describe(sys.argv, batch, spent))
    if dist.get_global_rank() == 0:
        try:
            with (folder / ENVIRONMENT).open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", folder / ENVIRONMENT, error)
