"""Where a data set comes from when it is not there yet: a source makes its splits on first use.

A source is a folder of images and captions, or one of two sets that need no download: procedural scenes with captions, and
scikit-learn's scans of handwritten digits.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prx_composer.common.errors import first
from prx_composer.common.files import read_lines
from prx_composer.common.installation import adding
from prx_composer.data.contents import FileRecord
from prx_composer.data.decoding import IMAGE_REASONS, BadImageError, open_image, oriented_size
from prx_composer.data.format import Bucket, BucketSettings, BucketWriter, RawSample, assign_bucket, cropping_note, is_held_out

log = logging.getLogger(__name__)

FINGERPRINT = "source.json"
FILES = "source_files.json"  # what the source read, by name
NAMED = 4  # changed files that are named; the others are counted
CAPTION_NAMES = ("caption", "text", "prompt")


class Source(Protocol):
    """A component that can be named under `train_loader.source`."""

    image_size: int
    captions: tuple[str, ...]
    buckets: list[Bucket]
    identity: dict[str, Any]  # what decides the data beside the source's arguments, such as a checksum
    # and perhaps `files: dict[str, Path]`, what it reads, by name: data made of other contents are refused
    # and perhaps `notes: list[str]`, what a person should know of how the data is made
    # and perhaps `attribution: dict[str, dict[str, str]]`, whose work the images are, for the manifest

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        """Yield every sample with the name of its split."""
        ...


def is_made(path: Path, source: Source, spec: dict[str, Any]) -> bool:
    """Return whether the data set of `source` is in `path` already.

    Raises:
        ValueError: `path` holds data made with other settings, of files that have changed since, or something else.
    """
    spec = spec | source.identity
    fingerprint = path / FINGERPRINT
    if fingerprint.exists():
        made_with = json.loads(fingerprint.read_text())
        if made_with != spec:
            different = sorted(key for key in made_with.keys() | spec.keys() if made_with.get(key) != spec.get(key))
            raise ValueError(
                f"{path} was made with other settings of this source ({', '.join(different)}). "
                "Set `path`, beside `source`, to a new folder, or delete this one."
            )
        files, record = getattr(source, "files", None), FileRecord(path / FILES)
        if files is not None and not record.exists:
            log.warning("%s doesn't say of which images it was made. If they may have changed since, delete it.", path)
        elif files is not None and (changed := record.different(files)):
            raise ValueError(
                f"{path} was made of other images than this source finds now: {len(changed)} of {len(files)} have "
                f"changed ({first(changed, NAMED)}). Set `path`, beside `source`, to a new folder, or delete this one."
            )
        return True
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty and was not made by this source; set `path`, beside `source`, to a new folder.")
    return False


def prepare(path: Path, source: Source, spec: dict[str, Any], limit: int | None = None) -> None:
    """Make the data set of `source` in `path`, unless it is there already.

    Args:
        spec: the source's configuration; kept beside the data, so that other settings are never trained on old data.
        limit: only so many samples, for a trial.

    Raises:
        ValueError: as `is_made`; a source without training samples.
    """
    files: dict[str, Path] | None = getattr(source, "files", None)
    if is_made(path, source, spec):
        if files is not None and (record := FileRecord(path / FILES)).exists:
            record.keep(files)  # the times of what was copied or touched, so that it isn't read again
        return
    spec = spec | source.identity
    log.info("Making the data set in %s", path)
    for note in getattr(source, "notes", ()):
        log.warning("%s", note)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    writers: dict[str, BucketWriter] = {}
    try:
        if files is not None:
            FileRecord(partial / FILES).keep(files)  # first: what changes meanwhile is noticed next time
        with contextlib.ExitStack() as whole:
            for split, sample in itertools.islice(source.samples(), limit):
                if split not in writers:
                    whose = getattr(source, "attribution", None)
                    writer = BucketWriter(partial / split, source.image_size, source.captions, attribution=whose)
                    writers[split] = whole.enter_context(writer)
                writers[split].write(assign_bucket(sample.height, sample.width, source.buckets), sample)
        if "train" not in writers:
            raise ValueError("The source gave no training samples.")
        (partial / FINGERPRINT).write_text(json.dumps(spec, indent=1))
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class FolderSource:
    """A folder of images and a JSON-lines file of captions.

    Every line of `captions.jsonl` is an object with the image's `file` (or `file_name`), relative to the folder, and one
    or more caption columns: `{"file": "cat.jpg", "caption": "a sleeping cat"}`. Of several, one called `caption`, `text` or
    `prompt` comes first, which is what training takes unless `train_loader.captions` says otherwise.

    Args:
        folder: where images and captions are.
        image_size: side of the square whose area the images are trained at.
        multiple: sides of buckets are multiples of this: the model's patch size, or a multiple of it.
        captions_file: name of the captions file in the folder.
        max_aspect: images wider or taller than this are cropped to it.
        min_bucket: aspect ratios with fewer images than this join the nearest that has more.
        heldout: share of the images that go to the split `heldout`.
        heldout_by: `place` in the captions file, evenly spread and to the number, or `content`, as `prx data convert --heldout`.

    Raises:
        ValueError: a missing folder or file, a line that isn't as above, an image that is not there.
    """

    def __init__(
        self,
        folder: str,
        image_size: int,
        multiple: int = 32,
        captions_file: str = "captions.jsonl",
        max_aspect: float = 2.0,
        min_bucket: int = 8,
        heldout: float = 0.0,
        heldout_by: Literal["place", "content"] = "place",
    ):
        self._folder = Path(folder)
        self.image_size = image_size
        if not 0 <= heldout < 1:
            raise ValueError(f"heldout must lie in [0, 1), not {heldout}.")
        if not self._folder.is_dir():
            raise ValueError(f"folder: there is no folder {folder}.")
        captions = self._folder / captions_file
        if not captions.exists():
            there = ", ".join(sorted(file.name for file in self._folder.glob("*.jsonl")))
            hint = f" There is {there}: set captions_file to it if that is what it holds." if there else ""
            raise ValueError(f"captions_file: there is no {captions}.{hint}")
        self.files: dict[str, Path] = {}
        left_out: Counter[str] = Counter()
        self._rows = list(self._read(captions, left_out))
        reasons = ", ".join(f"{count} {reason} ({IMAGE_REASONS[reason]})" for reason, count in left_out.items())
        if not self._rows:
            raise ValueError(f"{captions} names no image that can be opened: {reasons or 'it has no lines'}.")
        if left_out:
            log.warning("%d of %d images are left out: %s.", left_out.total(), left_out.total() + len(self._rows), reasons)
        self.captions = tuple(sorted(self._rows[0][1], key=lambda name: name not in CAPTION_NAMES))
        ends = [int(index * heldout) for index in range(len(self._rows) + 1)]
        self._held_out = [end > begin for begin, end in itertools.pairwise(ends)]  # evenly spread
        if heldout_by == "content":
            self._held_out = [is_held_out(image.read_bytes(), heldout) for image, *_ in self._rows]
        self.train_samples = self._held_out.count(False)
        self.identity = {"captions_sha256": hashlib.sha256(captions.read_bytes()).hexdigest()}
        shapes = Counter((height, width) for _, _, height, width in self._rows)
        settings = BucketSettings(image_size, multiple, max_aspect, min_bucket)
        self.buckets = settings.buckets(shapes)
        self.notes = [] if (note := cropping_note(shapes, settings)) is None else [note]
        if heldout and self.train_samples == len(self._rows):
            self.notes.append(f"heldout: {heldout} takes none of {len(self._rows)} images: there is no split `heldout`.")
        if len(self.captions) > 1:
            self.notes.append(
                f"{captions} has text in the columns {', '.join(self.captions)}, which all become caption columns; training "
                f"takes {self.captions[0]} unless the loader's `captions` names others."
            )
        empty = Counter(name for _, texts, *_ in self._rows for name, text in texts.items() if not text.strip())
        self.notes += [f"{captions}: {name} is empty for {n:,} of {len(self._rows):,} images." for name, n in empty.items()]

    def _read(self, captions: Path, left_out: Counter[str]) -> Iterator[tuple[Path, dict[str, str], int, int]]:
        for number, line in enumerate(read_lines(captions), 1):
            if not line.strip():
                continue
            where = f"{captions}, line {number}"
            try:
                row = json.loads(line)
                name = str(row.pop("file", None) or row.pop("file_name"))
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(f'{where}: expected {{"file": "…", "caption": "…"}}, found {line[:80]!r}.') from error
            texts = {key: value for key, value in row.items() if isinstance(value, str)}
            if not texts:
                raise ValueError(f"{where}: no caption beside the file name.")
            if strange := [key for key in CAPTION_NAMES if row.get(key) is not None and key not in texts]:
                raise ValueError(f"{where}: {strange[0]} is no text but {row[strange[0]]!r:.80}; write a line for each text.")
            for key, text in texts.items():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{where}: {key} holds half a surrogate pair, which is no text: {error}.") from error
            image = (self._folder / name).resolve()
            if not image.is_file() or not image.is_relative_to(self._folder.resolve()):
                raise ValueError(f"{where}: there is no image {name} in {self._folder}.")
            self.files[name] = image
            try:
                with image.open("rb") as file:
                    height, width = oriented_size(open_image(file))
            except BadImageError as error:
                log.warning("%s: %s is left out: %s", where, name, error)
                left_out[str(error)] += 1
                continue
            yield image, texts, height, width

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        for (image, texts, height, width), held_out in zip(self._rows, self._held_out, strict=True):
            if texts.keys() != set(self.captions):
                raise ValueError(f"{image.name} has captions {sorted(texts)}, the first image {sorted(self.captions)}.")
            yield "heldout" if held_out else "train", RawSample(image.read_bytes(), width, height, texts, image.name)


# ------------------------------------------------------------------------------------------------ procedural scenes

# A coloured shape at a position on a background, some combinations kept out of training. They make the quickstart possible, and
# its score exact: a drawn image is right if its nearest rendering among all combinations is the one asked for.

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 70, 220), "yellow": (245, 210, 20)}
COLOURS |= {"purple": (140, 40, 170), "orange": (250, 130, 20)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
NEW_COLOURS = {"pink": (250, 130, 190), "teal": (0, 150, 150)}  # of no image of the source: for fine-tuning
BACKGROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (10, 10, 10)}
POSITIONS = {"left": 0.27, "centre": 0.5, "right": 0.73}


class Scene(NamedTuple):
    """A combination of the four attributes."""

    colour: str
    shape: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        where = "in the centre" if self.position == "centre" else f"on the {self.position}"
        return f"{article} {self.colour} {self.shape} {where} of a {self.background} background"

    @property
    def short_caption(self) -> str:
        return f"{self.colour} {self.shape}, {self.position}, {self.background}"


def all_scenes(colours: Iterable[str] = COLOURS) -> list[Scene]:
    """Return every combination: 6 colours × 5 shapes × 3 backgrounds × 3 positions = 270, or those of other colours."""
    return [Scene(*scene) for scene in itertools.product(colours, SHAPES, BACKGROUNDS, POSITIONS)]


def heldout_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` combinations kept out of training; every single attribute, and nearly every pair, is still seen there."""
    scenes = all_scenes()
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[index] for index in sorted(order[:count])]


