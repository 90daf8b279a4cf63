"""Images per second and core on their way from files into batches, against plain pipelines over the same files, in turns.

python benchmarks/data_speed.py convert --output convert.json
OMP_NUM_THREADS=1 python benchmarks/data_speed.py loader --output loader.json
"""

import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
from common import main, ratio, summary, time_in_turns
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from prx_composer.commands.convert import run_conversion
from prx_composer.commands.convert.settings import Settings
from prx_composer.data.format import Bucket, BucketWriter, RawSample, assign_bucket, make_buckets
from prx_composer.data.loader import ImageCaptionData


def photograph(rng: np.random.Generator, height: int, width: int) -> bytes:
    """Make a JPEG with the entropy of a photograph: about 0.3 bytes per pixel."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# ----------------------------------------------------------------------------------------------------- converting

MEMORY = """
import json, sys
from prx_composer.commands.convert import run_conversion, units
from prx_composer.commands.convert.settings import Settings

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

start = peak()
settings = Settings("webdataset", sys.argv[1], {"caption": "txt"}, image_size=32, multiple=16, duplicates=sys.argv[3])
statistics = run_conversion(settings, sys.argv[2])
print(json.dumps({"start_mb": start, "peak_mb": peak(), "above_start_mb": peak() - start, "counts": statistics["counts"]}))
"""


def write_photographs(path: Path, count: int, sizes: Sequence[tuple[int, int]], words: int) -> None:
    """Write a tar of photographs of these sizes in turn, with captions."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            add_to_tar(tar, f"{index:05d}.jpg", photograph(rng, *sizes[index % len(sizes)]))
            add_to_tar(tar, f"{index:05d}.txt", b"a caption of some words " * words)


def bare(path: Path, output: Path, resize: Callable[[Image.Image, Bucket], Image.Image], base: int) -> None:
    """Decode, resize, encode, and write to one file; nothing else."""
    buckets = make_buckets(base, 32)
    with tarfile.open(path) as tar, output.open("wb") as out:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(file.read()))
                resized = resize(image, assign_bucket(image.height, image.width, buckets))
                encoded = io.BytesIO()
                resized.save(encoded, "JPEG", quality=92, subsampling=2)
                out.write(encoded.getvalue())


def with_torch(image: Image.Image, bucket: Bucket) -> Image.Image:
    image.draft("RGB", (2 * bucket.width, 2 * bucket.height))
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]
    scale = max(bucket.height / image.height, bucket.width / image.width)
    height, width = round(bucket.height / scale), round(bucket.width / scale)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    part = pixels[:, :, top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(part, tuple(bucket), mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


def with_pillow(image: Image.Image, bucket: Bucket) -> Image.Image:
    return ImageOps.fit(image, (bucket.width, bucket.height), Image.Resampling.LANCZOS)


def measure_speed(folder: Path, images: int, rounds: int, base: int) -> dict[str, Any]:
    tar = folder / "photographs.tar"
    write_photographs(tar, images, [(1024, 1536), (896, 1344), (1365, 2048), (1600, 1200)], 10)
    settings = Settings("webdataset", str(tar), {"caption": "txt"}, image_size=base)

    def convert() -> None:
        run_conversion(settings, str(folder / "out"))
        shutil.rmtree(folder / "out")

    steps = {
        "convert": convert,
        "bare": lambda: bare(tar, folder / "bare", with_torch, base),
        "pillow": lambda: bare(tar, folder / "bare", with_pillow, base),
    }
    times = time_in_turns(steps, rounds, warmup=1)
    return {
        "base_size": base,
        "images": images,
        "images_per_second_and_core": {name: summary([1000 * images / t for t in part]) for name, part in times.items()},
        "convert_of_bare": ratio(times, "bare", "convert"),
        "convert_of_pillow": ratio(times, "pillow", "convert"),
    }


def measure_kept(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """Convert images that have their bucket's size already, as most synthetic ones do: they are written as they are."""
    tar = folder / "squares.tar"
    write_photographs(tar, images, [(1024, 1024)], 40)
    settings = Settings("webdataset", str(tar), {"caption": "txt"}, image_size=1024)

    def convert() -> None:
        assert run_conversion(settings, str(folder / "out"))["counts"]["original_bytes"] == images
        shutil.rmtree(folder / "out")

    (times,) = time_in_turns({"convert": convert}, rounds, warmup=1).values()
    speed, size = summary([1000 * images / t for t in times]), tar.stat().st_size
    return {"base_size": 1024, "images": images, "bytes_per_image": size // images, "images_per_second_and_core": speed}


def measure_memory(folder: Path, samples: int, duplicates: str) -> dict[str, Any]:
    """Convert many tiny samples in a process of its own."""
    path = folder / "tiny.tar"
    if not path.exists():
        rng = np.random.default_rng(0)
        with tarfile.open(path, "w") as tar:
            for index in range(samples):
                file = io.BytesIO()
                coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3)).astype(np.uint8))
                coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG")
                add_to_tar(tar, f"{index:07d}.jpg", file.getvalue())
                add_to_tar(tar, f"{index:07d}.txt", b"tiny")
    command = [sys.executable, "-c", MEMORY, str(path), str(folder / f"tiny-{duplicates}"), duplicates]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"samples": samples, "duplicates": duplicates, **json.loads(result.stdout.splitlines()[-1])}


