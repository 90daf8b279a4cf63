"""SVG of strangers as pixels: only what draws shapes is let through, and nothing in it is executed, fetched or opened."""

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

from PIL import Image, ImageColor

from prx_composer.common.installation import adding

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SHAPES = """circle clipPath defs desc ellipse g line linearGradient mask metadata path pattern polygon polyline radialGradient
    rect stop svg symbol title use"""
_FILTERS = """feBlend feColorMatrix feComponentTransfer feComposite feDropShadow feFlood feFuncA feFuncB feFuncG feFuncR
    feGaussianBlur feMerge feMergeNode feMorphology feOffset filter"""
_STILL = "animate animateMotion animateTransform mpath set"  # drawn as they stand at the beginning
_DRAWN = frozenset(f"{_SHAPES} {_FILTERS} {_STILL}".split())
_REFERENCE = re.compile(r"url\(\s*['\"]?\s*([^'\")\s]*)")
_DEEPEST, _MOST = 100, 50_000  # levels and elements, references followed; an emoji has some hundred


class Box(NamedTuple):
    """What is shown of an SVG, in its own units."""

    left: float
    top: float
    width: float
    height: float


class SVGError(ValueError):
    """Why an icon is not drawn, in a few words."""


def checked(body: str) -> ElementTree.Element:
    """Return the parsed content of an SVG, in a root element, if it consists of shapes, colours and references to itself.

    Raises:
        SVGError: text that is no XML, or declares entities; elements that execute, embed, write text or are unknown; references
            to anything outside; nesting and references that multiply beyond any picture.
    """
    if "<!" in body or "<?" in body:
        raise SVGError("declares something")
    try:
        root = ElementTree.fromstring(f'<svg xmlns="{_SVG}" xmlns:xlink="{_XLINK}">{body}</svg>')
    except ElementTree.ParseError as error:
        raise SVGError("is no XML") from error
    for element in root.iter():
        name = element.tag.removeprefix(f"{{{_SVG}}}")
        if name not in _DRAWN:
            raise SVGError(f"has an element <{name.rpartition('}')[2]}>")
        for attribute, value in element.attrib.items():
            if any(not target.startswith("#") for target in _targets(attribute, value)) or "\\" in value:
                raise SVGError("refers to something outside")
    _weigh(root, {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}, {}, 0)
    return root


def _targets(attribute: str, value: str) -> list[str]:
    return [value.strip()] if attribute.rpartition("}")[2] == "href" else _REFERENCE.findall(value)


def _weigh(element: ElementTree.Element, by_id: dict[str, ElementTree.Element], known: dict[int, int], depth: int) -> int:
    """Return how many elements are drawn for this one: with those inside of it and those that it refers to."""
    if depth > _DEEPEST:
        raise SVGError("is nested without end")
    if id(element) not in known:
        targets = [target[1:] for attribute, value in element.attrib.items() for target in _targets(attribute, value)]
        below = [*element, *(by_id[target] for target in targets if target in by_id)]
        known[id(element)] = 1 + sum(_weigh(child, by_id, known, depth + 1) for child in below)
        if known[id(element)] > _MOST:
            raise SVGError("multiplies without end")
    return known[id(element)]


def render(body: str, box: Box, size: int, background: str = "white", supersampling: int = 4) -> Image.Image:
    """Draw an SVG into a square of `size` pixels, its aspect ratio kept.

    Args:
        body: what is inside of the root element.
        background: a colour as Pillow's `ImageColor` has them, "white" or "#f0f0f0".
        supersampling: drawn this many times larger, and brought down by a Lanczos filter.

    Raises:
        SVGError: what `checked` refuses, what the renderer cannot draw, and what leaves the background empty.
        ImportError: without resvg, with the remedy.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(f"Icons are drawn by resvg: {adding('icons')}") from error
    if not (0 < box.width < math.inf and 0 < box.height < math.inf):
        raise SVGError("has no size")
    root, side = checked(body), str(size * supersampling)
    root.attrib |= {"viewBox": " ".join(map(str, box)), "width": side, "height": side}
    colour = "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(background)[:3])
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=ElementTree.tostring(root, encoding="unicode"), background=colour, skip_system_fonts=True
        )
        drawn = Image.open(io.BytesIO(png)).convert("RGB")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        raise SVGError("cannot be drawn") from error
    if drawn.getcolors(1):  # None if there are more
        raise SVGError("is blank")
    return drawn.resize((size, size), Image.Resampling.LANCZOS)
