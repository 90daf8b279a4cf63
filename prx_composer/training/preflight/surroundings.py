"""What a run finds around it: a folder and room for its checkpoints, the node's GPUs, and the services that metrics go to."""

import contextlib
import importlib.util
import math
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from composer.core import TimeUnit
from requests.utils import get_netrc_auth

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError, problems_of, redacted
from prx_composer.common.installation import adding
from prx_composer.loggers.tracking_servers import wandb_mode
from prx_composer.recipe.arguments import data_sets, entries
from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import CHECKPOINTS, holds_run
from prx_composer.schedule.moments import SECONDS
from prx_composer.training.components import Components
from prx_composer.training.meta_model import MetaModel, staged_bytes, training_state
from prx_composer.training.preflight import Result, collected, failed, passed, skipped, warned
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.pretrained import check_weights


def check_surroundings(parts: Components) -> Iterator[Result]:
    """Check what a recipe needs and does not contain: weights, data, room and permission to write, loggers.

    Args:
        parts: what `examine` built.
    """
    yield from check_weights(parts)
    yield from check_data(parts)
    yield from _check_held_out(parts)
    yield from check_storage(parts)
    yield from check_loggers(parts)


@collected
def _check_held_out(parts: Components) -> Iterator[Result]:
    """Say if evaluation reads what is trained on."""
    loaders = {key: getattr(parts.recipe, key) for key in ("train_loader", "eval_loader")}
    if any(not spec or spec.get("name") != "image_caption" or parts.is_wrong(key) for key, spec in loaders.items()):
        return
    trained, measured = (
        [(part.get("remote") or str(Path(part["path"])), part.get("split", "train")) for part in data_sets(spec).values()]
        for spec in loaders.values()
    )
    if same := [f"{path}, split {split}" for path, split in measured if (path, split) in trained]:
        said = f"measures what is trained on: {', '.join(same)}. Set eval_loader.split to another, such as heldout"
        yield warned("eval_loader", said)


@collected
def check_storage(parts: Components) -> Iterator[Result]:
    """Check who the run folder belongs to, whether it can be written, and whether the checkpoints fit its file system."""
    recipe, folder = parts.recipe, Path(parts.recipe.run_folder)
    if (problem := why_not_writable(folder)) is not None:
        yield failed(f"run_folder: {folder} cannot be written: {problem}. Set run_folder to another place.")
        return

    try:
        fact = "holds this run, which goes on" if holds_run(recipe, folder) else "is free and can be written"
        yield passed("run_folder", f"{folder} {fact}")
    except UserError as error:
        yield from map(failed, problems_of(error))
    if parts.problems:
        yield skipped("disk", "names and arguments must be right first")
    else:
        try:
            planned = MetaModel(recipe)
        except (ValueError, OSError) as error:
            yield skipped("disk and host memory", f"the size of a checkpoint is not known ({error})")
            if str(error).startswith("optimizer"):  # which is made here first, and nowhere else without a step
                yield failed(str(error))
            return
        yield from _check_room(recipe, folder, training_state(planned).checkpoint)
        yield _check_host_memory(recipe, planned, parts.num_ranks)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def why_not_writable(folder: Path) -> str | None:
    """Make a file in a folder, or in the nearest parent that is there, and delete it; return why that fails, or None."""
    parent = _existing(folder)
    if not parent.is_dir():
        return f"{parent} is a file"
    try:
        with tempfile.TemporaryFile(dir=parent, prefix=".prx-check-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def checkpoints_to_keep(recipe: Recipe) -> int | None:
    """Return how many checkpoints lie on the disk at most, one being written included; None if that can't be known."""
    keep = recipe.save_num_checkpoints_to_keep
    if keep >= 0:
        return max(keep, 1) + 1
    try:
        interval, duration, budget = recipe.save_every, recipe.length, recipe.budget
    except ValueError:
        return None
    if interval.unit == TimeUnit.DURATION.value:
        return math.ceil(1 / interval.value)
    if interval.unit == SECONDS and budget is not None:
        return math.ceil(budget / interval.value)
    return math.ceil(duration.value / interval.value) if interval.unit == duration.unit else None


@collected
def _check_room(recipe: Recipe, folder: Path, size: int) -> Iterator[Result]:
    count = checkpoints_to_keep(recipe)
    if count is None:
        units = f"save_interval {recipe.save_interval} and max_duration {recipe.max_duration} are not in one unit"
        yield skipped("disk", f"save_num_checkpoints_to_keep is {recipe.save_num_checkpoints_to_keep} (all), and {units}")
        return
    written = sum(path.stat().st_size for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(_existing(folder)).free, max(count * size - written, 0)
    what = f"{count} checkpoints of {size / 1e9:.2f} GB"
    if written:
        what += f", {written / 1e9:.2f} GB of which are there"
    if free < needed:
        fitting = int((free + written) / size) - 1
        keep = f"save_num_checkpoints_to_keep to {fitting} or less, or " if fitting >= 1 else ""
        remedy = f"Set {keep}run_folder to a larger disk{', where you have moved it' if written else ''}."
        yield failed(
            f"run_folder: {_existing(folder)} has {free / 1e9:.2f} GB free, but the run needs {needed / 1e9:.2f} GB for {what}. "
            + remedy
        )
    else:
        yield passed("disk", f"{free / 1e9:,.1f} GB free, {needed / 1e9:.2f} GB needed for {what}")


_GPUS_OF_A_NODE = 8  # where there are none to count


def _check_host_memory(recipe: Recipe, planned: MetaModel, num_ranks: int) -> Result:
    """Check whether the copy of the state that checkpoints are written from fits into this machine's memory."""
    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):  # in a container; "max" where it has no limit
        free = min(free, int(limit.read_text()))
    ranks = min(num_ranks, torch.cuda.device_count() or _GPUS_OF_A_NODE)
    needed = staged_bytes(planned, recipe, num_ranks, ranks)
    what = f"{needed / 1e9:.2f} GB needed for the copy of the state that checkpoints are written from"
    if needed <= free:
        return passed("host memory", f"{free / 1e9:,.1f} GB free, {what}")
    remedy = "Shard the state over more nodes (parallelism_config.fsdp.shard_degree), or take nodes with more memory."
    return warned("host memory", f"{free / 1e9:,.1f} GB free on this machine, but {what}. {remedy}")


FOREIGN_MEMORY = 2e9  # bytes in use on a GPU that cannot be this process's own context


@collected
def check_gpus(recipe: Recipe, algorithms: Iterable[Any], local_ranks: int, num_ranks: int) -> Iterator[Result]:
    """Check number, precision and free memory of the GPUs of this node.

    Args:
        algorithms: of the run.
        local_ranks: processes of this run on this node; 0 = not known, as in a check before the run.
        num_ranks: processes on all nodes.
    """
    problems = [problem for one in algorithms if isinstance(one, Trick) and (problem := one.hardware_problem()) is not None]
    if not torch.cuda.is_available():
        if recipe.precision == "fp32" and problems:
            yield from map(failed, problems)
        elif recipe.precision == "fp32":
            yield passed("GPUs", "none here; fp32 trains on the CPU too")
        else:
            yield skipped(
                f"GPUs and precision: {recipe.precision}", "there is no GPU here; train.py needs one, or precision=fp32"
            )
        return
    count = torch.cuda.device_count()
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(count)))
    if local_ranks > count:
        yield failed(
            f"{local_ranks} processes on this node, but {count} visible GPUs. Launch with `composer -n {count}`, or mend "
            "CUDA_VISIBLE_DEVICES."
        )
        return
    fact = f"{count} × {names}"
    if 0 < local_ranks < count:
        yield warned("GPUs", f"{local_ranks} of {count} visible ones train; `composer -n {count} …` trains on all of them")
    if not local_ranks and num_ranks > count:
        fact += f"; {num_ranks} ranks take {-(-num_ranks // count)} such nodes"
    yield passed("GPUs", fact)
    if recipe.precision == "amp_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield failed(f"precision: {names} has no bf16; use precision=amp_fp16 or fp32.")
    yield from map(failed, problems)
    for index in [int(os.environ.get("LOCAL_RANK", "0"))] if local_ranks else range(count):
        free, total = torch.cuda.mem_get_info(index)
        used = total - free - torch.cuda.memory_reserved(index)
        if used > FOREIGN_MEMORY:
            yield warned("GPUs", f"another process holds {used / 1e9:.1f} of {total / 1e9:.1f} GB on GPU {index}; see nvidia-smi")


