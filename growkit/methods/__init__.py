"""Growth methods: each a short builder of the one operator, in a registry that says when it is exact."""

from growkit.methods import depth, lossless, width  # noqa: F401 - importing a module registers its methods
from growkit.methods.registry import Depth, Method, SpaceGrowth, chosen, method, methods, register

__all__ = ["Depth", "Method", "SpaceGrowth", "chosen", "method", "methods", "register"]
