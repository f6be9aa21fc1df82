"""Libraries: transformers and timm, and what only each of them knows of its modules and directories.

An architecture file names its library. No library is imported before a module of it is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from growkit_specs import Architecture, GrowkitError, LayerGraph, UnsupportedModel, architecture_for
from growkit_specs.architecture import architectures

if TYPE_CHECKING:
    from growkit.model import Model
    from growkit_torch.read import Origin


@dataclass(frozen=True)
class Described:
    """What a config or a module says of a model.

    Attributes:
        architecture: The architecture file that reads it.
        config: Its config: the keys of that file.
        class_name: Its class; None where nothing tells.
        document: The contents of its ``config.json``, as far as they are not the config itself.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    class_name: str | None
    document: Mapping[str, Any]


class Library(Protocol):
    """What growkit asks of a library of models."""

    def wrote(self, data: Mapping[str, Any]) -> bool:
        """Whether ``data`` is the contents of a ``config.json`` in its form."""

    def made(self, module: Any) -> bool:
        """Whether ``module`` is one of its modules."""

    def described(self, data: Mapping[str, Any]) -> Described:
        """What the contents of a ``config.json`` say.

        Raises:
            GrowkitError: Where no architecture file reads it, or it does not say enough.
        """

    def introspected(self, module: Any) -> Described:
        """What a module says of itself."""

    def document(self, origin: Origin, graph: LayerGraph) -> dict[str, Any]:
        """The contents of the ``config.json`` of a model that comes from ``origin``."""

    def build(self, model: Model, state: Mapping[str, Any], dtype: Any) -> Any:
        """The model as a module of its class, with the tensors of ``state`` as ``dtype``.

        Raises:
            GrowkitError: Where the library or its class is missing, or the tensors do not fill the module.
        """


class Transformers:
    """Hugging Face transformers: a module holds its config, a directory its class's name."""

    def wrote(self, data: Mapping[str, Any]) -> bool:
        """Whatever no other library wrote: a config without a ``model_type`` is refused later."""
        return True

    def made(self, module: Any) -> bool:
        """A module that holds a config."""
        return hasattr(getattr(module, "config", None), "to_dict")

    def described(self, data: Mapping[str, Any]) -> Described:
        """The config is all there is; its first class counts."""
        architecture = architecture_for(data.get("model_type"))
        return Described(architecture, data, (data.get("architectures") or [None])[0], {})

    def introspected(self, module: Any) -> Described:
        """The config that the module holds."""
        config = module.config.to_dict()
        return Described(architecture_for(config.get("model_type")), config, type(module).__name__, {})

    def document(self, origin: Origin, graph: LayerGraph) -> dict[str, Any]:
        """The config, and the class."""
        return dict(origin.config) | {"architectures": [origin.class_name]}

    def build(self, model: Model, state: Mapping[str, Any], dtype: Any) -> Any:
        """Built by the class's own ``from_pretrained``, so that ties and missing tensors are its to settle."""
        from growkit_torch.transformers_models import build

        return build(model, state, dtype)