TIMEOUT = 5.0  # seconds for a host to answer


@collected
def check_loggers(parts: Components) -> Iterator[Result]:
    """Check whether what metrics are sent to is installed, writable, logged in and reachable."""
    checks = {"wandb": _check_wandb, "mlflow": _check_mlflow, "tensorboard": _check_tensorboard}
    for name, arguments in entries(parts.recipe.loggers, "loggers"):
        if name in checks and not parts.is_wrong(f"loggers.{name}"):
            yield from checks[name](arguments)


@collected
def _check_wandb(arguments: dict[str, Any]) -> Iterator[Result]:
    if not _installed("wandb"):
        yield failed(f"loggers.wandb: wandb is not installed; set loggers.wandb=false, or: {adding('trackers')}")
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
    if not os.environ.get("WANDB_API_KEY") and get_netrc_auth(host) is None:
        yield failed("loggers.wandb: there is no API key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline.")
    elif (reason := _silence(host)) is not None:
        yield failed(f"loggers.wandb: {host} does not answer ({reason}); set WANDB_MODE=offline and `wandb sync` later.")
    else:
        yield passed("loggers.wandb", f"{host} answers, and there is an API key")


@collected
def _check_mlflow(arguments: dict[str, Any]) -> Iterator[Result]:
    if not _installed("mlflow"):
        yield failed(f"loggers.mlflow: mlflow is not installed; set loggers.mlflow=false, or: {adding('mlflow')}")
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


@collected
def _check_tensorboard(arguments: dict[str, Any]) -> Iterator[Result]:
    folder = Path(arguments.get("log_dir") or "tensorboard_logs")
    if not _installed("tensorboard"):
        yield failed(
            f"loggers.tensorboard: tensorboard is not installed; set loggers.tensorboard=false, or: {adding('trackers')}"
        )
    elif "://" not in str(arguments.get("log_dir")) and (problem := why_not_writable(folder)) is not None:
        yield failed(f"loggers.tensorboard.log_dir: {folder} cannot be written: {problem}. Set it to another folder.")
    else:
        yield passed("loggers.tensorboard", f"{folder} can be written")


def _unusable_store(uri: str) -> str | None:
    """Return why a store on this machine, or a database, cannot be used; None if it can, or is still to be made."""
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


def _silence(address: str) -> str | None:
    """Return why a host does not answer; None if it does, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
