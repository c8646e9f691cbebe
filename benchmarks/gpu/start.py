"""Start to ready on a GPU, with weights of 16 GB in the page cache: `python -m benchmarks.gpu.start --json OUT`.

Makes a model folder in the shape of Llama 3.1 8B with random weights, then starts `jilju serve --device cuda` on it twice: the first
start compiles kernels where they are not in Triton's cache yet. Time until the address is printed, and until a first token.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.gpu.llama import SPEC
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WAIT_S = 120
SHARD_BYTES = 4 << 30


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """By the names that a folder has."""
    d, ffn = SPEC.hidden_width, SPEC.ffn_width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SPEC.vocab_size, d), "model.norm.weight": (d,), "lm_head.weight": (SPEC.vocab_size, d),
    }  # fmt: skip
    for index in range(SPEC.num_layers):
        p = f"model.layers.{index}"
        shapes |= {
            f"{p}.input_layernorm.weight": (d,), f"{p}.post_attention_layernorm.weight": (d,),
            f"{p}.self_attn.q_proj.weight": (SPEC.q_width, d), f"{p}.self_attn.k_proj.weight": (SPEC.kv_width, d),
            f"{p}.self_attn.v_proj.weight": (SPEC.kv_width, d), f"{p}.self_attn.o_proj.weight": (d, SPEC.q_width),
            f"{p}.mlp.gate_proj.weight": (ffn, d), f"{p}.mlp.up_proj.weight": (ffn, d), f"{p}.mlp.down_proj.weight": (d, ffn),
        }  # fmt: skip
    return shapes


def write_folder(folder: Path) -> int:
    """Random bf16 weights in shards, one block of numbers again and again; bytes of the weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": SPEC.hidden_width,
        "intermediate_size": SPEC.ffn_width, "num_hidden_layers": SPEC.num_layers, "num_attention_heads": SPEC.num_heads,
        "num_key_value_heads": SPEC.num_kv_heads, "vocab_size": SPEC.vocab_size, "max_position_embeddings": 8192,
        "rms_norm_eps": SPEC.rms_eps, "rope_theta": SPEC.rope_theta, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: id_ for id_, letter in enumerate(letters)}
    vocab |= {f"<|{id_}|>": id_ for id_ in range(len(vocab), SPEC.vocab_size)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": SPEC.vocab_size - 1}))
    floats = np.random.default_rng(0).normal(0, 0.02, 32 << 20).astype(np.float32)
    block = (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16, cut
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in tensor_shapes().items():
        num_bytes = 2 * int(np.prod(shape))
        if size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
        total += num_bytes
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            where[name], offset = file, end
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            while offset > 0:
                out.write(block[: min(offset, len(block))])
                offset -= min(offset, len(block))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )
    return total


def start(folder: Path, extra: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "jilju", "serve", str(folder), "--device", "cuda", "--port", "0", *extra]
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
            if time.monotonic() - begin > WAIT_S:
                raise TimeoutError(f"not ready in {WAIT_S} s: {lines[-5:]}")
        else:
            raise RuntimeError("\n".join(lines[-20:]))
        ready_s = time.monotonic() - begin
        url = found.group()
        while True:
            try:
                body = {"prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0}
                request = urllib.request.Request(
                    url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = json.loads(answer.read())
                break
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() - begin > WAIT_S:
                    raise RuntimeError(error.read().decode()[:400]) from error
                time.sleep(0.05)
        answered_s = time.monotonic() - begin
        assert text["usage"]["completion_tokens"] == 8, text
        print("\n".join(lines[-30:]), flush=True)
        return {"printed s": round(ready_s, 2), "answered s": round(answered_s, 2)}
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("extra", nargs="*", help="further options of jilju serve")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        total = write_folder(Path(folder))
        print(f"{total / 1e9:.1f} GB written in {time.monotonic() - begin:.0f} s", flush=True)
        for _ in range(given.times):
            results.append(start(Path(folder), ["--log-level", "info", *given.extra]))
            print(json.dumps(results[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
