"""Does a change keep what is computed? Two checkouts, each a folder with its own .venv, do the same; what comes out is compared.

    python benchmarks/same_behaviour.py BEFORE AFTER [--only CASE …] [--work DIR] [--output FILE.json]
    python benchmarks/same_behaviour.py make-old-runs FOLDER BEFORE
    python benchmarks/same_behaviour.py open-old-runs FOLDER AFTER [--output FILE.json]

What is done are the command lines of same_behaviour.yaml, with BEFORE's recipes. Every logged number but times, every tensor of
the last checkpoint or export and every picture must be equal to the last bit.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import yaml
from common import main, say

from prx_composer.common.errors import UserError

Result = dict[str, Any]
Cases = dict[str, list[str]]

INSIDE = Path(__file__).with_name("inside_checkout.py")
SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
OLD_RUNS: dict[str, Any] = SETTINGS["old_runs"]
PROMPTS = "a red circle on the left of a white background\na blue square on the right of a black background\n"

# Logged numbers that two runs of the same code do not share.
MEASURED = re.compile(r"seconds|^budget/|^time/(train|val|total)$|^(throughput|memory)/")


def differences(before: Result, after: Result) -> list[str]:
    """Return what differs between two results of a case, the first difference first; nothing if they are equal."""
    if said := [f"{side} did not run: {r['error']}" for side, r in (("before", before), ("after", after)) if "error" in r]:
        return said
    rows = [{row["batch"]: row for row in result["rows"]} for result in (before, after)]
    found: list[tuple[int, list[str]]] = []
    for batch in sorted(rows[0].keys() | rows[1].keys()):
        old, new = (side.get(batch, {}) for side in rows)
        keys = [key for key in old | new if not MEASURED.search(key) and old.get(key, "absent") != new.get(key, "absent")]
        if keys:
            found.append((batch, [f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in keys]))
    if found:
        more = f"; {len(found)} of {len(rows[0])} batches differ" if len(found) > 1 else ""
        said.append(f"batch {found[0][0]}: {_listed(found[0][1])}{more}")
    for what in ("tensors", "pictures", "files"):
        old, new = before[what], after[what]
        if wrong := [key for key in old | new if old.get(key) != new.get(key)]:
            marks = [key + ("" if key in old and key in new else f" only {'before' if key in old else 'after'}") for key in wrong]
            said.append(f"{what}: {_listed(marks)}; {len(wrong)} of {len(old)} differ")
    return said


def _listed(names: list[str], shown: int = 3) -> str:
    return "; ".join(names[:shown]) + (f"; and {len(names) - shown} more" if len(names) > shown else "")


class Checkout:
    """A folder with its own .venv, which may be of another commit than this file."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.commit = self._git("log", "-1", "--format=%h %s")

    def contents(self) -> str:
        """Return a name for what train.py and the package are, committed or not."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            self._git("add", "--all", "--", "train.py", "prx_composer", **index)
            return self._git("write-tree", **index)[:12]

    def _git(self, *command: str, **environment: str) -> str:
        git = ["git", "-C", str(self.path), *command]
        return subprocess.run(git, check=True, capture_output=True, text=True, env=os.environ | environment).stdout.strip()

    def start(self, folder: Path, *command: str) -> "subprocess.Popen[str]":
        """Start a program of this checkout's .venv in a folder; what it prints can be read."""
        same = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | same | {"PYTHONPATH": str(self.path)}
        program = [str(self.path / ".venv" / "bin" / command[0]), *command[1:]]
        return subprocess.Popen(program, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def algorithms(self) -> set[str]:
        code = "from prx_composer import registry; print(*registry.algorithms.names())"
        return set(self.start(self.path, "python", "-c", code).communicate()[0].split())

    def command(self, name: str, line: str) -> list[str]:
        """Return the program and arguments of a line of same_behaviour.yaml."""
        if line.startswith("prx "):
            return [str(self.path / ".venv" / "bin" / "prx"), *line.split()[1:]]
        return [
            str(self.path / "train.py"),
            *line.split(),
            f"run_name={name}",
            "run_folder=runs/${run_name}",
            "progress_bar=false",
        ]

    def results(self, folder: Path, cases: Cases, two_ranks: list[str], clean: bool = False) -> dict[str, Result]:
        """Run what this folder has no result of yet, and return the results of all.

        Args:
            folder: with the files that the commands name.
            clean: a run begins anew, and its folder goes when its result is written.
        """
        files, keys = {name: folder / f"{name}.json" for name in cases}, dict[str, str]()
        for name, lines in cases.items():
            named = [folder / word for line in lines for word in line.split() if word.endswith(".yaml")]
            texts = [*lines, *(file.read_text() for file in named if file.exists())]
            keys[name] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        due = [name for name in cases if not files[name].exists() or json.loads(files[name].read_text())["key"] != keys[name]]
        for line in (line for name in due for line in cases[name] if "--output" in line):
            (folder / line.split()[-1]).parent.mkdir(exist_ok=True)
        for ranks in (1, 2):
            jobs = [
                {
                    "name": name,
                    "key": keys[name],
                    "commands": [self.command(name, line) for line in cases[name]],
                    "clean": clean,
                    "folder": f"runs/{name}" if not cases[name][-1].startswith("prx ") else name,
                }
                for name in due
                if (name in two_ranks) == (ranks == 2)
            ]
            if jobs:
                launcher = ["python"] if ranks == 1 else ["composer", "-n", "2"]
                self.start(folder, *launcher, str(INSIDE), json.dumps(jobs)).communicate()
        found: dict[str, Result] = {}
        for name, file in files.items():
            found[name] = json.loads(file.read_text()) if file.exists() else {"error": f"see {folder / name}.rank0.log"}
            if "error" in found[name]:
                file.unlink(missing_ok=True)
        return found


def prepare(folder: Path, before: Checkout, algorithms: set[str]) -> None:
    """Write the files that the commands of same_behaviour.yaml name, the same for every checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(before.path / "yamls", folder / "yamls", dirs_exist_ok=True)
    (folder / "parts").mkdir(exist_ok=True)
    for name, part in ({name: {"algorithms": {name: {}}} for name in algorithms} | SETTINGS["parts"]).items():
        (folder / "parts" / f"{name}.yaml").write_text(yaml.safe_dump(part, sort_keys=False))
    (folder / "prompts.txt").write_text(PROMPTS)
    if not (folder / "shared").exists():
        before.start(folder, "python", str(INSIDE), "make", "shared").communicate()


def all_cases(yamls: Path, algorithms: set[str]) -> Cases:
    """Return the cases of same_behaviour.yaml, of yamls/ablations and of the registry."""
    files = sorted((yamls / "ablations").glob("*.yaml"))
    covered = {name for file in files for name in yaml.safe_load(file.read_text()).get("algorithms") or {}}
    alone = {file.stem: f"yamls/ablations/{file.name}" for file in files}
    alone |= {name: f"parts/{name}.yaml" for name in sorted(algorithms - covered)}
    small = "yamls/quickstart.yaml parts/small.yaml parts/bare.yaml"
    return {name: [f"{small} {file}"] for name, file in alone.items()} | SETTINGS["cases"]


def changed_recipes(before: Path, after: Path) -> list[str]:
    """Return the files of `yamls/` that AFTER lacks, or that say something else there."""
    said: list[str] = []
    for file in sorted(before.rglob("*.yaml")):
        theirs = after / file.relative_to(before)
        if not theirs.exists() or yaml.safe_load(theirs.read_text()) != yaml.safe_load(file.read_text()):
            said.append(f"yamls/{file.relative_to(before)} {'says something else' if theirs.exists() else 'is gone'}")
    return said


def verdict(before: str, after: str, old: dict[str, Result], new: dict[str, Result]) -> dict[str, Any]:
    found = {name: differences(result, new[name]) for name, result in old.items()}
    for name, said in found.items():
        say(f"{name}: {' | '.join(said) or 'equal'}")
    failed = [name for name, said in found.items() if said]
    return {"before": before, "after": after, "failed": failed, "cases": {name: said or "equal" for name, said in found.items()}}


def same_behaviour(
    before: Path,
    after: Path,
    *,
    only: Annotated[Sequence[str], "cases"] = ("all",),
    work: Annotated[Path | None, "folder that keeps results by what a checkout holds; a temporary one by default"] = None,
) -> dict[str, Any]:
    """Do two checkouts train the same, bit for bit: every algorithm alone, and the recipes of this repository?"""
    old, new = Checkout(before), Checkout(after)
    known = old.algorithms()
    cases = all_cases(old.path / "yamls", known)
    if unknown := set(only) - {"all", *cases}:
        raise UserError(f"--only: there is no case {', '.join(sorted(unknown))}; there are {', '.join(cases)}.")
    cases = {name: lines for name, lines in cases.items() if name in only or "all" in only}
    with tempfile.TemporaryDirectory() as temporary:
        sides = {checkout.contents(): checkout for checkout in (old, new)}
        folders = [(work or Path(temporary)).resolve() / contents for contents in sides]
        for folder in folders:
            prepare(folder, old, known)
        with ThreadPoolExecutor(2) as pool:
            trained = list(pool.map(lambda c, f: c.results(f, cases, SETTINGS["two_ranks"], clean=True), sides.values(), folders))
    found = verdict(old.commit, new.commit, trained[0], trained[-1])
    changed = changed_recipes(old.path / "yamls", new.path / "yamls")
    return found | {
        "failed": [*found["failed"], *changed],
        "changed_recipes": changed,
        "new_without_a_case": sorted(new.algorithms() - known),
    }


def make_old_runs(folder: Path, before: Path) -> dict[str, Any]:
    """Have BEFORE train, export, and be killed in the middle of a run; keep beside that what BEFORE itself then makes of it."""
    checkout, folder = Checkout(before), folder.resolve()
    prepare(folder, checkout, checkout.algorithms())
    made = checkout.results(folder, OLD_RUNS["made"], OLD_RUNS["two_ranks"])
    for name, lines in OLD_RUNS["killed"].items():
        kill(checkout, folder, checkout.command(name, lines[0]), folder / "runs" / name / "metrics.jsonl")
    expected = opened(folder, checkout)
    (folder / "expected.json").write_text(json.dumps({"by": checkout.commit, "opened": expected}))
    return {"before": checkout.commit, "failed": {n: r["error"] for n, r in (made | expected).items() if "error" in r}}


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
        copy = shutil.copytree(folder, Path(temporary) / "copy")
        return checkout.results(copy, OLD_RUNS["opened"], OLD_RUNS["two_ranks"])


def open_old_runs(folder: Path, after: Path) -> dict[str, Any]:
    """Do run folders and exports of an older commit still open, draw the same, and go on as they would have?"""
    checkout, expected = Checkout(after), json.loads((folder / "expected.json").read_text())
    return verdict(expected["by"], checkout.commit, expected["opened"], opened(folder.resolve(), checkout))


if __name__ == "__main__":
    sys.exit(main(__doc__, same_behaviour, make_old_runs, open_old_runs))
