"""Images per second and core of the loader against a plain Pillow + torch DataLoader over the same files, interleaved.

OMP_NUM_THREADS=1 python benchmarks/loader.py --output benchmarks/results/loader.json

The plain pipeline is what most scripts do: Image.open, torchvision's Resize (its default filter, bilinear, antialiased),
CenterCrop, ToImage, ToDtype, Normalize, and a collate function that tokenises the captions with the same tokenizer. Images are
compared first. Without workers both run in this process on one thread; else images per second are divided by the workers.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from convert import photograph
from interleaved import ratio, summary, time_in_turns
from PIL import Image
from record import circumstances
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from prx_composer.data.buckets import Bucket
from prx_composer.data.format import BucketWriter, RawSample
from prx_composer.data.loader import ImageCaptionData

STORED = 1024
CAPTION = "a photograph of a small harbour town in winter with a red boat and an old man who mends his nets number"


class PlainDataset(Dataset):
    """Files and captions, as scripts read them."""

    def __init__(self, files: list[Path], size: int, filter: v2.InterpolationMode):
        self._files = files
        self._transform = v2.Compose(
            [
                v2.Resize(size, interpolation=filter),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self._transform(Image.open(self._files[index]).convert("RGB")), f"{CAPTION} {index}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator([CAPTION], trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def write_data(folder: Path, count: int) -> list[Path]:
    """The same JPEGs as files and as a data set."""
    rng = np.random.default_rng(0)
    bucket, files = Bucket(STORED, STORED), []
    (folder / "files").mkdir()
    with BucketWriter(folder / "set" / "train", STORED, ("caption",)) as writer:
        for index in range(count):
            encoded = photograph(rng, STORED, STORED)
            files.append(folder / "files" / f"{index:04d}.jpg")
            files[-1].write_bytes(encoded)
            writer.write(bucket, RawSample(encoded, STORED, STORED, {"caption": f"{CAPTION} {index}"}, str(index)))
    return files


class Loaders:
    """Our loader and plain ones over the same files."""

    def __init__(self, folder: Path, files: list[Path], size: int, workers: int, batch_size: int):
        tokenizer = make_tokenizer()

        def collate(samples: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
            tokens = tokenizer([caption for _, caption in samples], padding="max_length", max_length=256, return_tensors="pt")
            return {"image": torch.stack([image for image, _ in samples]), "input_ids": tokens["input_ids"]}

        def plain(filter: v2.InterpolationMode) -> Iterable[dict[str, Any]]:
            return DataLoader(
                PlainDataset(files, size, filter),
                batch_size,
                num_workers=workers,
                collate_fn=collate,
                persistent_workers=workers > 0,
            )

        ours = ImageCaptionData(
            tokenizer, 256, size, batch_size, 32, 0, path=str(folder / "set"), shuffle=False, num_workers=workers
        ).dataloader
        assert isinstance(ours, DataLoader)
        self.by_name: dict[str, Iterable[dict[str, Any]]] = {
            "ours": ours,
            "plain": plain(v2.InterpolationMode.BILINEAR),
            "plain_lanczos": plain(v2.InterpolationMode.LANCZOS),
        }

    def passes(self) -> dict[str, Callable[[], None]]:
        def whole_pass(loader: Iterable[dict[str, Any]]) -> Callable[[], None]:
            def run() -> None:
                for batch in loader:
                    assert batch["image"].shape[1] == 3

            return run

        return {name: whole_pass(loader) for name, loader in self.by_name.items()}

    def difference(self) -> dict[str, float]:
        """Mean absolute difference of our first batch to the others', in 255ths."""
        first = {name: next(iter(loader))["image"] for name, loader in self.by_name.items()}
        ours = first.pop("ours").float()
        return {name: round(float(((image + 1) * 127.5 - ours).abs().mean()), 3) for name, image in first.items()}


class PeakMemory:
    """Megabytes that each child process has for itself (pages that it shares with this one are not counted), at its peak."""

    def __init__(self) -> None:
        self._peaks: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._peaks[child.pid] = max(self._peaks.get(child.pid, 0.0), child.memory_full_info().uss / 2**20)

    @property
    def megabytes(self) -> list[float]:
        return [round(peak, 1) for peak in self._peaks.values()]


def measure(folder: Path, files: list[Path], size: int, workers: int, rounds: int, batch_size: int) -> dict[str, Any]:
    loaders = Loaders(folder, files, size, workers, batch_size)
    difference = loaders.difference()
    times = time_in_turns(loaders.passes(), rounds, warmup=1)
    cores = max(workers, 1)
    result: dict[str, Any] = {
        "stored": STORED,
        "image_size": size,
        "workers": workers,
        "batch_size": batch_size,
        "images_per_second_and_core": {
            name: summary([1000 * len(files) / elapsed / cores for elapsed in part], 1) for name, part in times.items()
        },
        "times_plain": ratio(times, "plain", "ours"),
        "times_plain_lanczos": ratio(times, "plain_lanczos", "ours"),
        "mean_difference_of_255": difference,
    }
    if workers:
        del loaders
        gc.collect()  # ends the other workers
        with PeakMemory() as memory:
            Loaders(folder, files, size, workers, batch_size).passes()["ours"]()
        result["peak_memory_of_a_worker_mb"] = memory.megabytes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="loader-speed."))
    try:
        files = write_data(folder, arguments.images)
        runs = [
            measure(folder, files, size, workers, arguments.rounds, arguments.batch_size)
            for size in (512, 1024)
            for workers in arguments.workers
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "what": "images per second and core of the loader and of plain Pillow + torch pipelines, JPEGs of 1024 × 1024",
        **circumstances(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg(),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
