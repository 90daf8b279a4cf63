"""What routing saves: a training step's forward and backward, dense and with TREAD, interleaved in one process.

python benchmarks/routing.py --output benchmarks/results/routing-cpu.json

Both are the same weights; before timing, the routed pass is held against one computed by hand from the dense blocks.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from interleaved import ratio, summary, time_in_turns
from record import circumstances

from prx_composer.models import PRXBackbone
from prx_composer.models.routing import RandomRouter, Route


def check_agreement(backbone: PRXBackbone, inputs: tuple[torch.Tensor, ...], route: Route) -> float:
    """Largest difference between the routed pass with every token kept and the dense one."""
    tokens = backbone.num_tokens(*inputs[0].shape[-2:])
    everything = Route(route.start, route.end, torch.arange(tokens).expand(len(inputs[0]), -1))
    with torch.no_grad():
        return float((backbone(*inputs, route=everything) - backbone(*inputs)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    sizes = dict(hidden_size=arguments.hidden_size, depth=arguments.depth, num_heads=arguments.hidden_size // 64)
    backbone = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=256, **sizes)
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    batch, text_tokens = arguments.batch_size, arguments.text_tokens
    inputs = (torch.randn(batch, 3, 64, 64), torch.rand(batch), torch.randn(batch, text_tokens, 256))
    router = RandomRouter("tread", 2, arguments.depth - 1, arguments.rate)  # all but the first two and the last block
    generator = torch.Generator().manual_seed(0)
    route = router.draw(batch, 256, generator)
    assert route is not None
    difference = check_agreement(backbone, inputs, route)

    def step(routed: bool) -> None:
        backbone.zero_grad()
        drawn = router.draw(batch, 256, generator) if routed else None
        backbone(*inputs, route=drawn).square().mean().backward()

    times = time_in_turns({"dense": lambda: step(False), "tread": lambda: step(True)}, arguments.rounds)
    flops = [backbone.flops(256, text_tokens, training=True)]
    backbone.router = router
    flops.append(backbone.flops(256, text_tokens, training=True))
    result = {
        "what": "forward + backward of 256 image tokens, dense against TREAD over all but the first two and the last block",
        **circumstances(),
        "threads": torch.get_num_threads(),
        "largest_difference_with_every_token_kept": difference,
        "milliseconds": {name: summary(values, 1) for name, values in times.items()},
        "ratio": ratio(times, "dense", "tread"),
        "ratio_of_flops": round(flops[0] / flops[1], 3),
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
