"""Muon for the blocks' matrices and AdamW for everything else, as one optimizer."""
# pyright: reportPrivateImportUsage=false

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from prx_composer.optim import parameter_groups
from prx_composer.optim.exchange import Exchange, Plan, Stack, local, make_plans

_QUINTIC = (3.4445, -4.7750, 2.0315)
_WIDE = 1.5  # long side / short side from which iterating on XXᵀ is less work, at five steps
_IN_BLOCK = re.compile(r"(^|\.)blocks\.\d+(\.|$)")
_FUSED_PROJECTIONS = {"img_qkv_proj": 3, "txt_kv_proj": 2}  # rows ordered (q k v | k v, head, channel)


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return nearly U·Vᵀ of every matrix U·Σ·Vᵀ, without an SVD, in the dtype of the input.

    Divided by its Frobenius norm, a matrix has singular values in [0, 1]. X ← aX + b(XXᵀ)X + c(XXᵀ)²X sends each of them to
    p(σ) = aσ + bσ³ + cσ⁵ and leaves U and V alone. Jordan's (a, b, c) buy a steep slope at 0, 3.4445 per step, with the
    exactness at 1: after five steps no singular value is above 1.203, and those that were at least 0.0016 of the norm are
    above 0.68 and keep moving in between. More steps lift smaller ones, and bring none closer to 1.
    All factors commute, so that the steps can also be made on the smaller XXᵀ alone, collected in P, and X multiplied by P at the
    end: less work for matrices that are wider than 1.5 times their height. It needs XXᵀ to be exact to far below the smallest σ²
    that matters, which it is in fp32 and not in bf16, where the products stay with X.

    Args:
        matrices: (..., m, n), floating point. One whose norm is far below 1e-12 comes out small, zero as zero.
        steps: iterations, each 4·s²·l + 2·s³ FLOPs for the short side s and the long side l, or 8·s³ on XXᵀ.

    Returns:
        (..., m, n); tall matrices come out transposed in memory.
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=1e-12)).to(matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    short, long = sorted(x.shape[-2:])
    if x.dtype in (torch.float32, torch.float64) and long > _WIDE * short and steps > 1:
        polynomial = _gram_polynomial(torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT), steps)
        return (torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)).view(matrices.shape)
    a, b, c = _QUINTIC
    x = x.mT if tall else x
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).view(matrices.shape)


def _gram_polynomial(gram: Tensor, steps: int) -> Tensor:
    """Return the P of Newton–Schulz's P·X from G = XXᵀ, (..., s, s): with Q = aI + bG + cG², P ← Q·P and G ← Q·G·Q."""
    a, b, c = _QUINTIC

    def factor_of(gram: Tensor) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # rather than to every product, for which each would be copied once more
        return factor

    product = factor = factor_of(gram)
    for _ in range(steps - 1):
        gram = torch.bmm(factor, torch.bmm(factor, gram))
        factor = factor_of(gram)
        product = torch.bmm(factor, product)
    return product


