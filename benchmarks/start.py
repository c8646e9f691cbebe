"""Time from the start of `jilju serve` to the first token of an answer: the first start, which packs, and those after it.

The model is in the cache folder and its file in the page cache.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request


def start_to_first_token(model: str, packed_cache: str) -> tuple[float, float]:
    """(seconds until the address is printed, seconds until the first token's chunk)."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "jilju", "serve", model, "--port", "0", "--log-level", "warning"]
    environment = os.environ | {"JILJU_PACKED_CACHE": packed_cache}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = next(m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        ready = time.monotonic()
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 1}
        request = urllib.request.Request(
            url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            answer.readline()
            return ready - begin, time.monotonic() - begin
    finally:
        server.terminate()
        server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "qwen2.5-coder-0.5b"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for model in arguments.models:
        start_to_first_token(model, "off")  # the file is in the page cache from here on
        with tempfile.TemporaryDirectory() as folder:
            packing, _ = start_to_first_token(model, folder)
            runs = [start_to_first_token(model, folder) for _ in range(arguments.repeats)]
        ready, first = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"{model}: ready after {ready:.2f} s, first token after {first:.2f} s (medians of {arguments.repeats}); "
            f"the first start, which packs, {packing:.2f} s"
        )


if __name__ == "__main__":
    main()
