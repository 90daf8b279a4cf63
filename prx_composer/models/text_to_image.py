"""The ComposerModel: encode → noise → denoise → FlowOutput, and the losses, metrics and images that follow from it."""

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from prx_composer.models.autoencoder import Autoencoder, Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.caption_format import chief, text_mask
from prx_composer.models.encoders import HuggingFaceTextEncoder
from prx_composer.models.flow import (
    NONE_POOLED,
    AuxiliaryLosses,
    ClassifierFreeGuidance,
    FlowOutput,
    Guidance,
    SamplingStep,
    TextConditioning,
    check_seeds,
    initial_noise,
)
from prx_composer.models.huggingface import returned_afterwards
from prx_composer.models.processes import FlowMatching, Process
from prx_composer.models.prompts import what_is_lost
from prx_composer.models.randomness import RandomStreams, seeded_generator
from prx_composer.models.routing import Route, counted_pixels

log = logging.getLogger(__name__)

VALIDATION_TIMESTEPS = tuple((stratum + 0.5) / 8 for stratum in range(8))
"""Where the validation loss is taken, as shares of noise: the middles of eight equal parts of [0, 1]."""


@functools.cache  # so that it is said once
def _warn_of_guidance() -> None:
    log.warning(
        "Guidance leads away from what the model draws without a caption, and with model.caption_dropout: 0 it has never learnt "
        "that. Draw with a guidance scale of 1, or train with caption_dropout: 0.1."
    )


class ValidationLoss(Metric):
    """The mean of `TextToImage.eval_forward`'s errors over samples: at one of the timesteps, or over all of them.

    Sums are of fp64, of every `counted` sample once, so that neither batches nor ranks move them.
    """

    full_state_update = False

    def __init__(self, index: int | None = None):
        super().__init__()
        self.index = index
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, errors: Tensor, counted: Tensor | None = None) -> None:
        own = errors.double().mean(1) if self.index is None else errors[:, self.index].double()
        counted = torch.ones_like(own, dtype=torch.bool) if counted is None else counted
        self.total += own.where(counted, 0).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


def check_text(backbone: Any, text_encoder: Any) -> None:
    """Raise ValueError unless the backbone takes what the text encoder makes."""
    if backbone.context_in_dim != text_encoder.hidden_size:
        named = getattr(backbone, "context_argument", "context_in_dim")
        if named is None:
            raise ValueError("model.backbone takes class labels, not text; set model.text_encoder.name: labels.")
        raise ValueError(
            f"model.backbone.{named} is {backbone.context_in_dim}, but the text encoder's embeddings are "
            f"{text_encoder.hidden_size} wide; set {named}: {text_encoder.hidden_size}."
        )
    _check_pooled(backbone, getattr(text_encoder, "pooled_size", 0))
    if (labels := getattr(text_encoder, "num_labels", 0)) > getattr(backbone, "num_labels", labels):
        raise ValueError(
            f"model.backbone has {getattr(backbone, 'num_labels', 0)} classes, and the captions are {labels}; set "
            f"num_embeds_ada_norm: {labels}."
        )


def _check_pooled(backbone: Any, given: int) -> None:
    taken, named = getattr(backbone, "pooled_dim", 0), getattr(backbone, "pooled_argument", None)
    if given and not taken:
        raise ValueError("model.text_encoder gives a pooled vector, which this backbone doesn't take; leave its `pooled` out.")
    if given != taken:
        told = f"gives one {given} wide; set {named}: {given}" if given else "gives none; set its pooled, such as to mean"
        raise ValueError(f"model.backbone takes a pooled vector ({named}: {taken}), and model.text_encoder {told}.")


