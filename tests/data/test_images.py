"""Images: sources and their mistakes, exact preprocessing, batches that repeat whatever skip and workers are."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as tv

from prunecli.data.images import Images, limited, open_data, partners_of_class
from prunecli.data.sources import ArraySplit, FolderSplit, open_source
from prunecli.data.transforms import CropFlip, EvalTransform, TimmAugment
from prunecli.errors import PruneError, UsageError
from prunecli.models.build import InputSpec, input_spec
from prunecli.models.load import load_model
from prunecli.recipe.settings import DataSettings

CIFAR_SPEC = InputSpec(
    size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear", crop_pct=1.0
)
DIGITS_SPEC = InputSpec(size=(3, 16, 16), mean=(0.305,) * 3, std=(0.376,) * 3, interpolation="bilinear", crop_pct=1.0)
PHOTO_SPEC = InputSpec(size=(3, 48, 48), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_folder(root: Path, **splits: dict[str, int]) -> Path:
    """``train={"cat": 3}`` writes three images into train/cat; the split ``flat`` is the folder itself."""
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / name if split == "flat" else root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(i + 100 * len(name) + 1000 * len(split)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", train={"cat": 5, "horse": 6}, val={"cat": 3, "horse": 2})


def opened(
    name: Path | str, *, spec: InputSpec = PHOTO_SPEC, num_classes: int = 2, seed: int = 0, **kwargs: Any
) -> Images:
    settings = DataSettings(name=str(name), **{"batch_size": 4, **kwargs})
    return open_data(settings, spec, num_classes=num_classes, seed=seed)


def batches(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return list(loader)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------------------------------------- repeatable


@pytest.mark.parametrize("augment", ["none", "crop_flip", "timm"])
def test_same_seed_and_epoch_give_the_same_batches_whatever_skip_and_workers_are(folder: Path, augment: str) -> None:
    images = opened(folder, augment=augment)
    whole = batches(images.train_loader(epoch=3))
    assert [len(y) for _, y in whole] == [4, 4, 3]
    torch.manual_seed(99)  # what else the process drew must not matter
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global one is meant
    assert same(batches(images.train_loader(epoch=3)), whole)
    assert same(batches(images.train_loader(epoch=3, skip_batches=2)), whole[2:])
    assert same(batches(opened(folder, augment=augment, workers=2).train_loader(epoch=3, skip_batches=1)), whole[1:])
    assert batches(images.train_loader(epoch=3, skip_batches=3)) == []
    assert not same(batches(images.train_loader(epoch=4)), whole)
    assert not same(batches(opened(folder, augment=augment, seed=1).train_loader(epoch=3)), whole)


def legacy_numpy_state() -> list[int]:
    return np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is meant


@pytest.mark.parametrize("augment", ["none", "crop_flip", "timm"])
def test_loading_leaves_the_global_random_numbers_alone(folder: Path, augment: str) -> None:
    images = opened(folder, augment=augment)
    before = random.getstate(), legacy_numpy_state(), torch.get_rng_state()
    batches(images.train_loader(epoch=0))
    batches(images.val_loader())
    images.calibration(3)
    assert random.getstate() == before[0]
    assert legacy_numpy_state() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_epoch_holds_every_image_once_and_augmentation_varies(folder: Path) -> None:
    plain = opened(folder, augment="none")
    everything = torch.cat([x for x, _ in plain.train_loader(epoch=0)])
    assert len({tuple(x.flatten()[:50].tolist()) for x in everything}) == 11
    assert sum(y.sum().item() for _, y in plain.train_loader(epoch=5)) == 6
    for augment in ("crop_flip", "timm"):
        images = opened(folder, augment=augment, batch_size=11)
        first, second = (batches(images.train_loader(epoch=e))[0] for e in (0, 1))
        order = [first[0].flatten(1).mean(1).sort()[0], second[0].flatten(1).mean(1).sort()[0]]
        assert not torch.equal(*order)


@pytest.mark.parametrize("augment", ["crop_flip", "timm", "none"])
def test_companions_are_of_the_class_or_another_view_and_the_images_stay_what_they_were(
    folder: Path, augment: str
) -> None:
    images = opened(folder, augment=augment)
    plain = batches(images.train_loader(epoch=3))
    for companion in ("class", "view"):
        pairs = batches(images.train_loader(epoch=3, companion=companion))
        assert same([(x[0::2], y[0::2]) for x, y in pairs], plain)
        assert all(torch.equal(y[0::2], y[1::2]) for _, y in pairs)
        assert same(pairs, batches(images.train_loader(epoch=3, companion=companion)))
        assert same(pairs[2:], batches(images.train_loader(epoch=3, skip_batches=2, companion=companion)))
        equal = [torch.equal(first, second) for x, _ in pairs for first, second in zip(x[0::2], x[1::2], strict=True)]
        assert all(equal) if (companion, augment) == ("view", "none") else not any(equal)


def test_partners_are_others_of_the_class_all_alike_and_differ_by_epoch() -> None:
    classes = np.array([0, 1, 0, 0, 2, 1, 0])
    drawn = torch.stack([partners_of_class(classes, seed=1, epoch=epoch) for epoch in range(3000)])
    assert (drawn[:, 4] == 4).all()  # the only one of its class
    assert (drawn[:, 1] == 5).all()
    assert (drawn[:, 5] == 1).all()
    counts = torch.bincount(drawn[:, 0], minlength=7)
    assert counts[[0, 1, 4, 5]].sum() == 0
    assert counts[[2, 3, 6]].min() > 900
    assert torch.equal(drawn[7], partners_of_class(classes, seed=1, epoch=7))


def test_processes_share_pairs_not_images(folder: Path) -> None:
    images = opened(folder, train_limit=8)
    whole = batches(images.train_loader(epoch=0, companion="class"))
    loaders = [
        prepare_data_loader(
            images.train_loader(epoch=0, companion="class"),
            num_processes=2,
            process_index=k,
            split_batches=True,
            put_on_device=False,
        )
        for k in range(2)
    ]
    parts = [batches(loader) for loader in loaders]
    for k, part in enumerate(parts):
        assert same(part, [(x[4 * k : 4 * k + 4], y[4 * k : 4 * k + 4]) for x, y in whole])


def test_pairs_of_images_that_cannot_be_read_are_said_as_single_ones_are(folder: Path) -> None:
    for file in (folder / "train" / "cat").iterdir():
        file.write_bytes(b"no image")
    for companion in ("class", "view"):
        with pytest.raises(PruneError, match="cannot be read"):
            batches(opened(folder, unreadable_limit=0).train_loader(epoch=0, companion=companion))


def test_data_that_does_not_tell_classes_cannot_be_paired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderSplit, "classes", lambda _: None)
    with pytest.raises(UsageError, match="pairs images by class"):
        opened(folder).train_loader(epoch=0, companion="class")
    assert opened(folder).train_loader(epoch=0, companion="view")


def test_two_processes_share_each_batch(folder: Path) -> None:
    images = opened(folder, train_limit=8)
    whole = batches(images.train_loader(epoch=0))
    parts = [
        batches(
            prepare_data_loader(
                images.train_loader(epoch=0),
                num_processes=2,
                process_index=k,
                split_batches=True,
                put_on_device=False,
            )
        )
        for k in range(2)
    ]
    joined = [tuple(torch.cat(halves) for halves in zip(*pair, strict=True)) for pair in zip(*parts, strict=True)]
    assert same(joined, whole)
    assert len(whole) == 2


@pytest.mark.parametrize(
    ("batch_size", "steps", "last"), [(4, 3, 3), (5, 2, 5), (10, 1, 10), (11, 1, 11), (1, 11, 1), (64, 1, 11)]
)
def test_only_a_last_batch_of_one_is_dropped(folder: Path, batch_size: int, steps: int, last: int) -> None:
    images = opened(folder, batch_size=batch_size)
    sizes = [len(y) for _, y in images.train_loader(epoch=0)]
    assert (images.steps_per_epoch, len(sizes), sizes[-1]) == (steps, steps, last)
    assert sum(len(y) for _, y in images.val_loader()) == images.val_size == 5


# ---------------------------------------------------------------------------------------------- preprocessing


def test_evaluation_is_timms_transform_in_the_sources_order(folder: Path) -> None:
    transform = create_transform(
        input_size=(3, 48, 48), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9
    )
    expected = [transform(Image.open(f).convert("RGB")) for f in sorted((folder / "val").rglob("*.png"))]
    found = torch.cat([x for x, _ in opened(folder).val_loader()])
    assert torch.equal(found, torch.stack(expected))
    assert [y.tolist() for _, y in opened(folder).val_loader()] == [[0, 0, 0, 1], [1]]


@pytest.mark.parametrize("shape", [(6, 32, 32, 3), (6, 32, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_batches_of_pixels_equal_the_transform_image_by_image(shape: tuple[int, ...], channels: int) -> None:
    spec = InputSpec(
        size=(channels, 32, 32),
        mean=CIFAR_SPEC.mean[:channels],
        std=CIFAR_SPEC.std[:channels],
        interpolation="bilinear",
        crop_pct=1.0,
    )
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    split = ArraySplit(pixels=pixels, labels=np.arange(6), mode="L" if channels == 1 else "RGB")
    transform = EvalTransform(spec)
    assert transform.only_normalises(split) == (len(shape) == 3 or channels == 3)
    if transform.only_normalises(split):
        slow = torch.stack([transform(split.load(i)[0], i) for i in range(6)])
        assert torch.equal(transform.normalised(torch.from_numpy(pixels)), slow)
    smaller = ArraySplit(pixels=pixels[:, :16], labels=np.arange(6), mode="RGB")
    assert not transform.only_normalises(smaller)


def test_crop_flip_equals_torchvision_on_the_pixels() -> None:
    crop_flip = CropFlip(CIFAR_SPEC, count=50, seed=1, epoch=2)
    transform, originals = EvalTransform(CIFAR_SPEC), [photo(i, (32, 32)) for i in range(50)]
    found = crop_flip(torch.stack([transform(x, 0) for x in originals]), range(50))
    for i, original in enumerate(originals):
        top, left = crop_flip.corners[i].tolist()
        image = tv.crop(tv.pad(original, [4]), top, left, 32, 32)
        image = tv.hflip(image) if crop_flip.flips[i] else image
        assert torch.equal(found[i], transform(image, 0))
    assert {tuple(c) for c in crop_flip.corners.tolist()} <= {(a, b) for a in range(9) for b in range(9)}
    assert set(CropFlip(CIFAR_SPEC, count=2000, seed=0, epoch=0).corners.flatten().tolist()) == set(range(9))
    assert 900 < int(CropFlip(CIFAR_SPEC, count=2000, seed=0, epoch=0).flips.sum()) < 1100


@pytest.mark.parametrize(
    ("name", "spec", "kind"),
    [("folder", CIFAR_SPEC, "crop_flip"), ("folder", PHOTO_SPEC, "crop_flip"), ("digits", DIGITS_SPEC, "none")],
)
def test_automatic_augmentation(folder: Path, name: str, spec: InputSpec, kind: str) -> None:
    source, classes = (folder, 2) if name == "folder" else (name, 10)
    first = batches(opened(source, spec=spec, num_classes=classes).train_loader(epoch=0))
    asked = batches(opened(source, spec=spec, num_classes=classes, augment=kind).train_loader(epoch=0))
    assert same(first, asked)


def test_automatic_augmentation_above_64_pixels_is_timms(folder: Path) -> None:
    spec = InputSpec(size=(3, 65, 65), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)
    timm_batches = batches(opened(folder, spec=spec, augment="timm").train_loader(epoch=0))
    assert same(batches(opened(folder, spec=spec).train_loader(epoch=0)), timm_batches)
    assert not same(batches(opened(folder, spec=spec, augment="none").train_loader(epoch=0)), timm_batches)
    own = TimmAugment(spec, seed=0, epoch=0)
    assert torch.equal(own(photo(1), 7), own(photo(1), 7))
    assert not torch.equal(own(photo(1), 7), own(photo(1), 8))


def test_grey_models_get_one_channel(folder: Path) -> None:
    spec = InputSpec(size=(1, 32, 32), mean=(0.1,), std=(0.3,), interpolation="bilinear", crop_pct=1.0)
    for augment in ("none", "crop_flip", "timm"):
        images, _ = batches(opened(folder, spec=spec, augment=augment).train_loader(epoch=0))[0]
        assert images.shape == (4, 1, 32, 32)
    with pytest.raises(UsageError, match="a model with 4"):
        opened(folder, spec=InputSpec(size=(4, 32, 32), mean=(0,), std=(1,), interpolation="bilinear", crop_pct=1.0))


def test_calibration_is_fixed_by_the_seed_and_not_augmented(folder: Path) -> None:
    images = opened(folder, augment="timm")
    x, y = images.calibration(6)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((6, 3, 48, 48), (6,), torch.float32, torch.int64)
    assert torch.equal(images.calibration(6)[0], x)
    assert torch.equal(images.calibration(3)[0], x[:3])
    assert not torch.equal(opened(folder, seed=1).calibration(6)[0], x)
    plain = torch.cat([b for b, _ in opened(folder, augment="none").train_loader(epoch=0)])
    assert all(any(torch.equal(a, b) for b in plain) for a in x)
    assert len(images.calibration(500)[1]) == 11


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_split_by_class_four_to_one() -> None:
    images = opened("digits", spec=DIGITS_SPEC, num_classes=10, batch_size=200)
    train = torch.cat([y for _, y in images.train_loader(epoch=0)]).bincount()
    val = torch.cat([y for _, y in images.val_loader()]).bincount()
    assert int(train.sum() + val.sum()) == 1797
    assert (train + val).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert val.tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    x, y = images.calibration(2000)
    assert x.shape[1:] == (3, 16, 16)
    assert abs(x.mean()) < 0.1
    assert len(y) == images.train_size
    settings = DataSettings(name="digits")
    a, b = (open_source(settings, mode="L") for _ in range(2))
    assert np.array_equal(a.val.pixels, b.val.pixels)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- limits


def test_limits_take_a_fixed_mixed_subset(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train={"cat": 30, "horse": 30}, val={"cat": 30, "horse": 30})
    small, seeded = (opened(root, train_limit=20, val_limit=10, seed=s, spec=CIFAR_SPEC) for s in (0, 1))
    assert (small.train_size, small.val_size, small.steps_per_epoch) == (20, 10, 5)
    labels = torch.cat([y for _, y in small.val_loader()])
    assert set(labels.tolist()) == {0, 1}
    assert labels.tolist() == sorted(labels.tolist())
    assert same(batches(small.val_loader()), batches(seeded.val_loader()))
    split = open_source(DataSettings(name=str(root)), mode="RGB").val
    names = [{part.name(i) for i in range(len(part))} for part in (limited(split, 10), limited(split, 25))]
    assert names[0] < names[1]
    assert limited(split, 60) is split
    assert limited(split, None) is split


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
def test_validation_folder_names(tmp_path: Path, name: str) -> None:
    images = opened(write_folder(tmp_path, train={"a": 2, "b": 2}, **{name: {"a": 1, "b": 2}}))
    assert (images.train_size, images.val_size, images.class_names) == (4, 3, ("a", "b"))


def test_own_split_names_win(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train={"a": 2, "b": 2}, mine={"a": 3, "b": 3}, val={"a": 1, "b": 1})
    images = opened(root, train_split="mine", val_split="train")
    assert (images.train_size, images.val_size) == (6, 4)


def test_a_flat_folder_is_for_evaluation(tmp_path: Path) -> None:
    images = opened(write_folder(tmp_path, flat={"a": 2, "b": 3}))
    assert (images.train_size, images.steps_per_epoch, images.val_size) == (0, 0, 5)
    assert len(images.calibration(3)[1]) == 3
    with pytest.raises(UsageError, match="no training images"):
        images.train_loader(epoch=0)


def test_classes_sort_as_numbers_and_hidden_or_foreign_files_do_not_count(tmp_path: Path) -> None:
    root = write_folder(tmp_path, flat={"class10": 1, "class2": 1, "class1": 2})
    (root / ".cache").mkdir()
    (root / "class1" / "notes.txt").write_text("no image")
    (root / "class1" / "deeper").mkdir()
    photo(5).save(root / "class1" / "deeper" / "x.JPG", format="JPEG")
    images = opened(root, num_classes=3)
    assert images.class_names == ("class1", "class2", "class10")
    assert images.val_size == 5


@pytest.mark.parametrize(
    ("name", "hint"),
    [("digit", "digits"), ("torch/cifar1O", "torch/cifar10"), ("/no/such/folder", ""), ("torch/nmist", "torch/mnist")],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="no folder and no known dataset name") as error:
        opened(name)
    assert hint in (error.value.hint or "")
    assert name in error.value.message


def test_wrong_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="No data"):
        open_data(DataSettings(), PHOTO_SPEC, num_classes=2, seed=0)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        opened(tmp_path / "file")

    def refused(root: Path, match: str, **kwargs: Any) -> str:
        with pytest.raises(PruneError, match=match) as error:
            opened(root, **kwargs)
        assert int(error.value.exit_code) == 1
        return str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "holds no images")
    (empty / "a").mkdir()
    (empty / "b").mkdir()
    refused(empty, "holds no images")
    refused(write_folder(tmp_path / "one", flat={"only": 2}), r"only 1 class \(only\)", num_classes=1)
    assert "num_classes=2" in refused(folder, r"2 classes \(cat, horse\), the model has 1000", num_classes=1000)
    refused(write_folder(tmp_path / "trainonly", train={"a": 1, "b": 1}), "no validation images")
    both = write_folder(tmp_path / "both", train={"a": 1, "b": 1}, val={"a": 1, "c": 1})
    refused(both, r"class 'c', which .*train lacks")


# ---------------------------------------------------------------------------------------------- unreadable


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"not an image", "half": content[: len(content) // 2]}[how])


@pytest.mark.parametrize("how", ["empty", "text", "half"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_the_run_goes_on(folder: Path, how: str, workers: int) -> None:
    clean = batches(opened(folder, augment="none").train_loader(epoch=0))
    for name in ("train/cat/1.png", "val/cat/2.png", "val/horse/1.png"):
        spoil(folder / name, how)
    images = opened(folder, augment="none", workers=workers)
    assert images.unreadable == ()
    train = batches(images.train_loader(epoch=0))
    assert [len(y) for _, y in train] == [len(y) for _, y in clean]
    assert images.unreadable == (str(folder / "train/cat/1.png"),)
    pairs = zip(torch.cat([x for x, _ in train]), torch.cat([x for x, _ in clean]), strict=True)
    assert sum(not torch.equal(a, b) for a, b in pairs) == 1  # its place is taken by the next readable one
    assert [y.tolist() for _, y in images.val_loader()] == [[0, 0, 1]]  # the second batch is empty and not given
    assert images.unreadable == tuple(str(folder / n) for n in ("train/cat/1.png", "val/cat/2.png", "val/horse/1.png"))
    assert len(images.calibration(11)[1]) == 10
    assert same(batches(images.train_loader(epoch=0)), train)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_stop_the_run(folder: Path, workers: int) -> None:
    for name in ("train/cat/1.png", "train/cat/3.png", "train/horse/0.png"):
        spoil(folder / name, "half")
    assert len(batches(opened(folder, unreadable_limit=3).train_loader(epoch=0))) == 3
    images = opened(folder, unreadable_limit=2, workers=workers)
    with pytest.raises(PruneError, match=r"3 images of .* cannot be read \(.*cat/1\.png.*\)") as error:
        batches(images.train_loader(epoch=0))
    assert "unreadable_limit" in str(error.value)
    with pytest.raises(PruneError, match="3 images"):
        images.val_loader()
    with pytest.raises(PruneError, match="cannot be read"):
        opened(folder, unreadable_limit=0).calibration(11)


# ---------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture(scope="module")
def cifar(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, shared_data / "expand.py", root, "cifar10"], check=True)
    yield root
    shutil.rmtree(root)


def correct(shared_data: Path, cifar: Path, *, images: int) -> int:
    """Correct answers of the published ResNet-56 on the first test images."""
    loaded = load_model("cifar_resnet56", weights=shared_data / "checkpoints" / "cifar10_resnet56.safetensors")
    settings = DataSettings(name="torch/cifar10", dir=str(cifar), batch_size=250)
    data = open_data(settings, input_spec(loaded.ref), num_classes=10, seed=0)
    right = seen = 0
    with torch.inference_mode():
        for x, y in data.val_loader():
            right += int((loaded.model(x).argmax(1) == y).sum())
            seen += len(y)
            if seen == images:
                return right
    raise AssertionError(f"only {seen} images")


@pytest.mark.slow
def test_published_checkpoint_on_the_first_thousand_test_images(shared_data: Path, cifar: Path) -> None:
    assert correct(shared_data, cifar, images=1000) == 926


@pytest.mark.slow
def test_published_checkpoint_has_its_published_accuracy(shared_data: Path, cifar: Path) -> None:
    assert correct(shared_data, cifar, images=10_000) / 100 == pytest.approx(93.39, abs=0.05)


def test_cifar_through_timm_is_torchvisions(cifar: Path) -> None:
    images = opened("torch/cifar10", dir=str(cifar), spec=CIFAR_SPEC, num_classes=10, batch_size=128)
    reference = CIFAR10(cifar, train=False)
    x, y = next(iter(images.val_loader()))
    transform = EvalTransform(CIFAR_SPEC)
    assert torch.equal(x[:20], torch.stack([transform(reference[i][0], i) for i in range(20)]))
    assert y.tolist() == reference.targets[:128]
    assert images.class_names == tuple(reference.classes)
    assert (images.train_size, images.val_size, images.steps_per_epoch) == (50_000, 10_000, 391)
    few = opened("torch/cifar10", dir=str(cifar), spec=CIFAR_SPEC, num_classes=10, train_limit=256, batch_size=100)
    a, b = (batches(few.train_loader(epoch=1, skip_batches=s)) for s in (0, 1))
    assert same(a[1:], b)
    assert [len(v) for _, v in a] == [100, 100, 56]


def test_torch_datasets_are_never_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs its folder"):
        opened("torch/cifar10", num_classes=10)
    with pytest.raises(UsageError, match="does not exist"):
        opened("torch/cifar10", dir=str(tmp_path / "gone"), num_classes=10)
    with pytest.raises(PruneError, match="not there, or damaged") as error:
        opened("torch/cifar10", dir=str(tmp_path), num_classes=10)
    assert int(error.value.exit_code) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no split 'trian'") as error:
        opened("torch/mnist", dir=str(tmp_path), num_classes=10, train_split="trian")
    assert "train" in (error.value.hint or "")


def test_hub_datasets_without_their_package_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package `datasets`"):
        opened("hfds/mnist")


class FakeReader:
    """What timm's reader for Hugging Face datasets gives: an open file and a class number."""

    class_to_idx = {"cat": 0, "horse": 1}  # noqa: RUF012 - a stand-in

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.files[index].open("rb"), int("horse" in str(self.files[index]))


