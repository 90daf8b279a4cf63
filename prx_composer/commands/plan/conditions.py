"""What is to be rented, and how well it is known to work."""

from dataclasses import dataclass

from prx_composer.commands.plan.hardware import GPU


@dataclass(frozen=True)
class Measured:
    """A speed at one image size.

    Args:
        images_per_second: per GPU.
        gpus: that it was measured on; None: on those that are planned for.
        batch: images per step of one of them; None: as planned.
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
            nothing and waits for nothing; None with `throughput`.
        throughput: measured, by image size, instead.
        samples: images in the data; None: as many as its manifest says, if that is here.
        disk: bytes per second at which a checkpoint is written, all ranks together.
        stored_text: text embeddings come with the data, though the recipe encodes captions during training.
        network: GB/s per GPU between nodes, in one direction; None: what is usual for the GPU.
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
    loader: float | None = None
    leave_out: tuple[str, ...] = ()

    @property
    def per_node(self) -> int:
        """GPUs of one node that are used."""
        return min(self.gpus_per_node, self.num_gpus)
