"""What the backbone `diffusers` must know of a transformer of diffusers to train it: one short signature per class.

A signature says how x_t, t and the text become the arguments of the class's `forward`, and where its blocks and their image
tokens are. Anybody's own joins by `@registry.signatures.register("SomeTransformer2DModel")`.

Shape suffixes: B batch, C channels, N image tokens, T text tokens, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.unets.unet_stable_cascade import SDCascadeResBlock, SDCascadeTimestepBlock
from torch import Tensor, nn

from prx_composer.models.diffusion import DDPM
from prx_composer.models.processes import NUM_TRAIN_TIMESTEPS, FlowMatching, Process

Hows = Sequence[Mapping[str, Any]]  # `how` of each text encoder, in order
Places = Sequence[Sequence[int]]  # encoders by number, whose tokens stand one after another; see `SeveralTextEncoders`

TEXT_LABEL = 1  # width of a text embedding that is a class label, and nothing else


class Inputs(NamedTuple):
    """What a backbone is called with."""

    image: Tensor  # x_t: (B, C, H, W), or (B, N, C·p²) where a signature packs
    t: Tensor  # fp32 (B,), 1 = noise
    text: Tensor  # (B, T, C), zero where there is no token
    mask: Tensor  # bool (B, T), True = real token
    pooled: Tensor  # (B, P), P = 0 of classes that take none
    grid: tuple[int, int]  # rows and columns of patches
    config: Mapping[str, Any]  # the class's arguments


@dataclass(frozen=True)
class BlockList:
    """A `ModuleList` of blocks, or of lists of blocks, all of whose `forward` take image tokens as `hidden_states` (B, N, D).

    Args:
        path: of the list in the model.
        output: place of the image tokens in what a block returns; None = it returns nothing else.
        grid: tokens come and go as (B, D, rows, columns), as between convolutions; such a class is `unroutable`.
        joint: text tokens are among them: see `Signature.first_image_token`.
        positions: names of other arguments with one entry per token, (B, N, …), which are routed with the tokens.
    """

    path: str
    output: int | None = None
    grid: bool = False
    joint: bool = False
    positions: tuple[str, ...] = ()


class Signature:
    """Base of all signatures. The attributes are constants of a class.

    Attributes:
        model: a class of one's own in the place of diffusers', made as its models are; None = diffusers has it.
        blocks: of which depth is counted, which are tapped and routed.
        also: paths of other lists of blocks: sharded, compiled and trained by Muon as `blocks` are.
        text_width: argument of the class that is the width of the text embedding; None = it takes class labels.
        pooled_width: argument that is the width of the pooled text, if it takes that.
        equal_width: arguments that must be the hidden size, because blocks add the one to the other.
        packs: patches become channels before the class sees them: of its `patch_size`, or of 2×2 where that is 1.
        square_only: it mistakes images that are not square.
        time_vector: path of the module that embeds the time, once for all blocks, and the place in what it returns of the vector
            (B, `time_size`) that `TIME_VECTOR` taps; None for no place: it returns nothing else. Or the reason why there is none.
        modulation: how the names of those layers of a block begin that the time and not the tokens go through.
        borrows_first_block: the class uses a layer of its first block outside of it, so that FSDP must not shard that by itself.
        unroutable: why tokens cannot skip blocks; None = they can.
        pipeline: of diffusers, that takes the steps that are taken here.
        part: what that pipeline calls the model.
        asks_encoder: that pipeline asks its text encoder for its dtype, although it is given embeddings.
        drawn: what `pipeline_draws` says, in words.
        spaces_steps: the pipeline spaces its steps otherwise, unless it is given `sigmas`.
        zeros: names of linear layers that begin at zero, so that a block begins as the identity. One with a dot ends a name.
    """

    model: Any = None
    blocks: tuple[BlockList, ...]
    also: tuple[str, ...] = ()
    text_width: str | None = None
    pooled_width: str | None = None
    equal_width: tuple[str, ...] = ()
    packs: bool = False
    square_only: bool = False
    time_vector: tuple[str, int | None] | str = "its signature names no time vector"
    modulation: str = "norm"
    borrows_first_block: bool = False
    unroutable: str | None = None
    pipeline: str | None = None
    part: str = "transformer"
    asks_encoder: bool = False
    drawn: str = "velocities of flow matching, on latents, with unit noise"
    spaces_steps: bool = False
    zeros: tuple[str, ...] = ()

    def inputs(self, x: Inputs) -> dict[str, Any]:
        """Return the arguments of the class's `forward`."""
        raise NotImplementedError

    def initialise(self, model: Any) -> None:
        """Let the model's weights that are not of linear layers begin otherwise than as diffusers has them."""

    def prediction(self, output: Tensor) -> Tensor:
        """Return x̂0 or v̂ = ε − x0 (or ε̂) of what `forward` returns."""
        return output

    def first_image_token(self, x: Inputs) -> Tensor | None:
        """Return where image tokens begin in the sequences of `joint` blocks, int64 (B, 1); None = they are the last."""
        return None

    def pipeline_draws(self, flow: Process, latents: bool) -> bool:
        """Return whether the pipeline draws what a model of this process draws."""
        return latents and isinstance(flow, FlowMatching) and flow.prediction == "v" and flow.noise_scale == 1

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        """Return whether the pipeline makes of prompts what these text encoders do; else it is given embeddings."""
        return False

    def pipeline_options(self, how: Mapping[str, Any], guidance: float) -> dict[str, Any]:
        """Return what the pipeline is told so that it guides and reads prompts as is done here.

        Args:
            how: the first text encoder reads.
            guidance: scale of classifier-free guidance, 1 = none.
        """
        return {"guidance_scale": guidance}

    def pipeline_settings(self, downsampling: int) -> dict[str, Any]:
        """Return what `model_index.json` says beside the parts, for an autoencoder whose latents are so much smaller."""
        return {}

    def text_argument(self, config: Mapping[str, Any]) -> str | None:
        """Return `text_width`, or what takes its place with these arguments."""
        return self.text_width

    def hidden_size(self, config: Mapping[str, Any]) -> int:
        """Return how wide the image tokens are."""
        return config.get("hidden_size") or config["num_attention_heads"] * config["attention_head_dim"]

    def time_size(self, hidden_size: int) -> int:
        """Return how many channels the time vector has."""
        return hidden_size

    def most_patches(self, config: Mapping[str, Any]) -> int | None:
        """Return how many patches a side may have, for which there are positions; None = any number."""
        return None


