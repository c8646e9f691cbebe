"""Starts a server on the small model and runs the tests of the clients in each of their environments."""

import os
import subprocess
import sys
from pathlib import Path

from tests.system.conftest import Server

MODEL = "smollm2-135m"
FOLDER = Path(__file__).parent


def main(environments: list[str]) -> int:
    server = Server(MODEL, "--kv-memory", "512MiB")
    failed = 0
    try:
        for environment in environments:
            print(f"{environment}:", flush=True)
            command = [f"{environment}/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
            command += ["--rootdir", str(FOLDER), str(FOLDER)]
            failed += bool(
                subprocess.run(command, env=os.environ | {"JILJU_URL": server.url, "JILJU_MODEL": MODEL}).returncode
            )
    finally:
        failed += bool(server.stop())
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
