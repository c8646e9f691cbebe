"""Configuration: order of sources, origins, and refusals that say what is allowed."""

import pytest

from jilju.assemble.engine import choose_huge_pages
from jilju.config import (
    SERVE_OPTIONS,
    ApiKey,
    ServeConfig,
    check_device,
    cpu_quota_cores,
    engine_config,
    parse_bytes,
    resolve_serve_config,
    usable_cores,
)
from jilju.errors import ConfigError


def test_flag_beats_variable_beats_default():
    config = resolve_serve_config(None, {"port": "1234"}, {"JILJU_PORT": "9", "JILJU_MAX_ROWS": "7"})
    assert (config.port, config.max_rows, config.step_tokens) == (1234, 7, ServeConfig().step_tokens)
    assert [config.origins[n] for n in ("port", "max_rows", "step_tokens")] == ["--port", "JILJU_MAX_ROWS", "default"]


def test_a_variable_that_is_set_to_nothing_is_not_set():
    config = resolve_serve_config(None, {}, {"JILJU_MODEL": "", "JILJU_PORT": "", "JILJU_API_KEY": ""})
    assert (config.model, config.port, config.api_key) == (ServeConfig().model, ServeConfig().port, ())
    assert set(config.origins.values()) == {"default"}


def test_every_setting_has_an_origin_and_a_field():
    config = resolve_serve_config(None, {}, {})
    assert set(config.origins) == {"model"} | {option.name for option in SERVE_OPTIONS}
    assert all(hasattr(config, option.name) for option in SERVE_OPTIONS)


def test_hosts_are_names_or_addresses():
    hosts = ("Chat.example.org", "10.0.0.7", "::1", "[fe80::2]")
    assert resolve_serve_config(None, {"allow_host": hosts}, {}).allow_host == hosts
    assert resolve_serve_config(None, {}, {"JILJU_ALLOW_HOST": "a.example,b.example"}).allow_host == (
        "a.example",
        "b.example",
    )