class SD3(Signature):
    """MMDiT (arXiv:2403.03206): text and image are two streams; no mask: padding is attended to, as zero unless it is read.

    Its pipeline reads padding: of two CLIP encoders side by side, at their last layer but one, then of T5.
    """

    blocks = (BlockList("transformer_blocks", output=1),)
    text_width, pooled_width = "joint_attention_dim", "pooled_projection_dim"
    equal_width = ("caption_projection_dim",)
    time_vector = "time_text_embed", None
    pipeline = "StableDiffusion3Pipeline"
    zeros = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        clip = {"layer": -2, "pooled": "projected", "attend_padding": True}
        return [*encoders] == [clip, clip, {"attend_padding": True}] and tokens == [[0, 1], [2]]

    def inputs(self, x: Inputs) -> dict[str, Any]:
        text = dict(encoder_hidden_states=x.text, pooled_projections=x.pooled)
        return dict(hidden_states=x.image, timestep=1000 * x.t) | text

    def most_patches(self, config: Mapping[str, Any]) -> int | None:
        return config["pos_embed_max_size"]


class Flux(Signature):
    """FLUX.1: blocks of two streams, then of one; 2×2 latent pixels are a token, at a rotary position.

    `patch_size: p` makes tokens of p×p pixels, with in_channels: C·p² and out_channels: C. No mask: padding is attended to, as
    zero unless it is read. Its pipeline reads it, of T5; of CLIP it takes the pooled vector alone.
    """

    blocks = (BlockList("transformer_blocks", output=1), BlockList("single_transformer_blocks", output=1))
    text_width, pooled_width = "joint_attention_dim", "pooled_projection_dim"
    packs = True
    time_vector = "time_text_embed", None
    pipeline, spaces_steps = "FluxPipeline", True
    unroutable = "its blocks take one table of positions for the whole batch, and every image keeps tokens of its own"
    zeros = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        clip = {"pooled": "end", "attend_padding": True}
        return [*encoders] == [clip, {"attend_padding": True}] and tokens == [[1]]

    def pipeline_options(self, how: Mapping[str, Any], guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "guidance_scale": 1.0}  # the second is of distilled models

    def inputs(self, x: Inputs) -> dict[str, Any]:
        rows, columns = (torch.arange(side, device=x.t.device) for side in x.grid)
        places = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).to(x.t.dtype)
        guidance = torch.ones_like(x.t) if x.config["guidance_embeds"] else None  # of distilled models: none
        text = dict(encoder_hidden_states=x.text, pooled_projections=x.pooled, txt_ids=x.t.new_zeros(x.text.shape[1], 3))
        return dict(hidden_states=x.image, timestep=x.t, img_ids=places, guidance=guidance) | text


