"""Weights as they lie on the disk: checkpoints of one file or in shards, and safetensors. Nothing that is read is executed."""

import dataclasses
import datetime
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.torch_version import TorchVersion

from prx_composer.common.distributed import clean_name
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import inside
from prx_composer.optim import bad_tensor
from prx_composer.runs.checkpoints import INDEX, MONOLITH, Checkpoint, all_checkpoints, damage

_reconstruct = np.zeros(0).__reduce__()[0]
# Beside tensors, what a run's own state is made of: times, the versions it ran with, numpy's random state.
_HARMLESS: list[Any] = [
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8")},
    *((_reconstruct, f"{module}._reconstruct") for module in ("numpy._core.multiarray", "numpy.core.multiarray")),
]
STAGES = "ProgressiveResolution"  # as Composer calls an algorithm's state: by its class
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}
_METADATA_NAMES |= {("pathlib._local", name) for _, name in _METADATA_NAMES if name.endswith("Path")}


@dataclass(frozen=True)
class SavedState:
    """What sampling needs of a checkpoint.

    Args:
        model: parameter and buffer names → plain weights.
        average: names → averaged weights; empty before EMA began, or without it.
        timestamp: Composer's, as it saves it: `batch`, `sample`, `epoch` …
        clock: `elapsed` seconds and `fraction` of the time budget.
        algorithms: classes → what a checkpoint holds of them.
    """

    model: dict[str, Tensor]
    average: dict[str, Tensor] = field(default_factory=dict)
    timestamp: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)
    algorithms: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> int | None:
        """Return the stage of `progressive_resolution` that the last step was of, from 0 on; None without it."""
        stages = self.algorithms.get(STAGES)
        return None if stages is None else int(stages["current"]) - bool(stages["switching"])  # to a stage without a step yet

    def was_active(self, trick: Any) -> bool | None:
        """Return whether a trick acted in the last step; None if the checkpoint doesn't say, as those of before December 2026."""
        return self.algorithms.get(type(trick).__qualname__, {}).get("active")


def read_checkpoint(checkpoint: Checkpoint) -> SavedState:
    """Read a checkpoint of any number of ranks in this process alone, after comparing it with its checksums.

    Raises:
        UserError: it is damaged, or holds objects that could execute code.
    """
    if wrong := damage(checkpoint):
        raise UserError(f"{checkpoint.path} is damaged: {wrong}. Give another checkpoint of that run.")
    monolith = checkpoint.path / MONOLITH
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return _read_file(monolith) if monolith.exists() else _read_shards(checkpoint.path)
    except (pickle.UnpicklingError, CheckpointException) as error:
        message = str(error).replace("\n", " ")
        culprit = message.partition("GLOBAL ")[2].partition(" ")[0] or message[:200]
        raise UserError(
            f"{checkpoint.path} is not read: it holds {culprit}, and only tensors, numbers and text are loaded from checkpoints, "
            "since anything else could execute code. An algorithm or callback of that run saves it."
        ) from error


def not_finite_in(checkpoint: Checkpoint) -> str | None:
    """Say what of a checkpoint's weights or average isn't finite; None if all is, or if they cannot be read.

    One that was looked at when it was written says so in its index, and isn't read again.
    """
    try:
        if checkpoint.index().get("finite"):
            return None
        saved = read_checkpoint(checkpoint)
    except (UserError, OSError, ValueError):
        return None
    parts = {"the weight": saved.model, "the average of": saved.average}
    bad = bad_tensor((f"{what} {name}", tensor) for what, part in parts.items() for name, tensor in part.items())
    return None if bad is None else f"{bad} is not finite"


def _read_file(path: Path) -> SavedState:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
    callbacks = state.get("callbacks", {})
    algorithms = dict(state.get("algorithms", []))
    average = callbacks.get("AverageState", {}).get("average", {}) if _average_began(algorithms) else {}
    timestamp = state.get("timestamp", {}).get("Timestamp", {})
    return SavedState(state["model"], average, timestamp, callbacks.get("TrainingClock", {}), algorithms)


def _average_began(algorithms: Mapping[str, Any]) -> bool:
    return bool(algorithms.get("EMA", {}).get("started"))


