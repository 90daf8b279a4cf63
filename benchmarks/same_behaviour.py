"""Does a change keep what is computed? The same recipes through `train.py` of two checkouts, compared bit for bit.

    python benchmarks/same_behaviour.py BEFORE AFTER [--only CASE …] [--work DIR] [--output FILE.json]

BEFORE and AFTER are folders, each with its own .venv. Every logged number but times and memory, every tensor of the last
checkpoint and every drawn picture are compared. The cases are those of same_behaviour.yaml, and every algorithm alone;
recipes are BEFORE's. Results are kept in DIR by what `train.py` and `prx_composer/` hold, so that BEFORE runs once and AFTER
as often as it changes. The exit code is 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from common import circumstances

Result = dict[str, Any]
Case = list[list[Any]]  # runs in one folder, each of recipes, mappings that are merged over them, and key=value

INSIDE = Path(__file__).with_name("inside_checkout.py")

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
        keys = [key for key in old | new if not MEASURED.search(key) and old.get(key, "–") != new.get(key, "–")]
        if keys:
            found.append((batch, [f"{key} {old.get(key, '–')} → {new.get(key, '–')}" for key in keys]))
    if found:
        more = f"; {len(found)} of {len(rows[0])} batches differ" if len(found) > 1 else ""
        said.append(f"batch {found[0][0]}: {_listed(found[0][1])}{more}")
    for what in ("tensors", "pictures"):
        old, new = before[what], after[what]
        if wrong := [key for key in old | new if old.get(key) != new.get(key)]:
            marks = [key + ("" if key in old and key in new else f" only {'before' if key in old else 'after'}") for key in wrong]
            said.append(f"{what}: {_listed(marks)}; {len(wrong)} of {len(old)} differ")
    return said


def _listed(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


class Checkout:
    """A folder with its own .venv, and the folder in `work_folder` where what it holds trains.

    Results lie under a name for what train.py and the package are, committed or not.
    """

    def __init__(self, path: Path, work_folder: Path):
        self.path = path.resolve()
        self.commit = self._git("log", "-1", "--format=%h %s")
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            self._git("add", "--all", "--", "train.py", "prx_composer", **index)
            self.contents = self._git("write-tree", **index)[:12]
        self.folder = work_folder.resolve() / self.contents
        self.folder.mkdir(parents=True, exist_ok=True)

    def _git(self, *command: str, **environment: str) -> str:
        git = ["git", "-C", str(self.path), *command]
        return subprocess.run(git, check=True, capture_output=True, text=True, env=os.environ | environment).stdout.strip()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of this checkout's .venv in its folder of results and return what it prints."""
        same = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | same | {"PYTHONPATH": str(self.path)}
        program = [str(self.path / ".venv" / "bin" / command[0]), *command[1:]]
        return subprocess.run(program, cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True, check=check).stdout

    def algorithms(self) -> set[str]:
        code = "from prx_composer import registry; print(*registry.algorithms.names())"
        return set(self.run("python", "-c", code).split())

    def results(self, cases: dict[str, Case], two_ranks: list[str], shared: Path) -> dict[str, Result]:
        """Train the cases that this checkout's contents have not yet trained, and return the results of all."""
        jobs = {name: self._job(name, runs, shared) for name, runs in cases.items()}
        files = {name: self.folder / f"{name}.json" for name in cases}
        due = [
            name for name in cases if not files[name].exists() or json.loads(files[name].read_text())["key"] != jobs[name]["key"]
        ]
        for launcher, names in (
            (["python"], [name for name in due if name not in two_ranks]),
            (["composer", "-n", "2"], [name for name in due if name in two_ranks]),
        ):
            listed = self.folder / "jobs.json"
            listed.write_text(json.dumps([jobs[name] for name in names]))
            if names:
                self.run(*launcher, str(INSIDE), "train", str(self.path / "train.py"), check=False)
        found: dict[str, Result] = {}
        for name, file in files.items():
            found[name] = json.loads(file.read_text()) if file.exists() else {"error": f"see {file.with_suffix('.rank0.log')}"}
            if "error" in found[name]:
                file.unlink(missing_ok=True)
        return found

    def _job(self, name: str, runs: Case, shared: Path) -> dict[str, Any]:
        """Write what is merged over the recipes, and return what `work` needs to know."""
        texts = [[argument.read_text() if isinstance(argument, Path) else argument for argument in run] for run in runs]
        listed: list[list[str]] = []
        for number, run in enumerate(runs):
            listed.append([])
            for place, argument in enumerate(run):
                if isinstance(argument, dict):
                    file = self.folder / "parts" / f"{name}-{number}-{place}.yaml"
                    file.parent.mkdir(exist_ok=True)
                    file.write_text(yaml.safe_dump(argument, sort_keys=False).replace("{shared}", str(shared)))
                    argument = file
                listed[-1].append(str(argument))
            listed[-1] += [f"run_name={name}", "run_folder=runs/${run_name}", "progress_bar=false"]
        return {"name": name, "key": hashlib.sha256(json.dumps(texts).encode()).hexdigest(), "runs": listed}