class TextToImage(ComposerModel):
    """A text-to-image model: its training step, its evaluation and how it draws.

    Batches are mappings with `image` uint8 (B, 3, H, W), `input_ids` int64 and `attention_mask` bool (B, T); they are
    never written to. With `text_embedding` they bring what the (frozen) text encoder would make of their captions, and it isn't
    asked: (B, K, C), or (V, C) of the V valid tokens with `text_position` int64 (V,), their places in the flattened (B, K), and
    `text_pooled` (B, P) if it pools. `attention_mask` (B, K) is of those tokens then.
    With `text_order` int64 (B,) and `text_groups` captions are encoded in groups; see `HuggingFaceTextEncoder.forward`.
    With `latent` (B, C, h, w) they bring what the autoencoder would make of `image`, which may then be missing. With `counted`
    bool (B,), evaluation measures those samples alone.

    Args:
        backbone: the network that is trained.
        text_encoder: captions → embeddings.
        flow: the process that is learned; flow matching by default.
        autoencoder: pixels (the default) or a frozen latent space.
        caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
        seed: of every random draw of training.
        compile: `torch.compile` the backbone as one graph (true), or each block ("blocks"), which FSDP2 needs: its hooks stand
            between them.
        activation_memory_budget: of a compiled graph: the part of its activations that it keeps for the backward pass, 1 = all;
            the others are computed again. For what doesn't fit otherwise: it costs time.
        attention: "sdpa", PyTorch's kernels with a mask of the valid text; "cudnn", the same, cuDNN's first; or "flex",
            FlexAttention, in compiled graphs. Both others are of GPUs; on the CPU they are "sdpa".

    Seams, filled by algorithms at Event.INIT: `auxiliary_losses`, `training_flow`, `guidance`, `sampling_weights`, and the
    backbone's `router`, `taps` and `conditioners`.

    Raises:
        ValueError: parts that don't fit together, named by YAML path.
    """

    def __init__(
        self,
        backbone: PRXBackbone,
        text_encoder: HuggingFaceTextEncoder,
        flow: Process | None = None,
        autoencoder: Autoencoder | None = None,
        caption_dropout: float = 0.1,
        seed: int = 0,
        compile: bool | Literal["blocks"] = False,
        activation_memory_budget: float = 1.0,
        attention: Literal["sdpa", "cudnn", "flex"] = "sdpa",
    ):
        super().__init__()
        self.autoencoder = autoencoder or Pixels()
        check_text(backbone, text_encoder)
        if backbone.in_channels != self.autoencoder.channels:
            raise ValueError(
                f"model.backbone.in_channels is {backbone.in_channels}, but model.autoencoder gives "
                f"{self.autoencoder.channels} channels; set in_channels: {self.autoencoder.channels}."
            )
        outputs, channels = getattr(backbone, "out_channels", backbone.in_channels), backbone.in_channels
        if outputs not in (channels, 2 * channels):
            raise ValueError(
                f"model.backbone.out_channels is {outputs}; a prediction has {channels}, and as many variances may follow: "
                f"set out_channels: {channels} or {2 * channels}."
            )
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"model.caption_dropout must lie in [0, 1), not {caption_dropout}.")
        self.backbone = backbone
        self.text_encoder = text_encoder
        self.flow: Process = flow or FlowMatching()
        self.training_flow: Process | None = None  # of which the timesteps of training are, if not of `flow`
        self.caption_dropout = caption_dropout
        self.random = RandomStreams(seed)
        self.auxiliary_losses = AuxiliaryLosses()
        self.guidance: Guidance = ClassifierFreeGuidance()
        self.clean_prompt: Callable[[str], str] = str  # what is done to prompts, and not to captions, before they are read
        self.knows_empty_caption = caption_dropout > 0  # set to true for weights of another model, which may have learnt it
        self.sampling_weights: Callable[[], AbstractContextManager[None]] = nullcontext
        self._encodes_groups = isinstance(text_encoder, HuggingFaceTextEncoder)
        self._null: TextConditioning | None = None
        self._told: set[str] = set()
        self._eval_metrics: dict[str, Metric] = {"validation_loss": ValidationLoss()}
        self._eval_metrics |= {f"validation_loss_t{t:g}": ValidationLoss(index) for index, t in enumerate(VALIDATION_TIMESTEPS)}
        if not 0 <= activation_memory_budget <= 1:
            raise ValueError(f"model.activation_memory_budget must lie in [0, 1], not {activation_memory_budget}.")
        if attention not in ("sdpa", "cudnn", "flex"):  # cudnn is chosen for the whole process, where the run begins
            raise ValueError(f"model.attention must be sdpa, cudnn or flex, not {attention!r}.")
        if compile:
            self.backbone.compile_graphs(compile == "blocks", activation_memory_budget, attention == "flex")
        elif activation_memory_budget < 1:
            raise ValueError("model.activation_memory_budget is for compiled graphs: set model.compile to blocks or true.")
        elif attention == "flex":
            raise ValueError(
                "model.attention: flex is for compiled graphs (eager, it is slower): set model.compile to blocks or true."
            )

    # ---------------------------------------------------------------------------------------------- training

    def forward(self, batch: Mapping[str, Any]) -> FlowOutput:
        self.random.next_microbatch()
        clean = self._encode_image(batch)
        device = clean.device
        text = self._encode_text(batch, self.caption_dropout)
        flow = self.training_flow or self.flow
        timestep = flow.sample_timesteps(clean.shape[0], self.random.generator("timesteps", device))
        noise = torch.randn(clean.shape, generator=self.random.generator("noise", device), device=device)
        noised = self.flow.interpolate(clean, noise, timestep)
        route = None
        if self.backbone.router is not None and self.training:
            num_tokens = self.backbone.num_tokens(*clean.shape[-2:])
            route = self.backbone.router.draw(clean.shape[0], num_tokens, self.random.generator("routing", device))
        output, taps = self.backbone(noised, timestep, text.embedding, **text.beside(), route=route, return_taps=True)
        counted = counted_pixels(route, clean, self.backbone.patch_size)
        return FlowOutput(self._predicted(output), clean, noise, noised, timestep, text, route, taps, counted)

    def _encode_image(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["latent"].float() if "latent" in batch else self.autoencoder.encode(batch["image"])

    def _encode_text(self, batch: Mapping[str, Any], dropout: float) -> TextConditioning:
        input_ids, mask, embedding = batch["input_ids"], batch["attention_mask"], batch.get("text_embedding")
        if embedding is not None and self.text_encoder.trainable:
            raise ValueError(
                "The batch has a text_embedding, but model.text_encoder is trained: what is stored would not follow it. "
                "Set model.text_encoder.trainable: false, or leave train_loader.text_embedding out."
            )
        if embedding is not None and embedding.ndim == 2:  # valid tokens only
            flat = embedding.new_zeros(mask.numel(), embedding.shape[1])
            embedding = flat.index_copy_(0, batch["text_position"], embedding).unflatten(0, mask.shape)
        pooled = batch.get("text_pooled", NONE_POOLED)
        if dropout > 0:
            device = input_ids.device
            draw = torch.rand(len(input_ids), 1, generator=self.random.generator("caption_dropout", device), device=device)
            dropped = draw < dropout
            if embedding is None:
                input_ids = torch.where(dropped, self.text_encoder.null_input_ids, input_ids)
                mask = torch.where(dropped, self.text_encoder.null_attention_mask, mask)
            else:
                null = self._null_text(device)
                embedding = torch.where(dropped[..., None], null.embedding.type_as(embedding), embedding)
                mask = torch.where(dropped, null.mask, mask)
                pooled = torch.where(dropped, null.pooled, pooled.float()) if pooled.shape[1] else pooled
        if embedding is not None:
            return TextConditioning(embedding.float(), mask, pooled.float())
        grouped = (batch["text_order"], batch["text_groups"]) if self._encodes_groups and "text_groups" in batch else ()
        return self._encoded(input_ids, mask, *grouped)

    def _encoded(self, input_ids: Tensor, mask: Tensor, *grouped: Any) -> TextConditioning:
        made: Any = self.text_encoder(input_ids, mask, *grouped)
        embedding, pooled = made if isinstance(made, tuple) else (made, NONE_POOLED)
        return TextConditioning(embedding, text_mask(self.text_encoder.tokenizer, mask), pooled)

    def _null_text(self, device: torch.device) -> TextConditioning:
        """Return the empty caption as it is encoded, (1, …), which is done once."""
        if self._null is None or self._null.mask.device != device:
            with returned_afterwards(), torch.no_grad():  # the encoder, where training needs it for this caption alone
                self._null = self.encode_prompts([""], device)
        return self._null

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return `total` and each of its terms by name, already weighted."""
        o = outputs
        terms = {"flow": self.flow.squared_error(o.prediction, o.clean, o.noise, o.timestep, o.counted).mean()}
        if len(self.auxiliary_losses):
            terms |= self.auxiliary_losses(outputs, batch)
        return {"total": torch.stack(list(terms.values())).sum()} | terms

    # -------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def eval_forward(self, batch: Mapping[str, Any], outputs: Tensor | None = None) -> Tensor:
        """Return every sample's `velocity_error` at every one of `VALIDATION_TIMESTEPS`: fp32 (B, 8).

        It is ‖v̂ − v‖² / (C·H·W), and of x-prediction ‖x̂0 − x0‖² / (C·H·W) / t²: what the loss of flow matching is in training,
        whatever is predicted by whatever process, and never clamped. Neither the distribution of training's times has a part in
        it, nor `min_timestep`, the run's seed, caption dropout or routes. A sample's noise is of its `sample_id` alone, the same
        at all timesteps, and drawn on the CPU, so that a GPU measures the same. Numbers compare between runs on the same data,
        image size, autoencoder and `noise_scale`: another of these is another velocity.

        The backbone is called once for every timestep, so that it takes no more memory than one call; the text is encoded once.
        """
        if outputs is not None:
            return outputs
        clean, text = self._encode_image(batch), self._encode_text(batch, 0.0)
        ids = batch["sample_id"].tolist() if "sample_id" in batch else range(len(clean))
        cpu = torch.device("cpu")
        drawn = [torch.randn(clean.shape[1:], generator=seeded_generator(cpu, "validation", sample)) for sample in ids]
        noise = torch.stack(drawn).to(clean.device)
        errors = []
        for share in VALIDATION_TIMESTEPS:
            t = self.flow.time_at(torch.full((len(clean),), share, device=clean.device))
            noised = self.flow.interpolate(clean, noise, t)
            prediction = self._predict(noised, t, text)
            errors.append(self.flow.velocity_error(prediction, noised, clean, noise, t))
        return torch.stack(errors, 1)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else self._eval_metrics

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch.get("counted"))

    # ---------------------------------------------------------------------------------------------- sampling

    def generate(
        self,
        prompts: list[str],
        height: int,
        width: int,
        seeds: list[int] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one image per prompt with the current weights; wrap in `sampling_weights()` to use an average of them.

        Args:
            prompts: B captions.
            height, width: image size; divisible by the patch size (and the autoencoder's downsampling).
            seeds: one per image, 0 … B−1 by default. An image depends on its own seed only.
            num_inference_steps: steps, each a call of the network.
            guidance_scale: 1 = unguided.
            watch: is called before every step, with its index and the clean images that are predicted there, (B, C, H, W) as the
                autoencoder has them. What it raises ends the drawing.

        Returns:
            uint8 (B, 3, height, width).

        Raises:
            ValueError: a size that cannot be cut into patches; a number of seeds that isn't the number of prompts; a seed beyond
                64 bits.
        """
        return self.autoencoder.decode(self.sample(prompts, height, width, seeds, num_inference_steps, guidance_scale, watch))

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        height: int,
        width: int,
        seeds: list[int] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw as `generate`, but don't decode: return what the autoencoder would make of the images, fp32 (B, C, H, W)."""
        seeds = list(range(len(prompts))) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        check_seeds(seeds)
        if guidance_scale != 1 and isinstance(self.guidance, ClassifierFreeGuidance) and not self.knows_empty_caption:
            _warn_of_guidance()
        down = self.autoencoder.downsampling
        if height % (down * self.backbone.patch_size) or width % (down * self.backbone.patch_size):
            raise ValueError(f"height and width must be divisible by {down * self.backbone.patch_size}: {height}×{width}.")
        self.say_what_is_lost(prompts)
        was_training = self.training
        self.eval()
        try:
            device = next(self.parameters()).device
            encoded = self.encode_prompts([*prompts, ""], device)
            text = TextConditioning(*(part[:-1] for part in encoded))
            null = TextConditioning(*(part[-1:].expand_as(own) for part, own in zip(encoded, text, strict=True)))
            noise = initial_noise(seeds, (self.autoencoder.channels, height // down, width // down), device)

            num_tokens = self.backbone.num_tokens(*noise.shape[-2:])

            def predict(x_t: Tensor, t: Tensor, index: int) -> Tensor:
                step = SamplingStep(text, null, guidance_scale, index, seeds, num_tokens)
                prediction = self.guidance(self._predict, x_t, t, step)
                if watch is not None:
                    watch(index, self.flow.to_x0(prediction, x_t, t))
                return prediction

            return self.flow.sample(predict, noise, num_inference_steps)
        finally:
            self.train(was_training)

    def say_what_is_lost(self, prompts: list[str]) -> None:
        """Warn, once for each prompt, of what the text encoder does not read of it: what is too long, and unknown words."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._told]
        self._told.update(new)
        if dist.get_global_rank() == 0:
            for sentence in self.unread(new):
                log.warning("%s", sentence)

    def unread(self, prompts: list[str]) -> list[str]:
        """Return what the text encoder does not read of prompts, in sentences."""
        encoder: Any = self.text_encoder
        if not hasattr(encoder, "readings"):  # one's own encoder need not have it
            return []
        _, max_tokens = chief(encoder.tokenizer, encoder.max_tokens)
        return what_is_lost(encoder.readings([self.clean_prompt(text) for text in prompts]), max_tokens)

    def encode_prompts(self, prompts: list[str], device: torch.device) -> TextConditioning:
        tokens = self.text_encoder.tokenize([self.clean_prompt(prompt) for prompt in prompts])
        input_ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        return self._encoded(input_ids, mask)

    def _predict(self, x_t: Tensor, t: Tensor, text: TextConditioning, route: Route | None = None) -> Tensor:
        return self._predicted(self.backbone(x_t, t, text.embedding, **text.beside(), route=route)).float()

    def _predicted(self, output: Tensor) -> Tensor:
        """Return the part of the network's output that is its prediction: DiT and PixArt have variances behind it."""
        channels = self.autoencoder.channels
        return output if output.shape[1] == channels else output[:, :channels]  # whose gradient would be filled up with zeros
