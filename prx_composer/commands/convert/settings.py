"""What a conversion was asked to do: everything that decides the output, and nothing else."""

import ast
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from simpleeval import InvalidExpression, SimpleEval
from typer import Option

from prx_composer.commands.options import Parsed
from prx_composer.common.errors import UserError, nearest
from prx_composer.data.decoding import MAX_PIXELS, PIXELS_OPENED
from prx_composer.data.format import RESERVED

SOURCES = {  # name → module and class, imported only when it is used
    "webdataset": "webdataset:WebDataset",
    "parquet": "tables:Tables",
    "jsonl": "lines:Lines",
    "mds": "mds_shards:Shards",
}
METADATA_TYPES = {"str": "str", "int": "int", "float": "float64"}  # ours → MDS encoding
CHROMA = {"4:4:4": 0, "4:2:0": 2}  # ours → Pillow's
MEASURED = ("width", "height", "aspect", "caption_length")  # of the original image and the longest caption
FUNCTIONS = {"len": len, "min": min, "max": max, "abs": abs, "round": round, "lower": lambda text: str(text).lower()}


def parse_captions(options: list[str]) -> dict[str, str]:
    """Return name in the output → column of the input, of options `COLUMN` and `NAME=COLUMN`."""
    found: dict[str, str] = {}
    for option in options:
        name, _, column = option.rpartition("=")
        name = name or column
        if not column or name in found:
            raise UserError(f"--caption {option!r}: expected COLUMN or NAME=COLUMN, each name once.")
        found[name] = column
    return found


def parse_metadata(options: list[str]) -> dict[str, tuple[str, str]]:
    """Return name in the output → (column of the input, type), of options `COLUMN:TYPE` and `NAME=COLUMN:TYPE`."""
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


def parse_range(text: str) -> tuple[int, int | None]:
    """Return lowest and highest of `5:500`, `5:` or `:500`."""
    low, colon, high = text.partition(":")
    numbers = [part == "" or part.isdecimal() for part in (low, high)]
    if not colon or not all(numbers) or (low and high and int(low) > int(high)):
        raise UserError(f"--caption-chars {text!r}: expected LOWEST:HIGHEST, either of which may be left out.")
    return int(low or 0), int(high) if high else None


