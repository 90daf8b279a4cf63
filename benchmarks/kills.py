"""Kills a command with SIGKILL again and again, and compares what comes out in the end with an undisturbed one, bit for bit.

python benchmarks/kills.py train yamls/24h_mini.yaml --kills 30 --switch 240 save_interval=3sec
python benchmarks/kills.py convert --kills 25                  # also: encode

After every kill the same command is given again. Kills come at random moments of every part of the work. They end everything at
once, as when a machine loses power, the leading process alone, or one of the processes that it has started.
"""

import contextlib
import importlib
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from common import ROOT, main, train_command
from data_speed import add_to_tar, photograph
from kill_points import POINTS
from killing import Killable, contents, kill_again_and_again, processor_time, session_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import T5Config, T5EncoderModel

from prx_composer.data.format import Manifest
from prx_composer.data.sources import ShapesSource, all_scenes, prepare
from prx_composer.data.storage import delete, survey
from prx_composer.models.encoders import train_tokenizer
from prx_composer.runs.checkpoints import INDEX, all_checkpoints, newest_checkpoint
from prx_composer.runs.folder import read_metrics

Minutes = Annotated[float, "no kill comes later than that"]


# ------------------------------------------------------------------------------------------------------- training


class Training(Killable):
    """A run of a recipe, of which everything dies at once: at a point of a checkpoint, by itself, or at a random time, from here.

    Args:
        processes: in turn, start after start.
        switch: batch at which the second stage begins.
        remote: `save_folder`.
    """

    MOMENTS = {"start-up": 8.0, "training": 3.0, "switch": 1.0, "copying": 0.5} | dict.fromkeys(POINTS, 0.0)
    ORDER = ("staging", "writing", "copying", "publishing", "training", "sealing", "switch", "writing", "deleting", "start-up")

    def __init__(
        self, recipe: str, name: str, overrides: Sequence[str], processes: Sequence[int], switch: int | None, remote: str | None
    ):
        self._options = [recipe, f"run_name={name}", "progress_bar=false", *overrides]
        self._options += [f"save_folder={remote}/{name}"] if remote else []
        self._options += ["callbacks.samples={}"] if len(set(processes)) > 1 else []
        self._options += [f"code_paths=[{ROOT / 'benchmarks' / 'kill_points.py'}]"]
        self._processes, self._name, self._remote = processes, name, remote
        super().__init__(Path("runs", name), [])
        self.mark = self.output.with_suffix(".mark")
        self.switch, self.moment, self.ranks, self.on_a_fresh_machine = switch, "", 0, False

    def start(self, turn: int = 0) -> None:
        self.moment = "" if turn < 0 else self.ORDER[turn % len(self.ORDER)]
        self.ranks = self._processes[max(turn, 0) % len(self._processes)]
        self.command = train_command(self._options, self.ranks if self.ranks > 1 else None)
        self.mark.unlink(missing_ok=True)
        self.on_a_fresh_machine = self._remote is not None and self.moment == "start-up" and self.is_copied()
        if self.on_a_fresh_machine:
            shutil.rmtree(self.output)
        point = self.moment if self.moment in POINTS else ""
        os.environ |= {"KILL_POINT": point, "KILL_SEED": str(turn), "KILL_MARK": str(self.mark.absolute())}
        super().start(turn)

    def kill(self, victim: str, rng: random.Random) -> str:
        """Kill whatever has the run's name among its arguments, the launcher first."""
        for pid in sorted(processes_with(self._name), key=lambda pid: pid != self.leader):
            self.kill_one(pid)
        self.finish()
        return "everything"

    def wait_for(self, moment: str, rng: random.Random) -> bool:
        come = super().wait_for(moment, rng)
        return come or self.mark.exists()

    def is_copied(self) -> bool:
        return any(entry.path.endswith(f"/{INDEX}") for entry in survey(f"{self._remote}/{self._name}"))

    def clear(self) -> None:
        super().clear()
        if self._remote:
            delete([entry.path for entry in survey(f"{self._remote}/{self._name}")])

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            return read_metrics(self.output / "metrics.jsonl")
        return []

    def batch(self) -> int:
        rows = self.rows()
        return rows[-1]["batch"] if rows else 0

    def watch(self, moment: str, rng: random.Random) -> Callable[[], bool]:
        begun, saved, switch = self.batch(), newest_checkpoint(self.output), self.switch
        if moment in POINTS:
            return self.mark.exists
        if moment == "copying" and self._remote:
            return lambda: bool(processes_with("prx_composer.runs.copies", self._name))
        if moment == "switch" and switch is not None:
            # If it is far away when the next checkpoint is there, the kill comes then, so that training gets on.
            return lambda: self.batch() >= switch - 2 or (newest_checkpoint(self.output) != saved and self.batch() < switch - 20)
        return lambda: self.batch() > begun

    def progress(self) -> dict[str, Any]:
        batch, newest = self.batch(), newest_checkpoint(self.output)
        moment = (self.mark.read_text() if self.mark.exists() else "") or self.moment  # it is seen before it is written to
        if moment == "switch" and self.switch is not None and abs(batch - self.switch) > 2:
            moment = "training"
        half = any((self.output / "checkpoints").glob(".ba*.partial"))
        found = {"moment": moment.partition(" ")[0], "batch": batch, "goes_on_from": newest.batch if newest else 0}
        return found | {"ranks": self.ranks, "half_a_checkpoint": half, "at": moment, "fresh_machine": self.on_a_fresh_machine}

    def outcome(self) -> dict[str, Any]:
        """Return weights, average, optimizer and losses. The checkpoint is our own run's: loading it may execute what it says.

        Of runs whose number of ranks changes, the samples of every batch: noise is drawn by rank.
        """
        if len(set(self._processes)) > 1:
            rows = read_metrics(self.output / "samples.jsonl")  # of batches that were repeated several
            return {
                str(batch): sorted({str(row["samples"]) for row in rows if row["batch"] == batch})
                for batch in range(self.batch())
            }
        checkpoint = all_checkpoints(self.output / "checkpoints")[-1]
        path = Path(checkpoint.load_path)
        if path.is_dir():  # sharded
            path = self.output / "together.pt"
            dcp_to_torch_save(checkpoint.path, path)
        state = torch.load(path, weights_only=False)["state"]
        losses = {row["batch"]: {key: value for key, value in row.items() if key.startswith("loss/")} for row in self.rows()}
        average = state["callbacks"]["AverageState"]["average"]
        return {"model": state["model"], "optimizers": state["optimizers"], "average": average, "losses": losses}


