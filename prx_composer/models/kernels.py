"""The kernels of a training step, recorded while it runs on tensors without content: what each computes, reads and writes.

An operation of an eager part is a kernel: it reads its inputs and writes its outputs; a view is none. In a compiled part,
operations between matrix products are fused by a rule that stands for inductor's scheduler, whose count of one block it is
compared with (`benchmarks/roofline.py fusion`):

- What depends on the same products, and is connected, is one kernel. It reads what it gets from outside, and writes what is
  needed outside.
- A sum over all but the last dimension is a kernel of its own: it goes through its input in another order.
- The backward pass computes again what costs no more to compute than to keep and read.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MATMUL, CONVOLUTION, OTHER = "matrix products", "convolutions", "other kernels"
ATTENTION, MASKED_ATTENTION = "attention", "attention with a mask"
BLOCKS, ENDS = "blocks", "noise, ends and flow loss"  # of the denoiser alone; and what is neither of them nor another part

_AUTOGRAD: Any = torch.autograd  # whose numbers of nodes are not in its types
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "lift_fresh", "detach"}
_GATHERS = {"embedding", "index", "gather", "index_select"}  # they read as much as they write, whatever the table's size
_OVERWRITES = {"copy_", "fill_", "zero_", "index_copy_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "random_"}
_SUMS = {"sum", "mean", "amax", "amin", "var_mean", "var", "linalg_vector_norm", "any", "all"}


class Value(NamedTuple):
    """What of a storage is read or written: its bytes, those of broadcast dimensions counted once."""

    storage: int
    place: tuple[int, int]  # first element, and how many
    bytes: int
    whole: int  # of the storage

    @classmethod
    def of(cls, tensor: Tensor) -> "Value":
        storage = tensor.untyped_storage()
        count = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        place = (int(tensor.storage_offset()), count)
        return cls(storage._cdata, place, count * tensor.element_size(), storage.nbytes())


class Op(NamedTuple):
    """One operation, as it was asked for.

    Args:
        shape: of a matrix product: rows, columns, and how many of them at once.
        graph: which compiled graph it is in; empty: none, it is eager.
        weight: it casts a weight, or the gradient of one.
    """

    kind: str
    flops: int
    read: tuple[Value, ...]
    written: tuple[Value, ...]
    dtype: torch.dtype
    shape: tuple[int, int, int]
    part: str
    graph: str
    backward: bool
    sums: str  # "", "rows": over the last dimension alone, "columns"
    weight: bool


@dataclass(frozen=True)
class Kernel:
    """What the device runs at once: operations of one part. See `Op` for the fields."""

    part: str
    kind: str
    flops: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, int, int]
    backward: bool = False
    weight: bool = False


class Recorder:
    """Notes the operations of a step.

    Attributes:
        part, graph, backward: of what is done now. on: whether it is noted.
    """

    def __init__(self, part: str = "", graph: str = "", backward: bool = False):
        self.ops: list[Op] = []
        self._held: list[torch.UntypedStorage] = []  # so that no other takes its place
        self.part, self.graph, self.backward, self.on = part, graph, backward, True

    def note(self, func: Any, args: Any, options: Any, made: Any, flops: int, weight: bool = False) -> None:
        """Note an operation by its inputs and what it made, unless it is a view or makes nothing."""
        name: str = func.overloadpacket.__name__
        outputs = _tensors(made)
        if not self.on or name in _FREE or not outputs:
            return
        inputs = _tensors(args)
        if not func._schema.is_mutable:
            before = {tensor.untyped_storage()._cdata for tensor in inputs}
            outputs = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in before]
            if not outputs:
                return
        if name in _OVERWRITES:
            inputs = inputs[len(inputs) // 2 :] if name.startswith("_foreach") else inputs[1:]
        self._held += [tensor.untyped_storage() for tensor in outputs]
        read, written = ([Value.of(tensor) for tensor in tensors] for tensors in (inputs, outputs))
        if name in _GATHERS:
            most = sum(value.bytes for value in written)
            read = [value._replace(bytes=min(value.bytes, most)) for value in read]
        kind, shape = _kind(name, flops, options.get("attn_mask") is not None), outputs[0].shape
        rows, columns = shape[-2:] if len(shape) > 1 else (1, shape[-1] if shape else 1)
        matrix = (rows, columns, prod(shape[:-2])) if kind == MATMUL else (0, 0, 0)
        self.ops.append(
            Op(
                kind, flops, tuple(read), tuple(written), outputs[0].dtype, matrix, self.part, self.graph, self.backward,
                _sums(name, args, inputs, outputs), weight,
            )
        )  # fmt: skip


class BlockRecorder(Recorder):
    """Knows in the backward pass too which of the backbone's blocks an operation is of: autograd's nodes are numbered.

    Args:
        graphs: parts that are compiled; `BLOCKS` for each block by itself.
        part: what is done in no other part. denoiser: the name of the denoiser's part, which is told apart.
    """

    def __init__(self, graphs: Collection[str], part: str, denoiser: str):
        super().__init__(part)
        self._denoiser = denoiser
        self._graphs, self._block, self._begun = graphs, "", 0
        self._nodes: list[tuple[int, int, str]] = []

    def begin_block(self, index: int) -> None:
        self._block, self._begun = f"{BLOCKS} {index}", _AUTOGRAD._get_sequence_nr()

    def end_block(self) -> None:
        self._nodes.append((self._begun, _AUTOGRAD._get_sequence_nr(), self._block))
        self._block = ""

    def note(self, func: Any, args: Any, options: Any, made: Any, flops: int, weight: bool = False) -> None:
        outer, block = self.part, self._block
        if outer == self._denoiser:
            node: Any = torch._C._current_autograd_node() if self.backward else None
            if node is not None:
                number = node._sequence_nr()
                block = next((name for first, end, name in self._nodes if first <= number < end), "")
            self.graph = block if block and BLOCKS in self._graphs else self._denoiser if self._denoiser in self._graphs else ""
            self.part = BLOCKS if block else ENDS
        else:
            self.graph = outer if outer in self._graphs else ""
        super().note(func, args, options, made, flops, weight)
        self.part = outer


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of softmax(q·kᵀ)·v."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """Return those of the gradients of both factors of both products; what a kernel computes again is not counted."""
    return 2 * _attention_flops(query, key, value)


def _convolution_backward_flops(gradient: Tensor, image: Tensor, weight: Tensor, *others: Any, **__: Any) -> int:
    """Return those of the gradients that are asked for, each as many as forward; torch's own forgets groups in the weight's."""
    *_, transposed, _, _, wanted = others
    return 2 * prod((image if transposed else gradient).shape[2:]) * image.shape[0] * weight.numel() * sum(wanted[:2])


FORMULAS: dict[Any, Any] = flop_registry | {  # torch's formulas are of the kernels of GPUs alone
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Watching(TorchDispatchMode):
    """Has a recorder note what is done inside of this context, with the FLOPs by torch's formulas."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made, formula = func(*args, **kwargs), FORMULAS.get(func.overloadpacket)
        self._recorder.note(func, args, kwargs, made, formula(*args, **kwargs, out_val=made) if formula else 0)
        return made


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [one for part in given for one in _tensors(part)] if isinstance(given, tuple | list) else []


