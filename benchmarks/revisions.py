"""Is a training step slower than it was? The same step by two revisions of this repository, interleaved.

python benchmarks/revisions.py --base 8949c6d --output benchmarks/results/all-off.json

Each revision is imported by a process of its own, which makes a step of the quickstart's model when it is told to; the two
take turns, and start from the same weights. Their losses are compared before their times.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import circumstances

ROOT = Path(__file__).resolve().parents[1]

# Only what both revisions have: the model, its loss, the optimizer.
WORKER = """
import sys, time, torch
from prx_composer.models import FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.text_encoder import train_tokenizer
from prx_composer.optim.groups import AdamW

torch.manual_seed(0)
tokenizer = train_tokenizer(["a red circle on the left of a white background"])
t5 = dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0)
text_encoder = HuggingFaceTextEncoder(tokenizer, config=t5, max_tokens=14, trainable=True)
backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=128, depth=4, num_heads=4, context_in_dim=128)
model = TextToImage(backbone, text_encoder, FlowMatching())
optimizer = AdamW(model, lr=1e-3)
image = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
batch = {"image": image, **text_encoder.tokenize(["a red circle"] * 64)}
for line in sys.stdin:
    for _ in range(int(line)):
        started = time.perf_counter()
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        elapsed = time.perf_counter() - started
        print(elapsed, loss.item(), flush=True)
"""


class Worker:
    """A process that has imported one revision."""

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", WORKER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """(seconds, loss) of so many steps."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        rows = [self._process.stdout.readline().split() for _ in range(count)]
        return [(float(seconds), float(loss)) for seconds, loss in rows]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="revision to compare the checkout with")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(base), arguments.base], cwd=ROOT, check=True, capture_output=True
        )
        workers = {"base": Worker(base), "now": Worker(ROOT)}
        try:
            first = {name: [loss for _, loss in worker.steps(5)] for name, worker in workers.items()}
            ratios, times = [], {"base": [], "now": []}
            for number in range(arguments.rounds):
                turn = {}
                for name in sorted(workers, reverse=bool(number % 2)):
                    turn[name] = statistics.median(seconds for seconds, _ in workers[name].steps(arguments.steps))
                    times[name].append(1000 * turn[name])
                ratios.append(turn["now"] / turn["base"])
        finally:
            for worker in workers.values():
                worker.close()
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True, capture_output=True)
    ratios.sort()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    result = {
        "what": "training step of the quickstart's model with all algorithms off, now against an earlier revision",
        **circumstances(),
        "revisions": {"base": arguments.base, "now": revision.stdout.strip()},
        "equal_losses": first["base"] == first["now"],
        "base_ms": round(statistics.median(times["base"]), 2),
        "now_ms": round(statistics.median(times["now"]), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-len(ratios) // 4], 4)],
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