class PixArt(Signature):
    """PixArt-α and -Σ (arXiv:2310.00426, 2403.04692): image tokens attend to the text; all blocks share one modulation."""

    blocks = (BlockList("transformer_blocks"),)
    text_width = "caption_channels"
    equal_width = ("cross_attention_dim",)
    time_vector = "adaln_single", 1
    zeros = ("attn2.to_out.0", "proj_out")

    def inputs(self, x: Inputs) -> dict[str, Any]:
        sides = [x.t.new_full((len(x.t), 1), 8.0 * x.config["patch_size"] * side) for side in x.grid]  # pixels of its autoencoder
        size = dict(resolution=torch.cat(sides, 1), aspect_ratio=sides[0] / sides[1])
        text = dict(encoder_hidden_states=x.text, encoder_attention_mask=x.mask)
        return dict(hidden_states=x.image, timestep=1000 * x.t, added_cond_kwargs=size) | text

    def text_argument(self, config: Mapping[str, Any]) -> str | None:
        return "caption_channels" if config["caption_channels"] else "cross_attention_dim"


class Sana(Signature):
    """Sana (arXiv:2410.10629): linear attention, and convolutions instead of positions."""

    blocks = (BlockList("transformer_blocks"),)
    text_width = "caption_channels"
    equal_width = ("cross_attention_dim",)
    time_vector = "time_embed", 1
    pipeline = "SanaPipeline"
    unroutable = "its blocks convolve over the grid of patches, which needs all of them"
    zeros = ("attn2.to_out.0", "proj_out")

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        first = encoders[0]  # which reads what stands behind an instruction, of which two tokens are kept; or without one
        beside = {key: value for key, value in first.items() if key not in ("instruction", "skipped")}
        return len(encoders) == 1 and beside == {"cleaning": "lower"} and ("instruction" in first) == ("skipped" in first)

    def pipeline_options(self, how: Mapping[str, Any], guidance: float) -> dict[str, Any]:
        lines = how["instruction"].split("\n") if "instruction" in how else None
        return {"guidance_scale": guidance, "complex_human_instruction": lines, "use_resolution_binning": False}

    def inputs(self, x: Inputs) -> dict[str, Any]:
        guidance = torch.ones_like(x.t) * x.config["guidance_embeds_scale"] if x.config["guidance_embeds"] else None
        text = dict(encoder_hidden_states=x.text, encoder_attention_mask=x.mask)
        return dict(hidden_states=x.image, timestep=1000 * x.config["timestep_scale"] * x.t, guidance=guidance) | text


class DiT(Signature):
    """DiT (arXiv:2212.09748), whose text is a class label: of a text encoder such as `labels`; the empty caption is −1."""

    blocks = (BlockList("transformer_blocks"),)
    square_only = True
    time_vector = "each of its blocks embeds time and label by itself"
    borrows_first_block = True  # its embeddings of time and label
    zeros = ("norm1.linear", "proj_out_1", "proj_out_2")

    def inputs(self, x: Inputs) -> dict[str, Any]:
        label, empty = x.text[:, 0, 0].long(), x.config["num_embeds_ada_norm"]
        return dict(hidden_states=x.image, timestep=1000 * x.t, class_labels=torch.where(label < 0, empty, label))


class Lumina2(Signature):
    """Lumina-Image 2.0: one stream, the text first and without its padding; its time runs from noise to image."""

    blocks = (BlockList("layers", joint=True, positions=("attention_mask", "image_rotary_emb")),)
    also = ("noise_refiner", "context_refiner")
    text_width = "cap_feat_dim"
    time_vector = "time_caption_embed", 0
    begins = " <Prompt Start> "  # a prompt, after the instruction
    pipeline, spaces_steps = "Lumina2Pipeline", True
    zeros = ("norm1.linear", "norm_out.linear_2")

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        own = [{"layer": -2, "instruction": one.get("instruction", "")} for one in encoders[:1]]
        return [*encoders] == own and own[0]["instruction"].endswith(self.begins)

    def pipeline_options(self, how: Mapping[str, Any], guidance: float) -> dict[str, Any]:
        system = how["instruction"].removesuffix(self.begins)
        return {"guidance_scale": guidance, "system_prompt": system, "cfg_normalization": False}

    def inputs(self, x: Inputs) -> dict[str, Any]:
        order = x.mask.int().argsort(dim=1, descending=True, stable=True)  # the real tokens first, wherever they were padded
        text = x.text.gather(1, order[..., None].expand_as(x.text))
        mask = x.mask.gather(1, order)
        return dict(hidden_states=x.image, timestep=1 - x.t, encoder_hidden_states=text, encoder_attention_mask=mask)

    def prediction(self, output: Tensor) -> Tensor:
        return -output

    def first_image_token(self, x: Inputs) -> Tensor | None:
        return x.mask.sum(1, keepdim=True)

    def time_size(self, hidden_size: int) -> int:
        return min(hidden_size, 1024)

    def most_patches(self, config: Mapping[str, Any]) -> int | None:
        return min(config["axes_lens"][1:])


