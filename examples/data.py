"""Image data sets as arrays: the digits that scikit-learn ships, and TFDS's.

Images stay uint8 and are standardised inside the training step, so that a whole data
set fits in device memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sklearn.datasets
import sklearn.model_selection

DATASETS = ("digits", "cifar10", "cifar100", "fashion_mnist")

_SPLITS = ("train", "test")
_BATCH = 1000  # images decoded at once: twice as fast as one by one


class Dataset(NamedTuple):
    """Training and test images, channels last, with integer labels."""

    name: str
    train_images: np.ndarray  # shape=(n, height, width, channels), dtype=uint8
    train_labels: np.ndarray  # shape=(n,), dtype=int32
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: np.ndarray  # of each channel of the training images, in [0, 1]
    std: np.ndarray

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def hold_out(self, share: float) -> Dataset:
        """The training images alone, the last `share` of them in the test's place."""
        kept = round(len(self.train_images) * (1 - share))
        return _dataset(
            self.name,
            self.train_images[:kept],
            self.train_labels[:kept],
            self.train_images[kept:],
            self.train_labels[kept:],
            self.num_classes,
        )

    def batches(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Which training images are in each batch of a pass, shape=(batches, size).

        In a new order; what does not fill a batch is left out.
        """
        order = rng.permutation(len(self.train_labels))
        return order[: len(order) // size * size].reshape(-1, size)

    def standardise(self, images: jax.Array) -> jax.Array:
        """uint8 images as float32 with the training set's channel mean 0 and std 1."""
        return (images.astype(np.float32) / 255 - self.mean) / self.std


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: one of `DATASETS`. `digits` comes with scikit-learn and needs no network.
      data_dir: where tensorflow-datasets keeps its data; None for the environment
        variable TFDS_DATA_DIR, or TFDS's own default. Read once: afterwards the arrays
        are in `~/.cache/backmatch_optax` (or below XDG_CACHE_HOME).

    Raises:
      SystemExit: where the data set is not on this machine, with how to get it.
    """
    return _digits() if name == "digits" else _tfds(name, data_dir)


def _digits() -> Dataset:
    """The 1,797 digits of 8x8 pixels, every pixel made 4x4: LeNet's 32x32."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    small = np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)
    images = np.kron(small, np.ones((1, 4, 4))).round().astype(np.uint8)[..., None]
    labels = np.asarray(labels, np.int32)
    chosen = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    train, test = map(np.asarray, chosen)
    return _dataset(
        "digits", images[train], labels[train], images[test], labels[test], 10
    )


def _tfds(name: str, data_dir: str | None) -> Dataset:
    """Decoded once, then kept as arrays in a cache beside other caches."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = root / "backmatch_optax" / name
    if not all((cache / f"{split}.npz").exists() for split in _SPLITS):
        _decode(name, data_dir, cache)
    arrays = []
    for split in _SPLITS:
        with np.load(cache / f"{split}.npz") as file:
            arrays += [file["images"], file["labels"]]
    return _dataset(name, *arrays, num_classes=len(np.unique(arrays[1])))


def _decode(name: str, data_dir: str | None, cache: Path) -> None:
    # Imported here: it takes seconds, and only the first reading needs it.
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit(
            f"{name} is read by tensorflow-datasets, which is not installed. From the "
            "checkout:\n    pip install -e '.[cifar]'"
        ) from None

    builder: Any = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        raise SystemExit(
            f"{name} is not in {builder.data_dir}. With a network, and TensorFlow "
            "installed for the conversion, tensorflow-datasets fetches it once:\n"
            "    pip install tensorflow\n"
            f'    python -c "import tensorflow_datasets as tfds; tfds.builder({name!r})'
            ".download_and_prepare(file_format='array_record')\"\n"
            "If it lies elsewhere, pass --data-dir or set TFDS_DATA_DIR."
        )
    cache.mkdir(parents=True, exist_ok=True)
    for split in _SPLITS:
        source = builder.as_data_source(split=split)
        examples = [
            example
            for start in range(0, len(source), _BATCH)
            for example in source.__getitems__(
                range(start, min(start + _BATCH, len(source)))
            )
        ]
        images = np.stack([example["image"] for example in examples])
        labels = np.asarray([example["label"] for example in examples], np.int32)
        partial = cache / f"{split}.{os.getpid()}.npz"
        np.savez(partial, images=images, labels=labels)
        # Whole or not at all, also with several runs at once.
        partial.rename(cache / f"{split}.npz")


def _dataset(
    name: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
) -> Dataset:
    pixels = train_images.reshape(-1, train_images.shape[-1])
    # From counts of the 256 levels, so that no float copy of the images is made.
    counts = np.stack([np.bincount(c, minlength=256) for c in pixels.T]) / len(pixels)
    levels = np.arange(256) / 255
    mean = counts @ levels
    std = np.sqrt(counts @ levels**2 - mean**2)
    return Dataset(
        name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes,
        mean.astype(np.float32),
        std.astype(np.float32),
    )
