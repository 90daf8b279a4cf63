"""What a training step costs, counted on the model's own modules: FLOPs by part, kernels, and bytes kept for the backward pass.

A copy of the model whose tensors have shapes and no content takes a step, forward and backward, under torch's own formulas.
Nothing is derived by hand: what a trick puts into the model is counted because it runs.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prx_composer.common.errors import UserError
from prx_composer.models.kernels import ENDS, FORMULAS, BlockRecorder, Kernel, Recorder, kernels_of

DENOISER, TEXT_ENCODER, AUTOENCODER = "denoiser", "text encoder", "autoencoder"

BatchShape = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # column → shape, with the batch first, and dtype


class CannotCount(Exception):
    """A network asks what its input holds, as those do that choose among experts: its work isn't known from shapes.

    Args:
        part: as in `StepCount.flops`.
    """

    def __init__(self, part: str, reason: str):
        super().__init__(reason)
        self.part = part


@dataclass(frozen=True)
class StepCount:
    """The cost of a training step, per image but for `copies` and `kernels`.

    Args:
        flops: forward and backward, of matrix products and convolutions; a multiply and an add are two. By part: the denoiser,
            the text encoder, the autoencoder, and each auxiliary loss by its name. A part without any is left out.
        kept: bytes that eager PyTorch keeps for the backward pass, without weights and their copies.
        copies: bytes of the 16-bit copies of weights that autocast makes once per forward pass and keeps.
        block_copies: what of them is of the backbone's blocks.
        blocks: for each of the backbone's blocks, bytes of its input, and what it keeps of `kept`.
        images: that the step was counted with. kernels: of all of it, if they were counted.
    """

    flops: dict[str, int]
    kept: int
    copies: int
    block_copies: int
    blocks: tuple[tuple[int, int], ...]
    images: int = 1
    kernels: tuple[Kernel, ...] = ()

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def kept_with_checkpoints(self) -> int:
        """Bytes kept if every block keeps its input alone and computes the rest again, one block at a time."""
        if not self.blocks:
            return self.kept
        inputs, inside = (sum(values) for values in zip(*self.blocks, strict=True))
        return self.kept - inside + inputs + max(kept for _, kept in self.blocks)


def shape_of(batch: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes of a batch's tensors."""
    return {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if isinstance(value, Tensor)}


class StepCounter:
    """Count training steps of a model, each shape of batch and set of active tricks once.

    The model is copied as it is now, with the tricks that are attached to it. It may lie on any device, the meta device too, but
    must not be sharded yet.

    Args:
        model: such as `TextToImage`.
        tricks: those whose windows open and close; see `Trick.set_active`.
        amp: count the bytes of a step under 16-bit autocast.
        graphs: names of the parts that `torch.compile` makes one graph of; `BLOCKS` for one of every block of the backbone. None:
            kernels are not counted, which saves time.
    """

    def __init__(self, model: nn.Module, tricks: Sequence[Any] = (), amp: bool = False, graphs: Collection[str] | None = None):
        self._fake, self._amp, self._graphs = FakeTensorMode(allow_non_fake_inputs=True), amp, graphs
        tokenizer = getattr(getattr(model, "text_encoder", None), "tokenizer", None)  # large, and has nothing to count
        self._model, self._tricks = _copied((model, tuple(tricks)), self._fake, {id(tokenizer): tokenizer})
        self._model.caption_dropout = 0.0  # the empty caption is encoded once, not in every step
        self._counts: dict[Any, StepCount] = {}

    def count(self, batch: BatchShape, active: Collection[str] = ()) -> StepCount:
        """Return the cost of a step.

        Args:
            batch: of a microbatch.
            active: names of the tricks that are on; the others are off.
        """
        active = frozenset(active) & {trick.name for trick in self._tricks}
        key = (tuple(sorted((name, shape, str(dtype)) for name, (shape, dtype) in batch.items())), active)
        if key not in self._counts:
            for trick in self._tricks:
                trick.set_active(self._model, trick.name in active)
            with self._fake, torch.compiler.set_stance("force_eager"):
                tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in batch.items()}
                with torch.autocast("cpu", torch.bfloat16, enabled=self._amp):
                    self._counts[key] = _Step(self._model, tensors, self._graphs).count()
        return self._counts[key]


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone, which FSDP2 shards as one unit each: none of a backbone that doesn't say."""
    is_block = getattr(backbone, "is_block", getattr(backbone, "fsdp_wrap_fn", lambda module: False))
    return [module for module in backbone.modules() if is_block(module)]


