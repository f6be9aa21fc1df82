"""growkit: a larger transformer out of a smaller trained one. Read, plan, grow, write.

model = growkit.read("small/")
plan = growkit.plan(model, hidden=768, layers=12)
large = growkit.grow(model, plan)
growkit.write(large, "large/")
growkit.verify(model, large)
"""

from growkit.adapters import Adapter, read, write
from growkit.data import as_data, read_data
from growkit.fit import fit
from growkit.grow import grow
from growkit.methods import methods
from growkit.model import Model
from growkit.operator import GrowthOperator
from growkit.plan import Plan, plan
from growkit.verdict import Verdict
from growkit.verify import Report, verify
from growkit_specs import FitSettings, GrowkitError, LayerGraph, Recipe, Target

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "FitSettings",
    "GrowkitError",
    "GrowthOperator",
    "LayerGraph",
    "Model",
    "Plan",
    "Recipe",
    "Report",
    "Target",
    "Verdict",
    "as_data",
    "fit",
    "grow",
    "methods",
    "plan",
    "read",
    "read_data",
    "verify",
    "write",
]
