"""What is asked for: target sizes, and a recipe that says everything a growth needs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from growkit_specs.architecture import first_problem
from growkit_specs.errors import GrowkitError, InvalidTarget
from growkit_specs.layer_graph import Spec

_SIZE = re.compile(r"(?P<absolute>[1-9][0-9]*)|(?P<relative>[0-9]*\.?[0-9]+)x")
SIZE_NAMES = ("hidden", "heads", "kv_heads", "head_dim", "ffn", "layers", "vocab", "positions")


def _size(value: object) -> object:
    """``768``, ``"768"`` or ``"1.5x"``."""
    text = str(value).strip()
    match = _SIZE.fullmatch(text)
    if isinstance(value, bool) or match is None or (match["relative"] and float(match["relative"]) <= 0):
        raise ValueError(f"a size is a whole number (768) or a ratio (1.5x), got {value!r}")
    return int(text) if match["absolute"] else text


Size = Annotated[int | str, BeforeValidator(_size)]
"""An absolute size, or a ratio to the source's written ``1.5x``."""


_RANGE = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*\]|(\d+)\s*:\s*(\d+)|(\d+)")
LayerMap = tuple[int, ...]
"""For each target layer the source layer it comes from."""


def _layer_map(value: object) -> object:
    """``"0,1,2,2,3"``, ``"0:4,2:6"``, ``"[0, 4], [2, 6]"``, or a list of numbers and pairs."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = text.replace("(", "[").replace(")", "]")
    if not re.fullmatch(rf"\s*({_RANGE.pattern})\s*(,\s*({_RANGE.pattern})\s*)*", text):
        raise ValueError(f"a layer map is layers or half-open ranges of them (0,1,2,2,3 or 0:4,2:6), got {value!r}")
    layers: list[int] = []
    for match in _RANGE.finditer(text):
        start, end, first, last, single = (None if number is None else int(number) for number in match.groups())
        start, end = (single, None) if single is not None else (start, end) if start is not None else (first, last)
        assert start is not None
        if end is not None and end <= start:
            raise ValueError(f"the range {match[0]} is empty; ranges are half-open, 0:4 is layers 0, 1, 2 and 3")
        layers.extend(range(start, start + 1 if end is None else end))
    return tuple(layers)


def layer_maps(
    asked: str | LayerMap | Mapping[str, str | LayerMap] | None, depths: Mapping[str, int]
) -> dict[str, LayerMap]:
    """The layer maps of a request, by stack.

    Args:
        asked: One map, or one for each stack that is named (as text, ``encoder=0:4,2:6;decoder=0:4``).
        depths: The source's stacks.

    Raises:
        InvalidTarget: Where a map does not parse, names a stack or a layer that is not there, or drops below the
            source's depth.
    """
    if asked is None:
        return {}
    if isinstance(asked, str) and "=" in asked:
        asked = {name.strip(): text for name, _, text in (part.partition("=") for part in asked.split(";"))}
    if not isinstance(asked, Mapping):
        if len(depths) > 1:
            raise InvalidTarget(f"layers_from: this model has the stacks {', '.join(depths)}; say which: STACK=MAP")
        asked = dict.fromkeys(depths, asked)
    maps: dict[str, LayerMap] = {}
    for name, value in asked.items():
        if name not in depths:
            raise InvalidTarget(f"layers_from: no stack is called '{name}'; stacks are {', '.join(depths)}")
        try:
            layers: LayerMap = _layer_map(value)  # type: ignore[assignment]
        except ValueError as error:
            raise InvalidTarget(f"layers_from: {error}") from None
        outside = [layer for layer in layers if layer >= depths[name]]
        if outside:
            raise InvalidTarget(
                f"layers_from: layer {outside[0]} of {name} is not there; its layers are 0 to {depths[name] - 1}"
            )
        if len(layers) < depths[name]:
            raise InvalidTarget(
                f"layers_from names {len(layers)} layers for {name}, which has {depths[name]}; growkit grows, it does "
                "not prune"
            )
        maps[name] = layers
    return maps


def _fresh(value: object) -> object:
    if value is not None:
        fresh_scale(value)
    return value


FreshScale = Annotated[float | str | None, BeforeValidator(_fresh)]
"""The scale of fresh entries: a factor, or decibels below what it refers to, ``10dB``."""


def fresh_scale(value: object) -> float:
    """The factor that a scale means: itself, or ``10^(-dB/20)``.

    Raises:
        InvalidTarget: Where it is neither.
    """
    text = str(value).strip()
    decibels = text.lower().endswith("db")
    try:
        number = float(text[:-2] if decibels else text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (number < 0 and not decibels):
        raise InvalidTarget(f"fresh is {value!r}; expected a factor that is not negative (0.5) or decibels (10dB)")
    return 10 ** (-number / 20) if decibels else number


class Target(Spec):
    """The sizes asked for; what is not named follows (head_dim stays, heads and ffn follow hidden in ratio).

    Example:
        >>> Target.parse("hidden=768,layers=1.5x").requested()
        {'hidden': 768, 'layers': '1.5x'}
    """

    hidden: Size | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    head_dim: Size | None = None
    ffn: Size | None = None
    layers: Size | None = None
    vocab: Size | None = None
    positions: Size | None = None

    def requested(self) -> dict[str, int | str]:
        """The sizes that were named."""
        return self.model_dump(exclude_none=True)

    @classmethod
    def of(cls, **sizes: object) -> Target:
        """A target from keyword sizes.

        Raises:
            InvalidTarget: For an unknown size or a value that is no size.
        """
        unknown = sorted(set(sizes) - set(SIZE_NAMES))
        if unknown:
            raise InvalidTarget(f"unknown size '{unknown[0]}'; sizes are {', '.join(SIZE_NAMES)}")
        try:
            return cls.model_validate(sizes)
        except ValidationError as error:
            raise InvalidTarget(f"target {first_problem(error)}") from None

    @classmethod
    def parse(cls, text: str) -> Target:
        """A target from the command line's form, ``hidden=768,layers=12``.

        Raises:
            InvalidTarget: Where it does not parse.
        """
        sizes: dict[str, object] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise InvalidTarget(f"'{item}' is no size; expected NAME=SIZE, as in hidden=768,layers=1.5x")
            if name in sizes:
                raise InvalidTarget(f"the size '{name}' is given twice")
            sizes[name] = value
        return cls.of(**sizes)


OutputPolicy = Literal["project", "grow"]
"""What becomes of an output that lives in a space that grows: brought back to its size, or left to grow."""

CachePolicy = Literal["grow", "refuse"]
"""What becomes of cached keys and values among the inputs and outputs: they grow, or such growth is refused."""


class Signature(Spec):
    """What becomes of a model's inputs and outputs; None leaves it to the format.

    Attributes:
        outputs: Outputs that live in a space that grows.
        kv_cache: Cached keys and values.
    """

    outputs: OutputPolicy | None = None
    kv_cache: CachePolicy | None = None

    @classmethod
    def of(cls, outputs: str | None = None, kv_cache: str | None = None) -> Signature:
        """A signature's policies by name.

        Raises:
            InvalidTarget: For a policy that there is not.
        """
        try:
            return cls.model_validate({"outputs": outputs, "kv_cache": kv_cache})
        except ValidationError as error:
            raise InvalidTarget(f"{first_problem(error)}, got {error.errors()[0]['input']!r}") from None


Learned = Literal["depth", "width", "norms", "residual", "source"]
"""What a fit can learn: the blends of layers, the matrices of spaces, corrections to the norms, all other fresh
entries, and the source's own weights."""

