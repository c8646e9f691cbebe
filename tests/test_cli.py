"""The command line as a user types it: in a process of its own, with a model that is at hand."""

import signal
import subprocess
import sys

import click
import pytest

from jilju.cli import commands
from jilju.config import SERVE_OPTIONS
from tests.system.conftest import needs_smollm2


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jilju", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "command",
    [(), ("serve",), ("chat",), ("generate",), ("tokenize",), ("pull",), ("models",), ("cache",), ("bench",), ("bench", "quality"),
     ("trace",), ("view",), ("bench", "machine"), ("bench", "model"), ("bench", "serve"), ("bench", "engine"), ("bench", "sampling"), ("bench", "contention"), ("bench", "bars")],
)  # fmt: skip
def test_help_is_there_and_shows_examples(command):
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert "Example" in done.stdout


def test_every_option_is_explained():
    found = list(commands.commands.values())
    found += found[[command.name for command in found].index("bench")].commands.values()
    for command in found:
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{command.name} {option.opts[0]}"


@pytest.mark.parametrize("option", SERVE_OPTIONS, ids=lambda option: option.flag)
def test_help_of_serve_says_variable_and_default(option):
    told = next(o.help for o in commands.commands["serve"].params if option.flag in o.opts)
    assert option.help in told
    assert f"[{option.variable}]" in told
    assert "Default: " in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "no-such-model"), ["no-such-model", "smollm2-135m", ".gguf"]),
        (("serve", "smollm2-135m", "--port", "99999"), ["--port", "65535"]),
        (("serve", "smollm2-135m", "--host", "0.0.0.0"), ["--host", "--api-key", "--insecure"]),
        (("generate", "x", "-m", "/no/such/file.gguf"), ["/no/such/file.gguf"]),
        (("pull", "no-such-model"), ["no-such-model", "smollm2-135m"]),
    ],
)  # fmt: skip
def test_an_error_is_one_line_without_a_traceback(arguments, words):
    done = run(*arguments)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jilju: ")
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "1,none"), ["--rows", "1,none", "numbers from 1 on"]),
        (("--peers", "nobody"), ["--peers", "nobody", "llama.cpp"]),
    ],
)
def test_lists_of_a_benchmark_are_checked(arguments, words):
    done = run("bench", "model", "no-such-model", *arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr


def test_a_peer_that_is_not_installed_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("bench", "model", "no-such-model", "--peers", "openvino")
    assert done.returncode == 1
    assert ".venv-openvino" in done.stderr and "make peers" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("serve", "gemma3-270m"), ("chat", "gemma3-270m"), ("generate", "x", "-m", "gemma3-270m"), ("pull", "gemma3-270m"),
     ("tokenize", "x", "-m", "gemma3-270m")],
)  # fmt: skip
def test_terms_are_not_asked_for_outside_a_terminal(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path))
    monkeypatch.delenv("JILJU_ACCEPT_LICENCE", raising=False)
    done = run(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "https://ai.google.dev/gemma/terms" in done.stderr and "--accept-licence gemma" in done.stderr
    assert not list(tmp_path.iterdir())
    assert "not accepted yet" in run("models").stdout


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    done = run("generate", "x", "-m", str(path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr
    assert "allowed" in done.stderr


def test_unknown_flags_are_refused():
    done = run("serve", "--turbo")
    assert done.returncode == 2
    assert "--turbo" in done.stderr


@needs_smollm2
def test_tokenize_prints_pieces_and_ids():
    done = run("tokenize", "-m", "smollm2-135m", "나는 오늘 학교에 간다")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    raw = b"".join(
        bytes.fromhex("".join(row[row.index(row_id) + 1 :])) for row in rows for row_id in [row[-1 - _hex_count(row)]]
    )
    assert raw.decode() == "나는 오늘 학교에 간다"
    assert f"{len(rows)} tokens, 12 characters, 30 bytes" in done.stdout


def _hex_count(row: list[str]) -> int:
    """Trailing two-digit hex columns of a row, the bytes; the id stands before them."""
    count = 0
    while (
        len(row) - count > 1
        and len(row[-1 - count]) == 2
        and all(c in "0123456789abcdef" for c in row[-1 - count])
        and count < len(row) - 3
    ):
        count += 1
    return count


@needs_smollm2
def test_a_terminal_that_knows_few_characters_is_served(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("tokenize", "-m", "smollm2-135m", "한")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 characters, 3 bytes" in done.stdout


@needs_smollm2
def test_generate_is_repeatable_and_reads_standard_input():
    arguments = ("generate", "-m", "smollm2-135m", "--max-tokens", "8", "--temperature", "0")
    first, second = run(*arguments, "The sky is"), run(*arguments, "-", stdin="The sky is")
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout != "\n"
    assert "3 tokens in, 8 out, ended by length" in first.stderr


@needs_smollm2
def test_chat_answers_line_by_line():
    done = run(
        "chat", "smollm2-135m", "--max-tokens", "6", "--temperature", "0", "--context", "512", stdin="Hi\n/new\nHi\n"
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.strip().splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1], "after /new the conversation starts over"


@needs_smollm2
def test_chat_goes_on_after_a_message_that_is_too_long():
    done = run("chat", "smollm2-135m", "--max-tokens", "4", "--temperature", "0", "--context", "64",
               stdin="Hi\n" + "long " * 100 + "\n/new\nHi\n")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = done.stdout.strip().splitlines()
    assert len(answers) == 2 and answers[0] == answers[1]
    assert "the context of 64" in done.stderr and "/new" in done.stderr


@needs_smollm2
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "smollm2-135m", "--kv-memory", "1KiB"), ["--kv-memory", "block of 16 tokens", "368640"]),
        (("serve", "smollm2-135m", "--kv-memory", "999999GiB"), ["available", "--kv-memory"]),
        (("serve", "smollm2-135m", "--context", "100000"), ["--context", "8192"]),
        (("bench", "quality", "smollm2-135m", "--text", "{latin}"), ["--text", "UTF-8", "byte 1"]),
    ],
)
def test_settings_that_do_not_fit_are_one_line(arguments, words, tmp_path):
    (latin := tmp_path / "latin.txt").write_bytes(b"\x41\xff")
    done = run(*(argument.replace("{latin}", str(latin)) for argument in arguments))
    assert done.returncode == 1
    assert len(lines := done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_bind_that_is_refused_fetches_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path))
    assert "--insecure" in run("serve", "--host", "0.0.0.0").stderr
    assert not list(tmp_path.iterdir())


