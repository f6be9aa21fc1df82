"""Property testing for people who write converters or growth operators: laws, and strategies for everything that grows.

A law is a function that raises AssertionError with one message: which law, which tensor or output, expected and got.

    assert_operator_laws(plan.operator, model.graph)
    assert_adapter_conforms(MyAdapter(), "small/", tmp_path)
    assert_preserves_function("small/", "large/")

Everything is drawn by construction, nothing is filtered: layouts, structured matrices, small transformers, a graph of
every architecture file, and the sizes each of them can grow to. A drawn model runs by
:func:`~growkit.reference.reference_forward`, in float64, so that exactness can be asserted to 1e-10.

    source = memory_model(transformer(norm="layer", depths=(2,)))
    target = growkit.grow(source, hidden="2x")
    growkit.verify(source, target)

Modules of torch come from :func:`growkit_torch.testing.architecture_models`.
"""

from growkit.reference import reference_forward
from growkit.testing.adapter_laws import assert_adapter_conforms
from growkit.testing.architectures import SmallConfig, architecture_graphs, architecture_names, small_configs
from growkit.testing.function_law import assert_preserves_function
from growkit.testing.memory import MemoryAdapter, memory_model, random_weights
from growkit.testing.operator_laws import assert_operator_laws
from growkit.testing.small_transformer import MODULES, Transformer, transformer
from growkit.testing.strategies import SPACES, axes, layer_graphs, layouts, matrices, spaces, targets

__all__ = [
    "MODULES",
    "SPACES",
    "MemoryAdapter",
    "SmallConfig",
    "Transformer",
    "architecture_graphs",
    "architecture_names",
    "assert_adapter_conforms",
    "assert_operator_laws",
    "assert_preserves_function",
    "axes",
    "layer_graphs",
    "layouts",
    "matrices",
    "memory_model",
    "random_weights",
    "reference_forward",
    "small_configs",
    "spaces",
    "targets",
    "transformer",
]