Structure = Literal["source", "dense", "fixed"]
"""What of a space's matrices is learned: the rows of new entries, ``[I; C]``; every entry; or nothing."""

Strategy = Literal["auto", "factored", "materialised"]
"""How a grown weight acts in a fit: as its factors one after the other, or as the matrix that they make."""


def _listed(value: object) -> object:
    """``"depth,width"``."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _by_name(value: object) -> object:
    """``"hidden=dense,ffn=source"``."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    return {name.strip(): structure.strip() for name, _, structure in pairs}


class FitSettings(Spec):
    """How an operator is learned.

    Attributes:
        learn: What is learned. The source's weights are learned along, in a copy that the operator keeps, because that
            is what makes a fit pay (docs/explanation/when-learning-pays.md); ``depth, width`` is the operator alone.
        structure: What of a space's matrices is learned, by space (``hidden``), or by a whole head axis
            (``(heads head_dim)``), whose entries are mixed then. Spaces that are not named: ``source``; ``fixed`` for
            head_dim, and where ``A`` is not ``B`` for the units behind an activation (ffn).
        tied: Whether what reads is what writes, ``A = B`` (and norms grow by ``B``), as published; None takes the
            starting method's way, which is ``False`` but for ``ligo-paper``.
        per_layer: Whether spaces inside blocks have matrices for each target layer, not one for all.
        steps: Optimizer steps.
        lr: The peak learning rate of AdamW, which decays no weights.
        warmup: The share of the steps over which the rate rises; over the others it falls to zero along a cosine.
        clip: The largest norm of the gradient; None clips nothing.
        batch: Examples in a step, on the command line.
        length: Tokens in an example, on the command line; None takes up to 128, as far as the model goes.
        accumulate: Parts that a batch is run in, one after the other.
        loss: ``auto``, ``causal``, ``masked``, ``classification``, ``output`` (the graph's own), ``distill``, or
            ``module:function``.
        strategy: How grown weights act; ``auto`` chooses for each by the multiplications that it takes.
        precision: ``float32``, ``float64``, or ``bfloat16`` where autocast can use it.
        checkpointing: The share of a stack's blocks that are run again for their gradients, and not kept: less memory,
            more work. None takes half of a PyTorch model's, and none of an ONNX graph's.
        compile: Whether the model is compiled by ``torch.compile``.
        validate_every: Steps between two looks at the validation split; None looks at the end alone.
        patience: Looks without a better loss after which the fit stops early; None never does.
        seed: The seed of the data's order.
    """

    learn: Annotated[tuple[Learned, ...], BeforeValidator(_listed)] = ("depth", "width", "norms", "source")
    structure: Annotated[dict[str, Structure], BeforeValidator(_by_name)] = Field(default_factory=dict)
    tied: bool | None = None
    per_layer: bool = False
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    batch: int = Field(default=8, ge=1)
    length: int | None = Field(default=None, ge=2)
    accumulate: int = Field(default=1, ge=1)
    loss: str = "auto"
    strategy: Strategy = "auto"
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    checkpointing: float | None = Field(default=None, ge=0, le=1)
    compile: bool = False
    validate_every: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    seed: int = 0

    @property
    def dtype(self) -> str:
        """The element type of everything that is held."""
        return "float64" if self.precision == "float64" else "float32"

    @classmethod
    def of(cls, **told: object) -> FitSettings:
        """Settings by name.

        Raises:
            GrowkitError: For a setting that there is not, or a value that it cannot have.
        """
        if unknown := sorted(set(told) - set(cls.model_fields)):
            raise GrowkitError(f"unknown setting '{unknown[0]}' of a fit; settings are {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(told, strict=False)
        except ValidationError as error:
            raise GrowkitError(f"fit: {first_problem(error)}, got {error.errors()[0]['input']!r}") from None


class Recipe(Spec):
    """Everything a growth needs: ``growkit run RECIPE.yaml`` does it, and every grown model stores its own.

    Attributes:
        source: The model to grow, a path; relative paths start at the recipe's folder.
        destination: Where the grown model goes.
        target: The sizes asked for.
        method: The method's name, or ``width=NAME,depth=NAME``.
        seed: The seed of the fresh entries.
        fresh: Their scale, as a multiple of the standard deviation that the method refers to, or in decibels below it;
            None takes the method's own.
        layers_from: A layer map in place of the depth method's, by stack where there are several.
        residual_scale: A factor on what repeated layers write into the stream.
        score_scale: A factor on the attention scores of repeated layers.
        dtype: The element type of the grown weights; ``keep`` is the source's.
        check: Whether the grown model is verified against the source before it is put in place.
        outputs: What becomes of outputs that live in a space that grows; None leaves it to the format.
        kv_cache: What becomes of cached keys and values among the inputs; None leaves it to the format.
        fit: How the operator is learned before the model is grown; None for the method's own operator.
        data: What it is learned on, a path.
    """

    source: str
    destination: str | None = None
    target: Target
    method: str = "lossless"
    seed: int = 0
    fresh: FreshScale = None
    layers_from: (
        Annotated[LayerMap, BeforeValidator(_layer_map)]
        | dict[str, Annotated[LayerMap, BeforeValidator(_layer_map)]]
        | None
    ) = None
    residual_scale: float | None = None
    score_scale: float | None = None
    dtype: str = "keep"
    check: bool = False
    outputs: OutputPolicy | None = None
    kv_cache: CachePolicy | None = None
    fit: FitSettings | None = None
    data: str | None = None

    @property
    def signature(self) -> Signature:
        """What becomes of the inputs and outputs."""
        return Signature(outputs=self.outputs, kv_cache=self.kv_cache)

    def to_yaml(self) -> str:
        """The recipe as YAML text; what was left to its default is left out, but for method and seed."""
        told = self.model_dump(mode="json", exclude_none=True)
        default = {name for name in ("dtype", "check") if told[name] == Recipe.model_fields[name].default}
        return yaml.safe_dump({name: value for name, value in told.items() if name not in default}, sort_keys=False)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe.

        Raises:
            GrowkitError: Where the file is missing or does not validate; the message names the path inside it.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")), strict=False)
        except OSError as error:
            raise GrowkitError(f"{path}: {error.strerror}") from None
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            raise GrowkitError(f"{path}: {first_problem(error)}") from None
