"""What a person wants to look at: a split of a data set on a disk or in an object store, named by its folder or by a recipe whose
data it is.
"""

import json
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prx_composer.common.errors import UserError, raise_all
from prx_composer.data.buckets import Bucket
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.data.storage import fetch, fetched, is_remote, join, remote_keys
from prx_composer.data.stored import ENCODED
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.recipe.arguments import split as split_spec
from prx_composer.runs.folder import TOKENIZER
from prx_composer.runs.tokenizer import made_tokenizer
from prx_composer.training.components import PlannedStage, make_data
from prx_composer.training.preflight.examine import examine

INDEX, CONVERSION = "index.json", "conversion.json"


@dataclass(frozen=True)
class Split:
    """Where a split lies and what it holds.

    Args:
        path: of the data set, local or remote. name: of the split.
    """

    path: str
    name: str
    manifest: Manifest

    @property
    def folder(self) -> str:
        return join(self.path, self.name)

    @cached_property
    def shards(self) -> dict[Bucket, list[dict[str, Any]]]:
        """The shards of every bucket, as its index lists them. Raise UserError for an index that cannot be read."""
        return {bucket: self._listed(str(bucket)) for bucket in sorted(self.manifest.buckets)}

    def _listed(self, below: str) -> list[dict[str, Any]]:
        name = join(self.folder, below, INDEX)
        content = _json(name)
        try:
            shards = content["shards"]
            for shard in shards:
                _ = shard["raw_data"]["bytes"], shard["samples"], shard["column_names"], shard["column_encodings"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{name} is missing or is no index of shards; copy or convert the data again.") from error
        return shards

    def conversion(self) -> dict[str, Any] | None:
        """Return the statistics that `prx data convert` leaves beside the data, if it made them."""
        found = _json(join(self.folder, CONVERSION))
        return found if isinstance(found, dict) and "counts" in found else None

    def encoded(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return stored columns by name and source: `manifest`, None if it was only begun; `files`, named from its folder."""
        if is_remote(self.path):
            keys = remote_keys(join(self.folder, ENCODED))
            names = [key.partition(f"/{self.name}/{ENCODED}/")[2] for key in keys]
        else:
            root = Path(self.folder, ENCODED)
            names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name in names:
            parts = name.split("/", 2)
            if len(parts) == 3 and not any(part.startswith(".") for part in name.split("/")):
                column = found.setdefault((parts[0], parts[1]), {"manifest": None, "files": []})
                column["files"].append(parts[2])
                if parts[2] == MANIFEST:
                    column["manifest"] = _json(join(self.folder, ENCODED, name))
        return found

    def stored_bytes(self, name: str, source: str, bucket: str) -> int:
        """Return the bytes of a bucket of a stored column."""
        return sum(int(shard["raw_data"]["bytes"]) for shard in self._listed(join(ENCODED, name, source, bucket)))


def open_split(path: str, name: str) -> Split:
    """Open the split `name` of the data set in `path`.

    Raises:
        UserError: there is none; says what is there instead, and what to do.
    """
    manifest = join(path, name, MANIFEST)
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache:
        try:
            local = fetch(manifest, Path(cache))
            if not local.is_file():
                raise FileNotFoundError(manifest)
            content = local.read_text()
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's SDK has its own
            if is_remote(path):
                raise UserError(
                    f"{manifest} cannot be fetched ({_first_line(error)}); check the address, --split and credentials."
                ) from error
            raise UserError(_what_is_there(Path(path), name)) from error
        (Path(cache) / MANIFEST).write_text(content)
        try:
            return Split(path.rstrip("/") or "/", name, Manifest.read(Path(cache)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = str(error).replace(cache, join(path, name)) if isinstance(error, ValueError) else f"it lacks {error}"
            raise UserError(f"{manifest} is no manifest of a data set that can be read: {what}") from error


def _what_is_there(path: Path, name: str) -> str:
    """Say why there is no such split, to a person who has named something else."""
    if path.is_file():
        return f"{path} is a file; name the folder of a data set, or a recipe (.yaml)."
    if not path.is_dir():
        return f"There is no folder {path}."
    if (path / MANIFEST).is_file():
        whole = path.absolute()
        return (
            f"{path} is a split of a data set. Name the folder above it, and the split with an option: "
            f"{whole.parent} --split {whole.name}"
        )
    if (path / INDEX).is_file():
        return f"{path} holds shards of one bucket. Name the folder of the data set: {path.absolute().parents[1]}"
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST}"))
    if splits:
        return f"{path} has no split {name!r}; it has {', '.join(splits)}. Choose with --split."
    if list(path.glob(f".{name}.work*")) or list(path.glob(f".{name}.partial")):
        return f"The data set in {path} is not finished; give the command that was making it again."
    if deeper := sorted({str(child.parents[1]) for child in path.glob(f"*/*/{MANIFEST}")}):
        return f"{path} is no data set but holds some: {', '.join(deeper)}. Name one of them."
    hint = "Make one from images with captions with `prx data convert` (recipes/data/README.md)."
    what = "is empty" if not any(path.iterdir()) else f"holds no data set: no folder in it has a {MANIFEST}"
    return f"{path} {what}. {hint}"


def _json(path: str) -> Any:
    """Return the content of a small file, None if it is not there or no JSON."""
    try:
        with fetched(path) as file:
            return json.loads(file.read_text())
    except (UserError, ImportError):
        raise
    except (OSError, ValueError):
        return None
    except Exception as error:
        if "not found" in str(error).lower():
            return None
        raise UserError(f"{path} cannot be fetched ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class Subject:
    """A split, and how it is trained on if a recipe says so.

    Args:
        path, split: of the data set, local or remote.
        loader: the recipe's arguments of the loader; empty without one.
        key: of the loader in the recipe.
        seed: of the recipe.
        image_size: the recipe's first, if there is a recipe.
        multiple: of which image sides must be multiples.
        tokenizer, max_tokens: of the recipe's text encoder.
        stages: of the recipe.
    """

    path: str
    split: str
    loader: dict[str, Any] = field(default_factory=dict)
    key: str = "train_loader"
    seed: int = 0
    image_size: int | None = None
    multiple: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_tokens: int = 0
    stages: tuple[PlannedStage, ...] = ()

    @property
    def batch_sizes(self) -> list[int]:
        return [stage.global_batch_size for stage in self.stages]


def subject_of(arguments: list[str], split: str | None) -> Subject:
    """Return what `[folder]`, or `[A.yaml, …, key=value, …]` as for train.py, names. Data of a source is made.

    Args:
        split: by default the recipe's, or train.

    Raises:
        UserError: neither one folder nor a recipe; a recipe that is wrong, or whose tokenizer cannot be had.
    """
    recipes = [argument for argument in arguments if argument.endswith((".yaml", ".yml"))]
    if len(arguments) > 1 and (not recipes or any("=" not in argument for argument in arguments if argument not in recipes)):
        raise UserError(
            f"{' '.join(arguments)}: name one folder of a data set, or a recipe (.yaml) and key=value. For the data of a folder "
            "as a recipe would load it: RECIPE.yaml train_loader.path=FOLDER"
        )
    if not recipes:
        return Subject(arguments[0], split or "train")
    recipe = config.load(arguments)
    config.import_code(recipe.code_paths)
    _, parts = examine(recipe, 1)
    raise_all(parts.problems)
    own = [key for key in ("train_loader", "eval_loader") if getattr(recipe, key)]
    key = next((key for key in own if split in (None, getattr(recipe, key).get("split", "train"))), "train_loader")
    name, loader = split_spec(getattr(recipe, key), key)
    if name != "image_caption":
        raise UserError(f"{key}: the loader {name!r} is not of this package; name the folder of its data instead.")
    for made in own:
        make_data(getattr(recipe, made), made)
    loader = {argument: value for argument, value in loader.items() if argument != "source"}
    if loader.get("mix"):
        names = " or ".join(part.get("remote") or part["path"] for part in data_sets(loader).values())
        raise UserError(
            f"{key}.mix names several data sets; look at one of them: {names}. As the recipe would load it: add {key}.mix=null "
            f"{key}.path=FOLDER."
        )
    loader["split"] = split or loader.get("split", "train")
    path = loader.get("remote") or loader["path"]
    open_split(path, loader["split"])  # before a tokenizer is downloaded
    tokenizer, max_tokens = _tokenizer(recipe)
    return Subject(
        path=path,
        split=loader["split"],
        loader=loader,
        key=key,
        seed=recipe.seed,
        image_size=recipe.image_size,
        multiple=parts.multiple,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        stages=tuple(parts.stages) if key == "train_loader" else (),
    )


def _tokenizer(recipe: config.Recipe) -> tuple[PreTrainedTokenizerBase | None, int]:
    """The run's, if it was trained already; nothing is written to its folder."""
    spec = recipe.model.get("text_encoder")
    if not isinstance(spec, dict):
        return None, 0
    with tempfile.TemporaryDirectory(prefix="prx-look.") as scratch:
        run = Path(recipe.run_folder)
        try:
            tokenizer = made_tokenizer(spec, recipe.train_loader, run if (run / TOKENIZER).exists() else Path(scratch))
        except UserError as error:
            raise UserError(f"{error} Without it: name the folder of the data, {recipe.train_loader.get('path')}") from error
    return tokenizer, int(spec.get("max_tokens", 256))
