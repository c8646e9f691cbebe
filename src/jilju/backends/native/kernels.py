"""The compiled extension, loaded late: the package imports without it.

Owns the import and its error. Knows nothing of what the extension does.
"""

import importlib
from typing import Any

from jilju.errors import PlatformError


def import_kernels() -> Any:
    try:
        return importlib.import_module("jilju.backends.native._kernels")
    except ImportError as error:
        raise PlatformError(
            f"the native backend's extension is missing or does not load ({error}); "
            "reinstall jilju with a C++20 compiler at hand, or use the reference backend"
        ) from error
