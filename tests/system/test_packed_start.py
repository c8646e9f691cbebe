"""Starts with packed weights: the second one maps what the first one made, and answers with the same bits."""

import os
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from jilju.assemble.engine import EngineOptions, build_engine, make_executor, open_model
from jilju.engine.request import Request, SamplingParams, TokenEvent
from jilju.errors import ModelFileError
from jilju.formats.ggml import GgmlType
from jilju.formats.gguf import GgufFile
from jilju.model import sources
from tests.model.tiny import SPEC, write
from tests.system.conftest import Server, needs_smollm2


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "tiny.gguf", SPEC, type_of=lambda n: GgmlType.F32 if "norm" in n else GgmlType.Q4_0)


def tokens(model: Path, folder: Path | None) -> list[tuple[int, float | None]]:
    """Ids and logprobs of one request to an engine that is started for it."""
    options = EngineOptions(
        path=str(model), num_blocks=8, max_context=64, max_rows=2, step_tokens=16, num_threads=2,
        packed_cache=str(folder) if folder is not None else None,
    )  # fmt: skip
    engine = build_engine(options)
    engine.submit(Request(id="a", prompt_ids=[1, 2, 3], params=SamplingParams(max_tokens=20, seed=5, logprobs=0)))
    events = []
    while engine.has_work():
        events += engine.step()
    engine.close()
    return [(e.token_id, e.logprob) for e in events if isinstance(e, TokenEvent)]


def forbidden(*arguments: object) -> None:
    raise AssertionError("the values were looked at again")


def test_the_second_start_maps_what_the_first_one_made(model, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    first = tokens(model, folder)
    assert len(first) == 20 and list(folder.glob("*.packed"))
    monkeypatch.setattr("jilju.model.weights.first_block_not_finite", forbidden)
    monkeypatch.setattr("jilju.backends.native.packed._pack_all", forbidden)
    assert tokens(model, folder) == first


def test_without_the_cache_every_start_checks_and_packs(model, tmp_path, monkeypatch):
    assert tokens(model, None) == tokens(model, tmp_path / "packed")
    monkeypatch.setattr("jilju.model.weights.first_block_not_finite", forbidden)
    with pytest.raises(AssertionError, match="looked at again"):
        tokens(model, None)


def test_a_damaged_packed_file_is_made_anew(model, tmp_path):
    folder = tmp_path / "packed"
    first = tokens(model, folder)
    (path,) = folder.glob("*.packed")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert tokens(model, folder) == first
    assert path.read_bytes() == whole, "packing gives the same bytes"


def test_a_model_file_with_a_nan_is_refused_at_every_start_and_leaves_nothing(model, tmp_path):
    folder = tmp_path / "packed"
    tensor = GgufFile.open(model).tensors["blk.1.ffn_down.weight"]
    with model.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.array([np.nan], "<f2").tobytes())
    for _ in range(2):
        with pytest.raises(ModelFileError, match=r"a NaN or an infinity in block 0"):
            tokens(model, folder)
        assert not list(folder.glob("*.packed"))


def test_a_changed_model_file_is_packed_anew(model, tmp_path):
    folder = tmp_path / "packed"
    first = tokens(model, folder)
    tensor = GgufFile.open(model).tensors["blk.0.ffn_down.weight"]
    times = model.stat()
    with model.open("r+b") as file:
        file.seek(tensor.offset + 2)  # after the scale: four-bit numbers
        file.write(bytes(16) * 10)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = tokens(model, folder)
    assert changed != first and changed == tokens(model, None)


def test_the_memory_plan_counts_packed_weights_and_the_tables_of_embeddings(model):
    opened = open_model(str(model))
    specs = opened.plan.weights.values()
    table = next(spec.num_bytes for spec in specs if spec.name == "token_embd.weight")
    vectors = sum(spec.num_bytes for spec in specs if spec.num_outputs == 1)
    counted = make_executor("native").weight_bytes(opened.plan)
    assert counted > opened.plan.weight_bytes + vectors, "a head that is the table as well is there twice"
    assert counted < 1.2 * opened.plan.weight_bytes + table + vectors


# ---- a server --------------------------------------------------------------------------------------------------------


def answer(server: Server) -> str:
    body = {"prompt": "The sky is", "max_tokens": 8, "temperature": 0}
    response = httpx.post(server.url + "/v1/completions", json=body, timeout=60).raise_for_status()
    return response.json()["choices"][0]["text"]


@needs_smollm2
def test_a_server_packs_once_and_an_engine_that_died_comes_back_on_the_packed_file(tmp_path, monkeypatch):
    file = next(m.path for m in sources.list_models() if m.entry.name == "smollm2-135m")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / file.name).symlink_to(file)
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path))
    arguments = ("smollm2-135m", "--context", "256", "--kv-memory", "64MiB")

    server = Server(*arguments)
    assert "packing weights: 0 of" in "".join(server.log)
    first = answer(server)
    server.kill_engine()
    while server.metric("jilju_engine_restarts_total") != 1 or httpx.get(server.url + "/readyz").status_code != 200:
        time.sleep(0.02)
    assert answer(server) == first
    assert server.stop() == 0

    (path,) = (tmp_path / "packed").glob("*.packed")
    inode = path.stat().st_ino
    server = Server(*arguments)
    assert "packing weights" not in "".join(server.log)
    assert answer(server) == first
    assert server.stop() == 0
    assert path.stat().st_ino == inode, "nobody made another"