def test_settings_of_the_door(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = resolve_serve_config(
        None,
        {"api_key_file": "keys.toml", "lenient": True, "allow_request_template": True},
        {"JILJU_ALLOW_ORIGIN": "https://a.example,http://B.example:3000", "JILJU_SHARED_PREFIX_CACHE": "yes"},
    )
    assert config.api_key_file == str(tmp_path / "keys.toml")
    assert config.allow_origin == ("https://a.example", "http://b.example:3000")
    assert config.lenient and config.shared_prefix_cache and config.allow_request_template
    plain = resolve_serve_config(None, {}, {})
    assert not (plain.lenient or plain.shared_prefix_cache or plain.allow_request_template or plain.allow_origin)
    assert plain.api_key_file is None


def test_numbers():
    config = resolve_serve_config(None, {"price": "2.75"}, {"JILJU_WATTS": "0"})
    assert (config.price, config.watts) == (2.75, 0.0)
    assert resolve_serve_config(None, {}, {}).price is None


def test_with_auto_makes_a_new_config():
    config = resolve_serve_config(None, {"threads": "auto"}, {})
    assert config.threads is None
    filled = config.with_auto("threads", 2, "cores")
    assert (filled.threads, filled.origins["threads"], config.threads) == (2, "auto: cores", None)


def test_a_folder_is_made_absolute_and_off_and_auto_stay_what_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, wanted in (("x", str(tmp_path / "x")), ("~/y", "/home/somebody/y"), ("off", "off"), ("auto", None)):
        assert resolve_serve_config(None, {"packed_cache": given}, {}).packed_cache == wanted
        assert engine_config("m", packed_cache=given).packed_cache == wanted
    assert engine_config("m", packed_cache=None).packed_cache is None
    with pytest.raises(ConfigError, match=r"packed_cache is 7; allowed: None, 'off', or a folder"):
        engine_config("m", packed_cache=7)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("10k", 10_000), ("3 kib", 3072)],
)
def test_bytes(text, count):
    assert parse_bytes(text, "--kv-memory") == count


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "65536"}, ["--port", "65536", "0 to 65535"]),
        ({"port": "eighty"}, ["--port", "eighty"]),
        ({"max_rows": "0"}, ["--max-rows", "1 to 256"]),
        ({"kv_memory": "-1GiB"}, ["--kv-memory", "-1GiB", "512MiB"]),
        ({"kv_memory": "1e999"}, ["--kv-memory"]),
        ({"kv_memory": "99999999999999999999999GiB"}, ["--kv-memory", "1024 TiB"]),
        ({"kv_memory": "9" * 400}, ["--kv-memory", "1024 TiB"]),
        ({"threads": "9" * 30}, ["--threads", "auto"]),
        ({"log_format": "xml"}, ["--log-format", "text, json"]),
        ({"host": ""}, ["--host", "empty"]),
        ({"packed_cache": ""}, ["--packed-cache", "auto, off, or a folder"]),
        ({"packed_cache": "~nobody-here/x"}, ["--packed-cache", "~nobody-here/x", "a folder"]),
        ({"allow_host": ("*",)}, ["--allow-host", "'*'", "without scheme"]),
        ({"allow_host": ("good.example", "foo:8000")}, ["--allow-host", "foo:8000", "port"]),
        ({"allow_host": ("https://foo",)}, ["--allow-host", "https://foo"]),
        ({"api_key": ("short",)}, ["--api-key", "8 printable"]),
        ({"api_key": ("a=12345678", "a=87654321")}, ["distinct"]),
        ({"api_key": ("a=12345678", "b=12345678")}, ["--api-key", "a and b", "the same secret"]),
        ({"api_key_file": "~nobody-here/x"}, ["--api-key-file", "~nobody-here/x", "a file"]),
        ({"api_key_file": ""}, ["--api-key-file", "empty"]),
        ({"allow_origin": ("https://a.example/x",)}, ["--allow-origin", "https://a.example/x", "scheme://host"]),
        ({"lenient": "maybe"}, ["--lenient", "true or false"]),
        ({"price": "-1"}, ["--price", "'-1'", "0 to 1000000"]),
        ({"price": "nan"}, ["--price", "'nan'", "such as 2.5"]),
        ({"price": "1e3"}, ["--price", "1e3"]),
        ({"watts": "1000000.5"}, ["--watts", "0 to 1000000"]),
        ({"usage_log": ""}, ["--usage-log", "empty"]),
    ],
)
def test_refusals_name_flag_given_and_allowed(flags, words):
    with pytest.raises(ConfigError) as caught:
        resolve_serve_config(None, flags, {})
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_secret_is_never_in_a_refusal():
    with pytest.raises(ConfigError) as caught:
        resolve_serve_config(None, {"api_key": ("team=se cret-words",)}, {})
    assert "cret-words" not in caught.value.message


def test_keys_have_names():
    config = resolve_serve_config(None, {"api_key": ("team=12345678", "no-name-but-long")}, {})
    assert config.api_key == (ApiKey("team", "12345678"), ApiKey("key2", "no-name-but-long"))


def test_cores_are_those_of_the_affinity():
    cores, reason = usable_cores()
    assert cores >= 1
    assert reason


