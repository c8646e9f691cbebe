"""The usage log: a file that survives full disks and deaths, and says before the start that it cannot be written."""

import json
import re
from pathlib import Path

import pytest

from jilju.errors import ConfigError
from jilju.serve.ledger import Call, SequenceLife
from jilju.serve.usage_log import UsageLine, UsageLog, check_usage_log, usage_line


def line(name: str = "a") -> UsageLine:
    call = Call(id=name, route="/v1/completions", key_name=None, label=None, received_ns=5)
    call.ended_ns, call.state, call.status = 1_234_567_891, "completed", 200
    call.machine_ns, call.joules = 123_456_789, 2.5
    call.lives.append(SequenceLife(1, 0, 0, 7))
    return usage_line(call, "m", 36.0, 86400.25)


def test_a_line_holds_the_exact_time():
    told = line()
    assert (told.ms, told.machine_ms, told.joules) == (1234.567886, 123.456789, 2.5)
    assert told.cost_usd == pytest.approx(36.0 * 0.123456789 / 3600)
    assert (told.time, told.queue_ms, told.ttft_ms) == ("1970-01-02T00:00:00.250Z", None, None)


def test_the_fields_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.partition("**`--usage-log FILE`**")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(UsageLine.__struct_fields__)


def test_lines_are_added_to_what_is_there(tmp_path: Path):
    path = tmp_path / "usage.jsonl"
    for name in ("a", "b"):
        log = UsageLog(str(path))
        log.write(line(name))
        log.close()
    assert [json.loads(text)["id"] for text in path.read_text().splitlines()] == ["a", "b"]
    assert path.stat().st_mode & 0o077 == 0


def test_what_a_death_left_half_is_a_line_of_its_own(tmp_path: Path):
    path = tmp_path / "usage.jsonl"
    path.write_text('{"id": "a", "ro')
    log = UsageLog(str(path))
    log.write(line("b"))
    log.write(line("c"))
    log.close()
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"id": "a", "ro' and [json.loads(text)["id"] for text in whole] == ["b", "c"]


def test_a_full_disk_costs_lines_and_nothing_else(caplog: pytest.LogCaptureFixture):
    log = UsageLog("/dev/full")
    for _ in range(5):
        log.write(line())
    log.close()
    assert log.num_dropped == 5
    assert len(caplog.records) == 3 and "No space left" in caplog.text  # of the 1st, 2nd and 4th


def test_a_file_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path):
    check_usage_log(None)
    check_usage_log(str(tmp_path / "new.jsonl"))
    for path in (tmp_path, tmp_path / "missing" / "usage.jsonl"):
        with pytest.raises(ConfigError, match=r"--usage-log .* cannot be written"):
            check_usage_log(str(path))
