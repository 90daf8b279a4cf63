"""Kills a conversion with SIGKILL again and again, and compares what comes out in the end with an undisturbed one, byte for byte.

python benchmarks/convert_kills.py --kills 25 --output benchmarks/results/convert-kills.json

After every kill the same command is given again. Kills come at random moments of start-up, hashing, converting and the last step,
and end everything at once, as when a machine loses power, the leading process alone, or one worker alone.
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from killing import Killable, contents, counted, differences, processor_time, session_of
from PIL import Image
from record import circumstances

VICTIMS = ("everything", "leader", "worker", "everything")  # in turn
MOMENTS = ("converting", "hashing", "converting", "start-up", "converting", "finishing")
LONGEST = 300.0  # seconds that a conversion may take to its moment


def make_input(folder: Path, tars: int, samples: int, seed: int = 0) -> None:
    """Tars of photograph-like JPEGs with captions, every tenth a duplicate and one in each tar broken."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    image = b""
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(samples):
                if index % 10 or not image:
                    height, width = [(768, 1024), (900, 900), (1200, 800)][index % 3]
                    coarse = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
                    file = io.BytesIO()
                    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
                    image = file.getvalue()
                content = image[:500] if index == 5 else image
                for suffix, data in ((".jpg", content), (".txt", f"caption {number} {index}".encode())):
                    member = tarfile.TarInfo(f"{number:05d}{index:04d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


class Conversion(Killable):
    """One of `source` to `output`."""

    def __init__(self, source: Path, output: Path, options: list[str]):
        self.output, self.work = output, output / ".train.work"
        prx = str(Path(sys.executable).with_name("prx"))
        command = [prx, "data", "convert", "--source", "webdataset", "--input", str(source), "--output", str(output)]
        command += ["--caption", "txt", "--base-size", "512", "--duplicates", "perceptual", *options]
        super().__init__(command, output.with_suffix(".log"))

    def kill(self, victim: str) -> str:
        """Returns who was killed."""
        # Workers are children of the fork server (of Ray's daemon), not of the leader.
        workers = [pid for pid, parent in session_of(self.leader).items() if self.leader not in (pid, parent)]
        if victim == "worker" and workers:
            self.kill_one(max(workers, key=processor_time))
            return "worker"
        if victim == "everything":
            self.kill_everything()
            return victim
        self.kill_leader()
        return "leader"

    def done(self, folder: str) -> int:
        names = os.listdir(self.work / folder) if (self.work / folder).is_dir() else []
        return sum(not name.startswith(".") for name in names)

    def moment(self) -> str:
        if (self.output / "train").exists() or (self.work / "whole").exists():
            return "finishing"
        if self.done("units") or any(self.work.glob("units/.*")):
            return "converting"
        return "hashing" if self.done("hashes") else "start-up"


def wait_for(run: Conversion, moment: str, units: int, rng: random.Random) -> bool:
    """Waits until a random moment of that kind; False if the conversion ended first."""
    deadline = time.monotonic() + LONGEST
    begun = {folder: run.done(folder) for folder in ("units", "hashes")}
    if moment == "start-up":
        time.sleep(rng.uniform(0, 12))
        return run.is_alive()
    while run.is_alive() and time.monotonic() < deadline:
        if moment == "finishing" and ((run.work / "whole").exists() or run.done("units") == units):
            time.sleep(rng.uniform(0, 0.05))
            return run.is_alive()
        if moment != "finishing" and any(run.done(folder) > begun[folder] for folder in begun):
            time.sleep(rng.uniform(0, 1.5))
            return run.is_alive()
        time.sleep(0.001)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--tars", type=int, default=60)
    parser.add_argument("--samples", type=int, default=40, help="of each tar")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill comes later than that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="convert-kills."))
    try:
        result = measure(folder, arguments, rng)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["equal"] and result["exit_code"] == 0 else 1)


def measure(folder: Path, arguments: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    make_input(folder / "input", arguments.tars, arguments.samples)
    options = ["--workers", "2", "--engine", arguments.engine]
    whole = Conversion(folder / "input", folder / "whole", options)
    killed = Conversion(folder / "input", folder / "killed", options)
    whole.start()
    begin = time.monotonic()
    if whole.finish() != 0:
        sys.exit(f"The undisturbed conversion failed:\n{(folder / 'whole.log').read_text()}")
    seconds = time.monotonic() - begin

    expected = contents(folder / "whole" / "train")
    kills: list[dict[str, Any]] = []
    unequal: set[str] = set()
    rounds = 1
    killed.start()
    kills_end = time.monotonic() + 60 * arguments.minutes
    while len(kills) < arguments.kills and time.monotonic() < kills_end:
        moment = MOMENTS[len(kills) % len(MOMENTS)]
        if not wait_for(killed, moment, arguments.tars, rng):
            if killed.finish() == 0:  # it came to its end before the next kill: compared, and begun anew
                unequal |= differences(expected, contents(killed.output / "train"))
                shutil.rmtree(killed.output)
                rounds += 1
            killed.start()
            continue
        was = killed.moment()
        victim = killed.kill(VICTIMS[len(kills) % len(VICTIMS)])
        kills.append({"moment": was, "victim": victim, "hashed": killed.done("hashes"), "converted": killed.done("units")})
        sys.stdout.write(json.dumps(kills[-1]) + "\n")
        sys.stdout.flush()
        if victim != "worker":
            killed.start()
    exit_code = killed.finish()
    second = contents(folder / "killed" / "train")
    unequal |= differences(expected, second)
    statistics = json.loads((folder / "killed" / "train" / "conversion.json").read_text()) if second else {}
    return {
        "what": "files of a conversion killed again and again against an undisturbed one",
        **circumstances(),
        "engine": arguments.engine,
        "exit_code": exit_code,
        "kills": len(kills),
        "kills_by_moment": counted(kills, "moment"),
        "kills_by_victim": counted(kills, "victim"),
        "conversions_compared": rounds,
        "equal": bool(expected) and not unequal,
        "unequal": sorted(unequal)[:20],
        "files": len(second),
        "left_behind": sorted(path.name for path in (folder / "killed").iterdir() if path.name != "train"),
        "counts": statistics.get("counts"),
        "dropped": statistics.get("dropped"),
        "seconds_undisturbed": round(seconds, 1),
        "log": kills,
    }


if __name__ == "__main__":
    main()
