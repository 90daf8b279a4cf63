"""What a plan is made for: GPUs and their links, the speeds that were measured on them, and the data that lie on disk."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError, at_path, nearest
from prx_composer.common.files import read_text
from prx_composer.data.contents import LeftOut, SkipList, said_of_skipped
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.data.storage import INDEX, shards_in
from prx_composer.recipe.arguments import data_sets, skip_files
from prx_composer.recipe.config import Recipe
from prx_composer.runs.stored_text import TextChoice

LINK_SHARE = 0.8  # of a link's bandwidth that collectives of large messages reach: about 360 of NVLink 4's 450 GB/s
ASSUMED_SHARE = 0.8  # of the datasheet, where nobody's measurement is at hand: what H100 and H200 reach


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Args:
        name: as `--gpu` takes it.
        datasheet_tflops: bf16, dense (vendors also print twice that, "with sparsity"), fp32 accumulation.
        memory_gib: what torch reports as its total memory, which is less than the GB in the name.
        bandwidth: of that memory, in TB/s.
        link: GB/s to the other GPUs of its node, all together, in one direction (vendors mostly print both).
        network: GB/s to other nodes, in one direction; what such GPUs usually come with.
        fp32_tflops: of the datasheet, without tensor cores, which no recipe of ours allows for fp32.
        processors: streaming multiprocessors, or compute units.
        measured_tflops: what a large bf16 matrix product reaches, if it was measured.
        source: of the measurement.
    """

    name: str
    datasheet_tflops: float
    memory_gib: float
    bandwidth: float
    link: float
    network: float
    fp32_tflops: float
    processors: int
    measured_tflops: float | None = None
    source: str = ""

    @property
    def reachable_tflops(self) -> float:
        """TFLOP/s that a bf16 matrix product reaches: as measured, or `ASSUMED_SHARE` of the datasheet."""
        return self.measured_tflops or ASSUMED_SHARE * self.datasheet_tflops

    def describe(self) -> str:
        """Return in words the peak that utilisation is a share of, and where it comes from."""
        how = f"measured {self.source}" if self.measured_tflops else f"assumed, {ASSUMED_SHARE:.0%} of the datasheet"
        return f"{self.reachable_tflops:,.0f} TFLOP/s by a bf16 matrix product ({how}); datasheet: {self.datasheet_tflops:,.0f}"


_MAMF = "by S. Bekman, ML Engineering, table of maximum achievable matmul FLOPS"
GPUS = {
    gpu.name: gpu
    for gpu in (
        # fp32 and processors: the vendors' datasheets and architecture whitepapers
        # nvidia.com/en-us/data-center/a100: 312 TFLOP/s, 80 GB, 2.04 TB/s, NVLink 600 GB/s (SXM); DGX A100: 200 Gbit/s per GPU
        GPU("a100-80gb", 312, 79.2, 2.04, 300, 25, 19.5, 108, 271, _MAMF),
        # nvidia.com/en-us/data-center/h100: 1,979 with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s (SXM); DGX H100: 400 Gbit/s
        GPU("h100", 989.4, 79.1, 3.35, 450, 50, 67, 132, 794, _MAMF),
        # nvidia.com/en-us/data-center/h200: 1,979 with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s; DGX H200: 400 Gbit/s per GPU;
        # 790 and 4.3 TB/s measured for this project
        GPU("h200", 989.4, 139.8, 4.8, 450, 50, 67, 132, 790, "for this project"),
        # NVIDIA DGX B200 datasheet: over eight GPUs 18 PFLOP/s dense and 14.4 TB/s NVLink; 180 GB, 8 TB/s, 400 Gbit/s per GPU
        GPU("b200", 2250, 178.3, 8.0, 900, 50, 75, 148, 1745, _MAMF),
        # amd.com/en/products/accelerators/instinct/mi300/mi300x.html: 1,307 TFLOP/s, 192 GB, 5.3 TB/s, seven links of 128 GB/s
        # both ways; 400 Gbit/s per GPU assumed, as clouds offer it
        GPU("mi300x", 1307.4, 191.7, 5.3, 448, 50, 163.4, 304, 668, _MAMF),
        # nvidia.com/en-us/data-center/l40s: 733 with sparsity, 48 GB, 0.86 TB/s, PCIe 4 × 16 64 GB/s; 100 Gbit/s per GPU assumed
        GPU("l40s", 362, 44.4, 0.864, 32, 12.5, 91.6, 142),
        # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 with fp32 accumulation, 24 GB, 1.01 TB/s, PCIe 4 × 16;
        # 100 Gbit/s for a node of eight assumed
        GPU("rtx4090", 165.2, 23.5, 1.008, 32, 1.5, 82.6, 128),
    )
}


