"""Dockerfiles: the last stage of one, carried out in a folder that stands for its base image.

Owns the few instructions that ours uses; any other is refused. Knows nothing of where the folder comes from or what runs in it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from serving import CheckFailed


@dataclass
class Image:
    """What an image says of the containers that run it."""

    environment: dict[str, str]
    user: str = "0:0"
    command: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, rest) of each instruction, lines that go on joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parted = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in parted]


def last_stage(text: str) -> list[tuple[str, str]]:
    """What follows the last FROM."""
    found = instructions(text)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start + 1 :]


def described(steps: list[tuple[str, str]], base_path: str) -> Image:
    """What the instructions say of containers; those that change files are left out."""
    image = Image({"PATH": base_path})
    for name, rest in steps:
        if name == "ENV":
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                image.environment[key] = re.sub(r"\$(\w+)", lambda m: image.environment[m[1]], value)
        elif name == "USER":
            image.user = rest
        elif name == "EXPOSE":
            image.ports += map(int, rest.split())
        elif name == "VOLUME":
            image.volumes += rest.split()
        elif name == "STOPSIGNAL":
            image.stop_signal = rest
        elif name == "ENTRYPOINT":
            image.entry = json.loads(rest)
        elif name == "CMD":
            image.command = json.loads(rest)
        elif name == "HEALTHCHECK":
            image.health = json.loads(rest.partition("CMD")[2])
        elif name not in ("RUN", "COPY"):
            raise CheckFailed(f"the Dockerfile's {name} is not one of the instructions that this check knows")
    return image


def carry_out(
    steps: list[tuple[str, str]], root: Path, base_path: str, context: Path, stages: dict[tuple[str, str], Path]
) -> None:
    """Change the files below `root` as RUN and COPY say; `stages` has the folders of other stages, by stage and path."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    environment |= {"PATH": base_path, "HOME": "/root", "PIP_QUIET": "1"}
    for name, rest in steps:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                shutil.copy(context / source, root / target.lstrip("/"))
        elif name == "RUN":
            options, command = re.fullmatch(r"((?:--\S+\s+)*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
            bound = [_bind(option, root, stages) for option in options.split()]
            done = subprocess.run(["chroot", root, "/bin/sh", "-c", command], env=environment, check=False)
            for mounted in bound:
                subprocess.run(["umount", mounted], check=True)
            if done.returncode:
                raise CheckFailed(f"RUN {command}: status {done.returncode}")


def _bind(option: str, root: Path, stages: dict[tuple[str, str], Path]) -> Path:
    given = dict(part.partition("=")[::2] for part in option.removeprefix("--mount=").split(","))
    if given.get("type") != "bind":
        raise CheckFailed(f"RUN {option} is not one of the options that this check knows")
    target = root / given["target"].lstrip("/")
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", stages[given["from"], given["source"]], target], check=True)
    return target
