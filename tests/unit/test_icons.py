"""The source `icons`: what is read, drawn, kept out and said; SVG of strangers; and the score of what was drawn."""

import dataclasses
import json
import logging
import shutil
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from icon_sets import STYLES, THINGS, content, write_sets, write_tarball
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from prx_composer.callbacks.icons_score import IconsScore, comparable, heldout_sheet, score_icons, subsets
from prx_composer.common.errors import UserError
from prx_composer.common.pages import GAP
from prx_composer.data.format import Manifest, RawSample, open_local
from prx_composer.data.icons import IconsSource
from prx_composer.data.sources import is_made, prepare
from prx_composer.data.svg import Box, SVGError, checked, render
from prx_composer.training.components import make_data

pytest.importorskip("resvg_py")

Pair = tuple[str, str]
SIZE = 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets") / "icons")


@pytest.fixture(scope="module")
def source(sets: Path) -> IconsSource:
    return IconsSource(str(sets), SIZE)


@pytest.fixture(scope="module")
def pictures(source: IconsSource) -> dict[Pair, Tensor]:
    return {(n, s): as_tensor(source.picture(n, s, SIZE)) for n, styles in source.icons.items() for s in styles}


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pair_of(sample: RawSample) -> Pair:
    style, _, name = sample.key.partition(":")
    return name.replace("-", " "), style


# ----------------------------------------------------------------------------------------------------- what is read


def test_tarballs_folders_and_single_files_are_read_alike(source: IconsSource) -> None:
    assert list(source.sets) == sorted(STYLES)
    assert list(source.icons) == sorted(thing.replace("-", " ") for thing in THINGS)
    assert {icon.category for icon in source.icons["fish 3"].values()} == {"Animals & Nature"}
    assert all(len(styles) == 4 for styles in source.icons.values())


def test_a_set_alone_is_read_wherever_it_lies(sets: Path, tmp_path: Path) -> None:
    tarball = write_tarball(tmp_path, "flat")
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(tarball, unpacked)  # as `tar xf` leaves it: the files are in `package`
    for place in (tarball, unpacked, unpacked / "package", sets / "paper.json", sets / "dark-side" / "icons.json"):
        alone = IconsSource(str(place), SIZE, heldout=4)
        assert len(alone.icons) == len(THINGS) and not any(starmap(alone.is_heldout, alone.pairs)), place


def test_categories_are_chosen_by_words_of_their_names(sets: Path) -> None:
    chosen = IconsSource(str(sets), SIZE, categories=["animals", "food"])
    assert {name.split()[0] for name in chosen.icons} == {"fish", "fruit"}
    with pytest.raises(
        ValueError, match=r"categories: there is no flags in .*; there are Animals & Nature, Food & Drink, Objects"
    ):
        _ = IconsSource(str(sets), SIZE, categories=["flags"]).icons
    with pytest.raises(ValueError, match="categories: there is no foods in "):  # though there are animals
        _ = IconsSource(str(sets), SIZE, categories=["animals", "foods"]).icons


def test_only_names_that_all_sets_have_are_taken_unless_told_otherwise(tmp_path: Path) -> None:
    write_tarball(tmp_path, "flat", {"kite": '<circle r="9"/>', "imp-dark-skin-tone": '<circle r="9"/>'})
    write_tarball(tmp_path, "lined", {"imp-dark": '<circle r="9"/>'})
    common, either = IconsSource(str(tmp_path), SIZE), IconsSource(str(tmp_path), SIZE, common=False)
    assert "kite" not in common.icons and list(either.icons["kite"]) == ["flat"]
    assert list(common.icons["imp dark skin tone"]) == ["flat", "lined"], "one emoji, whichever way a set spells its tone"


def test_icons_that_are_hidden_are_left_out(tmp_path: Path) -> None:
    files = content("flat")
    files["icons.json"]["icons"]["fish-0"]["hidden"] = True
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert "fish 0" not in IconsSource(str(tmp_path), SIZE).icons


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "nowhere"}, "holds no Iconify set. Fetch some: `mkdir -p nowhere && npm pack --pack-destination nowhere"),
        ({"styles": ["flat", "round"]}, "there is no set round; there are dark-side, flat, lined, paper"),
        ({"background": "blurple"}, "background: 'blurple' is no colour"),
        ({"supersampling": 0}, "supersampling 1 to 16"),
    ],
)
def test_a_mistake_is_said_with_what_to_do(sets: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = {"name": "icons", "folder": str(sets), "image_size": SIZE} | change
    with pytest.raises(UserError, match=message):
        make_data({"name": "image_caption", "path": str(tmp_path / "data"), "source": source}, "train_loader")


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"icons": []}')
    with pytest.raises(ValueError, match=r"mine\.json is no Iconify set: KeyError: 'prefix'"):
        _ = IconsSource(str(tmp_path), SIZE).icons
    write_tarball(tmp_path, "flat").rename(tmp_path / "mine.json")
    shutil.copy(tmp_path / "mine.json", tmp_path / "other.tgz")
    with pytest.raises(ValueError, match="holds flat twice"):
        _ = IconsSource(str(tmp_path), SIZE).icons


