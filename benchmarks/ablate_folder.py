"""The folder of a comparison: what was asked, in which groups its runs take turns, and which of them are still to be trained.

runs/ablate-<name>/question.json  starts.jsonl  refused.json  lock
                   seed17-0/group.json  base/  base.log  base.end.json  base+muon/ …

A start of ablate.py adds the stacks and seeds that are new, and trains what has not ended. A run that was killed goes on from its
newest checkpoint, to the same bits as without the kill; one that failed by itself has failed, unless it is to be tried again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import say
from turns import Run, Stack, outputs

from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.runs.folder import read_metrics

WAIT_SECONDS = 300  # for trainings of a start that was killed: they end with their turn


@dataclass(frozen=True)
class Group:
    """Runs of one seed that take turns; the first is the base, with which the others are compared.

    Args:
        stacks: name → what is known of it: `changes`, `arguments` of train.py, `code_paths`, and what the result says of it.
    """

    seed: int
    folder: Path
    stacks: dict[str, dict[str, Any]]

    def runs(self, start: int = 0, lock: int | None = None) -> list[Run]:
        return [
            Run(
                Stack(name, tuple(known["changes"])),
                self.seed,
                self.folder / name,
                known["arguments"],
                known["code_paths"],
                keeps=True,
                start_number=start,
                lock=lock,
            )
            for name, known in self.stacks.items()
        ]


class Folder:
    """Runs of one comparison, held by one ablate.py at a time.

    Args:
        output: where results go, without suffix; it names the folder.
        overwrite: delete what is there.
        question: what must be the same whenever the comparison goes on, by name.

    Raises:
        UserError: there is another comparison or a result without its runs; another ablate.py trains them.
    """

    def __init__(self, output: Path, overwrite: bool, question: Mapping[str, Any]):
        self.path = Path("runs", output.name if output.name.startswith("ablate-") else f"ablate-{output.name}")
        asked = self.path / "question.json"
        existing = [path for path in (self.path, *outputs(output)) if path.exists()]
        if existing and not overwrite and not asked.exists():
            raise UserError(
                f"{existing[0]} is there already, and nothing that could go on; give --overwrite to delete it, or another "
                "--output."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = self._locked()
        if overwrite:
            for path in [*self.path.iterdir(), *outputs(output)]:
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink(missing_ok=True)
        before = json.loads(asked.read_text()) if asked.exists() else dict(question)
        for key, now in question.items():
            if before.get(key) != now:
                raise UserError(
                    f"{self.path} compares with another {key}: {_said(before.get(key))}, where {_said(now)} is asked for now. "
                    "Ask as before to go on, or give another --output, or --overwrite to delete what is there."
                )
        write_whole(asked, (json.dumps(question, indent=1) + "\n").encode())

    def _locked(self) -> int:
        """Return a file descriptor that this process and its trainings hold; wait for those of a start that was killed."""
        lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        end = time.monotonic() + WAIT_SECONDS
        told = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            if not told:
                say(f"{self.path} is in use: waiting for trainings of an earlier start to end.")
                told = True
            if time.monotonic() > end:
                raise UserError(f"{self.path} is in use by another ablate.py, which trains its runs; give another --output.")
            time.sleep(0.2)

    # ------------------------------------------------------------------------------------------------------- groups

    def groups(self) -> list[Group]:
        """Return those that were planned so far, seed by seed in the order in which they were asked for."""
        found = [(json.loads(path.read_text()), path.parent) for path in self.path.glob("seed*/group.json")]
        found.sort(key=lambda pair: pair[0]["order"])
        return [Group(content["seed"], folder, content["stacks"]) for content, folder in found]

    def add(self, seeds: Sequence[int], stacks: Mapping[str, dict[str, Any]], together: int) -> list[Group]:
        """Plan what is not planned yet: for every seed groups of the base, which is the first stack, and of new ones.

        Raises:
            UserError: a stack of this name is there with another recipe.
        """
        groups = self.groups()
        for group in groups:
            for name, known in group.stacks.items():
                if name in stacks and stacks[name]["recipe"] != known["recipe"]:
                    raise UserError(
                        f"--stack {name}: its recipe is another than when {group.folder / name} was trained. Give your file "
                        "another name, or another --output, or --overwrite to delete what is there."
                    )
        base, *names = stacks
        every_seed = list(dict.fromkeys([*(group.seed for group in groups), *seeds]))
        every = dict.fromkeys([*(name for group in groups for name in group.stacks if name != base), *names])
        known = {name: value for group in groups for name, value in group.stacks.items()} | dict(stacks)
        for seed in every_seed:
            there = [group for group in groups if group.seed == seed]
            new = [name for name in every if not any(name in group.stacks for group in there)]
            for first in range(0, len(new), together - 1) if new else ([] if there else [0]):
                members = {name: known[name] for name in [base, *new[first : first + together - 1]]}
                group = Group(seed, self.path / f"seed{seed}-{len([g for g in groups if g.seed == seed])}", members)
                group.folder.mkdir(exist_ok=True)
                content = {"seed": seed, "order": len(groups), "stacks": members}
                write_whole(group.folder / "group.json", (json.dumps(content, indent=1) + "\n").encode())
                groups.append(group)
        return groups

    def refuse(self, refused: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add stacks that the recipe cannot take; return all of them."""
        path = self.path / "refused.json"
        found = {entry["stack"]: entry for entry in [*(json.loads(path.read_text()) if path.exists() else []), *refused]}
        write_whole(path, (json.dumps(list(found.values()), indent=1) + "\n").encode())
        return list(found.values())

    # ------------------------------------------------------------------------------------------------------- starts

    def start(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Add a start, with its circumstances; return all of them."""
        path = self.path / "starts.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(dict(head)) + "\n")
        return read_metrics(path)


def to_train(runs: Sequence[Run], again: bool) -> list[Run]:
    """Return the runs that have not ended; with `again` also those that failed."""
    return [run for run in runs if run.end is None or run.was_interrupted or (again and run.end["code"])]


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
