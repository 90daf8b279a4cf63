"""Tiny models that write text about images: real classes with random weights, their processors and tokenizers, in a folder."""

from pathlib import Path
from typing import Any

SAID = "a the red green blue yellow big small circle square triangle on of with under above grey dark light and shape"
WORDS = SAID.split()
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
TEXT: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def write_llava(folder: Path, chat: bool = True, seed: int = 0) -> str:
    """One that answers, with a chat template (LLaVA on Llama)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "</s>", "<s>", "<unk>", "<image>"]
    vocabulary = {word: number for number, word in enumerate([*special, ":", "user", "assistant", "Describe", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    template = {"chat_template": TEMPLATE} if chat else {}
    processor = LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **template
    )
    config = LlavaConfig(
        CLIPVisionConfig(**VISION, initializer_factor=5.0),
        LlamaConfig(
            **TEXT,
            vocab_size=len(vocabulary),
            num_key_value_heads=2,
            initializer_range=0.5,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
        image_token_index=vocabulary["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return _save(LlavaForConditionalGeneration, config, processor, folder, seed)


def write_blip(folder: Path, seed: int = 0) -> str:
    """One that only captions, without a chat template (BLIP)."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder.mkdir(parents=True, exist_ok=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(names))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    processor = BlipProcessor(BlipImageProcessor(size={"height": 8, "width": 8}), tokenizer)
    ids = dict(vocab_size=len(names), bos_token_id=5, sep_token_id=3, eos_token_id=3, pad_token_id=0)
    config = BlipConfig(
        text_config=TEXT | ids | dict(encoder_hidden_size=16, initializer_range=0.5, max_position_embeddings=64),
        vision_config=VISION | dict(initializer_range=0.5),
        image_text_hidden_size=16,
        projection_dim=16,
    )
    return _save(BlipForConditionalGeneration, config, processor, folder, seed)


def _save(kind: Any, config: Any, processor: Any, folder: Path, seed: int) -> str:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
