"""Growth methods: each a short builder of the one operator, in a registry that says what it grows and when it is exact."""

from growkit.methods import lossless, width, depth  # noqa: F401 - importing a module registers its methods
from growkit.methods.registry import Depth, Method, SpaceGrowth, chosen, method, methods, register

__all__ = ["Depth", "Method", "SpaceGrowth", "chosen", "method", "methods", "register"]
