"""Trains a recipe with several seeds and writes what each scored: does the number hold, or was it one lucky seed?

python benchmarks/seeds.py yamls/quickstart.yaml --seeds 17 1 2 3 --output benchmarks/results/quickstart-seeds.json

Several files, and key=value, are merged as train.py does. Seeds that have been trained already (runs/<name>-seed<n>) are not
trained again.
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
    parser.add_argument("recipe", nargs="+", help="YAML files and key=value, as for train.py")
    parser.add_argument("--name", help="of the runs, before -seed<n>; by default the first file's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2, 3])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_intermixed_args()

    runs = []
    for seed in arguments.seeds:
        name = f"{arguments.name or Path(arguments.recipe[0]).stem}-seed{seed}"
        command = ["composer", "train.py", *arguments.recipe, f"seed={seed}", f"run_name={name}"]
        subprocess.run(command, check=True)
        lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
        first, last = (json.loads(lines[index]) for index in (0, -1))
        told: dict[str, Any] = {key: first[key] for key in first if "accuracy" in key} | last
        scores = {key: told[key] for key in told if "accuracy" in key or key in ("batch", "train_seconds", "loss/train/total")}
        runs.append({"seed": seed, "command": " ".join(command), **scores})

    result = {
        "what": f"final scores of {' '.join(arguments.recipe)} by seed",
        **circumstances(),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
