"""Folders that `transformers` saved, from files to logits, against the model that it saved, in float32."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import (
    MODELS,
    NUM_TOKENS,
    VOCAB_SIZE,
    Tiny,
    build,
    logits_by_transformers,
    rope_factors,
    token_ids,
)
from transformers import AutoConfig, MistralConfig, MistralForCausalLM, PreTrainedModel

from jilju.backends.reference import ReferenceExecutor
from jilju.formats.safetensors import SafetensorsFile
from jilju.model.checkpoint import open_checkpoint, plan_of, spec_of
from jilju.model.weights import load_weights
from jilju.plan import Limits
from tests.model.batches import chunks_of, logits_of

TOLERANCE = (
    2e-5  # of the row's largest logit, for ten layers; both sides are float32 with different orders of summation
)
BLOCK_SIZE = 8


def load(path: Path) -> ReferenceExecutor:
    folder = open_checkpoint(str(path))
    plan, executor = plan_of(folder), ReferenceExecutor()
    executor.load(plan, load_weights(folder, plan), Limits(20, BLOCK_SIZE, 1, NUM_TOKENS, 160, 1))
    return executor


def check(path: Path, model: PreTrainedModel, num_layers: int) -> None:
    ids, rng = token_ids(), np.random.default_rng(0)
    want, executor = logits_by_transformers(model, ids), load(path)
    tolerance = TOLERANCE * max(1, num_layers / 10)
    for parts in ([(0, NUM_TOKENS)], chunks_of(NUM_TOKENS, rng.integers(1, 17, NUM_TOKENS).tolist())):
        got = logits_of(executor, ids, parts, rng.permutation(20)[: NUM_TOKENS // BLOCK_SIZE].tolist())
        error = abs(got - want).max(axis=1) / abs(want).max(axis=1)
        print(f"{path.name}: largest error {error.max():.1e} of the row's largest logit, at token {error.argmax()}")
        assert error.max() <= tolerance, f"token {error.argmax()}: {error.max():.1e}, bound {tolerance}"


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_logits_of_every_family(tiny: Tiny, tmp_path: Path) -> None:
    model = build(tiny)
    model.save_pretrained(tmp_path / tiny.name)
    check(tmp_path / tiny.name, model, tiny.num_layers)


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = build(MODELS[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    check(tmp_path / "shards", model, MODELS[0].num_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiny", MODELS[:4], ids=lambda tiny: tiny.name)
def test_half_types(tiny: Tiny, dtype: torch.dtype, tmp_path: Path) -> None:
    """Saved in a half type, loaded and computed in float32 by both."""
    model, path = build(tiny), tmp_path / tiny.name
    model.to(dtype).save_pretrained(path)
    loaded = type(model).from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    check(path, loaded, tiny.num_layers)


@pytest.mark.parametrize("window", [None, 20, 500])
def test_mistral(window: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=512, sliding_window=window, attn_implementation="eager",
        initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path / "mistral")
    check(tmp_path / "mistral", model, 3)


SCALED = next(tiny for tiny in MODELS if tiny.llama3_context)


@pytest.mark.parametrize("tiny", [*MODELS[:4], SCALED], ids=lambda tiny: tiny.name)
def test_keys_of_older_files(tiny: Tiny, tmp_path: Path) -> None:
    """rope_theta and its like at the top of config.json, which both read as the same model."""
    model, path = build(tiny), tmp_path / tiny.name
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if tiny.family == "gemma3":
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        del config["layer_types"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    else:
        config["rope_theta"] = rope.pop("rope_theta")
        if tiny.llama3_context:
            config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(path, config=AutoConfig.from_pretrained(path), attn_implementation="eager")
    assert (
        logits_by_transformers(again.float().eval(), token_ids()) == logits_by_transformers(model, token_ids())
    ).all()
    check(path, model, tiny.num_layers)


def test_rotary_factors_are_those_of_transformers(tmp_path: Path) -> None:
    build(SCALED).save_pretrained(tmp_path / "tiny")
    got, want = spec_of(open_checkpoint(str(tmp_path / "tiny"))).rope_factors, rope_factors(SCALED)
    assert abs(np.array(got) / want - 1).max() <= 8 * 2.0**-24, "a few roundings of float32"
    assert got[0] == 1 and 1 < got[2] < 8 and got[-1] == 8


def test_what_the_safetensors_package_writes_is_read_as_it_reads_it(tmp_path: Path) -> None:
    build(MODELS[0]).save_pretrained(tmp_path / "tiny")
    path = tmp_path / "tiny" / "model.safetensors"
    file, arrays = SafetensorsFile.open(path), load_file(path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        assert file.tensor_data(name).tobytes() == array.tobytes()
