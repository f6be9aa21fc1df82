"""Growth methods: each a short builder of the one operator, in a registry that says when it is exact."""

from growkit.methods import between, copying, depth, ligo, padding  # noqa: F401 - importing registers the methods
from growkit.methods.registry import Depth, Method, Refinement, SpaceGrowth, chosen, is_tied, method, methods, register

__all__ = ["Depth", "Method", "Refinement", "SpaceGrowth", "chosen", "is_tied", "method", "methods", "register"]
