"""Class labels in the place of text, for classes of diffusers that take nothing else, such as DiT."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prx_composer.models.prompts import Reading, readings, tokenize

NO_LABEL = -1.0


def train_label_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerBase:
    """Return a tokenizer that makes one token of each of these captions, lower-cased, and none of the empty one."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "<unk>"]  # classes come after them
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right")


class ClassLabels(nn.Module):
    """A text encoder whose embedding of a caption is the number of its class, fp32 (B, 1, 1), and −1 without one.

    Every caption is a class, exactly as it is written but for upper and lower case; the empty one and those that training never
    saw are none. The tokenizer that is trained `by: caption` knows them.

    Args:
        tokenizer: of one token per caption.

    Raises:
        ValueError: a tokenizer that cuts captions into words.
    """

    hidden_size = 1
    max_tokens = 1
    trainable = False
    null_input_ids: Tensor
    null_attention_mask: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        special = getattr(tokenizer, "all_special_ids", None)  # None: a plan's stand-in
        if special is not None and len(special) != 2:
            raise ValueError("text_encoder labels needs a token per caption; set tokenizer: {train: true, by: caption}.")
        self.tokenizer, self.first = tokenizer, 0 if special is None else max(special) + 1
        self.num_labels = 0 if special is None else len(tokenizer) - self.first
        for name, value in self.tokenize([""]).items():
            self.register_buffer({"input_ids": "null_input_ids"}.get(name, "null_attention_mask"), value, persistent=False)

    @property
    def network(self) -> nn.Module:
        """Itself, which has no weights."""
        return self

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` int64 and `attention_mask` bool, both (B, 1)."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def readings(self, texts: list[str]) -> list[Reading]:
        """Return what `tokenize` leaves of each text."""
        return readings(self.tokenizer, texts, self.max_tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the labels of token ids and a mask, both (B, 1)."""
        label = (input_ids - self.first).float()
        return torch.where(attention_mask.bool() & (label >= 0), label, NO_LABEL)[..., None]
