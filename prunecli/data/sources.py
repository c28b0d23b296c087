"""Where images come from: folders, tar shards, timm's dataset names, scikit-learn's digits.

A source opens to a training split (if it has one), a validation split and the class names. Nothing is ever downloaded
into a folder of the user; ``hfds/…`` uses the cache of Hugging Face's own client.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from prunecli.errors import PruneError, UsageError, nearest, one_line
from prunecli.recipe.settings import DataSettings

ARRAY_DATASETS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
FILE_DATASETS = ("imagenet", "inaturalist", "places365")
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("validation", "val", "valid", "test")

# What decoding raises, by file format and by how the file is broken.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Split(Protocol):
    """A list of labelled images that can be read one by one, in any order, in any process."""

    def __len__(self) -> int: ...

    def load(self, position: int) -> tuple[Image.Image, int]:
        """The decoded image and its class. Raises one of ``UNREADABLE`` where the image cannot be decoded."""

    def name(self, position: int) -> str:
        """The name of the image in a message."""

    def subset(self, positions: Sequence[int]) -> Self:
        """Only these images, in this order."""

    def classes(self) -> NDArray[np.int64] | None:
        """The class ``[N]`` of every image; ``None`` where that is not known before it is read."""


@dataclass(frozen=True, kw_only=True)
class FolderSplit:
    """Images in files.

    Attributes:
        root: folder that holds the files.
        files: path below ``root`` and class of every image.
        mode: Pillow's mode that images are converted to.
    """

    root: Path
    files: tuple[tuple[str, int], ...]
    mode: str

    def __len__(self) -> int:
        return len(self.files)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """The decoded file and its class."""
        file, label = self.files[position]
        with Image.open(self.root / file) as image:
            return image.convert(self.mode), label

    def name(self, position: int) -> str:
        """The path of the file."""
        return str(self.root / self.files[position][0])

    def subset(self, positions: Sequence[int]) -> Self:
        """The images at these positions, in this order."""
        return replace(self, files=tuple(self.files[i] for i in positions))

    def classes(self) -> NDArray[np.int64]:
        """The class ``[N]`` of every file."""
        return np.array([label for _, label in self.files], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ArraySplit:
    """Images held in memory.

    Attributes:
        pixels: uint8, ``[N, H, W]`` grey or ``[N, H, W, 3]`` colour.
        labels: class ``[N]`` of every image.
        mode: Pillow's mode that images are converted to.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    mode: str

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """The pixels as an image, and its class."""
        return Image.fromarray(self.pixels[position]).convert(self.mode), int(self.labels[position])

    def name(self, position: int) -> str:
        """The position as text."""
        return f"image {position}"

    def subset(self, positions: Sequence[int]) -> Self:
        """The images at these positions, in this order."""
        return replace(self, pixels=self.pixels[list(positions)], labels=self.labels[list(positions)])

    def classes(self) -> NDArray[np.int64]:
        """The class ``[N]`` of every image."""
        return self.labels


@dataclass(frozen=True, kw_only=True)
class TimmSplit:
    """Images of a dataset that timm made.

    Attributes:
        dataset: timm's or torchvision's dataset.
        title: name of the data and split in messages.
        mode: Pillow's mode that images are converted to.
        positions: positions in ``dataset`` of the images.
    """

    dataset: Any
    title: str
    mode: str
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """The decoded image and its class."""
        at = self.positions[position]
        # Where there is a reader, files are decoded here: timm's own class replaces bad ones silently.
        if not hasattr(self.dataset, "reader"):
            image, label = self.dataset[at]
            return image.convert(self.mode), int(label)
        file, label = self.dataset.reader[at]
        with file, Image.open(file) as image:
            return image.convert(self.mode), int(label)

    def name(self, position: int) -> str:
        """The title and the position in the whole dataset."""
        return f"{self.title} image {self.positions[position]}"

    def subset(self, positions: Sequence[int]) -> Self:
        """The images at these positions, in this order."""
        return replace(self, positions=tuple(self.positions[i] for i in positions))

    def classes(self) -> NDArray[np.int64] | None:
        """The class ``[N]`` of every image; ``None`` where the dataset keeps no list of them."""
        targets = getattr(self.dataset, "targets", None)
        return None if targets is None else np.asarray(targets, dtype=np.int64)[list(self.positions)]


