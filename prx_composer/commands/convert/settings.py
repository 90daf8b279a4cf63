"""What a conversion was asked to do: everything that decides the output, and nothing else."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError, nearest
from prx_composer.data.decoding import MAX_PIXELS, PIXELS_OPENED
from prx_composer.data.schema import RESERVED

SOURCES = ("webdataset", "parquet", "jsonl", "mds")
METADATA_TYPES = {"str": "str", "int": "int", "float": "float64"}  # ours → MDS encoding
CHROMA = {"4:4:4": 0, "4:2:0": 2}  # ours → Pillow's


@dataclass(frozen=True)
class Settings:
    """All that decides the output. Compared when a conversion goes on where it was.

    Args:
        source: kind of input.
        input: file or folder, local or remote.
        captions: caption column of the output → column of the input.
        image_size: side of the square whose area every bucket has, pixels.
        multiple: sides of buckets are multiples of this.
        metadata: further column of the output → (column of the input, type).
        image: the input's image column; None to find it.
        include: pattern that the names of input files must match.
        quality, chroma: of the one JPEG encoding.
        bucket_aspect: widest and tallest bucket.
        max_pixels: images with more are not decoded.
        min_side: shorter side of the original, pixels.
        max_aspect: longer over shorter side of the original.
        caption_chars: shortest and longest caption, characters.
        single_colour: keep images of one colour.
        where: expression over metadata that samples must fulfil.
        duplicates: "keep", "exact" or "perceptual".
        distance: bits of 64 by which perceptual duplicates may differ.
        limit: only the first so many samples of the input.
        split: folder below the output.
        unit_bytes: size of a work unit, where the input can be cut.
        follow_links: enter links to folders, and open images by links that lead out of the input.

    Raises:
        UserError: an impossible value, named by its option.
    """

    source: str
    input: str
    captions: dict[str, str]
    image_size: int = 1024
    multiple: int = 32
    metadata: dict[str, tuple[str, str]] = field(default_factory=dict)
    image: str | None = None
    include: str = "*"
    quality: int = 92
    chroma: str = "4:2:0"
    bucket_aspect: float = 2.0
    max_pixels: int = MAX_PIXELS
    min_side: int = 0
    max_aspect: float | None = None
    caption_chars: tuple[int, int | None] = (1, None)
    single_colour: bool = False
    where: str | None = None
    duplicates: str = "keep"
    distance: int = 4
    limit: int | None = None
    split: str = "train"
    unit_bytes: int = 1 << 28
    follow_links: bool = False

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise UserError(message)

        def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
            require(value in allowed, f"{option}: {value!r} is not one of them.{nearest(value, list(allowed))}")

        choice("--source", self.source, SOURCES)
        choice("--chroma", self.chroma, tuple(CHROMA))
        choice("--duplicates", self.duplicates, ("keep", "exact", "perceptual"))
        require(bool(self.captions), "--caption: name at least one caption column.")
        require(self.multiple > 0, f"--patch must be positive, not {self.multiple}.")
        fits = self.image_size > 0 and self.image_size % self.multiple == 0
        require(fits, f"--base-size {self.image_size} is not a multiple of --patch {self.multiple}.")
        require(1 <= self.quality <= 100, f"--quality must lie in 1 to 100, not {self.quality}.")
        require(self.bucket_aspect >= 1, f"--bucket-aspect must be at least 1, not {self.bucket_aspect}.")
        require(self.max_aspect is None or self.max_aspect >= 1, f"--max-aspect must be at least 1, not {self.max_aspect}.")
        opened = f"--max-pixels must lie in 1 to {PIXELS_OPENED}, not {self.max_pixels}: Pillow opens no larger image."
        require(0 < self.max_pixels <= PIXELS_OPENED, opened)
        require(0 <= self.distance <= 16, f"--distance must lie in 0 to 16 bits, not {self.distance}.")
        require(self.limit is None or self.limit > 0, f"--limit must be positive, not {self.limit}.")
        require(self.split.isidentifier(), f"--split must be a plain name, not {self.split!r}.")
        for name in [*self.captions, *self.metadata]:
            require(name not in RESERVED, f"{name!r} is the name of a column that every data set has; rename it: NAME={name}.")
        both = self.captions.keys() & self.metadata.keys()
        require(not both, f"--metadata {min(both, default='')} is the name of a caption, too; rename it: NAME=COLUMN:TYPE.")

    def to_json(self) -> dict[str, Any]:
        """As JSON reads it back: lists for tuples."""
        return {
            name: list(value)
            if isinstance(value, tuple)
            else {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in dataclasses.asdict(self).items()
        }


def parse_captions(options: list[str]) -> dict[str, str]:
    """`COLUMN` or `NAME=COLUMN`, each → name in the output: column of the input."""
    found: dict[str, str] = {}
    for option in options:
        name, _, column = option.rpartition("=")
        name = name or column
        if not column or name in found:
            raise UserError(f"--caption {option!r}: expected COLUMN or NAME=COLUMN, each name once.")
        found[name] = column
    return found


def parse_metadata(options: list[str]) -> dict[str, tuple[str, str]]:
    """`COLUMN:TYPE` or `NAME=COLUMN:TYPE`, each → name in the output: column of the input and type."""
    found: dict[str, tuple[str, str]] = {}
    for option in options:
        head, _, kind = option.rpartition(":")
        name, _, column = head.rpartition("=")
        name = name or column
        if not column or kind not in METADATA_TYPES or name in found:
            types = ", ".join(METADATA_TYPES)
            raise UserError(f"--metadata {option!r}: expected COLUMN:TYPE or NAME=COLUMN:TYPE, each name once. Types: {types}.")
        found[name] = (column, kind)
    return found


def parse_range(option: str, text: str) -> tuple[int, int | None]:
    """`5:500`, `5:` or `:500` → lowest and highest."""
    low, colon, high = text.partition(":")
    numbers = [part == "" or part.isdecimal() for part in (low, high)]
    if not colon or not all(numbers) or (low and high and int(low) > int(high)):
        raise UserError(f"{option} {text!r}: expected LOWEST:HIGHEST, either of which may be left out.")
    return int(low or 0), int(high) if high else None


def whole_path(path: str) -> str:
    """A local path from the root, so that it says the same from any folder and on any node; a remote one as it is."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())