def muon_parameters(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the trained matrices that Muon is for: 2-D weights of layers inside a module list called `blocks`.

    Of a model with a `backbone` only that is searched. Embedding tables are no linear maps and stay out.

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
    found: dict[str, nn.Parameter] = {}
    for path, module in root.named_modules(prefix=prefix):
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding) or weight is None or not weight.requires_grad:
            continue
        if weight.ndim == 2 and _IN_BLOCK.search(path):
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


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices, fused AdamW for the rest.

    Keller Jordan 2024, "Muon: An optimizer for hidden layers in neural networks", with the update scale of Liu et al. 2025,
    "Muon is Scalable for LLM Training" (arXiv:2502.16982, §2.2). For a matrix W with gradient G:
    M ← μM + (1−μ)G, and with Nesterov's step N = μM + (1−μ)G, else N = M; W ← (1 − lr·weight_decay)·W − lr·scale·UVᵀ(N).

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
        scale: rms: 0.2·√max(rows, columns); spectral: √max(1, rows / columns).
        weight_decay: per step, as a fraction of the learning rate; on matrices only, AdamW's too.
        adam_lr: AdamW's learning rate per step; None: `lr`.
        adam_betas: decay of AdamW's first and second moment per step.
        adam_eps: added to the root of AdamW's second moment.
        split_heads: orthogonalise the fused query, key and value projections head by head.
        exclude: parts of parameter names that get AdamW though they are matrices of a block.

    Raises:
        ValueError: an argument out of its range, or no matrix for Muon. At the first step: a sharding that isn't supported.
    """

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
    ):
        adam_lr = lr if adam_lr is None else adam_lr
        for name, value in dict(lr=lr, weight_decay=weight_decay, adam_lr=adam_lr, adam_eps=adam_eps).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number ≥ 0, not {value}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}.")
        if not isinstance(newton_schulz_steps, int) or newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps must be a whole number ≥ 1, not {newton_schulz_steps}.")
        if scale not in ("rms", "spectral"):
            raise ValueError(f"scale must be rms or spectral, not {scale!r}.")
        if len(adam_betas) != 2 or not all(0 <= beta < 1 for beta in adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), not {list(adam_betas)}.")
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of parts of names, such as [{exclude}].")

        matrices = muon_parameters(model, exclude or ())
        pieces = _matrices_per_weight(model, matrices) if split_heads else dict.fromkeys(matrices, 1)
        groups: list[dict[str, Any]] = [
            dict(
                params=[weight for name, weight in matrices.items() if pieces[name] == count],
                algorithm="muon",
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                newton_schulz_steps=newton_schulz_steps,
                scale=scale,
                weight_decay=weight_decay,
                pieces=count,  # matrices in the rows of one weight
            )
            for count in sorted(set(pieces.values()))
        ]
        taken = {id(weight) for weight in matrices.values()}
        for group in parameter_groups(model, weight_decay):
            if rest := [parameter for parameter in group["params"] if id(parameter) not in taken]:
                groups.append({**group, "params": rest, "algorithm": "adamw"})
        defaults = dict(algorithm="adamw", lr=adam_lr, betas=tuple(adam_betas), eps=adam_eps, weight_decay=weight_decay)
        super().__init__(groups, defaults | {"fused": True})  # with `fused`, load_state_dict keeps `step` on the device

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
            self._plans, self._planned = make_plans([(index, pieces[index], weight) for index, weight in matrices]), key
        return self._plans

    def _muon(self, plan: Plan) -> None:
        moving: list[tuple[Stack, list[Tensor], list[Tensor]]] = []
        for stack in plan.stacks:
            for weight in stack.weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
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
        for exchange in exchanges:
            for stack in plan.stacks:
                self._apply(stack, *exchange.received(stack))

    def _apply(self, stack: Stack, members: list[int], updates: list[Tensor]) -> None:
        if not members:
            return
        group = self.param_groups[stack.group]
        rows, columns = stack.rows // stack.pieces, stack.columns
        scale = 0.2 * max(rows, columns) ** 0.5 if group["scale"] == "rms" else max(1, rows / columns) ** 0.5
        weights = [local(stack.weights[i]) for i in members]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)

    def _orthogonalise(self, stack: Stack, weights: Tensor) -> Tensor:
        matrices = weights.unflatten(1, (stack.pieces, -1))
        return newton_schulz(matrices, self.param_groups[stack.group]["newton_schulz_steps"]).flatten(1, 2)


def _matrices_per_weight(model: nn.Module, matrices: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return how many matrices each weight holds: 3 or 2 × `num_heads` of the module that owns a fused projection."""
    pieces = dict.fromkeys(matrices, 1)
    for name in matrices:
        *owner, projection, _ = name.split(".")
        heads = getattr(model.get_submodule(".".join(owner)), "num_heads", None)
        if projection in _FUSED_PROJECTIONS and heads is not None:
            pieces[name] = _FUSED_PROJECTIONS[projection] * heads
    if set(pieces.values()) == {1}:
        raise ValueError(f"split_heads needs projections named {' or '.join(_FUSED_PROJECTIONS)} in a module with `num_heads`.")
    return pieces
