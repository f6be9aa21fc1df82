"""Images of numbered classes, as a model takes them: from folders, IDX files, or whatever gives them one by one.

Shape legend: ``b`` images, ``c`` channels, ``h`` and ``w`` pixels; ``n`` images of the whole data.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.loss import Batch, logits_port
from growkit.model import Model
from growkit_specs import GrowkitError, Port

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""What the names of image files end with."""

IDX = "-images-idx3-ubyte"
"""What the name of a file of images ends with whose labels lie beside it, in ``-labels-idx1-ubyte``."""

BILINEAR = 2
"""How images are resized where nothing is said, by the number that PIL and the files of models have for it."""

NAMED_INPUTS = "give the images as a named input, with labels, in an .npz file"


@dataclass(frozen=True)
class Format:
    """How a model takes images.

    Attributes:
        name: The input's name.
        size: Its height and width, in pixels.
        channels: 1 or 3.
        mean: ``(channels,)``, what is subtracted from values between 0 and 1.
        std: ``(channels,)``, what they are then divided by.
        resample: How images are resized, as PIL numbers it.
    """

    name: str
    size: int
    channels: int
    mean: np.ndarray
    std: np.ndarray
    resample: int = BILINEAR

    def prepared(self, image: Any) -> np.ndarray:
        """An image as the model takes it, ``(c, h, w)``.

        Args:
            image: ``(h, w)`` bytes, or an image of PIL.
        """
        if not isinstance(image, np.ndarray) or image.shape != (self.size, self.size):
            image = self._resized(image)
        values = np.asarray(image, dtype=np.float32) / 255
        values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        scaled: np.ndarray = (values - self.mean[:, None, None]) / self.std[:, None, None]
        return scaled

    def _resized(self, image: Any) -> Any:
        if isinstance(image, np.ndarray):
            image = _pillow().fromarray(image)
        mode = "L" if self.channels == 1 else "RGB"
        return image.convert(mode).resize((self.size, self.size), self.resample)


@dataclass(frozen=True)
class Images:
    """Images and the numbers of their classes.

    Attributes:
        format: How the model takes them.
        load: Gives an image by its number: bytes, or an image of PIL.
        labels: ``(n,)`` the numbers of their classes.
    """

    format: Format
    load: Callable[[int], Any]
    labels: np.ndarray

    ordered = False

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        """The images of these numbers; nothing is drawn."""
        images = np.stack([self.format.prepared(self.load(number)) for number in numbers.tolist()])
        return Batch({self.format.name: images}, self.labels[numbers].astype(np.int64))


def format_of(model: Model) -> Format:
    """How a model takes images, as its graph and the files beside it tell.

    Raises:
        GrowkitError: Where it takes none, or its size is told nowhere.
    """
    graph, told = model.graph, _preprocessing(model)
    port = _image_port(model)
    size = graph.attributes.get("image_size") or _size(told.get("size"))
    if not size:
        raise GrowkitError(f"nothing says how large the images of the input {port.name} are; {NAMED_INPUTS}")
    mean, std = (np.atleast_1d(np.asarray(told.get(f"image_{key}", 0.5), np.float32)) for key in ("mean", "std"))
    channels = int(
        graph.sizes.get("channels") or graph.attributes.get("channels") or (len(mean) if len(mean) > 1 else 3)
    )
    if channels not in (1, 3):
        raise GrowkitError(f"the model's images have {channels} channels; expected 1 or 3; {NAMED_INPUTS}")
    for values in (mean, std):
        if len(values) not in (1, channels):
            raise GrowkitError(f"the images are scaled by {len(values)} numbers; the model has {channels} channels")
    mean, std = np.resize(mean, channels), np.resize(std, channels)
    return Format(port.name, int(size), channels, mean, std, told.get("resample", BILINEAR))


def takes_images(model: Model) -> bool:
    """Whether images are what a model takes."""
    return any(port.kind == "image" for port in model.graph.inputs)


def _image_port(model: Model) -> Port:
    ports = [port for port in model.graph.inputs if port.kind == "image"]
    if len(ports) != 1:
        inputs = ", ".join(port.name for port in model.graph.inputs)
        raise GrowkitError(f"the model takes {inputs}; expected one input of images; give its inputs in an .npz file")
    return ports[0]


def _preprocessing(model: Model) -> dict[str, Any]:
    """What the files beside a model say of its images, as transformers' keys; timm's stand in the config."""
    told = model.told_beside("preprocessor_config.json")
    if told.get("do_normalize") is False:
        return {**told, "image_mean": 0.0, "image_std": 1.0}
    timm = model.told_beside("config.json").get("pretrained_cfg") or {}
    return told or {f"image_{key}": timm[key] for key in ("mean", "std") if key in timm}


