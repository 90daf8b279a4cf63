"""`text_embedding: auto`: a loader reads the embeddings that lie beside its data, if they fit; else captions are encoded online.

Here alone `auto` is known. `choose_text` makes a name or null of it, before anything else sees the recipe, and a run that goes on
keeps what it began with. Nothing is loaded: the fingerprint of the real weights is compared when the loader is made.
"""

import dataclasses
import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from prx_composer.common.errors import UserError, first, redacted_text
from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.data.storage import shards_in, sizes_in
from prx_composer.data.stored import StoredColumn, encoded_folder, is_whole, read_column
from prx_composer.models.prompts import not_to_be_stored
from prx_composer.recipe.arguments import data_sets, encoder_title, text_encoders
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import advice
from prx_composer.runs.folder import CONFIG, recipe_of

log = logging.getLogger(__name__)

AUTO = "auto"
STORED_AS = "text"
"""What `prx encode text` calls what it stores, unless it is told otherwise."""

_LOADERS = ("train_loader", "eval_loader")
_WRONG = (UserError, ValueError, TypeError, AttributeError, OSError)  # no data, or a recipe that is none
_NAMED = 3  # of what lacks; the others are counted


@dataclass(frozen=True)
class TextChoice:
    """What was chosen for a loader.

    Args:
        key: of the loader.
        name: of the stored embeddings; None: the text encoder runs in every step.
        why: `stored`: they are there and fit. `lacking`: they could be there, and aren't. `never`: none could be. `unknown`:
            there are no data here. `gone`: the run began with them, and they aren't whole any more.
        said: a whole line, which begins with the YAML path.
    """

    key: str
    name: str | None
    why: Literal["stored", "lacking", "never", "unknown", "gone"]
    said: str


def leaves_text_open(recipe: Recipe) -> bool:
    """Return whether a loader of the recipe still says `auto`."""
    return any(map(_is_open, (recipe.train_loader, recipe.eval_loader)))


def choose_text(recipe: Recipe, resumes: bool = True) -> tuple[Recipe, list[TextChoice]]:
    """Return a recipe whose loaders name stored embeddings or none, and what was chosen where one said `auto`.

    It never raises an error: what is wrong with data or recipe is for those to say who read them.

    Args:
        recipe: perhaps wrong.
        resumes: whether a run in its folder, which it would go on with, decides.
    """
    before = _begun(recipe) if resumes and leaves_text_open(recipe) else {}
    chosen = []
    for key in _LOADERS:
        spec = getattr(recipe, key)
        if not _is_open(spec):
            continue
        began = before.get(key)
        if isinstance(began, Mapping):
            chosen.append(_as_before(key, spec, recipe.model, began.get("text_embedding")))
        else:
            chosen.append(_chosen(key, spec, recipe.model, shlex.join(_given())))
    return with_choices(recipe, chosen), chosen


def with_choices(recipe: Recipe, chosen: list[TextChoice]) -> Recipe:
    """Return the recipe with what was chosen."""
    return dataclasses.replace(recipe, **{c.key: getattr(recipe, c.key) | {"text_embedding": c.name} for c in chosen})


