"""Sampling defaults of a model folder: what its makers recommend in generation_config.json.

Owns the keys that are read of it, and their bounds. Knows nothing of requests, nor of the ids that end an answer.
"""

from pathlib import Path

from jilju.errors import ModelFileError
from jilju.formats.json_file import read_object
from jilju.model.sources import SamplingDefaults

FILE = "generation_config.json"
BOUNDS = {
    "temperature": (0.0, 2.0), "top_p": (1e-6, 1.0), "top_k": (0, 2**31 - 1), "min_p": (0.0, 1.0), "repetition_penalty": (1e-6, 2.0),
}  # fmt: skip


def folder_defaults(path: Path) -> SamplingDefaults | None:
    """None of a file, or where the folder recommends no sampling. Raises ModelFileError."""
    config = read_object(path / FILE) if path.is_dir() else None
    if config is None or config.get("do_sample") is not True:
        return None
    values: dict[str, float] = {"temperature": 1.0, "top_p": 1.0}
    for key, (low, high) in BOUNDS.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not low <= value <= high or (key == "top_k" and type(value) is not int):
            raise ModelFileError(str(path / FILE), key, value, f"a number from {low} to {high}")
        values[key] = value
    return SamplingDefaults(
        temperature=values["temperature"], top_p=values["top_p"], top_k=int(values.get("top_k", 0)),
        min_p=values.get("min_p", 0.0), repetition_penalty=values.get("repetition_penalty", 1.0),
        source=f"{FILE} of {path.resolve().name}",
    )  # fmt: skip
