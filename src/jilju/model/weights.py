"""Weights: the tensors of a checkpoint, checked against the plan that will use them.

Owns the check that it holds exactly what a plan needs, in formats that the ops take and without a NaN in them. Copies no
matrix: the views lie in a file's mapping and keep it alive. Knows nothing of what backends make of them.
"""

from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType
from jilju.formats.quants import first_block_not_finite
from jilju.model.checkpoint import Checkpoint
from jilju.plan import Plan, WeightTensor


def load_weights(checkpoint: Checkpoint, plan: Plan, *, check_values: bool = True) -> dict[str, WeightTensor]:
    """Every weight of the plan by name. Raises ModelFileError where the checkpoint differs from the plan.

    The check of the values reads all of it; False is for a file that is known to have passed it.
    """
    weights: dict[str, WeightTensor] = {}
    for name, wanted in plan.weights.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            raise ModelFileError(
                checkpoint.path,
                f"tensor '{name}'",
                "missing",
                f"{wanted.type.name} of {wanted.num_outputs} x {wanted.num_inputs}",
            )
        shape = (
            (wanted.num_inputs,)
            if wanted.num_outputs == 1 and len(tensor.shape) == 1
            else (wanted.num_outputs, wanted.num_inputs)
        )
        if tensor.shape != shape:
            raise ModelFileError(checkpoint.path, f"tensor '{name}', shape", tensor.shape, str(shape))
        if tensor.type is not wanted.type:
            raise ModelFileError(checkpoint.path, f"tensor '{name}', type", tensor.type.name, wanted.type.name)
        if len(shape) == 1 and tensor.type is not GgmlType.F32:
            raise ModelFileError(checkpoint.path, f"tensor '{name}', type", tensor.type.name, "F32 for a vector")
        data = checkpoint.tensor_data(name)
        if check_values and (block := first_block_not_finite(data, tensor.type)) is not None:
            where = f"a NaN or an infinity in block {block} of {tensor.type.name}"
            raise ModelFileError(checkpoint.path, f"tensor '{name}'", where, "finite numbers; the file is damaged")
        weights[name] = WeightTensor(name, tensor.type, tensor.shape, data)
    return weights
