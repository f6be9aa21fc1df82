"""Building modules of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from growkit.model import Model
from growkit_specs import GrowkitError, UnsupportedModel
from growkit_torch.read import Origin


def model_class(origin: Origin) -> Any:
    """The class of a model, from transformers or from its module.

    Raises:
        UnsupportedModel: Where this version of transformers has no such class.
    """
    if origin.module is not None:
        return type(origin.module)
    import transformers

    found = getattr(transformers, origin.class_name, None)
    if found is None:
        raise UnsupportedModel(f"transformers {transformers.__version__} has no class {origin.class_name}; upgrade it")
    return found


def build(model: Model, state: Mapping[str, Any], dtype: Any) -> Any:
    """The model as a module of its class; see :meth:`growkit_torch.libraries.Library.build`."""
    cls = model_class(model.origin)
    config = cls.config_class.from_dict(dict(model.origin.config))
    options = _constructor_options(cls, model)
    with _quiet():
        module, loading = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
        )
    missing = [name for name in loading["missing_keys"] if not _is_derived(module, name)]
    if missing or loading["unexpected_keys"] or loading["mismatched_keys"]:
        raise GrowkitError(
            f"{cls.__name__} did not take its tensors: {missing or ''} {loading['unexpected_keys'] or ''}"
        )
    return module


def _constructor_options(cls: Any, model: Model) -> dict[str, bool]:
    """What the constructor must be told because no config says it: which optional layers exist."""
    accepted = inspect.signature(cls.__init__).parameters
    rules = model.origin.architecture.stem | model.origin.architecture.head
    present = {layer.name for _, layer in model.graph.walk()}
    return {rule.argument: name in present for name, rule in rules.items() if rule.argument in accepted}


def _is_derived(module: Any, name: str) -> bool:
    """Whether a missing name is tied to one that is there."""
    tied = getattr(module, "all_tied_weights_keys", None) or dict.fromkeys(
        getattr(module, "_tied_weights_keys", None) or ()
    )
    return name in tied


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers warns of every tied or fresh tensor, and draws bars of its own."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
