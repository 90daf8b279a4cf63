"""Where a data set comes from when it is not there yet: a source makes its splits on first use."""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from prx_composer.common.files import read_lines
from prx_composer.data.buckets import Bucket, BucketSettings, assign_bucket, cropping_note
from prx_composer.data.contents import FileRecord
from prx_composer.data.decoding import IMAGE_REASONS, BadImageError, open_image, oriented_size
from prx_composer.data.format import BucketWriter, RawSample

log = logging.getLogger(__name__)

FINGERPRINT = "source.json"
FILES = "source_files.json"  # what the source read, by name
NAMED = 4  # changed files that are named; the others are counted
CAPTION_NAMES = ("caption", "text", "prompt")


class Source(Protocol):
    """What can be named under `train_loader.source`."""

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
                f"{path} was made with other settings of train_loader.source ({', '.join(different)}). "
                "Set train_loader.path to a new folder, or delete this one."
            )
        _check_files(path, source)
        return True
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty and was not made by train_loader.source; set train_loader.path to a new folder.")
    return False


def _check_files(path: Path, source: Source) -> None:
    files, record = getattr(source, "files", None), FileRecord(path / FILES)
    if files is None:
        return
    if not record.exists:
        log.warning("%s doesn't say of which images it was made. If they may have changed since, delete it.", path)
    elif changed := record.different(files):
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise ValueError(
            f"{path} was made of other images than train_loader.source finds now: {len(changed)} of {len(files)} have changed "
            f"({', '.join(changed[:NAMED])}{more}). Set train_loader.path to a new folder, or delete this one."
        )


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
    ):
        self._folder = Path(folder)
        self.image_size = image_size
        self._heldout = heldout
        if not 0 <= heldout < 1:
            raise ValueError(f"train_loader.source.heldout must lie in [0, 1), not {heldout}.")
        if not self._folder.is_dir():
            raise ValueError(f"train_loader.source.folder: there is no folder {folder}.")
        captions = self._folder / captions_file
        if not captions.exists():
            there = ", ".join(sorted(file.name for file in self._folder.glob("*.jsonl")))
            hint = f" There is {there}: set captions_file to it if that is what it holds." if there else ""
            raise ValueError(f"train_loader.source.captions_file: there is no {captions}.{hint}")
        self.files: dict[str, Path] = {}
        left_out: Counter[str] = Counter()
        self._rows = list(self._read(captions, left_out))
        reasons = ", ".join(f"{count} {reason} ({IMAGE_REASONS[reason]})" for reason, count in left_out.items())
        if not self._rows:
            raise ValueError(f"{captions} names no image that can be opened: {reasons or 'it has no lines'}.")
        if left_out:
            log.warning("%d of %d images are left out: %s.", left_out.total(), left_out.total() + len(self._rows), reasons)
        self.captions = tuple(sorted(self._rows[0][1], key=lambda name: name not in CAPTION_NAMES))
        self.train_samples = len(self._rows) - int(len(self._rows) * heldout)
        self.identity = {"captions_sha256": hashlib.sha256(captions.read_bytes()).hexdigest()}
        shapes = Counter((height, width) for _, _, height, width in self._rows)
        settings = BucketSettings(image_size, multiple, max_aspect, min_bucket)
        self.buckets = settings.buckets(shapes)
        self.notes = [] if (note := cropping_note(shapes, settings, "train_loader.source")) is None else [note]
        if len(self.captions) > 1:
            self.notes.append(
                f"{captions} has text in the columns {', '.join(self.captions)}, which all become caption columns; training "
                f"takes {self.captions[0]} unless train_loader.captions names others."
            )

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
        for index, (image, texts, height, width) in enumerate(self._rows):
            if texts.keys() != set(self.captions):
                raise ValueError(f"{image.name} has captions {sorted(texts)}, the first image {sorted(self.captions)}.")
            held_out = int((index + 1) * self._heldout) > int(index * self._heldout)  # evenly spread
            sample = RawSample(image.read_bytes(), width, height, texts, image.name)
            yield "heldout" if held_out else "train", sample
