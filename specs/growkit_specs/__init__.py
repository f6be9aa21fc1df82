"""What a model is: the axis notation, the layer graph, architecture files, targets and recipes."""

from growkit_specs.architecture import Architecture, architecture_for, architectures, evaluate, load_architecture
from growkit_specs.errors import (
    GrowkitError,
    InvalidModel,
    InvalidTarget,
    LayoutError,
    UnsupportedFormat,
    UnsupportedModel,
)
from growkit_specs.layer_graph import Layer, LayerGraph, LayerPort, Parameter, Port, Space, Stack, Tensor
from growkit_specs.layout import Axis, Concatenation, Fixed, Layout, Leaf, Product, parse_layout
from growkit_specs.recipe import FitSettings, LayerMap, Recipe, Signature, Target, fresh_scale, layer_maps

__all__ = [
    "Architecture",
    "Axis",
    "Concatenation",
    "FitSettings",
    "Fixed",
    "GrowkitError",
    "InvalidModel",
    "InvalidTarget",
    "Layer",
    "LayerGraph",
    "LayerMap",
    "LayerPort",
    "Layout",
    "LayoutError",
    "Leaf",
    "Parameter",
    "Port",
    "Product",
    "Recipe",
    "Signature",
    "Space",
    "Stack",
    "Target",
    "Tensor",
    "UnsupportedFormat",
    "UnsupportedModel",
    "architecture_for",
    "architectures",
    "evaluate",
    "fresh_scale",
    "layer_maps",
    "load_architecture",
    "parse_layout",
]