def render(scene: Scene, height: int, width: int, *, shift: tuple[float, float] = (0, 0), scale: float = 1.0) -> Image.Image:
    """Draw a scene, antialiased.

    Args:
        shift: of the centre, in fractions of the shorter side, (x, y).
        scale: of the shape's size.
    """
    s = 4  # times as large, then averaged
    side = min(height, width)
    image = Image.new("RGB", (width * s, height * s), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    x = (POSITIONS[scene.position] * width + shift[0] * side) * s
    y = (0.5 * height + shift[1] * side) * s
    r = 0.22 * side * scale * s
    fill = (COLOURS | NEW_COLOURS)[scene.colour]

    def box(wide: float, high: float) -> tuple[float, float, float, float]:
        return x - wide * r, y - high * r, x + wide * r, y + high * r

    if scene.shape == "circle":
        draw.ellipse(box(1, 1), fill=fill)
    elif scene.shape == "ring":
        draw.ellipse(box(1, 1), outline=fill, width=round(0.42 * r))
    elif scene.shape == "square":
        draw.rectangle(box(0.9, 0.9), fill=fill)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=fill)
    elif scene.shape == "cross":
        draw.rectangle(box(1, 0.3), fill=fill)
        draw.rectangle(box(0.3, 1), fill=fill)
    return image.resize((width, height), Image.Resampling.BOX)


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()