# ---------------------------------------------------------------------------------------------- the data that are made


def test_data_hold_licences_captions_and_no_pair_in_both_splits(sets: Path, tmp_path: Path) -> None:
    spec = {"folder": str(sets), "image_size": SIZE}
    source = IconsSource(str(sets), SIZE)
    prepare(tmp_path / "data", source, spec)
    keys = {}
    for split in ("train", "heldout"):
        manifest = Manifest.read(tmp_path / "data" / split)
        assert manifest.captions == ("caption", "sentence", "word")
        assert manifest.attribution.keys() == STYLES.keys()
        assert manifest.attribution["paper"] == {
            "title": "Paper", "author": "Author of paper", "licence": "LicenseRef-Test",
            "licence_url": "https://example.com/licence",
        }  # fmt: skip
        rows = open_local(tmp_path / "data" / split / f"{SIZE}x{SIZE}")
        keys[split] = {rows[index]["key"] for index in range(len(rows))}
        assert len(keys[split]) == len(rows)
    assert not keys["train"] & keys["heldout"] and len(keys["train"] | keys["heldout"]) == 4 * len(THINGS)
    assert len(keys["train"]) == source.train_samples
    assert is_made(tmp_path / "data", source, spec)
    moved = shutil.copytree(sets, tmp_path / "changed")
    (moved / "paper.json").write_text((moved / "paper.json").read_text().replace("#20a040", "#20a041"))
    with pytest.raises(ValueError, match=r"made of other images.*paper\.json"):
        is_made(tmp_path / "data", IconsSource(str(moved), SIZE), spec)


def test_one_style_of_about_every_fourth_name_is_kept_out_and_the_name_decides(sets: Path, source: IconsSource) -> None:
    kept_out = {pair for pair in source.pairs if source.is_heldout(*pair)}
    names, styles = {name for name, _ in kept_out}, {style for _, style in kept_out}
    assert 3 <= len(kept_out) == len(names) <= 13 and len(styles) > 1
    fewer = IconsSource(str(sets), SIZE, categories=["objects"])
    assert all(fewer.is_heldout(*pair) == (pair in kept_out) for pair in fewer.pairs)
    everything, nothing = IconsSource(str(sets), SIZE, heldout=1), IconsSource(str(sets), SIZE, heldout=0)
    assert sum(starmap(everything.is_heldout, everything.pairs)) == len(everything.icons)
    assert not any(starmap(nothing.is_heldout, nothing.pairs))


def test_so_many_names_of_a_new_style_are_trained_on_and_the_others_kept_out(sets: Path) -> None:
    new = IconsSource(str(sets), SIZE, styles=["paper"], trained_names=5)
    trained = {pair for pair in new.pairs if not new.is_heldout(*pair)}
    assert len(trained) == new.train_samples == 5 and len(new.pairs) == len(THINGS)
    found = score_icons(new, SIZE, lambda prompts: torch.zeros(len(prompts), 3, SIZE, SIZE, dtype=torch.uint8))
    assert "heldout_accuracy" in found and "other_style_accuracy" not in found, "one style has no other to be remembered from"
    more = IconsSource(str(sets), SIZE, styles=["paper"], trained_names=9)
    assert all(not more.is_heldout(*pair) for pair in trained), "more names add to those that there were"
    with pytest.raises(ValueError, match="trained_names must be at least 1, not 0"):
        IconsSource(str(sets), SIZE, trained_names=0)


def test_every_name_and_style_that_is_kept_out_is_trained_on_with_others(source: IconsSource) -> None:
    split = {pair_of(sample): split for split, sample in source.samples()}
    trained = [pair for pair, where in split.items() if where == "train"]
    for name, style in (pair for pair, where in split.items() if where == "heldout"):
        assert sum(pair[0] == name for pair in trained) == 3
        assert any(pair[1] == style for pair in trained)


