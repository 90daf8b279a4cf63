"""`prx env`: what a report of a mistake needs to say of the machine and of what is installed on it."""

import os
import platform
import runpy
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import Option, echo

from prx_composer.commands import write_json
from prx_composer.common.errors import redacted
from prx_composer.common.installation import NAME, PACKAGES, commit, extras, version_of

# Of the environment: what libraries compute with and where they look, but nobody's names, hosts or keys.
_BEGINNINGS = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "FSDP_", "CUBLAS_", "HIP_", "ROCR_")
_NAMES = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "WANDB_MODE", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Options of `prx env`."""

    json_file: Annotated[str | None, Option("--json", metavar="FILE", help="Write it as JSON; - prints only that.")] = None


def show_environment(options: EnvOptions) -> None:
    """Print what an issue report needs: versions, commit, GPUs, CUDA, extras, and the environment variables that matter.

    It imports neither torch nor Composer. Keys and passwords are left out, and your home folder is ~.
    """
    found = environment()
    if options.json_file is not None:
        write_json(found, options.json_file)
    if options.json_file != "-":
        echo(as_text(found))


def environment() -> dict[str, Any]:
    """Return the facts: those that are not known are None or left out."""
    torch = _torch()
    variables = {key: value for key, value in sorted(os.environ.items()) if key.startswith(_BEGINNINGS) or key in _NAMES}
    home = str(Path.home())
    return {
        "version": version_of(NAME),
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: version for name in PACKAGES[1:] if (version := version_of(name))},
        "cuda": torch.get("cuda"),
        "hip": torch.get("hip"),
        "gpus": _gpus(),
        "extras": {name: {one.name: version_of(one.name) for one in packages} for name, packages in extras().items()},
        "environment": {key: value.replace(home, "~") for key, value in redacted(variables).items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """Return lines to paste into a report."""
    gpus = Counter(found["gpus"] or [])
    there = {name: found["extras"][name] for name in found["extras"] if all(found["extras"][name].values())}
    built = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPUs"
    return "\n".join(
        [
            f"{NAME} {found['version']}, " + (f"commit {found['commit']}" if found["commit"] else "not from a clone"),
            f"Python {found['python']}, {found['system']}, {found['cpus']} CPUs",
            _listed({name: str(version) for name, version in found["versions"].items()}),
            f"GPUs: {'; '.join(f'{count} × {gpu}' for gpu, count in gpus.items()) or 'nvidia-smi shows none'}. "
            f"torch is built for {built}",
            f"extras: {'; '.join(f'{name} ({_listed(packages)})' for name, packages in there.items()) or 'none'}. "
            f"Not installed: {', '.join(name for name in found['extras'] if name not in there) or 'none'}",
            f"environment: {_listed(found['environment'], '=') or 'nothing that matters is set'}",
        ]
    )


def _listed(values: dict[str, str], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _torch() -> dict[str, Any]:
    """Return what torch says of its build, from the one file of it that imports nothing."""
    found = find_spec("torch")
    file = Path(found.origin or "").with_name("version.py") if found is not None else None
    return runpy.run_path(str(file)) if file is not None and file.is_file() else {}


def _gpus() -> list[str] | None:
    """Return name, memory and driver of each GPU; None where nvidia-smi isn't, or doesn't answer."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    parts = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [f"{', '.join(names)}, driver {driver}" for *names, driver in parts]
