"""Event-log files: what is read back shows the same frames, a cut end costs the last entry alone, and nothing else is overwritten."""

import os
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.account.frame import Counts
from jilju.account.log_file import (
    CALL,
    END,
    ENGINE,
    INFO,
    MAGIC,
    REFUSAL,
    STEP,
    VERSION,
    About,
    LogWriter,
    entry,
    read_log,
)
from jilju.account.recording import Viewer
from jilju.account.window import make_frame
from jilju.errors import ConfigError
from tests.account.recorded import UNIX_NS, Recorder, recorders, scripts
from tests.account.staged import Stage
from tests.backends.roofline import make_limits

ALL = Viewer(sees_all=True)
NONE = Counts(accepted=0, live=0, completed=0, cancelled=0, deadline=0, shed=0, failed=0, refused=0, restarts=0)


def about(recorder: Recorder, counts: Counts = NONE) -> About:
    at_ns = recorder.stage.clock.now_ns()
    return About(
        model="staged", version="1", started_ns=recorder.started_ns, begun_ns=at_ns, unix_ns=UNIX_NS + at_ns, counts=counts,
        is_ready=True, plan=recorder.stage.plan,
    )  # fmt: skip


class Scribe:
    """What a server appends, as it happens."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.data = recorder, bytearray(entry(INFO, recorder.stage.engine.info))
        recorder.stage.log.listen(lambda step: self.data.extend(entry(STEP, step)))
        recorder.stage.log.watch(self)

    def on_enter(self, number, tenant, at_ns) -> None: ...

    def on_leave(self, number, at_ns) -> None: ...

    def on_engine(self, is_ready, at_ns) -> None:
        self.data += entry(ENGINE, (is_ready, at_ns))

    def end(self) -> bytes:
        source = self.recorder.recording()
        self.data += b"".join(entry(CALL, call) for call in source.calls)
        self.data += b"".join(entry(REFUSAL, refusal) for refusal in source.refusals)
        return bytes(self.data + entry(END, source.now_ns - 1))


def written(path: Path, recorder: Recorder, script: list[tuple]) -> None:
    """A whole life in a file."""
    first, scribe = about(recorder), Scribe(recorder)
    for happening in script:
        recorder.play(*happening)
    recorder.finish()
    path.unlink(missing_ok=True)
    writer = LogWriter(path, 1 << 30)
    writer.open(first)
    writer.write(scribe.end())
    writer.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recorders(), scripts(), st.data())
def test_a_file_shows_the_frames_of_its_server(tmp_path, recorder, script, data):
    path = tmp_path / "e.jlog"
    written(path, recorder, script)
    live, recorded = recorder.recording(), read_log(path)
    assert (recorded.now_ns, recorded.counts, recorded.info) == (live.now_ns, live.counts, live.info)
    ends = data.draw(st.lists(st.integers(live.first_ns, live.now_ns), max_size=4))
    for end_ns in (*ends, live.now_ns):
        for seconds in (1, 60):
            begin_ns = end_ns - seconds * 10**9
            wanted = msgspec.structs.replace(make_frame(live, begin_ns, end_ns, ALL), is_live=False, memory=None)
            found = make_frame(recorded, begin_ns, end_ns, ALL)
            imbalance = msgspec.structs.replace(found.tiles, imbalance=wanted.tiles.imbalance)
            assert found.tiles.imbalance == 0
            assert msgspec.structs.replace(found, tiles=imbalance) == wanted


BUSY = [("submit", 9, 5, 0), ("steps", 4, 0, 0), ("submit", 20, 8, 1), ("refuse", 0, 0, 0), ("steps", 9, 0, 0)]


def busy(path: Path) -> Recorder:
    recorder = Recorder(Stage(make_limits(64, 4, 4, 16)))
    written(path, recorder, BUSY)
    return recorder


def test_a_file_that_was_cut_off_is_good_up_to_there(tmp_path):
    path = tmp_path / "e.jlog"
    busy(path)
    whole, full = path.read_bytes(), read_log(path)
    num_steps, seen = len(full.log.steps), set()
    head_bytes = 12 + 5 + struct.unpack_from("<I", whole, 12)[0]
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        try:
            found = read_log(path)
        except ConfigError as error:
            assert size < head_bytes and str(path) in error.message, "only the head may be missing"
            continue
        seen.add(len(found.log.steps))
        assert list(found.log.steps) == list(full.log.steps)[: len(found.log.steps)]
        assert found.calls == full.calls[: len(found.calls)]
    assert seen == set(range(num_steps + 1))


def test_what_is_no_event_log_is_refused(tmp_path):
    path = tmp_path / "e.jlog"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_log(path)
    path.write_bytes(b"GGUF and more")
    with pytest.raises(ConfigError, match="is no event log: its first bytes are b'GGUF and'"):
        read_log(path)
    path.write_bytes(struct.pack("<8sI", MAGIC, VERSION + 1))
    with pytest.raises(ConfigError, match=f"of version {VERSION + 1}; this jilju reads version {VERSION}"):
        read_log(path)
    busy(path)
    data = bytearray(path.read_bytes())
    data[12:17] = struct.pack("<IB", 1 << 31, 1)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged at byte 12: an entry of 2147483648 bytes"):
        read_log(path)
    path.write_bytes(struct.pack("<8sIIB", MAGIC, VERSION, 3, STEP) + b"abc")
    with pytest.raises(ConfigError, match="damaged at byte 12"):
        read_log(path)


def test_an_older_log_is_kept_beside_and_nothing_else_is_touched(tmp_path):
    recorder, path = Recorder(Stage(make_limits(64, 4, 4, 16))), tmp_path / "e.jlog"
    older = tmp_path / "e.jlog.1"
    first, second = LogWriter(path, 1 << 30), LogWriter(path, 1 << 30)
    first.open(about(recorder))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="which another server is writing"):
        second.open(about(recorder))
    first.write(entry(END, 77))
    first.close()
    before = path.read_bytes()
    second.open(about(recorder))
    second.close()
    assert older.read_bytes() == before and read_log(path).calls == []
    path.write_text("a letter")
    with pytest.raises(ConfigError, match="is there and is no event log"):
        first.open(about(recorder))
    assert path.read_text() == "a letter"
    with pytest.raises(ConfigError, match="is no file"):
        LogWriter(tmp_path, 1 << 30).open(about(recorder))
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        LogWriter(tmp_path / "none" / "e.jlog", 1 << 30).open(about(recorder))


def test_a_full_file_makes_room_for_another(tmp_path):
    """Both are whole, and the second says what the counts were when it was begun."""
    recorder, path = Recorder(Stage(make_limits(64, 4, 4, 16))), tmp_path / "e.jlog"
    writer = LogWriter(path, 1)
    writer.open(about(recorder))
    steps = []
    recorder.stage.log.listen(lambda step: steps.append(step))
    for happening in BUSY:
        recorder.play(*happening)
    half = len(steps) // 2
    assert writer.write(b"".join(entry(STEP, step) for step in steps[:half]))
    counts = msgspec.structs.replace(NONE, accepted=5, completed=3, live=2, refused=4)
    writer.rotate(about(recorder, counts), recorder.stage.engine.info)
    writer.write(b"".join(entry(STEP, step) for step in steps[half:]))
    writer.close()
    first, second = read_log(tmp_path / "e.jlog.1"), read_log(path)
    assert [*first.log.steps, *second.log.steps] == [msgspec.structs.replace(step, rows=b"") for step in steps]
    assert second.info == recorder.stage.engine.info
    assert (second.counts.completed, second.counts.refused, second.counts.live) == (3, 4, 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")  # noqa: PTH110
def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path):
    writer = LogWriter(tmp_path / "e.jlog", 1 << 30)
    writer.open(about(Recorder(Stage(make_limits(64, 4, 4, 16)))))
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, writer._file.fileno())
    os.close(descriptor)
    with pytest.raises(OSError, match="No space left"):
        writer.write(entry(END, 1))
    writer.close()
