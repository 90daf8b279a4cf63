"""Do run folders and exports of an older commit still open, draw the same, and go on as they would have?

    python benchmarks/old_runs.py make FOLDER BEFORE
    python benchmarks/old_runs.py open FOLDER AFTER [--output FILE.json]

`make` has a checkout BEFORE train, export, and be killed in the middle of a run, as same_behaviour.yaml says under `old_runs`,
and writes beside that what BEFORE itself makes of it. `open` gives a copy of FOLDER to another checkout and compares: pictures
bit for bit, exported tensors and configurations, the losses of what goes on, and that every report is written.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from record import circumstances
from same_behaviour import Checkout, Result, differences, prepare

SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("same_behaviour.yaml").read_text())
CASES: dict[str, Any] = SETTINGS["old_runs"]
PROMPTS = "a red circle on the left of a white background\na blue square on the right of a black background\n"


def make(folder: Path, before: Checkout) -> list[str]:
    """Fill a new folder and return what went wrong."""
    folder.mkdir(parents=True)
    prepare(folder, before, before.algorithms(), SETTINGS)
    (folder / "prompts.txt").write_text(PROMPTS)
    made = before.results(folder, CASES["made"], CASES["two_ranks"])
    for name, lines in CASES["killed"].items():
        kill(before, folder, before.command(name, lines[0]), folder / "runs" / name / "metrics.jsonl")
    expected = opened(folder, before)
    (folder / "expected.json").write_text(json.dumps({"by": before.commit, "opened": expected}))
    return [f"{name}: {result['error']}" for name, result in (made | expected).items() if "error" in result]


def kill(checkout: Checkout, folder: Path, command: list[str], metrics: Path, batch: int = 6) -> None:
    """Train until a batch is logged, and end the run as the system would."""
    process = checkout.start(folder, "python", *command)
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < batch):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def opened(folder: Path, checkout: Checkout) -> dict[str, Result]:
    """Return what a checkout makes of a copy of the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(folder, copy)
        return checkout.results(copy, CASES["opened"], CASES["two_ranks"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "open"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    checkout = Checkout(asked.checkout)
    if asked.what == "make":
        wrong = make(asked.folder.resolve(), checkout)
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return int(bool(wrong))
    expected: dict[str, Any] = json.loads((asked.folder / "expected.json").read_text())
    now = opened(asked.folder.resolve(), checkout)
    found = {name: differences(result, now[name]) for name, result in expected["opened"].items()}
    report = {
        "what": "run folders and exports of an older commit, opened by a newer one",
        **circumstances(),
        "before": expected["by"],
        "after": checkout.commit,
        "cases": {name: said or "equal" for name, said in found.items()},
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if asked.output:
        asked.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
