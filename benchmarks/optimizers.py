"""Times the optimizer's step: batched Muon with fused AdamW against a loop over matrices, as Muon is usually published.

python benchmarks/muon.py --output benchmarks/results/muon-cpu.json

Both take the same gradients, in turns (AB BA …) and in one process, after their parameters were compared. The smallest size has
the structure of the 24-hour model and hardly any arithmetic: what it costs is the host's time.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import processor
from torch import Tensor, nn

from prx_composer.models import PRXBackbone
from prx_composer.optim.muon import Muon, muon_parameters

SIZES: dict[str, dict[str, Any]] = {
    "host time, 16 blocks": dict(hidden_size=8, num_heads=2, depth=16),
    "16 blocks, hidden 64": dict(hidden_size=64, num_heads=4, depth=16),
    "6 blocks, hidden 256": dict(hidden_size=256, num_heads=4, depth=6),
}


class Loop:
    """The same steps, one matrix and one tensor after the other."""

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95, steps: int = 5):
        self.matrices = list(muon_parameters(model).values())
        taken = {id(weight) for weight in self.matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)
        self.buffers = [torch.zeros_like(weight) for weight in self.matrices]
        self.lr, self.momentum, self.steps = lr, momentum, steps

    @torch.no_grad()
    def step(self) -> None:
        for weight, buffer in zip(self.matrices, self.buffers, strict=True):
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 1 - self.momentum)
            update = self.orthogonalise(weight.grad.lerp(buffer, self.momentum))
            weight.add_(update, alpha=-self.lr * 0.2 * max(weight.shape) ** 0.5)
        self.adamw.step()

    def orthogonalise(self, matrix: Tensor) -> Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(self.steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if tall else x


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def measure(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=64, **size)
    other = copy.deepcopy(model)
    ours, loop = Muon(model, lr=1e-3), Loop(other, lr=1e-3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        one.grad = two.grad = torch.randn_like(one)
    difference = 0.0
    for _ in range(3):
        ours.step()
        loop.step()
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        difference = max((one - two).abs().max().item() for one, two in pairs)
    if difference > 1e-4:
        raise SystemExit(f"After three steps parameters differ by {difference}: there is nothing to compare.")

    times: dict[str, list[float]] = {"batched": [], "loop": []}
    turns = [("batched", ours.step), ("loop", loop.step)]
    for number in range(rounds):
        for name, step in turns if number % 2 else turns[::-1]:
            times[name].append(milliseconds(step))
    result: dict[str, Any] = {**size, "matrices": len(loop.matrices), "largest_difference_after_3_steps": difference}
    for name, values in times.items():
        quarters = statistics.quantiles(values, n=4)
        result[name] = {"median_ms": round(quarters[1], 2), "quartiles_ms": [round(quarters[0], 2), round(quarters[2], 2)]}
    result["loop_over_batched"] = round(statistics.median(times["loop"]) / statistics.median(times["batched"]), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    result = {
        "what": "one step of the optimizer (Muon and AdamW) at fp32 on the CPU, milliseconds",
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "threads": arguments.threads,
        "versions": {"python": sys.version.split()[0], "torch": version("torch")},
        "command": " ".join(["python", *sys.argv]),
        "rounds": arguments.rounds,
        "sizes": {name: measure(size, arguments.rounds) for name, size in SIZES.items()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result["sizes"], indent=1) + "\n")


if __name__ == "__main__":
    main()
