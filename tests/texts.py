"""Tiny text encoders of the real classes, as the systems that diffusers has a pipeline for read prompts."""

from typing import Any

from conftest import TINY_T5

from prx_composer.models import HuggingFaceTextEncoder
from prx_composer.models.several_encoders import SeveralTextEncoders

PROMPTS = ["a red circle", "a blue square on the left of a white background"]
LONGEST = 14
CLIP = dict(model_type="clip_text_model", hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
CLIP |= dict(max_position_embeddings=16, eos_token_id=1, bos_token_id=0, projection_dim=6)
GEMMA = dict(model_type="gemma2", hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
GEMMA |= dict(num_key_value_heads=1, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
INSTRUCTION = ["Enhance the prompt :", "User Prompt : "]  # of Sana's pipeline, which joins the lines
SYSTEM = "You draw what is asked"  # of Lumina2's, which adds the rest


def words(template: str, pad: str = "<pad>") -> Any:
    """Return a tokenizer of lower-cased words with begin and end tokens as the template says; it pads on the left."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    texts = [*PROMPTS, *INSTRUCTION, SYSTEM, "<Prompt Start>"]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    of = dict(
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad, model_input_names=["input_ids", "attention_mask"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **of)


def right(tokenizer: Any) -> Any:
    tokenizer.padding_side = "right"
    return tokenizer


def clip(**settings: Any) -> HuggingFaceTextEncoder:
    """Its padding is its end token, so that the vector must be taken at the first of them."""
    tokenizer = right(words("<s> $A </s>", pad="</s>"))
    return HuggingFaceTextEncoder(tokenizer, config=CLIP, max_tokens=LONGEST, attend_padding=True, **settings)


def t5(**settings: Any) -> HuggingFaceTextEncoder:
    return HuggingFaceTextEncoder(right(words("$A </s>")), config=TINY_T5, max_tokens=LONGEST + 2, **settings)


def gemma(**settings: Any) -> HuggingFaceTextEncoder:
    return HuggingFaceTextEncoder(words("<s> $A"), config=GEMMA, max_tokens=LONGEST, **settings)


def sd3(**settings: Any) -> SeveralTextEncoders:
    clips = {name: clip(layer=-2, pooled="projected", **settings) for name in ("clip_l", "clip_g")}
    return SeveralTextEncoders(clips | {"t5": t5(attend_padding=True, **settings)}, [["clip_l", "clip_g"], "t5"])


def flux(**settings: Any) -> SeveralTextEncoders:
    return SeveralTextEncoders({"clip": clip(pooled="end", **settings), "t5": t5(attend_padding=True, **settings)}, ["t5"])


def sana(**settings: Any) -> HuggingFaceTextEncoder:
    return gemma(clean="lower", instruction="\n".join(INSTRUCTION), keep_instruction=False, **settings)


def lumina2(**settings: Any) -> HuggingFaceTextEncoder:
    return gemma(instruction=f"{SYSTEM} <Prompt Start> ", **settings | ({} if settings.get("trainable") else {"layer": -2}))
