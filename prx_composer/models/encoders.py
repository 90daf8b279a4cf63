"""Encoders of transformers: of text, frozen or trained along, with their tokenizers, and of images, as frozen teachers."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prx_composer.models.autoencoder import Pixels
from prx_composer.models.caption_format import Cleaning, format_of, text_mask, with_format, without_instruction
from prx_composer.models.compiling import compile_layers
from prx_composer.models.huggingface import (
    Frozen,
    Pooled,
    UnknownConfiguration,
    attend_without_reading,
    check_clip,
    known_config,
    load_config,
    makes_no_storage,
    pretrained_encoder,
    random_config,
    random_encoder,
    says_how_to_get,
)
from prx_composer.models.layers import cached_tensor
from prx_composer.models.prompts import Reading, readings, tokenize

log = logging.getLogger(__name__)


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerBase:
    """Return a word-level tokenizer of these captions: lower-cased words and punctuation, then an end token.

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
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],  # as T5's: pipelines hand on what a tokenizer gives
    )


def load_tokenizer(name_or_folder: str, revision: str | None = None, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """Return a tokenizer by hub id or folder; one without a padding token pads with its end token."""
    with says_how_to_get(name_or_folder):
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_folder, revision=revision, local_files_only=local_files_only, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class HuggingFaceTextEncoder(nn.Module):
    """Turns captions into embeddings (B, K, C), and a pooled vector (B, P) of each if that is asked for.

    Args:
        tokenizer: from `load_tokenizer` or `train_tokenizer`.
        pretrained: hub id or folder of the encoder.
        config: transformers configuration of an encoder with random weights instead: `model_type` and its arguments.
        max_tokens: captions are cut and padded to this many tokens, K.
        trainable: train it with the backbone (its weights are then in checkpoints); else it is frozen and left out.
        dtype: storage dtype of a frozen encoder.
        revision: of `pretrained`.
        clean: what captions and prompts go through first: nothing, "prx" (the rules of the released PRXPipeline: lower case, no
            brackets, long numbers, addresses …), "basic" (PRXPixelPipeline's: HTML entities and broken encodings) or "lower"
            (Sana's and PixArt's: lower case).
        layer: the hidden states that are the embeddings, of all that the network has: −2, before its last layer, as SD3 takes
            CLIP's and Lumina2 Gemma's. By default what the network gives, after its last norm.
        pooled: give a vector of the whole caption too: the mean of its tokens; or of CLIP that at its end token, as FLUX ("end"),
            or the projection of that, as SD3 ("projected").
        instruction: text that stands before every caption but the empty one, as Sana's and Lumina2's.
        keep_instruction: whether its tokens are among the `max_tokens`, as Lumina2's. If not, all of it is read, and its first
            and its last token are kept, as Sana's (arXiv:2410.10629, section 3).
        attend_padding: read padding as text, as SD3 and FLUX do, instead of masking it.
        compile: `torch.compile` the layers of a frozen encoder, as a few graphs for captions of all lengths.

    Attributes:
        pooled_size: P; 0 without.

    Raises:
        ValueError: settings that don't go together; an embedding table smaller than the vocabulary; too many tokens for CLIP.
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
        layer: int | None = None,
        pooled: Pooled | None = None,
        instruction: str = "",
        keep_instruction: bool = True,
        attend_padding: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        if (pretrained is None) == (config is None):
            raise ValueError("text_encoder needs either `pretrained` (hub id or folder) or `config` (random weights).")
        if trainable and layer is not None and pooled not in ("end", "projected"):
            raise ValueError(f"layer: {layer} leaves out layers that trainable: true would train; leave one of the two out.")
        if trainable and compile:
            raise ValueError("compile: true is for a frozen encoder; leave it out, or trainable.")
        self.tokenizer = with_format(tokenizer, clean, instruction, keep_instruction, attend_padding)
        self.layer, self.pooled, self._skipped = layer, pooled, format_of(self.tokenizer).skipped
        self.max_tokens, self.trainable, self.compiled = max_tokens, trainable, compile
        self.null_input_ids: Tensor
        self.null_attention_mask: Tensor
        if pretrained is not None:
            encoder = pretrained_encoder(pretrained, revision, pooled)
        else:
            encoder = random_encoder(random_config(config or {}, vocab_size=len(tokenizer)), pooled)
        attend_without_reading(encoder)
        vocabulary = encoder.get_input_embeddings().num_embeddings  # pyright: ignore[reportCallIssue]
        if vocabulary < len(tokenizer):
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens but the text encoder only {vocabulary} embeddings; "
                "set model.text_encoder.tokenizer to the encoder's own, or leave vocab_size out of its config."
            )
        hf_config: Any = getattr(encoder.config, "encoder", encoder.config)  # T5Gemma's configuration holds two
        check_clip(hf_config, tokenizer, max_tokens + self._skipped, pooled)
        self.hidden_size = int(hf_config.hidden_size)
        self.pooled_size = 0 if pooled is None else int(hf_config.projection_dim) if pooled == "projected" else self.hidden_size
        if trainable:
            self.encoder = encoder
        else:
            self._frozen = Frozen(encoder, getattr(torch, dtype))
            if compile and not makes_no_storage():
                compile_layers(encoder)
        self._cuts: bool | None = None  # whether captions may be cut to their valid tokens, once it has been tried
        null = self.tokenize([""])
        self._null_tokens = 0 if makes_no_storage() else int(null["attention_mask"].sum())
        for part, values in null.items():
            self.register_buffer(f"null_{part}", values, persistent=False)

    @property
    def network(self) -> nn.Module:
        """The module of transformers, trained or frozen."""
        return self.encoder if self.trainable else self._frozen.module

    @property
    def how(self) -> dict[str, Any]:
        """What its embeddings depend on beside weights, tokenizer and `max_tokens`, but for what is at its default."""
        told = {"layer": self.layer, "pooled": self.pooled} | vars(format_of(self.tokenizer))
        return {key: value for key, value in told.items() if value not in (None, "none", "", 0, False)}

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` int64 and `attention_mask` bool, both (B, T): `max_tokens`, and an instruction that isn't kept."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def readings(self, texts: list[str]) -> list[Reading]:
        """Return what `tokenize` leaves of each text."""
        return readings(self.tokenizer, texts, self.max_tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        order: Tensor | None = None,
        groups: Sequence[tuple[int, int]] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return embeddings (B, K, hidden_size), fp32 outside of autocast, of token ids and a mask, both (B, T).

        With `pooled`, return them and the pooled vectors (B, pooled_size).

        Args:
            order: int64 (B,): the captions, such that members of a group stand together. A frozen encoder then encodes each group
                by itself, without the padding that all of it has; places of padding are zero. Values differ from those of all
                captions together by rounding. One that is trained encodes them together.
            groups: of each, how many captions it has, and how many tokens at most, which the host knows.
        """
        if self.trainable:
            made = self._read(self.encoder, input_ids, attention_mask)
        else:
            with torch.no_grad():
                self._frozen.on(input_ids.device)
                made = self._read_frozen(input_ids, attention_mask, order, groups)
        embedding, pooled = without_instruction(made[0], self._skipped), made[1]
        if self.pooled == "mean":
            mask = text_mask(self.tokenizer, attention_mask)
            pooled = (embedding * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return embedding if pooled is None else (embedding, pooled)

    def _read(self, network: Any, input_ids: Tensor, attention_mask: Tensor, **places: Any) -> tuple[Tensor, Tensor | None]:
        """Return embeddings (B, T, C) and what the network itself pools (B, P), if that is asked for."""
        options = places | ({} if self.layer is None else {"output_hidden_states": True})
        output = network(input_ids=input_ids, attention_mask=attention_mask.long(), **options)
        embedding = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        pooled = {"end": "pooler_output", "projected": "text_embeds"}.get(self.pooled or "")
        return embedding, None if pooled is None else output[pooled]

    def _read_frozen(
        self, input_ids: Tensor, attention_mask: Tensor, order: Tensor | None, groups: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None]:
        if order is None or not self._may_cut(input_ids[order[:1]], attention_mask[order[:1]]):
            return self._encode(input_ids, attention_mask, input_ids.shape[1])
        embedding = torch.zeros(*input_ids.shape, self.hidden_size, device=input_ids.device)
        pooled = torch.zeros(len(input_ids), self.pooled_size, device=input_ids.device)
        for members, (_, tokens) in zip(order.split([count for count, _ in groups]), groups, strict=True):
            found, own = self._encode(input_ids[members], attention_mask[members], tokens)
            embedding[members, self._kept(input_ids.shape[1], found.shape[1])] = found
            if own is not None:
                pooled[members] = own
        return embedding.masked_fill(~attention_mask[..., None], 0), pooled if self.pooled else None

    def _kept(self, of: int, tokens: int) -> slice:
        """Return where valid tokens stand."""
        if tokens >= of:
            return slice(None)
        return slice(of - tokens, of) if self.tokenizer.padding_side == "left" else slice(tokens)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return what the frozen encoder makes of captions without their padding beyond so many tokens."""
        width = input_ids.shape[1]
        kept = self._kept(width, max(tokens, self._null_tokens))  # the empty caption may take a caption's place
        encoder, places = self._frozen.module, dict[str, Any]()
        if kept.start and "position_ids" in inspect.signature(encoder.forward).parameters:  # tokens stay in their places
            places["position_ids"] = torch.arange(kept.start, width, device=input_ids.device)[None]
        embedding, pooled = self._read(encoder, input_ids[:, kept], attention_mask[:, kept], **places)
        return embedding.float(), None if pooled is None else pooled.float()

    def _may_cut(self, input_ids: Tensor, attention_mask: Tensor) -> bool:
        """Return whether valid tokens are the same without any padding, which is tried once, on one caption (1, T)."""
        if self._cuts is None:
            tokens = max(int(attention_mask.sum()), self._null_tokens, 1)
            whole = self._encode(input_ids, attention_mask, input_ids.shape[1])[0][:, self._kept(input_ids.shape[1], tokens)]
            cut = self._encode(input_ids, attention_mask, tokens)[0]
            rounds = torch.is_autocast_enabled(input_ids.device.type) or self._frozen.module.dtype != torch.float32
            self._cuts = bool((cut - whole).norm() <= (0.1 if rounds else 0.01) * whole.norm())
            if not self._cuts:
                log.warning("model.text_encoder: what it makes of a caption depends on padding, so that all of it is encoded.")
        return self._cuts


# ------------------------------------------------------------------------------------------------------- images


_VISION_CLASSES = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}  # image towers of models that also read text
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TeacherSpec:
    """Says which vision encoder a teacher is.

    Args:
        pretrained: hub id or folder.
        config: transformers configuration of one with random weights instead: `model_type` and its settings.
        revision: of `pretrained`.
        dtype: storage dtype of the weights; bfloat16 halves the memory and, without autocast, the time.
        compile: `torch.compile` its layers, with and without gradients as one graph for all of them and for images of all sizes.

    Raises:
        ValueError: neither or both of `pretrained` and `config`.
    """

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("a teacher needs either `pretrained` (hub id or folder) or `config` (random weights).")


@cached_tensor
def _resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Return what torch's antialiased bicubic interpolation does to one side, as a matrix (target, source)."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(source)[None, None]
        return F.interpolate(identity, (target, source), mode="bicubic", antialias=True)[0, 0].to(device)


def resize_antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, height, width), bicubic and antialiased; return the same tensor if nothing changes.

    It is two matrix products, since the backward pass of `interpolate` adds up in no fixed order on a GPU.
    """
    if image.shape[-2:] == (height, width):
        return image
    rows = _resize_matrix(image.shape[-2], height, image.device)
    columns = _resize_matrix(image.shape[-1], width, image.device)
    with torch.autocast(image.device.type, enabled=False):
        return rows @ image.float() @ columns.mT


class VisionEncoder:
    """Patch features of a frozen vision encoder (DINOv2, DINOv3, SigLIP, CLIP, ViT …). Not a module: no checkpoint has it.

    On the meta device it is made from its configuration, if that is known here: nothing is loaded or downloaded.

    Args:
        spec: which one, or its hub id or folder.

    Raises:
        ValueError: a configuration without patches.
        OSError: weights that cannot be had (missing, gated, offline).
    """

    def __init__(self, spec: TeacherSpec | str):
        spec = TeacherSpec(pretrained=spec) if isinstance(spec, str) else spec
        on_meta = makes_no_storage()
        if on_meta and spec.pretrained is not None:
            known = known_config(spec.pretrained, spec.revision)
            if known is None:
                raise UnknownConfiguration(spec.pretrained)
            spec = TeacherSpec(config=known, dtype=spec.dtype)
        if spec.pretrained is not None:
            self.name = spec.pretrained
            with says_how_to_get(spec.pretrained):
                config = load_config(spec.pretrained, spec.revision)
                cls = getattr(transformers, _VISION_CLASSES.get(config.model_type, "AutoModel"))
                module = cls.from_pretrained(
                    spec.pretrained, revision=spec.revision, dtype=torch.float32, trust_remote_code=False
                )
                processor = _image_processor(spec.pretrained, spec.revision)
        else:
            config, processor = random_config(spec.config or {}), {}
            if on_meta:
                config = getattr(config, "vision_config", config)  # of a model that also reads text
            module: Any = AutoModel.from_config(config, trust_remote_code=False)
            self.name = f"random {config.model_type}"
        patch_size = getattr(module.config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ValueError(f"{self.name} is no vision transformer with square patches (patch_size is {patch_size}).")
        self.patch_size = patch_size
        self.hidden_size = int(module.config.hidden_size)
        self._dtype = getattr(torch, spec.dtype)
        self._frozen = Frozen(module, self._dtype)
        if spec.compile and not on_meta:
            compile_layers(module)
        self._mean = torch.tensor(processor.get("image_mean") or IMAGENET_MEAN)[:, None, None]
        self._std = torch.tensor(processor.get("image_std") or IMAGENET_STD)[:, None, None]
        takes = inspect.signature(module.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    @property
    def module(self) -> nn.Module:
        """The module of transformers."""
        return self._frozen.module

    def __call__(self, image: Tensor) -> Tensor:
        """Return features of the patches, without class and register tokens; gradients flow to the image.

        Args:
            image: (B, 3, H, W) in [−1, 1] (values outside are kept), H and W divisible by `patch_size`.

        Returns:
            (B, H/p, W/p, hidden_size), fp32.
        """
        mean, std = self._mean.to(image.device), self._std.to(image.device)
        rows, columns = image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size
        normalised = ((image.float() + 1) / 2 - mean) / std
        tokens = self._frozen.on(image.device)(pixel_values=normalised.to(self._dtype), **self._options).last_hidden_state
        return tokens[:, -rows * columns :].float().unflatten(1, (rows, columns))  # what comes before are prefix tokens


def _image_processor(name: str, revision: str | None) -> dict[str, Any]:
    """Return the settings that images are prepared with; none if a folder holds weights alone."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        return BaseImageProcessor.get_image_processor_dict(name, revision=revision)[0]
    except OSError:
        return {}


@torch.no_grad()
def teacher_features(teacher: VisionEncoder, batch: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Return features (B, rows · columns, C) of a batch's images, resized so that its patches are the backbone's tokens."""
    image = resize_antialiased(Pixels().encode(batch["image"]), rows * teacher.patch_size, columns * teacher.patch_size)
    return teacher(image).flatten(1, 2)
