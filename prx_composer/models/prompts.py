"""How captions and prompts become tokens: worded anew in training, cut at the last token that fits."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from prx_composer.common.errors import first
from prx_composer.models.caption_format import SeveralTokenizers, chief, format_of, formatted

_NAMED = 20  # prompts that are named; the others are counted
_SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class Reading:
    """The part of a text that is read.

    Args:
        text: the whole of it, as it was given. cleaned: as the tokenizer's cleaning leaves it.
        ids: the tokens that are read, special ones included.
        tokens: how many the whole text has, special ones included.
        read: the part of the cleaned text that is read; None if that is all of it.
        unknown: words in that part that the tokenizer does not know, each once.
    """

    text: str
    cleaned: str
    ids: tuple[int, ...]
    tokens: int
    read: str | None = None
    unknown: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is read, and every word is known."""
        return self.read is None and not self.unknown and not self.is_cleaned_away

    @property
    def is_cleaned_away(self) -> bool:
        return loses_letters(self.text, self.cleaned)


def loses_letters(text: str, cleaned: str) -> bool:
    """Return whether cleaning leaves less than half of a text's letters, as `clean: prx` does of Chinese."""
    return 2 * sum(map(str.isalpha, cleaned)) < sum(map(str.isalpha, text))


def readings(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[Reading]:
    """Return how each text is read when it is cut to `max_tokens`; with several encoders, by the one that reads most."""
    if not texts:
        return []
    tokenizer, max_tokens = chief(tokenizer, max_tokens)
    clean = formatted(tokenizer, texts)
    cut: Any = tokenizer(clean, max_length=max_tokens + format_of(tokenizer).skipped, truncation=True)
    lost = cut_off(tokenizer, clean, cut)
    found = []
    for index, text in enumerate(clean):
        ids = cut["input_ids"][index]
        if cut.encodings is None:
            read = tokenizer.decode(ids, skip_special_tokens=True) if lost[index] else None
            words: Any = {word: tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"] for word in text.split()}
            unknown = [word for word, its_ids in words.items() if unknown_id(tokenizer) in its_ids]
        else:
            spans = _spans(cut.encodings[index])
            read = _part(tokenizer, text, spans) if lost[index] else None
            unknown = _unknown_words(tokenizer, text, spans)
        found.append(Reading(texts[index], text, tuple(ids), len(ids) + lost[index], read, tuple(dict.fromkeys(unknown))))
    return found


def cut_off(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: Any) -> list[int]:
    """Return how many tokens of each text were cut off.

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
    """Return the token that stands for all words a tokenizer does not know; None for one that can spell everything.

    Byte-level tokenizers such as CLIP's often name their end token here, which is in every text.
    """
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    unknown: Any = tokenizer.unk_token_id
    return None if unknown in ends else unknown


def what_is_lost(found: Sequence[Reading], max_tokens: int) -> list[str]:
    """Return a sentence about each prompt that isn't read whole, and about those that draw the same picture.

    Args:
        found: of different prompts.
    """
    partly = [one for one in found if not one.is_whole]
    said = [_said(one, max_tokens) for one in partly[:_NAMED]]
    if more := partly[_NAMED:]:
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
    groups = [group for group in same.values() if len(group) > 1 and not all(one.is_whole for one in group)]
    for group in groups[:_NAMED]:
        names = ", ".join(_shown(one.text, from_end=one.read is not None) for one in group[:4])
        said.append(f"{len(group)} prompts are read alike and draw the same picture from the same seed: {names}.")
    if more := groups[_NAMED:]:
        said.append(f"{len(more):,} more groups of prompts are read alike.")
    return said


def _said(one: Reading, max_tokens: int) -> str:
    """Return a sentence about a prompt that isn't read whole."""
    said = []
    if one.read is not None:
        read, last = one.read.strip(), one.read.strip()[-_SHOWN:]
        how = "up to" if one.cleaned.startswith(one.read) else "only"
        said.append(f"of its {one.tokens} tokens the model reads {max_tokens}, {how} {'…' if last != read else ''}{last!r}")
    if one.unknown:
        said.append(f"the tokenizer does not know {first(map(repr, one.unknown), 10)}")
    if one.is_cleaned_away:
        said.append(f"model.text_encoder.clean leaves {one.cleaned[:_SHOWN]!r} of it")
    return f"The prompt {_shown(one.text)} is not read whole: {'; '.join(said)}."


def _shown(text: str, from_end: bool = False) -> str:
    if len(text) <= _SHOWN:
        return repr(text)
    return f"…{text[-_SHOWN:]!r}" if from_end else f"{text[:_SHOWN]!r}…"


def _spans(encoding: Any) -> list[tuple[int, int, int]]:
    """Return every token but the special ones, with where it begins and ends in the text."""
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
    """Counts how many captions a loader has cut, over all its workers, which count into shared memory.

    Args:
        max_workers: DataLoader workers that will share this object.
    """

    def __init__(self, max_workers: int = 0):
        self._counts = torch.zeros(max_workers + 1, 6, dtype=torch.int64).share_memory_()

    def add(self, tokenizer: PreTrainedTokenizerBase, given: Sequence[str], texts: Sequence[str], tokens: Any) -> None:
        """Count a batch.

        Args:
            given: captions. texts: cleaned. tokens: what the tokenizer gave for these with `truncation=True` and tensors.
        """
        lost = cut_off(tokenizer, texts, tokens)
        mask, unknown = tokens["attention_mask"], unknown_id(tokenizer)
        strange = 0 if unknown is None else int(((tokens["input_ids"] == unknown) & mask.bool()).sum())
        worker = get_worker_info()
        self._counts[0 if worker is None else worker.id + 1] += torch.tensor(
            [
                len(texts),
                sum(count > 0 for count in lost),
                sum(lost),
                int(mask.sum()),
                strange,
                sum(map(loses_letters, given, texts)),
            ]
        )

    @property
    def captions(self) -> int:
        """How many have been counted."""
        return int(self._counts.numpy()[:, 0].sum())  # the host's own memory: numpy waits for no device

    def told(self, max_tokens: int) -> str | None:
        """Return what is lost of the captions so far, in words; None if nothing is."""
        captions, cut, lost, tokens, unknown, cleaned = self._counts.numpy().sum(0).tolist()
        said = []
        if cleaned:
            said.append(
                f"{cleaned:,} of {captions:,} captions lose more than half of their letters to model.text_encoder.clean; "
                "clean: basic or none keeps letters of all scripts"
            )
        if cut:
            said.append(
                f"{cut:,} of {captions:,} captions ({cut / captions:.1%}) have more than model.text_encoder.max_tokens: "
                f"{max_tokens} and are cut; they lose {lost / cut:.1f} tokens on average"
            )
        if unknown:
            said.append(
                f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%}) are words that the tokenizer does not know and reads "
                "as one and the same"
            )
        return "; ".join(said) or None