@dataclass(frozen=True, kw_only=True)
class ShardSplit:
    """Images in tar shards (the WebDataset layout), any of which can be read directly.

    Attributes:
        shards: paths of the tar files.
        samples: place of every image's bytes.
        mode: Pillow's mode that images are converted to.
    """

    shards: tuple[Path, ...]
    samples: tuple[ShardSample, ...]
    mode: str

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, position: int) -> tuple[Image.Image, int]:
        """The image decoded from its bytes in the shard, and its class."""
        sample = self.samples[position]
        with self.shards[sample.shard].open("rb") as file:
            file.seek(sample.offset)
            content = file.read(sample.size)
        with Image.open(io.BytesIO(content)) as image:
            return image.convert(self.mode), sample.label

    def name(self, position: int) -> str:
        """The path of the shard and the name inside it."""
        sample = self.samples[position]
        return f"{self.shards[sample.shard]}:{sample.key}"

    def subset(self, positions: Sequence[int]) -> Self:
        """The images at these positions, in this order."""
        return replace(self, samples=tuple(self.samples[i] for i in positions))

    def classes(self) -> NDArray[np.int64]:
        """The class ``[N]`` of every sample."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)


class ShardSample(NamedTuple):
    """One image of a shard.

    Attributes:
        shard: position of the tar file in ``ShardSplit.shards``.
        key: name of the image in the tar file.
        offset: first byte of the image in the tar file.
        size: number of bytes.
        label: class of the image.
    """

    shard: int
    key: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The images of an opened source.

    Attributes:
        train: training images; ``None`` where the source is for evaluation only.
        val: validation images.
        class_names: name of every class, by label.
    """

    train: Split | None
    val: Split
    class_names: tuple[str, ...]


def open_source(settings: DataSettings, *, mode: str) -> ImageSource:
    """Open the images that ``settings`` name.

    Args:
        settings: section ``data`` of the recipe; ``name``, ``dir`` and the names of the splits count.
        mode: Pillow's mode that images are converted to, ``RGB`` or ``L``.

    Raises:
        UsageError: the folder or dataset name does not exist.
        PruneError: it exists and holds no usable images.
    """
    name = settings.name
    if name is None:
        raise UsageError("No data is given.", hint="Give --data FOLDER, --data torch/cifar10 --data-dir DIR or digits.")
    if name == "digits":
        return _open_digits(mode)
    prefix, slash, rest = name.partition("/")
    if slash and prefix == "torch" and rest in ARRAY_DATASETS + FILE_DATASETS:
        return _open_torch(settings, rest, mode)
    if slash and prefix == "hfds":
        return _open_hub_dataset(settings, mode)
    if slash and prefix == "wds":
        return _open_shards(settings, mode)
    folder = Path(name)
    if folder.is_dir():
        return _open_folder(folder, settings, mode)
    known = ("digits", *(f"torch/{n}" for n in ARRAY_DATASETS + FILE_DATASETS))
    what = "is a file, not a folder" if folder.exists() else "is no folder and no known dataset name"
    raise UsageError(f"Data {name!r} {what}.", hint=nearest(name, known))


def _open_digits(mode: str) -> ImageSource:
    """1,797 handwritten digits of 8x8 pixels, 16 grey levels: every fifth image of each class is validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    held_out = rank % 5 == 4
    train, val = (ArraySplit(pixels=pixels[at], labels=labels[at], mode=mode) for at in (~held_out, held_out))
    return ImageSource(train=train, val=val, class_names=tuple(map(str, range(10))))


# ---------------------------------------------------------------------------------------------- folders


def _open_folder(root: Path, settings: DataSettings, mode: str) -> ImageSource:
    train_root = _first_folder(root, (settings.train_split, *TRAIN_FOLDERS))
    val_root = _first_folder(root, (settings.val_split, *VAL_FOLDERS))
    if train_root is None and val_root is None:
        val_root = root  # the class folders themselves: for evaluation
    if val_root is None:
        raise PruneError(
            f"Folder {root} has training images and no validation images.",
            hint=f"Put them into {root / 'val'}, one folder a class.",
        )
    class_names = _class_folders(train_root or val_root)
    if unknown := sorted(set(_class_folders(val_root)) - set(class_names)):
        raise PruneError(f"Folder {val_root} has the class {unknown[0]!r}, which {train_root} lacks.")
    train = None if train_root is None else _folder_split(train_root, class_names, mode)
    return ImageSource(train=train, val=_folder_split(val_root, class_names, mode), class_names=class_names)


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(root: Path) -> tuple[str, ...]:
    """Class folders in timm's order: numbers in names count as numbers, so that 2 comes before 10."""
    return tuple(sorted((f.name for f in root.iterdir() if f.is_dir() and f.name[0] != "."), key=natural_key))


def _folder_split(root: Path, class_names: Sequence[str], mode: str) -> FolderSplit:
    files = tuple(
        (str(file.relative_to(root)), label)
        for label, name in enumerate(class_names)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
    )
    if not files:
        raise PruneError(
            f"Folder {root} holds no images in class folders.",
            hint=f"Expected {root}/CLASS/IMAGE with {', '.join(IMG_EXTENSIONS)}.",
        )
    return FolderSplit(root=root, files=files, mode=mode)


# ---------------------------------------------------------------------------------------------- tar shards


def _open_shards(settings: DataSettings, mode: str) -> ImageSource:
    """Local WebDataset shards below ``settings.dir``. They are indexed once and then read in any order, because a
    stream that shuffles as it goes cannot be resumed at an exact batch. There are no class names, so labels serve.
    """
    root = _dataset_folder(settings)
    train = _shard_split(root, settings, (settings.train_split, *TRAIN_FOLDERS), mode)
    val = _shard_split(root, settings, (settings.val_split, *VAL_FOLDERS), mode)
    count = 1 + max(sample.label for split in (train, val) for sample in split.samples)
    return ImageSource(train=train, val=val, class_names=tuple(map(str, range(count))))


