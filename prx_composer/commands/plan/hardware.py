"""What a GPU can do: by its datasheet, and what a bf16 matrix product was seen to reach; and what it is wired to."""

from dataclasses import dataclass

from prx_composer.common.errors import UserError, nearest

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
        measured_tflops: what a large bf16 matrix product reaches, if it was measured.
        source: of the measurement.
    """

    name: str
    datasheet_tflops: float
    memory_gib: float
    bandwidth: float
    link: float
    network: float
    measured_tflops: float | None = None
    source: str = ""

    @property
    def reachable_tflops(self) -> float:
        """What a bf16 matrix product reaches: measured, or `ASSUMED_SHARE` of the datasheet."""
        return self.measured_tflops or ASSUMED_SHARE * self.datasheet_tflops

    def describe(self) -> str:
        """The peak that utilisation is a share of, and where it comes from."""
        how = f"measured {self.source}" if self.measured_tflops else f"assumed, {ASSUMED_SHARE:.0%} of the datasheet"
        return f"{self.reachable_tflops:,.0f} TFLOP/s by a bf16 matrix product ({how}); datasheet: {self.datasheet_tflops:,.0f}"


_MAMF = "by S. Bekman, ML Engineering, table of maximum achievable matmul FLOPS"
GPUS = {
    gpu.name: gpu
    for gpu in (
        # nvidia.com/en-us/data-center/a100: 312 TFLOP/s, 80 GB, 2.04 TB/s, NVLink 600 GB/s (SXM); DGX A100: 200 Gbit/s per GPU
        GPU("a100-80gb", 312, 79.2, 2.04, 300, 25, 271, _MAMF),
        # nvidia.com/en-us/data-center/h100: 1,979 with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s (SXM); DGX H100: 400 Gbit/s
        GPU("h100", 989.4, 79.1, 3.35, 450, 50, 794, _MAMF),
        # nvidia.com/en-us/data-center/h200: 1,979 with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s; DGX H200: 400 Gbit/s per GPU;
        # 790 and 4.3 TB/s measured for this project
        GPU("h200", 989.4, 139.8, 4.8, 450, 50, 790, "for this project"),
        # NVIDIA DGX B200 datasheet: over eight GPUs 18 PFLOP/s dense and 14.4 TB/s NVLink; 180 GB, 8 TB/s, 400 Gbit/s per GPU
        GPU("b200", 2250, 178.3, 8.0, 900, 50, 1745, _MAMF),
        # amd.com/en/products/accelerators/instinct/mi300/mi300x.html: 1,307 TFLOP/s, 192 GB, 5.3 TB/s, seven links of 128 GB/s
        # both ways; 400 Gbit/s per GPU assumed, as clouds offer it
        GPU("mi300x", 1307.4, 191.7, 5.3, 448, 50, 668, _MAMF),
        # nvidia.com/en-us/data-center/l40s: 733 with sparsity, 48 GB, 0.86 TB/s, PCIe 4 × 16 64 GB/s; 100 Gbit/s per GPU assumed
        GPU("l40s", 362, 44.4, 0.864, 32, 12.5),
        # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 with fp32 accumulation, 24 GB, 1.01 TB/s, PCIe 4 × 16;
        # 100 Gbit/s for a node of eight assumed
        GPU("rtx4090", 165.2, 23.5, 1.008, 32, 1.5),
    )
}


def find_gpu(name: str) -> GPU:
    """By the table's name or the device's own ("NVIDIA H200"); raises UserError, with the names that there are."""
    key = "".join(character for character in name.lower() if character.isalnum())
    for gpu in GPUS.values():
        if all(part in key for part in gpu.name.split("-")):
            return gpu
    raise UserError(f"--gpu: there is no {name!r} in the table of GPUs.{nearest(name.lower(), list(GPUS))}")