def _kind(name: str, flops: int, masked: bool) -> str:
    if "attention" in name:
        return MASKED_ATTENTION if masked else ATTENTION
    return CONVOLUTION if "convolution" in name else MATMUL if flops else OTHER


def _sums(name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    if name not in _SUMS or not inputs or outputs[0].numel() >= inputs[0].numel():
        return ""
    dims = next((one for one in args[1:] if isinstance(one, tuple | list)), args[1:2])
    last = inputs[0].ndim - 1
    return "rows" if dims and all(isinstance(dim, int) and dim % (last + 1) == last for dim in dims) else "columns"


# ---------------------------------------------------------------------------------------------------------- fusion


def kernels_of(ops: Sequence[Op]) -> list[Kernel]:
    """Return the kernels of a step's operations: those of graphs fused, the others as they are."""
    fusion, kernels = _Fusion(ops), []
    for index, op in enumerate(ops):
        if not op.graph or op.kind != OTHER:
            reads = fusion.reads_of([index]) if op.graph else op.read
            kernels.append(_kernel([op], reads, op.written))
    return kernels + fusion.fused()


def _kernel(ops: Sequence[Op], read: Iterable[Value], written: Iterable[Value]) -> Kernel:
    first = ops[0]
    size = _bytes(read) + _bytes(written)
    weight = all(op.weight for op in ops)
    return Kernel(first.part, first.kind, sum(op.flops for op in ops), size, first.dtype, first.shape, first.backward, weight)


def _bytes(values: Iterable[Value]) -> int:
    """Return the bytes of values, what is named twice once."""
    distinct = {(value.storage, value.place): value for value in values}
    by_storage: dict[int, list[Value]] = defaultdict(list)
    for value in distinct.values():
        by_storage[value.storage].append(value)
    return sum(min(sum(one.bytes for one in own), max(own[0].whole, own[0].bytes)) for own in by_storage.values())


class _Fusion:
    """What a compiler makes of the operations in graphs."""

    def __init__(self, ops: Sequence[Op]):
        self._ops = ops
        self._inputs: list[list[tuple[Value, int | None]]] = []  # of each operation, with which one made it
        self._users: dict[int, list[int]] = defaultdict(list)
        made_by: dict[int, int] = {}
        for index, op in enumerate(ops):
            self._inputs.append([(value, made_by.get(value.storage)) for value in op.read])
            for _, maker in self._inputs[-1]:
                if maker is not None:
                    self._users[maker].append(index)
            made_by |= {value.storage: index for value in op.written}
        self._component = self._components()
        self._kept: set[int] = set()  # operations whose results are written for someone who would otherwise not need them

    def _in_graph(self, index: int) -> bool:
        return bool(self._ops[index].graph) and self._ops[index].kind == OTHER

    def _together(self, one: int, two: int) -> bool:
        """Return whether two operations are of the same pass of the same graph."""
        a, b = self._ops[one], self._ops[two]
        return (a.graph, a.backward) == (b.graph, b.backward)

    def _components(self) -> dict[int, int]:
        """Return which kernel each fused operation is in, by the number of one of its members."""
        level: dict[int, int] = {}
        parent: dict[int, int] = {}
        shared: dict[tuple[Any, ...], int] = {}

        def root(index: int) -> int:
            while parent[index] != index:
                parent[index] = index = parent[parent[index]]
            return index

        for index, op in enumerate(self._ops):
            if not op.graph:
                continue
            own = 0
            for _, maker in self._inputs[index]:
                if maker is not None and self._together(maker, index):
                    after = self._ops[maker].kind != OTHER or self._ops[maker].sums == "columns"
                    own = max(own, level[maker] + after)
            level[index] = own
            if not self._in_graph(index):
                continue
            parent[index] = index
            columns = op.sums == "columns"
            for value, maker in self._inputs[index]:
                fits = maker is not None and maker in parent and self._together(maker, index) and level[maker] == own
                if fits and maker is not None and columns == (self._ops[maker].sums == "columns"):
                    parent[root(maker)] = root(index)
                key = (op.graph, op.backward, own, columns, value.storage)
                if value.bytes * 4 > value.whole and (other := shared.setdefault(key, index)) != index:
                    parent[root(other)] = root(index)
        return {index: root(index) for index in parent}

    def _can_repeat(self, index: int) -> bool:
        """Return whether what an operation makes can be computed again inside of another kernel."""
        return self._in_graph(index) and not self._ops[index].sums

    def _is_written(self, index: int) -> bool:
        """Return whether what a fused operation makes is needed by what is not fused with it, and so lies in memory."""
        if index in self._kept:
            return True
        own, users = self._ops[index], self._users[index]
        if not users:
            return own.backward  # a gradient that is handed out
        for user in users:
            op = self._ops[user]
            if op.graph != own.graph or op.kind != OTHER:
                return True
            if op.backward == own.backward and op.sums != "columns" and self._component[user] != self._component[index]:
                return True
        return bool(own.sums) and any(self._component[user] != self._component[index] for user in users)

    def _sources(self, index: int, seen: set[int]) -> list[tuple[Value, int | None]]:
        """Return what must be read to compute an operation's result again; what has been `seen` on the way isn't repeated."""
        found: list[tuple[Value, int | None]] = []
        for value, maker in self._inputs[index]:
            foreign = maker is None or self._ops[maker].graph != self._ops[index].graph
            if maker is None or foreign or not self._can_repeat(maker) or self._is_written(maker):
                found.append((value, maker))
            elif maker not in seen:
                seen.add(maker)
                found += self._sources(maker, seen)
        return found

    def reads_of(self, members: Sequence[int]) -> list[Value]:
        """Return what a kernel reads, and note what must be kept for it."""
        inside, found, open_ = set(members), list[Value](), list[tuple[Value, int]]()
        fuses = self._in_graph(members[0])
        for index in members:
            for value, maker in self._inputs[index]:
                if maker in inside:
                    continue
                if maker is None or not fuses or not self._can_repeat(maker) or self._is_written(maker):
                    found.append(value)
                    if maker is not None and self._in_graph(maker):
                        self._kept.add(maker)
                else:
                    open_.append((value, maker))
        for value, maker in open_:
            sources = self._sources(maker, set())
            more = _bytes([*found, *(source for source, _ in sources)]) - _bytes(found)
            if more > 2 * value.bytes:
                sources = [(value, maker)]
            found += [source for source, _ in sources]
            self._kept |= {index for _, index in sources if index is not None and self._in_graph(index)}
        return found

    def fused(self) -> list[Kernel]:
        """Return the kernels of what is fused, backward passes first: they say what forward passes must keep."""
        members: dict[int, list[int]] = defaultdict(list)
        for index, component in self._component.items():
            members[component].append(index)
        order = sorted(
            members.values(), key=lambda own: (self._ops[own[0]].sums == "columns", self._ops[own[0]].backward), reverse=True
        )
        reads = [(own, self.reads_of(own)) for own in order]
        kernels = []
        for own, read in reads:
            written = [value for index in own if self._is_written(index) for value in self._ops[index].written]
            if written:  # or nobody needs it
                kernels.append(_kernel([self._ops[index] for index in own], read, written))
        return kernels