@needs_smollm2
def test_an_interrupt_stops_the_answer_and_not_the_chat():
    process = subprocess.Popen(
        [sys.executable, "-m", "jilju", "chat", "smollm2-135m", "--context", "1024", "--seed", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("Write a story of a thousand words about a runner.\n")
    process.stdin.flush()
    first = process.stdout.read(40)  # the answer has begun
    process.send_signal(signal.SIGINT)
    stopped = process.stdout.readline()
    while not stopped.endswith("[stopped]\n"):
        assert stopped, "the chat ended with the answer"
        stopped = process.stdout.readline()
    rest, _ = process.communicate("Say hi.\n", timeout=60)
    assert first
    assert rest.strip(), "no answer after the stopped one"
    assert process.returncode == 0


@needs_smollm2
def test_models_lists_names_sizes_and_sources():
    done = run("models")
    assert done.returncode == 0
    assert "smollm2-135m" in done.stdout
    assert "qwen2.5-coder-0.5b (default)" in done.stdout
    assert "cache:" in done.stdout


def test_the_packed_cache_is_shown_and_emptied(tmp_path, monkeypatch):
    monkeypatch.setenv("JILJU_CACHE", str(tmp_path))
    folder = tmp_path / "packed"
    done = run("cache")
    assert (done.returncode, done.stdout) == (0, f"0 B in {folder}\n")
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    (folder / "abc.packed").write_bytes(bytes(3 << 20))
    done = run("cache")
    assert "3.0 MiB" in done.stdout and "unknown" in done.stdout and f"3.0 MiB in {folder}" in done.stdout
    assert f"3.0 MiB removed from {folder}" in run("cache", "--clear").stdout
    assert list(folder.iterdir()) == []
    assert "is off" in run("cache", "--packed-cache", "off").stdout
    folder.chmod(0o755)
    done = run("cache")
    assert done.returncode == 1 and str(folder) in done.stderr and "mode 755" in done.stderr