class FakeDataset:
    def __init__(self, files: list[Path]) -> None:
        self.reader = FakeReader(files)

    def __len__(self) -> int:
        return len(self.reader.files)


def test_hub_datasets_are_read_through_timms_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, *, root: str | None, split: str, input_img_mode: str) -> FakeDataset:
        assert (name, root, input_img_mode) == ("hfds/me/pets", None, "RGB")
        return FakeDataset(sorted((folder / {"train": "train", "validation": "val"}[split]).rglob("*.png")))

    monkeypatch.setattr("prunecli.data.sources.create_dataset", create)
    spoil(folder / "train/cat/1.png", "half")
    images = opened("hfds/me/pets", train_limit=9)
    assert images.class_names == ("cat", "horse")
    assert same(batches(images.val_loader()), batches(opened(folder).val_loader()))
    assert images.train_size == 9
    complete = opened("hfds/me/pets")
    batches(complete.train_loader(epoch=0))
    assert complete.unreadable == ("hfds/me/pets train image 1",)


def write_shards(folder: Path, root: Path, *, info: bool) -> Path:
    """The images of a folder as WebDataset shards of four samples."""
    root.mkdir()
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.png"))
        for start in range(0, len(files), 4):
            shard = root / (f"shard{split[0]}{start}.tar" if info else f"pets-{split}-{start:04}.tar")
            splits.setdefault("validation" if split == "val" else split, {"filenames": []})["filenames"].append(
                shard.name
            )
            with tarfile.open(shard, "w") as tar:
                for i, file in enumerate(files[start : start + 4]):
                    label = root / "label"
                    label.write_text(str(int("horse" in str(file))))
                    members = [(file, f"{start + i:06}.png"), (label, f"{start + i:06}.cls")]
                    for path, name in members if i % 2 else reversed(members):
                        tar.add(path, arcname=name)
                    tar.add(label, arcname=f"{start + i:06}.json")
                    label.unlink()
    if info:
        (root / "info.json").write_text(json.dumps({"splits": splits}))
    return root


