"""Makes the model files that comparisons need besides the named ones, in the folder `bench` of jilju's cache.

smollm2-135m in other number formats: its matrices unpacked and packed again by the gguf package, so that both sides of a comparison
read the same file; the embedding stays as it is. And a Llama shape of width 2048 in Q4_K, whose weights are random: speed does not
depend on them. Files that are there are left alone. Prints their paths.
"""

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

from jilju.model import sources

FORMATS = ("q4_0", "q5_0", "q5_1", "q8_0", "f16")
SHAPED = "llama-2048-q4_k"
WIDTH, HEADS, KV_HEADS, FFN_WIDTH, LAYERS = 2048, 32, 8, 5632, 8
Q4_K_COLUMNS, Q4_K_BYTES = 256, 144  # of a block: float16 d and dmin, 12 bytes of scales and mins, 128 of nibbles
SCALE = 1.2e-4  # d: with random 6-bit scales and nibbles a weight has a deviation of ~170 d, 1 / sqrt(WIDTH) of it


def open_writer(path: Path, reader: gguf.GGUFReader, changes: dict[str, int]) -> gguf.GGUFWriter:
    """A writer with the reader's metadata, but for `changes` of whole numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind, value = field.types[0], changes.get(key, field.contents())
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, inner)
    return writer


def finish(writer: gguf.GGUFWriter, part: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)  # whole or not at all


def requantize(source: Path, path: Path, format_: str) -> None:
    reader, part = gguf.GGUFReader(source), path.with_suffix(".part")
    wanted = gguf.GGMLQuantizationType[format_.upper()]
    writer = open_writer(part, reader, {"general.file_type": int(gguf.LlamaFileType[f"MOSTLY_{format_.upper()}"])})
    for tensor in reader.tensors:
        kept = len(tensor.shape) == 1 or tensor.name == "token_embd.weight"
        if kept:
            data, type_ = tensor.data, tensor.tensor_type
        else:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            data, type_ = gguf.quantize(values, wanted), wanted
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=type_)
    finish(writer, part, path)


def random_q4_k(rng: np.random.Generator, num_outputs: int, num_inputs: int) -> np.ndarray:
    """uint8 [num_outputs, bytes of a row]; scales, mins and nibbles random, d and dmin such that the mean is about 0"""
    raw = rng.integers(0, 256, (num_outputs, num_inputs // Q4_K_COLUMNS, Q4_K_BYTES), dtype=np.uint8)
    raw[..., :4] = np.array([SCALE, 7.5 * SCALE], np.float16).view(np.uint8)
    return raw.reshape(num_outputs, -1)


def write_shaped(source: Path, path: Path) -> None:
    """The tokenizer is that of `source`."""
    reader, part, rng = gguf.GGUFReader(source), path.with_suffix(".part"), np.random.default_rng(0)
    vocab_size = len(reader.fields["tokenizer.ggml.tokens"].data)
    changes = {
        "llama.embedding_length": WIDTH, "llama.feed_forward_length": FFN_WIDTH, "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS, "llama.rope.dimension_count": WIDTH // HEADS,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_K_M),
    }  # fmt: skip
    writer = open_writer(part, reader, changes)

    def matrix(name: str, num_outputs: int, num_inputs: int) -> None:
        data = random_q4_k(rng, num_outputs, num_inputs)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    matrix("token_embd.weight", vocab_size, WIDTH)
    kv_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.attn_k.weight", kv_width, WIDTH)
        matrix(f"blk.{layer}.attn_v.weight", kv_width, WIDTH)
        matrix(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", FFN_WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", FFN_WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FFN_WIDTH)
    norm("output_norm.weight")
    finish(writer, part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=["q4_0", "q8_0", SHAPED], help=f"of {', '.join((*FORMATS, SHAPED))}"
    )
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in (*FORMATS, SHAPED)]:
        sys.exit(f"{unknown[0]!r}; allowed: {', '.join((*FORMATS, SHAPED))}")
    source = sources.pull("smollm2-135m")
    folder = sources.cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / (f"{name}.gguf" if name == SHAPED else f"smollm2-135m-{name}.gguf")
        if not path.exists():
            if name == SHAPED:
                write_shaped(source, path)
            else:
                requantize(source, path, name)
        print(path)


if __name__ == "__main__":
    main()
