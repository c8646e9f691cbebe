"""Whether the `jilju serve` of this container or machine is ready: exit status 0, or 1 and a line that says why not.

Knows the server's port and keys from the same variables (JILJU_PORT, JILJU_API_KEY, JILJU_API_KEY_FILE), and nothing that is
given as a flag. Where no key may ask for readiness, it is enough that the server answers.
"""

import sys
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from jilju.config import resolve_serve_config
from jilju.errors import ConfigError
from jilju.serve.door.key_file import keys_of

TIMEOUT_S = 4


def main() -> int:
    try:
        config = resolve_serve_config(None, {})
        keys = keys_of(config)
        may_look = [key.secret for key in keys if "metrics" in key.scopes]
        path = "/readyz" if may_look or not keys else "/livez"
        headers = {"x-api-key": may_look[0]} if may_look else {}
        request = Request(f"http://127.0.0.1:{config.port}{path}", headers=headers)
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            print(path, answer.read(200).decode())
            return 0
    except HTTPError as error:
        print(f"{error}: {error.read(200).decode(errors='replace')}")
    except (OSError, ConfigError) as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