@pytest.mark.parametrize(
    ("limit", "usable", "quota"),
    [
        (None, 4, 4), ("max 100000", 4, 4), ("150000 100000", 2, 1.5), ("50000 100000", 1, 0.5), ("800000 100000", 4, 4),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_or_of_the_quota_if_that_is_less(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, usable: int, quota: float
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr("jilju.config._cgroup_text", lambda name: limit)
    assert (usable_cores()[0], cpu_quota_cores()) == (usable, quota)


def test_settings_of_an_engine_in_python():
    config = engine_config("m", context=None, kv_memory="1GiB", max_rows=4, step_tokens=64, threads=2, kv_dtype="int8")
    assert (config.model, config.context, config.kv_memory, config.threads) == ("m", None, 1 << 30, 2)
    assert config.kv_dtype == "int8"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_rows": 0}, ["max_rows is 0", "1 to 256"]),
        ({"max_rows": 257}, ["max_rows is 257", "None or a whole number from 1 to 256"]),
        ({"token_gap_ms": None}, ["token_gap_ms is None", "0 to 60000"]),
        ({"fast": 1}, ["fast is 1", "True, False"]),
        ({"fast": True}, ["fast is for a GPU", "--device cuda"]),
        ({"device": "gpu"}, ["device is 'gpu'", "'cpu', 'cuda'"]),
        ({"device": "cuda", "kv_dtype": "int8"}, ["kv_dtype is int8", "auto, bf16, f16, fp8"]),
        ({"step_tokens": "64"}, ["step_tokens is '64'", "16 to 8192"]),
        ({"threads": True}, ["threads is True", "None or a whole number"]),
        ({"context": -4}, ["context is -4", "16 to"]),
        ({"kv_memory": -5}, ["kv_memory is -5", "1GiB"]),
        ({"kv_dtype": "int4"}, ["kv_dtype is 'int4'", "'f16', 'int8'"]),
        ({"kv_memory": 1.5}, ["kv_memory is 1.5", "1GiB"]),
        ({"kv_memory": "lots"}, ["kv_memory is 'lots'", "512MiB"]),
    ],
)
def test_a_wrong_setting_of_an_engine_is_named_as_the_argument_is(given, words):
    with pytest.raises(ConfigError) as caught:
        engine_config("m", **given)
    assert all(word in caught.value.message for word in words), caught.value.message


@pytest.mark.parametrize(
    ("offered", "total", "wanted"),
    [("always [madvise] never", 50, "on"), ("[always] madvise never", 50, "on"), ("always madvise [never]", 50, "off"), ("always [madvise] never", 51, "off")],
)  # fmt: skip
def test_huge_pages_are_taken_where_they_are_offered_and_half_of_the_memory_suffices(
    monkeypatch, offered, total, wanted
):
    monkeypatch.setattr("jilju.config.Path.read_text", lambda path: offered)
    assert choose_huge_pages(total, 100)[0] == wanted


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kv_dtype": "int8", "threads": "2", "packed_cache": "off", "huge_pages": "on"},
        {"device": "cpu", "kv_dtype": "f16", "weight_dtype": "auto", "load_format": "dummy"},
        {"device": "cuda"},
        {"device": "cuda", "threads": "auto", "packed_cache": "auto", "huge_pages": "auto"},
        {"device": "cuda", "fast": True, "load_format": "dummy", "weight_dtype": "fp8", "kv_dtype": "fp8"},
        {"device": "cuda", "weight_dtype": "f16", "kv_dtype": "f16"},
        {"device": "cuda", "weight_dtype": "f16", "kv_dtype": "fp8"},
        {"device": "cuda", "weight_dtype": "bf16", "kv_dtype": "bf16"},
        {"device": "cuda", "kv_dtype": "f16"},  # the model's weights may be
        {"device": "cuda", "kv_dtype": "bf16"},
    ],
)
def test_settings_of_the_device_that_go_together(flags):
    check_device(resolve_serve_config("m", flags, {}))


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({"fast": True}, {}, ["--fast is for a GPU", "--device cuda"]),
        ({}, {"JILJU_FAST": "1"}, ["JILJU_FAST is for a GPU"]),
        ({"weight_dtype": "bf16"}, {}, ["--weight-dtype bf16 is for a GPU", "--device cuda"]),
        ({"kv_dtype": "bf16"}, {}, ["--kv-dtype is bf16", "cpu", "auto, f16, int8"]),
        ({"kv_dtype": "fp8"}, {}, ["--kv-dtype is fp8", "auto, f16, int8"]),
        ({"device": "cuda", "kv_dtype": "int8"}, {}, ["--kv-dtype is int8", "cuda", "auto, bf16, f16, fp8"]),
        ({"kv_dtype": "f16"}, {"JILJU_DEVICE": "cuda", "JILJU_WEIGHT_DTYPE": "fp8"}, ["--kv-dtype is f16", "fp8 weights", "auto, bf16, fp8"]),
        ({"device": "cuda", "weight_dtype": "f16", "kv_dtype": "bf16"}, {}, ["f16 weights", "auto, f16, fp8"]),
        ({"device": "cuda", "threads": "4"}, {}, ["--threads 4", "GPU", "--device cpu"]),
        ({"device": "cuda"}, {"JILJU_PACKED_CACHE": "/x"}, ["JILJU_PACKED_CACHE /x", "leave it out"]),
        ({"device": "cuda", "huge_pages": "off"}, {}, ["--huge-pages off"]),
    ],
)  # fmt: skip
def test_settings_of_the_device_that_contradict_each_other(flags, environ, words):
    with pytest.raises(ConfigError) as caught:
        check_device(resolve_serve_config("m", flags, environ))
    assert all(word in caught.value.message for word in words), caught.value.message