def processes_with(*words: str) -> list[int]:
    """Return the processes whose arguments have these words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace")
                if all(word in arguments for word in words):
                    found.append(int(entry.name))
    return found


def train(
    recipe: str,
    overrides: Annotated[Sequence[str], "key=value, as for train.py"] = (),
    *,
    kills: int = 30,
    processes: Annotated[Sequence[int], "ranks, in turn after every kill"] = (1,),
    switch: Annotated[int | None, "batch at which the second stage begins"] = None,
    remote: Annotated[str | None, "s3://… to copy to; loopback: a server on this machine"] = None,
    warm: Annotated[bool, "start runs as forks of a process that has imported everything, as the tests do"] = False,
    minutes: Minutes = 600.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Final state of a run killed again and again against the undisturbed one.

    Kills come while a checkpoint is staged, written, sealed, published, copied to a store and while an older one is deleted, at
    random moments of start-up and training, and around the switch of stages; now and then the run folder is lost, and the copy
    goes on. Weights, their average, the optimizer's state and every logged loss must be equal; where the number of ranks changes,
    the samples of every batch.
    """
    with contextlib.ExitStack() as stack:
        if warm:
            stack.enter_context(warm_commands())
        if remote == "loopback":
            remote = stack.enter_context(loopback())
        names = ("kills-undisturbed", "kills-killed")
        whole, killed = (Training(recipe, name, overrides, processes, switch, remote) for name in names)
        found = kill_again_and_again(whole, killed, kills, minutes, seed)
    return found | {"final_batch": killed.batch(), "steps_with_losses": len(killed.rows())}


