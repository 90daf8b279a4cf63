"""Stored latents: which of them a batch takes, and whether they are those that the model's autoencoder would make."""

from typing import Any

from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.rows import BucketRows
from prx_composer.data.stored import StoredColumn, fingerprint, unpack


def names_of(latent: str | list[str] | None) -> list[str]:
    """`train_loader.latent` as a list: one name for every image size."""
    return [latent] if isinstance(latent, str) else list(latent or [])


def sizes_of(column: StoredColumn, buckets: list[Bucket], base_size: int) -> list[Bucket]:
    """Image sizes that were encoded, bucket by bucket; `base_size` is the data set's own."""
    assert column.image_size is not None and column.multiple is not None
    return [bucket.at(column.image_size, base_size, column.multiple) for bucket in buckets]


def size_problem(
    columns: dict[str, StoredColumn], buckets: list[Bucket], base_size: int, image_size: int, sizes: list[Bucket]
) -> str | None:
    """What is wrong with training on images of some size from these latents, by name; None if nothing is.

    Args:
        columns: by name.
        buckets: of the data set. base_size: its image size.
        image_size: that is asked for. sizes: of every bucket then.
    """
    there = {column.image_size: name for name, column in columns.items()}
    if image_size not in there:
        told = ", ".join(f"{name} ({size} px)" for size, name in sorted(there.items(), key=lambda entry: entry[0] or 0))
        return (
            f"there are no latents of {image_size} px; `latent` names {told}. Make them with `prx encode latents --image-size "
            f"{image_size} --name NAME` and name both: latent: [{', '.join([*there.values(), 'NAME'])}]."
        )
    name = there[image_size]
    for bucket, size, stored in zip(buckets, sizes, sizes_of(columns[name], buckets, base_size), strict=True):
        if size != stored:
            return (
                f"images of bucket {bucket} are {size} at {image_size} px, but the latents {name} were made of {stored}: with "
                f"sides that are multiples of {columns[name].multiple}. Encode them again with this recipe's patch_size."
            )
    return None


class StoredLatents:
    """Latents of a split, by the size of the images that they were made of.

    Args:
        columns: by name, with their rows.
        buckets: of the data set. base_size: its image size.

    Raises:
        ValueError: two columns of one image size.
    """

    def __init__(self, columns: dict[str, tuple[StoredColumn, BucketRows]], buckets: list[Bucket], base_size: int):
        self.columns = {name: column for name, (column, _) in columns.items()}
        self._buckets, self._base_size = buckets, base_size
        self._of_size: dict[tuple[int, Bucket], tuple[StoredColumn, BucketRows]] = {}
        for name, (column, rows) in columns.items():
            if twice := [other for other, that in self.columns.items() if that.image_size == column.image_size and other != name]:
                raise ValueError(f"latent: {name} and {twice[0]} are both of {column.image_size} px; leave one out.")
            for index, size in enumerate(sizes_of(column, buckets, base_size)):
                self._of_size[index, size] = column, rows

    def check(self, image_size: int, sizes: list[Bucket]) -> None:
        """Raises ValueError unless images of these sizes, bucket by bucket, have latents."""
        if problem := size_problem(self.columns, self._buckets, self._base_size, image_size, sizes):
            raise ValueError(problem)

    def read(self, bucket: int, size: Bucket, index: int) -> Tensor:
        """(channels, h, w) in the dtype that is stored; raises ValueError for an image that could not be decoded."""
        column, rows = self._of_size[bucket, size]
        row = rows.row(bucket, index)
        if not row["shape"]:
            raise ValueError("it could not be decoded when latents were stored")
        return unpack(row, column.storage)


def latent_column(
    autoencoder: Any, name: str, revision: str | None, storage: str, image_size: int, multiple: int
) -> StoredColumn:
    """What `prx encode latents` stores with this autoencoder; raises UserError for one without latents or weights to tell it by.

    Args:
        name: hub id, folder or description.
        image_size, multiple: see `StoredColumn`.
    """
    if (autoencoder.channels, autoencoder.downsampling) == (3, 1):
        raise UserError(
            "model.autoencoder: pixels has no latents to store: training sees the images as they are. Name an autoencoder, such "
            "as {name: diffusers, pretrained: …}."
        )
    if getattr(autoencoder, "module", None) is None:
        raise UserError(
            f"model.autoencoder: {type(autoencoder).__name__} has no `module`, the network whose weights tell latents apart; "
            "give it one to store its latents."
        )
    return StoredColumn(
        kind="latents",
        encoder=name,
        revision=revision,
        fingerprint=fingerprint(autoencoder.module),
        width=autoencoder.channels,
        storage=storage,
        image_size=image_size,
        multiple=multiple,
        downsampling=autoencoder.downsampling,
        scaling=getattr(autoencoder, "scaling", 1.0),
        shift=getattr(autoencoder, "shift", 0.0),
    )


def check_latent_column(column: StoredColumn, autoencoder: Any, path: str) -> None:
    """Whether stored latents are those that the model's autoencoder would make.

    Raises:
        UserError: they are of other channels, another size or scale, or other weights, by name.
    """
    assert column.image_size is not None and column.multiple is not None
    own = latent_column(autoencoder, "", None, column.storage, column.image_size, column.multiple)
    words = {"width": "channels", "downsampling": "downsampling", "scaling": "scaling_factor", "shift": "shift_factor"}
    stored = {word: getattr(column, key) for key, word in words.items()}
    made = {word: getattr(own, key) for key, word in words.items()}
    if different := [word for word in stored if stored[word] != made[word]]:
        told = ", ".join(f"{word} {stored[word]} (model.autoencoder: {made[word]})" for word in different)
        raise UserError(
            f"{path}: the stored latents were made by {column.encoder} with {told}. Name the same autoencoder, or run "
            "`prx encode latents` again."
        )
    if column.fingerprint != own.fingerprint:
        raise UserError(
            f"{path}: the stored latents were made by {column.encoder} (revision {column.revision or 'not said'}), whose weights "
            "are not those of model.autoencoder. Name the same autoencoder, or run `prx encode latents` again."
        )
