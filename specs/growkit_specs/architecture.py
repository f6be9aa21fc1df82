"""Architecture files: how a checkpoint's tensor names and config keys map to the layer graph. Data, not code.

One YAML file under ``architectures/`` describes one family. :meth:`Architecture.graph` turns it, with a config, into a
:class:`~growkit_specs.layer_graph.LayerGraph`; :meth:`Architecture.grown_config` turns grown sizes back into a config.
A config key that is neither handled nor listed as ignored is refused, and so is every value that is not supported.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from growkit_specs.errors import InvalidModel, InvalidTarget, UnsupportedModel
from growkit_specs.layer_graph import (
    Layer,
    LayerGraph,
    LayerKind,
    LayoutText,
    Parameter,
    Port,
    Scalar,
    Space,
    SpaceKind,
    Spec,
    Stack,
)

Config = Mapping[str, Any]

_EXPRESSION = re.compile(r"(?P<left>\w+)(?: (?P<operator>[*+]|//?) (?P<right>\w+))?")
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "+": operator.add,
}


class SpaceRule(Spec):
    """How a space gets its size.

    Attributes:
        kind: See :class:`~growkit_specs.layer_graph.Space`.
        size: An expression over config keys and spaces: ``head_dim or hidden / heads``. The first alternative that
            is present and not null holds.
        follows: The expression that a target's size must satisfy, where the source's does.
    """

    kind: SpaceKind
    size: str
    follows: str | None = None


class ParameterRule(Spec):
    """A parameter of an architecture file.

    Attributes:
        name: The tensor's name; ``{base}`` stands for the base model's prefix, ``{layer}`` for the layer's number.
        layout: Its line of the axis notation.
        when: The condition for the parameter to exist: an expression over config keys that must be true, or ``KEY is
            PATTERN``, ``not`` before either; ``a == b`` or ``a != b`` over config keys and spaces; and several of these
            with ``and``.
        tied_to: The name of the parameter it is tied to where the config ties embeddings.
        optional: Whether a source that lacks it means its tie, whatever the config says.
    """

    name: str
    layout: LayoutText
    when: str | None = None
    tied_to: str | None = None
    optional: bool = False


class ClassRule(Spec):
    """A model class.

    Attributes:
        layers: The head layers it has.
        lacks: What it does not have of that which every other class has: layers of the stem, stacks, inputs, outputs.
        base: The prefix of its base model's names, where it is not the usual one.
    """

    layers: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    base: str | None = None


class LayerRule(Spec):
    """A layer of an architecture file.

    Attributes:
        kind: What it computes.
        through: The norm layer it reads its input through.
        added_through: The norm layer its output goes through before it is added to the stream.
        optional: Whether it exists only with its tensors, because no config key tells.
        argument: The argument of the class's constructor that says whether an optional layer exists.
        when: The condition for the layer to exist, as a parameter's; what names it as its norm then reads or adds
            without one.
        parameters: Its tensors, by slot.
        attributes: Facts of the computation; strings that start with ``$`` are expressions over config keys.
    """

    kind: LayerKind
    through: str | None = None
    added_through: str | None = None
    optional: bool = False
    argument: str | None = None
    when: str | None = None
    parameters: dict[str, ParameterRule] = Field(default_factory=dict)
    attributes: dict[str, Scalar] = Field(default_factory=dict)


class StackRule(Spec):
    """A stack of an architecture file.

    Attributes:
        depth: The name of its depth, which a key under ``grown`` follows.
        size: How the config says its depth, as an expression; None where that key alone does.
        fixed: Whether it keeps its depth when a target asks for more layers.
        shared: Whether its layers are one block that runs ``depth`` times; then names hold no ``{layer}``.
        prefix: The prefix of its parameters' names.
        layers: The layers of one block, in the order of computation.
    """

    depth: str
    size: str | None = None
    fixed: bool = False
    shared: bool = False
    prefix: str
    layers: dict[str, LayerRule]


class OutputRule(Port):
    """An output of an architecture file.

    Attributes:
        bare: Whether the bare model has it; the others have the rest.
        when: The condition for the output to exist, as a parameter's.
    """

    bare: bool = False
    when: str | None = None


class PeriodRule(Spec):
    """The period that a list with one entry per layer repeats where the config leaves it out.

    Attributes:
        length: Its number of layers, an expression over config keys.
        usual: The entry of its layers but the last.
        last: The entry of its last layer.
    """

    length: str | int
    usual: str
    last: str


class ConfigRules(Spec):
    """What every config key means.

    Attributes:
        defaults: The keys that are handled, with the value a config that omits them means.
        grown: For each key that follows the growth, the expression that gives its new value.
        supported: For keys whose other values would compute something else, the values that are understood; of a key
            that holds one entry per layer, the entries.
        per_layer: Keys that hold one entry per layer, resized with the depth.
        periods: For keys of ``per_layer`` that a config may leave out, the period they repeat then.
        thresholds: Keys that hold a layer number below which (exclusive) layers differ from those above.
        derived: Keys that the framework derives from the depth; left out where the depth changes.
        divisible: Pairs of sizes of which the first must be a multiple of the second, because the framework insists.
        ties: The keys that say whether embeddings are tied: the first that a config has decides, and growth that
            unties them sets all to false.
        ignored: Keys that do not matter to growth, as patterns.
    """

    defaults: dict[str, Any]
    grown: dict[str, str]
    supported: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    periods: dict[str, PeriodRule] = Field(default_factory=dict)
    thresholds: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    divisible: tuple[tuple[str, str], ...] = ()
    ties: tuple[str, ...] = ("tie_word_embeddings",)
    ignored: tuple[str, ...] = ()


class Architecture(Spec):
    """A family of models: one file under ``architectures/``.

    Attributes:
        architecture: Its name.
        about: One line for people.
        library: Whose models they are.
        model_types: The ``model_type`` values of the configs it reads; for timm, patterns of names of models.
        base: The prefix of the base model's names inside a model with a task head.
        classes: For each model class, the head layers it has.
        spaces: The spaces, in an order in which each only refers to config keys and earlier spaces.
        config: The config keys.
        tiny: A config of a model that tests can build at once. Sizes differ where an axis could be taken for another.
        module: Where a module says each config key, for a library whose modules hold no config: a path of attributes
            and numbers, or ``PATH / PATH``. A path may end in ``len``, in ``type`` (the class's name) or in ``given``
            (whether it is not None).
        naming: Further naming schemes, each a table of replacements in the names (another version's module names).
        ignored_tensors: Patterns of tensors that are derived, such as position numbers; they are not carried over.
        stem, stacks, head: The layers, in the order of computation.
        inputs, outputs: The model's ports; outputs that a class lacks are left out when it runs.
        attributes: Facts of the whole model.
    """

    architecture: str
    about: str
    library: Literal["transformers", "timm"] = "transformers"
    model_types: tuple[str, ...]
    base: str = ""
    classes: dict[str, ClassRule]
    spaces: dict[str, SpaceRule]
    config: ConfigRules
    tiny: dict[str, Any] = Field(default_factory=dict)
    module: dict[str, str] = Field(default_factory=dict)
    naming: tuple[dict[str, str], ...] = ()
    ignored_tensors: tuple[str, ...] = ()
    stem: dict[str, LayerRule] = Field(default_factory=dict)
    stacks: dict[str, StackRule]
    head: dict[str, LayerRule] = Field(default_factory=dict)
    inputs: tuple[Port, ...]
    outputs: tuple[OutputRule, ...]
    attributes: dict[str, Scalar] = Field(default_factory=dict)

    @cached_property
    def base_class(self) -> str:
        """The class of the bare model: the first that is listed."""
        return next(iter(self.classes))

    def base_of(self, class_name: str) -> str:
        """The prefix of the base model's names in a checkpoint of ``class_name``."""
        prefix = self.classes[class_name].base
        return prefix if prefix is not None else "" if class_name == self.base_class else self.base

    # --- config -> graph -------------------------------------------------------------------------------------------

    def check_config(self, config: Config) -> None:
        """Refuse a config with a key or value that this file does not understand.

        Raises:
            UnsupportedModel: Naming the keys, and where to add them.
        """
        rules = self.config
        known = {*rules.defaults, *rules.grown, *rules.supported, *rules.per_layer, *rules.thresholds, *rules.derived}
        ignored = (*COMMON_IGNORED, *rules.ignored)
        unknown = [k for k in config if k not in known and not any(fnmatch(k, pattern) for pattern in ignored)]
        if unknown:
            raise UnsupportedModel(
                f"config.json: the key {', '.join(map(repr, sorted(unknown)))} is not understood for architecture "
                f"'{self.architecture}'; handle it or list it as ignored in {self.architecture}.yaml"
            )
        for key, values in rules.supported.items():
            listed = key in rules.per_layer and isinstance(config.get(key), (list, tuple))
            for value in config[key] if listed else [config[key]] if key in config else []:
                if value not in values:
                    raise UnsupportedModel(
                        f"config.json: {key} is {value!r}{' for some layer' if listed else ''}; architecture "
                        f"'{self.architecture}' supports {' or '.join(map(repr, values))}"
                    )

    def value(self, config: Config, key: str) -> Any:
        """The value of a handled config key, its default where the config omits it."""
        return config[key] if key in config else self.config.defaults[key]

    def sizes(self, config: Config) -> dict[str, int]:
        """The size of every space under ``config``.

        Raises:
            InvalidModel: Where a size is not a positive whole number.
        """
        sizes: dict[str, int] = {}
        for name, rule in self.spaces.items():
            size = evaluate(rule.size, {**self._present(config), **sizes})
            least = 0 if rule.kind == "fixed" else 1  # a model without labels has no head
            if not isinstance(size, (int, float)) or size != int(size) or size < least:
                raise self._bad_size(name, size)
            sizes[name] = int(size)
        return sizes

    def _bad_size(self, name: str, size: Any) -> InvalidModel:
        what = f"{name} = {self.spaces[name].size}"
        return InvalidModel(f"config.json: {what} is {size}, expected a whole number of at least 1")

    def graph(
        self,
        config: Config,
        class_name: str | None,
        *,
        base: str | None = None,
        naming: int = 0,
        has_tensor: Callable[[str], bool] = lambda name: True,
    ) -> LayerGraph:
        """The layer graph of a model with ``config``.

        Args:
            config: The model's config.
            class_name: The model's class; None is the base model.
            base: The prefix of the base model's names; None takes the class's usual one.
            naming: Which naming scheme: 0 is the file's own, ``i`` the ``i``-th of :attr:`naming`.
            has_tensor: Whether the source holds a tensor; layers marked optional exist only with their tensors.

        Raises:
            UnsupportedModel: For an unknown class, config key or value.
            InvalidModel: For sizes that are not whole.
        """
        self.check_config(config)
        class_name = class_name or self.base_class
        if class_name not in self.classes:
            raise UnsupportedModel(
                f"the class '{class_name}' is not known to architecture '{self.architecture}'; known: "
                f"{', '.join(self.classes)}; add it under 'classes' in {self.architecture}.yaml"
            )
        if base is None:
            base = self.base_of(class_name)
        sizes = self.sizes(config)
        replacements = {} if naming == 0 else self.naming[naming - 1]
        build = _Builder(self, config, sizes, base, replacements=replacements, has_tensor=has_tensor)
        has, lacks = self.classes[class_name].layers, self.classes[class_name].lacks
        stem = build.layers({name: rule for name, rule in self.stem.items() if name not in lacks})
        head_layers = build.layers({name: rule for name, rule in self.head.items() if name in has})
        stacks = tuple(
            Stack(
                name=name,
                depth=self._depth(config, rule),
                layers=build.layers(rule.layers, prefix=rule.prefix),
                shared=rule.shared,
                fixed=rule.fixed,
            )
            for name, rule in self.stacks.items()
            if name not in lacks
        )
        layers = [*stem, *(layer for stack in stacks for layer in stack.layers), *head_layers]
        used = {space for layer in layers for parameter in layer.parameters for space in parameter.parsed.spaces}
        used |= {
            name for name, rule in self.spaces.items() if rule.kind == "fixed" and name in self.config.grown.values()
        }
        for name in (name for name in used if sizes.get(name) == 0):
            raise self._bad_size(name, 0)
        norms = {layer.name for layer in (*stem, *head_layers) if layer.kind == "norm"}
        return LayerGraph(
            architecture=self.architecture,
            spaces=tuple(
                Space(name=name, size=sizes[name], kind=rule.kind) for name, rule in self.spaces.items() if name in used
            ),
            stem=stem,
            stacks=stacks,
            head=head_layers,
            inputs=tuple(port for port in self.inputs if port.name not in lacks),
            outputs=tuple(
                Port(name=port.name, space=port.space, through=port.through if port.through in norms else None)
                for port in self.outputs
                if port.space in used
                and port.bare == (class_name == self.base_class)
                and port.name not in lacks
                and build.holds(port.when)
            ),
            attributes={
                **build.resolve(self.attributes),
                "class": class_name,
                **{
                    f"follows:{name}": rule.follows
                    for name, rule in self.spaces.items()
                    if rule.follows and name in used and evaluate(rule.follows, _with_heads(sizes)) == sizes[name]
                },
            },
        )

    def is_ignored_tensor(self, name: str) -> bool:
        """Whether a tensor is derived and need not be carried over."""
        return any(fnmatch(name, pattern) for pattern in self.ignored_tensors)

    # --- graph -> config -------------------------------------------------------------------------------------------

    def grown_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        layer_maps: Mapping[str, Sequence[int]],
        *,
        epsilons: Mapping[str, float],
        untied: bool,
    ) -> dict[str, Any]:
        """The config of the grown model.

        Args:
            config: The source's config.
            sizes: The target's size of every space.
            layer_maps: For each stack, for each target layer the source layer it descends from.
            epsilons: New values of epsilon keys.
            untied: Whether the growth unties embeddings that the source ties.

        Returns:
            A new config; keys the growth does not concern are as they were.

        Raises:
            InvalidTarget: Where this architecture's config cannot express the sizes.
        """
        rules = self.config
        grown = dict(config)
        known: dict[str, Any] = {**sizes, **{self.stacks[name].depth: len(m) for name, m in layer_maps.items()}}
        values = {key: _whole(evaluate(expression, known)) for key, expression in rules.grown.items()}
        values = {key: value for key, value in values.items() if value is not None}  # sizes this class does not have
        grown.update({key: value for key, value in values.items() if config.get(key) is not None})
        if self._unsaid(grown, known):  # keys the source left to their defaults, written only where they must be
            defaulted = [key for key in values if key in rules.defaults and config.get(key) is None]
            grown.update({key: values[key] for key in defaulted})
        if untied:
            grown.update(dict.fromkeys(rules.ties, False))
        self._refuse_unsayable(config, grown, known, untied=untied)
        layer_map = next(iter(layer_maps.values()))
        grown.update(self._by_layer(config, layer_map))
        if len(layer_map) != max(layer_map, default=-1) + 1:
            grown = {key: value for key, value in grown.items() if key not in rules.derived}
        grown.update(epsilons)
        return grown

    def _refuse_unsayable(self, config: Config, grown: Config, known: Mapping[str, int], *, untied: bool) -> None:
        """Refuse sizes that the grown config would not say, or would say of another model."""
        _refuse_wider_rotary_lists(config, self.sizes(config), known)
        if unsaid := self._unsaid(grown, known):
            name, (got, wanted) = next(iter(unsaid.items()))
            raise InvalidTarget(
                f"{name}={wanted} cannot be said in a config of architecture '{self.architecture}', where {name} would "
                f"be {got} ({self.spaces[name].size if name in self.spaces else name})"
            )
        for name, unit in self.config.divisible:
            size, step = (_whole(evaluate(expression, known)) for expression in (name, unit))
            if size % step:
                low = size - size % step
                raise InvalidTarget(
                    f"{name}={size} is not a multiple of {unit} = {step}, which architecture '{self.architecture}' "
                    f"insists on; nearest {name}: {low} or {low + step}"
                )
        if lost := self._conditional(config) - self._conditional(grown):
            why = "with an untied head, which this method needs at these sizes," if untied else "at these sizes"
            raise InvalidTarget(
                f"{why} a config of architecture '{self.architecture}' says a model without "
                f"{', '.join(sorted(lost))}; choose other sizes, or another method"
            )

    def _by_layer(self, config: Config, layer_map: Sequence[int]) -> dict[str, Any]:
        """The keys that tell layers apart, such that every layer stays what the one it descends from is."""
        grown: dict[str, Any] = {}
        depth = max(layer_map, default=-1) + 1
        for key in self.config.per_layer:
            entries = self._per_layer(config, key, depth)
            if entries is not None and (config.get(key) is not None or list(layer_map) != list(range(depth))):
                grown[key] = [entries[source] for source in layer_map]
        for key in self.config.thresholds:
            if config.get(key) is not None:
                below = sum(source < config[key] for source in layer_map)
                grown[key] = below if below < len(layer_map) else max(config[key], below)
        return grown

    def _conditional(self, config: Config) -> set[str]:
        """The layers with a condition that exist under ``config``."""
        build = _Builder(self, config, self.sizes(config), "", replacements={}, has_tensor=lambda name: True)
        blocks = (self.stem, self.head, *(stack.layers for stack in self.stacks.values()))
        return {name for block in blocks for name, rule in block.items() if rule.when and build.holds(rule.when)}

    def _per_layer(self, config: Config, key: str, depth: int) -> Sequence[Any] | None:
        """The entries of a key that holds one per layer: as they are listed, or as its period gives them."""
        if isinstance(config.get(key), (list, tuple)):
            if len(config[key]) < depth:
                raise InvalidModel(f"config.json: {key} has {len(config[key])} entries, expected one for each layer")
            listed: Sequence[Any] = config[key]
            return listed
        if key not in self.config.periods:
            return None
        period = self.config.periods[key]
        length = evaluate(str(period.length), self._present(config))
        return [period.usual if (layer + 1) % length else period.last for layer in range(depth)]

    def _unsaid(self, config: Config, known: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Sizes that ``config`` would give otherwise than ``known`` says: {name: (got, wanted)}."""
        try:
            said = {**self.sizes(config), **{rule.depth: self._depth(config, rule) for rule in self.stacks.values()}}
        except InvalidModel:  # e.g. hidden / heads is not whole before head_dim is written
            return {name: (0, wanted) for name, wanted in known.items()}
        return {name: (said[name], wanted) for name, wanted in known.items() if said[name] != wanted}

    # --- expressions -----------------------------------------------------------------------------------------------

    def _present(self, config: Config) -> dict[str, Any]:
        merged = {**self.config.defaults, **config}
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        present = {key: merged[key] for key in self.config.defaults if merged[key] is not None}
        return {**present, "num_labels": labels, "rope_follows_positions": _rope_follows_positions(config)}

    def _depth(self, config: Config, rule: StackRule) -> int:
        key = next(key for key, expression in self.config.grown.items() if expression == rule.depth)
        return int(evaluate(rule.size or key, self._present(config)))


def evaluate(expression: str, known: Mapping[str, Any]) -> Any:
    """The value of ``a``, ``a * b``, ``a / b``, ``a // b`` or ``a + b`` over ``known``; None where one is missing.

    Of alternatives, ``a or b / c``, the first whose names are all there holds.

    Raises:
        UnsupportedModel: Where it does not parse, or is computed from what is no number.

    Example:
        >>> evaluate("hidden / heads", {"hidden": 8, "heads": 2})
        4.0
    """
    for alternative in expression.split(" or "):
        match = _EXPRESSION.fullmatch(alternative.strip())
        if match is None:
            raise UnsupportedModel(f"the expression '{expression}' does not parse")
        operands = [int(t) if t.isdigit() else known.get(t) for t in match.group("left", "right") if t is not None]
        if any(operand is None for operand in operands):
            continue
        if match["operator"] is None:
            return operands[0]
        if not all(isinstance(operand, (int, float)) for operand in operands):
            got = " and ".join(map(repr, operands))
            raise UnsupportedModel(f"config.json: '{alternative.strip()}' is computed from {got}; expected numbers")
        return _OPERATIONS[match["operator"]](*operands)
    return None


def _rope_follows_positions(config: Config) -> bool:
    """Whether rotary frequencies are computed from the number of positions: longrope, and yarn without its own."""

    def follows(kind: Mapping[str, Any]) -> bool:
        name = kind.get("rope_type") or kind.get("type")
        return name in ("longrope", "su") or (name == "yarn" and not kind.get("original_max_position_embeddings"))

    return any(map(follows, _rope_kinds(config)))


def _rope_kinds(config: Config) -> list[Mapping[str, Any]]:
    """The parameters of rotary positions: one set, or one for each layer type."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


def _refuse_wider_rotary_lists(config: Config, old: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Refuse another head_dim where the config lists a factor for each rotary pair (longrope)."""
    listed = [key for kind in _rope_kinds(config) for key, value in kind.items() if isinstance(value, (list, tuple))]
    if listed and old.get("head_dim") != new.get("head_dim"):
        raise InvalidTarget(
            f"head_dim={new.get('head_dim')}: the config's rotary positions have {', '.join(listed)} for the pairs of "
            f"head_dim {old.get('head_dim')}, and nothing says those of others; keep head_dim, with heads in ratio to "
            "hidden"
        )


def _with_heads(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes and, of heads in groups, their number, which follows from two of them."""
    return {**sizes, **({"heads": sizes["kv_heads"] * sizes["group"]} if "kv_heads" in sizes else {})}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Builder:
    """Turns rules into layers under one config and naming."""

    def __init__(
        self,
        architecture: Architecture,
        config: Config,
        sizes: Mapping[str, int],
        base: str,
        *,
        replacements: Mapping[str, str],
        has_tensor: Callable[[str], bool],
    ) -> None:
        self.architecture = architecture
        self.config = config
        self.base = base
        self.replacements = replacements
        self.has_tensor = has_tensor
        self.known = architecture._present(config)
        self.sizes = sizes

    def holds(self, when: str | None) -> bool:
        return when is None or all(self.is_so(condition) for condition in when.split(" and "))

    def is_so(self, condition: str) -> bool:
        for sign in (" == ", " != "):
            if sign in condition:
                known = {**self.known, **self.sizes}
                left, right = (evaluate(side, known) for side in condition.split(sign))
                if left is None or right is None:
                    raise UnsupportedModel(
                        f"{self.architecture.architecture}.yaml: the condition '{condition}' compares what is "
                        "neither a config key with a value nor a space"
                    )
                return bool((left == right) == (sign == " == "))
        expression, _, pattern = condition.removeprefix("not ").partition(" is ")
        value = evaluate(expression, self.known)
        return (fnmatch(str(value), pattern) if pattern else bool(value)) != condition.startswith("not ")

    def resolve(self, attributes: Mapping[str, Scalar]) -> dict[str, Scalar]:
        def value(raw: Scalar) -> Scalar:
            if isinstance(raw, str) and raw.startswith("$"):
                found: Scalar = evaluate(raw[1:], self.known)
                return found
            return raw

        resolved = {name: value(raw) for name, raw in attributes.items()}
        epsilon = attributes.get("epsilon")
        if isinstance(epsilon, str):
            resolved["epsilon_key"] = epsilon[1:]
        return resolved

    def layers(self, rules: Mapping[str, LayerRule], prefix: str = "") -> tuple[Layer, ...]:
        present = {name: rule for name, rule in rules.items() if self.holds(rule.when)}
        absent = rules.keys() - present.keys()  # norms among them are not read through, nor added through
        return tuple(
            layer.model_copy(
                update={
                    "through": None if layer.through in absent else layer.through,
                    "added_through": None if layer.added_through in absent else layer.added_through,
                }
            )
            for name, rule in present.items()
            for layer in self.layer(name, rule, prefix)
        )

    def layer(self, name: str, rule: LayerRule, prefix: str) -> Iterator[Layer]:
        parameters = tuple(
            self.parameter(slot, parameter, prefix)
            for slot, parameter in rule.parameters.items()
            if self.holds(parameter.when)
        )
        if rule.optional and not any(self.has_tensor(p.name.replace("{layer}", "0")) for p in parameters):
            return
        layouts = [parameter.parsed for parameter in parameters]
        yield Layer(
            name=name,
            kind=rule.kind,
            reads=tuple(dict.fromkeys(s for layout in layouts for s in sorted(layout.read_spaces()))),
            writes=tuple(dict.fromkeys(s for layout in layouts for s in sorted(layout.written_spaces()))),
            through=rule.through,
            added_through=rule.added_through,
            parameters=parameters,
            attributes=self.resolve(rule.attributes),
        )

    def parameter(self, slot: str, rule: ParameterRule, prefix: str) -> Parameter:
        tie = self.holds(" or ".join(self.architecture.config.ties))
        name = self.name(prefix + rule.name)
        tie = tie or (rule.optional and not self.has_tensor(name))
        tied_to = self.name(rule.tied_to) if rule.tied_to is not None and tie else None
        return Parameter(name=name, slot=slot, layout=rule.layout, tied_to=tied_to)

    def name(self, name: str) -> str:
        name = name.replace("{base}", self.base)
        for written, replacement in self.replacements.items():
            name = name.replace(written, replacement)
        return name


# --- the files -----------------------------------------------------------------------------------------------------


def load_architecture(path: Path | Any) -> Architecture:
    """Load one architecture file.

    Args:
        path: A YAML file.

    Raises:
        UnsupportedModel: Where the file does not validate; the message names the path inside it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Architecture.model_validate(data, strict=False)
    except (yaml.YAMLError, ValidationError) as error:
        raise UnsupportedModel(f"{path.name}: {first_problem(error)}") from None


def first_problem(error: Exception) -> str:
    """One line of a YAML or validation error: where, what, and what was got."""
    if isinstance(error, ValidationError):
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "the file"
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
    return " ".join(str(error).split())


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture file by name: growkit's own, and those in the folders that GROWKIT_ARCHITECTURES names.

    The environment variable lists folders as PATH does; a file there takes the place of growkit's own of that name.

    Raises:
        UnsupportedModel: Where a folder is missing or a file does not validate.
    """
    named = [Path(folder) for folder in os.environ.get("GROWKIT_ARCHITECTURES", "").split(os.pathsep) if folder]
    missing = [folder for folder in named if not folder.is_dir()]
    if missing:
        raise UnsupportedModel(f"{missing[0]}: GROWKIT_ARCHITECTURES names it, and it is no directory")
    folders: list[Any] = [files("growkit_specs") / "architectures", *named]
    found = [load_architecture(e) for folder in folders for e in folder.iterdir() if e.name.endswith(".yaml")]
    return {architecture.architecture: architecture for architecture in sorted(found, key=lambda a: a.architecture)}


def architecture_for(model_type: str | None, library: str = "transformers") -> Architecture:
    """The architecture that reads a library's configs of ``model_type``.

    Raises:
        UnsupportedModel: Naming the known ones, and how to add one.
    """
    files = [architecture for architecture in architectures().values() if architecture.library == library]
    for architecture in files:
        if any(fnmatch(str(model_type), pattern) for pattern in architecture.model_types):
            return architecture
    known = ", ".join(t for architecture in files for t in architecture.model_types)
    raise UnsupportedModel(
        f"the model type {model_type!r} is not known; known: {known}; an architecture is one data file, see "
        "docs/how-to/add-an-architecture.md"
    )


COMMON_IGNORED: tuple[str, ...] = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation*",
    "attn_implementation",
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "id2label",
    "label2id",
    "num_labels",
    "_num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "*dropout*",
    "*_drop",
    "*pdrop",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "initializer_*",
    "*_token_id",
    "eos_token_ids",
    "gradient_checkpointing",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "keys_to_ignore_at_inference",
    "tokenizer_class",
    "prefix",
    "pruned_heads",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "unsloth_*",
    "transformers.js_config",
    "output_past",
    "is_decoder",
    "add_cross_attention",
    "cross_attention_hidden_size",
    "tie_encoder_decoder",
    "tie_word_embeddings",
)
"""Config keys of every model that do not matter to growth: training, generation and bookkeeping."""
