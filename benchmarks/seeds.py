"""Trains a recipe with several seeds and writes what each scored: does the number hold, or was it one lucky seed?

python benchmarks/seeds.py yamls/quickstart.yaml --seeds 17 1 2 3 --output benchmarks/results/quickstart-seeds.json

Seeds that have been trained already (runs/<recipe>-seed<n>) are not trained again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import circumstances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2, 3])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    arguments = parser.parse_intermixed_args()

    runs = []
    for seed in arguments.seeds:
        name = f"{arguments.recipe.stem}-seed{seed}"
        command = ["composer", "train.py", str(arguments.recipe), f"seed={seed}", f"run_name={name}", *arguments.overrides]
        subprocess.run(command, check=True)
        last: dict[str, Any] = json.loads(Path("runs", name, "metrics.jsonl").read_text().splitlines()[-1])
        scores = {key: last[key] for key in last if "accuracy" in key or key in ("batch", "train_seconds", "loss/train/total")}
        runs.append({"seed": seed, "command": " ".join(command), **scores})

    result = {
        "what": f"final scores of {arguments.recipe} by seed",
        **circumstances(),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