class ShapesSource:
    """Scenes with small random shifts and sizes; the splits `train` and `heldout` share no combination.

    Args:
        image_size: side of the square whose area the images have.
        images_per_scene: renderings of every combination, aspect ratios taken in turn.
        heldout: number of combinations kept out of training.
        aspects: (height, width) parts of the aspect ratios, such as [[1, 1], [3, 4]].
        multiple: sides are multiples of this.
        seed: of shifts, sizes and the choice of held-out combinations.
    """

    captions = ("caption", "short_caption")
    identity: dict[str, Any] = {}

    def __init__(
        self,
        image_size: int = 32,
        images_per_scene: int = 32,
        heldout: int = 36,
        aspects: list[list[int]] | None = None,
        multiple: int = 4,
        seed: int = 0,
    ):
        total = len(all_scenes())
        if not 0 < heldout < total:
            raise ValueError(f"heldout must lie between 1 and {total - 1}, not {heldout}.")
        self.image_size = image_size
        self._images_per_scene, self._heldout, self._seed = images_per_scene, heldout, seed
        self.train_samples = (total - heldout) * images_per_scene
        self.buckets = [
            Bucket(*(max(multiple, round(image_size * part / (h * w) ** 0.5 / multiple) * multiple) for part in (h, w)))
            for h, w in aspects or [[1, 1]]
        ]

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        rng = np.random.default_rng(self._seed)
        heldout = set(heldout_scenes(self._heldout, self._seed))
        for scene in all_scenes():
            for index in range(self._images_per_scene):
                height, width = self.buckets[index % len(self.buckets)]
                shift = rng.uniform(-0.03, 0.03, 2)
                image = render(scene, height, width, shift=(shift[0], shift[1]), scale=rng.uniform(0.95, 1.05))
                captions = {"caption": scene.caption, "short_caption": scene.short_caption}
                key = "-".join(scene) + f"-{index}"
                yield "heldout" if scene in heldout else "train", RawSample(_png(image), width, height, captions, key)


# ---------------------------------------------------------------------------------------------------------- digits

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT = 600  # the last scans, of other writers than the first


def load_digit_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return UCI's scans, uint8 (1797, 8, 8), and labels (1797,). Raise ImportError, with the remedy, without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"The digits come with scikit-learn: {adding('eval')}") from error
    digits: Any = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class DigitsSource:
    """The scans as a data set: `train`, and the last 600 as `heldout`, on which the scoring classifier is fitted."""

    captions = ("caption",)
    identity: dict[str, Any] = {}

    def __init__(self) -> None:
        self.image_size = 8
        self.buckets = [Bucket(8, 8)]

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        images, labels = load_digit_scans()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            split = "heldout" if index >= len(images) - HELDOUT else "train"
            caption = {"caption": f"a handwritten {DIGIT_WORDS[label]}"}
            yield split, RawSample(_png(Image.fromarray(image)), 8, 8, caption, f"scan-{index}")
