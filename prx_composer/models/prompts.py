"""How captions and prompts become tokens: cleaned by the rules of PRX's released pipelines, cut at the last token that fits."""

import copy
import html
import re
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

NAMED = 20  # prompts that are named; the others are counted
_SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class Reading:
    """What is read of a text.

    Args:
        text: the whole of it, as it was given. cleaned: as the tokenizer's cleaning leaves it.
        ids: the tokens that are read, special ones included.
        tokens: how many the whole text has, special ones included.
        read: the part of the cleaned text that is read; None if that is all of it.
        unknown: words in that that the tokenizer does not know, each once.
    """

    text: str
    cleaned: str
    ids: tuple[int, ...]
    tokens: int
    read: str | None = None
    unknown: tuple[str, ...] = ()


def readings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[Reading]:
    """How each text is read when it is cut to `max_tokens`."""
    if not texts:
        return []
    clean = cleaned(tokenizer, list(texts))
    cut: Any = tokenizer(clean, max_length=max_tokens, truncation=True)
    lost = cut_off(tokenizer, clean, cut)
    found = []
    for index, text in enumerate(clean):
        ids = cut["input_ids"][index]
        if cut.encodings is None:
            read = tokenizer.decode(ids, skip_special_tokens=True) if lost[index] else None
            unknown = [word for word in text.split() if unknown_id(tokenizer) in _content_ids(tokenizer, word)]
        else:
            spans = _spans(cut.encodings[index])
            read = _part(tokenizer, text, spans) if lost[index] else None
            unknown = _unknown_words(tokenizer, text, spans)
        found.append(Reading(texts[index], text, tuple(ids), len(ids) + lost[index], read, tuple(dict.fromkeys(unknown))))
    return found