def test_captions_are_of_several_wordings_and_always_the_same(source: IconsSource) -> None:
    first, again = ([sample.captions for _, sample in source.samples()] for _ in range(2))
    assert first == again
    by_pair = {pair_of(sample): sample.captions for _, sample in source.samples()}
    assert by_pair["fish 3", "dark-side"]["caption"] == "fish 3 in the style of dark side"
    assert by_pair["fish 3", "dark-side"]["word"] == "fish 3"
    sentences = [captions["sentence"] for (name, _), captions in by_pair.items() if name.startswith("fish")]
    assert all("animals and nature" in text and "fish" in text for text in sentences)
    assert len({text.split()[0] for text in sentences}) >= 3


def test_drawings_are_those_of_an_independent_renderer(source: IconsSource) -> None:
    """Rectangles and circles by Pillow, over another background."""
    drawn = render('<rect x="2" y="4" width="8" height="6" fill="#f00"/>', Box(0, 0, 16, 16), 32, background="#808080")
    expected = Image.new("RGB", (32 * 4, 32 * 4), "#808080")
    ImageDraw.Draw(expected).rectangle((16, 32, 79, 79), fill="#f00")
    expected = expected.resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(drawn, float) - np.asarray(expected, float)).max() <= 2
    wide = render('<rect width="20" height="10"/>', Box(0, 0, 20, 10), 20)  # its aspect ratio is kept
    assert np.asarray(wide)[:4].min() > 250 and np.asarray(wide)[8:12].max() < 5
    assert source.picture("fish 0", "flat", 48).size == (48, 48)


# ------------------------------------------------------------------------------------------------- SVG of strangers

