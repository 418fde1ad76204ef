"""Tests of pgod and pgoctl: pure helpers first, then the real programs with real parts.

Needs root, a Docker engine, git, OpenSSH; `.ci/test` installs and starts what is missing. The
sections mirror pgod.py's. Whatever a test makes carries a name of its own (`Lab.name`), by which
the lab removes it at the end, also when the test failed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import pgoctl
import pgod

HERE = Path(__file__).resolve().parent
SESSION = secrets.token_hex(3)  # two suites at one time must not share what they make
IMAGE = f"pgotest-{SESSION}:1"
USERS = (f"pgt{SESSION}ann", f"pgt{SESSION}ben")
GIT_IDENTITY = {f"GIT_{who}_{what}": "pgotest@localhost" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}
PATIENCE = 30.0  # seconds that a condition is waited for before the test has failed

# ---- Lab ---------------------------------------------------------------------------------------


def run(*words: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command of the test's own; its output as text."""
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL,
               "timeout": 120} | options
    if "input" in options:
        del options["stdin"]
    done = subprocess.run([str(word) for word in words], check=False, **options)
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done


def docker(*words: str, check: bool = True) -> str:
    return run("docker", *words, check=check).stdout.strip()


def until(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """Wait for a condition to be true; its value."""
    end = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {patience} s: {what or condition}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def process_environment(**more: str) -> dict[str, str]:
    """What the programs under test are started with: nothing of the tester's own settings."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | more


class Repository:
    """A bare repository and a checkout that pushes to it, both owned by nobody in particular."""

    def __init__(self, folder: Path, branch: str = "main") -> None:
        self.bare, self.work, self.branch = folder / "bare.git", folder / "work", branch
        folder.mkdir(parents=True)
        run("git", "init", "-q", "--bare", "-b", branch, self.bare)
        run("git", "init", "-q", "-b", branch, self.work)
        self.git("remote", "add", "origin", str(self.bare))

    def git(self, *words: str) -> str:
        return run("git", "-c", "safe.directory=*", "-C", self.work, *words,
                   env=os.environ | GIT_IDENTITY).stdout.strip()

    def push(self, files: Mapping[str, str | bytes | None], message: str = "change") -> str:
        """Write (None: remove) files, commit, push; the commit."""
        for name, content in files.items():
            path = self.work / name
            if content is None:
                self.git("rm", "-q", "-r", name)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                path.unlink()
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.git("add", "-A", "-f")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.send()

    def send(self) -> str:
        self.git("push", "-q", "-f", "origin", f"HEAD:{self.branch}")
        return self.git("rev-parse", "HEAD")


def compose_file(command: str = "sleep 100000", **keys: Any) -> str:
    """A compose file (JSON is YAML) with one service `web`; keys=... join it."""
    top = keys.pop("top", {})
    web = {"image": IMAGE, "command": command, "init": True, "stop_grace_period": "1s"} | keys
    services = {"web": web} | keys.pop("services", {})
    web.pop("services", None)
    return json.dumps({"services": services} | top)


class Pgod:
    """A running pgod."""

    def __init__(self, lab: Lab, *options: str, env: Mapping[str, str] | None = None,
                 python: str = sys.executable) -> None:
        self.lab = lab
        self.log_file = lab.folder / "pgod.log"
        self.start = self.log_file.stat().st_size if self.log_file.exists() else 0
        words = [python, str(HERE / "pgod.py"), "--config", str(lab.config), "--dir",
                 str(lab.directory), "--datadir", str(lab.datadir), "--ssh",
                 f"127.0.0.1:{lab.ssh_port}", "--metric", f"127.0.0.1:{lab.metric_port}",
                 "--duration", lab.duration, *options]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=process_environment(**(env or {})))

    def log(self) -> str:
        """What this one has logged."""
        with self.log_file.open("rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace")

    def wait_ready(self) -> Pgod:
        until(lambda: "follows" in self.log() or self.process.poll() is not None, "pgod started")
        assert self.process.poll() is None, self.log()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(40)


class Lab:
    """A folder with repositories, keys and a configuration; and the cleaning up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"t{secrets.token_hex(3)}"
        self.directory, self.datadir = folder / "lib", folder / "data"
        self.config = folder / "pgo.toml"
        self.ssh_port, self.metric_port = free_port(), free_port()
        self.duration = "2s"
        self.services: dict[str, dict[str, Any]] = {}
        self.repositories: dict[str, Repository] = {}
        self.daemons: list[Pgod] = []
        self.exits = contextlib.ExitStack()
        self.home = folder / "home"
        self.home.mkdir()

    def key(self, name: str = "id") -> Path:
        """A private key, made at first use; its public half is beside it."""
        path = self.folder / f"key-{name}"
        if not path.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@test", "-f", path)
        return path

    def service(self, short: str, files: Mapping[str, str | bytes | None] | None = None,
                key: str = "id", **keys: Any) -> str:
        """A repository with a key and a compose file, and its entry; the service's name."""
        name = f"{self.name}-{short}" if short else self.name
        repository = self.repositories[name] = Repository(self.folder / "repositories" / name)
        public = self.key(key).with_suffix(".pub").read_text()
        repository.push({"ssh/id.pub": public, "compose.yaml": compose_file()} | dict(files or {}))
        self.services[name] = {"name": name, "user": USERS[0],
                               "repository": str(repository.bare)} | keys
        self.write_config()
        return name

    def write_config(self) -> None:
        lines = []
        for keys in self.services.values():
            lines.append("[[services]]")
            lines += [f"{key} = {toml_value(value)}" for key, value in keys.items()]
        self.config.write_text("\n".join(lines) + "\n")
        self.config.chmod(0o600)

    def start(self, *options: str, ready: bool = True, **more: Any) -> Pgod:
        daemon = Pgod(self, *options, **more)
        self.daemons.append(daemon)
        return daemon.wait_ready() if ready else daemon

    @property
    def daemon(self) -> Pgod:
        return self.daemons[-1]

    def push(self, name: str, files: Mapping[str, str | bytes | None]) -> str:
        return self.repositories[name].push(files)

    def state(self, name: str) -> dict[str, Any]:
        """pgod's state file of a service."""
        try:
            return dict(json.loads((self.directory / ".pgod" / name / "state.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def runs(self, name: str, commit: str) -> None:
        """Wait until that commit runs."""
        until(lambda: self.state(name).get("commit") == commit
              and not self.state(name)["deploying"], f"{name} runs {commit}")

    def failed(self, name: str, commit: str) -> str:
        """Wait until that commit has failed and nothing is owed; the reason."""
        until(lambda: self.state(name).get("failed_commit") == commit
              and not self.state(name)["owes_rollback"], f"{name} failed {commit}")
        return str(self.state(name)["failed_reason"])

    def ssh(self, request: str, *options: str, key: str = "id", check: bool = False,
            **more: Any) -> subprocess.CompletedProcess[str]:
        """One exec request by OpenSSH."""
        return run(*self.ssh_words(request, *options, key=key), check=check, **more)

    def ssh_words(self, request: str, *options: str, key: str = "id") -> list[str]:
        return ["ssh", "-F", "/dev/null", "-p", str(self.ssh_port), "-i", str(self.key(key)),
                "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
                "-o", f"UserKnownHostsFile={self.folder}/known", "-o",
                "StrictHostKeyChecking=accept-new", *options, "any@127.0.0.1", request]

    def containers(self, name: str, *options: str) -> dict[str, str]:
        """Container name to identity, of a project."""
        lines = docker("ps", "-a", "--no-trunc", "--filter",
                       f"label=com.docker.compose.project={name}", *options,
                       "--format", "{{.Names}} {{.ID}}").splitlines()
        return dict(line.split() for line in lines)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metric_port}/metrics",
                                    timeout=10) as page:
            return str(page.read().decode())

    def end(self) -> None:
        """End what runs and remove what carries the lab's name."""
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.stop()
        self.exits.close()
        for kind, remove, listing in (
                ("container", ["rm", "-f", "-v"], ["ps", "-a", "--format", "{{.Names}}"]),
                ("network", ["network", "rm"], ["network", "ls", "--format", "{{.Name}}"]),
                ("volume", ["volume", "rm", "-f"], ["volume", "ls", "--format", "{{.Name}}"]),
                ("image", ["rmi", "-f"], ["image", "ls", "--format",
                                          "{{.Repository}}:{{.Tag}}"])):
            names = [n for n in docker(*listing).splitlines() if self.name in n]
            if names:
                docker(*remove, *names, check=kind != "container")


def toml_value(value: Any) -> str:
    """JSON's strings, numbers and lists are TOML's; tables are not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def busybox_tar(folder: Path, extra: Mapping[str, str] | None = None) -> Path:
    """A tar of a tiny root with a static busybox."""
    root = folder / "root"
    for part in ("bin", "tmp", "etc"):
        (root / part).mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(os.path.realpath(busybox), root / "bin" / "busybox")
    for applet in run(busybox, "--list").stdout.split():
        if applet != "busybox" and not (root / "bin" / applet).is_symlink():
            (root / "bin" / applet).symlink_to("busybox")
    for name, content in (extra or {}).items():
        (root / name).write_text(content)
    tar = folder / "image.tar"
    run("tar", "-C", root, "-cf", tar, ".")
    return tar


@pytest.fixture(scope="session", autouse=True)
def _machine() -> Iterator[None]:
    """The engine, an image and two users; the users and the image are removed at the end."""
    assert os.geteuid() == 0, "the tests need root: they start containers of two users"
    assert run("docker", "info", check=False).returncode == 0, "no Docker engine: run .ci/test"
    with tempfile.TemporaryDirectory(prefix="pgotest-") as folder:
        docker("import", str(busybox_tar(Path(folder))), IMAGE)
    for user in USERS:
        run("useradd", "--create-home", user, check=False)
    yield
    for user in USERS:
        run("userdel", "--remove", user, check=False)
    docker("rmi", "-f", IMAGE)


@contextlib.contextmanager
def make_lab() -> Iterator[Lab]:
    """A lab whose folder can be entered by the services' users; it is cleaned up at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pgotest-"))
    folder.chmod(0o755)
    made = Lab(folder)
    try:
        yield made
    finally:
        for daemon in made.daemons:
            print(f"---- pgod ----\n{daemon.log()}")
        try:
            made.end()
        finally:
            shutil.rmtree(folder)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab of the test's own."""
    with make_lab() as made:
        yield made


# ---- Service -----------------------------------------------------------------------------------


def test_pushed_commit_runs_and_is_steered_over_ssh(lab: Lab) -> None:
    name = lab.service("a")
    lab.start()
    first = lab.repositories[name].git("rev-parse", "HEAD")
    lab.runs(name, first)
    before = lab.containers(name)
    assert list(before) == [f"{name}-web-1"]
    ping = lab.ssh(f"{name}//ping")
    assert (ping.returncode, ping.stdout) == (0, "pong\n"), ping.stderr
    assert lab.ssh(f"{name}//git hash").stdout.strip() == first
    second = lab.push(name, {"compose.yaml": compose_file("sleep 200000")})
    lab.runs(name, second)
    after = lab.containers(name)
    assert list(after) == list(before)
    assert after != before
