"""Samples → batches, with text embeddings of valid tokens only, on their way to the device, and what a schedule may change."""

import logging
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec, State
from composer.core.data_spec import _default_split_batch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerBase

from prx_composer.common.errors import UserError
from prx_composer.data.contents import said_of_skipped
from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
from prx_composer.data.mixture import MixedDataset
from prx_composer.data.sampler import BucketBatchSampler, BucketedDataset, fewer_than_a_batch
from prx_composer.models.caption_format import chief, text_mask
from prx_composer.models.prompts import CaptionCounts, tokenize
from prx_composer.recipe.arguments import data_sets
from prx_composer.recipe.times import phases_of
from prx_composer.schedule.moments import Moment

log = logging.getLogger(__name__)

PACKED = ("text_embedding", "text_position")
GROUPED = ("text_order", "text_groups")
SEEN = ("image", "latent")


class Collator:
    """Make a batch of samples: images stacked as uint8, captions tokenised, latents and features, by column, as they are stored.

    In evaluation `counted` bool (B,) says which of them are to be measured.

    Stored text embeddings come as `text_embedding` (V, C), those of the V valid tokens of all captions one after the other, and
    `text_position` int64 (V,), where each stands in the flattened (B, T).

    Args:
        max_workers: DataLoader workers that will share this object, for `counts` of captions that are cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_workers: int = 0):
        self.tokenizer, self.max_tokens = tokenizer, chief(tokenizer, max_tokens)[1]
        self.counts = CaptionCounts(max_workers)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = tokenize(self.tokenizer, [sample["caption"] for sample in samples], self.max_tokens, self.counts)
        seen = {name: _stack(name, [sample[name] for sample in samples]) for name in SEEN if name in samples[0]}
        features = {name: torch.stack([sample["features"][name] for sample in samples]) for name in samples[0]["features"]}
        batch = {**seen, **tokens, "sample_id": torch.tensor([sample["sample_id"] for sample in samples]), **features}
        if "counted" in samples[0]:
            batch["counted"] = torch.tensor([sample["counted"] for sample in samples])
        if "text_embedding" in samples[0]:
            batch |= self._packed(samples, text_mask(self.tokenizer, tokens["attention_mask"]))
        return batch

    def _packed(self, samples: list[dict[str, Any]], mask_BT: Tensor) -> dict[str, Tensor]:
        for sample, valid in zip(samples, mask_BT.sum(1).tolist(), strict=True):
            stored = len(sample["text_embedding"])
            if stored != valid:
                raise UserError(
                    f"Sample {sample['sample_id']} has {stored} stored text tokens, but its caption has {valid}: the tokenizer "
                    "is another one, or the captions have changed. Encode them again with `prx encode text`."
                )
        embedding = torch.cat([sample["text_embedding"] for sample in samples])
        packed = {"text_embedding": embedding, "text_position": mask_BT.flatten().nonzero().flatten(), "attention_mask": mask_BT}
        if "text_pooled" in samples[0]:
            packed["text_pooled"] = torch.stack([sample["text_pooled"] for sample in samples])
        return packed


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    if name != "image":
        return torch.stack(tensors)
    # With channels innermost, as they are decoded: to move them here costs a quarter of the decoding, on a GPU nothing.
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def channels_first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with its images contiguous as (B, 3, H, W), once it is on its device."""
    return batch | {"image": batch["image"].contiguous()} if "image" in batch else batch


_GROUPS = 4  # of a microbatch's captions: passes of the encoder, which small ones don't fill a GPU with
_TOKENS = 16  # lengths are rounded up to a multiple
_PASS = 32  # tokens that one more pass must spare at least


