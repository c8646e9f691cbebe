"""The board and the document of observability against a server's metrics: no query and no name is of something that is not there."""

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jilju.account.energy import DeclaredPower
from jilju.clock import VirtualClock
from jilju.serve.context import GpuMemory

from .conftest import Connect
from .stub import StubClient, step_record
from .test_answers import CHAT, chat_body
from .test_metrics import mixed_traffic
from .test_told import Samples, samples_of

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs"
BOARD: dict[str, Any] = json.loads((DOCS / "grafana" / "jilju.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
COLUMNS = 24
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds itself
S = 10**9


async def told(connect: Connect, **changes: Any) -> str:
    """After traffic, on a server of which everything is known."""
    stub = StubClient()
    stub.process_id = os.getppid()  # type: ignore[attr-defined]
    gpu = GpuMemory(total_bytes=1 << 30, used_bytes=lambda: 1 << 29)
    changes = {"price_per_hour": 1.0, "meter": DeclaredPower(65.0), "gpu": gpu} | changes
    async with connect(stub, clock=VirtualClock(100 * S), **changes) as (http, server):
        assert stub.info is not None
        stub.info = msgspec.structs.replace(stub.info, read_bytes_per_s=1e9, flops_per_s=1e9)
        step = {"begin_ns": 99 * S, "end_ns": 100 * S, "bytes": 10**8, "flops": 10**8}
        for tokens in (
            {"num_prefill_tokens": 9},
            {"num_decode_tokens": 9},
            {"num_prefill_tokens": 9, "num_decode_tokens": 9},
        ):
            stub.log.add_step(step_record(**step, **tokens))
        await mixed_traffic(http, server, stub)
        await http.post(CHAT, json=chat_body(max_tokens=3))
        server.loop_lag.note(1000)
        return (await http.get("/metrics")).text


def labels_of(samples: Samples, name: str) -> set[str]:
    return {label for found, labels in samples if found == name for label, _ in labels}


# ---- the board -------------------------------------------------------------------------------------------------------


async def test_every_query_asks_for_what_is_there(connect: Connect) -> None:
    samples = samples_of(await told(connect))
    names = {name for name, _ in samples}
    assert len(QUERIES) > 40
    for title, query in QUERIES:
        asked = re.findall(r"(jilju_\w+)\{([^}]*)\}", query)
        assert asked and len(asked) == len(re.findall("jilju_", query)), (
            f"{title}: a metric without a selector: {query}"
        )
        for name, selector in asked:
            assert name in names, f"{title}: {name} is not there"
            selected = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selector))
            summed = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
            missing = (selected | summed) - labels_of(samples, name) - OF_PROMETHEUS
            assert not missing, f"{title}: {name} has no label {missing}"
            assert {"model", "instance"} <= selected, f"{title}: {name} is asked for of all servers"


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_is_well_formed(title: str, query: str) -> None:
    for opened, closed in ("()", "[]", "{}"):
        assert query.count(opened) == query.count(closed)
    for name, function in re.findall(r"(jilju_\w+)\{[^}]*\}(\[)?", query):
        is_counted = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert is_counted == bool(function), f"{title}: {name}: counters are looked at over time, gauges as they are"
    legends = [t["legendFormat"] for panel in PANELS for t in panel.get("targets", ()) if t["expr"] == query]
    for label in (label for legend in legends for label in re.findall(r"\{\{(\w+)\}\}", legend)):
        assert re.search(rf"by \([^)]*\b{label}\b", query), (
            f"{title}: the legend shows {label}, by which nothing is summed"
        )


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        for place in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert place not in taken, f"{panel['title']} lies over {taken[place]} at {place}"
            taken[place] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == COLUMNS * height, "there are holes"


def test_the_board_can_be_imported_anywhere() -> None:
    assert BOARD["id"] is None and len({panel["id"] for panel in PANELS}) == len(PANELS)
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Tokens", "Engine steps", "KV and cache", "Honesty", "Machine"]
    for panel in PANELS:
        assert panel["type"] == "row" or panel["description"], panel["title"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__rate_interval", "__all"}
    assert used == set(variables)


# ---- the document ----------------------------------------------------------------------------------------------------


def section(heading: str) -> str:
    text = (DOCS / "observability.md").read_text(encoding="utf-8")
    assert f"\n## {heading}\n" in text, f"there is no heading {heading}"
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def families(text: str, prefix: str) -> dict[str, str]:
    """Types by name."""
    return dict(re.findall(rf"^# TYPE {prefix}(\w+) (\w+)$", text, re.MULTILINE))


async def test_the_document_names_every_metric_and_its_labels(connect: Connect) -> None:
    text = await told(connect)
    samples, types = samples_of(text), families(text, "")
    rows = [line.split("|")[1:4] for line in section("Metrics").splitlines() if line.startswith("| `jilju_")]
    documented = {name: kind for names, kind, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented.keys() == types.keys()
    for name, kind in documented.items():
        assert kind.split()[0].rstrip(",") == types[name], name
        written = re.search(r"\(([^)]*)\)", kind)
        labels = dict(part.strip().partition(": ")[::2] for part in written[1].split(";")) if written else {}
        found = [dict(of) for sample, of in samples if sample in (name, f"{name}_bucket")]
        assert found, f"{name} has no sample, so nothing of it is looked at"
        for sample in found:
            assert sample.keys() - {"model", "le"} == labels.keys(), name
        for label, values in labels.items():
            assert not values or {sample[label] for sample in found} == set(values.split(", ")), f"{name} {label}"


async def test_the_document_names_every_name_of_vllm(connect: Connect) -> None:
    types = families(await told(connect, metrics_compat="vllm"), "vllm:")
    first_cells = [line.split("|")[1] for line in section("vLLM's names").splitlines() if line.startswith("| `")]
    assert {name for cell in first_cells[1:] for name in re.findall(r"`(\w+)`", cell)} == types.keys()
