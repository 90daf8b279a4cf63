"""A data set as a recipe trains on it: its samples decoded, scaled and cropped, with the caption that is chosen, where it is cut.

`subject_of` says which data set and how, `look` draws samples, `write_view` makes a picture or a page of them.
"""

import io
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.commands import writing
from prx_composer.commands.data.split import Split, open_split
from prx_composer.common.errors import UserError, at_path, raise_all
from prx_composer.common.pages import Text, Tile, contact_sheet, data_uri, picture, render, shown_factor
from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import Bucket
from prx_composer.data.sampler import BucketBatchSampler, SampleRequest
from prx_composer.data.storage import is_remote
from prx_composer.models.prompts import readings
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets, text_encoders
from prx_composer.recipe.arguments import split as split_spec
from prx_composer.recipe.consistency import PlannedStage
from prx_composer.runs.folder import TOKENIZER
from prx_composer.runs.model_parts import made_tokenizer
from prx_composer.training.components import make_data
from prx_composer.training.preflight import examine

COLUMNS = 8
PROBLEM = (190, 30, 30)
WORDS = 6  # before and after a cut, in a picture


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
    registry.import_code(recipe.code_paths)
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
    """Return the run's tokenizer and max_tokens; without a trained run, make it. Nothing is written to the run's folder."""
    encoders = text_encoders(recipe.model)
    if not encoders:
        return None, 0
    path, spec = max(encoders.items(), key=lambda one: int(one[1].get("max_tokens", 256)))
    with tempfile.TemporaryDirectory(prefix="prx-look.") as scratch:
        run = Path(recipe.run_folder)
        try:
            tokenizer = made_tokenizer(spec, recipe.train_loader, run if (run / TOKENIZER).exists() else Path(scratch), path)
        except UserError as error:
            raise UserError(f"{error} Without it: name the folder of the data, {recipe.train_loader.get('path')}") from error
    return tokenizer, int(spec.get("max_tokens", 256))


# --------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Cut:
    """A caption as the tokenizer leaves it.

    Args:
        kept, lost: what the model reads and what it does not.
        tokens: of the whole caption.
    """

    kept: str
    lost: str
    tokens: int


@dataclass(frozen=True)
class Seen:
    """One sample, as training sees it.

    Args:
        image: uint8 (3, H, W), or None if it cannot be decoded.
        size: of the image in this stage. stored: the bucket it lies in.
        column: caption column that was chosen. others: the other captions by column.
        problem: why there is no image. replacement: the sample that training shows in its place, if there is one.
    """

    sample_id: int
    key: str
    stored: Bucket
    size: Bucket
    image: Tensor | None
    column: str
    caption: Cut
    others: dict[str, str]
    problem: str = ""
    replacement: int | None = None


@dataclass(frozen=True)
class View:
    """Samples that were drawn from a split.

    Args:
        total: samples that they were drawn from. max_tokens: 0 if captions are not cut.
    """

    split: Split
    image_size: int
    total: int
    bucket: str | None
    max_tokens: int
    samples: list[Seen]


def look(
    subject: Subject, split: Split, count: int = 32, seed: int = 0, image_size: int | None = None, bucket: str | None = None
) -> View:
    """Draw samples, all with the same probability, in the order of their buckets.

    Args:
        count: samples, at most.
        seed: of the draw.
        image_size: side of the square whose area images have; by default the recipe's, or the one they are stored at.
        bucket: only of this one, by the name that it has in the data set.

    Raises:
        UserError: no such bucket, or an image size that the data or the recipe cannot have.
    """
    image_size = image_size or subject.image_size or split.manifest.image_size
    with _dataset(subject, split) as dataset:
        sides = [side for stored in dataset.buckets for side in stored]
        multiple = subject.multiple or math.gcd(*sides, image_size)
        with at_path("--image-size"):
            sampler = BucketBatchSampler(dataset, image_size, 1, multiple, False, 0, 1, 0)
        ids = dataset.ids()
        if bucket is not None:
            names = [str(stored) for stored in dataset.buckets]
            if bucket not in names:
                raise UserError(f"--bucket: there is no {bucket!r}; the data set has {', '.join(names)}.")
            ids = [ids[names.index(bucket)]]
        members = np.concatenate(ids)
        total = len(members)
        drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
        samples = [_see(dataset, sampler, subject, int(members[index])) for index in sorted(drawn)]
    return View(split, image_size, total, bucket, subject.max_tokens if subject.tokenizer is not None else 0, samples)


@contextmanager
def _dataset(subject: Subject, split: Split) -> Iterator[ImageCaptionDataset]:
    """Open the data set that the recipe's loader has; without a recipe, one with that loader's defaults."""
    given = {name: subject.loader[name] for name in ("captions", "remote", "skip") if subject.loader.get(name)}
    if split.manifest.beside:  # those that are not trained on are shown, too
        own = given.get("captions") or {split.manifest.captions[0]: 1.0}
        given["captions"] = own | {name: 0.0 for name in split.manifest.beside if name not in own}
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache, at_path(subject.key if subject.loader else subject.path):
        path = subject.loader.get("path") or subject.path
        if not subject.loader and is_remote(path):
            given["remote"], path = path.rstrip("/"), cache
        yield ImageCaptionDataset(path, subject.split, seed=subject.seed, **given)