def tokenize(tokenizer: Any, texts: list[str], max_tokens: int, counts: CaptionCounts | None = None) -> dict[str, Tensor]:
    """Return `input_ids` int64 and `attention_mask` bool, both (B, T), of captions, read as the tokenizer says.

    Args:
        tokenizer: one, or `SeveralTokenizers`, whose tokens come one after another.
        max_tokens: that are kept; see `HuggingFaceTextEncoder`. Several know their own.
        counts: is told how many were cut; of several, by the one that reads most.
    """
    if isinstance(tokenizer, SeveralTokenizers):
        most, _ = chief(tokenizer, max_tokens)
        each = [tokenize(one, texts, count, counts if one is most else None) for one, count in tokenizer.parts.values()]
        return {name: torch.cat([part[name] for part in each], 1) for name in ("input_ids", "attention_mask")}
    form, given, texts = format_of(tokenizer), texts, formatted(tokenizer, texts)
    tokens: Any = tokenizer(
        texts,
        padding="max_length",
        max_length=max_tokens + form.skipped,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if counts is not None:
        counts.add(tokenizer, given, texts, tokens)
    mask = tokens["attention_mask"].bool()
    return {"input_ids": tokens["input_ids"], "attention_mask": mask | form.attend_padding}


# What training reads of a caption. Captions that were written for training are long, and prompts are short.

Captions = Mapping[str, float | Mapping[str, Any]]  # `train_loader.captions`: column → its weight, or the arguments of a Wording

_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？।۔؟։።]+[」』”’]*|\n")
_COMMAS = {",": ", ", "，": "，", "、": "、", "،": "، "}  # between tags → as it is written again: the first that a text has
_SHORT = frozenset(["approx", "ca", "cf", "dr", "etc", "fig", "jr", "mr", "mrs", "ms", "prof", "sr", "st", "vs"])  # before a dot