def all_cases(yamls: Path, algorithms: set[str], settings: dict[str, Any]) -> dict[str, Case]:
    """Return every case of same_behaviour.yaml, of yamls/ablations and of the registry."""
    parts: dict[str, Any] = settings["parts"]
    bare = [yamls / "quickstart.yaml", parts["small"], parts["bare"]]
    made, covered = dict[str, Case](), set[str]()
    for file in sorted((yamls / "ablations").glob("*.yaml")):
        made[file.stem] = [[*bare, file]]
        covered |= set(yaml.safe_load(file.read_text()).get("algorithms") or {})
    for name in sorted(algorithms - covered):
        made[name] = [[*bare, settings["alone"].get(name, {"algorithms": {name: {}}})]]
    for name, runs in settings["cases"].items():
        made[name] = [[yamls / item if item.endswith(".yaml") else parts.get(item, item) for item in run] for run in runs]
    return made


def changed_recipes(before: Path, after: Path) -> list[str]:
    """Return the files of `yamls/` that AFTER lacks, or that say something else there."""
    said: list[str] = []
    for file in sorted(before.rglob("*.yaml")):
        theirs = after / file.relative_to(before)
        if not theirs.exists() or yaml.safe_load(theirs.read_text()) != yaml.safe_load(file.read_text()):
            said.append(f"yamls/{file.relative_to(before)} {'says something else' if theirs.exists() else 'is gone'}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--work", type=Path, help="folder that keeps results. [default: a temporary one]")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    settings = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        work_folder = asked.work or Path(temporary)
        before, after = (Checkout(path, work_folder) for path in (asked.before, asked.after))
        known = before.algorithms()
        cases = all_cases(before.path / "yamls", known, settings)
        if asked.only:
            if unknown := set(asked.only) - set(cases):
                parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
            cases = {name: cases[name] for name in asked.only}
        shared = work_folder.resolve() / "shared"
        if not shared.exists():
            before.run("python", str(INSIDE), "make", str(shared))
        sides = {checkout.contents: checkout for checkout in (before, after)}
        with ThreadPoolExecutor(2) as pool:
            trained = dict(
                zip(sides, pool.map(lambda side: side.results(cases, settings["two_ranks"], shared), sides.values()), strict=True)
            )
    old, new = trained[before.contents], trained[after.contents]
    found = {name: differences(old[name], new[name]) for name in cases}
    report = {
        "what": "the same recipes by two checkouts: every logged number, the last checkpoint's tensors and the pictures",
        **circumstances(),
        "before": before.commit,
        "after": after.commit,
        "new_without_a_case": sorted(after.algorithms() - known),
        "changed_recipes": changed_recipes(before.path / "yamls", after.path / "yamls"),
        "cases": {name: said or "equal" for name, said in found.items()},
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if asked.output:
        asked.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return int(any(found.values()) or bool(report["changed_recipes"]))


if __name__ == "__main__":
    sys.exit(main())
