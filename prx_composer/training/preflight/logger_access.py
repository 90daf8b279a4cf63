"""Whether what metrics are sent to is installed, writable, logged in and reachable."""

import importlib.util
import netrc
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from prx_composer.common.secrets import redacted
from prx_composer.loggers.wandb import wandb_mode
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.training.components import Components
from prx_composer.training.preflight.disk import why_not_writable
from prx_composer.training.preflight.result import Result, failed, guarded, passed, skipped

TIMEOUT = 5.0  # seconds for a host to answer


def check_loggers(recipe: Recipe, parts: Components) -> Iterator[Result]:
    """Whether what metrics are sent to is installed, writable, logged in and reachable."""
    checks = {"wandb": _check_wandb, "mlflow": _check_mlflow, "tensorboard": _check_tensorboard}
    for name, arguments in entries(recipe.loggers, "loggers"):
        if name in checks and not parts.is_wrong(f"loggers.{name}"):
            yield from guarded(checks[name](arguments))


def _check_wandb(arguments: dict[str, Any]) -> Iterator[Result]:
    if not _installed("wandb"):
        yield failed("loggers.wandb: wandb is not installed; `uv pip install wandb`, or set loggers.wandb=false.")
        return
    folder = Path((arguments.get("init_kwargs") or {}).get("dir") or os.environ.get("WANDB_DIR") or ".")
    if (problem := why_not_writable(folder)) is not None:
        yield failed(f"loggers.wandb: {folder}, where wandb keeps its files, cannot be written: {problem}. Set WANDB_DIR.")
    mode = wandb_mode(arguments.get("init_kwargs"))
    if mode in ("offline", "dryrun", "disabled"):
        yield passed(
            "loggers.wandb", f"{mode}: nothing is sent" + ("" if mode == "disabled" else "; `wandb sync` does that later")
        )
        return
    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        yield failed("loggers.wandb: there is no API key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline.")
    elif (reason := _silence(host)) is not None:
        yield failed(f"loggers.wandb: {host} does not answer ({reason}); set WANDB_MODE=offline and `wandb sync` later.")
    else:
        yield passed("loggers.wandb", f"{host} answers, and there is an API key")


def _check_mlflow(arguments: dict[str, Any]) -> Iterator[Result]:
    if not _installed("mlflow"):
        yield failed("loggers.mlflow: mlflow is not installed; `uv pip install 'mlflow<3'`, or set loggers.mlflow=false.")
        return
    uri = arguments.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or ""
    shown = redacted(uri)
    if uri.startswith("http"):
        if (reason := _silence(uri)) is not None:
            yield failed(
                f"loggers.mlflow.tracking_uri: {shown} does not answer ({reason}); mend it, or set loggers.mlflow=false."
            )
        else:
            yield passed("loggers.mlflow", f"{shown} answers")
    elif uri.startswith("databricks"):
        yield skipped("loggers.mlflow", f"{shown} is asked when the run starts")
    elif (reason := _unusable_store(uri)) is not None:
        yield failed(
            f"loggers.mlflow.tracking_uri: the store {shown or './mlruns'} cannot be used ({reason}); mend or delete it, set "
            "tracking_uri to another place, or set loggers.mlflow=false."
        )
    else:
        yield passed("loggers.mlflow", f"the store {shown or './mlruns'} can be used")


def _check_tensorboard(arguments: dict[str, Any]) -> Iterator[Result]:
    folder = Path(arguments.get("log_dir") or "tensorboard_logs")
    if not _installed("tensorboard"):
        yield failed("loggers.tensorboard: tensorboard is not installed; `uv pip install tensorboard`.")
    elif "://" not in str(arguments.get("log_dir")) and (problem := why_not_writable(folder)) is not None:
        yield failed(f"loggers.tensorboard.log_dir: {folder} cannot be written: {problem}. Set it to another folder.")
    else:
        yield passed("loggers.tensorboard", f"{folder} can be written")


def _unusable_store(uri: str) -> str | None:
    """Why a store on this machine, or a database, cannot be read and written; None if it can, or is still to be made."""
    file = re.fullmatch(r"sqlite:///(.*?)(\?.*)?", uri)
    place = Path(file[1] if file else uri.removeprefix("file://") or "mlruns")
    if (file or "://" not in uri.removeprefix("file://")) and (problem := why_not_writable(place.parent if file else place)):
        return problem
    if not place.exists() and (file or "://" not in uri):
        return None  # it is made when the run starts
    try:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        MlflowClient(uri or None).search_experiments(max_results=1000)
    except Exception as error:  # of mlflow, its YAML files or its database
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(host).hostname or host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _silence(address: str) -> str | None:
    """Why a host does not answer; None if it does, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
