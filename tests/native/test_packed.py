"""The packed cache: a file is used only if every bit of it is right and it belongs to this very model file."""

import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jilju.backends.native import _kernels, file_sum, packed
from jilju.backends.native.packed import (
    HEADER_BYTES,
    MAX_FILES,
    PIECE_BYTES,
    PackedCache,
    PackedLayout,
    clear_packed,
    list_packed,
)
from jilju.backends.native.private_folder import PrivateFolder

ROOT = Path(__file__).parents[2]
SIZES = (3000, PIECE_BYTES + 100, 64, 20_000)  # of the weights; one reaches over a piece
MASK = 2**64 - 1


def make_layout(version: str = "test-1", sizes=SIZES) -> PackedLayout:
    entries, offset = [], 0
    for weight_id, num_bytes in enumerate(sizes):
        entries.append((weight_id, offset, num_bytes))
        offset += -(-num_bytes // 64) * 64
    return PackedLayout(version, entries, (b"ints", b"reals"))


LAYOUT = make_layout()


def pack(weight_id: int, out: np.ndarray) -> None:
    out[:] = np.random.default_rng(weight_id).integers(0, 256, out.size, np.uint8)


def forbidden(weight_id: int, out: np.ndarray) -> None:
    raise AssertionError("packed again")


def silent(done: int, total: int, text: str) -> None:
    pass


WANTED = packed.pack_into_memory(LAYOUT, pack, silent, num_threads=2)


class Place:
    """A folder for the cache and a model file, whose sum is remembered however new it is."""

    def __init__(self, path: Path, huge_pages: bool):
        self.folder, self.source = path / "packed", path / "model.gguf"
        self.huge_pages = huge_pages
        self.source.write_bytes(b"weights" * 1000)

    def cache(self) -> PackedCache:
        return PackedCache(self.folder, self.source, self.source.stat(), num_threads=2, huge_pages=self.huge_pages)

    def find(self, layout: PackedLayout = LAYOUT) -> np.ndarray | None:
        return self.cache().find(layout)

    def make(self, layout: PackedLayout = LAYOUT, pack=pack, progress=silent) -> np.ndarray:
        return self.cache().make(layout, pack, progress)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.packed"))

    def temporary(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture(params=[False, True], ids=["mapped", "huge pages"])
def place(tmp_path, monkeypatch, request):
    monkeypatch.setattr(file_sum, "SETTLED_NS", -(10**18))
    monkeypatch.setattr(packed, "READ_BYTES", 1000)  # several reads, the last one short
    return Place(tmp_path, request.param)


@pytest.fixture
def filled(place):
    place.make()
    return place


def flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


# ---- made, found ----------------------------------------------------------------------------------------------------


def test_what_is_made_is_found_bit_for_bit_and_read_only(place):
    assert place.find() is None
    made = place.make()
    found = place.find()
    for data in (made, found):
        assert np.array_equal(data, WANTED) and not data.flags.writeable
        assert data.ctypes.data % 64 == 0, "kernels load whole cache lines"
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in place.folder.iterdir()] == [0o600, 0o600]
    assert place.temporary() == []


def test_progress_runs_from_nothing_to_all(place):
    told = []
    place.make(progress=lambda *far: told.append(far))
    done = [far[0] for far in told]
    assert done == sorted(done) and done[0] == 0 and done[-1] == sum(SIZES)
    assert {far[1:] for far in told} == {(sum(SIZES), "packing weights")}


def test_largest_weights_begin_first(place):
    begun = []
    packed.pack_into_memory(LAYOUT, lambda i, out: begun.append(out.size), silent, num_threads=1)
    assert begun == sorted(SIZES, reverse=True)


def test_an_error_in_packing_is_told_and_leaves_nothing(place):
    def fail(weight_id: int, out: np.ndarray) -> None:
        raise ValueError("no such weight")

    with pytest.raises(ValueError, match="no such weight"):
        place.make(pack=fail)
    assert place.files() == [] and place.temporary() == []


def test_a_listener_that_is_gone_ends_the_packing(place):
    def gone(*far) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        place.make(progress=gone)


# ---- damage ---------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(offset=st.integers(0, HEADER_BYTES + LAYOUT.num_bytes - 1), mask=st.integers(1, 255))
def test_a_flipped_bit_anywhere_is_noticed(filled, caplog, offset, mask):
    (path,) = filled.files()
    flip(path, offset, mask)
    caplog.clear()
    assert filled.find() is None
    assert f"{path} is not used and made anew" in caplog.text
    flip(path, offset, mask)
    assert filled.find() is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(num_bytes=st.integers(0, HEADER_BYTES + LAYOUT.num_bytes + 5000))
def test_a_file_of_another_length_is_noticed(filled, num_bytes):
    (path,) = filled.files()
    whole = path.read_bytes()
    os.truncate(path, num_bytes)
    assert (filled.find() is None) == (num_bytes != len(whole))
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("offset", "num_bytes", "reason"),
    [
        (0, 8, "no packed file"),  # magic
        (8, 4, "of version"),
        (12, 4, "of version"),  # header bytes
        (16, 32, "another model file or for another layout"),  # layout
        (48, 32, "another model file or for another layout"),  # the model file's sum
        (80, 8, "another model file or for another layout"),  # data bytes
        (88, 8, "the data's sum"),
    ],
)
def test_a_header_that_is_sound_but_foreign_is_not_used(filled, caplog, offset, num_bytes, reason):
    (path,) = filled.files()
    whole = bytearray(path.read_bytes())
    whole[offset : offset + num_bytes] = bytes(255 - b for b in whole[offset : offset + num_bytes])
    head = np.frombuffer(bytes(whole[: HEADER_BYTES - 8]), np.uint8)
    whole[HEADER_BYTES - 8 : HEADER_BYTES] = _kernels.checksum(head, 0).to_bytes(8, "little")
    path.write_bytes(whole)
    assert filled.find() is None
    assert reason in caplog.text


