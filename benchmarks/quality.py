"""Is quality paid for speed? Trains the quickstart with Muon on every fast path and on none, and compares what they score.

python benchmarks/quality.py --seeds 17 1 2 --output benchmarks/results/quality.json

Fast: our network compiled, Muon in stacks, fused AdamW, our Trainer. Plain: `plain_path.py`. Both start from the same weights and
see the same batches with the same noise. Both have EMA's one call for all tensors, whose arithmetic is that of a loop.
A run that has been trained already (runs/quality-<path>-seed<n>) is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from composer import Trainer
from record import circumstances

from prx_composer.recipe import config
from prx_composer.training import run as train_module

RECIPE = ["yamls/quickstart.yaml", "yamls/ablations/muon.yaml", "progress_bar=false", "callbacks.images=false"]
PATHS = {
    "fast": ["model.compile=true"],
    "plain": [
        "code_paths=[benchmarks/plain_path.py]",
        "model.backbone.name=plain_prx",
        "optimizer.name=plain_muon",
        "preflight=false",
    ],
}


def train(path: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What a run scored, in a process of its own."""
    folder = Path("runs", f"quality-{path}-seed{seed}")
    settings = [f"seed={seed}", f"run_name={folder.name}", *overrides]
    subprocess.run([sys.executable, __file__, "--train", path, *RECIPE, *PATHS[path], *settings], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {key: rows[-1][key] for key in ("heldout_accuracy", "metrics/eval/mse", "train_seconds")}
    return {"path": path, "seed": seed, "first_loss": rows[0]["loss/train/total"], **found}


def run_here(path: str, arguments: list[str]) -> None:
    if path == "plain":
        setattr(train_module, "Trainer", Trainer)  # noqa: B010 - Composer's own, for this process
    train_module.run(config.load(arguments))


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        run_here(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    arguments = parser.parse_intermixed_args()
    runs = [train(path, seed, arguments.overrides) for seed in arguments.seeds for path in PATHS]
    scores = {path: [run["heldout_accuracy"] for run in runs if run["path"] == path] for path in PATHS}
    result = {
        "what": "held-out accuracy of the quickstart with Muon, on every fast path and on none",
        **circumstances(),
        "fast_minus_plain_by_seed": [round(a - b, 4) for a, b in zip(scores["fast"], scores["plain"], strict=True)],
        "mean_accuracy": {path: round(statistics.mean(values), 4) for path, values in scores.items()},
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
