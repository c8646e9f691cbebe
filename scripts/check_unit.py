"""The unit of systemd, verified by systemd's own tool and, where systemd-nspawn can boot, run by a real systemd.

In a folder that holds a whole system with jilju in /opt/jilju. Knows nothing of how that came to be.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from serving import MODEL, CheckFailed, Client, children

UNIT = Path(__file__).parents[1] / "deploy" / "jilju.service"
BOOT_S, READY_S, STOP_S = 30, 60, 30
KEY = "a-key-for-this-check"


def verify_unit(root: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        print(f"SKIPPED: {UNIT.name} (systemd-analyze is not there)")
        return
    shutil.copy(UNIT, root / "etc/systemd/system")
    command = ["chroot", str(root), "systemd-analyze", "verify", "--man=no", UNIT.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    about = [line for line in done.stdout.splitlines() if "jilju" in line]
    if done.returncode or about:
        raise CheckFailed(f"{UNIT.name}: {done.stdout}")
    print(f"{UNIT.name}: systemd-analyze has nothing to say")


def run_unit(root: Path, port: int, model: Path | None) -> None:
    """Boot the folder with the unit as the only goal, ask, kill the engine, ask again, stop."""
    if shutil.which("systemd-nspawn") is None:
        print(f"SKIPPED: {UNIT.name} is not run (systemd-nspawn is not there; Debian has it in systemd-container)")
        return
    settings = {"MODEL": MODEL, "PORT": port, "API_KEY": KEY, "CONTEXT": 1024, "KV_MEMORY": "256MiB"}
    file = root / "etc/jilju.env"
    file.touch(mode=0o600)
    file.write_text("".join(f"JILJU_{name}={value}\n" for name, value in settings.items()))
    if model is not None:  # given to whatever user the unit gets when it starts
        (root / "var/cache/private").mkdir(mode=0o700, exist_ok=True)
        (root / "var/cache/private/jilju/models").mkdir(parents=True)
        shutil.copy(model, root / "var/cache/private/jilju/models")
    (root / "etc/machine-id").unlink(missing_ok=True)
    (root / "etc/machine-id").touch()

    boot = ["systemd-nspawn", "--quiet", f"--directory={root}", "--register=no", "--keep-unit", "--console=pipe"]
    boot += ["/lib/systemd/systemd", f"systemd.unit={UNIT.name}"]
    environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    log = root.parent / "machine.log"
    with log.open("w") as out:
        machine = subprocess.Popen(boot, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        init = booted(machine)
        if init is None:
            said = " ".join(log.read_text(errors="replace").split())[-300:]
            print(
                f"SKIPPED: {UNIT.name} is not run (systemd does not boot in a container here: {said or 'it says nothing'})"
            )
            return
        watch(init, Client(f"http://127.0.0.1:{port}", KEY))
    finally:
        for pid in children(machine.pid) if machine.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        machine.wait(STOP_S)


def inside(init: int, *command: str) -> str:
    """What a command prints that runs in the booted system."""
    enter = ["nsenter", f"--target={init}", "--mount", "--pid", "--cgroup", "--root", "--wd"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=False).stdout.strip()


def booted(machine: subprocess.Popen[bytes]) -> int | None:
    """The pid of its first process, once that answers."""
    deadline = time.monotonic() + BOOT_S
    while time.monotonic() < deadline and machine.poll() is None:
        for init in children(machine.pid):
            if inside(init, "systemctl", "show", "--property=Version", "--value"):
                return init
        time.sleep(0.2)
    return None


def watch(init: int, client: Client) -> None:
    def shown(name: str) -> str:
        return inside(init, "systemctl", "show", f"--property={name}", "--value", UNIT.name)

    def failed(text: str) -> CheckFailed:
        return CheckFailed(f"{UNIT.name}: {text}\n{inside(init, 'journalctl', '--no-pager', '-u', UNIT.name)}")

    def engine() -> str:
        server = shown("MainPID")
        return inside(init, "cat", f"/proc/{server}/task/{server}/children")

    def wait_ready(other_than: str = "") -> None:
        deadline = time.monotonic() + READY_S
        while not client.is_ready() or engine() in ("", other_than):
            if time.monotonic() > deadline or shown("ActiveState") == "failed":
                raise failed("it did not get ready")
            time.sleep(0.2)

    wait_ready()
    server, first = shown("MainPID"), engine()
    owner = inside(init, "stat", "--format=%U", f"/proc/{server}")
    print(f"{UNIT.name}: started by systemd as user {owner}, answered {client.ask('Hello!')!r}")
    inside(init, "kill", "-KILL", first)
    wait_ready(other_than=first)
    client.ask("Hello!")
    if (shown("MainPID"), shown("NRestarts")) != (server, "0"):
        raise failed("it did not outlive its engine")
    inside(init, "systemctl", "stop", UNIT.name)
    end = shown("Result"), shown("ExecMainStatus")
    if end != ("success", "0"):
        raise failed(f"stopped with {end}")
    print(f"{UNIT.name}: outlived a kill of its engine, stopped with status 0")