def _shard_split(root: Path, settings: DataSettings, names: Sequence[str], mode: str) -> ShardSplit:
    """The shards that ``info.json`` lists for the first of ``names`` it knows; without it, those named for one."""
    info = next((root / n for n in ("_info.json", "info.json") if (root / n).is_file()), None)
    try:
        if info is not None:
            known = json.loads(info.read_text(encoding="utf-8"))["splits"]
            listed: Sequence[str] = next((known[name]["filenames"] for name in names if name in known), ())
            shards = tuple(root / file for file in listed)
        else:
            found = (sorted(root.glob(f"*{name}*.tar")) for name in names)
            shards = tuple(next((files for files in found if files), []))
        samples = tuple(sample for at, shard in enumerate(shards) for sample in _index_shard(shard, at))
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise PruneError(f"Data {settings.name} below {root} cannot be read: {error}.") from error
    if not samples:
        raise PruneError(
            f"Data {settings.name} has no images for {names[0]!r} below {root}.",
            hint="Expected tar shards with KEY.jpg and KEY.cls, listed in info.json or named after their split.",
        )
    return ShardSplit(shards=shards, samples=samples, mode=mode)


def _index_shard(path: Path, number: int) -> Iterator[ShardSample]:
    """Pairs ``KEY.jpg`` (or another image) with ``KEY.cls``, which lie side by side in any order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            key = f"{folder}/{stem}"
            if f".{ending.lower()}" in IMG_EXTENSIONS:
                images[key] = member
            elif ending == "cls" and (content := tar.extractfile(member)) is not None:
                labels[key] = int(content.read())
    for key, image in images.items():
        if key in labels:
            yield ShardSample(number, image.name, image.offset_data, image.size, labels[key])


# ---------------------------------------------------------------------------------------------- timm's names


def _open_torch(settings: DataSettings, name: str, mode: str) -> ImageSource:
    root = _dataset_folder(settings)
    if name in ARRAY_DATASETS:
        _require_split(settings, settings.train_split, TRAIN_FOLDERS)
        _require_split(settings, settings.val_split, TRAIN_FOLDERS + VAL_FOLDERS)
    datasets = []
    for split in (settings.train_split, settings.val_split):
        try:
            datasets.append(create_dataset(f"torch/{name}", root=str(root), split=split, download=False))
        except (RuntimeError, OSError, ValueError) as error:
            raise PruneError(
                f"Data {settings.name} ({split}) is not there, or damaged, below {root}; nothing is downloaded.",
                hint="Put the official files there, in torchvision's layout.",
            ) from error
    names = tuple(map(str, datasets[0].classes))
    if name in ARRAY_DATASETS:
        train, val = (_array_split(dataset, mode) for dataset in datasets)
        return ImageSource(train=train, val=val, class_names=names)
    return _timm_source(datasets, settings, names, mode)


def _require_split(settings: DataSettings, split: str, known: Sequence[str]) -> None:
    """For any word but ``train`` timm reads the test images, so a misspelt one must not get there."""
    if split not in known:
        raise UsageError(f"Data {settings.name} has no split {split!r}.", hint=nearest(split, known))


def _open_hub_dataset(settings: DataSettings, mode: str) -> ImageSource:
    datasets = []
    for split in (settings.train_split, settings.val_split):
        try:
            datasets.append(create_dataset(settings.name, root=settings.dir, split=split, input_img_mode=mode))
        except ImportError as error:
            raise UsageError(
                f"Data {settings.name} needs the package `datasets`.", hint="Run pip install datasets."
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise PruneError(f"Data {settings.name} ({split}) cannot be opened: {one_line(error)}.") from error
    return _timm_source(datasets, settings, tuple(map(str, datasets[0].reader.class_to_idx)), mode)


def _dataset_folder(settings: DataSettings) -> Path:
    if settings.dir is None:
        raise UsageError(f"Data {settings.name} needs its folder.", hint="Give --data-dir DIR.")
    folder = Path(settings.dir)
    if not folder.is_dir():
        raise UsageError(f"Data folder {folder} does not exist.")
    return folder


def _timm_source(datasets: Sequence[Any], settings: DataSettings, names: tuple[str, ...], mode: str) -> ImageSource:
    train, val = (
        TimmSplit(dataset=dataset, title=f"{settings.name} {split}", mode=mode, positions=range(len(dataset)))
        for dataset, split in zip(datasets, (settings.train_split, settings.val_split), strict=True)
    )
    return ImageSource(train=train, val=val, class_names=names)


def _array_split(dataset: Any, mode: str) -> ArraySplit:
    """What torchvision holds in memory; qmnist's labels have more columns, the class is the first."""
    labels = np.asarray(dataset.targets, dtype=np.int64).reshape(len(dataset), -1)[:, 0]
    return ArraySplit(pixels=np.asarray(dataset.data), labels=labels, mode=mode)
