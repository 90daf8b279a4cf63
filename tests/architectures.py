"""Tiny backbones of diffusers' classes, and what goes into them."""

from typing import Any

import torch

from prx_composer import registry
from prx_composer.models.diffusers_backbone import DiffusersBackbone

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
TEXT, POOLED = 24, 20
TINY: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": HEADS
    | dict(sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=TEXT, caption_projection_dim=32)
    | dict(pooled_projection_dim=POOLED, pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=[0]),
    "FluxTransformer2DModel": HEADS
    | dict(in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=TEXT, pooled_projection_dim=POOLED)
    | dict(axes_dims_rope=[4, 6, 6], guidance_embeds=True),
    "PixArtTransformer2DModel": dict(num_attention_heads=3, attention_head_dim=16)
    | dict(in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=48, caption_channels=TEXT, sample_size=8)
    | dict(use_additional_conditions=True),
    "SanaTransformer2DModel": HEADS
    | dict(in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16, patch_size=2)
    | dict(cross_attention_dim=32, caption_channels=TEXT, sample_size=8, timestep_scale=0.5),
    "DiTTransformer2DModel": HEADS | dict(in_channels=4, out_channels=8, num_layers=3, sample_size=4, num_embeds_ada_norm=5),
    "Lumina2Transformer2DModel": dict(in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1, num_attention_heads=2)
    | dict(num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 6, 6], axes_lens=[16, 16, 16], cap_feat_dim=TEXT, sample_size=8),
    "AuraFlowTransformer2DModel": HEADS
    | dict(in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=TEXT)
    | dict(caption_projection_dim=32, sample_size=8, pos_embed_max_size=64),
    "StableCascadeUNet": dict(in_channels=4, out_channels=4, patch_size=2, conditioning_dim=32, block_out_channels=[32, 32])
    | dict(num_attention_heads=[2, 2], down_num_layers_per_block=[1, 2], up_num_layers_per_block=[2, 1], switch_level=[False])
    | dict(clip_text_in_channels=TEXT, clip_text_pooled_in_channels=POOLED, clip_image_in_channels=8, dropout=[0.0, 0.0]),
}
POOLED_WIDTH = {name: registry.signatures.get(name, "class").pooled_width for name in TINY}  # the argument, if there is one
ROUTED = ["SD3Transformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel", "Lumina2Transformer2DModel"]
ROUTED += ["AuraFlowTransformer2DModel"]


def backbone(name: str, **changed: Any) -> DiffusersBackbone:
    """A tiny one, no weight of which is zero."""
    torch.manual_seed(0)
    made = DiffusersBackbone(**{"class": name}, **(TINY[name] | changed))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


def inputs(of: DiffusersBackbone, height: int = 8, width: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    side = dict(generator=generator)
    width = height if of.signature.square_only else width
    text = torch.tensor([3.0, -1.0, 0.0])[:, None, None] if of.context_in_dim == 1 else torch.randn(3, 7, TEXT, **side)
    pooled = {"pooled": torch.randn(3, of.pooled_dim, **side)} if of.pooled_dim else {}
    return pooled | dict(
        hidden_states=torch.randn(3, 4, height, width, **side),
        timestep=torch.rand(3, **side),
        encoder_hidden_states=text,
        attention_mask=torch.arange(text.shape[1])[None] < torch.tensor([text.shape[1], 3, 1])[:, None],
    )


def of_pixels(name: str) -> dict[str, Any]:
    """Return arguments of a class for images of three channels in patches of 4×4, but of FLUX, whose are of 2×2."""
    channels = {"in_channels": 12} if name.startswith("Flux") else {"in_channels": 3, "patch_size": 4}
    if "out_channels" in TINY[name]:
        channels["out_channels"] = 3 * TINY[name]["out_channels"] // 4
    return TINY[name] | channels