def cut_off(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Any) -> list[int]:
    """How many tokens of each text were cut off.

    Args:
        texts: cleaned. tokens: what the tokenizer gave for them with `truncation=True`, padded or not.
    """
    if tokens.encodings is not None:  # the fast ones keep what they cut off
        return [sum(part.special_tokens_mask.count(0) for part in encoding.overflowing) for encoding in tokens.encodings]
    kept: list[int] = [int(sum(mask)) for mask in tokens["attention_mask"]]
    widest = max(kept, default=0)
    return [
        max(0, len(tokenizer(text, verbose=False)["input_ids"]) - count) if count == widest else 0  # pyright: ignore[reportArgumentType]
        for text, count in zip(texts, kept, strict=True)
    ]


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for all words a tokenizer does not know; None for one that can spell everything.

    Byte-level tokenizers such as CLIP's often name their end token here, which is in every text.
    """
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    unknown: Any = tokenizer.unk_token_id
    return None if unknown in ends else unknown


def what_is_lost(found: Sequence[Reading], max_tokens: int) -> list[str]:
    """Of each prompt that isn't read whole, a sentence that says so; and which of them draw the same picture.

    Args:
        found: of different prompts.
    """
    partly = [one for one in found if one.read is not None or one.unknown]
    said = [_said(one, max_tokens) for one in partly[:NAMED]]
    if more := partly[NAMED:]:
        cut = sum(one.read is not None for one in more)
        said.append(
            f"So it is with {len(more):,} more of {len(found):,} prompts: {cut:,} are cut, the others have unknown words."
        )
    if any(one.read is not None for one in partly):
        said.append(f"What is cut off changes nothing in a picture; model.text_encoder.max_tokens is {max_tokens}.")
    if any(one.unknown for one in partly):
        said.append("Unknown words are all read as one and the same.")
    same: dict[tuple[int, ...], list[Reading]] = defaultdict(list)
    for one in found:
        same[one.ids].append(one)
    groups = [group for group in same.values() if len(group) > 1 and any(one.read is not None or one.unknown for one in group)]
    for group in groups[:NAMED]:
        names = ", ".join(_shown(one.text, from_end=one.read is not None) for one in group[:4])
        said.append(f"{len(group)} prompts are read alike and draw the same picture from the same seed: {names}.")
    if more := groups[NAMED:]:
        said.append(f"{len(more):,} more groups of prompts are read alike.")
    return said


def _said(one: Reading, max_tokens: int) -> str:
    said = []
    if one.read is not None:
        read, last = one.read.strip(), one.read.strip()[-_SHOWN:]
        how = "up to" if one.cleaned.startswith(one.read) else "only"
        said.append(f"of its {one.tokens} tokens the model reads {max_tokens}, {how} {'…' if last != read else ''}{last!r}")
    if one.unknown:
        words = ", ".join(map(repr, one.unknown[:10])) + (f" and {len(one.unknown) - 10} more" if len(one.unknown) > 10 else "")
        said.append(f"the tokenizer does not know {words}")
    return f"The prompt {_shown(one.text)} is not read whole: {'; '.join(said)}."


def _shown(text: str, from_end: bool = False) -> str:
    if len(text) <= _SHOWN:
        return repr(text)
    return f"…{text[-_SHOWN:]!r}" if from_end else f"{text[:_SHOWN]!r}…"


def _content_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    tokens: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return tokens["input_ids"]


def _spans(encoding: Any) -> list[tuple[int, int, int]]:
    """Token, first and last place in the text of what is no special token."""
    tokens = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [(token, *span) for token, span, special in tokens if not special]


def _part(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int, int]]) -> str:
    if tokenizer.truncation_side == "left":
        return text[min((start for _, start, _ in spans), default=len(text)) :]
    return text[: max((end for _, _, end in spans), default=0)]


def _unknown_words(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int, int]]) -> list[str]:
    unknown = unknown_id(tokenizer)
    words = []
    for token, start, end in spans:
        if token != unknown or unknown is None or text[start:end] == tokenizer.unk_token:
            continue
        while start > 0 and text[start].isalnum() and text[start - 1].isalnum():  # a piece of a word: show the word
            start -= 1
        while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
            end += 1
        words.append(text[start:end].strip() or text[start:end])
    return [word for word in words if word]


class CaptionCounts:
    """How many captions a loader has cut, over all its workers; they count into shared memory.

    Args:
        max_workers: DataLoader workers that will share this object.
    """

    def __init__(self, max_workers: int = 0):
        self._counts = torch.zeros(max_workers + 1, 5, dtype=torch.int64).share_memory_()

    def add(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Any) -> None:
        """Counts a batch.

        Args:
            texts: cleaned. tokens: what the tokenizer gave for them with `truncation=True` and tensors.
        """
        lost = cut_off(tokenizer, texts, tokens)
        mask, unknown = tokens["attention_mask"], unknown_id(tokenizer)
        strange = 0 if unknown is None else int(((tokens["input_ids"] == unknown) & mask.bool()).sum())
        worker = get_worker_info()
        self._counts[0 if worker is None else worker.id + 1] += torch.tensor(
            [len(texts), sum(count > 0 for count in lost), sum(lost), int(mask.sum()), strange]
        )

    @property
    def captions(self) -> int:
        return int(self._counts.numpy()[:, 0].sum())  # the host's own memory: numpy waits for no device

    def told(self, max_tokens: int) -> str | None:
        """What is lost of the captions so far, in words; None if nothing is."""
        captions, cut, lost, tokens, unknown = self._counts.numpy().sum(0).tolist()
        return captions_told(captions, cut, lost, tokens, unknown, max_tokens)


def captions_told(captions: int, cut: int, lost: int, tokens: int, unknown: int, max_tokens: int) -> str | None:
    """What is lost of captions, in words; None if nothing is.

    Args:
        captions, cut: of which so many are cut. lost: tokens that those lose, together.
        tokens, unknown: tokens that are read, of which so many stand for unknown words.
    """
    said = []
    if cut:
        said.append(
            f"{cut:,} of {captions:,} captions ({cut / captions:.1%}) have more than model.text_encoder.max_tokens: {max_tokens} "
            f"and are cut; they lose {lost / cut:.1f} tokens on average"
        )
    if unknown:
        said.append(
            f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%}) are words that the tokenizer does not know and reads as "
            "one and the same"
        )
    return "; ".join(said) or None


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
