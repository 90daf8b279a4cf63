"""Captions of images by a model of transformers that reads images and writes text, whether it answers questions or only captions.

One that answers (with a chat template, such as LLaVA, Qwen2-VL, SmolVLM) is asked `prompt` about each image. One that only
captions (without, such as BLIP or GIT) goes on with `prompt`, which may be empty. A caption is what it writes after that.
"""

import hashlib
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from prx_composer import registry
from prx_composer.commands.data.split import open_split
from prx_composer.commands.encode.encoding import DataSet, Encoded, decoded_images
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.pages import picture
from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import CAPTIONS, ENCODED, RESERVED, Bucket, open_rows
from prx_composer.data.storage import is_remote
from prx_composer.data.stored import StoredColumn, fingerprint
from prx_composer.models.huggingface import load_config, says_how_to_get
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.schedule.moments import duration_string

QUESTION = "Describe this image in detail. Write only the description."
LARGEST = 448  # pixels: the image size where none is given


# ------------------------------------------------------------------------------------------------------------------ data


def data_to_caption(what: list[str], split: str, column: str) -> tuple[list[DataSet], list[DataSet]]:
    """Return the data sets that a folder or a recipe names: those to caption, and those of a mixture that have the column.

    Raises:
        UserError: no such data, data that are not on a disk, or a column of this name in all of them.
    """
    if not column.isidentifier() or column in RESERVED:
        raise UserError(f"--column {column!r}: give a plain name that no column of every data set has, such as long.")
    sets = _data_of(what, split)
    for data in sets:
        others = {**data.manifest.features, **data.manifest.metadata}
        if column in others:
            raise UserError(f"--column {column}: {data.path} has another column of this name; give another one, such as long.")
    having = [data for data in sets if column in {*data.manifest.captions} - {*data.manifest.beside}]
    if len(having) == len(sets):
        raise UserError(
            f"--column {column}: {', '.join(str(data.path) for data in having)} came with captions of this name. Train on them "
            f"as they are, or give another --column, such as {column}_2."
        )
    return [data for data in sets if data not in having], having


def _data_of(what: list[str], split: str) -> list[DataSet]:
    recipes = [name for name in what if name.endswith((".yaml", ".yml"))]
    if not recipes and len(what) > 1:
        raise UserError(f"{' '.join(what)}: name one folder of a data set, or a recipe (.yaml) and key=value.")
    specs: dict[str, dict[str, Any]] = {}
    if recipes:
        recipe = config.load(what)
        registry.import_code(recipe.code_paths)
        config.check(recipe)
        with at_path("train_loader"):
            specs = {f"train_loader.{where}".rstrip("."): spec for where, spec in data_sets(recipe.train_loader).items()}
    far = [spec["remote"] for spec in specs.values() if spec.get("remote")] or [name for name in what if is_remote(name)]
    if far:
        raise UserError(f"{far[0]}: caption where the data lie on a disk; then upload the folder `{ENCODED}` beside them.")
    if not recipes:
        return [DataSet(Path(what[0]), open_split(what[0], split).manifest, [])]
    sets = []
    for where, spec in specs.items():
        with at_path(where):
            sets.append(DataSet(Path(spec["path"]), read_manifest(spec["path"], split, None), []))
    return sets


