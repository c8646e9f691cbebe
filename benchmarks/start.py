"""Time from the start of `jilju serve` to the first token of an answer, the model being in the cache; median of several."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request


def start_to_first_token(model: str) -> tuple[float, float]:
    """(seconds until the address is printed, seconds until the first token's chunk)."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "jilju", "serve", model, "--port", "0", "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
        start_to_first_token(model)  # the file is in the page cache from here on
        runs = [start_to_first_token(model) for _ in range(arguments.repeats)]
        ready, first = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{model}: ready after {ready:.2f} s, first token after {first:.2f} s (medians of {arguments.repeats})")


if __name__ == "__main__":
    main()
