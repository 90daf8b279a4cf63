"""Kills `prx encode text` with SIGKILL again and again, and compares what is stored in the end with an undisturbed run's bytes.

python benchmarks/encode_kills.py --kills 16 --output benchmarks/results/encode-kills.json

On one process and on two ranks in turn; after every kill the same command is given again. Kills come at random moments of
start-up, encoding and the last step, and end everything at once, as when a machine loses power, the leading process alone (of two
ranks that is Composer's launcher, whom the ranks outlive), or one rank alone.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from killing import Killable, children, contents, counted, differences
from record import circumstances
from transformers import T5Config, T5EncoderModel

from prx_composer.data.format import Manifest
from prx_composer.data.small_sets import ShapesSource, all_scenes
from prx_composer.data.sources import prepare
from prx_composer.models.text_encoder import train_tokenizer

TURNS = ((1, "everything"), (2, "rank"), (2, "everything"), (2, "leader"))  # ranks, victim
MOMENTS = ("encoding", "finishing", "encoding", "start-up", "encoding")
LONGEST = 300.0  # seconds that a run may take to its moment
QUICKSTART = Path(__file__).parents[1] / "yamls" / "quickstart.yaml"
T5: dict[str, Any] = dict(d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, dropout_rate=0.0)
SHAPES: dict[str, Any] = {"image_size": 16, "images_per_scene": 8, "heldout": 30}


def make_input(folder: Path) -> None:
    """Captions with images beside them, and an encoder of random weights with its tokenizer."""
    prepare(folder / "data", ShapesSource(**SHAPES), {"name": "shapes", **SHAPES})  # pyright: ignore[reportArgumentType]
    tokenizer = train_tokenizer(scene.caption for scene in all_scenes())
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    recipe = yaml.safe_load(QUICKSTART.read_text())
    recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(folder / "encoder"), "max_tokens": 14}
    recipe["train_loader"]["path"] = str(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


class Encoding(Killable):
    """One into `encoded/<name>`, on `ranks` processes, of which 1 is without a launcher."""

    def __init__(self, folder: Path, name: str, part: int):
        split = folder / "data" / "train"
        self.output = split / "encoded" / name
        self.parts = sum(-(-samples // part) for samples in Manifest.read(split).buckets.values())
        self.arguments = ["-m", "prx_composer.cli", "encode", "text", str(folder / "recipe.yaml"), "--name", name]
        self.arguments += ["--part", str(part)]
        self.ranks = 1
        super().__init__([], folder / f"{name}.log")

    def begin(self, ranks: int) -> None:
        self.ranks = ranks
        launcher = [str(Path(sys.executable).with_name("composer")), "-n", str(ranks)]
        self.command = [*([sys.executable] if ranks == 1 else launcher), *self.arguments]
        self.start()

    def kill(self, victim: str, rng: random.Random) -> str:
        """Returns who was killed."""
        ranks = children(self.leader) if self.ranks > 1 else []
        if victim == "rank" and ranks:
            self.kill_one(rng.choice(ranks))
            self.finish()  # the launcher ends the others
            return "rank"
        if victim == "leader" and ranks:
            self.kill_leader()
            return "leader"
        self.kill_everything()
        return "everything"

    def names(self) -> list[str]:
        """Of the files in buckets that are there now."""
        return [name for _, _, names in os.walk(self.output) for name in names if not name.startswith(".")]

    def done(self) -> int:
        return sum(name.startswith("part.") and name.endswith(".json") for name in self.names())

    def moment(self) -> str:
        names = self.names()
        if "index.json" in names or "manifest.json" in names or self.done() == self.parts:
            return "finishing"
        return "encoding" if self.done() else "start-up"


def wait_for(run: Encoding, moment: str, rng: random.Random) -> bool:
    """Waits until a random moment of that kind; False if the run ended first."""
    deadline, begun = time.monotonic() + LONGEST, run.done()
    share = rng.uniform(0, 0.5)  # of what is left
    delay = rng.uniform(0, 12) if moment == "start-up" else rng.uniform(0, 0.03)
    if moment == "start-up":
        time.sleep(delay)
        return run.is_alive()
    while run.is_alive() and time.monotonic() < deadline:
        if moment == "encoding" and run.done() > begun + share * (run.parts - begun):
            time.sleep(delay)
            return run.is_alive()
        if moment == "finishing" and run.moment() == "finishing":
            time.sleep(delay)
            return run.is_alive()
        time.sleep(0.001)
    return False


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    make_input(folder)
    whole, killed = (Encoding(folder, name, arguments.part) for name in ("whole", "killed"))
    begin = time.monotonic()
    whole.begin(ranks=1)
    if whole.finish() != 0:
        sys.exit(f"The undisturbed run failed:\n{whole.log.read_text()}")
    seconds = time.monotonic() - begin
    expected = contents(whole.output)

    kills: list[dict[str, Any]] = []
    unequal: set[str] = set()
    compared, failures, exit_code = 0, 0, 1
    kills_end = time.monotonic() + 60 * arguments.minutes
    while True:
        more = len(kills) < arguments.kills and time.monotonic() < kills_end
        ranks, victim = TURNS[len(kills) % len(TURNS)]
        killed.begin(ranks)
        if more and wait_for(killed, MOMENTS[len(kills) % len(MOMENTS)], rng):
            was, done = killed.moment(), killed.done()
            kills.append({"moment": was, "victim": killed.kill(victim, rng), "ranks": ranks, "parts": done})
            sys.stdout.write(json.dumps(kills[-1]) + "\n")
            sys.stdout.flush()
            continue
        exit_code = killed.finish()
        if exit_code == 0:  # it came to its end: compared, and begun anew
            unequal |= differences(expected, contents(killed.output))
            compared += 1
            if not more:
                break
            shutil.rmtree(killed.output)
        else:
            failures += 1
            sys.stdout.write(f"It failed, not killed:\n{killed.log.read_text()[-3000:]}\n")
            if failures > 3:
                break
    return {
        "what": "files of encoded captions, by runs killed again and again, against those of an undisturbed one",
        **circumstances(),
        "exit_code": exit_code,
        "kills": len(kills),
        "kills_by_moment": counted(kills, "moment"),
        "kills_by_victim": counted(kills, "victim"),
        "kills_by_ranks": counted(kills, "ranks"),
        "encodings_compared": compared,
        "failures": failures,
        "equal": bool(expected) and compared > 0 and not unequal,
        "unequal": sorted(unequal)[:20],
        "files": len(expected),
        "parts": whole.parts,
        "seconds_undisturbed": round(seconds, 1),
        "log": kills,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=16)
    parser.add_argument("--part", type=int, default=8, help="samples of a part")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill comes later than that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="encode-kills."))
    try:
        result = measure(folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["equal"] and result["exit_code"] == 0 and not result["failures"] else 1)


if __name__ == "__main__":
    main()
