"""Calibration images: any folder of pictures, the same ones for the same seed, ranges without an image in common."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from prunecli.data.calibration import CalibrationFolder, CalibrationSource, open_calibration
from prunecli.data.images import Images, open_data
from prunecli.data.sources import open_source
from prunecli.data.transforms import CALIBRATION, EvalTransform, generator
from prunecli.errors import ExitCode, PruneError, UsageError
from prunecli.models.build import InputSpec
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DataSettings

SPEC = InputSpec(size=(3, 24, 24), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
GREY = InputSpec(size=(1, 24, 24), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=1.0)

# File and Pillow's mode of every picture, in the order of their paths.
PICTURES = {
    "a.png": "RGB",
    "deep/er/b.JPG": "RGB",
    "deep/c.webp": "RGB",
    "deep/d.bmp": "L",
    "deep/e.png": "RGBA",
    "f.png": "P",
    "g.png": "1",
    "h.jpeg": "CMYK",
    "z/i.png": "LA",
    "z/j.png": "RGB",
}


def picture(seed: int, mode: str) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert("RGB").convert(mode if mode not in ("RGBA", "LA") else "RGB").convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photographs"
    for seed, (name, mode) in enumerate(PICTURES.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, mode).save(file)
    (root / "notes.txt").write_text("no picture")
    return root


def opened(root: Path | str, *, spec: InputSpec = SPEC, seed: int = 0, unreadable_limit: int = 10) -> CalibrationFolder:
    settings = DataSettings(calibration=str(root), unreadable_limit=unreadable_limit)
    return open_calibration(settings, spec, seed=seed)


def by_hand(file: Path, spec: InputSpec = SPEC) -> Tensor:
    with Image.open(file) as image:
        return EvalTransform(spec)(image.convert("L" if spec.size[0] == 1 else "RGB"), 0)


def preprocessed(root: Path, spec: InputSpec = SPEC) -> dict[str, Tensor]:
    """Every picture by its file, each opened by hand."""
    return {name: by_hand(root / name, spec) for name in PICTURES}


def names_of(images: Tensor, known: dict[str, Tensor]) -> list[str]:
    """The file of every image, found by its pixels."""
    return [next(name for name, pixels in known.items() if torch.equal(pixels, image)) for image in images]


# ---------------------------------------------------------------------------------------------- a folder


@pytest.mark.parametrize("spec", [SPEC, GREY])
def test_pictures_of_any_depth_format_and_mode_in_the_models_preprocessing(folder: Path, spec: InputSpec) -> None:
    source: CalibrationSource = opened(folder, spec=spec)
    images = source.unlabelled(10)
    assert (images.shape, images.dtype) == ((10, *spec.size), torch.float32)
    assert sorted(names_of(images, preprocessed(folder, spec))) == sorted(PICTURES)
    assert (source.size, source.description) == (10, f"the images below {folder}")


def test_the_order_is_a_function_of_the_seed(folder: Path) -> None:
    images = opened(folder).unlabelled(10)
    order = torch.randperm(10, generator=generator(CALIBRATION, 0)).tolist()
    paths = sorted(PICTURES)
    assert names_of(images, preprocessed(folder)) == [paths[at] for at in order]
    torch.manual_seed(99)  # what else the process drew must not matter
    assert torch.equal(opened(folder).unlabelled(10), images)
    assert not torch.equal(opened(folder, seed=1).unlabelled(10), images)


def test_ranges_are_parts_of_one_order(folder: Path) -> None:
    whole = opened(folder).unlabelled(10)
    for count, start in ((3, 0), (3, 3), (4, 6), (1, 9), (0, 0), (0, 5), (2, 10), (2, 50)):
        assert torch.equal(opened(folder).unlabelled(count, start), whole[start : start + count])
    state = torch.get_rng_state()
    opened(folder).unlabelled(4, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_hidden_names_do_not_count(folder: Path) -> None:
    (folder / ".cache").mkdir()
    picture(50, "RGB").save(folder / ".cache" / "thumb.png")
    (folder / "._a.png").write_bytes(b"what a Mac leaves on other disks")
    assert opened(folder).size == 10


def test_links_are_followed_and_no_folder_is_entered_twice(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(60, "RGB").save(elsewhere / "k.png")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "twice").symlink_to(folder / "deep")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "one.png").symlink_to(elsewhere / "k.png")
    source = opened(folder)
    assert source.size == 12  # k.png below its folder and as one.png: only folders are known again
    assert len(source.unlabelled(12)) == 12
    linked = tmp_path / "link"
    linked.symlink_to(folder)
    assert torch.equal(opened(linked).unlabelled(12), source.unlabelled(12))


# ---------------------------------------------------------------------------------------------- what goes wrong


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"not an image")


def test_ranges_stay_apart_whichever_images_cannot_be_read(folder: Path) -> None:
    known = preprocessed(folder)
    order = names_of(opened(folder).unlabelled(10), known)
    bad = (order[1], order[4], order[9])
    spoil(folder, *bad)
    left = [name for name in order if name not in bad]
    parts = ((0, 4), (4, 2), (6, 5))
    for ranges in (parts, parts[::-1]):  # a later range asked for first knows what cannot be read before it
        source = opened(folder)
        found = {start: names_of(source.unlabelled(count, start), known) for start, count in ranges}
        assert found == {start: left[start : start + count] for start, count in parts}
        assert set(source.unreadable) == {str(folder / name) for name in bad}
    assert names_of(source.unlabelled(4), known) == left[:4]


def test_no_image_is_decoded_again_to_find_a_later_range(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(folder)
    read: list[int] = []
    load = source._watched.load
    monkeypatch.setattr(source._watched, "load", lambda at: (read.append(at), load(at))[1])
    source.unlabelled(4)
    source.unlabelled(3, 4)
    assert len(read) == len(set(read)) == 7
    source.unlabelled(3, 4)
    assert len(read) == 10


def test_more_unreadable_images_than_the_limit_stop_the_run(folder: Path) -> None:
    spoil(folder, "a.png", "f.png", "deep/c.webp")
    assert len(opened(folder, unreadable_limit=3).unlabelled(7)) == 7
    for count, start in ((10, 0), (1, 7)):
        with pytest.raises(PruneError, match=r"3 images of .*photographs cannot be read \(.*a\.png.*\)") as error:
            opened(folder, unreadable_limit=2).unlabelled(count, start)
        assert "unreadable_limit=2" in str(error.value)
        assert error.value.exit_code is ExitCode.FAILED


def test_fewer_images_than_asked_for_are_said_with_their_number(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = opened(folder)
    with caplog.at_level(logging.WARNING, logger="prunecli"):
        assert len(source.unlabelled(10)) == 10
        assert caplog.messages == []
        assert len(source.unlabelled(256)) == 10
        assert len(source.unlabelled(64, 8)) == 2
    assert caplog.messages == [
        f"Calibration folder {folder} has 10 readable images; 256 were asked for.",
        f"Calibration folder {folder}, behind the first 8, has 2 readable images; 64 were asked for.",
    ]


def test_wrong_folders_are_refused_in_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^Calibration folder .*gone does not exist\.") as missing:
        opened(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"^Calibration folder .*notes\.txt is a file, not a folder\."):
        opened(folder / "notes.txt")
    empty = tmp_path / "empty"
    (empty / "below").mkdir(parents=True)
    (empty / "below" / "notes.txt").write_text("no picture")
    with pytest.raises(PruneError, match=r"^Calibration folder .*empty holds no images, at any depth\.") as nothing:
        opened(empty)
    assert (missing.value.exit_code, nothing.value.exit_code) == (ExitCode.USAGE, ExitCode.FAILED)
    with pytest.raises(UsageError, match="No calibration images are given"):
        open_calibration(DataSettings(), SPEC, seed=0)
    four = InputSpec(size=(4, 24, 24), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=1.0)
    with pytest.raises(UsageError, match="a model with 4"):
        opened(folder, spec=four)


def test_a_folder_that_cannot_be_listed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(*_: object, onerror: object, followlinks: bool) -> list[object]:
        assert callable(onerror)
        assert followlinks
        onerror(PermissionError(13, "Permission denied", str(folder / "deep")))
        return []

    monkeypatch.setattr("os.walk", walk)  # the superuser, who may run the tests, can list any folder
    with pytest.raises(PruneError, match=r"cannot be read: .*Permission denied"):
        opened(folder)


# ---------------------------------------------------------------------------------------------- the data of a job


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    parts = {"train/cat": range(8), "train/dog": range(8, 16), "val/cat": range(16, 19), "val/dog": range(19, 22)}
    for part, seeds in parts.items():
        (root / part).mkdir(parents=True)
        for i, seed in enumerate(seeds):
            picture(seed, "RGB").save(root / part / f"{i}.png")
    return root


def data(root: Path | str, *, num_classes: int = 2, spec: InputSpec = SPEC) -> Images:
    return open_data(DataSettings(name=str(root)), spec, num_classes=num_classes, seed=3)


def test_training_images_are_a_source_in_the_order_that_they_always_had(classes: Path) -> None:
    (classes / "train" / "dog" / "2.png").write_bytes(b"not an image")
    images = data(classes)
    source: CalibrationSource = images
    split = open_source(DataSettings(name=str(classes)), mode="RGB").train
    assert split is not None
    expected = []
    for position in torch.randperm(16, generator=generator(CALIBRATION, 3)).tolist():
        if not split.name(position).endswith("dog/2.png"):
            image, label = split.load(position)
            expected.append((EvalTransform(SPEC)(image, 0), label))
    for count, start in ((16, 0), (5, 0), (5, 5), (9, 10)):
        pixels, labels = images.calibration(count, start)
        wanted = expected[start : start + count]
        assert torch.equal(pixels, torch.stack([image for image, _ in wanted]))
        assert labels.tolist() == [label for _, label in wanted]
        assert torch.equal(source.unlabelled(count, start), pixels)
    assert (source.size, source.description) == (16, f"the training images of {classes}")


def test_validation_images_stand_in_where_there_are_no_others(classes: Path) -> None:
    source = data(classes / "val")
    assert (source.size, source.description) == (6, f"the validation images of {classes / 'val'}")
    assert len(source.unlabelled(4, 2)) == 4


def test_images_in_memory_have_ranges_too() -> None:
    spec = InputSpec(size=(1, 8, 8), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=1.0)
    images = data("digits", num_classes=10, spec=spec)
    whole = images.unlabelled(40)
    assert torch.equal(torch.cat([data("digits", num_classes=10, spec=spec).unlabelled(20, s) for s in (0, 20)]), whole)
    assert images.unlabelled(0).shape == (0, 1, 8, 8)


def test_the_recipe_names_the_folder() -> None:
    assert Recipe.from_mapping({"data": {"calibration": "photographs"}}).data.calibration == "photographs"
    assert Recipe().data.calibration is None