@pytest.mark.parametrize("info", [False, True])
def test_tar_shards_give_what_the_folder_gives(folder: Path, tmp_path: Path, info: bool) -> None:
    root = write_shards(folder, tmp_path / "shards", info=info)
    shards, plain = opened("wds/pets", dir=str(root), augment="timm"), opened(folder, augment="timm")
    assert (shards.class_names, shards.train_size, shards.val_size) == (("0", "1"), 11, 5)
    assert same(batches(shards.val_loader()), batches(plain.val_loader()))
    assert same(batches(shards.train_loader(epoch=1, skip_batches=1)), batches(plain.train_loader(epoch=1))[1:])
    assert opened("wds/pets", dir=str(root), train_limit=3).train_size == 3


def test_shard_mistakes(folder: Path, tmp_path: Path) -> None:
    spoil(folder / "val/cat/1.png", "half")
    root = write_shards(folder, tmp_path / "shards", info=False)
    images = opened("wds/pets", dir=str(root))
    assert sum(len(y) for _, y in images.val_loader()) == 4
    assert images.unreadable == (f"{root / 'pets-val-0000.tar'}:000001.png",)
    for shard in root.glob("*val*"):
        shard.write_bytes(b"no tar" * 200)
    with pytest.raises(PruneError, match="cannot be read"):
        opened("wds/pets", dir=str(root))
    for shard in root.glob("*val*"):
        shard.unlink()
    with pytest.raises(PruneError, match="no images for 'validation'"):
        opened("wds/pets", dir=str(root))
    (root / "info.json").write_text("{}")
    with pytest.raises(PruneError, match="cannot be read: 'splits'"):
        opened("wds/pets", dir=str(root))


def test_splits_name_their_files(folder: Path) -> None:
    split = open_source(DataSettings(name=str(folder)), mode="RGB").val
    assert isinstance(split, FolderSplit)
    assert split.name(3) == str(folder / "val" / "horse" / "0.png")
    assert split.subset([3, 0]).name(0) == split.name(3)