def some_rows(data: DataSet, split: str, count: int) -> Iterator[tuple[Bucket, list[dict[str, Any]]]]:
    """Yield `count` evenly spaced rows of a data set, bucket by bucket."""
    total, first = sum(data.manifest.buckets.values()), 0
    chosen = sorted({number * total // count for number in range(min(count, total))})
    for bucket, size in sorted(data.manifest.buckets.items()):
        rows = open_rows(data.path / split, bucket, data.manifest)
        own = [index - first for index in chosen if first <= index < first + size]
        if own:
            yield bucket, [rows[index] for index in own]
        first += size


# ----------------------------------------------------------------------------------------------------------------- model


def check_model(name: str, revision: str | None) -> None:
    """Look at a model's configuration alone. Raise UserError if it can't be had, or is of another kind."""
    with at_path("--model", TypeError, AttributeError), says_how_to_get(name):
        known = load_config(name, revision)
    if type(known) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"--model {name}: it is a {known.model_type} model, which does not write text about images. Give one for "
            "image-text-to-text, such as HuggingFaceTB/SmolVLM-500M-Instruct, Qwen/Qwen2-VL-2B-Instruct or "
            "Salesforce/blip-image-captioning-base."
        )


class Draw(LogitsProcessor):
    """Draws tokens with the model's probabilities: adds Gumbel noise to logits / temperature, of which the largest is taken.

    Each sample has a generator of its own, so that a caption depends on its image and the seed, and not on its batch.

    Args:
        seeds: one for each sample.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device):
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        luck = torch.stack([torch.rand(scores.shape[1:], generator=own, device=scores.device) for own in self._generators])
        return scores.float() / self._temperature - (-luck.clamp(min=1e-20).log()).log()


@dataclass(frozen=True)
class Writing:
    """How captions are written.

    Args:
        prompt: None: a question to describe the image, for a model that answers; nothing for others.
        max_new_tokens: of a caption.
        temperature: of the probabilities that tokens are drawn with; 0 takes the most probable one.
        seed: of the draws.
        batch_size: images at a time, of one bucket.
    """

    prompt: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16


class Captioner:
    """Writes captions of images that lie in rows.

    Args:
        name, revision: hub id or folder, see `check_model`.
        dtype: of weights and computation.

    Raises:
        UserError: weights or processor that cannot be had, or don't read images and text; on captioning, a prompt that the model
            doesn't take, or a batch that doesn't fit into memory.
    """

    def __init__(self, name: str, revision: str | None, dtype: str, device: torch.device, writing: Writing):
        transformers.logging.set_verbosity_error()
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        with at_path("--model", TypeError, AttributeError, ImportError), says_how_to_get(name):
            self._processor: Any = AutoProcessor.from_pretrained(name, **source)
            self._model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype), **source)
        self._model.to(device).eval().requires_grad_(False)
        self._tokenizer: Any = getattr(self._processor, "tokenizer", None)
        if self._tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise UserError(f"--model {name}: it has no processor that reads images and text (processor_config.json).")
        self._tokenizer.padding_side = "left"  # what is written begins right after the prompt
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._name, self._device, self._dtype, self.writing = name, device, dtype, writing
        self._revision, self._template = revision, self._find_template()
        self.prompt = (QUESTION if self._template else "") if writing.prompt is None else writing.prompt
        self.asked = self._with_template(self.prompt)
        takes = inspect.signature(self._model.forward).parameters | inspect.signature(self._model.generate).parameters
        self._takes = frozenset(takes)
        self._ends = torch.tensor(sorted(self._find_ends()), dtype=torch.int64, device=device)

    def column(self, image_size: int) -> StoredColumn:
        """Describe what is written of images of this size."""
        mark = fingerprint(self._model, self._tokenizer)
        of_text: dict[str, Any] = {"max_tokens": self.writing.max_new_tokens, "prompt": self.prompt}
        return StoredColumn(CAPTIONS, self._name, self._revision, mark, 0, "utf-8", image_size=image_size, **of_text)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides captions beside that."""
        writing = self.writing
        drawn = {"temperature": writing.temperature, "seed": writing.seed} if writing.temperature else {}
        return {"asked": self.asked, "dtype": self._dtype, "batch_size": writing.batch_size, **drawn}

    def write(self, rows: Sequence[dict[str, Any]], size: tuple[int, int]) -> list[Encoded]:
        """Return the caption of each row's image, decoded at height and width `size`; nothing of one that cannot be decoded."""
        written = [Encoded() for _ in rows]
        images = decoded_images(rows, size)
        while batch := dict(islice(images, self.writing.batch_size)):
            seeds = [self._seed_of(rows[index]["image"]) for index in batch]
            for index, (text, is_cut) in zip(batch, self._captions(list(batch.values()), seeds), strict=True):
                content = text.encode(errors="replace")
                written[index] = Encoded(content, (len(content),), cut=int(is_cut))
        return written

    def _seed_of(self, image: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(image, digest_size=6, salt=self.writing.seed.to_bytes(8)).digest())

    @torch.inference_mode()
    def _captions(self, images: list[Tensor], seeds: list[int]) -> list[tuple[str, bool]]:
        """Return what is written of each image, and whether it had to end before its end."""
        options: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}  # the model's own, of its samples
        if self.writing.temperature:
            options["logits_processor"] = LogitsProcessorList([Draw(self.writing.temperature, seeds, self._device)])
        try:
            inputs = self._inputs(images)
            asked = inputs.get("input_ids")
            asked = None if asked is None else asked.clone()  # BLIP writes into it
            ids: Tensor = self._model.generate(
                **inputs, max_new_tokens=self.writing.max_new_tokens, do_sample=False, num_beams=1, **options
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch-size {self.writing.batch_size}: so many images do not fit into the GPU's memory; give fewer, or a "
                "smaller --image-size."
            ) from error
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"--model {self._name} cannot take an image with the prompt {self.asked!r}: {error} Give the --prompt that its "
                f"card shows, with the mark that stands for the image ({self._mark}), if there is one."
            ) from error
        ended = torch.isin(ids[:, -1], self._ends).tolist()
        texts = self._tokenizer.batch_decode(_after(asked, ids), skip_special_tokens=True)
        return [(text.strip(), not end) for text, end in zip(texts, ended, strict=True)]

    def _inputs(self, images: list[Tensor]) -> dict[str, Any]:
        pictures: list[Any] = [picture(image) for image in images]
        options: dict[str, Any] = {"images": pictures, "return_tensors": "pt"}
        if self._template:
            options["images"] = [[image] for image in pictures]
            bos = self._tokenizer.bos_token
            options["add_special_tokens"] = not (bos and self.asked.startswith(bos))
        if self.asked:
            options |= {"text": [self.asked] * len(images), "padding": True}
        made = {key: value for key, value in self._processor(**options).items() if key in self._takes}
        dtype = getattr(torch, self._dtype)
        return {
            key: value.to(self._device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for key, value in made.items()
        }

    @property
    def _mark(self) -> str:
        return str(getattr(self._processor, "image_token", "<image>"))

    def _find_template(self) -> Any:
        """Return the chat template that knows images, if there is one."""
        own = getattr(self._processor, "chat_template", None)
        others = getattr(self._tokenizer, "chat_template", None)
        return own or (others if "image" in str(others) else None)

    def _with_template(self, prompt: str) -> str:
        if not self._template:
            return prompt
        text = [{"type": "text", "text": prompt}] if prompt else []
        asked = [{"role": "user", "content": [{"type": "image"}, *text]}]
        with at_path("--model: its chat template", Exception):
            return self._processor.apply_chat_template(
                asked, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )

    def _find_ends(self) -> set[int]:
        """Return the tokens that end a text, or fill what comes after its end."""
        configs = [self._model.generation_config, self._model.config.get_text_config(decoder=True), self._tokenizer]
        found = [getattr(one, f"{kind}_token_id", None) for one in configs for kind in ("eos", "sep", "pad")]
        return {int(end) for ends in found if ends is not None for end in (ends if isinstance(ends, list | tuple) else [ends])}


def _after(asked: Tensor | None, ids: Tensor) -> Tensor:
    """Return tokens without the prompt, if they begin with it: all of it, or without its last token, as BLIP's do."""
    if asked is not None:
        for length in (asked.shape[1], asked.shape[1] - 1):
            if 1 < length <= ids.shape[1] and torch.equal(ids[:, 1:length], asked[:, 1:length]):
                return ids[:, length:]
    return ids


# ------------------------------------------------------------------------------------------------------------ what is said


def summary(cut: int, empty: int, undecodable: int, max_new_tokens: int) -> str:
    """Return what is not as it should be, as the end of a sentence; "" if nothing."""
    said = []
    if cut:
        said.append(f"{cut:,} were not at their end after --max-new-tokens {max_new_tokens} and are cut")
    if empty:
        said.append(f"{empty:,} are empty")
    if undecodable:
        said.append(f"{undecodable:,} images cannot be decoded and have none: training counts and replaces them")
    return "".join(f"; {one}" for one in said)


def look_first(captioner: Captioner, data: DataSet, split: str, count: int, image_size: int) -> Iterator[str]:
    """Caption a few images of a data set, and yield lines about them and about the time that all would take."""
    begun, done, most = time.monotonic(), list[Encoded](), captioner.writing.max_new_tokens
    for bucket, rows in some_rows(data, split, count):
        written = captioner.write(rows, data.size_of(image_size, 1)(bucket))
        done += written
        for row, one in zip(rows, written, strict=True):
            note = "" if one.shape else "cannot be decoded"
            yield f"{row.get('key', '')}: {note or one.values.decode() or '(empty)'}{' … (cut)' if one.cut else ''}"
    speed = len(done) / max(time.monotonic() - begun, 1e-9)
    total = sum(data.manifest.buckets.values())
    empty, undecodable = sum(one.shape == (0,) for one in done), sum(not one.shape for one in done)
    yield (
        f"{data.path}, {split}: {len(done)} of {total:,} looked at, {speed:,.2f} images/s; all would take about "
        f"{duration_string(total / speed)} in one process{summary(sum(one.cut for one in done), empty, undecodable, most)}. "
        "Nothing was written."
    )
