"""Muon for the blocks' matrices and AdamW for everything else, as one optimizer."""
# pyright: reportPrivateImportUsage=false

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from prx_composer.optim import parameter_groups
from prx_composer.optim.exchange import Exchange, Plan, Stack, local, make_plans
from prx_composer.optim.newton_schulz import Coefficients, flops, newton_schulz

_IN_BLOCK = re.compile(r"(^|\.)blocks\.\d+(\.|$)")
_FUSED_PROJECTIONS = {"img_qkv_proj": 3, "txt_kv_proj": 2}  # rows ordered (q k v | k v, head, channel)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALL = 1e-10  # added to roots that may be 0

Update = tuple[Stack, list[int], Tensor]  # indices of k weights, and this rank's shards of their updates: (k, rows, columns)


def muon_parameters(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the trained matrices that Muon is for: 2-D weights of layers inside blocks.

    Of a model with a `backbone` only that is searched. Blocks are what its `is_block` or `fsdp_wrap_fn` names, or without one
    what is in a module list called `blocks`. Embedding tables are no linear maps and stay out.

    Args:
        model: what is trained, before or after wrapping.
        exclude: parts of names that keep a parameter out, such as "modulation.lin".

    Returns:
        Full parameter name → parameter.

    Raises:
        ValueError: no matrix, or an entry of `exclude` that keeps nothing out.
    """
    backbone = getattr(model, "backbone", None)
    root, prefix = (backbone, "backbone") if isinstance(backbone, nn.Module) else (model, "")
    is_block, block = getattr(root, "is_block", getattr(root, "fsdp_wrap_fn", None)), "no block yet"
    found: dict[str, nn.Parameter] = {}
    for path, module in root.named_modules(prefix=prefix):  # a block before what is in it
        block = f"{path}." if is_block is not None and is_block(module) else block
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) or weight is None or not weight.requires_grad:
            continue
        if weight.ndim == 2 and (path.startswith(block) if is_block is not None else _IN_BLOCK.search(path)):
            found[f"{path}.weight"] = weight
    if not found:
        raise ValueError("muon found no matrix to train: it looks for 2-D weights named `blocks.<i>.….weight`. Use adamw.")
    for part in exclude:
        if not any(part in name for name in found):
            raise ValueError(f"exclude: {part!r} is part of no matrix's name, such as {next(iter(found))}.")
    kept = {name: weight for name, weight in found.items() if not any(part in name for part in exclude)}
    if not kept:
        raise ValueError(f"exclude {list(exclude)} keeps every matrix out of Muon. Use adamw.")
    return kept


class _How(NamedTuple):
    """What the recipe says and no checkpoint holds."""

    coefficients: Coefficients = "jordan"
    dtype: torch.dtype | None = None
    neuron_beta2: float | None = None  # None: rows stay as they are


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices, fused AdamW for the rest.

    Keller Jordan 2024, "Muon: An optimizer for hidden layers in neural networks", with the update scale of Liu et al. 2025,
    "Muon is Scalable for LLM Training" (arXiv:2502.16982, §2.2). For a matrix W with gradient G:
    M ← μM + (1−μ)G, and with Nesterov's step N = μM + (1−μ)G, else N = M; W ← (1 − lr·weight_decay)·W − lr·scale·UVᵀ(N).

    NorMuon (Li et al. 2025, arXiv:2510.05491) divides every row of O = UVᵀ(N), a neuron's, by the root of its second moment
    v ← β₂v + (1−β₂)·mean(O²), and gives the matrix the norm back that it had. A step with a rate of 0 leaves v alone.

    It is made for matrices that map one dense activation to another, whose update should have one size in every direction
    (see `muon_parameters`). Gains and biases have no singular values; an embedding table is looked up row by row, so mixing
    rows makes no sense; and the first and last layers face pixels, text features and noise, whose coordinates differ in scale for
    a reason. Those get AdamW, and so does a group added later without `"algorithm"`.

    Every rank iterates its share of the matrices (`prx_composer.optim.exchange`), in bf16, on the CPU in fp32; momentum and
    moments are sharded as the parameters are. No step waits for the device.

    Args:
        model: what is trained.
        lr: Muon's step. With scale rms the update's root mean square is about 0.2·lr per entry, as AdamW's is, so that a
            learning rate found for AdamW carries over; with spectral it is the update's spectral norm for a square matrix.
        momentum: share of the buffer that is kept per step, in [0, 1).
        nesterov: look ahead by one step of momentum.
        newton_schulz_steps: iterations of `newton_schulz`.
        newton_schulz_dtype: bf16 or fp16, of the iteration; None: that in which matrices travel, see above. In fp16 wide
            matrices are iterated on by their XXᵀ, which is less work.
        coefficients: of the iteration, jordan or polar_express.
        normuon: even the rows out, see above; it keeps one number per row.
        neuron_beta2: decay of NorMuon's second moment per step, in [0, 1).
        scale: rms: 0.2·√max(rows, columns); spectral: √max(1, rows / columns).
        weight_decay: per step, as a fraction of the learning rate; on matrices only, AdamW's too.
        adam_lr: AdamW's learning rate per step; None: `lr`.
        adam_betas: decay of AdamW's first and second moment per step.
        adam_eps: added to the root of AdamW's second moment.
        split_heads: orthogonalise the fused query, key and value projections head by head.
        split_qkv: orthogonalise them as one matrix of queries, one of keys and one of values.
        exclude: parts of parameter names that get AdamW though they are matrices of a block.

    Raises:
        ValueError: an argument out of its range, or no matrix for Muon. At the first step: a sharding that isn't supported.
    """

    _how = _How()
    _plans: list[Plan] = []  # for the groups and parameters in `_planned`
    _planned: list[tuple[int, int]] = []

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        scale: Literal["rms", "spectral"] = "rms",
        weight_decay: float = 0.0,
        adam_lr: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        split_heads: bool = False,
        exclude: list[str] | None = None,
        split_qkv: bool = False,
        coefficients: Coefficients = "jordan",
        newton_schulz_dtype: Literal["bf16", "fp16"] | None = None,
        normuon: bool = False,
        neuron_beta2: float = 0.95,
    ):
        adam_lr = lr if adam_lr is None else adam_lr
        for name, value in dict(lr=lr, weight_decay=weight_decay, adam_lr=adam_lr, adam_eps=adam_eps).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number ≥ 0, not {value}.")
        for name, value in dict(momentum=momentum, neuron_beta2=neuron_beta2).items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {value}.")
        if not isinstance(newton_schulz_steps, int) or newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps must be a whole number ≥ 1, not {newton_schulz_steps}.")
        for name, value, allowed in (
            ("scale", scale, ("rms", "spectral")),
            ("coefficients", coefficients, ("jordan", "polar_express")),
            ("newton_schulz_dtype", newton_schulz_dtype or "bf16", _DTYPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, not {value!r}.")
        if split_heads and split_qkv:
            raise ValueError("split_heads splits queries, keys and values already: leave split_qkv out.")
        if len(adam_betas) != 2 or not all(0 <= beta < 1 for beta in adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), not {list(adam_betas)}.")
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of parts of names, such as [{exclude}].")

        matrices = muon_parameters(model, exclude or ())
        split = split_heads or split_qkv
        pieces = _matrices_per_weight(model, matrices, split_heads) if split else dict.fromkeys(matrices, 1)
        of_muon = dict(algorithm="muon", lr=lr, momentum=momentum, nesterov=nesterov, newton_schulz_steps=newton_schulz_steps)
        of_muon |= dict(scale=scale, weight_decay=weight_decay)
        groups: list[dict[str, Any]] = [
            {"params": [weight for name, weight in matrices.items() if pieces[name] == count], **of_muon, "pieces": count}
            for count in sorted(set(pieces.values()))  # matrices in the rows of one weight
        ]
        taken = {id(weight) for weight in matrices.values()}
        for group in parameter_groups(model, weight_decay):
            if rest := [parameter for parameter in group["params"] if id(parameter) not in taken]:
                groups.append({**group, "params": rest, "algorithm": "adamw"})
        defaults = dict(algorithm="adamw", lr=adam_lr, betas=tuple(adam_betas), eps=adam_eps, weight_decay=weight_decay)
        super().__init__(groups, defaults | {"fused": True})  # with `fused`, load_state_dict keeps `step` on the device
        dtype = _DTYPES[newton_schulz_dtype] if newton_schulz_dtype else None
        self._how = _How(coefficients, dtype, neuron_beta2 if normuon else None)  # in no group: old checkpoints lack it

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_how": self._how}

    def work(self, rows: int, columns: int) -> int:
        """Return the FLOPs of orthogonalising one matrix, all iterations together."""
        steps = next(group["newton_schulz_steps"] for group in self.param_groups if group["algorithm"] == "muon")
        return flops(rows, columns, steps, self._how.dtype or torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first_at_rest = not self.state and not any(group["lr"] for group in self.param_groups)
        matrices: list[tuple[int, nn.Parameter]] = []
        for index, group in enumerate(self.param_groups):
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["algorithm"] == "muon":
                matrices.extend((index, parameter) for parameter in trained)
            else:
                self._adamw(group, trained)
        for plan in self._plans_of(matrices):
            self._muon(plan)
        if first_at_rest:
            self._forget_empty_step()
        return loss

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _forget_empty_step(self) -> None:
        """Take back a first step with zero gradients, by which torch.distributed.checkpoint makes states.

        It must not count as a step to Adam's bias correction.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        size = torch.stack(torch._foreach_norm([local(p.grad) for p in parameters], 1)).sum()
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            dist.all_reduce(size)
        for parameter in parameters:
            if "step" in self.state[parameter]:
                self.state[parameter]["step"].mul_(size != 0)

    def _plans_of(self, matrices: list[tuple[int, nn.Parameter]]) -> list[Plan]:
        """Return the plans, made anew when other parameters have gradients, or are in other groups."""
        key = [(index, id(parameter)) for index, parameter in matrices]
        if key != self._planned:
            pieces = [group.get("pieces", 1) for group in self.param_groups]
            weights = [(index, pieces[index], weight) for index, weight in matrices]
            self._plans, self._planned = make_plans(weights, self.work), key
        return self._plans

    def _muon(self, plan: Plan) -> None:
        moving: list[tuple[Stack, list[Tensor], list[Tensor]]] = []
        for stack in plan.stacks:
            for weight in stack.weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                    if self._how.neuron_beta2 is not None:
                        self.state[weight]["row_second_moment"] = _zero_per_row(weight)
            gradients = [local(weight.grad) for weight in stack.weights]
            momenta = [local(self.state[weight]["momentum_buffer"]) for weight in stack.weights]
            torch._foreach_lerp_(momenta, gradients, 1 - self.param_groups[stack.group]["momentum"])
            moving.append((stack, gradients, momenta))
        if not any(self.param_groups[stack.group]["lr"] for stack in plan.stacks):
            return

        exchanges = [Exchange(part) for part in plan.parts]
        for exchange in exchanges:
            for stack, gradients, momenta in moving:
                group = self.param_groups[stack.group]
                members, places = exchange.to_send(stack)
                if members:
                    updates = [momenta[i] for i in members]
                    if group["nesterov"]:
                        updates = torch._foreach_lerp([gradients[i] for i in members], updates, group["momentum"])
                    torch._foreach_copy_(places, updates)
            exchange.send()
        for before, exchange in zip([None, *exchanges], exchanges, strict=False):
            exchange.work(self._orthogonalise)
            if before is not None:  # it has come back while this rank worked
                before.pass_on()
        exchanges[-1].pass_on()
        back: Iterable[Update] = (  # each waits for its part alone
            (stack, *some) for exchange in exchanges for stack in plan.stacks for some in exchange.received(stack)
        )
        if self._how.neuron_beta2 is not None:
            back = self._even_rows(plan, list(back), self._how.neuron_beta2)
        for stack, members, some in back:
            self._apply(stack, members, list(some))

    def _even_rows(self, plan: Plan, updates: list[Update], beta2: float) -> list[Update]:
        """Divide every row by the root of its second moment, and bring each matrix back to the norm that it had."""
        inverses: list[Tensor] = []
        squares: list[tuple[Stack, Tensor]] = []  # of rows, before and after: (2, k, rows)
        for stack, members, some in updates:
            moments = [local(self.state[stack.weights[i]]["row_second_moment"]) for i in members]
            before = torch.linalg.vector_norm(some, dim=-1).square()
            torch._foreach_lerp_(moments, list((before / stack.columns).unsqueeze(-1)), 1 - beta2)
            inverses.append(1 / (torch.stack(moments).squeeze(-1).sqrt() + _SMALL))
            squares.append((stack, torch.stack([before, before * inverses[-1].square()])))
        for (stack, _, some), inverse, rows in zip(updates, inverses, plan.gather_rows(squares), strict=True):
            before, after = rows.unflatten(-1, (stack.pieces, -1)).sum(-1).sqrt()
            back = (before / (after + _SMALL)).repeat_interleave(stack.rows // stack.pieces, dim=-1)
            some.mul_((inverse * plan.own_rows(stack, back)).unsqueeze(-1))
        return updates

    def _apply(self, stack: Stack, members: list[int], updates: list[Tensor]) -> None:
        group = self.param_groups[stack.group]
        rows, columns = stack.rows // stack.pieces, stack.columns
        scale = 0.2 * max(rows, columns) ** 0.5 if group["scale"] == "rms" else max(1, rows / columns) ** 0.5
        weights = [local(stack.weights[i]) for i in members]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)

    def _orthogonalise(self, stack: Stack, weights: Tensor) -> Tensor:
        matrices = weights.unflatten(1, (stack.pieces, -1))
        steps = self.param_groups[stack.group]["newton_schulz_steps"]
        return newton_schulz(matrices, steps, self._how.coefficients, self._how.dtype).flatten(1, 2)


def _zero_per_row(weight: nn.Parameter) -> Tensor:
    """Return a zero for every row, (rows, 1), sharded as the weight is."""
    own = local(weight)
    zeros = own.new_zeros(len(own), 1)
    if not isinstance(weight, DTensor):
        return zeros
    whole = torch.Size((weight.shape[0], 1))
    return DTensor.from_local(zeros, weight.device_mesh, weight.placements, run_check=False, shape=whole, stride=(1, 1))


def _matrices_per_weight(model: nn.Module, matrices: dict[str, nn.Parameter], by_head: bool) -> dict[str, int]:
    """Return how many matrices each weight holds: 3 or 2 in a fused projection; by head, × `num_heads` of its owner."""
    pieces = dict.fromkeys(matrices, 1)
    for name in matrices:
        *owner, projection, _ = name.split(".")
        heads = getattr(model.get_submodule(".".join(owner)), "num_heads", None) if by_head else 1
        if projection in _FUSED_PROJECTIONS and heads is not None:
            pieces[name] = _FUSED_PROJECTIONS[projection] * heads
    if set(pieces.values()) == {1}:
        option, owner = ("split_heads", " in a module with `num_heads`") if by_head else ("split_qkv", "")
        raise ValueError(f"{option} needs projections named {' or '.join(_FUSED_PROJECTIONS)}{owner}.")
    return pieces
