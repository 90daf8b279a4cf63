"""What a path names: a run folder, a checkpoint, a folder that diffusers opens, or a file of weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prx_composer.common.errors import UserError
from prx_composer.runs.checkpoints import Checkpoint, all_checkpoints, damage

PIPELINES = ("PRXPixelPipeline", "PRXPipeline")


@dataclass(frozen=True)
class Located:
    """Where a trained model is.

    Args:
        kind: what `path` is.
        path: the checkpoint's folder, the diffusers folder, or the file.
        checkpoint: of a run.
        run_folder: of that checkpoint.
    """

    kind: Literal["checkpoint", "diffusers", "safetensors"]
    path: Path
    checkpoint: Checkpoint | None = None

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent


def locate(name: str) -> Located:
    """Finds out what a path names; of a run, the newest whole checkpoint.

    Raises:
        UserError: there is nothing, or nothing of this package or of diffusers' PRX.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"There is no {name}. Give a run folder (runs/<run_name>), one of its checkpoints, or a folder that `prx export` "
            "wrote; a model on the hub is downloaded first: hf download <id> --local-dir <folder>."
        )
    if path.is_file():
        return _locate_file(path)
    if (path / "model_index.json").exists():
        return _checked_pipeline(path)
    if (path / "checkpoint.json").exists():
        return Located("checkpoint", path, _checkpoint(path))
    if path.name == "checkpoints":
        path = path.parent
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        checkpoint = _newest_whole(path)
        return Located("checkpoint", checkpoint.path, checkpoint)
    raise UserError(
        f"{name} is no run folder (it has no config.yaml), no checkpoint (no checkpoint.json) and no folder that diffusers opens "
        "(no model_index.json)."
    )


def _locate_file(path: Path) -> Located:
    if path.suffix == ".safetensors":
        return Located("safetensors", path)
    if (path.parent / "checkpoint.json").exists():
        return Located("checkpoint", path.parent, _checkpoint(path.parent))
    raise UserError(f"{path} is neither a file of a checkpoint's folder (with a checkpoint.json beside it) nor *.safetensors.")


def _checkpoint(path: Path) -> Checkpoint:
    checkpoint = Checkpoint(path.resolve(), 0)
    try:
        return Checkpoint(path.resolve(), int(checkpoint.index()["batch"]))
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path / 'checkpoint.json'} cannot be read: {error}") from error


def _newest_whole(run_folder: Path) -> Checkpoint:
    folder = run_folder / "checkpoints"
    found = all_checkpoints(folder)
    for checkpoint in reversed(found):
        if damage(checkpoint) is None:
            return Checkpoint(checkpoint.path.resolve(), checkpoint.batch)
    if found:
        raise UserError(f"No checkpoint in {folder} is whole: {', '.join(c.path.name for c in found)} are damaged.")
    if old := sorted(path.name for path in folder.glob("**/*") if path.suffix in (".pt", ".symlink", ".distcp")):
        raise UserError(
            f"{folder} holds checkpoints of another form ({old[0]} …), of an older version or of Composer alone: they have no "
            "checkpoint.json. Its weights as *.safetensors can go on with model.init_from; or train again."
        )
    raise UserError(f"{run_folder} has no checkpoint yet; the first is written at the recipe's save_interval.")


def _checked_pipeline(folder: Path) -> Located:
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"{folder} is a {name}; only diffusers' {' and '.join(PIPELINES)} hold a PRX backbone.")
    return Located("diffusers", folder)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if it isn't there or isn't a mapping."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping.")
    return content
