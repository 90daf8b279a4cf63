"""From encoded files to batches: sizes, order, captions, and what happens to what cannot be decoded."""

import io
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from streaming import StreamingDataset

from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
from prx_composer.data.decoding import BadImageError, decode_image
from prx_composer.data.format import Bucket, BucketWriter, Manifest, RawSample, assign_bucket, make_buckets
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.rows import BucketRows, WholeStream
from prx_composer.data.sampler import BucketBatchSampler, SampleRequest, epoch_batches, epoch_steps, evaluation_batches
from prx_composer.data.sources import FolderSource, ShapesSource, all_scenes, heldout_scenes, prepare, render
from prx_composer.metrics.scoring import nearest_scenes


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def gradient(height: int, width: int) -> Image.Image:
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(ramp)


def write(folder: Path, samples: list[tuple[Bucket, bytes]], size: int = 16) -> Path:
    with BucketWriter(folder / "train", size, ("caption", "alt")) as writer:
        for index, (bucket, encoded) in enumerate(samples):
            captions = {"caption": f"caption {index}", "alt": f"alt {index}"}
            writer.write(bucket, RawSample(encoded, bucket.width, bucket.height, captions, f"sample-{index}"))
    return folder


SQUARE, WIDE = Bucket(16, 16), Bucket(12, 20)


# ------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(("size", "multiple"), [(512, 32), (1024, 32), (256, 16)])
def test_buckets_have_equal_area_and_whole_patches(size: int, multiple: int) -> None:
    buckets = make_buckets(size, multiple)
    assert Bucket(size, size) in buckets and len(buckets) == len(set(buckets)) > 5
    for height, width in buckets:
        assert height % multiple == width % multiple == 0 and 0.5 <= width / height <= 2
        assert abs(height * width - size**2) <= multiple * max(height, width) / 2


@pytest.mark.parametrize("settings", [(100, 16, 2.0), (64, 0, 2.0), (0, 16, 2.0), (64, 16, 0.5), (-64, -16, 2.0)])
def test_settings_of_which_there_are_no_buckets_are_refused(settings: tuple[int, int, float]) -> None:
    size, multiple, aspect = settings
    said = f"image_size {size} must be a multiple of {multiple}, and max_aspect {aspect:g} at least 1"
    with pytest.raises(ValueError, match=said):
        make_buckets(size, multiple, aspect)


def test_an_image_goes_to_the_nearest_aspect_ratio() -> None:
    buckets = make_buckets(512, 32)
    assert assign_bucket(1000, 1000, buckets) == (512, 512)
    tall = assign_bucket(1600, 900, buckets)
    assert abs(np.log(tall.height / tall.width) - np.log(16 / 9)) == min(
        abs(np.log(b.height / b.width) - np.log(16 / 9)) for b in buckets
    )
    assert Bucket.parse(str(tall)) == tall


# --------------------------------------------------------------------------------------------------- order


def numbered(counts: list[int]) -> list[NDArray[np.int64]]:
    """Sample ids of every bucket, one bucket after the other."""
    return [np.arange(sum(counts[:index]), sum(counts[: index + 1])) for index in range(len(counts))]