class AuraFlow(Signature):
    """AuraFlow: blocks of two streams, then of one with the text first; no mask: what is attended to beyond the text is zero."""

    blocks = (BlockList("joint_transformer_blocks", output=1), BlockList("single_transformer_blocks", joint=True))
    text_width = "joint_attention_dim"
    equal_width = ("caption_projection_dim",)
    time_vector = "time_step_proj", None
    pipeline = "AuraFlowPipeline"
    zeros = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")

    def pipeline_reads(self, encoders: Hows, tokens: Places) -> bool:
        return [*encoders] == [{}]

    def initialise(self, model: Any) -> None:
        """Let learnt positions begin as sinusoids: as diffusers' 0.1·N(0, 1) they are lost beside a patch for 600 steps."""
        table = model.pos_embed.pos_embed
        side = int(table.shape[1] ** 0.5)
        with torch.no_grad():
            table.copy_(get_2d_sincos_pos_embed(table.shape[2], side, base_size=2 * side, output_type="pt"))  # two apart

    def inputs(self, x: Inputs) -> dict[str, Any]:
        return dict(hidden_states=x.image, timestep=x.t, encoder_hidden_states=x.text)

    def most_patches(self, config: Mapping[str, Any]) -> int | None:
        return int(config["pos_embed_max_size"] ** 0.5)


class StableCascade(Signature):
    """Stable Cascade's prior, stage C: Würstchen (arXiv:2306.00637) in its third version, of convolutions and attention.

    A block is one of three kinds in turn: convolution, modulation by the time, attention to image and text. Text is attended to
    without a mask, as zero where it is padding, and beside it the pooled text. The class's place for an image's embedding gets
    zeros, as in its pipeline.
    """

    blocks = (BlockList("down_blocks", grid=True), BlockList("up_blocks", grid=True))
    text_width, pooled_width = "clip_text_in_channels", "clip_text_pooled_in_channels"
    time_vector = "it embeds the time outside of its modules"
    modulation = "mapper"
    unroutable = "its blocks convolve over the grid of patches, which needs all of them"
    pipeline, part, drawn = "StableCascadePriorPipeline", "prior", "the noise of ddpm with beta_schedule: squaredcos_cap_v2"
    asks_encoder = True

    def text_argument(self, config: Mapping[str, Any]) -> str | None:
        missing = [name for name in ("clip_text_in_channels", "clip_image_in_channels") if not config[name]]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given: without both, the class reads the pooled text alone.")
        return self.text_width

    def hidden_size(self, config: Mapping[str, Any]) -> int:
        return config["block_out_channels"][0]

    def initialise(self, model: Any) -> None:
        """Let blocks begin as nearly the identity, and the prediction as zero, as in Würstchen's own code."""
        nn.init.zeros_(model.clf[1].weight)
        nn.init.zeros_(model.clf[1].bias)
        for layer in (model.clip_txt_pooled_mapper, model.clip_txt_mapper, model.clip_img_mapper):
            nn.init.normal_(layer.weight, std=0.02)
        for block in (block for levels in (model.down_blocks, model.up_blocks) for level in levels for block in level):
            if isinstance(block, SDCascadeTimestepBlock):
                nn.init.zeros_(block.mapper.weight)
            elif isinstance(block, SDCascadeResBlock):
                block.channelwise[-1].weight.data *= sum(model.config.down_num_layers_per_block) ** -0.5  # pyright: ignore[reportArgumentType, reportOperatorIssue]

    def inputs(self, x: Inputs) -> dict[str, Any]:
        image = x.text.new_zeros(len(x.t), 1, x.config["clip_image_in_channels"])
        text = dict(clip_text=x.text, clip_text_pooled=x.pooled[:, None], clip_img=image)
        # DDPM's step k is told as (k + 1)/1000: by its noise, as the pipeline tells it.
        return dict(sample=x.image, timestep_ratio=x.t + 1 / NUM_TRAIN_TIMESTEPS) | text

    def pipeline_settings(self, downsampling: int) -> dict[str, Any]:
        return {"resolution_multiple": float(downsampling)}

    def pipeline_draws(self, flow: Process, latents: bool) -> bool:
        return isinstance(flow, DDPM) and (flow.prediction, flow.beta_schedule) == ("eps", "squaredcos_cap_v2")
