"""Do what the Dockerfile's last stage says, on a copy of this machine's files, and run what comes out as a container would.

The copy is an overlay that is thrown away; it stands for the base image (Debian with Python). In it the steps install the
wheel of dist/; then the image's command runs as its user, alone in its space of processes, with no right to write but to
its volume, and its health check and its signal are tried. The unit of systemd is checked in the same place, where its
command exists. What is not checked is said at the end. Needs root, and a kernel that lets root mount overlays.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from check_unit import run_unit, verify_unit
from dockerfile import Image, carry_out, described, last_stage
from serving import MODEL, CheckFailed, children, model_file, serving

ROOT = Path(__file__).parents[1]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEY = "check=a-key-for-this-check"
LIMITS = {"JILJU_MODEL": MODEL, "JILJU_CONTEXT": "1024", "JILJU_KV_MEMORY": "256MiB"}


def main() -> int:
    if os.geteuid() != 0:
        return skip("it mounts a copy of this machine's files, which only root can do")
    with tempfile.TemporaryDirectory(prefix="jilju-image-") as folder:
        inside = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, "inside", folder]
        probe = subprocess.run([*inside[:-2], "probe", folder], capture_output=True, text=True, check=False)
        if probe.returncode:
            return skip(f"no overlay can be mounted here: {' '.join(probe.stderr.splitlines()[-1:])}")
        return subprocess.run(inside, check=False).returncode


def skip(reason: str) -> int:
    print(f"SKIPPED: the image and the unit ({reason})")
    return 0


def mount_copy(folder: Path, *below: Path) -> Path:
    """The files of these folders, the first on top, to change freely: what is changed is kept apart in folder / "upper"."""
    upper, work, root = folder / "upper", folder / "work", folder / "root"
    for path in (upper, work, root):
        path.mkdir(parents=True)
    options = f"lowerdir={':'.join(map(str, below))},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
    return root


def offer_python(root: Path) -> str:
    """A PATH with `python`, as the base image has it; every user may come to it."""
    python = Path("/usr/bin") / f"python{sys.version_info.major}.{sys.version_info.minor}"
    venv = [str(python), "-c", "import ensurepip, venv"]
    if not python.exists() or subprocess.run(venv, stderr=subprocess.DEVNULL, check=False).returncode:
        python = Path(sys.executable).resolve()
    for parent in [root / parent.relative_to("/") for parent in python.parents]:
        parent.chmod(parent.stat().st_mode | 0o011)
    link = root / python.parent.relative_to("/") / "python"
    if not link.exists():
        link.symlink_to(python.name)
    return f"{python.parent}:{SYSTEM_PATH}"


def check(folder: Path) -> None:
    steps = last_stage((ROOT / "Dockerfile").read_text())
    root = mount_copy(folder / "image", Path("/"))
    for name in ("dev", "proc", "sys"):
        subprocess.run(["mount", "--rbind", f"/{name}", root / name], check=True)
    base_path = offer_python(root)
    image = described(steps, base_path)
    carry_out(steps, root, base_path, ROOT, {("wheel", "/dist"): ROOT / "dist"})
    print(f"Dockerfile: the last stage's {len(steps)} steps were carried out")
    verify_unit(root)
    (volume,) = image.volumes
    system = mount_copy(folder / "system", folder / "image" / "upper", Path("/"))  # with jilju installed
    (system / volume.lstrip("/")).rmdir()  # the unit has its own
    run_unit(system, free_port(), model_file())

    # from here on only the volume and /tmp can be written to: docker run --read-only --tmpfs /tmp
    state = (root / volume.lstrip("/")).stat()
    kept = folder / "volume"
    kept.mkdir()
    if (model := model_file()) is not None:  # else it is fetched
        (kept / "models").mkdir()
        shutil.copy(model, kept / "models")
    for path in [kept, *kept.rglob("*")]:
        os.chown(path, state.st_uid, state.st_gid)
    kept.chmod(state.st_mode)
    subprocess.run(["mount", "--bind", kept, root / volume.lstrip("/")], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmp", root / "tmp"], check=True)
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    run_container(image, root)


def as_user(image: Image, given: dict[str, str], command: list[str]) -> list[str]:
    """The command as the image's user, with its variables and those given, with no way to more rights."""
    uid, _, gid = image.user.partition(":")
    rights = ["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    variables = [f"{name}={value}" for name, value in (image.environment | given).items()]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", *rights, "env", "-i", *variables, *command]


def run_container(image: Image, root: Path) -> None:
    outside = {"PATH": SYSTEM_PATH}
    alone = ["unshare", "--pid", "--mount", "--fork", "--kill-child", f"--root={root}", "--mount-proc", "--wd=/"]
    start = image.entry + image.command

    done = subprocess.run(
        [*alone, *as_user(image, {}, start)], env=outside, capture_output=True, text=True, check=False
    )
    if done.returncode != 1 or "--api-key" not in done.stderr:
        raise CheckFailed(f"without a key it is to refuse; status {done.returncode}: {done.stderr}")
    print("without a key: refused")

    if image.ports != [8000] or image.environment["JILJU_PORT"] != "8000":
        raise CheckFailed("EXPOSE and JILJU_PORT differ")
    given = LIMITS | {"JILJU_API_KEY": KEY, "JILJU_PORT": str(free_port())}

    def health(variables: dict[str, str]) -> int:
        command = ["chroot", str(root), *as_user(image, variables, image.health)]
        return subprocess.run(command, env=outside, stdout=subprocess.DEVNULL, check=False).returncode

    command = [*alone, *as_user(image, given, start)]
    with serving(command, outside, lambda pid: children(pid)[0]) as server:
        before = health(given)
        client = server.wait_ready(KEY.partition("=")[2])
        ready, strange = health(given), health(given | {"JILJU_API_KEY": "another-key"})
        if (before, ready, strange) != (1, 0, 1):
            raise CheckFailed(f"health check: {before} at the start, {ready} when ready, {strange} with a wrong key")
        print("health check: 1 before it is ready, 0 when it is, 1 with a wrong key")
        (first,) = children(server.process.pid)
        owners = {Path(f"/proc/{pid}").stat().st_uid for pid in (first, *children(first))}
        if owners != {int(image.user.partition(":")[0])} or not children(first):
            raise CheckFailed(f"the processes belong to {owners}")
        print(f"as user {image.user}, nothing to write to but the volume: answered {client.ask('Hello!')!r}")
        if signal.Signals[image.stop_signal] != signal.SIGTERM:
            raise CheckFailed("STOPSIGNAL is not the one that jilju ends well with")
    print(f"{image.stop_signal} to process 1: status 0")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


def run(mode: str, folder: Path) -> int:
    """In a space of mounts of its own: they end with this process."""
    subprocess.run(["mount", "-t", "tmpfs", "jilju-image", folder], check=True)
    if mode == "probe":
        mount_copy(folder / "probe", Path("/"))
        return 0
    try:
        check(folder)
    except CheckFailed as error:
        print(f"FAILED: {error}")
        return 1
    docker = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False)
    reason = "try `docker build .`" if docker and docker.returncode == 0 else "no docker answers here"
    print(f"not checked ({reason}): the base image, and the first stage, which builds the wheel as `make wheel` does")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) == 3 else main())