def whole_path(path: str) -> str:
    """Return a local path from the root, so that it says the same from any folder and on any node; a remote one as it is."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class Settings:
    """All that decides the output, as options of `prx data convert`. Compared when a conversion goes on where it was.

    Args:
        captions: caption column of the output → column of the input.
        metadata: further column of the output → (column of the input, type).
        unit_bytes: size of a work unit, where the input can be cut. No option: it decides the order of samples.

    Raises:
        UserError: an impossible value, named by its option.
    """

    source: Annotated[str, Option(help="webdataset, parquet (also Hugging Face datasets folders), jsonl or mds.")]
    input: Annotated[str, Parsed(str, whole_path), Option(help="File or folder, local or remote (s3://…).")]
    captions: Annotated[
        dict[str, str],
        Parsed(list[str], parse_captions),
        Option("--caption", help="Caption column, or NAME=COLUMN to rename it. May be given again."),
    ]
    image_size: Annotated[int, Option("--base-size", help="Side of the square whose area all buckets have, pixels.")] = 1024
    multiple: Annotated[int, Option("--patch", help="Sides of buckets are multiples of this.")] = 32
    metadata: Annotated[
        dict[str, tuple[str, str]],
        Parsed(list[str], parse_metadata, []),
        Option(help="COLUMN:TYPE or NAME=COLUMN:TYPE to keep; str, int or float. meta.tags.0 looks inside. Repeatable."),
    ] = field(default_factory=dict)
    image: Annotated[
        str | None, Option(help="Image column (tars: suffix). [default: image, or the only one by type and name]")
    ] = None
    include: Annotated[
        str, Option(help="Pattern for names of input files, such as 'train-*', or for paths below it: 'train/*'.")
    ] = "*"
    quality: Annotated[int, Option(help="JPEG quality of images that must be encoded.")] = 92
    chroma: Annotated[str, Option(help="Their chroma subsampling, 4:2:0 or 4:4:4.")] = "4:2:0"
    bucket_aspect: Annotated[float, Option(help="Aspect ratio of the widest bucket.")] = 2.0
    max_pixels: Annotated[int, Option(help="Leave out images with more pixels, undecoded.")] = MAX_PIXELS
    min_side: Annotated[int, Option(help="Leave out images whose shorter side is below this, pixels.")] = 0
    max_aspect: Annotated[float | None, Option(help="Leave out images longer than this many times their width.")] = None
    caption_chars: Annotated[
        tuple[int, int | None],
        Parsed(str, parse_range, "1:"),
        Option(help="LOWEST:HIGHEST length of captions, characters."),
    ] = (1, None)
    single_colour: Annotated[bool, Option("--keep-single-colour", help="Keep images of one colour.")] = False
    where: Annotated[str | None, Option(help="Keep what fulfils this, e.g. 'aesthetic > 5 and width >= 512'.")] = None
    duplicates: Annotated[str, Option(help="keep, or leave out all but the first: exact, or perceptual.")] = "keep"
    distance: Annotated[int, Option(help="Bits of 64 by which perceptual hashes of duplicates may differ.")] = 4
    limit: Annotated[int | None, Option(help="Only the first so many samples of the input.")] = None
    split: Annotated[str, Option(help="Split to write.")] = "train"
    unit_bytes: int = 1 << 28
    follow_links: Annotated[
        bool, Option("--follow-links", help="Follow symbolic links that lead out of the input, as in a hub's cache.")
    ] = False

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise UserError(message)

        def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
            require(value in allowed, f"{option}: {value!r} is not one of them.{nearest(value, list(allowed))}")

        choice("--source", self.source, tuple(SOURCES))
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
        """Return them as JSON reads them back: lists for tuples."""
        return {
            name: list(value)
            if isinstance(value, tuple)
            else {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in dataclasses.asdict(self).items()
        }

    @property
    def input_columns(self) -> set[str]:
        """The columns of the input that are asked for, the image aside."""
        names = {*self.captions.values(), *(column for column, _ in self.metadata.values())}
        return names | ({*_names(self.where)} - {*MEASURED} if self.where else set())

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Option and column of all that is asked for by name, the image aside."""
        named = [("--caption", column) for column in self.captions.values()]
        named += [("--metadata", column) for column, _ in self.metadata.values()]
        others = self.input_columns - {column for _, column in named}
        return named + [("--where", column) for column in sorted(others)]


# `--where` is evaluated by simpleeval, which has no way to attributes, calls or files.


@functools.lru_cache
def _parse(where: str) -> ast.AST:
    return SimpleEval.parse(where)


def _names(where: str) -> list[str]:
    return [n.id for n in ast.walk(_parse(where)) if isinstance(n, ast.Name) and n.id not in FUNCTIONS | {"True": 0, "False": 0}]


def check_where(where: str) -> None:
    """Raise UserError if an expression is none, or more than one."""
    try:
        _names(where)
    except (InvalidExpression, SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"--where {where!r}: {error}") from error
    for node in ast.walk(_parse(where)):
        if isinstance(node, ast.Attribute | ast.Lambda | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            raise UserError(f"--where {where!r}: names, numbers, text, comparisons, arithmetic and {', '.join(FUNCTIONS)} only.")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            called = ast.unparse(node.func)
            raise UserError(f"--where: there is no function {called!r}.{nearest(called, list(FUNCTIONS))}")


def is_wanted(where: str, columns: Mapping[str, Any]) -> bool | None:
    """Return whether a sample fulfils an expression; None if it cannot be evaluated on it."""
    values = {name: columns.get(name) for name in _names(where)}
    values = {name: v.decode(errors="replace") if isinstance(v, bytes) else v for name, v in values.items()}
    evaluator = SimpleEval(functions=FUNCTIONS, names=values | {"True": True, "False": False, "None": None})
    try:
        return bool(evaluator.eval(where, previously_parsed=_parse(where)))
    except Exception:  # whatever the operands are: a sample must not stop the job
        return None