def test_pieces_that_change_places_are_noticed(place):
    layout = make_layout(sizes=(3 * PIECE_BYTES,))
    place.make(layout)
    (path,) = place.files()
    whole = path.read_bytes()
    first, second = HEADER_BYTES + PIECE_BYTES, HEADER_BYTES + 2 * PIECE_BYTES
    path.write_bytes(whole[:HEADER_BYTES] + whole[first:second] + whole[HEADER_BYTES:first] + whole[second:])
    assert place.find(layout) is None


def test_a_damaged_file_is_replaced(filled):
    (path,) = filled.files()
    flip(path, HEADER_BYTES + 5, 1)
    assert filled.find() is None
    filled.make()
    assert np.array_equal(filled.find(), WANTED) and filled.files() == [path]


def test_another_layout_has_another_file(filled):
    for other in (make_layout("test-2"), make_layout(sizes=SIZES[::-1])):
        assert filled.find(other) is None
    assert PackedLayout("test-1", LAYOUT.entries, (b"intsr", b"eals")).digest != LAYOUT.digest
    assert filled.find() is not None


# ---- the model file -------------------------------------------------------------------------------------------------


def test_a_changed_model_file_finds_nothing_though_size_and_time_stay(filled):
    before = filled.source.stat()
    data = filled.source.read_bytes()
    filled.source.write_bytes(data[:-1] + b"!")
    os.utime(filled.source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert filled.find() is None
    filled.source.write_bytes(data)
    assert filled.find() is not None


def test_a_touched_moved_or_copied_model_file_finds_its_weights(filled):
    filled.source.touch()
    assert filled.find() is not None
    copy = filled.source.with_name("copy.gguf")
    copy.write_bytes(filled.source.read_bytes())
    filled.source.unlink()
    filled.source = copy
    assert filled.find() is not None


def test_a_model_file_that_is_replaced_after_it_was_opened_is_not_mixed_up(filled, caplog):
    cache = filled.cache()
    other = filled.source.with_name("other")
    other.write_bytes(b"WEIGHTS" * 1000)
    other.replace(filled.source)
    assert cache.find(LAYOUT) is None
    assert np.array_equal(cache.make(LAYOUT, pack, silent), WANTED)
    assert "was changed after it was opened" in caplog.text
    assert len(filled.files()) == 1


def test_a_model_file_that_changes_while_it_is_packed_leaves_no_file(place, caplog):
    def change(weight_id: int, out: np.ndarray) -> None:
        place.source.write_bytes(b"WEIGHTS" * 1000)
        pack(weight_id, out)

    assert np.array_equal(place.make(pack=change), WANTED)
    assert place.files() == [] and place.temporary() == []
    assert "was changed after it was opened" in caplog.text


def test_a_sum_is_computed_once(filled, monkeypatch):
    monkeypatch.setattr(file_sum.hashlib, "file_digest", forbidden)
    assert filled.find() is not None


def test_the_sum_of_a_file_that_was_just_written_is_not_remembered(tmp_path):
    place = Place(tmp_path, huge_pages=False)
    place.make()
    assert not (place.folder / file_sum.LIST_NAME).exists()
    assert place.find() is not None


def test_the_list_of_sums_is_bounded(filled):
    for index in range(file_sum.MAX_SUMS + 3):
        filled.source = filled.source.with_name(f"{index}.gguf")
        filled.source.write_bytes(bytes([index]))
        filled.find()
    with PrivateFolder.open(filled.folder) as folder:
        known = file_sum._read_list(folder)
    assert len(known) == file_sum.MAX_SUMS
    assert known[0].stamp.inode == filled.source.stat().st_ino


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(data=st.data())
def test_a_damaged_list_of_sums_never_leads_to_other_weights(filled, data):
    path = filled.folder / file_sum.LIST_NAME
    whole = path.read_bytes()
    offset = data.draw(st.integers(0, len(whole) - 1))
    flip(path, offset, data.draw(st.integers(1, 255)))
    found = filled.find()
    assert found is None or np.array_equal(found, WANTED)
    assert np.array_equal(filled.make(), WANTED)
    path.write_bytes(whole)


# ---- private --------------------------------------------------------------------------------------------------------


def not_used(place: Place, caplog, reason: str) -> None:
    """Packed weights are made in memory, with a warning, and nothing is left behind."""
    before = sorted(place.folder.iterdir()) if place.folder.is_dir() else []
    caplog.clear()
    assert place.find() is None
    assert np.array_equal(place.make(), WANTED)
    assert reason in caplog.text and caplog.records[0].levelno == logging.WARNING
    assert (sorted(place.folder.iterdir()) if place.folder.is_dir() else []) == before


def test_a_folder_that_others_may_use_is_not(place, caplog):
    place.folder.mkdir(mode=0o700)
    place.folder.chmod(0o750)
    not_used(place, caplog, "others may use it (mode 750)")


def test_a_linked_folder_is_not_followed(place, caplog, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.folder.symlink_to(tmp_path / "elsewhere")
    not_used(place, caplog, "cannot be used")


def test_a_file_in_the_folders_place_is_no_folder(place, caplog):
    place.folder.write_text("")
    not_used(place, caplog, "cannot be used")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(place, caplog):
    place.folder.mkdir(mode=0o700)
    os.chown(place.folder, 12345, -1)
    not_used(place, caplog, "belongs to user 12345")


def test_a_file_that_others_may_write_is_replaced(filled, caplog):
    (path,) = filled.files()
    path.chmod(0o602)
    assert filled.find() is None and "others may use it (mode 602)" in caplog.text
    filled.make()
    assert filled.find() is not None and stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_read(filled, kind, tmp_path):
    (path,) = filled.files()
    path.rename(tmp_path / "real")
    if kind == "link":
        path.symlink_to(tmp_path / "real")
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir(mode=0o700)
    assert filled.find() is None
    assert np.array_equal(filled.make(), WANTED)
    assert (filled.find() is None) == (kind == "folder"), "a folder cannot be replaced, but does no harm"


# ---- no room, two at once, death ------------------------------------------------------------------------------------

PROGRAM = """
    import sys, time
    from pathlib import Path
    from tests.native.test_packed import *

    place = Place.__new__(Place)
    place.folder, place.source = Path(sys.argv[1]) / "packed", Path(sys.argv[1]) / "model.gguf"
    place.huge_pages = sys.argv[3] == "True"
    def slowly(weight_id, out):
        pack(weight_id, out)
        print("packed", weight_id, flush=True)
        time.sleep(float(sys.argv[2]))
    """


def start(place: Place, wait_s: float, code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    return subprocess.Popen(
        [*command, str(place.source.parent), str(wait_s), str(place.huge_pages)],
        env=environment,
        text=True,
        stdout=-1,
        stderr=-1,
    )


def test_a_full_disk_is_a_warning_and_no_signal(place):
    child = start(
        place,
        0,
        f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({PIECE_BYTES}, {PIECE_BYTES}))
        assert np.array_equal(place.make(), WANTED)
        assert place.files() == [] and place.temporary() == []
        """,
    )
    _, told = child.communicate(timeout=60)
    assert child.returncode == 0, told
    assert "are kept in memory and made again at the next start" in told


def test_a_room_that_is_missing_is_found_out_before_packing(place, monkeypatch, caplog):
    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    made = []
    assert np.array_equal(place.make(pack=lambda i, out: (made.append(i), pack(i, out))), WANTED)
    assert sorted(made) == list(range(len(SIZES))), "each weight was packed once"
    assert "No space left on device" in caplog.text and place.files() == [] and place.temporary() == []


def test_two_that_start_at_once_both_have_whole_weights(place):
    children = [start(place, 0.05, "assert np.array_equal(place.make(pack=slowly), WANTED)") for _ in range(2)]
    for child in children:
        _, told = child.communicate(timeout=60)
        assert (child.returncode, told) == (0, "")
    assert np.array_equal(place.find(), WANTED)
    assert len(place.files()) == 1 and place.temporary() == []


def test_a_death_in_the_middle_leaves_nothing_that_is_found_and_its_rest_is_removed(place):
    child = start(place, 60, "place.make(pack=slowly)")
    assert child.stdout is not None
    child.stdout.readline()  # a weight is packed, the others are not
    (rest,) = place.temporary()
    assert place.find() is None
    place.make(make_layout("another"))  # removes what dead ones left; this one lives
    assert rest in place.temporary()
    child.kill()
    child.communicate()
    assert place.find() is None and rest in place.temporary()
    place.make()
    assert place.temporary() == [] and np.array_equal(place.find(), WANTED)


def test_a_load_that_is_killed_by_the_kernel_leaves_the_file_of_the_last_one(filled):
    child = start(filled, 60, "place.make(pack=slowly)")
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert np.array_equal(filled.find(), WANTED)


# ---- how many are kept ----------------------------------------------------------------------------------------------


def test_the_files_used_last_are_kept(place):
    layouts = [make_layout(str(n)) for n in range(MAX_FILES + 1)]
    for layout in layouts[:-1]:
        place.make(layout)
        time.sleep(0.01)
    assert place.find(layouts[0]) is not None  # so it counts as used last
    time.sleep(0.01)
    place.make(layouts[-1])
    assert [place.find(layout) is not None for layout in layouts] == [True, False] + [True] * (MAX_FILES - 1)


def test_a_mapped_file_may_be_removed(filled):
    found = filled.find()
    assert [shown.model_file for shown in list_packed(filled.folder)] == ["model.gguf"]
    size = sum(path.stat().st_size for path in filled.folder.iterdir())
    assert clear_packed(filled.folder) == size
    assert list(filled.folder.iterdir()) == [] and list_packed(filled.folder) == []
    assert np.array_equal(found, WANTED)


def test_where_nothing_was_kept_there_is_nothing_to_show(place):
    assert list_packed(place.folder) == [] and clear_packed(place.folder) == 0
    assert not place.folder.exists()


def test_what_is_not_ours_is_left_alone(filled):
    (filled.folder / "notes.txt").write_text("mine")
    clear_packed(filled.folder)
    assert [path.name for path in filled.folder.iterdir()] == ["notes.txt"]


# ---- the checksum ---------------------------------------------------------------------------------------------------


def checksum_by_definition(data: bytes, seed: int) -> int:
    def mix(h: int, word: int) -> int:
        h ^= word
        return (h << 29 & MASK | h >> 35) * 0xD1B54A32D192ED03 & MASK

    lanes = [seed + 0x9E3779B97F4A7C15 * (lane + 1) & MASK for lane in range(8)]
    filled_up = data + bytes(-len(data) % 64)
    for offset in range(0, len(filled_up), 8):
        lane = offset // 8 % 8
        lanes[lane] = mix(lanes[lane], int.from_bytes(filled_up[offset : offset + 8], "little"))
    total = mix(seed, len(data))
    for lane in lanes:
        total = mix(total, lane)
    total ^= total >> 32
    total = total * 0xD1B54A32D192ED03 & MASK
    return total ^ total >> 29


@given(data=st.binary(max_size=400), seed=st.integers(0, MASK))
def test_the_checksum_is_what_it_says(data, seed):
    assert _kernels.checksum(np.frombuffer(data, np.uint8), seed) == checksum_by_definition(data, seed)


@given(data=st.binary(min_size=1, max_size=400), others=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255))))
def test_another_piece_has_another_checksum(data, others):
    changed = bytearray(data)
    for offset, mask in others:
        changed[offset % len(data)] ^= mask
    sums = [_kernels.checksum(np.frombuffer(bytes(piece), np.uint8), 0) for piece in (data, changed)]
    assert (sums[0] == sums[1]) == (bytes(changed) == data)
    longer = np.frombuffer(data + b"\0", np.uint8)
    assert _kernels.checksum(longer, 0) != sums[0]
