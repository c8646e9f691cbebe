"""Whether the `jilju serve` of this container or machine is ready: exit status 0, or 1 and a line that says why not.

Knows the server's port and key from the same variables (JILJU_PORT, JILJU_API_KEY), and nothing that is given as a flag.
"""

import sys
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from jilju.config import resolve_serve_config
from jilju.errors import ConfigError

TIMEOUT_S = 4


def main() -> int:
    try:
        config = resolve_serve_config(None, {})
        headers = {"x-api-key": config.api_key[0].secret} if config.api_key else {}
        request = Request(f"http://127.0.0.1:{config.port}/readyz", headers=headers)
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            print(answer.read(200).decode())
            return 0
    except HTTPError as error:
        print(f"{error}: {error.read(200).decode(errors='replace')}")
    except (OSError, ConfigError) as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
