"""Folders as a stranger might hand them over. Whatever of them is executed leaves a file, `marker`."""

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.export.pipeline import write_pipeline, written_aside
from prx_composer.common.errors import UserError
from prx_composer.common.files import crc32
from prx_composer.data.format import MANIFEST
from prx_composer.models import TextToImage
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import INDEX, MONOLITH
from prx_composer.runs.folder import as_saved
from prx_composer.runs.opening import Trained


class Leaves:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


@dataclass
class Place:
    """Where a case lies, and what it may use.

    Args:
        path: an empty folder, the working directory too.
        marker: what must not appear.
        code: a Python file that creates it.
        run: a folder of a run whose checkpoint opens, written by `write_run`.
        exported: a folder that diffusers opens.
    """

    path: Path
    marker: Path
    code: Path
    run: Path
    exported: Path

    def index(self) -> dict[str, Any]:
        return json.loads((self.run / "checkpoints" / "ba1" / INDEX).read_text())

    def change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the checkpoint's index, of which the recipe is a part, and says it in config.yaml too."""
        index = self.index()
        change(index)
        (self.run / "checkpoints" / "ba1" / INDEX).write_text(json.dumps(index))
        (self.run / "config.yaml").write_text(yaml.safe_dump(index["recipe"]))

    def executed(self) -> bool:
        return self.marker.exists()


def write_run(folder: Path, recipe: dict[str, Any], model: TextToImage, write_recipe: Callable[..., str]) -> Path:
    """A run folder as training leaves it after a batch, without training."""
    loaded = config.load([write_recipe(recipe | {"run_folder": str(folder)}, f"{folder.name}.yaml")])
    checkpoint = folder / "checkpoints" / "ba1"
    checkpoint.mkdir(parents=True)
    timestamp = {"Timestamp": {"batch": 1, "epoch": 0, "sample": 8}}
    torch.save({"state": {"model": model.state_dict(), "timestamp": timestamp, "algorithms": []}}, checkpoint / MONOLITH)
    seal(checkpoint, {"version": 1, "batch": 1, "ranks": 1, "needs_code": [], "recipe": as_saved(loaded)})
    (folder / "config.yaml").write_text(yaml.safe_dump(as_saved(loaded)))
    model.text_encoder.tokenizer.save_pretrained(str(folder / "tokenizer"))
    return folder


def edited(path: Path, **changes: Any) -> None:
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled_rows(place: Place) -> Path:
    """A data set whose captions are text and whose shards have one more column, of pickles."""
    from streaming import MDSWriter  # slow to import, and this module is part of every test's

    folder = place.path / "rows" / "train" / "16x16"
    columns = {"image": "bytes", "width": "int", "height": "int", "key": "str", "caption": "str", "extra": "pkl"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        row = {"image": b"", "width": 16, "height": 16, "key": "a", "caption": "a red circle"}
        for _ in range(3):
            writer.write(row | {"extra": Leaves(place.marker)})
    manifest = {"version": 1, "image_size": 16, "captions": ["caption"], "buckets": {"16x16": 3}}
    (folder.parent / MANIFEST).write_text(json.dumps(manifest))
    return folder.parents[1]


def seal(checkpoint: Path, index: dict[str, Any]) -> None:
    """Writes an index that fits the files, as whoever changed them would."""
    files = [file for file in checkpoint.iterdir() if file.name != INDEX]
    sums = {file.name: {"bytes": file.stat().st_size, "crc32": crc32(file)} for file in files}
    (checkpoint / INDEX).write_text(json.dumps(index | {"files": sums}))


def pickled_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function by name, with a dotted name too, which `pickle.dumps` never writes."""
    text = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name, argument)]
    return b"\x80\x04" + text[0] + text[1] + pickle.STACK_GLOBAL + text[2] + pickle.TUPLE1 + pickle.REDUCE + b"."


def command(*arguments: Any) -> str:
    """What `prx` says; whoever asks "run the code?" is told yes."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\n" * 20)
    if result.exception is not None and not isinstance(result.exception, UserError | SystemExit):
        raise result.exception
    return str(result.exception) if isinstance(result.exception, UserError) else result.output


@pytest.fixture
def place(
    tmp_path: Path, tiny_recipe: dict[str, Any], tiny_model: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A folder to work in that Python imports from, as it does from the working directory of `composer -m`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    marker, code = tmp_path / "executed", tmp_path / "evil.py"
    code.write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\nclass Evil: pass\n")
    (tmp_path / "alias.py").write_text(code.read_text())
    recipe = tiny_recipe | {"algorithms": {}}
    run = write_run(tmp_path / "run", recipe, tiny_model(seed=3), write_recipe)
    with written_aside(tmp_path / "exported") as partial:
        write_pipeline(Trained(tiny_model(seed=3).eval(), Path("nowhere"), "raw", 16), partial)
    yield Place(tmp_path, marker, code, run, tmp_path / "exported")
    for name in ("evil", "alias", "prx_composer_user_evil"):
        sys.modules.pop(name, None)
