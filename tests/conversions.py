"""Inputs for conversions, made as their own tools make them, and the rows that come out."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import LocalDataset

from prx_composer.commands.convert import check_columns, run_conversion
from prx_composer.commands.convert.records import Record, open_source
from prx_composer.commands.convert.settings import Settings
from prx_composer.data.format import Manifest


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours that differ from seed to seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(height: int, width: int, seed: int = 0, **options: Any) -> bytes:
    return encoded(picture(height, width, seed), **options)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, image: bytes, caption: str = "a caption", **columns: Any) -> list[tuple[str, bytes]]:
    """The members of one WebDataset sample."""
    members = [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
    return members + ([(f"{key}.json", json.dumps(columns).encode())] if columns else [])


def settings(source: str, path: Path, **changes: Any) -> Settings:
    plain: dict[str, Any] = {"input": str(path), "captions": {"caption": "txt"}, "image_size": 64, "multiple": 16}
    return Settings(source=source, **plain | changes)


def convert(source: str, path: Path, output: Path, workers: int = 0, on: str = "local", **changes: Any) -> dict[str, Any]:
    return run_conversion(settings(source, path, **changes), str(output), workers, on)


def rows(output: Path, split: str = "train") -> list[dict[str, Any]]:
    """Every row of a data set, in order, as mosaicml-streaming reads it."""
    folder = output / split
    found = []
    for bucket in sorted(Manifest.read(folder).buckets):
        dataset = LocalDataset(str(folder / str(bucket)))
        found += [dataset[index] | {"bucket": bucket} for index in range(len(dataset))]
    return found


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


SIZES = [(100, 100), (90, 160), (160, 90), (64, 64), (300, 200)]


def write_tars(folder: Path, tars: int = 3, each: int = 8) -> Path:
    for number in range(tars):
        members = []
        for i in range(each):
            seed = each * number + i
            members += sample(f"{number}/{i:03d}", jpeg(*SIZES[i % len(SIZES)], seed), f"caption {seed}", score=seed / 10)
        write_tar(folder / f"{number:03d}.tar", members)
    return folder


def fetch_all(s3: Any, prefix: str, folder: Path) -> Path:
    """Downloads what lies below a prefix of the bucket `data`."""
    for entry in s3.list_objects_v2(Bucket="data", Prefix=prefix)["Contents"]:
        path = folder / entry["Key"].removeprefix(prefix).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("data", entry["Key"], str(path))
    return folder


WORDS = [
    "",
    " ",
    "plain",
    "zażółć gęślą",
    "кошка на диване.",
    "a 猫 \u2028 and \u0085 and \f",
    "\U0001f63a",
    'quoted " \\ / \t',
    "e\u0301",
]


def read(source: str, path: Path, **changes: Any) -> list[Record]:
    """All records, after the checks that come before a conversion."""
    chosen = settings(source, path, **changes)
    opened = open_source(chosen)
    units = opened.plan()
    check_columns(chosen, opened, units)
    return [record for unit in units for record in opened.read(unit)]


def asked(*names: str) -> dict[str, Any]:
    """Settings that ask for these columns."""
    return {"captions": {f"c{number}": name for number, name in enumerate(names)}}
