"""The waist: a model as a flat list of ops, the batch that goes down, the result that comes up, and who runs it.

`model`, `engine` and `backends` meet here and nowhere else. Numpy arrays and plain types only.
"""

from jilju.plan.batch import Batch, StepResult, StepShape
from jilju.plan.executor import Executor, KvDtype, Limits, WeightDtype, WeightTensor
from jilju.plan.ops import (
    Activation,
    Angles,
    Attention,
    Embed,
    Glu,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Sample,
    TakeRows,
    Value,
    WeightSpec,
)
from jilju.plan.plan import Buffer, KvSpec, Plan, PlanBuilder

__all__ = [
    "Activation", "Angles", "Attention", "Batch", "Buffer", "Embed", "Executor", "Glu", "KvDtype", "KvSpec", "Limits", "Linear", "Op",
    "Plan", "PlanBuilder", "RmsNorm", "Rope", "Sample", "StepResult", "StepShape", "TakeRows", "Value", "WeightDtype", "WeightSpec",
    "WeightTensor",
]  # fmt: skip
