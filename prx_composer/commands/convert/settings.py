"""What a conversion was asked to do: everything that decides the output, `--where`, and which split the files are of."""

import ast
import dataclasses
import functools
import glob
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from simpleeval import InvalidExpression, SimpleEval
from typer import Option

from prx_composer.commands import Parsed
from prx_composer.common.errors import UserError, first, nearest
from prx_composer.data.decoding import MAX_PIXELS, PIXELS_OPENED
from prx_composer.data.format import HELDOUT, RESERVED
from prx_composer.data.storage import is_included, relative_name

SOURCES = {  # name → module and class, imported only when it is used
    "webdataset": "webdataset:WebDataset",
    "parquet": "tables:Tables",
    "jsonl": "jsonl_mds:Lines",
    "mds": "jsonl_mds:Shards",
}
METADATA_TYPES = {"str": "str", "int": "int", "float": "float64"}  # ours → MDS encoding
MEASURED = ("width", "height", "aspect", "caption_length")  # of the original image and the longest caption
NO_CAPTIONS = "none"  # of `--caption`: images alone
FUNCTIONS = {"len": len, "min": min, "max": max, "abs": abs, "round": round, "lower": lambda text: str(text).lower()}


def parse_captions(options: list[str]) -> dict[str, str]:
    """Return name in the output → column of the input, of options `COLUMN` and `NAME=COLUMN`; nothing, of `none` alone."""
    found: dict[str, str] = {}
    if options == [NO_CAPTIONS]:
        return found
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
        Option("--caption", help="Caption column, or NAME=COLUMN to rename it. May be given again. none: images alone."),
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
    heldout: Annotated[
        float | None, Option(help="Share of the images for a split `heldout` beside it, such as 0.01. An image's bytes decide.")
    ] = None
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
        choice("--chroma", self.chroma, ("4:4:4", "4:2:0"))
        choice("--duplicates", self.duplicates, ("keep", "exact", "perceptual"))
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
        require(self.heldout is None or 0 < self.heldout < 1, f"--heldout must lie between 0 and 1, not {self.heldout}.")
        both_held = f"--heldout {self.heldout} and --split {HELDOUT} would be written to one place. Leave one of them out."
        require(self.heldout is None or self.split != HELDOUT, both_held)
        for name in [*self.captions, *self.metadata]:
            require(name not in RESERVED, f"{name!r} is the name of a column that every data set has; rename it: NAME={name}.")
        both = self.captions.keys() & self.metadata.keys()
        require(not both, f"--metadata {min(both, default='')} is the name of a caption, too; rename it: NAME=COLUMN:TYPE.")

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON reads them back: lists for tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Option and column of all that is asked for by name, the image aside."""
        named = [("--caption", column) for column in self.captions.values()]
        named += [("--metadata", column) for column, _ in self.metadata.values()]
        others = {*_names(self.where)} - {*MEASURED} - {column for _, column in named} if self.where else ()
        return named + [("--where", column) for column in sorted(others)]

    @property
    def input_columns(self) -> set[str]:
        """The columns of the input that are asked for, the image aside."""
        return {column for _, column in self.asked}

    @property
    def metadata_encodings(self) -> dict[str, str]:
        """The MDS encodings of the metadata columns of the output."""
        return {name: METADATA_TYPES[kind] for name, (_, kind) in self.metadata.items()}


# `--where` is evaluated by simpleeval, which has no way to attributes, calls or files.


@functools.lru_cache
def _parse(where: str) -> ast.AST:
    return SimpleEval.parse(where)


def _names(where: str) -> list[str]:
    return [node.id for node in ast.walk(_parse(where)) if isinstance(node, ast.Name) and node.id not in FUNCTIONS]


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
    try:
        return bool(SimpleEval(functions=FUNCTIONS, names=values).eval(where, previously_parsed=_parse(where)))
    except Exception:  # whatever the operands are: a sample must not stop the job
        return None


# Which split the input's files are of, by their names.

ALL = "**"  # --include that mixes splits all the same
OTHERS = "the others"  # files whose names say no split
WORDS = {  # the words by which Hugging Face's `datasets` tells splits apart, and our own
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    HELDOUT: (HELDOUT,),
}
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class SplitName(NamedTuple):
    """A split that a path names, and patterns for `--include` that take its files, the plainest first."""

    split: str
    patterns: tuple[str, ...]


def split_of(path: str) -> SplitName | None:
    """Return the split that a file's name says, else one of its folders, the outermost first; None if nothing does.

    Args:
        path: below the input, with `/`.
    """
    *folders, name = path.split("/")
    if match := _WORD.search(name):
        word, after = match[1], name[match.end() : match.end() + 1]
        start = "" if match.start() == 0 else "*"
        return SplitName(_SPLITS[word.lower()], (f"{start}{word}{glob.escape(after)}*", f"{start}{word}*"))
    for depth, folder in enumerate(folders, 1):
        if match := _WORD.search(folder):
            above = "/".join(folders[:depth])
            return SplitName(_SPLITS[match[1].lower()], (f"{glob.escape(above)}/*", f"*{glob.escape(folder)}/*"))
    return None


def check_one_split(files: list[str], settings: Settings) -> None:
    """Check that the input's files are not of several splits.

    Args:
        files: those that are to be read, as `list_files` names them.

    Raises:
        UserError: they are, and `--include` doesn't say that they should be mixed. Names the patterns that take one of them.
    """
    if settings.include == ALL:
        return
    found = {path: split_of(path) for path in (relative_name(file, settings.input) for file in files)}
    splits: dict[str, list[str]] = defaultdict(list)
    for path, named in found.items():
        splits[named.split if named else OTHERS].append(path)
    if "train" in splits:  # not so in cats.parquet beside cats_test.parquet
        splits.pop(OTHERS, None)
    if len(splits) < 2:
        return
    ways = []
    for _, members in sorted(splits.items()):
        patterns = dict.fromkeys(p for member in members if (named := found[member]) for p in named.patterns)
        exact = (p for p in patterns if {path for path in found if is_included(path, p)} == set(members))
        ways.append(next((f"--include '{pattern}'" for pattern in exact), ""))
    known = ", or ".join(filter(None, ways))
    advice = [f"Take one of them: {known}."] if known else []
    advice += [] if all(ways) else [f"Give the files of {OTHERS if known else 'one of them'} a folder of their own."]
    counted = "; ".join(f"{split}: {first(members, 2)}" for split, members in sorted(splits.items()))
    raise UserError(
        f"--input: {settings.input} holds several splits, and one data set would mix them ({counted}). {' '.join(advice)} "
        f"To mix them all the same: --include '{ALL}'."
    )
