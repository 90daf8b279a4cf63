"""The part of a step after the backward pass: optimizer and weight average, ours against the ways they are usually written.

An entry of `compare.py`. The smallest size has the structure of the 24-hour model and hardly any arithmetic: what it costs is the
host's time. Parameters and averages are compared after three steps, before anything is timed.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from interleaved import ratio, summary, time_in_turns
from plain_path import orthogonalise
from torch import nn

from prx_composer.algorithms.ema import WeightAverage
from prx_composer.models import PRXBackbone
from prx_composer.optim.muon import Muon, muon_parameters

__all__ = ["compare_optimizers"]

SIZES: dict[str, dict[str, Any]] = {
    "host time, 16 blocks": dict(hidden_size=8, num_heads=2, depth=16),
    "16 blocks, hidden 64": dict(hidden_size=64, num_heads=4, depth=16),
    "6 blocks, hidden 256": dict(hidden_size=256, num_heads=4, depth=6),
}
SMOOTHING = 0.999
TOLERANCE = 1e-4
LR = 1e-3


class Loop:
    """Muon as it is usually published, one matrix after the other, and AdamW and EMA one tensor after the other."""

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95):
        self.model = model
        self.matrices = list(muon_parameters(model).values())
        taken = {id(weight) for weight in self.matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)
        self.buffers = [torch.zeros_like(weight) for weight in self.matrices]
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self.lr, self.momentum = lr, momentum

    @torch.no_grad()
    def step(self) -> None:
        for weight, buffer in zip(self.matrices, self.buffers, strict=True):
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 1 - self.momentum)
            update = orthogonalise(weight.grad.lerp(buffer, self.momentum))
            weight.add_(update, alpha=-self.lr * 0.2 * max(weight.shape) ** 0.5)
        self.adamw.step()
        for average, parameter in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(SMOOTHING).add_(parameter, alpha=1 - SMOOTHING)


class Ours:
    def __init__(self, model: nn.Module):
        self.optimizer, self.average = Muon(model, lr=LR), WeightAverage(model)

    def step(self) -> None:
        self.optimizer.step()
        self.average.update(SMOOTHING)


class TorchMuon:
    """torch's own Muon, where there is one (from 2.9 on), with fused AdamW and our average."""

    def __init__(self, model: nn.Module):
        matrices = list(muon_parameters(model).values())
        taken = {id(weight) for weight in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        muon: Any = vars(torch.optim)["Muon"]
        self.optimizers = [muon(matrices, lr=LR, weight_decay=0.0), torch.optim.AdamW(rest, lr=LR, fused=True)]
        self.average = WeightAverage(model)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(SMOOTHING)


class FusedAdamW:
    """No Muon at all: the least that a step costs."""

    def __init__(self, model: nn.Module):
        self.optimizer, self.average = torch.optim.AdamW(model.parameters(), lr=LR, fused=True), WeightAverage(model)

    def step(self) -> None:
        self.optimizer.step()
        self.average.update(SMOOTHING)


def compare_optimizers(rounds: int) -> dict[str, Any]:
    return {name: _measure(size, rounds) for name, size in SIZES.items()}


def _measure(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=64, **size)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]

    def trained() -> nn.Module:
        one = copy.deepcopy(model)
        for parameter, gradient in zip(one.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        return one

    ours, loop = Ours(trained()), Loop(trained(), LR)
    differences = _agreement(ours, loop)
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"After three steps they differ by {differences}: there is nothing to compare.")
    steps: dict[str, Callable[[], None]] = {"ours": ours.step, "loop": loop.step, "AdamW, fused": FusedAdamW(trained()).step}
    if hasattr(torch.optim, "Muon"):
        steps["torch.optim.Muon"] = TorchMuon(trained()).step
    times = time_in_turns(steps, rounds)
    return {
        **size,
        "matrices": len(loop.matrices),
        "largest_difference_after_3_steps": differences,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratios": {f"{name} / ours": ratio(times, name, "ours") for name in steps if name != "ours"},
    }


def _agreement(ours: Ours, loop: Loop) -> dict[str, float]:
    for _ in range(3):
        ours.step()
        loop.step()
    mine = ours.average.parameters.values()
    weights = max(float((a - b).abs().max()) for a, b in zip(mine, loop.model.parameters(), strict=True))
    averages = max(float((a - b).abs().max()) for a, b in zip(ours.average.average.values(), loop.average, strict=True))
    return {"weights": weights, "averages": averages}
