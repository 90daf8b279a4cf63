"""Icons of Iconify sets as a data set: one thing drawn in several styles, with captions of name, style and category.

A set is what an npm package `@iconify-json/<prefix>` holds: `icons.json` (name → SVG without its root element), `metadata.json`
(categories) and `info.json` (author and licence); or one JSON file with all of that, as in the repository iconify/icon-sets.
How a single icon is drawn is in `svg.py`.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageColor

from prx_composer.data.format import Bucket, RawSample
from prx_composer.data.svg import Box, SVGError, render

log = logging.getLogger(__name__)

PARTS = ("icons.json", "metadata.json", "info.json")
GET = "npm pack --pack-destination {} @iconify-json/noto @iconify-json/twemoji"
_LARGEST = 1 << 28  # bytes of one JSON file; those of large sets have 30 MB
_SENTENCES = (
    "a picture of {name}, one of {category}, in the style of {style}",
    "an icon from the set {style} that shows {name}, of the category {category}",
    "{name} as {style} draws it, with other icons of {category}",
    "in the style of {style}: {name}, which belongs to {category}",
)

# ----------------------------------------------------------------------------------------------------------------- sets


class Icon(NamedTuple):
    """An SVG without its root element, the box that is shown of it, and its category, empty if none is known."""

    body: str
    box: Box
    category: str


class IconSet(NamedTuple):
    """Name → icon of one set, and whose work it is."""

    icons: dict[str, Icon]
    categories: list[str]
    attribution: dict[str, str]


def set_files(place: Path) -> dict[Path, dict[str, Path]]:
    """Return where sets lie → their files by name: in `place` itself, or else in what is in it.

    Raises:
        ValueError: nothing is there, with the command that fetches some.
    """
    inside = sorted(place.iterdir()) if place.is_dir() else []
    archives = [path for path in inside if path.name.endswith((".tgz", ".tar.gz", ".json")) and path.name not in PARTS]
    found = (
        {place: _files(place)} if _files(place) else {path: _files(path) for path in inside if path.is_dir() or path in archives}
    )
    found = {path: files for path, files in found.items() if files}
    if not found:
        raise ValueError(f"{place} holds no Iconify set. Fetch some: `mkdir -p {place} && {GET.format(place)}`.")
    return found


def _files(path: Path) -> dict[str, Path]:
    """Return the files of a set by name: the path itself, or the parts in a folder, unpacked with or without `package`."""
    if path.is_file():
        return {path.name: path}
    folder = path / "package" if (path / "package").is_dir() else path
    parts = {f"{path.name}/{part}": folder / part for part in PARTS if (folder / part).is_file()}
    return parts if (folder / PARTS[0]).is_file() else {}


def read_set(path: Path, files: dict[str, Path]) -> tuple[str, IconSet]:
    """Return the prefix and the content of a set: a tarball of npm, a folder of its files, or one JSON file.

    Raises:
        ValueError: not the JSON of an Iconify set, which is said with the file's name.
    """
    try:
        read = _members(path) if tarfile.is_tarfile(next(iter(files.values()))) else _texts(files)
        parts = {name.rpartition("/")[2]: json.loads(text) for name, text in read.items()}
        content: dict[str, Any] = parts.get(PARTS[0]) or next(iter(parts.values()))
        content |= {key: value for part in PARTS[1:2] for key, value in parts.get(part, {}).items()}
        info = parts.get(PARTS[2]) or content.get("info") or {}
        return str(content["prefix"]), _icon_set(content, info)
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration, tarfile.TarError, RecursionError) as error:
        raise ValueError(f"{path} is no Iconify set: {type(error).__name__}: {error}.") from error


def _texts(files: dict[str, Path]) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files.items()}


def _members(path: Path) -> dict[str, bytes]:
    """Return the JSON files of a tarball, read where it lies; links and whatever else is in it are not looked at."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name in {f"package/{part}" for part in PARTS}:
                if member.size > _LARGEST:
                    raise ValueError(f"{member.name} has {member.size:,} bytes, more than {_LARGEST:,}")
                opened = tar.extractfile(member)
                found[member.name] = opened.read() if opened else b""
    return found