SHAPE = '<rect width="9" height="9"/>'
HOSTILE = {
    "local picture": '<image href="{secret}" width="16" height="16"/>',
    "old link": '<image xlink:href="file://{secret}" width="16" height="16"/>',
    "remote picture": '<image href="http://127.0.0.1:9/a.png" width="16" height="16"/>',
    "nested picture": '<image href="data:image/svg+xml;base64,PHN2Zy8+" width="16" height="16"/>',
    "use of a file": '<use href="{secret}#a"/>',
    "filter": '<filter id="a"><feImage href="{secret}"/></filter><rect width="9" height="9" filter="url(#a)"/>',
    "paint": '<rect width="9" height="9" fill="url({secret}#a)"/>',
    "quoted paint": '<rect width="9" height="9" style="fill: url( \'http://127.0.0.1:9/#a\' )"/>',
    "escaped paint": '<rect width="9" height="9" style="fill: u\\72l(http://127.0.0.1:9)"/>',
    "style sheet": '<style>@import "http://127.0.0.1:9/a.css";</style><rect width="9" height="9"/>',
    "script": '<script>fetch(\'http://127.0.0.1:9\')</script><rect width="9" height="9"/>',
    "web page": '<foreignObject><p xmlns="http://www.w3.org/1999/xhtml">a</p></foreignObject>',
    "other namespace": '<a:script xmlns:a="http://www.w3.org/1999/xhtml"/><rect width="9" height="9"/>',
    "text": "<text y='9'>fonts differ</text>",
    "entity": '<!DOCTYPE svg [<!ENTITY a SYSTEM "{secret}">]><rect width="9" height="9"/>',
    "second document": '</svg><!DOCTYPE svg [<!ENTITY a "b">]><svg>',
    "instruction": '<?xml-stylesheet href="{secret}"?><rect width="9" height="9"/>',
    "no XML": "<rect width=9",
    "left open": '</svg><svg><rect width="9" height="9"/>',
    "cycle": '<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>',
    "depth": "<g>" * 5000 + "</g>" * 5000,
    "bomb": "".join(f'<g id="a{n}">' + f'<use href="#a{n - 1}"/>' * 10 + "</g>" for n in range(1, 30))
    + f'<g id="a0">{SHAPE}</g>',
    "nothing": "",
    "blank": '<rect width="16" height="16" fill="#fff"/>',
    "no box": "NO BOX",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_svg_is_refused_and_opens_nothing(case: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "#123456").save(secret)
    body, box = HOSTILE[case].replace("{secret}", str(secret)), Box(0, 0, 16, 16)
    if case == "no box":
        body, box = SHAPE, Box(0, 0, -1, float("nan"))
    with pytest.raises(SVGError):
        render(body, box, 16)


def test_what_sets_really_have_is_let_through() -> None:
    gradient = (
        '<linearGradient id="a"><stop offset="0" stop-color="#f00"/></linearGradient><path id="b" fill="url(#a)" d="M0 0h9v9z"/>'
    )
    clipped = (
        '<defs><clipPath id="c"><use xlink:href="#b"/></clipPath></defs><g clip-path="url( \'#c\' )"><use href="#b" x="3"/></g>'
    )
    animated = '<circle cx="14" cy="14" r="1"><animate attributeName="r" values="5;9" dur="1s"/></circle>'
    checked(gradient + clipped + animated)
    red, green, blue = np.asarray(render(gradient + clipped + animated, Box(0, 0, 16, 16), 16))[3, 6]
    assert red > 250 and green < 5 and blue < 5


def test_what_cannot_be_drawn_is_left_out_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tarball(tmp_path, "flat", {"letter": "<text>a</text>", "ghost": "<g/>", "spy": '<image href="/etc/a.png"/>'})
    with caplog.at_level(logging.WARNING):
        keys = [sample.key for _, sample in IconsSource(str(tmp_path), SIZE).samples()]
    assert len(keys) == len(THINGS) and not {"flat:letter", "flat:ghost", "flat:spy"} & set(keys)
    assert "3 of 39 icons are left out: 1 is blank, 1 has an element <text>, 1 has an element <image>." in caplog.text
    assert "flat:spy is left out: it has an element <image>" in caplog.text


# -------------------------------------------------------------------------------------------------------- the score


def drawn_from(pictures: dict[Pair, Tensor], change: Any = None) -> Any:
    """What answers prompts by the real pictures, or what `change` makes of the pair asked for."""
    styles = {style.replace("-", " "): style for style in STYLES}

    def draw(prompts: list[str]) -> Tensor:
        asked = [prompt.split(" in the style of ") for prompt in prompts]
        return torch.stack([(change or pictures.__getitem__)((name, styles[style])) for name, style in asked])

    return draw


def test_perfect_drawings_are_all_found(source: IconsSource, pictures: dict[Pair, Tensor]) -> None:
    found = score_icons(source, SIZE, drawn_from(pictures), images_per_pair=2)
    assert {found[f"{split}_accuracy{top}"] for split in ("heldout", "trained") for top in ("", "/top5")} == {1.0}
    assert found["other_style_accuracy"] < found["other_style_accuracy/top5"] <= 1.0
    assert found["chance_accuracy"] == pytest.approx(1 / 36) and found["chance_accuracy/top5"] == pytest.approx(5 / 36)


def test_noise_is_found_as_often_as_chance_says(sets: Path) -> None:
    source = IconsSource(str(sets), SIZE, heldout=1)  # every name once, so that there are 60 drawings
    generator = torch.Generator().manual_seed(0)
    found = score_icons(
        source, SIZE, lambda p: torch.randint(0, 256, (len(p), 3, SIZE, SIZE), dtype=torch.uint8, generator=generator), 20
    )
    assert abs(found["heldout_accuracy"] - found["chance_accuracy"]) < 0.05
    assert abs(found["heldout_accuracy/top5"] - found["chance_accuracy/top5"]) < 0.15


def test_the_memorising_line_is_what_a_hand_computation_gives(sets: Path, pictures: dict[Pair, Tensor]) -> None:
    """By Pillow's blur and numpy: the picture of the same name in every other style, among those of the style asked for."""
    source = IconsSource(str(sets), SIZE, heldout=1)
    blurred = {
        pair: np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1)), float)
        for pair, p in pictures.items()
    }
    places = []
    for name, style in source.pairs:
        if not source.is_heldout(name, style):
            continue
        for other in set(STYLES) - {style}:
            errors = {n: ((blurred[name, other] - blurred[n, style]) ** 2).mean() for n in source.icons}
            places.append(sorted(errors, key=errors.__getitem__).index(name))
    found = score_icons(source, SIZE, drawn_from(pictures))
    assert 0.1 < np.mean([place < 1 for place in places]) < 0.95, "otherwise the test shows little"
    assert found["other_style_accuracy"] == pytest.approx(np.mean([place < 1 for place in places]), abs=2.5 / len(places))
    assert found["other_style_accuracy/top5"] == pytest.approx(np.mean([place < 5 for place in places]), abs=2.5 / len(places))


def test_a_model_that_only_memorised_scores_the_memorising_line(sets: Path, pictures: dict[Pair, Tensor]) -> None:
    """Asked for a pair that was kept out, it draws the thing in another style; over all other styles that is the line."""
    source = IconsSource(str(sets), SIZE, heldout=1)
    shares = []
    for step in (1, 2, 3):
        order = list(source.sets)

        def other(pair: Pair, step: int = step, order: list[str] = order) -> Tensor:
            return pictures[pair[0], order[(order.index(pair[1]) + step) % 4]]

        shares.append(score_icons(source, SIZE, drawn_from(pictures, other)))
    mean = sum(share["heldout_accuracy"] for share in shares) / 3
    assert mean == pytest.approx(shares[0]["other_style_accuracy"])


