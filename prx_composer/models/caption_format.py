"""How a tokenizer reads captions: cleaned, behind an instruction, with padding that is masked or read as text.

A tokenizer carries this, so that whoever is given it to make tokens makes the same: loaders and their workers, `prx encode`, `prx
data stats`, sampling. Several tokenizers are one here, for as many text encoders.

Shape suffixes: B batch, T tokens that are read, K tokens that are kept for the backbone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Cleaning = Literal["none", "basic", "prx", "lower"]


def cleaner(cleaning: Cleaning) -> Callable[[str], str]:
    """Return what a caption goes through: nothing, the rules of a PRX pipeline ("basic", "prx"), or lower case ("lower").

    Raises:
        ValueError: no such cleaning, or ftfy, which PRX's need, is not installed.
    """
    if cleaning not in ("none", "basic", "prx", "lower"):
        raise ValueError(f"clean must be none, basic, prx or lower, not {cleaning!r}.")
    if cleaning == "none":
        return lambda text: text
    if cleaning == "lower":
        return lambda text: text.lower().strip()
    try:
        import ftfy  # noqa: F401 (diffusers imports it if it is there, and fails at the first text if it isn't)
    except ImportError as error:
        raise ValueError(f"clean: {cleaning} needs ftfy, which is not installed: `pip install ftfy`.") from error
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

    return TextPreprocessor().basic_clean if cleaning == "basic" else TextPreprocessor().clean_text


@dataclass(frozen=True)
class CaptionFormat:
    """How captions become tokens.

    Args:
        cleaning: of the caption.
        instruction: text that stands before every caption but the empty one.
        skipped: how many of the instruction's tokens are read and not kept: those after the first. `max_tokens` are kept.
        attend_padding: whether padding is text like any other.
    """

    cleaning: Cleaning = "none"
    instruction: str = ""
    skipped: int = 0
    attend_padding: bool = False

    def of(self, text: str, clean: Callable[[str], str]) -> str:
        """Return what is read of a caption."""
        text = clean(text)
        return self.instruction + text if text else text


def format_of(tokenizer: object) -> CaptionFormat:
    return getattr(tokenizer, "caption_format", CaptionFormat())


def cleaning_of(tokenizer: object) -> Cleaning:
    return format_of(tokenizer).cleaning


FORMAT = ("clean", "instruction", "keep_instruction", "attend_padding")  # arguments of an encoder that `with_format` takes


def with_format(
    tokenizer: Any, clean: Cleaning = "none", instruction: str = "", keep_instruction: bool = True, attend_padding: bool = False
) -> Any:
    """Return the tokenizer, or a shallow copy of it, that reads captions so; with an instruction, it pads on the right.

    Args:
        clean, instruction, keep_instruction, attend_padding: see `HuggingFaceTextEncoder`.

    Raises:
        ValueError: as `cleaner`; an instruction that is not kept, beside padding that is read.
    """
    cleaner(clean)
    if not keep_instruction and (attend_padding or not instruction):
        raise ValueError("keep_instruction: false is for an instruction, whose captions have masked padding.")
    skipped = 0 if keep_instruction else max(len(tokenizer.encode(instruction)) - 2, 0)
    wanted = CaptionFormat(clean, instruction, skipped, attend_padding)
    if format_of(tokenizer) == wanted:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.caption_format = wanted
    if instruction:
        tokenizer.padding_side = "right"
    return tokenizer


def formatted(tokenizer: object, texts: Sequence[str]) -> list[str]:
    """Return the texts as this tokenizer is to read them."""
    how = format_of(tokenizer)
    clean = cleaner(how.cleaning)
    return [how.of(text, clean) for text in texts]


def without_instruction(tokens: Tensor, skipped: int) -> Tensor:
    """Return the tokens (B, K, …) of (B, T, …) that the backbone is given: without an instruction's, but its first and last."""
    return torch.cat([tokens[:, :1], tokens[:, skipped + 1 :]], 1) if skipped else tokens


class SeveralTokenizers:
    """The tokenizers of several text encoders, as one.

    Args:
        parts: by name, each with its format and with how many tokens it keeps.
        rows: the encoders whose tokens stand one after another; those of one row share their places.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, int]], rows: Sequence[Sequence[str]]):
        self.parts, self.rows = dict(parts), tuple(map(tuple, rows))

    def __len__(self) -> int:
        return max(len(tokenizer) for tokenizer, _ in self.parts.values())

    def lengths(self) -> list[int]:
        """Return how many tokens each reads."""
        return [format_of(tokenizer).skipped + max_tokens for tokenizer, max_tokens in self.parts.values()]

    def save_pretrained(self, folder: str) -> None:
        """Write each to a folder of its name."""
        for name, (tokenizer, _) in self.parts.items():
            tokenizer.save_pretrained(f"{folder}/{name}")


def chief(tokenizer: Any, max_tokens: int) -> tuple[Any, int]:
    """Return the tokenizer that reads most of a caption, and how many tokens it keeps."""
    if not isinstance(tokenizer, SeveralTokenizers):
        return tokenizer, max_tokens
    return max(tokenizer.parts.values(), key=lambda part: part[1])


def text_mask(tokenizer: Any, mask_BT: Tensor) -> Tensor:
    """Return which of the tokens that the backbone is given are text, bool (B, K), by which of those that are read are."""
    if not isinstance(tokenizer, SeveralTokenizers):
        return without_instruction(mask_BT, format_of(tokenizer).skipped)
    masks = zip(tokenizer.parts.items(), mask_BT.split(tokenizer.lengths(), 1), strict=True)
    own = {name: without_instruction(mask, format_of(part).skipped) for (name, (part, _)), mask in masks}
    return torch.cat([torch.stack([own[name] for name in row]).any(0) for row in tokenizer.rows], 1)