@dataclass(frozen=True)
class Wording:
    """How often training takes a caption column, and what of its texts.

    Args:
        weight: of choosing this column.
        first_sentence: share of the draws in which a text ends after its first sentence.
        shuffle: whether tags, which commas divide, are in another order in every epoch.
        drop: share of the tags that is left out, others in every epoch; one tag always stays.
        keep: how many tags at the beginning are neither moved nor left out.

    Raises:
        ValueError: a value that is none of these.
    """

    weight: float = 1.0
    first_sentence: float = 0.0
    shuffle: bool = False
    drop: float = 0.0
    keep: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "first_sentence", "drop"):
            value, most = getattr(self, name), float("inf") if name == "weight" else 1.0
            if isinstance(value, bool) or not isinstance(value, int | float) or (name != "weight" and not 0 <= value <= most):
                raise ValueError(f"{name}: expected {'a number' if name == 'weight' else 'a share from 0 to 1'}, not {value!r}.")
        if not isinstance(self.shuffle, bool):
            raise ValueError(f"shuffle: expected true or false, not {self.shuffle!r}.")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 0:
            raise ValueError(f"keep: expected a number of tags, 0 or more, not {self.keep!r}.")

    @property
    def changes(self) -> dict[str, Any]:
        """What it does to texts, as a recipe has it; empty if it leaves them alone."""
        return {key: value for key, value in asdict(self).items() if value and key not in ("weight", "keep")}

    def of(self, text: str, *draw: int) -> str:
        """Return what is read of a text in a draw, which is named by numbers such as seed, epoch and sample."""
        if not self.changes:
            return text
        rng = np.random.default_rng([*draw, 1])  # without the 1 it is the draw of a column
        if rng.random() < self.first_sentence:
            text = first_sentence(text)
        comma = next((sign for sign in _COMMAS if sign in text), ",")
        tags = [tag.strip() for tag in text.split(comma) if tag.strip()]
        if not (self.shuffle or self.drop) or not tags:
            return text
        first, rest = tags[: self.keep], tags[self.keep :]
        luck = rng.random(len(rest))
        stays = luck >= self.drop
        if not first and not stays.any():
            stays[luck.argmax()] = True
        order = rng.permutation(len(rest)) if self.shuffle else range(len(rest))
        return _COMMAS[comma].join([*first, *(rest[index] for index in order if stays[index])])


def wordings(captions: Captions) -> dict[str, Wording]:
    """Return the wording of every column that a recipe names.

    Raises:
        ValueError: an unknown or impossible setting, by column.
    """
    found, known = {}, [field.name for field in fields(Wording)]
    for column, given in captions.items():
        settings = given if isinstance(given, Mapping) else {"weight": given}
        if unknown := sorted(settings.keys() - {*known}):
            raise ValueError(f"captions.{column}.{unknown[0]}: unknown; a caption column has {', '.join(known)}.")
        try:
            found[column] = Wording(**settings)
        except ValueError as error:
            raise ValueError(f"captions.{column}.{error}") from None
    return found


def not_to_be_stored(captions: Captions) -> str | None:
    """Say which captions are other ones in every epoch, so that stored embeddings cannot follow; None if all stay as they are."""
    for column, wording in wordings(captions).items():
        if wording.changes:
            told = ", ".join(f"{key}: {value}" for key, value in wording.changes.items()).replace("True", "true")
            return (
                f"captions.{column}: with {told} its texts are other ones in every epoch, which stored embeddings "
                f"(text_embedding) cannot follow; give its weight alone, {column}: {wording.weight:g}, or leave text_embedding "
                "out."
            )
    return None


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence or line; all of it, if it has no other."""
    for end in _END.finditer(text):
        head, rest = text[: end.end()].strip(), text[end.end() :].strip()
        if not rest:
            return text
        words = text[: end.start()].split()
        if not head or not words:
            continue
        if end[0][0] in ".!?…":  # a dot also ends an abbreviation
            word = words[-1].lstrip("\"'“‘([").lower()
            if rest[0].islower() or (end[0][0] == "." and (word in _SHORT or "." in word or (len(word) == 1 and word.isalpha()))):
                continue
        return head
    return text