def test_a_prompt_without_a_style_is_right_in_any(source: IconsSource, pictures: dict[Pair, Tensor]) -> None:
    """The model that is asked by words draws the thing in one style, whichever pair the word was taken from."""

    def draw(prompts: list[str]) -> Tensor:
        if prompts[0] in source.icons:
            return torch.stack([pictures[prompt, "lined"] for prompt in prompts])
        pair_of = {text: pair for pair in pictures for text in source.prompts(*pair).values()}
        return torch.stack([pictures[pair_of[prompt]] for prompt in prompts])

    found = score_icons(source, SIZE, draw, images_per_pair=2, wordings=["sentence", "word"])
    assert found["heldout_accuracy"] == found["sentence_accuracy"] == found["word_accuracy"] == 1.0
    wrong = dict(zip(source.icons, [*list(source.icons)[1:], next(iter(source.icons))], strict=True))
    found = score_icons(source, SIZE, lambda p: draw([wrong.get(prompt, prompt) for prompt in p]), wordings=["word"])
    assert found["heldout_accuracy"] == 1.0 and found["word_accuracy"] < 0.2


def test_candidates_hold_what_is_asked_and_are_as_many_as_they_should_be(source: IconsSource) -> None:
    parts = subsets(source, SIZE, candidates=10)
    for part in parts:
        assert len(part.names) == len(set(part.names)) == 10 and 1 <= part.heldout <= 5 and part.trained == part.heldout
        assert all(source.is_heldout(name, part.style) for name in part.names[: part.heldout])
        assert not any(source.is_heldout(name, part.style) for name in part.names[part.heldout :])
    assert [part.names for part in parts] == [part.names for part in subsets(source, SIZE, candidates=10)]


def test_the_sheet_shows_a_thing_drawn_in_every_style_and_what_the_kept_out_one_should_be(
    source: IconsSource, pictures: dict[Pair, Tensor]
) -> None:
    drawn = {source.prompts(*pair)["caption"]: 255 - image for pair, image in pictures.items()}
    sheet = heldout_sheet(source, SIZE, lambda prompts: torch.stack([drawn[prompt] for prompt in prompts]), 2)
    assert sheet is not None
    kept_out = sorted(filter(lambda p: source.is_heldout(*p), source.pairs), key=lambda p: source.shuffled_names.index(p[0]))[:2]
    width = (sheet.width - GAP) // 10 - GAP
    top = as_tensor(sheet)[:, GAP : GAP + width : width // SIZE]
    expected = []
    for name, style in kept_out:
        trained = [255 - pictures[name, other] for other in source.icons[name] if other != style]
        expected += [*trained, 255 - pictures[name, style], pictures[name, style]]
    for column, image in enumerate(expected):
        left = GAP + column * (width + GAP)
        assert torch.equal(top[:, :, left : left + width : width // SIZE], image)
    assert heldout_sheet(source, SIZE, lambda prompts: torch.stack([drawn[prompt] for prompt in prompts]), 0) is None


def test_large_drawings_are_compared_at_32_pixels() -> None:
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert comparable(image).shape == (2, 3 * 32 * 32)
    assert comparable(torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)).allclose(torch.tensor(7.0))


def test_other_data_cannot_be_scored(sets: Path) -> None:
    with pytest.raises(ValueError, match=r"set callbacks\.icons_score=false"):
        IconsScore({"name": "shapes"}, "run", SIZE)
    with pytest.raises(ValueError, match="columns of captions: caption, sentence, word, not 'tags'"):
        IconsScore({"name": "icons", "folder": str(sets), "image_size": SIZE}, "run", SIZE, wordings=["tags"])
    with pytest.raises(ValueError, match="candidates 2"):
        IconsScore({"name": "icons", "folder": str(sets), "image_size": SIZE}, "run", SIZE, candidates=1)


def test_manifests_without_attribution_read_as_before(tmp_path: Path) -> None:
    manifest = Manifest(16, ("caption",), {})
    assert "attribution" not in manifest.to_json()
    kept = dataclasses.replace(manifest, attribution={"flat": {"author": "me"}})
    assert json.loads(kept.to_json())["attribution"] == {"flat": {"author": "me"}}
