"""How captions and prompts are cleaned before they become tokens, by the rules of PRX's released pipelines.

The rules are DeepFloyd-IF's, as diffusers' `TextPreprocessor` of PRXPipeline has them, oddities included: what a model was
trained with is what its prompts must go through.
"""

import copy
import html
import re
import urllib.parse
from collections.abc import Callable
from typing import Literal, TypeVar

Cleaning = Literal["none", "basic", "prx"]
T = TypeVar("T")

_TOP_LEVEL = "com|co|ru|net|org|edu|gov|it"
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63"
    r"\uFF0D]+"
)
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_CJK = ("\u31c0-\u31ef", "\u31f0-\u31ff", "\u3200-\u32ff", "\u3300-\u33ff", "\u3400-\u4dbf", "\u4dc0-\u4dff", "\u4e00-\u9fff")

# (pattern, replacement), in this order: before HTML entities are resolved …
_FIRST = [
    ("<person>", "person"),
    (
        rf"\b((?:https?|www):(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_TOP_LEVEL})[\w/-]*\b\/?(?!@))",
        "",
    ),  # addresses
    (r"@[\w\d]+\b", ""),  # names of users
    *((f"[{span}]+", "") for span in _CJK),
    (_DASHES, "-"),
    ("[`´«»¨]", '"'),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),  # names of files
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\\/\*]+", " "),
    (r"\s+\.\s+", " "),
]
# … and after it.
_THEN = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]
_BEFORE, _AFTER = ([(re.compile(pattern), replacement) for pattern, replacement in rules] for rules in (_FIRST, _THEN))
_JOINER = re.compile(r"[\-_]")
_FEW_JOINERS = 3  # this-is-my-cute-cat has more of them, and they become spaces


def cleaner(cleaning: Cleaning) -> Callable[[str], str]:
    """What a caption goes through: "none", "basic" (PRXPixelPipeline's) or "prx" (PRXPipeline's).

    Raises:
        ValueError: no such cleaning, or ftfy, which both of them need, is not installed.
    """
    if cleaning not in ("none", "basic", "prx"):
        raise ValueError(f"clean must be none, basic or prx, not {cleaning!r}.")
    if cleaning == "none":
        return lambda text: text
    try:
        import ftfy
    except ImportError as error:
        raise ValueError(f"clean: {cleaning} needs ftfy, which is not installed: `pip install ftfy`.") from error

    def basic(text: str) -> str:
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip()

    def prx(text: str) -> str:
        text = urllib.parse.unquote_plus(text).strip().lower()
        for pattern, replacement in _BEFORE:
            text = pattern.sub(replacement, text)
        if len(_JOINER.findall(text)) > _FEW_JOINERS:
            text = _JOINER.sub(" ", text)
        text = basic(text)
        for pattern, replacement in _AFTER:
            text = pattern.sub(replacement, text)
        return text.strip()

    return basic if cleaning == "basic" else prx


def clean_caption(text: str, cleaning: Cleaning) -> str:
    """One caption, cleaned."""
    return cleaner(cleaning)(text)


# A tokenizer carries its cleaning, so that whoever is given it to make tokens makes the same: loaders and their workers, `prx
# encode`, `prx data stats`, sampling.


def with_cleaning(tokenizer: T, cleaning: Cleaning) -> T:
    """The tokenizer, or a shallow copy of it, that cleans captions first, where `tokenize` or `cleaned` is asked.

    Raises:
        ValueError: as `cleaner`.
    """
    cleaner(cleaning)
    if cleaning_of(tokenizer) == cleaning:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.caption_cleaning = cleaning  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def cleaning_of(tokenizer: object) -> Cleaning:
    return getattr(tokenizer, "caption_cleaning", "none")


def cleaned(tokenizer: object, texts: list[str]) -> list[str]:
    """The texts as this tokenizer is to read them."""
    cleaning = cleaning_of(tokenizer)
    if cleaning == "none":
        return texts
    clean = cleaner(cleaning)
    return [clean(text) for text in texts]