@pytest.mark.parametrize("counts", [[100], [100, 37, 64], [5, 100, 1]])
def test_batches_are_full_and_of_one_bucket(counts: list[int]) -> None:
    batches = epoch_batches(numbered(counts), 8, shuffle=True, seed=1, epoch=2)
    assert batches.shape[1] == 8 and batches.min() >= 0
    edges = np.cumsum(counts)
    for batch in batches:
        assert len(set(np.searchsorted(edges, batch, side="right"))) == 1
    if min(counts) >= 8:
        assert max(Counter(batches.ravel().tolist()).values()) == 1, "no sample twice in an epoch"


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_number_of_ranks_shares_the_same_batches(tmp_path: Path, shuffle: bool) -> None:
    samples = [((SQUARE, WIDE)[index % 3 == 0], encode(gradient(16, 16))) for index in range(50)]
    dataset = ImageCaptionDataset(str(write(tmp_path / "d", samples)))

    def batches(ranks: int) -> list[list[int]]:
        samplers = [BucketBatchSampler(dataset, 16, 12, 4, shuffle, 0, ranks, rank) for rank in range(ranks)]
        parts = [[[request.sample_id for request in part] for part in sampler] for sampler in samplers]
        assert all(len(part) == 12 // ranks for share in parts for part in share)
        return [[sample for part in together for sample in part] for together in zip(*parts, strict=True)]

    assert batches(1) == batches(2) == batches(4) and len(batches(1)) == (3 if shuffle else 5)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_batches(numbered([50, 40]), 8, shuffle=True, seed=seed, epoch=epoch).ravel().tolist()

    assert order(0, 0) == order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_number_of_steps_is_known_without_drawing_them(shuffle: bool) -> None:
    for counts, batch in (([100], 8), ([100, 37, 5], 24), ([3, 2], 32)):
        assert epoch_steps(counts, batch, shuffle=shuffle) == len(epoch_batches(numbered(counts), batch, shuffle=shuffle))


def test_evaluation_takes_every_sample_once_in_order() -> None:
    batches = evaluation_batches(numbered([10, 3]), 8)
    assert [batch.tolist() for batch in batches] == [list(range(8)), [8, 9], [10, 11, 12]]


def test_a_bucket_smaller_than_a_batch_is_still_used() -> None:
    batches = epoch_batches(numbered([3, 40]), 8, shuffle=True)
    small = [batch for batch in batches.tolist() if batch[0] < 3]
    assert len(small) == 1 and set(small[0]) == {0, 1, 2}


def test_a_resumed_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    dataset = ImageCaptionDataset(str(write(tmp_path / "d", [(SQUARE, encode(gradient(16, 16)))] * 40)))
    sampler = BucketBatchSampler(dataset, 16, 8, 4, True, 0, 1, 0)
    sampler.set_epoch(3)
    whole = list(sampler)
    dataset.load_state_dict(dataset.state_dict(16))
    assert list(sampler) == whole[2:] and list(sampler) == whole, "only the first epoch after a resume is shortened"
    with pytest.raises(ValueError, match="other|same data"):
        dataset.load_state_dict({"sample_in_epoch": 0, "counts": [39]})


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1", "I;16", "LA"])
def test_every_mode_becomes_rgb_of_the_bucket_size(mode: str) -> None:
    source = gradient(40, 60)
    image = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else source.convert(mode)
    decoded = decode_image(encode(image, "TIFF" if mode == "CMYK" else "PNG"), 16, 24)
    assert decoded.shape == (3, 16, 24) and decoded.dtype == torch.uint8


def test_an_image_of_the_bucket_size_is_left_as_it_is() -> None:
    image = gradient(16, 24)
    assert np.array_equal(decode_image(encode(image), 16, 24).permute(1, 2, 0).numpy(), np.asarray(image))


def test_an_image_of_the_bucket_s_size_is_read_without_a_warning() -> None:
    """torch warned, in every run, of an array that is read-only, and said that writing to it is undefined."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only once in this process
    try:
        with warnings.catch_warnings(action="error"):
            assert decode_image(encode(Image.new("RGB", (24, 16), (1, 2, 3))), 16, 24).add_(1).min() == 2
    finally:
        torch.set_warn_always(always)


def test_resizing_keeps_the_aspect_ratio_and_crops_the_centre() -> None:
    image = Image.new("RGB", (60, 20), "black")
    image.paste((255, 255, 255), (20, 0, 40, 20))  # the middle square
    assert decode_image(encode(image), 20, 20).min() == 255


@pytest.mark.parametrize(("height", "width"), [(32, 48), (256, 384), (300, 460), (512, 768), (512, 512), (600, 900)])
def test_a_jpeg_that_is_decoded_small_equals_a_full_decode_within_its_own_noise(height: int, width: int) -> None:
    encoded = encode(gradient(512, 768), "JPEG", quality=95)
    full = ImageOps.fit(Image.open(io.BytesIO(encoded)).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    assert np.abs(decode_image(encoded, height, width).permute(1, 2, 0).numpy().astype(int) - np.asarray(full)).mean() < 2


@pytest.mark.parametrize("kind", ["grey", "cmyk", "progressive", "full chroma", "not closed", "rubbish inside"])
def test_unusual_jpegs_are_decoded_as_pillow_does(kind: str) -> None:
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    options = {"progressive": {"progressive": True}, "full chroma": {"subsampling": 0}}.get(kind, {})
    encoded = encode(image, "JPEG", quality=95, **options)
    if kind == "not closed":
        encoded = encoded[:-2]  # without the end marker, which libjpeg warns of
    if kind == "rubbish inside":
        encoded = encoded[:2] + b"\x00\x01\x02" + encoded[2:]
    try:
        expected = Image.open(io.BytesIO(encoded)).convert("RGB")
    except OSError:
        with pytest.raises(BadImageError):
            decode_image(encoded, 48, 64)
    else:
        found = decode_image(encoded, 48, 64).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(expected)).max() <= 1


def test_exif_rotation_and_transparency_are_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to view
    image = Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (0, 0, 20, 20))
    turned = decode_image(encode(image, "JPEG", exif=exif, quality=100), 40, 20)
    assert turned[2, :10].float().mean() > 200 and turned[0, 30:].float().mean() > 200
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_image(encode(clear), 8, 8).min() == 255, "transparent is white"


# ----------------------------------------------------------------------------------------- dataset, loader


def request(sample_id: int, epoch: int = 0) -> SampleRequest:
    return SampleRequest(sample_id, 16, 16, epoch)


def test_an_undecodable_sample_is_named_counted_and_replaced_by_the_next_of_its_bucket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken = encode(gradient(16, 16)), encode(gradient(16, 16))[:60]
    path = write(tmp_path / "d", [(SQUARE, good), (SQUARE, broken), (SQUARE, b""), (SQUARE, good), (WIDE, good)])
    dataset = ImageCaptionDataset(str(path))
    wide_first = dataset.bucket_of(0) == dataset.buckets.index(WIDE)
    shift = 1 if wide_first else 0
    with caplog.at_level(logging.WARNING):
        sample = dataset[request(shift + 1)]
    assert sample["sample_id"] == shift + 3 and sample["caption"] == "caption 3" and dataset.undecodable == 2
    assert "sample-1" in caplog.text and "sample-2" in caplog.text
    assert dataset[request(shift)]["sample_id"] == shift
    assert dataset[request(shift + 2)]["sample_id"] == shift + 3


def test_too_many_undecodable_samples_stop_the_run(tmp_path: Path) -> None:
    good = encode(gradient(16, 16))
    samples = [(SQUARE, good if index % 10 else b"no image") for index in range(100)]
    dataset = ImageCaptionDataset(str(write(tmp_path / "d", samples)), max_undecodable=0.05)
    with pytest.raises(UndecodableError, match="max_undecodable = 5.00%"):
        _ = [dataset[request(index % 100)] for index in range(1000)]


def test_a_bucket_without_one_good_image_stops_the_run(tmp_path: Path) -> None:
    dataset = ImageCaptionDataset(str(write(tmp_path / "d", [(SQUARE, b"x")] * 3)))
    with pytest.raises(UndecodableError, match="16x16"):
        dataset[request(0)]


def test_captions_are_chosen_by_weight_anew_each_epoch_and_repeatably(tmp_path: Path) -> None:
    path = str(write(tmp_path / "d", [(SQUARE, encode(gradient(16, 16)))] * 50))
    dataset = ImageCaptionDataset(path, captions={"caption": 3, "alt": 1})
    choices = [dataset[request(i, epoch)]["caption"].split()[0] for epoch in range(20) for i in range(50)]
    assert 0.70 < choices.count("caption") / 1000 < 0.80
    assert choices[:50] != choices[50:100]
    del dataset
    again = ImageCaptionDataset(path, captions={"caption": 3, "alt": 1})
    assert [again[request(i, 1)]["caption"].split()[0] for i in range(50)] == choices[50:100]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(tmp_path: Path, tokenizer: Any, num_workers: int) -> None:
    images = [encode(render(scene, *bucket)) for scene in all_scenes()[:24] for bucket in (SQUARE, WIDE)]
    path = write(tmp_path / "d", [((SQUARE, WIDE)[index % 2], image) for index, image in enumerate(images)])
    spec = ImageCaptionData(tokenizer, 14, 16, 8, 4, 0, path=str(path), num_workers=num_workers)
    loader: Any = spec.dataloader
    seen = [(batch["image"].shape, batch["sample_id"].tolist()) for batch in loader]
    expected = epoch_batches(numbered([24, 24]), 8, shuffle=True, seed=0, epoch=0).tolist()
    assert [ids for _, ids in seen] == expected
    assert {tuple(shape) for shape, _ in seen} == {(8, 3, 16, 16), (8, 3, 12, 20)}
    batch = next(iter(loader))
    assert batch["image"].dtype == torch.uint8 and batch["attention_mask"].dtype == torch.bool


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stage_change_ends_the_pass_and_changes_sizes(tmp_path: Path, tokenizer: Any, num_workers: int) -> None:
    path = write(tmp_path / "d", [(SQUARE, encode(gradient(16, 16)))] * 40)
    loader: Any = ImageCaptionData(tokenizer, 14, 16, 8, 4, 0, path=str(path), num_workers=num_workers).dataloader
    shapes = []
    for batch in loader:
        shapes.append(tuple(batch["image"].shape))
        if len(shapes) == 2:
            loader.set_stage(8, 4)
            loader.end_pass()
    second = [tuple(batch["image"].shape) for batch in loader]
    assert shapes == [(8, 3, 16, 16)] * 2 and second == [(4, 3, 8, 8)] * 10
    loader.end_pass()
    assert list(loader) == [] and len(list(loader)) == 10, "an ended pass is empty, the next one is whole"


def test_remote_data_is_fetched_into_the_local_cache(tmp_path: Path) -> None:
    samples = [((SQUARE, WIDE)[index % 2], encode(gradient(16, 16))) for index in range(10)]
    remote = write(tmp_path / "remote", samples)
    near = ImageCaptionDataset(str(remote))
    far = ImageCaptionDataset(str(tmp_path / "cache"), remote=str(remote))
    assert len(far) == 10 and far.counts == near.counts
    captions = [[dataset[request(index)]["caption"] for index in range(10)] for dataset in (near, far)]
    assert captions[0] == captions[1] and len(set(captions[0])) == 10
    assert list((tmp_path / "cache").rglob("*.mds"))


def test_what_is_wrong_with_the_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set in"):
        ImageCaptionDataset(str(tmp_path / "nowhere"))
    path = write(tmp_path / "d", [(SQUARE, encode(gradient(16, 16)))])
    remedy = "no caption column 'captoin'; the data set has caption, alt. `captions: null` trains on caption"
    with pytest.raises(ValueError, match=remedy):
        ImageCaptionDataset(str(path), captions={"captoin": 1.0})
    assert [*ImageCaptionDataset(str(path), captions=None).captions] == ["caption"]
    with pytest.raises(ValueError, match="weights"):
        ImageCaptionDataset(str(path), captions={"caption": 0.0})
    (tmp_path / "e" / "train").mkdir(parents=True)
    Manifest(16, ("caption",), {}).write(tmp_path / "e" / "train")
    with pytest.raises(ValueError, match="no samples"):
        ImageCaptionDataset(str(tmp_path / "e"))


# ------------------------------------------------------------------------------------------------- sources


def test_shapes_hold_out_whole_combinations_and_every_attribute_is_seen(shapes_data: Path) -> None:
    def scenes(split: str) -> set[str]:
        dataset = ImageCaptionDataset(str(shapes_data), split)
        return {dataset[request(index)]["caption"] for index in range(len(dataset))}

    train, heldout = scenes("train"), scenes("heldout")
    assert len(all_scenes()) == 270 and len(train) == 240 and len(heldout) == 30 and not train & heldout
    words = {word for scene in all_scenes() for word in scene}
    assert all(any(word in caption for caption in train) for word in words)
    assert heldout == {scene.caption for scene in heldout_scenes(30)}


def test_the_scorer_recognises_real_scenes_with_their_jitter() -> None:
    rng = np.random.default_rng(0)
    scenes = all_scenes() * 2
    images = [
        np.asarray(render(s, 32, 32, shift=tuple(rng.uniform(-0.03, 0.03, 2)), scale=rng.uniform(0.95, 1.05))) for s in scenes
    ]
    found = nearest_scenes(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert np.mean([a == b for a, b in zip(found, scenes, strict=True)]) > 0.995


def test_data_is_made_once_and_not_for_other_settings(tmp_path: Path) -> None:
    source = ShapesSource(image_size=16, images_per_scene=1, aspects=[[1, 1], [3, 5]])
    prepare(tmp_path / "d", source, {"size": 16})
    before = (tmp_path / "d" / "train" / "manifest.json").stat().st_mtime_ns
    prepare(tmp_path / "d", source, {"size": 16})
    assert (tmp_path / "d" / "train" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings.*size"):
        prepare(tmp_path / "d", source, {"size": 32})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        prepare(tmp_path / "mine", source, {"size": 16})
    assert (tmp_path / "mine" / "thesis.txt").exists()


def folder_of_images(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for index in range(30):
        height, width = (40, 40) if index % 3 else (30, 50)
        gradient(height, width).save(folder / f"{index}.jpg")
        lines.append(json.dumps({"file": f"{index}.jpg", "caption": f"picture {index}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_of_ones_own_images_becomes_a_data_set(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "photos")
    prepare(tmp_path / "d", FolderSource(str(folder), image_size=32, multiple=4, heldout=0.2), {})
    train, heldout = (ImageCaptionDataset(str(tmp_path / "d"), split) for split in ("train", "heldout"))
    assert len(train) == 24 and len(heldout) == 6 and len(train.buckets) == 2
    captions = {train[request(index)]["caption"] for index in range(24)}
    assert len(captions) == 24 and captions < {f"picture {index}" for index in range(30)}


@pytest.mark.parametrize("name", ["image", "key", "width"])
def test_text_that_would_take_the_place_of_a_column_is_refused(tmp_path: Path, name: str) -> None:
    folder = folder_of_images(tmp_path / "photos")
    lines = [json.loads(line) | {name: "x"} for line in (folder / "captions.jsonl").read_text().splitlines()]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=f"captions: '{name}' is the name of another column"):
        prepare(tmp_path / "d", FolderSource(str(folder), image_size=32, multiple=4), {})


def test_images_without_a_caption_are_counted_before_they_are_trained_on(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "photos")
    with (folder / "captions.jsonl").open("a") as file:
        file.write('\n{"file": "1.jpg", "caption": ""}\n{"file": "2.jpg", "caption": " \\n"}')
    (note,) = FolderSource(str(folder), image_size=32, multiple=4).notes
    assert "caption is empty for 2 of 32 images" in note


def test_a_photo_lying_on_its_side_goes_to_the_bucket_it_is_seen_in(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(40, 60).save(tmp_path / "photos" / "phone.jpg", exif=exif)
    (tmp_path / "photos" / "captions.jsonl").write_text('{"file": "phone.jpg", "caption": "upright"}')
    source = FolderSource(str(tmp_path / "photos"), image_size=32, multiple=4)
    assert [bucket.height > bucket.width for bucket in source.buckets] == [True]


@pytest.mark.parametrize(("heldout", "count"), [(0.0, 0), (0.1, 3), (0.4, 12), (0.7, 21)])
def test_the_held_out_share_is_what_it_says(tmp_path: Path, heldout: float, count: int) -> None:
    source = FolderSource(str(folder_of_images(tmp_path / "photos")), image_size=32, multiple=4, heldout=heldout)
    assert [split for split, _ in source.samples()].count("heldout") == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 31"),
        ('{"caption": "no file"}', "line 31"),
        ('{"file": "31.jpg", "caption": "x"}', "no image 31.jpg"),
        ('{"file": "../../etc/passwd", "caption": "x"}', "no image"),
        ('{"file": "1.jpg"}', "no caption"),
        ('["1.jpg", "a list"]', "line 31"),
        ('{"file": 3, "caption": "x"}', "no image 3"),
    ],
)
def test_a_bad_captions_file_is_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    folder = folder_of_images(tmp_path / "photos")
    with (folder / "captions.jsonl").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError, match=message):
        FolderSource(str(folder), image_size=32, multiple=4)


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BucketWriter(tmp_path / "train", 16, ("caption",)) as writer:
            writer.write(SQUARE, RawSample(b"x", 16, 16, {"caption": "c"}, "k"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_was_downloaded_in_part_is_downloaded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = write(tmp_path / "remote", [(SQUARE, encode(gradient(16, 16))) for _ in range(8)]) / "train"
    (shard,) = (remote / str(SQUARE)).glob("*.mds")
    cached = tmp_path / "cache" / str(SQUARE) / shard.name
    whole = [BucketRows(remote, [SQUARE]).row(0, index)["image"] for index in range(8)]

    cached.parent.mkdir(parents=True)
    cached.write_bytes(shard.read_bytes()[:100])  # an earlier run was killed, or its disk was full
    rows = BucketRows(tmp_path / "cache", [SQUARE], str(remote))
    assert [rows.row(0, index)["image"] for index in range(8)] == whole and "100 of" in caplog.text

    class Unlucky(WholeStream):
        cut = 3

        def _is_whole(self, name: str, path: Path) -> bool:
            if name == shard.name and self.cut:
                self.cut -= 1
                path.write_bytes(b"")  # a connection that was lost in the head of the answer
            return super()._is_whole(name, path)

    stream = Unlucky(local=str(tmp_path / "other"), remote=str(remote / str(SQUARE)))
    dataset = StreamingDataset(streams=[stream], batch_size=1, shuffle=False)
    assert [dataset[index]["image"] for index in range(8)] == whole and stream.cut == 0