@contextlib.contextmanager
def warm_commands() -> Iterator[None]:
    """Let `sys.executable` be the small program of tests/warm.py."""
    sys.path.append(str(ROOT / "tests"))
    warm = importlib.import_module("warm")
    warm.open_folder()
    real, sys.executable = sys.executable, str(Path(warm.folder()) / "python")
    try:
        yield
    finally:
        sys.executable = real
        warm.close_folder()


@contextlib.contextmanager
def loopback() -> Iterator[str]:
    """Serve S3 on this machine, as moto does; give a bucket's address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"S3_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    try:
        yield "s3://runs"
    finally:
        server.stop()


# ----------------------------------------------------------------------------------------------------- converting


def make_tars(folder: Path, tars: int, samples: int) -> None:
    """Write tars of photograph-like JPEGs with captions, every tenth a duplicate and one in each tar broken."""
    folder.mkdir(parents=True)
    rng, image = np.random.default_rng(0), b""
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(samples):
                if index % 10 or not image:
                    image = photograph(rng, *[(768, 1024), (900, 900), (1200, 800)][index % 3])
                add_to_tar(tar, f"{number:05d}{index:04d}.jpg", image[:500] if index == 5 else image)
                add_to_tar(tar, f"{number:05d}{index:04d}.txt", f"caption {number} {index}".encode())


class Conversion(Killable):
    """One of a folder of tars, of which each is a unit of work."""

    TURNS = ("everything", "leader", "worker", "everything")
    MOMENTS = {"start-up": 12.0, "hashing": 1.5, "converting": 1.5, "finishing": 0.05}
    OUTLIVES_WORKERS = True
    ORDER = ("converting", "hashing", "converting", "start-up", "converting", "finishing")

    def __init__(self, source: Path, output: Path, engine: str):
        command = [sys.executable, "-m", "prx_composer.cli", "data", "convert", "--source", "webdataset", "--input", str(source)]
        command += [
            "--output",
            str(output),
            "--caption",
            "txt",
            "--base-size",
            "512",
            "--duplicates",
            "perceptual",
            "--heldout",
            "0.2",
        ]
        super().__init__(output, [*command, "--workers", "2", "--engine", engine])
        self.work, self.units = output / ".train.work", len(list(source.glob("*.tar")))

    def workers(self) -> list[int]:
        """Return the one that works: they are children of the fork server (of Ray's daemon), not of the leader."""
        found = [pid for pid, parent in session_of(self.leader).items() if self.leader not in (pid, parent)]
        return [max(found, key=processor_time)] if found else []

    def done(self, folder: str) -> int:
        names = os.listdir(self.work / folder) if (self.work / folder).is_dir() else []
        return sum(not name.startswith(".") for name in names)

    def watch(self, moment: str, rng: random.Random) -> Callable[[], bool]:
        if moment == "finishing":
            return lambda: (self.work / "whole").exists() or self.done("units") == self.units
        begun = {folder: self.done(folder) for folder in ("units", "hashes")}
        return lambda: any(self.done(folder) > begun[folder] for folder in begun)

    def progress(self) -> dict[str, Any]:
        moment = "hashing" if self.done("hashes") else "start-up"
        if self.done("units") or any(self.work.glob("units/.*")):
            moment = "converting"
        if (self.output / "train").exists() or (self.work / "whole").exists():
            moment = "finishing"
        return {"moment": moment, "hashed": self.done("hashes"), "converted": self.done("units")}

    def outcome(self) -> dict[str, Any]:
        return {split: contents(self.output / split) for split in ("train", "heldout")}


def convert(
    *,
    kills: int = 25,
    engine: Literal["local", "ray"] = "local",
    tars: int = 60,
    samples: Annotated[int, "of each tar"] = 40,
    minutes: Minutes = 60.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Files of a conversion killed again and again against an undisturbed one.

    Kills come at random moments of start-up, hashing, converting and the last step.
    """
    with tempfile.TemporaryDirectory(prefix="convert-kills.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        make_tars(folder / "input", tars, samples)
        whole, killed = (Conversion(folder / "input", folder / name, engine) for name in ("whole", "killed"))
        found = kill_again_and_again(whole, killed, kills, minutes, seed)
        statistics = json.loads((killed.output / "train" / "conversion.json").read_text()) if found["compared"] else {}
        left = sorted(path.name for path in killed.output.iterdir() if path.name not in ("train", "heldout"))
        told = {key: statistics.get(key) for key in ("counts", "dropped")}
        return {"engine": engine, **found, "files": sum(map(len, killed.outcome().values())), "left_behind": left, **told}


# ------------------------------------------------------------------------------------------------------- encoding

T5: dict[str, Any] = dict(d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, dropout_rate=0.0)
SHAPES: dict[str, Any] = {"image_size": 16, "images_per_scene": 8, "heldout": 30}


def make_captions(folder: Path) -> None:
    """Write captions with images beside them, and an encoder of random weights with its tokenizer."""
    prepare(folder / "data", ShapesSource(**SHAPES), {"name": "shapes", **SHAPES})  # pyright: ignore[reportArgumentType]
    tokenizer = train_tokenizer(scene.caption for scene in all_scenes())
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    recipe = yaml.safe_load((ROOT / "yamls" / "quickstart.yaml").read_text())
    recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(folder / "encoder"), "max_tokens": 14}
    recipe["train_loader"]["path"] = str(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


class Encoding(Killable):
    """One into `encoded/<name>`, now in one process and now on two ranks, whose leader is Composer's launcher."""

    TURNS = ("everything", "worker", "everything", "leader")
    MOMENTS = {"start-up": 12.0, "encoding": 0.03, "finishing": 0.03}
    ORDER = ("encoding", "finishing", "encoding", "start-up", "encoding")

    def __init__(self, folder: Path, name: str, part: int, ranks: tuple[int, ...]):
        split = folder / "data" / "train"
        super().__init__(split / "encoded" / name, [])
        self.log = folder / f"{name}.log"
        self.parts = sum(-(-samples // part) for samples in Manifest.read(split).buckets.values())
        self.arguments = ["-m", "prx_composer.cli", "encode", "text", str(folder / "recipe.yaml"), "--name", name]
        self.arguments += ["--part", str(part)]
        self.ranks = ranks

    def start(self, turn: int = 0) -> None:
        ranks = self.ranks[turn % len(self.ranks)]
        launcher = [] if ranks == 1 else ["-m", "composer.cli", "-n", str(ranks)]
        self.command = [sys.executable, *launcher, *self.arguments]
        super().start(turn)

    def workers(self) -> list[int]:
        """Return the ranks, if there is a launcher."""
        return sorted(pid for pid, parent in session_of(self.leader).items() if parent == self.leader)

    def names(self) -> list[str]:
        """Return the names of the files in buckets that are there now."""
        return [name for _, _, names in os.walk(self.output) for name in names if not name.startswith(".")]

    def done(self) -> int:
        return sum(name.startswith("part.") and name.endswith(".json") for name in self.names())

    def watch(self, moment: str, rng: random.Random) -> Callable[[], bool]:
        if moment == "finishing":
            return lambda: self.progress()["moment"] == "finishing"
        begun, share = self.done(), rng.uniform(0, 0.5)  # of what is left
        return lambda: self.done() > begun + share * (self.parts - begun)

    def progress(self) -> dict[str, Any]:
        names, done = self.names(), self.done()
        is_last = "index.json" in names or "manifest.json" in names or done == self.parts
        return {"moment": "finishing" if is_last else "encoding" if done else "start-up", "parts": done}


def encode(
    *, kills: int = 16, part: Annotated[int, "samples of a part"] = 8, minutes: Minutes = 60.0, seed: int = 0
) -> dict[str, Any]:
    """Files of encoded captions, by runs killed again and again, against those of an undisturbed one.

    On one process and on two ranks in turn. Kills come at random moments of start-up, encoding and the last step.
    """
    with tempfile.TemporaryDirectory(prefix="encode-kills.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        make_captions(folder)
        whole, killed = (Encoding(folder, name, part, ranks) for name, ranks in (("whole", (1,)), ("killed", (1, 2, 2, 2))))
        found = kill_again_and_again(whole, killed, kills, minutes, seed)
        return {**found, "files": len(whole.outcome()), "parts": whole.parts}


if __name__ == "__main__":
    sys.exit(main(__doc__, train, convert, encode))
