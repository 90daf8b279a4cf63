"""What `prx check` says of buckets that fill no batch, of one data set and of mixtures."""

from pathlib import Path

from test_preflight import Load, load, marked, scenes

from prx_composer.training.preflight.data_fit import check_data

__all__ = ["load"]  # a fixture


def test_buckets_that_cannot_fill_a_batch_are_warned_of_with_their_share(load: Load, tmp_path: Path) -> None:
    path = scenes(tmp_path / "data", {(16, 16): 90, (8, 32): 10})
    results = list(check_data(load(train_loader={"name": "image_caption", "path": str(path)})[1]))
    assert not marked(results)
    first, waiting, second = marked(results, "!")
    assert "an epoch of 2 batches of 48 (8 px) leaves out 42 of 100 samples" in waiting
    assert "1 of 2 buckets, with 10.0% of the samples, hold fewer than a batch of 48 (8 px)" in first and "8x32" in first
    assert "seen up to 5 times" in first and "a batch of 24 (16 px)" in second


def test_what_an_epoch_leaves_out_is_counted(load: Load, tmp_path: Path) -> None:
    path = scenes(tmp_path / "data", {(16, 16): 98, (8, 32): 70})
    said = [result.text for result in check_data(load(train_loader={"name": "image_caption", "path": str(path)})[1])]
    assert any("an epoch of 3 batches of 48 (8 px) leaves out 24 of 168 samples" in text for text in said)
    path = scenes(tmp_path / "whole", {(16, 16): 96, (8, 32): 48})
    said = [result.text for result in check_data(load(train_loader={"name": "image_caption", "path": str(path)})[1])]
    assert not any("leaves out" in text for text in said)


def test_buckets_of_a_mixture_that_are_due_less_than_a_batch_are_named(load: Load, tmp_path: Path) -> None:
    big, new = scenes(tmp_path / "big", {(16, 16): 90, (8, 32): 6}), scenes(tmp_path / "new", {(16, 16): 48})
    mix = {"big": {"path": str(big), "weight": 1}, "new": {"path": str(new), "weight": 3}}
    first, _ = marked(check_data(load(train_loader={"name": "image_caption", "mix": mix})[1]), "!")
    # 3 batches of 48 an epoch, a quarter of them of big, of which 6 images in 96 are wide: 3 / 4 / 16 batches
    assert "1 of 2 buckets are due less than a batch of 48" in first and "8x32 in one of 21.3 epochs" in first
    assert "a sample up to 8 times in it" in first
