"""The errors a user can meet: one line that says what is wrong, what was expected, what was got, and what to do."""

from __future__ import annotations


class GrowkitError(ValueError):
    """A request that cannot be fulfilled. The command line prints its message and exits with status 2."""


class LayoutError(GrowkitError):
    """A line of the axis notation that does not parse, or does not fit the tensor it describes."""


class UnsupportedModel(GrowkitError):
    """A model, or a part of one, that no architecture file or adapter understands."""


class InvalidModel(GrowkitError):
    """A model that contradicts itself: a missing tensor, a wrong shape, a truncated file."""


class InvalidTarget(GrowkitError):
    """Sizes that the source model cannot grow to."""


class UnsupportedFormat(GrowkitError):
    """A form that an adapter does not write models in, whatever the model."""
