"""Any transformer of diffusers as a backbone: its own class computes, from random weights, with the seams of `PRXBackbone`.

What differs between classes is in their signatures. Taps and routes are forward hooks, which stay on blocks for one call.

Shape suffixes: B batch, C channels, H and W image size, N image tokens, T text tokens, D hidden size, K kept tokens, S a block's
tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.common.outlines import CannotTell
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.compiling import compile_by_size
from prx_composer.models.routing import Route, Router, TokenFusion, merge_tokens, select_tokens
from prx_composer.models.signatures import TEXT_LABEL, BlockList, Inputs, Signature


class DiffusersBackbone(nn.Module):
    """A class of diffusers, such as `SD3Transformer2DModel`, in the place of `PRXBackbone`.

    Args:
        class: its name; there must be a signature for it.
        Its other arguments are the class's own.

    Seams are those of `PRXBackbone`, but for `conditioners`.

    Attributes:
        model: diffusers' own module.
        signature: what is known of its class.
        pooled_dim: channels of the pooled text that it takes; 0: none.
        time_size: channels of the time vector, `TIME_VECTOR`; 0: there is none.

    Raises:
        ValueError: sizes that don't fit together, and what a resumed run could not repeat.
        UserError: no such class, or none with a signature.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        self.class_name: str = arguments.pop("class", "")
        with suppress(CannotTell):  # what can be known is that it is there
            registry.constructor_in_diffusers(self.class_name, "model.backbone.class")
        self.signature: Signature = registry.signatures.get(self.class_name, "model.backbone.class")()
        self.model: Any = (self.signature.model or getattr(diffusers, self.class_name))(**arguments)
        config, signature = self.model.config, self.signature
        self.config = {key: value for key, value in config.items() if not key.startswith("_")}
        self.patch_size: int = max(config["patch_size"], 2 if signature.packs else 1)
        packed, drawn = (self.patch_size**2, config["patch_size"] ** 2) if signature.packs else (1, 1)  # channels of a pixel
        self.in_channels: int = config["in_channels"] // packed
        self.out_channels: int = (config.get("out_channels") or config["in_channels"]) * drawn // packed
        self.hidden_size: int = signature.hidden_size(config)
        self.time_size: int = 0 if isinstance(signature.time_vector, str) else signature.time_size(self.hidden_size)
        self.context_argument = signature.text_argument(config)
        self.context_in_dim: int = config[self.context_argument] if self.context_argument else TEXT_LABEL
        self.pooled_argument = signature.pooled_width
        self.pooled_dim: int = config[self.pooled_argument] if self.pooled_argument else 0
        if self.context_argument is None:
            self.num_labels: int = config["num_embeds_ada_norm"]
        self._check()
        self.router: Router | None = None
        self.fusion: TokenFusion | None = None
        self.taps: tuple[int, ...] = ()
        self.conditioners = ()  # there is no place for one
        self.reset_parameters()

    def _check(self) -> None:
        config, signature = self.config, self.signature
        for name in signature.equal_width:
            if config[name] not in (None, self.hidden_size):
                raise ValueError(f"{name} is {config[name]}, but must be the hidden size, which is {self.hidden_size}.")
        dropout = config.get("dropout")
        if any(dropout) if isinstance(dropout, (list, tuple)) else dropout:
            raise ValueError(f"dropout: {config['dropout']} draws what a resumed run would not draw again; set it to 0.0.")
        for module in self.model.modules():  # a caption that is dropped has the empty one's label
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0

    def reset_parameters(self) -> None:
        """Initialise as DiT: Xavier for matrices, zero where a block must start as the identity; the rest as diffusers does."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                begins = any(name == end or ("." in end and name.endswith(f".{end}")) for end in self.signature.zeros)
                (nn.init.zeros_ if begins else nn.init.xavier_uniform_)(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.signature.initialise(self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, of all lists in the order in which they compute."""
        return [block for block, _ in self.listed_blocks()]

    def listed_blocks(self) -> list[tuple[nn.Module, BlockList]]:
        """Return the blocks, each with its list."""
        return [(block, of) for of in self.signature.blocks for block in self._blocks_at(of.path)]

    def _blocks_at(self, path: str) -> list[nn.Module]:
        """Return the blocks of a list, or of the lists that are in it."""
        entries: Any = self.model.get_submodule(path)
        return [block for entry in entries for block in (entry if isinstance(entry, nn.ModuleList) else [entry])]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def block_layers(self) -> list[str]:
        """Ends of the names of the blocks' linear layers but their modulation, which are those that LoRA adapts."""
        linear = (name for block in self._all_blocks() for name, module in block.named_modules() if isinstance(module, nn.Linear))
        return list(dict.fromkeys(name for name in linear if not name.startswith(self.signature.modulation)))

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens; raise ValueError for a size that the class cannot take."""
        return self._grid(height, width)[0] * self._grid(height, width)[1]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"An image of {height}×{width} is not divisible by patch_size {self.patch_size}.")
        if self.signature.square_only and height != width:
            raise ValueError(f"{self.class_name} takes square images only, not {height}×{width}.")
        most, grid = self.signature.most_patches(self.config), (height // self.patch_size, width // self.patch_size)
        if most is not None and max(grid) > most:
            raise ValueError(
                f"{self.class_name} has positions for {most} patches on a side here, and {grid[0]}×{grid[1]} are more."
            )
        return grid

    def _all_blocks(self) -> list[nn.Module]:
        return self.blocks + [block for path in self.signature.also for block in self._blocks_at(path)]

    def compile_graphs(self, per_block: bool, activation_memory_budget: float = 1.0, flex_attention: bool = False) -> None:
        """Let `torch.compile` make a graph of every block's forward pass, for each image size when it is first met.

        Args:
            per_block: must be true.
            activation_memory_budget: see `PRXBackbone.compile_graphs`.
            flex_attention: must be false.

        Raises:
            ValueError: one of these isn't.
        """
        if not per_block:
            raise ValueError(
                "model.compile: true makes one graph, and seams are hooks between blocks; set model.compile: blocks."
            )
        if flex_attention:
            raise ValueError(f"model.attention: flex is for the backbone prx; {self.class_name} attends by its own code.")
        partitioner: Any = torch._functorch.config  # pyright: ignore[reportAttributeAccessIssue]
        partitioner.activation_memory_budget = activation_memory_budget
        for block in self._all_blocks():
            block.forward = compile_by_size(block.forward)

    def is_block(self, module: nn.Module) -> bool:
        """Return whether a submodule is a block, of `signature.also` too."""
        return any(module is block for block in self._all_blocks())

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Tell Composer's FSDP, which asks for every submodule, that each block is a unit of sharding, but for a borrowed one."""
        return self.is_block(module) and not (self.signature.borrows_first_block and module is self.blocks[0])

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        route: Route | None = None,
        return_taps: bool = False,
        pooled: Tensor | None = None,
    ) -> Any:
        """Predict from a noised image; arguments and what is returned are as of `PRXBackbone.forward`.

        Channels of the output beyond the image's, as of a learned variance, are left out.

        Args:
            pooled: (B, pooled_dim), of the text; for the classes that take one.
        """
        x = self._inputs(hidden_states, timestep, encoder_hidden_states, attention_mask, pooled)
        signature = self.signature
        with _Hooks(self, x, route).attached() as taps:
            output = self.model(**signature.inputs(x), return_dict=False)[0]
        if signature.packs:
            output = _unpack(output, *x.grid, self.patch_size)
        prediction = signature.prediction(output[:, : self.in_channels])
        return (prediction, taps) if return_taps else prediction

    def _inputs(self, image: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Inputs:
        grid, batch_size = self._grid(*image.shape[-2:]), image.shape[0]
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        text = text * mask[..., None]  # classes without a mask see padding: the same, whoever encodes
        pooled = text.new_zeros(batch_size, 0) if pooled is None else pooled
        image = _pack(image, self.patch_size) if self.signature.packs else image
        return Inputs(image, timestep.expand(batch_size), text, mask, pooled, grid, self.config)


class _Hooks:
    """Taps, route and fusion of one call of a backbone.

    In a block's sequence of S tokens n are of the image, from `first` (B, 1) on; the others are text.
    """

    def __init__(self, backbone: DiffusersBackbone, x: Inputs, route: Route | None):
        self._backbone, self._route, self._fusion = backbone, route, backbone.fusion
        self._grid, self._tokens = x.grid, x.grid[0] * x.grid[1]
        self._first = backbone.signature.first_image_token(x)
        self._early: Tensor | None = None  # (B, N, D), what enters the first routed block
        self.taps: dict[int, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[dict[int, Tensor]]:
        """Give the taps, which are filled when the backbone has been called inside of this context."""
        routed, handles = self._route or self._fusion, list[Any]()
        start, end = (routed.start, routed.end) if routed is not None else (-1, -1)
        time = self._backbone.signature.time_vector
        try:
            if TIME_VECTOR in self._backbone.taps and not isinstance(time, str):
                embedder = self._backbone.model.get_submodule(time[0])
                handles.append(embedder.register_forward_hook(partial(self._tap_time, time[1])))
            for index, (block, of) in enumerate(self._backbone.listed_blocks()):
                if start <= index < end:
                    handles.append(block.register_forward_pre_hook(partial(self._enter, of, index == start), with_kwargs=True))
                if index in self._backbone.taps or index == end - 1:
                    handles.append(block.register_forward_hook(partial(self._leave, of, index, index == end - 1)))
            yield self.taps
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, of: BlockList, first: bool, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        del given["self"]
        if first:
            self._early = self._split(of, given["hidden_states"], self._tokens)[1]
        if self._route is None:
            return None
        for name in (*(("hidden_states",) if first else ()), *of.positions):
            if given.get(name) is not None:
                given[name] = self._without_skipped(of, given[name], self._route.kept_indices)
        return (), given

    def _leave(self, of: BlockList, index: int, last: bool, block: nn.Module, args: Any, output: Any) -> Any:
        tokens = output if of.output is None else output[of.output]
        tokens = self._in_rows(tokens, index) if of.grid else tokens
        kept = None if self._route is None or not self._is_routed(index) else self._route.kept_indices
        text, image = self._split(of, tokens, self._tokens if kept is None else kept.shape[1])
        if index in self._backbone.taps:
            self._check_width(image, index, self._backbone.hidden_size)
            self.taps[index] = image
        if not last or self._early is None:
            return None
        self._check_width(self._early, routed.start if (routed := self._route or self._fusion) else index, image.shape[-1])
        if self._fusion is not None:
            image = self._fusion(self._early, image, kept)
        elif kept is not None:
            assert self._route is not None
            skipped = torch.zeros_like(self._early) if self._route.discard else self._early
            image = merge_tokens(skipped.type_as(image), image, kept)
        tokens = self._joined(text, image)
        return tokens if of.output is None else (*output[: of.output], tokens, *output[of.output + 1 :])

    def _in_rows(self, tokens: Tensor, index: int) -> Tensor:
        """Return (B, N, D) of (B, D, rows, columns)."""
        if tokens.shape[-2:] != self._grid:
            here, finest = (f"{rows}×{columns}" for rows, columns in (tokens.shape[-2:], self._grid))
            raise ValueError(f"Tokens at block {index} are {here}, and {finest} are needed: tap a block of the finest level.")
        return tokens.flatten(2).mT

    @staticmethod
    def _check_width(tokens: Tensor, index: int, width: int) -> None:
        if tokens.shape[-1] != width:
            raise ValueError(
                f"Tokens at block {index} are {tokens.shape[-1]} wide, and {width} are needed: blocks that are tapped or routed "
                "must be as wide as the backbone."
            )

    def _tap_time(self, place: int | None, module: nn.Module, args: Any, output: Any) -> None:
        self.taps[TIME_VECTOR] = output if place is None else output[place]

    def _is_routed(self, index: int) -> bool:
        return self._route is not None and self._route.start <= index < self._route.end

    def _without_skipped(self, of: BlockList, tokens: Tensor, kept_indices: Tensor) -> Tensor:
        rows = tokens.flatten(2) if tokens.ndim > 2 else tokens[..., None]
        text, image = self._split(of, rows, self._tokens)
        return (
            self._joined(text, select_tokens(image, kept_indices)).unflatten(2, tokens.shape[2:])
            if tokens.ndim > 2
            else (self._joined(text, select_tokens(image, kept_indices))[..., 0])
        )

    def _places(self, tokens: Tensor, text: int, image: int) -> tuple[Tensor, Tensor]:
        """Return where text (B, S − n) and image tokens (B, n) stand in a sequence."""
        first = tokens.new_full((tokens.shape[0], 1), text, dtype=torch.int64) if self._first is None else self._first
        before = torch.arange(text, device=tokens.device)
        return before + image * (before >= first), first + torch.arange(image, device=tokens.device)

    def _split(self, of: BlockList, tokens: Tensor, image: int) -> tuple[Tensor | None, Tensor]:
        """Return the text tokens (B, S − n, D), None where a block has none, and the image tokens (B, n, D)."""
        if not of.joint:
            return None, tokens
        of_text, of_image = self._places(tokens, tokens.shape[1] - image, image)
        return select_tokens(tokens, of_text), select_tokens(tokens, of_image)

    def _joined(self, text: Tensor | None, image: Tensor) -> Tensor:
        if text is None:
            return image
        of_text, of_image = self._places(image, text.shape[1], image.shape[1])
        empty = image.new_zeros(image.shape[0], text.shape[1] + image.shape[1], image.shape[2])
        return merge_tokens(merge_tokens(empty, text, of_text), image, of_image)


def _pack(image_BCHW: Tensor, side: int) -> Tensor:
    """Return (B, N, C·side²): the pixels of a patch as channels, in FLUX's order."""
    return F.pixel_unshuffle(image_BCHW, side).flatten(2).mT


def _unpack(tokens: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Return (B, C, H, W): the inverse of `_pack`."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), side)