def find_gpu(name: str) -> GPU:
    """Find a GPU by the table's name or the device's own ("NVIDIA H200"). Raise UserError, with the names that there are."""
    key = "".join(character for character in name.lower() if character.isalnum())
    for gpu in GPUS.values():
        if all(part in key for part in gpu.name.split("-")):
            return gpu
    raise UserError(
        f"--gpu: there is no {name!r} in the table of GPUs.{nearest(name.lower(), list(GPUS))} Time is predicted from a device's "
        "peaks: for another one, name that of the table which is most like it, with --mfu if you know what it reaches."
    )


@dataclass(frozen=True)
class Measured:
    """A speed that was measured at one image size.

    Args:
        images_per_second: per GPU.
        gpus: number that it was measured on; None: as many as are planned for.
        batch: images per step of one of them; None: as many as planned.
    """

    images_per_second: float
    gpus: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Conditions:
    """What is to be rented and how well it will be used.

    Args:
        gpu: kind.
        num_gpus: all of them.
        gpus_per_node: that share a machine and its loaders.
        price: per GPU-hour, in whatever currency; None: no costs.
        utilisation: share of what a bf16 matrix product reaches on this GPU that training reaches on one of the GPUs if it sends
            nothing and waits for nothing; None with `throughput`, or to predict it from the kernels of a step.
        throughput: measured, by image size, instead.
        samples: images in the data; None: as many as its manifest says, if that is here.
        disk: bytes per second at which a checkpoint is written, all ranks together.
        stored_text: text embeddings come with the data, though the recipe encodes captions during training.
        network: GB/s per GPU between nodes, in one direction; None: what is usual for the GPU.
        host_memory: GiB of a node's memory beside its GPUs'; None: not known.
        loader: images per second that the loaders of one node deliver; None: training never waits for them.
        leave_out: what is not to be counted: text_encoder, autoencoder, or an algorithm with a teacher, by name.
    """

    gpu: GPU
    num_gpus: int = 1
    gpus_per_node: int = 8
    price: float | None = None
    utilisation: float | None = None
    throughput: dict[int, Measured] | None = None
    samples: int | None = None
    disk: float = 1e9
    stored_text: bool = False
    network: float | None = None
    host_memory: float | None = None
    loader: float | None = None
    leave_out: tuple[str, ...] = ()

    @property
    def predicted(self) -> bool:
        """Whether the time of a step is predicted from its kernels."""
        return self.utilisation is None and self.throughput is None

    @property
    def per_node(self) -> int:
        """GPUs of one node that are used."""
        return min(self.gpus_per_node, self.num_gpus)

    @property
    def between_nodes(self) -> float:
        """GB/s per GPU between nodes, in one direction."""
        return self.gpu.network if self.network is None else self.network