def caption_groups(mask_BT: Tensor) -> dict[str, Any]:
    """Return how captions are encoded in groups of similar length, each padded only to its own longest.

    Args:
        mask_BT: in the host's memory, True for valid tokens.

    Returns:
        `text_order` int64 (B,), the captions from short to long; and `text_groups`, for each group how many captions it takes of
        them, and how many tokens: those of up to four groups that pad least. Nothing if all are to be encoded at full length.
    """
    valid = mask_BT.numpy().sum(1)  # not torch's: the device is never asked
    rounded = -(-valid.clip(min=1) // _TOKENS) * _TOKENS
    levels, counts = np.unique(rounded.clip(max=mask_BT.shape[1]), return_counts=True)
    tokens, upto = levels.tolist(), counts.cumsum().tolist()
    best = [(n * t, ((n, t),)) for n, t in zip(upto, tokens, strict=True)]  # cost and groups of the shortest, up to each level
    for _ in range(_GROUPS - 1):  # with one more group, which begins after level i
        more = [
            [(cost + _PASS + (upto[j] - upto[i]) * t, (*of, (upto[j] - upto[i], t))) for i, (cost, of) in enumerate(best[:j])]
            for j, t in enumerate(tokens)
        ]
        best = [min(one, *others) if others else one for one, others in zip(best, more, strict=True)]
    groups = best[-1][1]
    order = torch.from_numpy(valid.argsort(kind="stable"))
    return {"text_order": order, "text_groups": groups} if groups != (tuple(mask_BT.shape),) else {}


def split_batch(batch: Any, microbatch_size: int | float | None) -> Sequence[Any]:
    """Split a batch as Composer does, one with packed text embeddings, too; captions that are to be encoded are grouped.

    Args:
        microbatch_size: None leaves it whole, as a Trainer asks that was told none for evaluation.
    """
    if not isinstance(batch, dict):
        return _default_split_batch(batch, microbatch_size)  # pyright: ignore[reportArgumentType]
    length = next(len(value) for name, value in batch.items() if isinstance(value, torch.Tensor) and name not in PACKED)
    # The last batch of an evaluation may be smaller than a microbatch, of which Composer warns.
    microbatch_size = length if microbatch_size is None else min(microbatch_size, length)
    if "text_position" not in batch:
        rest = {name: value for name, value in batch.items() if name not in GROUPED}
        plain: list[dict[str, Any]] = list(_default_split_batch(rest, microbatch_size))  # pyright: ignore[reportArgumentType]
        mask = rest.get("attention_mask")
        if mask is None or mask.device.type != "cpu" or "text_embedding" in rest:
            return plain
        return [microbatch | caption_groups(microbatch["attention_mask"]) for microbatch in plain]
    width = batch["attention_mask"].shape[1]
    rest = {name: value for name, value in batch.items() if name not in PACKED}
    microbatches: list[dict[str, Any]] = list(_default_split_batch(rest, microbatch_size))  # pyright: ignore[reportArgumentType]
    valid = [int(microbatch["attention_mask"].sum()) for microbatch in microbatches]  # in the host's memory
    parts = zip(batch["text_embedding"].split(valid), batch["text_position"].split(valid), strict=True)
    first = 0
    for microbatch, (embedding, position) in zip(microbatches, parts, strict=True):
        microbatch |= {"text_embedding": embedding, "text_position": position - first * width}
        first += len(microbatch["attention_mask"])
    return microbatches


class ImageCaptionLoader(DataLoader):
    """A DataLoader whose image and batch size can change between passes, and whose pass can be ended early.

    A change of stage ends the running pass (to Composer: an epoch), so that every pass has one image size and one
    batch size; batches that workers had prepared for the old stage are dropped.
    """

    even = True  # all ranks' batches have as many samples, and as many tokens: see `Trainer`
    dataset: BucketedDataset  # pyright: ignore[reportIncompatibleVariableOverride]
    batch_sampler: BucketBatchSampler

    def __init__(self, dataset: BucketedDataset, batch_sampler: Any, collator: Collator, num_workers: int = 0):
        workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        pinned = torch.cuda.is_available()
        super().__init__(dataset, batch_sampler=batch_sampler, collate_fn=collator, pin_memory=pinned, **workers)
        self._pass_ended = False
        self._running: tuple[int, int, int] | None = None  # the pass in hand: epoch, batch size, batches given

    @property
    def image_size(self) -> int:
        """Side of the square whose area the images have, in this stage."""
        return self.batch_sampler.image_size

    @property
    def global_batch_size(self) -> int:
        return self.batch_sampler.global_batch_size

    def set_stage(self, image_size: int, global_batch_size: int) -> None:
        """Set what the next pass yields.

        Raises:
            ValueError: as `BucketBatchSampler`; a batch to train on that is larger than the data set.
        """
        if self.batch_sampler.shuffle and (problem := fewer_than_a_batch(self.dataset.least, global_batch_size)):
            raise ValueError(problem)
        self.batch_sampler.set_stage(image_size, global_batch_size)

    def end_pass(self) -> None:
        """End the running pass after the batch in hand; before the first batch of a pass, leave it empty."""
        self._pass_ended = True
        if self._running is not None:
            self.dataset.end_epoch(*self._running)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            if self._pass_ended:
                self.dataset.take_start_sample()  # the position belonged to the pass that is over
                return
            size = self.global_batch_size
            first = self.dataset.start_sample // size  # workers take it as soon as they begin
            for step, batch in enumerate(super().__iter__(), first + 1):
                self._running = self.batch_sampler.epoch, size, step
                yield batch
                if self._pass_ended:
                    break
        except UndecodableError as error:  # from a worker it comes with the worker's traceback in its text
            raise UndecodableError(str(error).strip().rsplit("UndecodableError: ", 1)[-1]) from None
        finally:  # also when the Trainer, which counts batches itself, drops the iterator after the last one
            self._pass_ended, self._running = False, None

    # ------------------------------------------------------------------------------- shares that change with time

    def go_on(self, state: State) -> None:
        """After a resume, leave a pass empty that a change of shares has ended; where one begins, enter the phase that it is."""
        mixture = self.dataset
        if not isinstance(mixture, MixedDataset) or not mixture.phases[1:]:
            return
        if mixture.begins_anew:
            mixture.phase = self._phase(mixture, state)
        elif mixture.has_ended(int(state.timestamp.epoch)):
            self.end_pass()
        state.dataloader_len = -1  # read again: an epoch of other data sets has another length

    def keep_time(self, state: State) -> str | None:
        """After a batch, change the shares of a mixture if their time has come, from the next batch on; return what is new."""
        mixture = self.dataset
        if not isinstance(mixture, MixedDataset) or (phase := self._phase(mixture, state)) == mixture.phase:
            return None
        self.end_pass()
        mixture.phase = phase
        state.dataloader_len = -1
        return ", ".join(f"{name} {share:.1%}" for name, share in mixture.shares.items())

    @staticmethod
    def _phase(mixture: MixedDataset, state: State) -> int:
        ends = (phase.until for phase in mixture.phases[mixture.phase : -1])
        return mixture.phase + sum(1 for _ in takewhile(lambda end: end is None or Moment(end).has_come(state), ends))


class ImageCaptionData(DataSpec):
    """A loader of captioned images for this rank; the arguments after the `*` are a recipe's `train_loader`.

    Args:
        tokenizer, max_tokens: of the model's text encoder.
        image_size, global_batch_size: of the first stage.
        multiple: sides of images are multiples of this: the patch size × the autoencoder's downsampling.
        seed: of order and choices.
        evaluation: every sample is counted once, in stored order, with any batch size and number of ranks.
        path: folder with the splits, local, or the local cache of `remote`; of a mixture, the folder that holds its data sets.
        mix: several data sets instead of one, name → what it has of its own; each lies in a folder of its name in `path`, or in
            another that it names. See `MixedDataset` and `phases_of`. Weights that change need a trainer that calls `keep_time`.
        split: name of the split, a folder in `path`.
        captions: caption column → weight of choosing it, or a mapping, see `Wording`; by default the first column alone.
        features: names of what `prx encode features` has stored for these images, or of the data set's own columns.
        text_embedding: name of what `prx encode text` has stored for these captions, so that no text encoder runs. `auto`: those
            named `text`, if they are whole and fit.
        latent: name of what `prx encode latents` has stored for these images, or a list, one for every image size.
        images: whether images are decoded; by default unless there are latents.
        remote: where the same layout lies in an object store (`s3://…`), if anywhere.
        skip: file of keys, one a line, whose samples are left out.
        shuffle: a new order every epoch; off, the stored one. Of training: evaluation has no use for it.
        num_workers: processes of each GPU that decode and tokenise; 0: the training process does.
        max_undecodable: share of the samples (0 to 1) that may be undecodable or lost before training stops.

    Raises:
        ValueError, UserError: no such data; see there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        image_size: int,
        global_batch_size: int,
        multiple: int,
        seed: int,
        evaluation: bool = False,
        *,
        path: str | None = None,
        mix: dict[str, dict[str, Any]] | None = None,
        split: str = "train",
        captions: dict[str, float | dict[str, Any]] | None = None,
        features: list[str] | None = None,
        text_embedding: str | None = None,
        latent: str | list[str] | None = None,
        images: bool | None = None,
        remote: str | None = None,
        skip: str | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        max_undecodable: float = 0.01,
    ):
        own: dict[str, Any] = {"path": path, "split": split, "captions": captions, "remote": remote, "skip": skip}
        shared: dict[str, Any] = {"features": features, "text_embedding": text_embedding, "latent": latent, "images": images}
        shared |= {"seed": seed, "max_undecodable": max_undecodable, "max_workers": num_workers}
        parts = {
            where.removeprefix("mix."): ImageCaptionDataset(**{key: part.get(key) for key in own}, **shared)
            for where, part in data_sets({**own, "mix": mix}).items()
        }
        dataset = parts[""] if mix is None else MixedDataset(parts, phases_of(mix), seed)
        ranks, rank = dist.get_world_size(), dist.get_global_rank()
        for said, lacking in said_of_skipped(part.left_out for part in parts.values() if part.left_out is not None):
            log.log(logging.WARNING if lacking and rank == 0 else logging.INFO, "skip: %s", said)
        shuffle = shuffle and not evaluation
        if shuffle and (problem := fewer_than_a_batch(dataset.least, global_batch_size)):
            raise UserError(problem)
        sampler = BucketBatchSampler(dataset, image_size, global_batch_size, multiple, shuffle, seed, ranks, rank, evaluation)
        loader = ImageCaptionLoader(dataset, sampler, Collator(tokenizer, max_tokens, num_workers), num_workers)
        super().__init__(
            loader,
            microbatch_transforms=channels_first,
            split_batch=split_batch,
            get_num_samples_in_batch=_num_samples,
            get_num_tokens_in_batch=_num_tokens,  # pyright: ignore[reportArgumentType]
        )


def _num_samples(batch: dict[str, torch.Tensor]) -> int:
    return int(batch["counted"].sum()) if "counted" in batch else len(batch["sample_id"])


def _num_tokens(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return no tokens in total, as Composer would count them as training progress, and the images as weights of microbatches.

    A trainer weighs by `loss_generating` if it goes by tokens, as llm-foundry's does unless it is told otherwise.
    """
    return {"total": 0, "loss_generating": _num_samples(batch)}