def flops_of_batch(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the FLOPs of training a model, as it is now, on a batch."""
    shapes = shape_of(batch)
    return len(batch["input_ids"]) * StepCounter(model).count(shapes).total_flops


def flops_of_backbone(backbone: Any, height: int, width: int, text_tokens: int, backward: bool = True) -> int:
    """Return the FLOPs of training the denoiser alone on one image.

    Args:
        backbone: such as `PRXBackbone`, on any device; with a router, as it draws now.
        height, width: of what the backbone sees: pixels, or places of a latent.
        text_tokens: padding included.
        backward: whether the backward pass is counted too.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied, _ = _copied((backbone, ()), fake)
    with fake, torch.compiler.set_stance("force_eager"), _Counter() as counter:
        image, text = torch.zeros(1, copied.in_channels, height, width), torch.zeros(1, text_tokens, copied.context_in_dim)
        route = None
        if copied.router is not None:
            route = copied.router.draw(1, copied.num_tokens(height, width), torch.Generator())
        pooled = {"pooled": torch.zeros(1, copied.pooled_dim)} if getattr(copied, "pooled_dim", 0) else {}
        prediction = copied(image, torch.zeros(1), text, torch.ones(1, text_tokens, dtype=torch.bool), route, **pooled)
        if backward:
            _gradients([prediction], list(copied.parameters()))
    return counter.flops


# ------------------------------------------------------------------------------------------------------ the pass


_CAST: Any = getattr(torch.ops.aten._to_copy, "default")  # noqa: B009 (types of torch.ops are not known)
_READ: Any = getattr(torch.ops.aten._local_scalar_dense, "default")  # noqa: B009
_SUM: Any = getattr(torch.ops.aten.sum, "dim_IntList")  # noqa: B009


class _Counter(TorchDispatchMode):
    """Add up FLOPs by torch's formulas, and remember the storage that was made, and which of it holds a copy of a weight.

    It is what torch's `FlopCounterMode` is, but for the modules, which that follows with hooks that `autograd.grad` cannot bear.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None, weights: Collection[tuple[int, ...]] = ()):
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in (given or {}).values()}
        self._weights = weights
        self._counts: dict[int, int] = {}  # storage of sums over masks → how many each can be at most
        self.flops = 0
        self.recorder: Recorder | None = None
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes its place
        self.copies: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _READ and args[0].dtype == torch.bool:
            return False  # networks ask whether a mask has no padding, so that it can be left out: in training it has
        if func is _READ and (most := self._counts.get(args[0].untyped_storage()._cdata)) is not None:
            return most  # they ask how many tokens are text: it is planned for as many as there can be
        if func is _CAST and args[0].device.type == "meta":  # a frozen network comes to its device, once in a run
            return func(*args, **kwargs)
        made, flops = func(*args, **kwargs), 0
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=made)
        self.flops += flops
        if func is _SUM and args[0].dtype == torch.bool:
            self._counts[made.untyped_storage()._cdata] = args[0].numel() // max(made.numel(), 1)
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self._note(one, func, args)
        if self.recorder is not None:
            self.recorder.note(func, args, kwargs, made, flops, func is _CAST and self._of_weight(args[0], made))
        return made

    def _of_weight(self, tensor: Tensor, made: Any) -> bool:
        """Return whether a cast is of a weight, or in the backward pass of a weight's gradient."""
        assert self.recorder is not None
        if self.recorder.backward:
            return tensor.dtype != torch.float32 == made.dtype and tuple(made.shape) in self._weights
        return made.untyped_storage()._cdata in self.copies

    def _note(self, tensor: Tensor, func: Any, args: Any) -> None:
        """Remember the storage of what was made, but for views of what was there before."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        before = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)]
        if storage._cdata in before:
            return
        if func is _CAST and before[0] not in self.storages and before[0] not in self._given:
            self.copies.add(storage._cdata)
        self.storages[storage._cdata] = storage


class _Step:
    """One step of a model without content, whose parts are counted as they begin and end."""

    def __init__(self, model: Any, batch: Mapping[str, Tensor], graphs: Collection[str] | None):
        self._model, self._batch, self._images = model, batch, len(batch["input_ids"])
        self._counter = _Counter(batch, {tuple(p.shape) for p in model.parameters() if p.ndim > 1})
        self._recorder = BlockRecorder(graphs or (), AUTOENCODER, DENOISER)
        self._counter.recorder = None if graphs is None else self._recorder
        self._flops = {DENOISER: 0}
        self._kept: dict[int, int | None] = {}  # storage → the block that first kept it
        self._part = ""  # that was begun last
        self._block: int | None = None
        self._inputs: list[int] = []

    def count(self) -> StepCount:
        model, parts = self._model, {DENOISER: self._model.backbone, TEXT_ENCODER: self._model.text_encoder}
        losses = model.auxiliary_losses.named()
        with self._counter, self._hooked(parts | losses):
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                with self._counted(AUTOENCODER):  # what is neither of the others
                    outputs = self._attempt(model, self._batch)
                cut = dataclasses.replace(
                    outputs, prediction=_leaf(outputs.prediction), taps={i: _leaf(tap) for i, tap in outputs.taps.items()}
                )
                terms = self._attempt(model.loss, cut, self._batch)
            for tensor in (outputs.prediction, outputs.clean, outputs.noise, outputs.noised, outputs.text.embedding):
                self._keep(tensor)
            self._recorder.backward = True
            if "flow" in terms:
                self._gradients([terms["flow"]], [cut.prediction])
            self._backward(outputs, cut, {name: terms[name] for name in losses if name in terms})
        self._recorder.on = False
        storages, copies = self._counter.storages, self._counter.copies
        sizes = {one: (storages[one].nbytes(), block) for one, block in self._kept.items() if one not in copies}
        inside = [sum(size for size, block in sizes.values() if block == index) for index in range(len(self._inputs))]
        return StepCount(
            flops={name: flops // self._images for name, flops in self._flops.items() if flops},
            kept=sum(size for size, _ in sizes.values()) // self._images,
            copies=sum(storages[one].nbytes() for one in self._kept if one in copies),
            block_copies=sum(storages[one].nbytes() for one, block in self._kept.items() if one in copies and block is not None),
            blocks=tuple((given // self._images, kept // self._images) for given, kept in zip(self._inputs, inside, strict=True)),
            images=self._images,
            kernels=self._kernels(),
        )

    def _kernels(self) -> tuple[Kernel, ...]:
        found = kernels_of(self._recorder.ops)
        if not self._flops.get(AUTOENCODER):  # that works on pixels
            found = [dataclasses.replace(one, part=ENDS) if one.part == AUTOENCODER else one for one in found]
        return tuple(found)

    def _backward(self, outputs: Any, cut: Any, terms: Mapping[str, Tensor]) -> None:
        """Count the losses' passes, each down to what it read of the backbone, then the backbone's and the text encoder's."""
        model, text = self._model, outputs.text.embedding
        read = [cut.prediction, *cut.taps.values()]
        for name, term in terms.items():
            with self._counted(name):
                self._gradients([term], [*read, *model.auxiliary_losses[name].parameters()])
        apart = {*model.text_encoder.parameters(), *model.auxiliary_losses.parameters()}
        with self._counted(DENOISER):
            found = [outputs.prediction, *outputs.taps.values()]
            self._gradients(found, [text, *(p for p in model.parameters() if p not in apart)])
        with self._counted(TEXT_ENCODER):
            self._gradients([text], list(model.text_encoder.parameters()))

    def _gradients(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Have gradients computed; the first ones, of the outputs, are no part of the step."""
        self._recorder.on = False
        first = [torch.zeros_like(output) for output in outputs]
        self._recorder.on = True
        _gradients(outputs, inputs, first)

    def _attempt(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except UserError:
            raise
        except Exception as error:  # whatever a network's code raises
            network = getattr(getattr(self._model, self._part.replace(" ", "_"), None), "network", None)
            name = getattr(getattr(network, "config", None), "model_type", self._part)
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise CannotCount(self._part, f"the FLOPs of {name} cannot be counted from its configuration ({reason})") from error

    @contextmanager
    def _counted(self, part: str) -> Iterator[None]:
        """Count as a part's what is done inside of this context and is not another part's meanwhile."""
        before, self._part = self._counter.flops - sum(self._flops.values()), part
        outer, self._recorder.part = self._recorder.part, part
        yield
        self._recorder.part = outer
        counted = self._counter.flops - sum(self._flops.values()) - before
        self._flops[part] = self._flops.get(part, 0) + counted

    @contextmanager
    def _hooked(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count forward passes of the parts as theirs, and note which of the backbone's blocks is at work."""
        handles, opened = list[Any](), list[Any]()

        def enter(name: str, *_: Any) -> None:
            opened.append(self._counted(name))
            opened[-1].__enter__()

        def leave(*_: Any) -> None:
            opened.pop().__exit__(None, None, None)

        for name, module in parts.items():
            begin = module.register_forward_pre_hook(partial(enter, name))
            handles += [begin, module.register_forward_hook(leave)]
        for index, block in enumerate(blocks_of(self._model.backbone)):
            begin = block.register_forward_pre_hook(partial(self._enter_block, index), with_kwargs=True)
            handles += [begin, block.register_forward_hook(self._leave_block)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_block(self, index: int, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._block = index
        self._inputs.append(next(iter((*given, *named.values()))).nbytes)
        self._recorder.begin_block(index)

    def _leave_block(self, *_: Any) -> None:
        self._block = None
        self._recorder.end_block()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage in self._counter.storages:  # weights and the batch were there before
            self._kept.setdefault(storage, self._block)
        return tensor


def _copied(original: tuple[Any, Any], fake: FakeTensorMode, shared: dict[int, Any] | None = None) -> tuple[Any, Any]:
    """Copy a module and what refers to it, without content, as if on the CPU; what is `shared` stays the same object."""
    with fake, FakeCopyMode(fake):
        module, other = copy.deepcopy(original, shared or {})
        module.to("cpu").train()
    for part in module.modules():
        vars(part).pop("forward", None)  # a compiled one is still that of the original
    return module, other


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], first: Sequence[Tensor] | None = None) -> None:
    given = first or [torch.zeros_like(output) for output in outputs]
    pairs = [(output, own) for output, own in zip(outputs, given, strict=True) if output.requires_grad]
    inputs = [one for one in inputs if one.requires_grad]
    if pairs and inputs:
        torch.autograd.grad([output for output, _ in pairs], inputs, [own for _, own in pairs], allow_unused=True)