def choose_of_loader(spec: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the arguments of an `image_caption` loader as `choose_text` does, where its model isn't known."""
    if spec.get("text_embedding") != AUTO:
        return spec
    choice = _chosen(key, spec, None, "")
    log.info("%s", choice.said)
    return spec | {"text_embedding": choice.name}


def _is_open(spec: Mapping[str, Any] | None) -> bool:
    return spec is not None and spec.get("name") == "image_caption" and spec.get("text_embedding") == AUTO


def _given() -> list[str]:
    """Return the arguments of this command that are a recipe's."""
    own = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    own = [argument for argument in own if "=" in argument or argument.endswith((".yaml", ".yml"))]
    return [redacted_text(argument) for argument in own] if any("=" not in argument for argument in own) else ["RECIPE.yaml"]


# -------------------------------------------------------------------------------------------------- a run that goes on


def _begun(recipe: Recipe) -> Mapping[str, Any]:
    """Return the recipe that a run in the folder goes on with; nothing if one begins."""
    folder = Path(recipe.run_folder)
    if not recipe.autoresume or not (folder / CONFIG).exists():
        return {}
    try:
        return recipe_of(folder)[0]
    except (OSError, yaml.YAMLError):  # which is said where it is read to go on with
        return {}


def _as_before(key: str, spec: Mapping[str, Any], model: Mapping[str, Any], name: str | None) -> TextChoice:
    """Return what the run began with, whatever lies there now."""
    path = f"{key}.text_embedding"
    if name is None:
        said = f"{path}: this run began with its text encoder in every step and goes on so."
        now = _chosen(key, spec, model, "")
        if now.why != "stored":
            return TextChoice(key, None, "never", said)
        allow = f" {advice([path])}" if key == "train_loader" else ""
        said += f" Embeddings are stored by now; to read them from here on: {path}={now.name}{allow}"
        return TextChoice(key, None, "lacking", said)
    began = f"{path}: this run began with the stored embeddings {name!r}"
    try:
        lacking = _lacking(spec, name, None)[0]
    except _WRONG:
        return TextChoice(key, name, "unknown", f"{began}.")
    if not lacking:
        return TextChoice(key, name, "stored", f"{began} and goes on with them.")
    said = f"{began}, and now there is {_told(lacking)}. Put them back, or make them again with `prx encode text`. To go on with "
    said += f"the text encoder in every step: {path}=null {advice([path])}"
    return TextChoice(key, name, "gone", said)


# ------------------------------------------------------------------------------------------------------ a run that begins


def _chosen(key: str, spec: Mapping[str, Any], model: Mapping[str, Any] | None, given: str) -> TextChoice:
    """Return what to do by what lies beside the data.

    Args:
        model: of the recipe; None if it isn't known.
        given: the recipe, as `prx encode text` would be given it.
    """
    path = f"{key}.text_embedding"
    online = f"{path}: captions are encoded in every step"
    if model is not None and (reason := why_never(model)):
        return TextChoice(key, None, "never", f"{online}: {reason}.")
    try:
        for part in data_sets(spec).values():
            if problem := not_to_be_stored(part.get("captions") or {}):
                return TextChoice(key, None, "never", f"{online}: {problem}")
        lacking, unknown = _lacking(spec, STORED_AS, model)
    except _WRONG:
        said = f"{path}: not decided here, where the data aren't. The text encoder runs in every step unless its embeddings are "
        return TextChoice(key, None, "unknown", f"{said}stored with them.")
    if unknown:
        worth = lacking or any(part.get("remote") for part in data_sets(spec).values())
        return TextChoice(key, None, "lacking" if worth else "never", f"{online}: {_told(unknown)}.")
    title = encoder_title(model)[0] if model is not None else "the text encoder"
    if not lacking:
        said = f"{path}: the stored embeddings {STORED_AS!r} of {title} are read, and no step encodes a caption."
        return TextChoice(key, STORED_AS, "stored", said)
    how = f" To store them once, before the run begins: `{_command(key, spec, lacking, given)}`" if given else ""
    if any(one.in_the_way for one in lacking):
        how = (
            f" If the same encoder made them under another name, set text_embedding: {STORED_AS}. Else delete that folder first; "
            f"if another run reads it, give --name NAME and set text_embedding: NAME.{how}"
        )
    said = f"{online} by {title}, whose work `prx plan` counts, since there is {_told(lacking)}.{how}"
    return TextChoice(key, None, "lacking", said)


def why_never(model: Mapping[str, Any]) -> str | None:
    """Return why nothing could be stored that fits a model's text encoder, a clause; None if it could."""
    encoders = text_encoders(model)
    for path, encoder in encoders.items():
        if encoder.get("trainable"):
            return f"{path} is trained along, and what is stored would not follow it"
        if not encoder.get("pretrained"):
            return f"{path} has random weights of its own"
    return None if encoders else "model.text_encoder is not known"


@dataclass(frozen=True)
class _Lack:
    """What lacks of embeddings: a clause after "there is", of which data set, and whether something that doesn't fit is there."""

    reason: str
    where: str
    in_the_way: bool = False


def _lacking(spec: Mapping[str, Any], name: str, model: Mapping[str, Any] | None) -> tuple[list[_Lack], list[_Lack]]:
    """Return what lacks of a loader's embeddings, and of what it cannot be told here.

    Args:
        name: of the embeddings.
        model: whose encoder they must be of; None: anyone's.

    Raises:
        ValueError, UserError: the loader is wrong, or there are no data.
    """
    lacking, unknown = list[_Lack](), list[_Lack]()
    for where, part in data_sets(spec).items():
        split = str(part.get("split") or "train")
        folder = Path(part["path"]) / split
        if part.get("remote"):
            asked = f"{where + ': ' if where else ''}it isn't looked whether {part['remote']} has embeddings"
            unknown.append(_Lack(f"{asked}; if so, name them, text_embedding: {STORED_AS}", where))
            continue
        if part.get("source") and not (folder / MANIFEST).exists():
            unknown.append(_Lack(f"the data in {folder} are still to be made", where))
            continue
        manifest = read_manifest(part["path"], split, part.get("captions"))
        for caption in part.get("captions") or manifest.captions[:1]:
            encoded = encoded_folder(part["path"], split, name, caption)
            if not is_whole(encoded):
                begun = "only a part of" if encoded.exists() else "no"
                others = sorted(file.parents[1].name for file in encoded.parents[1].glob(f"*/{caption}/{MANIFEST}"))
                there = f" (but {', '.join(others)}, which text_embedding could name)" if others else ""
                lacking.append(_Lack(f"{begun} {encoded}{there}", where))
            elif reason := _why_unfit(encoded, manifest, model):
                lacking.append(_Lack(f"{encoded}, but {reason}", where, in_the_way=True))
    return lacking, unknown


def _why_unfit(folder: Path, manifest: Manifest, model: Mapping[str, Any] | None) -> str | None:
    """Return why whole embeddings cannot be read for these data and this model, a clause; None if they can."""
    try:
        column = read_column(folder, "text", "text_embedding")
        if column.data is None:
            return "it doesn't say of which captions it was made"
        if column.buckets != {str(bucket): count for bucket, count in manifest.buckets.items()}:
            return "it has other rows than the data"
        for bucket in column.buckets:
            files = [shard["raw_data"] for shard in shards_in(folder / bucket)]
            sizes = sizes_in(folder / bucket, {str(Path(file["basename"]).parent) for file in files})
            if any(sizes.get(file["basename"]) != file["bytes"] for file in files):
                return f"shards of {bucket} are missing or cut short"
    except UserError as error:
        return str(error).partition(": ")[2].replace(str(folder), "it").partition(". ")[0].rstrip(".")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None if model is None else _why_another_s(column, model)


def _why_another_s(column: StoredColumn, model: Mapping[str, Any]) -> str | None:
    """Return why a column is of another encoder than the model's, as far as that shows without weights; None if it isn't."""
    encoder, backbone = model["text_encoder"], model.get("backbone")
    width = backbone.get("context_in_dim") if isinstance(backbone, Mapping) else None
    title, revision = encoder_title(model)
    wanted = {"encoder": title, "revision": revision, "width": column.width if width is None else width}
    if "encoders" not in encoder:  # how many several keep is known when they are made
        wanted["max_tokens"] = encoder.get("max_tokens", 256)
    made = {key: getattr(column, key) for key in wanted}
    if _is_same_folder(made["encoder"], wanted["encoder"]):
        made["encoder"] = wanted["encoder"]
    told = [f"{key} {made[key]} (the recipe: {wanted[key]})" for key in wanted if made[key] != wanted[key]]
    return f"it was made with {', '.join(told)}" if told else None


def _is_same_folder(one: str, other: str) -> bool:
    folders = [Path(name).expanduser() for name in (one, other)]
    return all(folder.is_dir() for folder in folders) and folders[0].resolve() == folders[1].resolve()


def _told(found: list[_Lack]) -> str:
    return first([one.reason for one in found], _NAMED)


def _command(key: str, spec: Mapping[str, Any], lacking: list[_Lack], given: str) -> str:
    """Return the commands that store what lacks."""
    parts = data_sets(spec)
    splits = {str(part.get("split") or "train") for part in parts.values()}
    if key == "train_loader" and len(splits) == 1:
        return f"prx encode text {given}{_of_split(splits.pop())}"
    commands = []
    for part in (parts[where] for where in dict.fromkeys(one.where for one in lacking)):
        changes = ["train_loader.mix=null", f"train_loader.path={part['path']}"]
        if columns := part.get("captions"):
            changes.append(f"train_loader.captions={yaml.safe_dump(columns, default_flow_style=True, width=10**6).strip()}")
        commands.append(f"prx encode text {given} {shlex.join(changes)}{_of_split(str(part.get('split') or 'train'))}")
    return " && ".join(commands)


def _of_split(split: str) -> str:
    return "" if split == "train" else f" --split {shlex.quote(split)}"