class _Reader(FileSystemReader):
    """Read the index of the shards, a pickle, without calling anything but what such an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for stored in (metadata.storage_data or {}).values():
            inside(Path(self.path), str(stored.relative_path))
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if dtype or (module_name, global_name) in _METADATA_NAMES:
            return super().find_class(module_name, global_name)
        if module_name in _METADATA_MODULES and "." not in global_name:  # with a dot it would be what they import: os.system
            found = super().find_class(module_name, global_name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"GLOBAL {module_name}.{global_name} in .metadata")


class _Planner(DefaultLoadPlanner):
    """Read plain values, as well as tensors, without executing anything."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what has names that begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


_PARTS = {
    "model": "state.model.",
    "average": "state.callbacks.AverageState.average.",
    "timestamp": "state.timestamp.Timestamp.",
    "clock": "state.callbacks.TrainingClock.",
}


def _read_shards(folder: Path) -> SavedState:
    stored = _Reader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in stored.items()
        if key.startswith(tuple(_PARTS.values())) or key == "state.algorithms"
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is used, which is what is asked for
        load_sharded(wanted, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    parts = {part: below(wanted, prefix) for part, prefix in _PARTS.items()}
    algorithms = dict(wanted.get("state.algorithms") or [])
    parts |= {} if _average_began(algorithms) else {"average": {}}
    return SavedState(**parts, algorithms=algorithms)


def nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Say which weights are NaN or infinite, the first by name and how many; None if all are numbers."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor)]
    if not bad:
        return None
    first = tensors[bad[0]]
    count = int((~torch.isfinite(first)).sum())
    where = f"the first of them {bad[0]} ({count} of {first.numel()} values)"
    return f"{len(bad)} of {len(tensors)} tensors hold values that are NaN or infinite, {where}"


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all is finite, without a mask of its size: NaN is both least and greatest. float8 has no order."""
    tensor = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, or of a folder's file or files.

    Raises:
        UserError: there are none, or one is damaged.
    """
    return _of_files(path, load_file)


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes, from the files' headers alone. Raise UserError as `read_safetensors` does."""

    def shapes(file: Path) -> dict[str, tuple[int, ...]]:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    return _of_files(path, shapes)


def _of_files(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in _files(path):
        with at_path(f"{file} cannot be read as safetensors", SafetensorError):
            found |= read(file)
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        with at_path(f"{indices[0]} is no index of weights that can be read", TypeError, AttributeError):
            named = json.loads(indices[0].read_text())["weight_map"].values()
            files = [inside(path, str(name)) for name in sorted(set(named))]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{path} lacks {', '.join(missing)}, of which {indices[0].name} speaks.")
        return files
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        instead = f" It has {', '.join(others[:3])}, which could execute code and are not read." if others else ""
        raise UserError(f"{path} has no weights (*.safetensors).{instead}")
    whole = [file for file in found if "-of-" not in file.name]
    return whole[:1] or found


@dataclass(frozen=True)
class Located:
    """Where a trained model is.

    Args:
        kind: what `path` is.
        path: the checkpoint's folder, the diffusers folder, or the file.
        checkpoint: of a run.
    """

    kind: Literal["checkpoint", "diffusers", "safetensors"]
    path: Path
    checkpoint: Checkpoint | None = None

    @property
    def run_folder(self) -> Path:
        """The folder of the checkpoint's run."""
        return self.path.parent.parent


def locate(name: str) -> Located:
    """Find out what a path names; of a run, the newest whole checkpoint.

    Raises:
        UserError: there is nothing, or nothing of this package or of diffusers.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"There is no {name}. Give a run folder (runs/<run_name>), one of its checkpoints, or a folder that `prx export` "
            "wrote; a model on the hub is downloaded first: hf download <id> --local-dir <folder>."
        )
    if path.is_file():
        if path.suffix == ".safetensors":
            return Located("safetensors", path)
        if (path.parent / INDEX).exists():
            return _checkpoint_in(path.parent)
        raise UserError(f"{path} is neither a file of a checkpoint's folder (with a {INDEX} beside it) nor *.safetensors.")
    if (path / "model_index.json").exists() or (backbone_folder(path) / "config.json").exists():
        return Located("diffusers", path)
    if (path / INDEX).exists():
        return _checkpoint_in(path)
    if path.name == "checkpoints":
        path = path.parent
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        return _newest_whole(path)
    raise UserError(
        f"{name} is no run folder (it has no config.yaml), no checkpoint (no {INDEX}) and no folder that diffusers opens "
        "(neither model_index.json nor transformer/)."
    )


def _checkpoint_in(folder: Path) -> Located:
    path = folder.resolve()
    with at_path(f"{folder / INDEX} cannot be read"):
        return Located("checkpoint", path, Checkpoint(path, int(Checkpoint(path, 0).index()["batch"])))


def _newest_whole(run_folder: Path) -> Located:
    folder = run_folder / "checkpoints"
    found = all_checkpoints(folder)
    if whole := next((checkpoint for checkpoint in reversed(found) if damage(checkpoint) is None), None):
        path = whole.path.resolve()
        return Located("checkpoint", path, Checkpoint(path, whole.batch))
    if found:
        raise UserError(f"No checkpoint in {folder} is whole: {', '.join(c.path.name for c in found)} are damaged.")
    if old := sorted(path.name for path in folder.glob("**/*") if path.suffix in (".pt", ".symlink", ".distcp")):
        raise UserError(
            f"{folder} holds checkpoints of another form ({old[0]} …), of an older version or of Composer alone: they have no "
            f"{INDEX}. Its weights as *.safetensors can go on with model.init_from; or train again."
        )
    raise UserError(f"{run_folder} has no checkpoint yet; the first is written at the recipe's save_interval.")


# --------------------------------------------------------------------------------------------------- a model's parts


BACKBONE, ENCODER = "backbone.", "text_encoder.encoder."


@dataclass(frozen=True)
class PartWeights:
    """The weights that a source has for the parts of a model.

    Args:
        backbone, encoder: of the backbone and of the text encoder, by their own names; the latter may have none.
        wrong: which of them hold NaN or infinite values, in words; None if all are numbers.
    """

    backbone: dict[str, Tensor]
    encoder: dict[str, Tensor]
    wrong: str | None


def backbone_folder(folder: Path) -> Path:
    """Return where the backbone is in a folder of diffusers: in prior/, as Stable Cascade's, or in transformer/."""
    return folder / ("prior" if (folder / "prior").is_dir() else "transformer")


def read_parts(located: Located, with_encoder: bool) -> PartWeights:
    """Read the weights of a model's parts; of a run, the averaged ones, if it has them.

    Args:
        with_encoder: whether a text encoder is read that lies in files of its own.

    Raises:
        UserError: nothing is there, it is damaged, or it has adapters beside its weights.
    """
    if located.kind == "diffusers":
        backbone, text = read_safetensors(backbone_folder(located.path)), located.path / "text_encoder"
        encoder = read_safetensors(text) if with_encoder and text.is_dir() else {}
    elif located.checkpoint is not None:
        state = read_checkpoint(located.checkpoint)
        backbone, encoder = split_parts({clean_name(name): tensor for name, tensor in (state.model | state.average).items()})
    else:
        backbone, encoder = split_parts(read_safetensors(located.path))
    return PartWeights(backbone, encoder, nonfinite(backbone | {f"{ENCODER}{name}": tensor for name, tensor in encoder.items()}))


def split_parts(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what belongs to the backbone and to the text encoder. Raise UserError for adapters, which aren't merged yet."""
    if any(".lora_A." in name for name in tensors):
        raise UserError(
            "these weights have LoRA adapters beside them. Merge them with `prx export RUN --output DIR`, and name that folder."
        )
    if not any(name.startswith(BACKBONE) for name in tensors):  # a file of the backbone alone, such as diffusers writes
        return tensors, {}
    several = {
        re.sub(r"^text_encoder\.encoders\.([^.]+)\.encoder\.", rf"{ENCODER}\1.", name): one for name, one in tensors.items()
    }
    return below(tensors, BACKBONE), below(several, ENCODER)


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping. Raise UserError if it isn't there or isn't one."""
    with at_path(f"{path} cannot be read"):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping.")
    return content
