"""Text encoders: any Hugging Face encoder, frozen or trained along, with its tokenizer."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prx_composer.models.huggingface import Frozen, attend_without_reading, load_config, random_config, says_how_to_get
from prx_composer.models.prompts import CaptionCounts, Cleaning, Reading, cleaned, readings, with_cleaning

log = logging.getLogger(__name__)

# Encoder-only classes, so that a decoder's weights are never loaded only to be thrown away.
_ENCODER_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "t5gemma": "T5GemmaEncoderModel", "clip": "CLIPTextModel"}


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerBase:
    """A word-level tokenizer of these captions: lower-cased words and punctuation, then an end token.

    The end token makes the empty caption one real token long, which is what the unconditional branch attends to.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def load_tokenizer(name_or_folder: str, revision: str | None = None, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer by hub id or folder; one without a padding token pads with its end token."""
    with says_how_to_get(name_or_folder):
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_folder, revision=revision, local_files_only=local_files_only, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _text_tower(model: nn.Module) -> nn.Module:
    """The part of a multimodal or encoder-decoder model that reads text."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    if hasattr(model, "vision_model") or hasattr(model, "visual"):
        return getattr(model, "language_model", None) or model.text_model  # pyright: ignore[reportReturnType]
    return model


def _build_encoder(pretrained: str | None, config: dict[str, Any] | None, revision: str | None, vocab_size: int) -> nn.Module:
    if pretrained is not None:
        with says_how_to_get(pretrained):
            hf_config = load_config(pretrained, revision)
            cls = getattr(transformers, _ENCODER_CLASSES.get(hf_config.model_type, ""), AutoModel)
            extra: dict[str, Any] = {"trust_remote_code": False}
            if hf_config.model_type == "t5gemma":  # diffusers' own PRX folders have the inner encoder's names
                extra |= {"is_encoder_decoder": False, "key_mapping": {r"^(embed_tokens|layers|norm)\.": r"encoder.\1."}}
            return _text_tower(cls.from_pretrained(pretrained, revision=revision, dtype=torch.float32, **extra))
    return random_encoder(random_config(config or {}, vocab_size=vocab_size))


def random_encoder(hf_config: Any, **options: Any) -> nn.Module:
    """The part of a transformers network that reads text, with random weights.

    Args:
        hf_config: transformers' configuration of the whole network.
        options: of its construction, such as `attn_implementation`.
    """
    cls = getattr(transformers, _ENCODER_CLASSES.get(hf_config.model_type, ""), None)
    if hf_config.model_type == "t5gemma":
        hf_config.is_encoder_decoder = False
    if cls is None:
        return _text_tower(AutoModel.from_config(hf_config, trust_remote_code=False, **options))
    if not isinstance(hf_config, cls.config_class):  # of a network that also sees
        hf_config = hf_config.get_text_config()
    return _text_tower(cls._from_config(hf_config, **options) if options else cls(hf_config))


class HuggingFaceTextEncoder(nn.Module):
    """Turns captions into embeddings (B, T, C) and a mask (B, T).

    Args:
        tokenizer: from `load_tokenizer` or `train_tokenizer`.
        pretrained: hub id or folder of the encoder.
        config: transformers configuration of an encoder with random weights instead: `model_type` and its arguments.
        max_tokens: captions are cut and padded to this many tokens.
        trainable: train it with the backbone (its weights are then in checkpoints); else it is frozen and left out.
        dtype: storage dtype of a frozen encoder.
        revision: of `pretrained`.
        clean: what captions and prompts go through first: nothing, "prx" (the rules of the released PRXPipeline: lower case, no
            brackets, long numbers, addresses …) or "basic" (PRXPixelPipeline's: HTML entities and broken encodings).

    Raises:
        ValueError: neither or both of `pretrained` and `config`; an embedding table smaller than the vocabulary.
        OSError: weights that cannot be had (missing, gated, offline).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        max_tokens: int = 256,
        trainable: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
        clean: Cleaning = "none",
    ):
        super().__init__()
        if (pretrained is None) == (config is None):
            raise ValueError("text_encoder needs either `pretrained` (hub id or folder) or `config` (random weights).")
        self.tokenizer = with_cleaning(tokenizer, clean)
        self.max_tokens = max_tokens
        self.trainable = trainable
        self.null_input_ids: Tensor
        self.null_attention_mask: Tensor
        encoder = _build_encoder(pretrained, config, revision, len(tokenizer))
        attend_without_reading(encoder)
        vocabulary = encoder.get_input_embeddings().num_embeddings  # pyright: ignore[reportCallIssue]
        if vocabulary < len(tokenizer):
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens but the text encoder only {vocabulary} embeddings; "
                "set model.text_encoder.tokenizer to the encoder's own, or leave vocab_size out of its config."
            )
        hf_config: Any = encoder.config
        hf_config = getattr(hf_config, "encoder", hf_config)  # T5Gemma's configuration holds two
        self.hidden_size = int(hf_config.hidden_size)
        if trainable:
            self.encoder = encoder
        else:
            self._frozen = Frozen(encoder, getattr(torch, dtype))
        null = self.tokenize([""])
        self.register_buffer("null_input_ids", null["input_ids"], persistent=False)
        self.register_buffer("null_attention_mask", null["attention_mask"], persistent=False)

    @property
    def network(self) -> nn.Module:
        """transformers' module, trained or frozen."""
        return self.encoder if self.trainable else self._frozen.module

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """`input_ids` int64 and `attention_mask` bool, both (B, max_tokens)."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def readings(self, texts: list[str]) -> list[Reading]:
        """What `tokenize` leaves of each text."""
        return readings(self.tokenizer, texts, self.max_tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T), (B, T) → embeddings (B, T, hidden_size), fp32 outside of autocast."""
        if self.trainable:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        with torch.no_grad():
            encoder = self._frozen.on(input_ids.device)
            return encoder(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state.float()

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(str(folder))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, counts: CaptionCounts | None = None
) -> dict[str, Tensor]:
    """Captions → `input_ids` int64 (B, max_tokens) and `attention_mask` bool (B, max_tokens); cleaned, if the tokenizer does.

    Args:
        counts: told how many were cut.
    """
    texts = cleaned(tokenizer, texts)
    tokens: Any = tokenizer(
        texts,
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if counts is not None:
        counts.add(tokenizer, texts, tokens)
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"].bool()}