def least_gpus(recipe: Recipe) -> int:
    """Return the number of GPUs that can train a recipe: its `shard_degree`, or one.

    What is wrong with the configuration is for `make_plan` to say.
    """
    fsdp = (recipe.parallelism_config or {}).get("fsdp")
    degree = fsdp.get("shard_degree") if isinstance(fsdp, dict) else None
    return degree if isinstance(degree, int) and degree > 0 else 1


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one optimizer step.

    Args:
        purpose: in words.
        bytes: sent by the GPU that sends most.
        ranks: of a group.
        window: share of the step's forward and backward passes that it can run beside; 0: nothing runs beside it.
        stride: distance of neighbours in the group, in ranks.
        pairwise: everyone sends to everyone, rather than around a ring.
    """

    purpose: str
    bytes: float
    ranks: int
    window: float
    stride: int = 1
    pairwise: bool = False


@dataclass(frozen=True)
class Links:
    """What GPUs send over, in bytes per second in one direction.

    Args:
        inside: of a node, per GPU. between: nodes, per GPU.
        per_node: GPUs of one node; neighbours in rank share it.
    """

    inside: float
    between: float
    per_node: int

    def seconds(self, sent: Traffic) -> float:
        """Return how long a step's collectives of one kind take, one after the other, without latency.

        A ring crosses a node's border once, however many of its members are in the node, and may use the adapters of all of them
        for it. In a pairwise exchange each byte for another node goes through the sender's own.
        """
        span = sent.ranks * sent.stride
        aligned = math.gcd(span, self.per_node)
        if aligned == span:
            return sent.bytes / (LINK_SHARE * self.inside)
        together = max(aligned // sent.stride, 1)  # members of a group that share a node
        if sent.pairwise:
            outside = sent.bytes * (sent.ranks - together) / (sent.ranks - 1)
            return max((sent.bytes - outside) / self.inside, outside / self.between) / LINK_SHARE
        return sent.bytes / (LINK_SHARE * min(self.inside, self.between * together))


# ------------------------------------------------------------------------------------------ what is read from disk

JPEG_BYTES_PER_PIXEL = 0.25  # at about quality 90; only used where the data isn't here to look at


def read_manifests(recipe: Recipe) -> dict[Path, Manifest] | None:
    """Read the manifests of the recipe's training data, by folder; None if not all of it is on this machine.

    Raises:
        UserError: a manifest that is not right.
    """
    if "path" not in recipe.train_loader and "mix" not in recipe.train_loader:
        return None
    with at_path("train_loader"):
        folders = [Path(part["path"]) / str(part.get("split", "train")) for part in data_sets(recipe.train_loader).values()]
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return None
    manifests = {}
    for folder in folders:
        try:
            manifests[folder] = Manifest.read(folder)
        except (ValueError, KeyError) as error:
            raise UserError(f"train_loader.path: {folder / MANIFEST} is no manifest of a data set: {error}") from error
    return manifests


def left_out(recipe: Recipe) -> list[LeftOut]:
    """Return what the skip lists of the recipe's training data leave out; of those data sets that have no `remote`.

    Raises:
        UserError: a list or keys that cannot be read, or of a data set nothing would be left.
    """
    found = []
    with at_path("train_loader"):
        for part in data_sets(recipe.train_loader).values():
            if part.get("skip") and not part.get("remote"):  # whose keys may not be here
                from prx_composer.data.dataset import leave_out  # with all that data sets import, which few plans need

                found.append(leave_out(SkipList.read(part["skip"]), Path(part["path"]) / str(part.get("split", "train"))))
    return found


def skip_lists(recipe: Recipe, skipped: list[LeftOut]) -> list[str]:
    """Return what the recipe's skip lists leave out, in words; of data that are elsewhere, that they are not counted."""
    files = skip_files(recipe.train_loader)
    missing = [f"{', '.join(sorted({*files.values()}))} is not counted where the data, or their keys, are not on this machine"]
    told = [said for said, _ in said_of_skipped(skipped)] + (missing if len(skipped) < len(files) else [])
    return [f"train_loader.skip: {said}" for said in told]


