"""Speed of a conversion per core against a bare loop over the same files, interleaved; and its memory over many tiny samples.

python benchmarks/convert.py --output benchmarks/results/convert.json

The bare loops read the same tars with tarfile and do nothing but decode, resize, encode and write to one file: with the same
libraries (Pillow and torch), and with Pillow alone, as most scripts do (antialiased Lanczos). All in one process, one thread.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import ratio, summary, time_in_turns
from PIL import Image
from record import circumstances

from prx_composer.commands.convert import job
from prx_composer.commands.convert.settings import Settings
from prx_composer.data.buckets import Bucket, assign_bucket, make_buckets

MEMORY = """
import json, sys
from prx_composer.commands.convert import job, units
from prx_composer.commands.convert.settings import Settings

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

start = peak()
settings = Settings("webdataset", sys.argv[1], {"caption": "txt"}, image_size=32, multiple=16, duplicates=sys.argv[3])
statistics = job.convert(settings, sys.argv[2])
print(json.dumps({"start_mb": start, "peak_mb": peak(), "above_start_mb": peak() - start, "counts": statistics["counts"]}))
"""


def photograph(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG with the entropy of a photograph: about 0.3 bytes per pixel."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_photographs(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            size = [(1024, 1536), (896, 1344), (1365, 2048), (1600, 1200)][index % 4]
            add(tar, f"{index:05d}.jpg", photograph(rng, *size))
            add(tar, f"{index:05d}.txt", b"a caption of some words " * 10)


def bare(path: Path, output: Path, resize: Callable[[Image.Image, Bucket], Image.Image], base: int) -> None:
    """Decode, resize, encode, write."""
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
    from PIL import ImageOps

    return ImageOps.fit(image, (bucket.width, bucket.height), Image.Resampling.LANCZOS)


def measure_speed(folder: Path, images: int, rounds: int, base: int) -> dict[str, Any]:
    tar = folder / "photographs.tar"
    write_photographs(tar, images)
    settings = Settings("webdataset", str(tar), {"caption": "txt"}, image_size=base)

    def convert() -> None:
        job.convert(settings, str(folder / "out"))
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
    """Images that have their bucket's size already, as most synthetic ones do: looked through, and written as they are."""
    tar, rng = folder / "squares.tar", np.random.default_rng(0)
    with tarfile.open(tar, "w") as squares:
        for index in range(images):
            add(squares, f"{index:05d}.jpg", photograph(rng, 1024, 1024))
            add(squares, f"{index:05d}.txt", b"a caption of some words " * 40)
    size = tar.stat().st_size

    def convert() -> None:
        kept = job.convert(Settings("webdataset", str(tar), {"caption": "txt"}, image_size=1024), str(folder / "out"))
        assert kept["counts"]["original_bytes"] == images
        shutil.rmtree(folder / "out")

    (times,) = time_in_turns({"convert": convert}, rounds, warmup=1).values()
    speed = summary([1000 * images / t for t in times])
    return {"base_size": 1024, "images": images, "bytes_per_image": size // images, "images_per_second_and_core": speed}


def measure_memory(folder: Path, samples: int, duplicates: str) -> dict[str, Any]:
    path = folder / "tiny.tar"
    if not path.exists():
        rng = np.random.default_rng(0)
        with tarfile.open(path, "w") as tar:
            for index in range(samples):
                file = io.BytesIO()
                coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3)).astype(np.uint8))
                coarse.resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG")
                add(tar, f"{index:07d}.jpg", file.getvalue())
                add(tar, f"{index:07d}.txt", b"tiny")
    command = [sys.executable, "-c", MEMORY, str(path), str(folder / f"tiny-{duplicates}"), duplicates]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"samples": samples, "duplicates": duplicates, **json.loads(result.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", type=int, default=200_000, help="samples of the measurement of memory")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="convert-speed."))
    try:
        speed = [measure_speed(folder, arguments.images, arguments.rounds, base) for base in (1024, 512)]
        kept = measure_kept(folder, 2 * arguments.images, arguments.rounds)
        memory = [measure_memory(folder, arguments.tiny, duplicates) for duplicates in ("keep", "exact")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "what": "images per second and core of a conversion and of bare loops; memory of a conversion of tiny samples",
        **circumstances(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg(),
        "speed": speed,
        "kept": kept,
        "memory": memory,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
