"""The PRX diffusion transformer: the mathematics and the parameter names of `diffusers.PRXTransformer2DModel`.

Shape suffixes: B batch, C channels, H and W image size, N image tokens, T text tokens, D hidden size, K kept tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.models.compiling import allow_many_graphs, compile_by_size
from prx_composer.models.layers import (
    FinalLayer,
    KeyMask,
    MLPEmbedder,
    Modulation,
    PRXBlock,
    TextAdapterBlock,
    cached_rotation,
    key_blocks,
    key_mask,
    patchify,
    sinusoid,
    unpatchify,
)
from prx_composer.models.routing import Route, Router, TokenFusion, merge_tokens, select_tokens

TIME_VECTOR = -1  # in `taps`: what conditions every block and the final layer, (B, D)


class Conditioning(NamedTuple):
    """Vectors that condition every block; a conditioner takes them and returns changed ones."""

    vec: Tensor  # (B, D), the time vector
    context: Tensor  # (B, T, D), projected text tokens
    mask: Tensor | None  # (B, T), True = real token


class ResolutionEmbedder(nn.Module):
    """Embeds image height and width, in the pixels that the backbone sees, as a vector added to the time vector (PRX-7B).

    Attributes:
        active: whether it adds anything.
        added: whether an algorithm gave it to the backbone, and not the recipe's `model.backbone`.
    """

    def __init__(self, hidden_size: int, max_period: int):
        super().__init__()
        self.max_period = max_period
        self.added = False
        self.active = True  # off: adds zero, and its parameters still get a gradient (DDP waits for every one)
        self.mlp = MLPEmbedder(256, hidden_size)

    def forward(self, height: int, width: int, vec_BD: Tensor) -> Tensor:
        sides = [torch.full((1,), float(side), device=vec_BD.device) for side in (height, width)]  # no copy from the host
        features = torch.cat([sinusoid(side, 128, self.max_period) for side in sides], dim=-1)
        embedding = self.mlp(features.to(vec_BD.dtype))
        return embedding if self.active else 0.0 * embedding


def _channels_per_axis(given: list[int] | tuple[int, ...] | None, hidden_size: int, num_heads: int) -> tuple[int, int]:
    """Return how many channels of a head turn with the row and with the column; raise ValueError if they don't fit."""
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads}).")
    head_dim = hidden_size // num_heads
    axes_dim = (head_dim // 2, head_dim // 2) if given is None else tuple(given)
    if len(axes_dim) != 2 or sum(axes_dim) != head_dim or any(dim % 2 for dim in axes_dim):
        raise ValueError(
            f"axes_dim ({list(axes_dim)}) must be two even numbers that sum to hidden_size / num_heads = {head_dim}."
        )
    return axes_dim


class PRXBackbone(nn.Module):
    """A transformer that denoises image tokens, which attend to text tokens and are modulated by the time step.

    Sizes have names: `size: B` in a recipe, `PRXBackbone(**registry.SIZES["B"], …)` in Python.

    Args:
        in_channels: channels of the image (3) or latent (16).
        patch_size: side of a square patch, in pixels or latent pixels.
        context_in_dim: width of the text embedding.
        hidden_size: width of a token; a multiple of `num_heads`.
        mlp_ratio: MLP width / hidden size.
        num_heads: attention heads.
        depth: number of blocks.
        axes_dim: channels of a head that turn with the row and with the column; they sum to hidden_size / num_heads.
        theta: base of the rotary frequencies.
        time_factor: t ∈ [0, 1] is multiplied by this before the sinusoids.
        time_max_period: longest period of the time and resolution sinusoids.
        bottleneck_size: width of an inner projection between patch and token (pixel models, where patches are wide).
        resolution_embeds: condition on height and width.
        text_adapter_depth: blocks that adapt the projected text before the image tokens attend to it. diffusers' model has
            none, so that a backbone with them cannot be exported to it.

    Seams (see `prx_composer.algorithms`), all empty at first:
        router: draws which tokens the middle blocks see; `forward` takes the drawn `route`.
        fusion: a `TokenFusion` that joins the routed blocks' output with their input, instead of putting tokens back.
        taps: indices of blocks whose output `forward(..., return_taps=True)` returns, once for every reader; `TIME_VECTOR` is
            the time vector.
        conditioners: modules `Conditioning → Conditioning`, applied in order.

    Raises:
        ValueError: sizes that don't fit together.
    """

    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        context_in_dim: int = 2304,
        hidden_size: int = 1792,
        mlp_ratio: float = 3.5,
        num_heads: int = 28,
        depth: int = 16,
        axes_dim: list[int] | tuple[int, ...] | None = None,
        theta: int = 10000,
        time_factor: float = 1000.0,
        time_max_period: int = 10000,
        bottleneck_size: int | None = None,
        resolution_embeds: bool = False,
        text_adapter_depth: int = 0,
    ):
        super().__init__()
        axes_dim = _channels_per_axis(axes_dim, hidden_size, num_heads)
        self.config: dict[str, Any] = dict(  # diffusers' arguments
            in_channels=in_channels,
            patch_size=patch_size,
            context_in_dim=context_in_dim,
            hidden_size=hidden_size,
            mlp_ratio=mlp_ratio,
            num_heads=num_heads,
            depth=depth,
            axes_dim=list(axes_dim),
            theta=theta,
            time_factor=time_factor,
            time_max_period=time_max_period,
            bottleneck_size=bottleneck_size,
            resolution_embeds=resolution_embeds,
        )
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.context_in_dim = context_in_dim
        self.hidden_size = self.time_size = hidden_size  # the latter: of the vector that `TIME_VECTOR` taps
        self.time_factor = time_factor
        self.time_max_period = time_max_period
        self._axes_dim, self._theta = axes_dim, theta

        patch_dim = in_channels * patch_size**2
        if bottleneck_size is None:
            self.img_in = nn.Linear(patch_dim, hidden_size)
        else:
            self.img_in = nn.Sequential(nn.Linear(patch_dim, bottleneck_size), nn.Linear(bottleneck_size, hidden_size))
        self.time_in = MLPEmbedder(256, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.resolution_embedder = ResolutionEmbedder(hidden_size, time_max_period) if resolution_embeds else None
        self.text_adapter = nn.ModuleList(TextAdapterBlock(hidden_size, num_heads, mlp_ratio) for _ in range(text_adapter_depth))
        self.blocks = nn.ModuleList(PRXBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_dim)

        self._flex_attention = False
        self.router: Router | None = None
        self.fusion: TokenFusion | None = None
        self.taps: tuple[int, ...] = ()
        self.conditioners = nn.ModuleDict()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT: Xavier for matrices, 0.02 for the time MLP, zero where a block must start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embedders = [self.time_in] + ([self.resolution_embedder.mlp] if self.resolution_embedder else [])
        for embedder in embedders:
            nn.init.normal_(embedder.in_layer.weight, std=0.02)
            nn.init.normal_(embedder.out_layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.lin.weight)
            elif isinstance(module, TextAdapterBlock):
                nn.init.zeros_(module.to_out.weight)
                nn.init.zeros_(module.down_proj.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens; raise ValueError if the patch size doesn't divide the image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"An image of {height}×{width} is not divisible by patch_size {self.patch_size}.")
        return (height // self.patch_size) * (width // self.patch_size)

    def compile_graphs(self, per_block: bool, activation_memory_budget: float = 1.0, flex_attention: bool = False) -> None:
        """Let `torch.compile` make a graph of a forward pass, or of every block's, for each image size when it is first met.

        Args:
            per_block: whether each block has a graph of its own.
            activation_memory_budget: what a graph may keep for its backward pass, 1 = what it would without a budget, 0 = its
                inputs; the rest is computed again, what costs least first. It is a setting of the process.
            flex_attention: attend by FlexAttention on a GPU.
        """
        self._flex_attention = flex_attention
        partitioner: Any = torch._functorch.config  # pyright: ignore[reportAttributeAccessIssue]
        partitioner.activation_memory_budget = activation_memory_budget
        if per_block:  # the method and not the module: FSDP2's hooks around it can be in no graph
            for block in self.blocks:
                block.forward = compile_by_size(block.forward)
        else:
            allow_many_graphs()
            self.compile(fullgraph=True, dynamic=False)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Tell Composer's FSDP, which asks for every submodule, that each block is a unit of sharding."""
        return isinstance(module, PRXBlock)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        route: Route | None = None,
        return_taps: bool = False,
    ) -> Any:
        """Predict x̂0 or v̂ from a noised image.

        Args:
            hidden_states: (B, C, H, W).
            timestep: (B,) or (1,), t ∈ [0, 1] with 1 = noise.
            encoder_hidden_states: (B, T, context_in_dim).
            attention_mask: bool (B, T), True = real token.
            route: what a router drew.
            return_taps: also return {block index: (B, N or K, D)} for the blocks in `taps`, and (B, D) for `TIME_VECTOR`.

        Returns:
            (B, C, H, W), or that and the dict of taps.
        """
        height, width = hidden_states.shape[-2:]
        conditioning = self._condition(timestep, encoder_hidden_states, attention_mask, height, width)
        rotation = self._rotation(height, width, hidden_states.device)
        keys = self._keys(conditioning.mask, rotation.shape[0])
        activated_BD = F.silu(conditioning.vec)
        x_BND = self.img_in(patchify(hidden_states, self.patch_size))

        taps: dict[int, Tensor] = {TIME_VECTOR: conditioning.vec} if TIME_VECTOR in self.taps else {}
        routed, fusion = route or self.fusion, self.fusion
        start, end = (routed.start, routed.end) if routed is not None else (-1, -1)
        early_BND, dense_rotation, dense_keys = x_BND, rotation, keys
        for index, block in enumerate(self.blocks):
            if index == start:
                early_BND = x_BND
                if route is not None:
                    x_BND = select_tokens(x_BND, route.kept_indices)
                    rotation = dense_rotation[route.kept_indices][:, None]
                    keys = self._keys(conditioning.mask, route.kept_indices.shape[1])
            x_BND = block(x_BND, conditioning.context, activated_BD, rotation, keys)
            if index in self.taps:
                taps[index] = x_BND
            if index == end - 1:
                rotation, keys = dense_rotation, dense_keys
                if fusion is not None:
                    x_BND = fusion(early_BND, x_BND, None if route is None else route.kept_indices)
                elif route is not None and not route.discard:
                    x_BND = merge_tokens(early_BND, x_BND, route.kept_indices)

        patches = self.final_layer(x_BND, conditioning.vec)
        if route is not None and route.discard:
            patches = merge_tokens(
                patches.new_zeros(early_BND.shape[0], dense_rotation.shape[0], patches.shape[-1]), patches, route.kept_indices
            )
        sample = unpatchify(patches, self.patch_size, height, width)
        return (sample, taps) if return_taps else sample

    def _condition(self, timestep: Tensor, text: Tensor, mask: Tensor | None, height: int, width: int) -> Conditioning:
        context = self.txt_in(text)
        text_mask = None if mask is None else mask.bool()[:, None, None, :]
        for adapter_block in self.text_adapter:
            context = adapter_block(context, text_mask)
        time_features = sinusoid(timestep, 256, self.time_max_period, self.time_factor)
        vec = self.time_in(time_features.to(context.dtype))
        if self.resolution_embedder is not None:
            vec = vec + self.resolution_embedder(height, width, vec)
        conditioning = Conditioning(vec, context, mask)
        for conditioner in self.conditioners.values():
            conditioning = conditioner(conditioning)
        return conditioning

    def _rotation(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the `cached_rotation` of an image's grid."""
        grid = (height // self.patch_size, width // self.patch_size)
        return cached_rotation(*grid, self._axes_dim, self._theta, device)

    def _keys(self, text_mask_BT: Tensor | None, num_image_tokens: int) -> KeyMask:
        """Return which keys image tokens attend to."""
        if text_mask_BT is None:
            return None
        blocks = self._flex_attention and text_mask_BT.is_cuda  # on the CPU it has no compiled backward pass
        return (key_blocks if blocks else key_mask)(text_mask_BT, num_image_tokens)