def _see(dataset: ImageCaptionDataset, sampler: BucketBatchSampler, subject: Subject, sample_id: int) -> Seen:
    place = dataset.bucket_of(sample_id)
    size, row = sampler.sizes[place], dataset.row(sample_id)
    column = dataset.choose_caption(sample_id, 0)
    read = dataset.read_caption(row, column, sample_id, 0)
    texts = {name: row[name] for name in dataset.manifest.captions if name in row and (name != column or row[name] != read)}
    image, problem, replacement = _image(dataset, SampleRequest(sample_id, size.height, size.width, 0), row)
    return Seen(
        sample_id,
        str(row.get("key", "")),
        dataset.buckets[place],
        size,
        image,
        column,
        cut(read, subject.tokenizer, subject.max_tokens),
        {name if name != column else f"{name} as stored": text for name, text in texts.items()},
        problem,
        replacement,
    )


def _image(dataset: ImageCaptionDataset, request: SampleRequest, row: dict[str, Any]) -> tuple[Tensor | None, str, int | None]:
    """Return what training gets for a request: the image, or why it is another one's and whose."""
    try:
        sample = dataset.look_at(request)
        if sample["sample_id"] == request.sample_id:
            return sample["image"], "", None
        replacement = int(sample["sample_id"])
    except UndecodableError:
        replacement = None
    try:
        decode_image(row["image"], request.height, request.width)
    except UNDECODABLE as error:
        return None, str(error) or type(error).__name__, replacement
    raise AssertionError("an image that was replaced can be decoded")


def cut(text: str, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> Cut:
    """Return where a caption is cut; without a tokenizer it isn't."""
    if tokenizer is None:
        return Cut(text, "", 0)
    (found,) = readings(tokenizer, [text], max_tokens)
    if found.read is None:
        return Cut(found.cleaned, "", found.tokens)
    lost = found.cleaned[len(found.read) :] if found.cleaned.startswith(found.read) else "…"
    return Cut(found.read, lost, found.tokens)


# ----------------------------------------------------------------------------------------------- pictures and pages


def check_output(path: str) -> None:
    """Raise UserError, before anything is read, for a file that will not be written."""
    if Path(path).suffix.lower() not in (".png", ".html"):
        raise UserError(f"--output {path}: a picture (.png) or a page (.html) can be written.")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {Path(path).parent}.")


def write_view(view: View, path: str) -> None:
    """Write a .png or .html file. Raise UserError if it cannot be written."""
    with writing(f"--output {path}"):
        if path.lower().endswith(".html"):
            Path(path).write_text(_page(view), encoding="utf-8")
        else:
            font_size = 11 if max(seen.size.width for seen in view.samples) < 256 else 14
            contact_sheet([_tile(seen, view.max_tokens) for seen in view.samples], COLUMNS, font_size).save(path)


def title(view: View) -> str:
    """Say of which samples a view is."""
    bucket = f" of bucket {view.bucket}" if view.bucket else ""
    tokens = f", captions cut to {view.max_tokens} tokens" if view.max_tokens else ""
    broken = sum(seen.image is None for seen in view.samples)
    undecodable = f"; {broken} cannot be decoded" if broken else ""
    what = f"{len(view.samples)} of {view.total:,} samples{bucket} of {view.split.folder}"
    return f"{what} at {view.image_size} px{tokens}{undecodable}"


def _shown(seen: Seen) -> Image.Image:
    """Return its pixels, or a crossed-out grey field of that size."""
    if seen.image is not None:
        return picture(seen.image)
    height, width = seen.size
    field = Image.new("RGB", (width, height), (225, 225, 225))
    draw = ImageDraw.Draw(field)
    draw.line((0, 0, width, height), fill=PROBLEM)
    draw.line((0, height, width, 0), fill=PROBLEM)
    return field


def _problem(seen: Seen) -> str:
    instead = "no image of its bucket can" if seen.replacement is None else f"training shows {seen.replacement} instead"
    return f"cannot be decoded ({seen.problem}); {instead}"


def _tile(seen: Seen, max_tokens: int) -> Tile:
    texts = [Text(f"{seen.sample_id}  {seen.stored}  {seen.key}", "gray", 2), Text(seen.caption.kept, lines=8)]
    if seen.caption.lost:
        before, after = seen.caption.kept.split()[-WORDS:], seen.caption.lost.split()[:WORDS]
        texts.append(
            Text(f"cut after {max_tokens} of {seen.caption.tokens} tokens: … {' '.join(before)} | {' '.join(after)} …", "red")
        )
    if seen.image is None:
        texts.append(Text(_problem(seen), "red"))
    return Tile(_shown(seen), tuple(texts))


def _page(view: View) -> str:
    factor = max(shown_factor(*seen.size) for seen in view.samples)
    tiles = []
    for seen in view.samples:
        file = io.BytesIO()
        _shown(seen).save(file, "PNG")
        image = data_uri(file.getvalue(), "png")
        tiles.append({"seen": seen, "image": image, "width": seen.size.width * factor, "problem": _problem(seen)})
    return render("prx_composer.commands.data", "sheet.html", title=title(view), tiles=tiles, view=view)