class Timm:
    """PyTorch Image Models: a directory holds its model's name and arguments, a module holds neither."""

    _TOP = ("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg")
    _LABELS = ("label_names", "label_descriptions")
    _ELSEWHERE = ("architecture", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")
    """What a pretrained_cfg says of the source's own weights."""

    def wrote(self, data: Mapping[str, Any]) -> bool:
        """Whether a model's name stands there, as timm writes it for the Hub."""
        return isinstance(data.get("architecture"), str) and "model_type" not in data

    def made(self, module: Any) -> bool:
        """A module of a class of timm's, or of one that is derived from it."""
        return any(base.__module__.startswith("timm.") for base in type(module).__mro__)

    def described(self, data: Mapping[str, Any]) -> Described:
        """The arguments in ``model_args``; those that are left out are the name's, which only timm knows."""
        name = str(data["architecture"])
        architecture = architecture_for(name, library="timm")
        config = self._told(data)
        architecture.check_config(config)  # timm would refuse an unknown argument in words of its own
        missing = [key for key in architecture.config.defaults if key not in config]
        if missing:
            config = {**self._meant(name, config, missing), **config}
        return Described(architecture, config, architecture.base_class, data)

    def _told(self, data: Mapping[str, Any]) -> dict[str, Any]:
        pretrained = data.get("pretrained_cfg") or {}
        channels, *size = pretrained.get("input_size") or [None]
        told = {
            "num_classes": data.get("num_classes"),
            "global_pool": data.get("global_pool"),
            "in_chans": channels,
            "img_size": size if size and pretrained.get("fixed_input_size") else None,
        }
        told = {key: _plain(value) for key, value in told.items() if value is not None}
        told |= {key: _plain(value) for key, value in (data.get("model_args") or {}).items()}
        return told | {key: value for key, value in data.items() if key not in self._TOP + self._LABELS}

    def _meant(self, name: str, told: Mapping[str, Any], missing: list[str]) -> Mapping[str, Any]:
        """The config that timm gives a name: asked of a module that has no storage."""
        import torch

        what = f"config.json: model_args does not hold {', '.join(missing)}, which timm has by the name '{name}'"
        create = _timm(what).create_model
        try:
            with torch.device("meta"):
                return self.introspected(create(name, **told)).config
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModel(f"{what}; timm refuses it: {str(error).splitlines()[0]}") from None

    def introspected(self, module: Any) -> Described:
        """Each key where the architecture file says that the module holds it."""
        names = [base.__name__ for base in type(module).__mro__]
        known = [a for a in architectures().values() if a.library == "timm"]
        architecture = next((a for a in known if set(names) & set(a.classes)), None)
        if architecture is None:
            classes = ", ".join(name for a in known for name in a.classes)
            raise UnsupportedModel(
                f"the class '{names[0]}' of timm is not known; known: {classes}; an architecture is one data file, see "
                "docs/how-to/add-an-architecture.md"
            )
        config = {key: _held(module, path) for key, path in architecture.module.items()}
        class_name = next(name for name in names if name in architecture.classes)
        return Described(architecture, config, class_name, self._document_of(module))

    def _document_of(self, module: Any) -> dict[str, Any]:
        pretrained = dict(getattr(module, "pretrained_cfg", None) or {})
        return {
            "architecture": pretrained.get("architecture") or self._any_name(module),
            "num_classes": module.num_classes,
            "num_features": module.num_features,
            "pretrained_cfg": {k: v for k, v in pretrained.items() if k not in self._ELSEWHERE and _is_json(v)},
        }

    def _any_name(self, module: Any) -> str:
        """A name that timm builds the module's class by; the arguments beside it say the rest."""
        file = next(base.__module__ for base in type(module).__mro__ if base.__module__.startswith("timm."))
        return str(_timm("the module has no name").list_models(module=file.rpartition(".")[2])[0])

    def document(self, origin: Origin, graph: LayerGraph) -> dict[str, Any]:
        """As it was, with every argument spelled out, so that no reader has to ask timm for them."""
        sizes = {"num_features": graph.sizes["hidden"]} if "num_features" in origin.document else {}
        arguments = self._arguments(origin)
        spelled = origin.document.get("model_args") or {}
        kept = {key: value for key, value in spelled.items() if _plain(value) == arguments.get(key)}
        return dict(origin.document) | sizes | {"model_args": arguments | kept}

    def _arguments(self, origin: Origin) -> dict[str, Any]:
        """The config without the facts that no argument says."""
        facts = origin.architecture.module.keys() - origin.architecture.config.defaults.keys()
        return {key: value for key, value in origin.config.items() if key not in facts}

    def build(self, model: Model, state: Mapping[str, Any], dtype: Any) -> Any:
        """Built by the class's constructor; it keeps what the source says of its preprocessing."""
        origin = model.origin
        cls = getattr(_timm("it takes timm to run this model").models, origin.class_name)
        module = cls(**self._arguments(origin)).to(dtype)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise GrowkitError(f"{cls.__name__} did not take its tensors: {error}") from None
        pretrained = {"architecture": origin.document["architecture"], **origin.document.get("pretrained_cfg", {})}
        module.pretrained_cfg = module.default_cfg = pretrained
        return module


LIBRARIES: dict[str, Library] = {"timm": Timm(), "transformers": Transformers()}
"""The libraries by the names that architecture files give them, in the order in which they are asked."""


def described(data: Mapping[str, Any]) -> Described:
    """What the contents of a ``config.json`` say, whichever library wrote it."""
    return next(library for library in LIBRARIES.values() if library.wrote(data)).described(data)


def introspected(module: Any) -> Described:
    """What a module says of itself, whichever library made it.

    Raises:
        UnsupportedModel: Where none did.
    """
    for library in LIBRARIES.values():
        if library.made(module):
            return library.introspected(module)
    raise UnsupportedModel(
        f"the module {type(module).__name__} is of none of the libraries {', '.join(LIBRARIES)}; give growkit.read "
        "example_inputs, and what its axes mean is inferred"
    )


def library_named(name: str) -> Library:
    """The library that an architecture file names."""
    return LIBRARIES[name]


def _timm(why: str) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that is of another torch raises the latter
        raise UnsupportedModel(f"{why}; timm cannot be imported ({error}); install growkit[timm]") from None
    return timm


def _held(module: Any, path: str) -> Any:
    """What a module holds at a path of attributes and numbers, or the ratio of two such.

    Raises:
        UnsupportedModel: Where there is nothing.
    """
    path, _, divisor = path.partition(" / ")
    found = module
    try:
        for step in path.split("."):
            match step:
                case "len":
                    found = len(found)
                case "given":
                    found = found is not None
                case "type":
                    found = type(found).__name__
                case _:
                    found = found[int(step)] if step.isdigit() else getattr(found, step)
    except (AttributeError, IndexError, TypeError) as error:
        raise UnsupportedModel(f"{type(module).__name__}: nothing is at {path} ({error})") from None
    return _plain(found / _held(module, divisor) if divisor else found)


def _plain(value: Any) -> Any:
    """A pair of equal sizes as one; other sequences as lists."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    return value


def _is_json(value: Any) -> bool:
    try:
        return value is not None and bool(json.dumps(value))
    except (TypeError, ValueError):
        return False