def convert(
    *, images: int = 24, rounds: int = 7, tiny: Annotated[int, "samples of the measurement of memory"] = 200_000
) -> dict[str, Any]:
    """Images per second and core of a conversion and of bare loops; memory of a conversion of tiny samples.

    The bare loops read the same tars with tarfile and do nothing but decode, resize, encode and write to one file: with the same
    libraries (Pillow and torch), and with Pillow alone, as most scripts do (antialiased Lanczos). All in one process, one thread.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="convert-speed.") as temporary:
        folder = Path(temporary)
        return {
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "speed": [measure_speed(folder, images, rounds, base) for base in (1024, 512)],
            "kept": measure_kept(folder, 2 * images, rounds),
            "memory": [measure_memory(folder, tiny, duplicates) for duplicates in ("keep", "exact")],
        }


# -------------------------------------------------------------------------------------------------------- loading

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
    """Write the same JPEGs as files and as a data set."""
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


Loaders = dict[str, Iterable[dict[str, Any]]]


def make_loaders(folder: Path, files: list[Path], size: int, workers: int, batch_size: int) -> Loaders:
    """Make our loader and plain ones over the same files."""
    tokenizer = make_tokenizer()

    def collate(samples: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
        tokens = tokenizer([caption for _, caption in samples], padding="max_length", max_length=256, return_tensors="pt")
        return {"image": torch.stack([image for image, _ in samples]), "input_ids": tokens["input_ids"]}

    def plain(filter: v2.InterpolationMode) -> Iterable[dict[str, Any]]:
        dataset = PlainDataset(files, size, filter)
        return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)

    options: dict[str, Any] = dict(path=str(folder / "set"), shuffle=False, num_workers=workers)
    ours = ImageCaptionData(tokenizer, 256, size, batch_size, 32, 0, **options).dataloader
    assert isinstance(ours, DataLoader)
    filters = v2.InterpolationMode
    return {"ours": ours, "plain": plain(filters.BILINEAR), "plain_lanczos": plain(filters.LANCZOS)}


def whole_pass(loader: Iterable[dict[str, Any]]) -> None:
    for batch in loader:
        assert batch["image"].shape[1] == 3


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


def measure_loaders(folder: Path, files: list[Path], size: int, workers: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Compare the images of the first batches, in 255ths, then time whole passes."""
    loaders = make_loaders(folder, files, size, workers, batch_size)
    first = {name: next(iter(loader))["image"] for name, loader in loaders.items()}
    ours = first.pop("ours").float()
    difference = {name: round(float(((image + 1) * 127.5 - ours).abs().mean()), 3) for name, image in first.items()}
    passes = {name: lambda loader=loader: whole_pass(loader) for name, loader in loaders.items()}
    times = time_in_turns(passes, rounds, warmup=1)
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
        del loaders, passes
        gc.collect()  # ends the other workers
        with PeakMemory() as memory:
            whole_pass(make_loaders(folder, files, size, workers, batch_size)["ours"])
        result["peak_memory_of_a_worker_mb"] = memory.megabytes
    return result


def loader(*, images: int = 64, rounds: int = 9, workers: Sequence[int] = (0, 1, 2), batch_size: int = 16) -> dict[str, Any]:
    """Images per second and core of the loader and of plain Pillow + torch pipelines, JPEGs of 1024 × 1024.

    The plain pipeline is what most scripts do: Image.open, torchvision's Resize (its default filter, bilinear, antialiased),
    CenterCrop, ToImage, ToDtype, Normalize, and a collate function that tokenises the captions with the same tokenizer. Without
    workers both run in this process on one thread; else images per second are divided by the workers.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-speed.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        files = write_data(folder, images)
        runs = [measure_loaders(folder, files, size, count, rounds, batch_size) for size in (512, 1024) for count in workers]
    return {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability(), "runs": runs}


if __name__ == "__main__":
    sys.exit(main(__doc__, convert, loader))