def stored_bytes(manifests: dict[Path, Manifest] | None, largest: int) -> tuple[float, str]:
    """Return the bytes on disk per image, and how that is known; `largest` is the largest image size."""
    total = samples = 0
    for folder, manifest in (manifests or {}).items():
        samples += sum(manifest.buckets.values())
        for bucket in manifest.buckets:
            shards = folder / str(bucket)
            for shard in shards_in(shards) if (shards / INDEX).is_file() else ():
                total += (shard.get("zip_data") or shard["raw_data"])["bytes"]
    size = total / samples if total else JPEG_BYTES_PER_PIXEL * largest**2
    how = "the mean of the data in train_loader.path" if total else f"{JPEG_BYTES_PER_PIXEL} bytes a pixel (JPEG) at {largest} px"
    return size, f"read from disk: {size / 1e3:,.1f} kB per image, {how}"


def read_throughput(path: str) -> tuple[GPU, dict[int, Measured]]:
    """Read what `benchmarks/throughput.py` measured: the GPU, and the speed by image size.

    The file is JSON: `{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0, …}, …]}`; `gpus` and
    `batch_per_gpu` of a stage may be there. Of a sweep the point on most GPUs is taken, of several such the fastest.

    Raises:
        UserError: no such file, another content, or a device that no plan is made for.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"--throughput: {path} cannot be read: {error.strerror}.") from error
    try:
        content = json.loads(text)
        found = [(int(stage["image_size"]), _measured(stage)) for stage in content["stages"] if "error" not in stage]
        name = str(content["gpu"])
    except (ValueError, KeyError, TypeError) as error:
        form = '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}]}'
        raise UserError(f"--throughput: {path} is no file of the form {form} ({error!r}).") from error
    if not found or min(speed.images_per_second for _, speed in found) <= 0:
        raise UserError(f"--throughput: {path} has no stage with a positive images_per_second_per_gpu.")
    try:
        gpu = find_gpu(name)
    except UserError as error:
        raise UserError(
            f"--throughput: {path} was measured on {name!r}, which is none of the GPUs that a plan is made for: "
            f"{', '.join(sorted(GPUS))}. Measure on one of them; or leave --throughput out and give --mfu."
        ) from error
    found.sort(key=lambda one: (one[1].gpus or 0, one[1].images_per_second))
    return gpu, dict(found)  # the last of each size


def _measured(stage: dict[str, Any]) -> Measured:
    counts = [None if stage.get(key) is None else int(stage[key]) for key in ("gpus", "batch_per_gpu")]
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("gpus and batch_per_gpu must be at least 1")
    return Measured(float(stage["images_per_second_per_gpu"]), *counts)


# ---------------------------------------------------------------------------- counts and rates as people write them

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_count(text: str, what: str) -> int:
    """Parse "8.7M", "240k" or "1000", a whole number ≥ 1. Raise UserError, naming `what`, for anything else."""
    count = round(_quantity(text.replace(",", "").replace("_", ""), r"([kmb]?)"))
    if count < 1:
        raise UserError(f"{what}: {text!r} is no number such as 8.7M, 240k or 1000.")
    return count


def parse_rate(text: str, what: str) -> float:
    """Parse "1GB/s" or "500MB/s" to bytes per second (decimal). Raise UserError, naming `what`, for anything else or nothing."""
    rate = _quantity(text, r"([kmgt]?)b(?:/s|ps)?")
    if rate <= 0:
        raise UserError(f"{what}: {text!r} is no rate such as 1GB/s or 500MB/s.")
    return rate


def _quantity(text: str, unit: str) -> float:
    """Return the number that is written with a unit, of which the pattern's group is the power of ten; 0 if it is none."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*{unit}", text.strip(), re.IGNORECASE)
    return float(match[1]) * _POWERS[match[2].lower()] if match else 0.0


def text_in_words(chosen: list[TextChoice], shares: dict[int, float]) -> list[str]:
    """Return why the text encoder runs, where the recipe leaves that open, and what it would gain if it didn't.

    Args:
        shares: of the text encoder in the FLOPs, by image size.
    """
    told = ", ".join(f"{share:.0%} at {size} px" for size, share in shares.items())
    gain = f" Stored text saves its share of the FLOPs, {told}; --stored-text plans that."
    return [choice.said + (gain if choice.why != "never" else "") for choice in chosen if choice.key == "train_loader"]
