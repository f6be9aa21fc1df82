"""What is asked for: target sizes, and a recipe that says everything a growth needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

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


class Recipe(Spec):
    """Everything a growth needs: ``growkit run RECIPE.yaml`` does it, and every grown model stores its own.

    Attributes:
        source: The model to grow, a path; relative paths start at the recipe's folder.
        destination: Where the grown model goes.
        target: The sizes asked for.
        method: The method's name, or ``width=NAME,depth=NAME``.
        seed: The seed of the fresh entries.
        fresh: Their scale, as a multiple of the trained entries' standard deviation; None takes the method's own.
        dtype: The element type of the grown weights; ``keep`` is the source's.
        check: Whether the grown model is verified against the source before it is put in place.
    """

    source: str
    destination: str | None = None
    target: Target
    method: str = "lossless"
    seed: int = 0
    fresh: float | None = Field(default=None, ge=0)
    dtype: str = "keep"
    check: bool = False

    def to_yaml(self) -> str:
        """The recipe as YAML text; what was left to its default is left out, but for method and seed."""
        told = self.model_dump(exclude_none=True)
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