def _size(told: Any) -> int | None:
    """The one size of an image that a preprocessor's ``size`` tells."""
    sizes = {told.get(key) for key in ("height", "width")} if isinstance(told, Mapping) else {told}
    return next(iter(sizes)) if len(sizes) == 1 else None


# --- classes ---------------------------------------------------------------------------------------------------------


def class_numbers(model: Model, names: Sequence[str], where: Path) -> list[int]:
    """The number of each class: by its name where the model's config has it, else in order.

    Raises:
        GrowkitError: Where the model has no such number of classes.
    """
    config = getattr(model.origin, "config", None) or model.told_beside("config.json")
    known = config.get("label2id") or {}
    if all(name in known for name in names):
        return [int(known[name]) for name in names]
    count = _class_count(model)
    if count is not None and len(names) != count:
        raise GrowkitError(
            f"{where}: {len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); the model has "
            f"{count}; expected one folder for each, or the names in its config's label2id"
        )
    return list(range(len(names)))


def refuse_classes(model: Model, labels: np.ndarray, where: Path) -> None:
    """Refuse labels that the model has no class for.

    Raises:
        GrowkitError: Naming the first.
    """
    count = _class_count(model)
    if count is not None and labels.max() >= count:
        at = int(np.argmax(labels >= count))
        raise GrowkitError(f"{where}: image {at} is of class {labels[at]}; expected classes below {count}")


def _class_count(model: Model) -> int | None:
    port = logits_port(model.graph)
    return None if port is None or port.space is None else model.graph.sizes[port.space]


# --- where images lie ------------------------------------------------------------------------------------------------


def image_folder(model: Model, folder: Path) -> Images:
    """The images of a folder with one folder for each class.

    Raises:
        GrowkitError: Where the classes are not those of the model, or there are no images.
    """
    names = class_folders(folder)
    numbers = class_numbers(model, names, folder)
    found = [
        (file, number)
        for name, number in zip(names, numbers, strict=True)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    files = [file for file, _ in found]
    open_ = _pillow().open

    def load(number: int) -> Any:
        try:
            with open_(files[number]) as image:
                image.load()
                return image
        except OSError as error:
            raise GrowkitError(f"{files[number]}: cannot be read as an image ({error})") from None

    return Images(format_of(model), load, np.array([number for _, number in found]))


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder that hold images."""
    return sorted(
        each.name
        for each in folder.iterdir()
        if each.is_dir() and any(file.suffix.lower() in SUFFIXES for file in each.iterdir())
    )


def is_idx(path: Path) -> bool:
    """Whether a file is one of images in the form of MNIST, by its name."""
    return path.name.removesuffix(".gz").endswith(IDX)


def idx_images(model: Model, path: Path) -> Images:
    """The images of an IDX file, as those of MNIST, whose labels lie beside it.

    Raises:
        GrowkitError: Where either is missing or broken, or the classes are not those of the model.
    """
    images = _idx(path, 3)
    beside = path.with_name(path.name.replace(IDX, "-labels-idx1-ubyte"))
    others = (beside, beside.with_suffix("") if beside.suffix == ".gz" else beside.with_name(beside.name + ".gz"))
    found = next((each for each in others if each.is_file()), None)
    if found is None:
        raise GrowkitError(f"{path}: expected the labels beside it, in {beside.name}")
    labels = _idx(found, 1)
    if len(labels) != len(images):
        raise GrowkitError(f"{found}: {len(labels)} labels for {len(images)} images")
    refuse_classes(model, labels, path)
    return Images(format_of(model), images.__getitem__, labels)


def _idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file: a type, a number of axes, their sizes, all big-endian; then the entries."""
    start = 4 + 4 * axes
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            head = file.read(start)
            content = file.read() if path.suffix == ".gz" else None
    except (OSError, EOFError) as error:
        raise GrowkitError(f"{path}: cannot be read ({error})") from None
    shape = tuple(int(size) for size in np.frombuffer(head[4:], ">u4")) if len(head) == start else ()
    if head[:4] != bytes([0, 0, 8, axes]) or not all(shape):
        raise GrowkitError(f"{path}: not an IDX file of {axes} axes of bytes")
    held = len(content) if content is not None else path.stat().st_size - start
    if held != np.prod(shape):
        raise GrowkitError(f"{path}: holds {held} bytes; expected {' x '.join(map(str, shape))}")
    if content is not None:
        return np.frombuffer(content, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, "r", start, shape)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise GrowkitError("reading images needs pillow; pip install 'growkit[data]'") from None
    return Image