def _icon_set(content: dict[str, Any], info: dict[str, Any]) -> IconSet:
    categories = content.get("categories") or {}
    category = {name: str(label) for label, names in reversed(categories.items()) for name in names}
    icons = {}
    for name, icon in content["icons"].items():
        if not icon.get("hidden"):
            sides = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's own defaults
            box = Box(*(float(icon.get(key, content.get(key, default))) for key, default in sides.items()))
            icons[str(name)] = Icon(str(icon["body"]), box, category.get(name, ""))
    author, licence = info.get("author") or {}, info.get("license") or {}
    facts = {
        "title": info.get("name"), "author": author.get("name"), "author_url": author.get("url"),
        "licence": licence.get("spdx") or licence.get("title"), "licence_url": licence.get("url"),
    }  # fmt: skip
    return IconSet(icons, list(categories), {key: str(value) for key, value in facts.items() if value})


# --------------------------------------------------------------------------------------------------------------- source


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _words(text: str) -> str:
    """Return the words of a name or category: "Animals & Nature" → "animals and nature"."""
    return " ".join(re.findall(r"[^\W_]+", text.lower().replace("&", " and ")))


class IconsSource:
    """Icons that all sets have by the same name, each in the style of every set: the splits `train` and `heldout` share no pair
    of name and style, but every name and every style of `heldout` is in `train` with others.

    Caption columns: `caption` ("cactus in the style of openmoji"), `sentence` (one of several wordings, by name and style, with
    the category) and `word` (the name alone). Whose work the sets are is kept in the manifest.

    Args:
        folder: that holds sets as npm tarballs, folders or JSON files; or one of these.
        image_size: side of the square images.
        styles: prefixes of the sets; all that are there by default.
        categories: words of the names of categories, such as [animals, food]; all by default.
        common: only names that all sets have.
        heldout: of every how many names one style is kept out of training; 0 keeps none out. Which, the name decides alone.
        trained_names: train on so many names only, the same ones in every style, and keep all others out: to teach a model that
            knows the names a further style.
        background: a colour such as "white" or "#808080".
        supersampling: icons are drawn this many times larger, and brought down by a Lanczos filter.

    Raises:
        ValueError: no sets, settings out of range; when the sets are read: a set, style or category that isn't there.
    """

    captions = ("caption", "sentence", "word")
    identity: dict[str, Any] = {}

    def __init__(
        self,
        folder: str,
        image_size: int,
        styles: list[str] | None = None,
        categories: list[str] | None = None,
        common: bool = True,
        heldout: int = 4,
        trained_names: int | None = None,
        background: str = "white",
        supersampling: int = 4,
    ):
        if image_size < 1 or not 1 <= supersampling <= 16 or heldout < 0:
            raise ValueError(
                "image_size is at least 1, supersampling 1 to 16 and heldout at least 0, not "
                f"{image_size}, {supersampling} and {heldout}."
            )
        if trained_names is not None and trained_names < 1:
            raise ValueError(f"trained_names must be at least 1, not {trained_names}.")
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise ValueError(f"background: {background!r} is no colour such as white or '#808080'.") from error
        self.image_size, self.buckets = image_size, [Bucket(image_size, image_size)]
        self._places = set_files(Path(folder))
        self.files = {name: file for files in self._places.values() for name, file in files.items()}
        self._styles, self._categories, self._common = styles, categories, common
        self._heldout, self._trained_names = heldout, trained_names
        self._background, self._supersampling = background, supersampling

    @cached_property
    def sets(self) -> dict[str, IconSet]:
        """Style → set, in the order of the recipe, or of the alphabet."""
        found: dict[str, IconSet] = {}
        for path, files in self._places.items():
            prefix, icons = read_set(path, files)
            if prefix in found:
                raise ValueError(f"folder holds {prefix} twice, {path} is one: keep one version.")
            found[prefix] = icons
        if missing := sorted(set(self._styles or ()) - found.keys()):
            raise ValueError(f"styles: there is no set {missing[0]}; there are {', '.join(sorted(found))}.")
        return {prefix: found[prefix] for prefix in self._styles or sorted(found)}

    @property
    def attribution(self) -> dict[str, dict[str, str]]:
        """Style → title, author and licence of the set."""
        return {style: icons.attribution for style, icons in self.sets.items()}

    @cached_property
    def icons(self) -> dict[str, dict[str, Icon]]:
        """Name → style → icon: what was asked for, in alphabetical order."""
        found: dict[str, dict[str, Icon]] = {}
        slugs: dict[str, set[str]] = {}
        for style, icon_set in self.sets.items():
            for slug, icon in icon_set.icons.items():
                if self._is_wanted(icon):
                    key = slug.replace("-skin-tone", "")  # of the same emoji, which some sets leave out
                    slugs.setdefault(key, set()).add(slug)
                    found.setdefault(key, {}).setdefault(style, icon)
        least = len(self.sets) if self._common else 1
        names = {_words(max(slugs[key], key=len)): icons for key, icons in sorted(found.items()) if len(icons) >= least}
        there = sorted({label for icon_set in self.sets.values() for label in icon_set.categories})
        labels = [set(_words(label).split()) for label in there]
        strange = [name for name in self._categories or () if not any(set(_words(name).split()) <= label for label in labels)]
        if strange and there:
            sets = ", ".join(self.sets)
            raise ValueError(f"categories: there is no {', '.join(strange)} in {sets}; there are {', '.join(there)}.")
        if not names:
            raise ValueError(
                f"no icon is in the categories {self._categories} of {'all' if self._common else 'any'} of "
                f"{', '.join(self.sets)}; there are {', '.join(there) or 'none: metadata.json is missing beside icons.json'}."
            )
        return names

    def _is_wanted(self, icon: Icon) -> bool:
        words = set(_words(icon.category).split())
        return self._categories is None or any(set(_words(wanted).split()) <= words for wanted in self._categories)

    def is_heldout(self, name: str, style: str) -> bool:
        """Return whether a pair is kept out of training, which its name decides alone, unless only so many are trained on."""
        if self._trained_names is not None:
            return name not in self._only_trained
        styles = list(self.icons[name])
        if not self._heldout or len(styles) < 2 or _digest(name) % self._heldout:
            return False
        return style == min(styles, key=lambda style: _digest(f"{name} in {style}"))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return all pairs of name and style, by name."""
        return [(name, style) for name, styles in self.icons.items() for style in styles]

    @property
    def train_samples(self) -> int:
        """How many pairs are trained on, if all can be drawn."""
        return sum(not self.is_heldout(*pair) for pair in self.pairs)

    @cached_property
    def shuffled_names(self) -> list[str]:
        """All names in an order that has nothing to do with the alphabet, and is always the same."""
        return sorted(self.icons, key=lambda name: _digest(f"{name} in a row"))

    @cached_property
    def _only_trained(self) -> set[str]:
        return set(self.shuffled_names[: self._trained_names])

    def prompts(self, name: str, style: str) -> dict[str, str]:
        """Return the caption of a pair in each column."""
        category = next((_words(icon.category) for icon in self.icons[name].values() if icon.category), "icons")
        wording = _SENTENCES[_digest(f"wording of {name} in {style}") % len(_SENTENCES)]
        return {
            "caption": f"{name} in the style of {_words(style)}",
            "sentence": wording.format(name=name, style=_words(style), category=category),
            "word": name,
        }

    def picture(self, name: str, style: str, size: int) -> Image.Image:
        """Draw a pair at another size than the data have. Raise as `render`."""
        icon = self.icons[name][style]
        return render(icon.body, icon.box, size, self._background, self._supersampling)

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        left_out: Counter[str] = Counter()
        for name, style in self.pairs:
            try:
                image = self.picture(name, style, self.image_size)
            except SVGError as error:
                log.warning("%s:%s is left out: it %s", style, name, error)
                left_out[str(error)] += 1
                continue
            encoded = io.BytesIO()
            image.save(encoded, format="PNG")
            split = "heldout" if self.is_heldout(name, style) else "train"
            key = f"{style}:{name.replace(' ', '-')}"
            yield split, RawSample(encoded.getvalue(), self.image_size, self.image_size, self.prompts(name, style), key)
        if left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            log.warning("%d of %d icons are left out: %s.", left_out.total(), len(self.pairs), reasons)
