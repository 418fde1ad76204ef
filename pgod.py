#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["asyncssh>=2.10.1"]
# ///
"""pgod: git decides what runs on this server.

pgod follows the git repositories of pgo.toml. Each holds a compose file, which pgod renders,
checks against a policy and brings up under a user of its own, and public keys in ssh/, whose
holders may steer that service over pgod's SSH port with pgoctl.

It runs as root. To read it before that, read downwards: a section uses only what stands above it.

    Tables          closed sets: limits, option and key tables
    Values          errors, the dataclasses that the rest passes around
    Parsing         durations, words, addresses, public keys: text to values
    Configuration   pgo.toml to Service values, with every error at once
    Files           atomic writes; paths beneath a root, opened without following links
    Metrics         what Prometheus reads
    Children        the one door to other programs
    Git             ask, fetch, export; the git folder lies outside the work tree
    Work tree       tracked files follow the commit, untracked ones are never touched
    Model           the rendered compose model: paths, files, differences (pure)
    Policy          what a repository may ask for (pure)
    State           what is known of a service across restarts
    Decisions       what to do, from what was observed (pure)
    Engine          docker and compose, for one service
    Service         the thread of one service: look, deploy, roll back, heal
    Commands        what a key holder may say
    SSH             the server that they say it to
    HTTP            /metrics, /healthz and webhooks
    Life            start, stale services, changes of the configuration, the end
    Demo            one service from nothing
    Command line    options and main
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import grp
import hashlib
import hmac
import http.server
import io
import json
import logging
import math
import os
import pwd
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tomllib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

VERSION = "0.1.0"
log = logging.getLogger("pgod")

# ---- Tables ------------------------------------------------------------------------------------

# Compose's own order of preference.
COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
BACKOFF_CEILING = 3600.0  # seconds between two tries of the same thing, at most
SAME_TIME_DEPLOYS = 4
SLOW_DEPLOY = 30.0  # seconds after which a deploy holds up no other
HEALTHY_LOOKS = 3  # that many looks in a row, a second apart, must be good
KEY_FILE_BYTES = 16 * 1024
KEY_COUNT = 100

# Deadlines of child processes, in seconds.
DEADLINE = {
    "ls-remote": 60.0, "fetch": 900.0, "git": 120.0, "render": 60.0, "login": 60.0,
    "pull": 1800.0, "build": 3600.0, "up": 600.0, "docker": 60.0, "reload": 30.0,
    "mount": 60.0,
}
# What a rendering may use: CPU seconds, bytes of data (address space is no measure: a Go program
# reserves far more than it uses), bytes of output. An alias bomb of 418 bytes runs for minutes, and
# `env_file: /dev/zero` takes all memory there is.
RENDER_CPU = 10
RENDER_MEMORY = 1 << 30
RENDER_OUTPUT = 4 << 20
CHILD_OUTPUT = 16 << 20

# Of pgod's own environment, children see these and nothing else.
PASSED_ENVIRONMENT = (
    "PATH", "LANG", "LC_ALL", "TZ", "DOCKER_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR")
# And git these: a compose file could show what credentials are in them.
GIT_ENVIRONMENT = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
                   "GIT_SSL_CAINFO")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SSH_UNPROVEN_BYTES = 64 * 1024  # what a client may send before it has proven a key
SSH_UNPROVEN = 100
SSH_UNPROVEN_PER_ADDRESS = 20
SSH_SESSIONS = 10  # at one time in one connection
SSH_SESSIONS_PER_KEY = 50
SSH_LOGIN_SECONDS = 20
SSH_COMMAND_BYTES = 64 * 1024
SSH_ARGUMENTS = 256
SSH_ALGORITHMS: dict[str, Any] = {
    "kex_algs": "mlkem768x25519-sha256,sntrup761x25519-sha512@openssh.com,curve25519-sha256,"
                "curve25519-sha256@libssh.org".split(","),
    "encryption_algs": "chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,"
                       "aes128-gcm@openssh.com,aes256-ctr,aes128-ctr".split(","),
    "mac_algs": "hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com".split(","),
    "compression_algs": ["none"],
    "signature_algs": [
        "ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521", "sk-ecdsa-sha2-nistp256@openssh.com", "rsa-sha2-512",
        "rsa-sha2-256"],
}
# docker's templates have functions; `pad` alone takes as much memory as it is told to.
PLAIN_TEMPLATE = re.compile(r"([^{}]|\{\{ *(json +)?\.\w* *\}\})*")
HTTP_CONNECTIONS = 100
HTTP_SECONDS = 10.0

# ---- Values ------------------------------------------------------------------------------------


class Fault(Exception):
    """Something did not work; the text is for a person. `retry`: trying again may help."""

    retry = True


class Refused(Fault):
    """The commit or the request is at fault: the same again will fail the same way."""

    retry = False


class EngineGone(Fault):
    """The engine does not answer, or ended meanwhile: no fault of any commit."""


class ConfigurationError(Exception):
    """pgo.toml is wrong; `errors` has every line that says why."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


class Stopping(Exception):
    """pgod is about to end: leave what you do."""


@dataclass(frozen=True)
class Account:
    """Who a child process or a file operation is: numbers of a user, its group and its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Registry:
    """One login: `docker login -u user address`, with the token on standard input."""

    address: str
    user: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Remote:
    """A repository's address without its credentials, and those as an HTTP header's value."""

    url: str
    authorization: str = field(default="", repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def scheme(self) -> str:
        """`https`, `ssh`, `git` or `file`."""
        head, mark, _ = self.url.partition("://")
        if mark:
            return head
        return "file" if self.url.startswith("/") else "ssh"


@dataclass(frozen=True)
class Reload:
    """`words` run in compose service `words[0]`'s container, or in `service`'s of that name."""

    service: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """An entry of pgo.toml. (What compose calls a service is a compose service here.)"""

    name: str
    user: str
    repository: Remote
    branch: str = "main"
    registries: tuple[Registry, ...] = ()
    compose: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    urls: tuple[tuple[str, str], ...] = ()
    networks: tuple[str, ...] = ()
    import_file: str = ""
    reload: Reload | None = None
    mount: str = ""
    deploy_key: str = ""
    profiles: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    webhook: str = field(default="", repr=False)
    wait: float = 120.0
    rollback: bool = True

    @property
    def trusted(self) -> bool:
        """For root's own repositories the policy is reported, not enforced."""
        return self.user == "root"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown. Short values of env would redact half of every line."""
        tokens = (r.token for r in self.registries)
        values = (*self.repository.secrets, *tokens, self.webhook,
                  *(value for _, value in self.env if len(value) >= 6))
        return tuple({form for value in values for form in (value, json.dumps(value)[1:-1])})

    def digest(self) -> str:
        """Changes when something changes that a deploy depends on."""
        parts = (self.user, self.repository.url, self.branch, self.compose, self.env,
                 self.networks, self.mount, self.profiles, self.allow)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Configuration:
    """A whole pgo.toml; `seal` changes when the file or an env_file it names changes."""

    services: tuple[Service, ...]
    seal: str
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(service.name for service in self.services)


@dataclass(frozen=True)
class Settings:
    """The command line, parsed."""

    config: Path = Path("/etc/pgo.toml")
    directory: Path = Path("/var/lib/pgo")
    datadir: Path = Path("/data")
    ssh: tuple[str, int] | None = ("", 2222)
    metric: tuple[str, int] | None = ("", 9112)
    duration: float = 300.0
    debug: bool = False
    restart: bool = True


@dataclass(frozen=True)
class Places:
    """Where a service's things lie. All but `worktree` and `data` are closed to containers."""

    service: str
    directory: Path
    datadir: Path

    @property
    def own(self) -> Path:
        return self.directory / ".pgod" / self.service

    @property
    def worktree(self) -> Path:
        return self.directory / self.service

    @property
    def stop(self) -> Path:
        return self.directory / f"{self.service}.stop"

    @property
    def data(self) -> Path:
        return self.datadir / self.service

    @property
    def export(self) -> Path:
        return self.own / "export"


@dataclass(frozen=True)
class PublicKey:
    """A key from ssh/: `fingerprint` as `ssh-keygen -l` shows it."""

    fingerprint: str
    comment: str

# ---- Parsing -----------------------------------------------------------------------------------

DURATION_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def parse_duration(text: str) -> float:
    """Seconds of a duration in Go's notation: 90s, 5m0s, 1h30m, 1.5h."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration; write it like 90s, 5m0s or 1h30m")
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def parse_interval(text: str) -> float:
    """A duration of more than nothing, in seconds."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError(f"{text!r} would leave no pause; give more than 0s")
    return seconds


def format_duration(seconds: float) -> str:
    """The two largest units: 3d4h, 2h5m, 4m7s, 12s."""
    left, parts = int(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return "".join(parts[:2])


def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port of `:2222`, `127.0.0.1:2222` or `[::1]:2222`; None of an empty text."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; write it like :2222 or 127.0.0.1:2222")
    return host.removeprefix("[").removesuffix("]"), int(port)


def remote_with_token(parts: urllib.parse.SplitResult) -> Remote:
    """An https address: user and token become a header that git gets by its environment."""
    host = parts.netloc.rpartition("@")[2]
    url = urllib.parse.urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    if parts.username is None:
        return Remote(url)
    raw = [text for text in (parts.username, parts.password) if text]
    user, token = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
    basic = base64.b64encode(f"{user}:{token}".encode()).decode()
    secrets = {basic, raw[-1], urllib.parse.unquote(raw[-1]),
               urllib.parse.quote(urllib.parse.unquote(raw[-1]), safe="")}
    return Remote(url, f"Authorization: Basic {basic}", tuple(sorted(secrets)))


def parse_remote(text: str) -> Remote:
    """A repository's address, with its credentials taken out of it."""
    if text.startswith("/"):
        return Remote(text)
    if re.fullmatch(r"[\w.-]+@[\w.-]+:[^\s]+", text):
        return Remote(text)
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("https", "ssh", "git", "file") or "\n" in text:
        raise ValueError("is not an https, ssh or git address or an absolute path")
    if parts.scheme == "file":
        return Remote(parts.path)
    if not parts.hostname or parts.hostname.startswith("-"):
        raise ValueError("has no host")
    if parts.scheme != "https":
        if parts.password:
            raise ValueError("has a password, which only https can take; use deploy_key")
        return Remote(text)
    return remote_with_token(parts)


def parse_registry(text: str, user: str) -> Registry:
    """`user:token@registry`, `:token@registry` or `token@registry`; the user defaults to `user`."""
    login, at, address = text.rpartition("@")
    name, colon, token = login.partition(":")
    if not colon:
        name, token = "", login
    if not at or not token or not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w./-]+)?", address):
        raise ValueError("is not a login of the form user:token@registry")
    return Registry(address, name or user, token)


def parse_reload(text: str) -> Reload:
    """`host:service//exec word word …`, words split as a shell would."""
    match = re.fullmatch(r"(?:[^/\s]*:)?([^/:\s]+)//exec\s+(.+)", text, re.DOTALL)
    if not match:
        raise ValueError("is not of the form localhost:SERVICE//exec COMMAND …")
    words = tuple(shlex.split(match[2]))
    if not words or words[0].startswith("-"):
        raise ValueError("has no command after exec")
    return Reload(match[1], words)


def parse_env_lines(text: str) -> tuple[tuple[str, str], ...]:
    """The NAME=VALUE lines of an env_file; blank ones and those with # in front are skipped."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, mark, value = line.partition("=")
        if not mark or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"line {number} is not of the form NAME=VALUE")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        pairs.append((name, value))
    return tuple(pairs)


def rsa_bits(blob: bytes) -> int:
    """Size of the modulus of an ssh-rsa key (RFC 4253, 6.6)."""
    for _ in range(3):
        length = int.from_bytes(blob[:4], "big")
        number, blob = blob[4:4 + length], blob[4 + length:]
    return int.from_bytes(number, "big").bit_length()


KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
             "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com", "ssh-rsa")


def key_fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def parse_public_key(line: str) -> PublicKey:
    """One line of a .pub file. Options in front of a key are refused: they would be ignored."""
    kind, _, rest = line.strip().partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    if kind not in KEY_TYPES:
        raise ValueError(f"{kind[:40]!r} is not a key type that is accepted")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("is not base64") from None
    if blob[4:4 + len(kind)] != kind.encode() or len(blob) < 4 + len(kind) + 8:
        raise ValueError("is not a key of the type it names")
    if kind == "ssh-rsa" and rsa_bits(blob) < 2048:
        raise ValueError("is an RSA key of under 2048 bits")
    return PublicKey(key_fingerprint(blob), re.sub(r"[^\x20-\x7e]", "?", comment)[:100])


def parse_key_file(data: bytes) -> tuple[list[PublicKey], str]:
    """The keys in a file of at most 16 KiB, one a line, and what is wrong with the other lines."""
    if len(data) > KEY_FILE_BYTES:
        return [], "has more than 16 KiB"
    keys, wrong = [], ""
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                keys.append(parse_public_key(line))
            except ValueError as error:
                wrong = wrong or f"line {number} {error}"
    return keys, wrong


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret in it as ***; longer ones first, for one may hold another."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean "x"?)`, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


COMPOSE_PROGRESS = re.compile(r"\s*(Container|Network|Volume|Image) \S+ +[A-Z][a-z]+\s*")


def one_line(text: str, limit: int = 300) -> str:
    """The last lines of a program's complaint, as one."""
    lines = [line.strip() for line in text.splitlines()
             if line.strip() and not COMPOSE_PROGRESS.fullmatch(line)]
    return " / ".join(lines[-4:])[-limit:]

# ---- Configuration -----------------------------------------------------------------------------

HOST_PATTERN = re.compile(
    r"(https?://)?(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*(:\d{1,5})?",
    re.IGNORECASE)
TARGET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:\d{1,5}")


def as_string(value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a string that is not empty")
    return value


def as_strings(value: object) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def matching(pattern: str, why: str) -> Callable[[object], str]:
    """A parser of strings; `why` ends the sentence about one that the pattern does not match."""
    def parse(value: object) -> str:
        if not re.fullmatch(pattern, as_string(value)):
            raise ValueError(f"{value!r} {why}")
        return as_string(value)
    return parse


as_file_in_repository = matching(r"(?!(.*/)?(\.|\.\.|\.git)?(/|$))[^\n]+",
                                 "must be a path inside the repository, without . or ..")
as_mount = matching(r"nfs://[A-Za-z0-9][A-Za-z0-9.:-]*/[^\s,]*",
                    "is not of the form nfs://server/path")
as_network = matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "is not a name of a network")
as_name = matching(NAME_PATTERN.pattern, "is not a name; use a-z 0-9 _ - (60 at most), "
                   "a letter or digit first")
# What `git check-ref-format --branch` takes.
as_branch = matching(r"(?!.*(\.\.|@\{|//|/\.|\.lock(/|$)|[/.]$))[^-/.\x00-\x20~^:?*\[\\\x7f]"
                     r"[^\x00-\x20~^:?*\[\\\x7f]*", "is not a name of a branch")


def as_compose(value: object) -> tuple[str, ...]:
    """One file of the repository or a list of them."""
    return tuple(as_file_in_repository(item)
                 for item in ([value] if isinstance(value, str) else as_strings(value)))


def as_env(value: object) -> tuple[tuple[str, str], ...]:
    """A list of NAME=VALUE."""
    for number, item in enumerate(as_strings(value), 1):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", item, re.DOTALL):
            raise ValueError(f"entry {number} is not of the form NAME=VALUE")
    pairs = (item.partition("=") for item in as_strings(value))
    return tuple((name, text) for name, _, text in pairs)


def as_urls(value: object) -> tuple[tuple[str, str], ...]:
    """A table of host = target; neither can hold what would be a directive of Caddy."""
    if not isinstance(value, dict):
        raise ValueError('must be a table like { "example.org" = "pgo:5006" }')
    for host, target in value.items():
        if not HOST_PATTERN.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name; write it like example.org")
        if (not isinstance(target, str) or not TARGET_PATTERN.fullmatch(target)
                or int(target.rpartition(":")[2]) > 65535):
            raise ValueError(f"{target!r} is not a target; write it like pgo:5006")
    return tuple(sorted(value.items()))


def as_networks(value: object) -> tuple[str, ...]:
    """Names of networks."""
    return tuple(map(as_network, as_strings(value)))


def as_outside_file(value: object) -> str:
    """An absolute path of a file that can be read."""
    path = Path(as_string(value))
    if not path.is_absolute():
        raise ValueError(f"{value!r} must be an absolute path")
    try:
        with path.open("rb"):
            return str(path)
    except OSError as error:
        raise ValueError(f"{value!r} cannot be read: {error.strerror}") from None


def as_seconds(value: object) -> float:
    """A duration of at least a second."""
    seconds = parse_duration(as_string(value))
    if seconds < 1:
        raise ValueError(f"{value!r} is too short; at least 1s")
    return seconds


def as_secret(value: object) -> str:
    """A secret that is not guessed."""
    if len(as_string(value)) < 16:
        raise ValueError("must have at least 16 characters; make one with: openssl rand -hex 20")
    return as_string(value)


def as_bool(value: object) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def as_known_user(value: object) -> str:
    """A user that exists on this machine."""
    try:
        return pwd.getpwnam(as_string(value)).pw_name
    except KeyError:
        raise ValueError(f"{value!r} does not exist on this machine; "
                         f"make it with: useradd --system {value}") from None


# An exception of the policy: the pattern that its value must match, and an example.
ALLOW: dict[str, tuple[str, str]] = {
    "annotations": ("", "annotations"), "bind": (r"/[^:]*(:ro)?", "bind:/srv/media:ro"),
    "blkio_config": ("", "blkio_config"), "build": (r"network:.+|privileged|entitlements|ssh",
                                                    "build:network:host"),
    "cap_add": (r"[A-Z_]+", "cap_add:NET_ADMIN"), "cgroup": (r"[a-z]+", "cgroup:host"),
    "cgroup_parent": (r".+", "cgroup_parent:/apps"), "container_name": (r".+", "container_name:x"),
    "cpu_rt_period": ("", "cpu_rt_period"), "cpu_rt_runtime": ("", "cpu_rt_runtime"),
    "credential_spec": ("", "credential_spec"),
    "device_cgroup_rules": (r".+", "device_cgroup_rules:c 1:3 mr"),
    "devices": (r".+", "devices:/dev/ttyUSB0"), "external_links": (r".+", "external_links:db"),
    "gpus": ("", "gpus"), "group_add": (r".+", "group_add:44"),
    "image": (r".+", "image:shared/app"), "ipc": (r".+", "ipc:host"),
    "isolation": (r".+", "isolation:process"), "key": (r"[a-z_]+", "key:new_key"),
    "labels": (r".+", "labels:com.docker.compose.x"), "logging": (r".+", "logging:syslog"),
    "models": ("", "models"), "network": (r".+", "network:macvlan_driver"),
    "network_mode": (r".+", "network_mode:host"), "oom_kill_disable": ("", "oom_kill_disable"),
    "oom_score_adj": (r"-\d+", "oom_score_adj:-500"), "pid": (r".+", "pid:host"),
    "ports": (r"\d+(-\d+)?", "ports:80"), "privileged": ("", "privileged"),
    "provider": ("", "provider"), "replicas": (r"\d+", "replicas:50"),
    "runtime": (r".+", "runtime:runsc"), "security_opt": (r".+", "security_opt:seccomp:unconfined"),
    "size": (r"\d+[kmg]?", "size:4g"),
    "stop_grace_period": (r"(\d+(\.\d+)?(h|ms?|s))+", "stop_grace_period:10m"),
    "storage_opt": ("", "storage_opt"), "sysctls": (r".+", "sysctls:kernel.shmmax"),
    "use_api_socket": ("", "use_api_socket"), "userns_mode": (r".+", "userns_mode:host"),
    "uts": (r".+", "uts:host"), "volume": (r".+", "volume:shared_data"),
    "volumes_from": (r".+", "volumes_from:container:db"),
}


def permits(entry: str) -> bool:
    """Whether an entry of `allow` is one that the policy can offer."""
    kind, _, text = entry.partition(":")
    return kind in ALLOW and re.fullmatch(ALLOW[kind][0], text) is not None


def as_allow(value: object) -> tuple[str, ...]:
    """Entries of the policy's table ALLOW, each with a value where it takes one."""
    for entry in as_strings(value):
        kind = entry.partition(":")[0]
        if kind not in ALLOW:
            raise ValueError(f"{entry!r} permits nothing{nearest(kind, ALLOW)}; "
                             f"known are {', '.join(sorted(ALLOW))}")
        if not permits(entry):
            raise ValueError(f"{entry!r} permits nothing; write it like {ALLOW[kind][1]!r}")
    return as_strings(value)


# The keys of a [[services]] entry: field of Service, parser. What needs two keys is done below.
SERVICE_KEYS: dict[str, tuple[str, Callable[[object], Any]]] = {
    "name": ("name", as_name), "user": ("user", as_known_user),
    "repository": ("repository", as_string), "branch": ("branch", as_branch),
    "registries": ("registries", as_strings), "compose": ("compose", as_compose),
    "env": ("env", as_env), "env_file": ("env_file", as_outside_file), "urls": ("urls", as_urls),
    "networks": ("networks", as_networks), "import": ("import_file", as_file_in_repository),
    "reload": ("reload", lambda value: parse_reload(as_string(value))),
    "mount": ("mount", as_mount), "deploy_key": ("deploy_key", as_outside_file),
    "profiles": ("profiles", as_strings), "allow": ("allow", as_allow),
    "webhook": ("webhook", as_secret),
    "wait": ("wait", as_seconds), "rollback": ("rollback", as_bool),
}
REQUIRED_KEYS = ("name", "user", "repository")


def combine_fields(fields: dict[str, Any], label: str) -> tuple[Service | None, list[str]]:
    """What needs more than one key, or must not show its value in an error."""
    errors = []
    try:
        fields["repository"] = parse_remote(fields["repository"])
    except ValueError as error:
        errors.append(f"{label}: repository {error}")
    try:
        fields["registries"] = tuple(parse_registry(text, fields["user"])
                                     for text in fields.get("registries", ()))
    except ValueError as error:
        errors.append(f"{label}: registries: an entry {error}")
    env_file = fields.pop("env_file", None)
    try:
        if env_file:
            lines = dict(parse_env_lines(Path(env_file).read_text()))
            fields["env"] = tuple((lines | dict(fields.get("env", ()))).items())
    except (ValueError, OSError) as error:
        errors.append(f"{label}: env_file {env_file}: {error}")
    if fields.get("reload") and not fields.get("import_file"):
        errors.append(f"{label}: reload needs an import, which is what it announces")
    return (None, errors) if errors else (Service(**fields), [])


def parse_service(table: Mapping[str, object], label: str) -> tuple[Service | None, list[str]]:
    """A Service, or None and every reason why not. Values of secrets are in no message."""
    errors, fields = [], {}
    for key, value in table.items():
        if key not in SERVICE_KEYS:
            errors.append(f"{label}: unknown key {key!r}{nearest(key, SERVICE_KEYS)}")
            continue
        name, parser = SERVICE_KEYS[key]
        try:
            fields[name] = parser(value)
        except ValueError as error:
            errors.append(f"{label}: {key}: {error}")
    errors += [f"{label}: {key} is missing" for key in REQUIRED_KEYS if key not in table]
    if errors:
        return None, errors
    return combine_fields(fields, label)


def check_services(services: Sequence[Service]) -> list[str]:
    """What can be wrong only between services."""
    errors, hosts = list[str](), dict[str, str]()
    names = collections.Counter(service.name for service in services)
    errors += [f"service {name!r}: the name is used {count} times; names must differ"
               for name, count in names.items() if count > 1]
    for service in services:
        for host, _ in service.urls:
            if hosts.setdefault(host, service.name) != service.name:
                errors.append(f"service {service.name!r}: urls: {host} belongs to "
                              f"{hosts[host]!r} already")
        if service.reload and service.reload.service not in names:
            errors.append(f"service {service.name!r}: reload: there is no service "
                          f"{service.reload.service!r}{nearest(service.reload.service, names)}")
    return errors


def parse_configuration(text: str) -> tuple[Service, ...]:
    """The services of a pgo.toml. Raises ConfigurationError with every error at once."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError([f"not TOML: {error}"]) from None
    errors = [f"unknown key {key!r}{nearest(key, ['services'])}; services are written as "
              "[[services]]" for key in document if key != "services"]
    tables = document.get("services", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError([*errors, "services must be written as [[services]]"])
    if not tables and not errors:
        errors.append("has no [[services]]; an empty configuration would take everything down")
    services = []
    for number, table in enumerate(tables, 1):
        name = table.get("name")
        service, wrong = parse_service(table, f"service {name!r}" if name else f"service {number}")
        errors += wrong
        services += [service] if service else []
    errors += check_services(services)
    if errors:
        raise ConfigurationError(errors)
    return tuple(services)


def configuration_seal(path: Path) -> str:
    """A hash of pgo.toml and of each env_file and deploy_key that it names, gone or not."""
    digest = hashlib.sha256(path.read_bytes())
    paths = re.findall(rb'(?:env_file|deploy_key)\s*=\s*["\']([^"\']+)', path.read_bytes())
    for name in sorted(paths):
        with contextlib.suppress(OSError):
            digest.update(name + b"\0" + Path(os.fsdecode(name)).read_bytes())
    return digest.hexdigest()


def read_configuration(path: Path) -> Configuration:
    """pgo.toml from disk. Raises ConfigurationError, also where it cannot be read."""
    try:
        seal = configuration_seal(path)
        services = parse_configuration(path.read_text())
        others = path.stat().st_mode & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigurationError([f"cannot be read: {reason}"]) from None
    secret = any(s.secrets for s in services)
    warning = f"{path} holds secrets and everybody can read it: chmod 600 {path}"
    return Configuration(services, seal, (warning,) if others and secret else ())

# ---- Files -------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def as_user(account: Account) -> Iterator[None]:
    """Within it, this thread's file operations are the user's (setfsuid(2) is the thread's own).

    Root's power over files (CAP_DAC_OVERRIDE, CAP_CHOWN, …) is off meanwhile, capabilities(7).
    """
    if os.geteuid() != 0:
        yield
        return
    _libc.setfsgid(account.gid)
    _libc.setfsuid(account.uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


def chown(path: Path | int, account: Account | None, gid: int | None = None) -> None:
    """Give a path or descriptor to the account (None: root), where pgod may."""
    if os.geteuid() == 0:
        uid = account.uid if account else 0
        os.chown(path, uid, gid if gid is not None else account.gid if account else 0)


def make_folder(path: Path, mode: int, account: Account | None = None,
                gid: int | None = None) -> None:
    """A folder of pgod's own with that mode and owner, also where it was there already."""
    path.mkdir(parents=True, exist_ok=True)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise Fault(f"{path} is not a folder; remove it")
    chown(path, account, gid)
    path.chmod(mode)


def flush_folder(path: Path) -> None:
    """Make renames in it last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, account: Account | None = None,
                 gid: int | None = None) -> None:
    """Old content or new content, never half of it, also after a loss of power."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            chown(file.fileno(), account, gid)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    flush_folder(path.parent)


FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def folder_beneath(root: Path, parts: Sequence[str], make: bool = False) -> Iterator[int]:
    """A descriptor of root/parts; no part of it, root's last one included, may be a link.

    Raises FileNotFoundError where it is missing and not to be made, Refused at a link.
    """
    descriptor = os.open(root, FOLDER_FLAGS)
    try:
        for number, part in enumerate(parts, 1):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=descriptor)
            try:
                deeper = os.open(part, FOLDER_FLAGS, dir_fd=descriptor)
            except (NotADirectoryError, OSError) as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
                path = "/".join(parts[:number])
                raise Refused(f"{root}/{path} is a link or a file where a folder must be; "
                              "remove it") from None
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def stat_beneath(root: Path, path: str) -> os.stat_result | None:
    """What is at root/path, not following any link; None where nothing is."""
    *parts, name = path.split("/")
    try:
        with folder_beneath(root, parts) as folder:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_beneath(root: Path, path: str) -> BinaryIO:
    """A regular file beneath root, to read; a link, a device or a pipe is Refused."""
    *parts, name = path.split("/")
    with folder_beneath(root, parts) as folder:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=folder)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            raise Refused(f"{root}/{path} is a link") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Refused(f"{root}/{path} is not a regular file")
    return file


def read_beneath(root: Path, path: str, limit: int) -> bytes:
    """The content of a regular file beneath root, `limit` bytes of it: it may be endless."""
    with open_beneath(root, path) as file:
        return file.read(limit)


def same_content(one: BinaryIO, other: BinaryIO) -> bool:
    """Whether two files read the same; neither is ever in memory as a whole."""
    while (chunk := one.read(1 << 20)) == other.read(1 << 20):
        if not chunk:
            return True
    return False


def temporary_name() -> str:
    return f".pgod-{os.getpid()}-{threading.get_ident()}"


def put_in_place(folder: int, temporary: str, name: str, path: str) -> None:
    """Rename within a folder; Refused where a folder is in its way."""
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        os.unlink(temporary, dir_fd=folder)
        if isinstance(error, IsADirectoryError):
            raise Refused(f"{path} is a folder where a file must be; move or remove it") from None
        raise


def write_beneath(root: Path, path: str, data: BinaryIO, mode: int = 0o644) -> None:
    """A regular file beneath root, by a temporary name; a folder in its place is Refused."""
    *parts, name = path.split("/")
    with folder_beneath(root, parts, make=True) as folder:
        temporary = temporary_name()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(data, file, 1 << 20)
                os.fchmod(descriptor, mode)
                file.flush()
                os.fsync(descriptor)
        except OSError:
            os.unlink(temporary, dir_fd=folder)
            raise
        put_in_place(folder, temporary, name, f"{root}/{path}")


def link_beneath(root: Path, path: str, target: str) -> None:
    """A symlink beneath root; what it leads to is not looked at."""
    *parts, name = path.split("/")
    with folder_beneath(root, parts, make=True) as folder:
        temporary = temporary_name()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        os.symlink(target, temporary, dir_fd=folder)
        put_in_place(folder, temporary, name, f"{root}/{path}")


def remove_beneath(root: Path, path: str, keep: frozenset[str]) -> None:
    """Unlink a file, and the folders that this leaves empty, but for those in `keep`."""
    *parts, name = path.split("/")
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, Refused):
        with folder_beneath(root, parts) as folder:
            os.unlink(name, dir_fd=folder)
        while parts and "/".join(parts) not in keep:
            with folder_beneath(root, parts[:-1]) as folder:
                try:
                    os.rmdir(parts[-1], dir_fd=folder)
                except OSError:
                    return
            parts = parts[:-1]

# ---- Metrics -----------------------------------------------------------------------------------

# The first two are untyped: their names are the Go program's, and end in _count, which the
# exposition format keeps for histograms.
METRICS: dict[str, tuple[str, str]] = {
    "pgo_command_count": ("untyped", "Commands executed, by service, command and subcommand."),
    "pgo_command_error_count": ("untyped", "Commands that failed."),
    "pgo_service_info": ("gauge", "Commit that runs and commit wanted; always 1."),
    "pgo_service_in_sync": ("gauge", "1 if what runs is the newest commit of the branch."),
    "pgo_service_held": ("gauge", "1 while down, stop or hold is in force."),
    "pgo_service_last_success_timestamp_seconds": (
        "gauge", "When the service was last seen to be as git says."),
    "pgo_service_consecutive_failures": ("gauge", "Looks that failed since the last good one."),
    "pgo_service_deploys_total": ("counter", "Deploys, by outcome."),
    "pgo_service_rollbacks_total": ("counter", "Deploys that were rolled back."),
    "pgo_service_heals_total": ("counter", "Times that containers were brought back."),
    "pgo_service_policy_violations": ("gauge", "Violations in the newest commit."),
    "pgo_service_last_deploy_duration_seconds": ("gauge", "How long the last deploy took."),
    "pgo_service_containers": ("gauge", "Containers, by state, when last looked at."),
    "pgo_configuration_valid": ("gauge", "0 while pgo.toml on disk is not valid."),
    "pgo_build_info": ("gauge", "Version of pgod; always 1."),
}
COMMAND_LABELS = ("service", "cmd", "subcmd")


def escape_label(text: str) -> str:
    """As the exposition format wants it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Metrics:
    """Counters, and gauges that are set; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {
            name: {} for name in METRICS}

    def count(self, name: str, command: Sequence[str]) -> None:
        """One more for (service, command, subcommand)."""
        self.add(name, **dict(zip(COMMAND_LABELS, command, strict=True)))

    def add(self, name: str, value: float = 1, /, **labels: str) -> None:
        with self._lock:
            key = tuple(labels.items())
            self._values[name][key] = self._values[name].get(key, 0) + value

    def set(self, name: str, value: float, /, **labels: str) -> None:
        with self._lock:
            self._values[name][tuple(labels.items())] = value

    def replace(self, name: str, service: str,
                rows: Iterable[tuple[dict[str, str], float]]) -> None:
        """Set a service's rows of a gauge and forget the ones it had."""
        with self._lock:
            kept = {key: value for key, value in self._values[name].items()
                    if ("service", service) not in key}
            fresh = {(("service", service), *labels.items()): value for labels, value in rows}
            self._values[name] = kept | fresh

    def render(self) -> str:
        """The page, in the text format 0.0.4."""
        lines = []
        with self._lock:
            for name, (kind, text) in METRICS.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                for key, value in self._values[name].items():
                    labels = ",".join(f'{label}="{escape_label(text)}"' for label, text in key)
                    number = f"{value:.3f}".rstrip("0").rstrip(".")
                    lines.append(f"{name}{{{labels}}} {number}" if labels else f"{name} {number}")
        return "\n".join(lines) + "\n"

# ---- Children ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a child ended: `status` is negative for a signal, as in subprocess."""

    status: int
    stdout: bytes
    stderr: str
    trouble: str = ""  # why pgod ended it, if it did

    @property
    def complaint(self) -> str:
        """One line for a person."""
        return self.trouble or one_line(self.stderr) or f"exit status {self.status}"


def session_processes(session: int) -> list[int]:
    """The processes of a session, from proc(5)."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session and fields[0] != b"Z":
                found.append(int(entry))
    return found


def marked_processes(mark: str) -> list[int]:
    """The processes that carry that NAME=VALUE in their environment."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def kill_all(processes: Iterable[int], number: int) -> None:
    """Signal each that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


Child = subprocess.Popen[bytes]
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What a child sees of pgod's environment, and `extra`. HOME is nowhere, not in /tmp."""
    passed = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
    return {"PATH": DEFAULT_PATH, "HOME": "/nonexistent", **passed, **extra}


def feed_lines(data: bytearray, on_line: Callable[[str], None],
               secrets: Sequence[str]) -> bytearray:
    """Hand on the whole lines in `data`; what is left of it."""
    *lines, rest = data.split(b"\n")
    for line in lines:
        text = line.decode(errors="replace").strip()
        if text:
            on_line(redact(text, secrets))
    return bytearray(rest)


class Children:
    """The one door to other programs: argument lists, never a shell; each in its own session.

    Every child gets an environment, a user, a folder and a deadline, and is counted. `stop` makes
    every `run` end its child after a grace of 10 seconds and raise Stopping.
    """

    GRACE = 10.0

    def __init__(self, metrics: Metrics, mark: str = "") -> None:
        self.metrics = metrics
        self.mark = mark  # PGOD_RUN=…: what a killed pgod left behind is known by it
        self.stopped_at: float | None = None
        self.beats: dict[int, float] = {}  # thread: when it was last seen at work, monotonic

    def beat(self) -> None:
        """Say that this thread lives."""
        self.beats[threading.get_ident()] = time.monotonic()

    def stop(self) -> None:
        self.stopped_at = time.monotonic()

    def start(self, words: Sequence[str], *, account: Account | None = None,
              env: Mapping[str, str] | None = None, folder: Path = Path("/"),
              stdin: int = DEVNULL, stdout: int = PIPE,
              stderr: int = PIPE, session: bool = True) -> Child:
        """A running child; whoever starts it must wait for it. Raises Fault if there is none."""
        who: dict[str, Any] = {}
        if account and os.geteuid() == 0:
            who = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
        environment = dict(child_environment(env or {}))
        if self.mark:
            name, _, value = self.mark.partition("=")
            environment[name] = value
        try:
            return subprocess.Popen(words, env=environment, cwd=folder, stdin=stdin, stdout=stdout,
                                    stderr=stderr, start_new_session=session, umask=0o022,
                                    bufsize=0, **who)
        except FileNotFoundError:
            raise Fault(f"{words[0]} is not installed") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise Fault(f"{words[0]} cannot be started: {error}") from None

    def end(self, child: Child, grace: float = 3.0) -> None:
        """End the child's whole session: TERM, then KILL."""
        kill_all(session_processes(child.pid), signal.SIGTERM)
        patience = time.monotonic() + grace
        while session_processes(child.pid) and time.monotonic() < patience:
            child.poll()
            time.sleep(0.05)
        while left := session_processes(child.pid):
            kill_all(left, signal.SIGKILL)
            time.sleep(0.01)
        child.wait()

    def run(self, words: Sequence[str], *, deadline: float, kind: tuple[str, str, str],
            account: Account | None = None, env: Mapping[str, str] | None = None,
            folder: Path = Path("/"), stdin: bytes = b"", limit: int = CHILD_OUTPUT,
            on_line: Callable[[str], None] | None = None,
            secrets: Sequence[str] = ()) -> Result:
        """Run a child to its end, and count it as `kind`: (service, command, subcommand).

        Its output is collected up to `limit` bytes; lines of its standard error go to `on_line`
        as they come. A deadline or limit that is passed ends its session and shows in `trouble`.
        """
        child = self.start(words, account=account, env=env, folder=folder,
                           stdin=PIPE if stdin else DEVNULL)
        log.debug("%s: runs: %s", kind[0] or "pgod", redact(shlex.join(words), secrets))
        try:
            stdout, stderr, trouble = self._collect(child, stdin, deadline, limit, on_line, secrets)
        finally:
            self.end(child)
            for pipe in filter(None, (child.stdin, child.stdout, child.stderr)):
                pipe.close()
        text = redact(stderr.decode(errors="replace"), secrets)
        result = Result(child.returncode, stdout, text, trouble)
        self.metrics.count("pgo_command_count", kind)
        if result.status or trouble:
            self.metrics.count("pgo_command_error_count", kind)
        return result

    def _collect(self, child: Child, stdin: bytes, deadline: float, limit: int,
                 on_line: Callable[[str], None] | None,
                 secrets: Sequence[str]) -> tuple[bytes, bytes, str]:
        """Both outputs until their end, the child's or the deadline; and what was wrong."""
        if child.stdin:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(stdin)
            child.stdin.close()
        output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        line, until, ended = bytearray(), time.monotonic() + deadline, 0.0
        with selectors.DefaultSelector() as selector:
            for name in output:
                selector.register(getattr(child, name), selectors.EVENT_READ, name)
            while selector.get_map() or child.poll() is None:
                self.beat()
                now = time.monotonic()
                if child.poll() is not None:
                    ended = ended or now
                    if now > ended + 1:  # something it left behind holds the pipes
                        break
                if now > until:
                    trouble = f"took longer than {deadline:.0f} s"
                    return bytes(output["stdout"]), bytes(output["stderr"]), trouble
                if self.stopped_at and now > self.stopped_at + self.GRACE:
                    raise Stopping
                if not selector.get_map():
                    time.sleep(0.005)
                for key, _ in selector.select(0.2) if selector.get_map() else ():
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    output[key.data] += data
                    if key.data == "stderr" and on_line:
                        line = feed_lines(line + data, on_line, secrets)
                if sum(map(len, output.values())) > limit:
                    return b"", b"", f"wrote more than {limit >> 10} KiB"
        return bytes(output["stdout"]), bytes(output["stderr"]), ""

# ---- Git ---------------------------------------------------------------------------------------

# path: (mode, blob) of everything in a commit, as `git ls-tree -r` says it.
Tree = dict[str, tuple[str, str]]
LINK_MODES = {"120000": "a symlink", "160000": "a submodule"}
GIT_SETTINGS = {
    "core.hooksPath": "/dev/null", "core.fsmonitor": "false", "credential.helper": "",
    "http.followRedirects": "false", "gc.autoDetach": "false", "fetch.recurseSubmodules": "no",
    "submodule.recurse": "false", "transfer.fsckObjects": "false", "protocol.version": "2",
    "core.symlinks": "true", "core.quotePath": "false", "advice.detachedHead": "false",
    "http.lowSpeedLimit": "100", "http.lowSpeedTime": "60",
}


@dataclass(frozen=True)
class Commit:
    """A commit and what a person wants to know of it."""

    identity: str
    author: str = ""
    subject: str = ""


def printable(text: str) -> str:
    """No control characters: what a repository says must not steer a terminal or a log."""
    return "".join(char if char.isprintable() else "?" for char in text)


class Git:
    """The git folder of one service. It lies outside the work tree, so no container reaches it.

    git runs as the service's user, without the docker group, without any configuration but ours.
    """

    def __init__(self, service: Service, places: Places, account: Account,
                 children: Children) -> None:
        self.service = service
        self.places = places
        self.account = account
        self.children = children
        self.folder = places.own / "git"
        self.exported: tuple[str, Tree] = ("", {})  # commit and tree of the export folder

    def environment(self) -> dict[str, str]:
        """No prompts, no configuration of others, one transport, the token in the environment."""
        remote, settings = self.service.repository, dict(GIT_SETTINGS)
        if remote.authorization:
            host = "/".join(remote.url.split("/")[:3])
            settings[f"http.{host}/.extraHeader"] = remote.authorization
        env = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": str(self.places.own / "gitconfig"),
               "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "/bin/false", "SSH_ASKPASS": "/bin/false",
               "GIT_ALLOW_PROTOCOL": f"{remote.scheme}:file", "GIT_SSH_VARIANT": "ssh",
               "GIT_SSH_COMMAND": shlex.join(self.ssh_words()), "GIT_OPTIONAL_LOCKS": "0",
               "GIT_CONFIG_COUNT": str(len(settings)), "LC_ALL": "C",
               **{name: os.environ[name] for name in GIT_ENVIRONMENT if name in os.environ}}
        for number, (key, value) in enumerate(settings.items()):
            env |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        return env

    def ssh_words(self) -> list[str]:
        """ssh for git: the deploy key alone, host keys remembered at first sight."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=accept-new", "ConnectTimeout=20",
                   "ForwardAgent=no", "ClearAllForwardings=yes", "ServerAliveInterval=15",
                   f"UserKnownHostsFile={self.places.own}/ssh/known_hosts"]
        key = [] if not self.service.deploy_key else [
            "-i", f"{self.places.own}/ssh/deploy_key", "-o", "IdentitiesOnly=yes",
            "-o", "IdentityAgent=none"]
        return ["ssh", "-F", "/dev/null", *(w for o in options for w in ("-o", o)), *key]

    def prepare(self) -> None:
        """Folders, the deploy key where the user can read it, and the trust in local paths."""
        own = self.places.own
        for name in ("git", "ssh"):
            make_folder(own / name, 0o700, self.account)
        if self.service.deploy_key:
            key = Path(self.service.deploy_key).read_bytes().rstrip() + b"\n"
            write_atomic(own / "ssh" / "deploy_key", key, 0o600, self.account)
        trusted = [str(self.places.worktree), str(self.places.worktree / ".git")]
        if self.service.repository.scheme == "file":
            url = self.service.repository.url
            trusted += [url, f"{url.rstrip('/')}/.git"]
        lines = "".join(f"\tdirectory = {json.dumps(path)}\n" for path in trusted)
        write_atomic(own / "gitconfig", f"[safe]\n{lines}".encode(), 0o644)
        if not (self.folder / "HEAD").exists():
            self.init(self.folder)

    def init(self, folder: Path) -> None:
        self.git("init", "--quiet", "--bare", "--template=", str(folder), folder=None)

    def git(self, *words: str, deadline: str = "git", folder: Path | None = Path(),
            env: Mapping[str, str] | None = None) -> bytes:
        """Run git on the git folder (or on none); its standard output. Raises Fault."""
        git_dir = self.folder if folder == Path() else folder
        where = [] if folder is None else [f"--git-dir={git_dir}"]
        subcommand = "pull" if words[0] == "fetch" else words[0]
        result = self.children.run(
            ["git", *where, *words], account=self.account, env=self.environment() | dict(env or {}),
            deadline=DEADLINE[deadline], kind=(self.service.name, "git", subcommand),
            secrets=self.service.secrets)
        if result.status or result.trouble:
            moved = ("; redirects are not followed: give the address that it leads to, which often "
                     "ends in .git") if re.search(r"returned error: 30\d", result.stderr) else ""
            raise Fault(f"git {words[0]}: {result.complaint}{moved}")
        return result.stdout

    def ask(self) -> str:
        """The commit that the branch has at the remote: one process, nothing fetched."""
        ref = f"refs/heads/{self.service.branch}"
        output = self.git("ls-remote", self.service.repository.url, ref, deadline="ls-remote")
        for line in output.decode(errors="replace").splitlines():
            commit, _, name = line.partition("\t")
            if name == ref and re.fullmatch(r"[0-9a-f]{40,64}", commit):
                return commit
        raise Fault(f"the repository has no branch {self.service.branch!r}")

    def fetch(self) -> str:
        """Fetch the branch's commit alone, by force; its identity. Broken folders are remade."""
        try:
            self.fetch_into(self.folder)
            return self.identity("refs/pgod/wanted")
        except Fault as fault:
            self.remake(fault)
        return self.identity("refs/pgod/wanted")

    def fetch_into(self, folder: Path) -> None:
        ref = f"+refs/heads/{self.service.branch}:refs/pgod/wanted"
        self.git("fetch", "--quiet", "--no-tags", "--depth=1", "--no-write-fetch-head",
                 self.service.repository.url, ref, deadline="fetch", folder=folder)

    def remake(self, reason: Fault) -> None:
        """Make the git folder again beside the old one and swap them; the work tree stays."""
        fresh, old = self.folder.with_name("git.new"), self.folder.with_name("git.old")
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)
        make_folder(fresh, 0o700, self.account)
        self.init(fresh)
        self.fetch_into(fresh)
        with contextlib.suppress(Fault):  # the last good commit, for a rollback
            self.git("fetch", "--quiet", "--depth=1", "--no-write-fetch-head", str(self.folder),
                     "+refs/pgod/good:refs/pgod/good", folder=fresh)
        self.folder.rename(old)
        fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        log.warning("%s: git folder made again: %s", self.service.name, reason)

    def identity(self, ref: str) -> str:
        return self.git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").decode().strip()

    def mark_good(self, commit: str) -> None:
        """Keep the commit for rollbacks."""
        self.git("update-ref", "refs/pgod/good", commit)

    def describe(self, commit: str) -> Commit:
        """Author and subject, for people."""
        try:
            text = self.git("show", "--no-patch", "--format=%an%x00%s", commit)
        except Fault:
            return Commit(commit)
        author, _, subject = text.decode(errors="replace").strip().partition("\0")
        return Commit(commit, printable(author)[:80], printable(subject)[:120])

    def tree(self, commit: str) -> Tree:
        """What the commit holds."""
        tree: Tree = {}
        for entry in self.git("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0")[:-1]:
            facts, _, path = entry.partition(b"\t")
            mode, _, blob = facts.decode().split()
            tree[path.decode(errors="surrogateescape")] = (mode, blob)
        return tree

    def export(self, commit: str) -> Tree:
        """Put the commit's files into the export folder, where no container reaches; its tree."""
        if self.exported[0] != commit:
            self.exported = ("", {})
            try:
                tree = self._export(commit)
            except Fault as fault:
                self.remake(fault)
                tree = self._export(commit)
            self.exported = (commit, tree)
        return self.exported[1]

    def _export(self, commit: str) -> Tree:
        tree = self.tree(commit)
        fresh, index = self.places.own / "export.new", self.folder / "export.index"
        shutil.rmtree(fresh, ignore_errors=True)
        for left in (index, index.with_name("export.index.lock")):
            left.unlink(missing_ok=True)
        make_folder(fresh, 0o700, self.account)
        env = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(fresh)}
        self.git("read-tree", commit, env=env)
        self.git("checkout-index", "--all", "--force", f"--prefix={fresh}/", env=env)
        shutil.rmtree(self.places.export, ignore_errors=True)
        fresh.rename(self.places.export)
        return tree

    def take_over(self) -> str:
        """The commit that a checkout of the Go program has.

        upload-pack is made for repositories that are not trusted: it runs nothing of theirs.
        """
        self.git("fetch", "--quiet", "--no-tags", "--depth=1", "--no-write-fetch-head",
                 str(self.places.worktree / ".git"), "+HEAD:refs/pgod/good")
        return self.identity("refs/pgod/good")

    def public_keys(self, tree: Tree) -> tuple[PublicKey, ...]:
        """The keys in ssh/ of the export: regular files, every line of them."""
        keys: dict[str, PublicKey] = {}
        paths = [path for path, (mode, _) in sorted(tree.items())
                 if re.fullmatch(r"ssh/[^/]+", path) and mode not in LINK_MODES]
        for path in paths[:KEY_COUNT]:
            found, wrong = parse_key_file(self.read_export(path))
            keys |= {key.fingerprint: key for key in found if key.fingerprint not in keys}
            if wrong:
                log.warning("%s: key ignored: %s %s", self.service.name, printable(path), wrong)
        return tuple(keys.values())[:KEY_COUNT]

    def read_export(self, path: str) -> bytes:
        with as_user(self.account):
            return read_beneath(self.places.export, path, KEY_FILE_BYTES + 1)

# ---- Work tree ---------------------------------------------------------------------------------


def folders_of(path: str) -> list[str]:
    """The folders that a path lies in, the topmost first."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def blob_of(data: bytes) -> str:
    """The name that git gives a content (SHA-1 repositories)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def untracked_beneath(root: Path, path: str, known: set[str]) -> list[str]:
    """Files in a folder that the last commit did not put there."""
    with folder_beneath(root, path.split("/")) as folder:
        return [name for top, _, files, _ in os.fwalk(".", dir_fd=folder) for file in files
                if (name := os.path.normpath(f"{path}/{top}/{file}")) not in known]


def read_link(root: Path, path: str) -> str:
    *parts, name = path.split("/")
    with folder_beneath(root, parts) as folder:
        return os.readlink(name, dir_fd=folder)


def same_entry(root: Path, export: Path, path: str, mode: str) -> bool:
    """Whether the work tree has at `path` what the export has there."""
    found = stat_beneath(root, path)
    if found is None or stat.S_ISLNK(found.st_mode) != (mode == "120000"):
        return False
    if mode == "120000":
        return read_link(root, path) == os.readlink(export / path)
    executable = bool(found.st_mode & stat.S_IXUSR) == (mode == "100755")
    size = (export / path).lstat().st_size
    if not stat.S_ISREG(found.st_mode) or not executable or found.st_size != size:
        return False
    with open_beneath(root, path) as one, (export / path).open("rb") as other:
        return same_content(one, other)


def conflicts_at(root: Path, export: Path, path: str, mode: str, known: set[str]) -> list[str]:
    """Untracked files that a new one at `path` would overwrite, unless they are the same."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        at = "/".join(parts[:depth])
        found = stat_beneath(root, at)
        if found is None or (at in known and depth < len(parts)):
            return []
        if depth < len(parts) and stat.S_ISDIR(found.st_mode):
            continue
        if stat.S_ISDIR(found.st_mode):
            return untracked_beneath(root, at, known)
        return [] if same_entry(root, export, path, mode) else [at]
    return []


@contextlib.contextmanager
def explaining_owners(root: Path, path: str) -> Iterator[None]:
    """Say what to do where the user is kept out of his own work tree."""
    try:
        yield
    except PermissionError:
        raise Refused(f"{root}/{path} cannot be changed: it or its folder belongs to another user, "
                      "as when a container took it; chown it") from None


def try_to_write(root: Path, folder: str) -> None:
    """Raises PermissionError where nothing can be made in root/folder."""
    with folder_beneath(root, folder.split("/") if folder else ()) as descriptor:
        os.mkdir(temporary_name(), 0o700, dir_fd=descriptor)
        os.rmdir(temporary_name(), dir_fd=descriptor)


def worktree_conflicts(root: Path, export: Path, tracked: Tree, new: Tree) -> list[str]:
    """All that the commit would overwrite. Raises Refused where the user is kept out."""
    known, conflicts = set(tracked), []
    for path, (mode, _) in sorted(new.items()):
        if path not in known and mode != "160000":
            with explaining_owners(root, path):
                conflicts += conflicts_at(root, export, path, mode, known)
    changes = {path for path in {*tracked, *new} if tracked.get(path) != new.get(path)}
    for folder, path in {path.rpartition("/")[0]: path for path in sorted(changes)}.items():
        with explaining_owners(root, path), contextlib.suppress(FileNotFoundError, Refused):
            try_to_write(root, folder)
    return conflicts


def write_entry(root: Path, export: Path, path: str, mode: str) -> None:
    """What the export has at `path`, to the work tree, if that is not there already."""
    with contextlib.suppress(PermissionError):
        if same_entry(root, export, path, mode):
            return
    if mode == "120000":
        link_beneath(root, path, os.readlink(export / path))
    else:
        with (export / path).open("rb") as data:
            write_beneath(root, path, data, 0o755 if mode == "100755" else 0o644)


def update_worktree(root: Path, export: Path, tracked: Tree, new: Tree, keep: frozenset[str],
                    beat: Callable[[], None]) -> list[str]:
    """Make tracked files those of the commit; why some could not be made so.

    In place: no folder is ever replaced, for a bind mount would keep the old one. Call it as the
    user. In the way may be a link, a folder with untracked files, or a container that keeps the
    user out; what the commit does not change may well be a container's by now.
    """
    failures = []

    def attempt(path: str, act: Callable[[], None]) -> None:
        beat()
        try:
            with explaining_owners(root, path):
                act()
        except Refused as refused:
            if path not in new or tracked.get(path) != new[path]:
                failures.append(str(refused))

    def remove(path: str) -> None:
        attempt(path, lambda: remove_beneath(root, path, keep))

    gone = sorted(set(tracked) - set(new))
    folders = {folder for path in new for folder in folders_of(path)}
    for path in filter(folders.__contains__, gone):  # files that become folders
        remove(path)
    for path, (mode, _) in sorted(new.items()):
        for other in gone:
            if other.startswith(path + "/"):  # a folder that becomes a file
                remove(other)
        if mode != "160000":
            attempt(path, functools.partial(write_entry, root, export, path, mode))
    for path in gone:
        remove(path)
    return failures


def hand_over(root: Path, paths: Iterable[str], former: int, account: Account) -> None:
    """Give paths beneath root, and the folders above them, to the account, by no link.

    Only those that are the former user's (a number): what a container took stays the container's.
    """
    for path in {*paths, *(folder for file in paths for folder in folders_of(file))}:
        *parts, name = path.split("/")
        with contextlib.suppress(FileNotFoundError, Refused), folder_beneath(root, parts) as folder:
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == former:
                os.chown(name, account.uid, account.gid, dir_fd=folder, follow_symlinks=False)

# ---- Model -------------------------------------------------------------------------------------

Model = dict[str, Any]
MAX_BYTES = 1 << 30  # of the host's memory, for a tmpfs or shared memory
KEEP_LABEL = "io.pgod.keep"  # of the containers that keep images
FILES_LABEL = "io.pgod.files"  # changes when a bound file does, and so compose recreates


@dataclass(frozen=True)
class Bind:
    """A path of the host that the engine mounts, as root, into a container."""

    compose_service: str
    kind: str  # bind, config or secret
    source: str
    read_only: bool
    target: str = ""  # known of a container's


def moved_paths(value: Any, old: str, new: str) -> Any:
    """The model with every path at or beneath `old` moved to `new`."""
    if isinstance(value, dict):
        return {key: moved_paths(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [moved_paths(item, old, new) for item in value]
    if isinstance(value, str) and (value == old or value.startswith(old + "/")):
        return new + value[len(old):]
    return value


def compose_services(model: Model) -> dict[str, Any]:
    return model.get("services") or {}


def files_used(uses: Any, table: Mapping[str, Any]) -> list[str]:
    """The files of configs or secrets that are named, in short or long form."""
    sources = [str(use.get("source") if isinstance(use, dict) else use) for use in uses or ()]
    files = [(table.get(source) or {}).get("file") for source in sources]
    return [str(file) for file in files if file]


def binds_of(model: Model) -> list[Bind]:
    """Every bind mount, and configs and secrets from files, which the engine binds too."""
    binds = []
    for name, service in compose_services(model).items():
        for volume in service.get("volumes") or ():
            if isinstance(volume, dict) and volume.get("type") == "bind":
                binds.append(Bind(name, "bind", str(volume.get("source", "")),
                                  volume.get("read_only") is True))
        for kind in ("config", "secret"):
            table = model.get(f"{kind}s") or {}
            binds += [Bind(name, kind, file, True)
                      for file in files_used(service.get(f"{kind}s"), table)]
    return binds


def expected_replicas(model: Model) -> dict[str, int]:
    """How many containers each compose service has when all is well."""
    expected = {}
    for name, service in compose_services(model).items():
        replicas = (service.get("deploy") or {}).get("replicas", service.get("scale", 1))
        expected[name] = int(1 if replicas is None else replicas)
    return expected


def file_seals(model: Model, tree: Tree, worktree: str,
               generated: Mapping[str, str]) -> dict[str, str]:
    """For each compose service that binds single files: a hash of their contents.

    A running container keeps the old file when git or pgod writes a new one. Folders are no
    matter: they stay in place. `generated` has the hashes of files that pgod writes itself.
    """
    blobs = {path: blob for path, (_, blob) in tree.items()} | dict(generated)
    files = collections.defaultdict[str, set[tuple[str, str]]](set)
    for bind in binds_of(model):
        if blob := blobs.get(bind.source.removeprefix(worktree + "/")):
            files[bind.compose_service].add((bind.source, blob))
    return {name: hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]
            for name, found in files.items()}


def with_file_labels(model: Model, seals: Mapping[str, str],
                     baseline: Mapping[str, str]) -> Model:
    """The model with a label where a bound file is not what it was at the take-over."""
    result: Model = json.loads(json.dumps(model))
    for name, seal in seals.items():
        if baseline.get(name) != seal:
            service = result["services"][name]
            service["labels"] = {**(service.get("labels") or {}), FILES_LABEL: seal}
    return result


def with_tmpfs_sizes(model: Model) -> Model:
    """The model with a limit where a tmpfs has none and could take half of the host's memory."""
    result: Model = json.loads(json.dumps(model))
    for service in compose_services(result).values():
        mounts = service.get("tmpfs") or []
        for place, mount in enumerate(mounts):
            if not re.search("[:,]size=", mount):
                mounts[place] = f"{mount}{',' if ':' in mount else ':'}size={MAX_BYTES}"
        for volume in service.get("volumes") or ():
            if isinstance(volume, dict) and volume.get("type") == "tmpfs":
                volume["tmpfs"] = {"size": str(MAX_BYTES)} | (volume.get("tmpfs") or {})
    return result


def label_of(service: Mapping[str, Any]) -> str:
    return str((service.get("labels") or {}).get(FILES_LABEL, ""))


def model_differences(old: Model, new: Model) -> dict[str, str]:
    """For each compose service: what `up` will do to it and why; unchanged ones are left out."""
    before, after = compose_services(old), compose_services(new)
    changes = {name: "removed" for name in before if name not in after}
    for name, service in after.items():
        if name not in before:
            changes[name] = "created"
            continue
        counting = {*service, *before[name]} - {"build", "pull_policy", "profiles"}
        keys = sorted(key for key in counting if service.get(key) != before[name].get(key))
        if keys == ["labels"] and label_of(service) != label_of(before[name]):
            changes[name] = "recreated: a file that it binds changed"
        elif keys:
            changes[name] = f"recreated: {', '.join(keys)} changed"
    return changes


def inherits_bind(binds: Iterable[Bind], service: Mapping[str, Any],
                  image_volumes: Iterable[str]) -> bool:
    """Whether compose would hand an old container's bind on to the new one.

    It does so where the new one has an anonymous volume, of the compose file or of the image.
    """
    mounts = {os.path.normpath(str(mount.get("target"))): mount.get("source")
              for mount in service.get("volumes") or () if isinstance(mount, dict)}
    anonymous = {*map(os.path.normpath, image_volumes)} - {*mounts} | {
        target for target, source in mounts.items() if not source}
    return any(os.path.normpath(bind.target) in anonymous for bind in binds)


def waits_for_up(model: Model) -> bool:
    """`x-pgo: {reload: false}`: changes wait for `up`."""
    own = model.get("x-pgo")
    return isinstance(own, dict) and own.get("reload") is False


def image_of(project: str, name: str, service: Mapping[str, Any]) -> str:
    """The image's name; compose makes one up for what it builds."""
    return str(service.get("image") or f"{project}-{name}")


def import_text(services: Iterable[Service]) -> str:
    """Caddy's import file: a block a host, in order."""
    urls = sorted({host: target for service in services for host, target in service.urls}.items())
    blocks = [f"{host} {{\n\treverse_proxy {target}\n}}\n" for host, target in urls]
    return "# Written by pgod from pgo.toml; changes here are lost.\n" + "\n".join(blocks)

# ---- Policy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """One thing that a repository may not ask for, and the entry of `allow` that permits it."""

    where: str  # compose service, or the top-level key
    key: str
    value: str
    why: str
    allow: str = ""

    def redacted(self, secrets: Sequence[str]) -> Violation:
        """Without secrets, also those with a $, which compose doubles."""
        plain = {name: redact(text.replace("$$", "$"), secrets)
                 for name, text in dataclasses.asdict(self).items()}
        return Violation(**plain)

    def __str__(self) -> str:
        remedy = f"; an administrator permits it with allow = [{json.dumps(self.allow)}]"
        return (f"{printable(self.where)}: {printable(self.key)}: {printable(self.value)[:200]}: "
                f"{self.why}{remedy if self.allow else ''}")


def targets(service: Service) -> set[str]:
    """The hosts that a service's urls lead to."""
    return {target.rpartition(":")[0] for _, target in service.urls}


@dataclass(frozen=True)
class Surroundings:
    """What the policy knows besides the model."""

    service: Service
    others: tuple[Service, ...]
    worktree: str
    data: str
    tree: Tree = field(default_factory=dict)
    ports: tuple[int, ...] = ()  # pgod's own

    @property
    def name(self) -> str:
        return self.service.name

    def owns(self, text: str, *separators: str) -> bool:
        """Whether a name begins with ours and not with the longer one of a neighbour."""
        def begins(name: str) -> bool:
            return any(text.startswith(name + separator) for separator in separators)
        return begins(self.name) and not any(
            begins(other.name) for other in self.others if other.name.startswith(self.name))

    def neighbour_names(self) -> set[str]:
        """Names that a shared network must not answer to in our place."""
        theirs = {name for other in self.others for name in (other.name, *targets(other))}
        return {name.lower() for name in theirs - {self.name, *targets(self.service)}}


Found = Iterator[Violation]
Rule = Callable[[str, Any, "Surroundings"], Found]

MAX_REPLICAS = 20
MAX_CONTAINERS = 100  # of one project
MAX_BINDS = 500
MAX_PORTS = 1000
MAX_GRACE = 120.0


def shown(value: Any) -> str:
    """A value in a message."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def listed(value: Any) -> list[Any]:
    """The elements of a list, or the value alone."""
    return value if isinstance(value, list) else [value]


def named(value: Any) -> list[Any]:
    """The names of a mapping or of a list of NAME=VALUE."""
    return [*value] if isinstance(value, dict) else [str(item).split("=")[0] for item in value]


def refuse(key: str, why: str, harmless: str = "", of: Callable[[Any], list[Any]] = listed,
           name: Callable[[Any], str] | None = shown) -> Rule:
    """A rule for every part `of` a value: it is refused unless it matches `harmless`.

    `name` is how `allow` calls it; None where it has no more than the key.
    """
    def rule(where: str, value: Any, around: Surroundings) -> Found:
        for item in of(value) if value not in NOTHING else ():
            if item not in NOTHING and not re.fullmatch(harmless, shown(item)):
                entry = f"{key}:{name(item)}" if name else key
                yield Violation(where, key, shown(item), why, entry)
    return rule


def allowed(kind: str, usual: float, measure: Callable[[Any], float],
            around: Surroundings) -> float:
    """The largest of what everybody may have and what `allow` has."""
    return max([usual, *(measure(entry.partition(":")[2]) for entry in around.service.allow
                         if entry.partition(":")[0] == kind)])


def at_most(key: str, kind: str, usual: float, measure: Callable[[Any], float],
            why: str) -> Rule:
    """A rule: what `measure` makes of the value is at most `usual`, or an `allow` of that kind."""
    def rule(where: str, value: Any, around: Surroundings) -> Found:
        if value is not None and measure(value) > allowed(kind, usual, measure, around):
            yield Violation(where, key, str(value), why, f"{kind}:{value}")
    return rule


def bytes_of(value: Any) -> float:
    """A size as compose renders it or a tmpfs option has it; 0 and unknown forms are no limit."""
    match = re.fullmatch(r"0*([1-9]\d{0,14})([kmgb]?)b?", str(value).strip().lower())
    return int(match[1]) << {"k": 10, "m": 20, "g": 30}.get(match[2], 0) if match else math.inf


def seconds_of(value: Any) -> float:
    """A duration as compose renders it; unknown forms are too long."""
    return parse_duration(value) if permits(f"stop_grace_period:{value}") else math.inf


replicas_rule = at_most("replicas", "replicas", MAX_REPLICAS, int, f"is more than {MAX_REPLICAS}")
shm_rule = at_most("shm_size", "size", MAX_BYTES, bytes_of, "is more memory than 1 GiB")
tmpfs_size_rule = at_most("tmpfs", "size", MAX_BYTES, bytes_of, "is more memory than 1 GiB")
labels_rule = refuse("labels", "is compose's or pgod's own",
                     r"(?i)(?!com\.docker\.compose\.|io\.pgod\.)[\s\S]*", named)


def unknown_keys(where: str, prefix: str, value: Mapping[str, Any] | None,
                 known: Iterable[str]) -> Found:
    """Keys that say something and that pgod does not know."""
    for key, item in (value or {}).items():
        if key not in known and not key.startswith("x-") and item not in NOTHING:
            yield Violation(where, prefix + key, shown(item), "is not known to this pgod",
                            key if key in ALLOW else f"key:{key}")


def capability(item: Any) -> str:
    return str(item).upper().removeprefix("CAP_")


def device_path(item: Any) -> str:
    return str(item.get("source") if isinstance(item, dict) else item).split(":")[0]


def log_settings(value: Any) -> list[Any]:
    """The driver, options of others, for those may be the engine's usual one, and templates."""
    options = value.get("options") or {}
    return [value.get("driver"), *({*options} - LOG_OPTIONS),
            *(text for text in options.values() if not PLAIN_TEMPLATE.fullmatch(str(text)))]


def container_name_rule(where: str, value: Any, around: Surroundings) -> Found:
    taken = any(value == other.name or str(value).startswith(other.name + "-")
                or value in targets(other) for other in around.others)
    own = around.owns(str(value), "-") or value in targets(around.service)
    if value and taken and not own:
        yield Violation(where, "container_name", str(value), "is a neighbour's name",
                        f"container_name:{value}")


def port_range(value: Any) -> tuple[int, int]:
    """First and last of `80` or `8000-8010`; (0, 0) where the engine chooses."""
    first, _, last = str(value or "0").partition("-")
    return int(first), int(last or first)


def ports_rule(where: str, value: Any, around: Surroundings) -> Found:
    permitted = [port_range(entry[6:]) for entry in around.service.allow
                 if entry.startswith("ports:")]
    for item in value or ():
        published = item.get("published") if isinstance(item, dict) else item
        if not re.fullmatch(r"(\d{1,5}(-\d{1,5})?)?", str(published or "")):
            yield Violation(where, "ports", shown(published), "is not a port")
            continue
        first, last = port_range(published)
        if last == 0 or any(low <= first and last <= high for low, high in permitted):
            continue
        if first < 1024:
            yield Violation(where, "ports", str(published), "is a port under 1024",
                            f"ports:{published}")
        if any(first <= port <= last for port in around.ports):
            yield Violation(where, "ports", str(published), "is a port of pgod",
                            f"ports:{published}")


def tmpfs_rule(where: str, value: Any, around: Surroundings) -> Found:
    for item in listed(value or []):
        for option in str(item).partition(":")[2].split(","):
            if option.startswith("size="):
                yield from tmpfs_size_rule(where, option[5:], around)


LOG_OPTIONS = frozenset(("max-size max-file max-buffer-size mode compress tag labels labels-regex "
                         "env env-regex cache-disabled cache-max-size cache-max-file "
                         "cache-compress").split())
DEPLOY_KEYS = frozenset(("mode replicas labels update_config rollback_config resources "
                         "restart_policy placement endpoint_mode").split())


def deploy_rule(where: str, value: Any, around: Surroundings) -> Found:
    value = value or {}
    yield from unknown_keys(where, "deploy.", value, DEPLOY_KEYS)
    yield from replicas_rule(where, value.get("replicas"), around)
    yield from labels_rule(where, value.get("labels"), around)
    reservations = (value.get("resources") or {}).get("reservations") or {}
    for item in reservations.get("devices") or ():
        yield Violation(where, "deploy.devices", shown(item), "is a device of the host", "gpus")


def hooks_rule(where: str, value: Any, around: Surroundings) -> Found:
    for item in value or ():
        if isinstance(item, dict) and item.get("privileged"):
            yield Violation(where, "privileged", shown(item), "is root on the host", "privileged")


BUILD_KEYS = frozenset((
    "context dockerfile dockerfile_inline args labels target no_cache pull tags platforms "
    "network shm_size secrets ssh privileged entitlements additional_contexts cache_from cache_to "
    "extra_hosts isolation ulimits provenance sbom").split())


def beneath(path: str, root: str) -> str | None:
    """The path relative to root (`` for root itself), or None if it lies elsewhere."""
    if os.path.normpath(path) != path.rstrip("/") and path != root:
        return None
    if path.rstrip("/") == root:
        return ""
    return path.rstrip("/")[len(root) + 1:] if path.startswith(root + "/") else None


def link_above(relative: str, tree: Tree) -> str:
    """Why the commit makes a path unsafe: a symlink or submodule at it or above it."""
    parts = relative.split("/")
    for depth in range(1, len(parts) + 1):
        mode, _ = tree.get("/".join(parts[:depth]), ("", ""))
        if mode in LINK_MODES:
            return f"leads through {LINK_MODES[mode]} ({'/'.join(parts[:depth])})"
    return ""


def outside_commit(path: str, around: Surroundings) -> str:
    """Why a path is not a plain one of the commit, or nothing. compose doubles $ in a model."""
    if "$" in path:
        return "must be written without $"
    relative = beneath(path, around.worktree)
    if relative is None:
        return "lies outside the repository"
    return link_above(relative, around.tree)


CACHES = (r"[^=,\"\s]+|type=(registry|gha|inline)(,(ref|mode|scope|compression|oci-mediatypes|"
          r"image-manifest|ignore-error)=[^=,\"\s]+)*")


def build_paths_rule(where: str, build: Mapping[str, Any], around: Surroundings) -> Found:
    """Everything that the build reads lies in the commit, by no link."""
    context = str(build.get("context", ""))
    paths = [("context", context)]
    if not build.get("dockerfile_inline"):
        dockerfile = str(build.get("dockerfile", "Dockerfile"))
        if not os.path.isabs(dockerfile):  # compose joins it to the context word by word
            dockerfile = os.path.normpath(os.path.join(context, dockerfile))
        paths.append(("dockerfile", dockerfile))
    for source in (build.get("additional_contexts") or {}).values():
        if not str(source).startswith(("service:", "docker-image://")):
            paths.append(("additional_contexts", str(source)))
    for key, path in paths:
        why = outside_commit(path, around)
        if why:
            yield Violation(where, f"build.{key}", path, why)
    for key in ("cache_from", "cache_to"):
        for item in build.get(key) or ():
            if not re.fullmatch(CACHES, str(item)):
                yield Violation(where, f"build.{key}", str(item), "uses files of the host")


def built_image_rule(where: str, image: str, around: Surroundings) -> Found:
    repository = re.sub(r"(:[^/:]*)?(@.*)?$", "", image)
    entries = {f"image:{image}", f"image:{repository}"}
    if not around.owns(image, "-", "/") and not entries & {*around.service.allow}:
        yield Violation(where, "image", image, "is built here and may be what others use; "
                        f"call it {around.name}-… or {around.name}/…", f"image:{repository}")


def build_rule(where: str, value: Any, around: Surroundings) -> Found:
    build = value if isinstance(value, dict) else {"context": value}
    yield from unknown_keys(where, "build.", build, BUILD_KEYS)
    for key in ("privileged", "entitlements", "ssh"):
        if build.get(key):
            yield Violation(where, f"build.{key}", shown(build[key]), "is a power over the host",
                            f"build:{key}")
    if build.get("network") not in (None, "", "none", "default"):
        yield Violation(where, "build.network", shown(build["network"]),
                        "is a network that is not its own", f"build:network:{build['network']}")
    for tag in build.get("tags") or ():
        yield from built_image_rule(where, str(tag), around)
    yield from shm_rule(where, build.get("shm_size"), around)
    yield from build_paths_rule(where, build, around)


MOUNT_KEYS = frozenset("type source target read_only consistency bind volume tmpfs".split())
BIND_KEYS = frozenset("selinux propagation create_host_path recursive".split())


def volumes_rule(where: str, value: Any, around: Surroundings) -> Found:
    """What a mount is; the paths of bind mounts are looked at all together below."""
    for item in value or ():
        kind = item.get("type") if isinstance(item, dict) else shown(item)
        if kind not in ("bind", "volume", "tmpfs"):
            yield Violation(where, "volumes", shown(item), f"{kind} mounts are not known")
            continue
        bind = item.get("bind") or {}
        if bind.get("selinux"):
            yield Violation(where, "volumes", shown(item), "relabels files of the host")
        if bind.get("propagation") not in (None, "", "private", "rprivate"):
            yield Violation(where, "volumes", shown(item), "propagates mounts to the host")
        yield from unknown_keys(where, "volumes.", item, MOUNT_KEYS)
        yield from unknown_keys(where, "volumes.bind.", bind, BIND_KEYS)
        yield from tmpfs_size_rule(where, (item.get("tmpfs") or {}).get("size"), around)


def no_rule(where: str, value: Any, around: Surroundings) -> Found:
    """Harmless, or looked at elsewhere."""
    return iter(())


HOST_POWER = "is a power over the host"
# Of those that every container has, what Kubernetes' baseline lets one ask for by name.
USUAL_CAPABILITIES = ("(?i)(cap_)?(audit_write|chown|dac_override|fowner|fsetid|kill|mknod|"
                      "net_bind_service|setfcap|setgid|setpcap|setuid|sys_chroot)")
RESOURCE_KEYS = (
    "cpu_count cpu_percent cpu_period cpu_quota cpu_shares cpus cpuset mem_limit mem_reservation "
    "mem_swappiness memswap_limit pids_limit ulimits oom_score_adj").split()
PLAIN_KEYS = (
    "attach cap_drop command configs depends_on develop dns dns_opt dns_search domainname "
    "entrypoint environment expose extra_hosts healthcheck hostname image init "
    "links mac_address networks platform profiles pull_policy pull_refresh_after "
    "read_only restart secrets stdin_open stop_signal tty user working_dir").split()

# Every key of a compose service that pgod knows. One that is not here is refused by name.
SERVICE_RULES: dict[str, Rule] = {
    **{key: no_rule for key in (*PLAIN_KEYS, *RESOURCE_KEYS)},
    "annotations": refuse("annotations", "speaks to the runtime", name=None),
    "blkio_config": refuse("blkio_config", "takes the host's disks", name=None),
    "build": build_rule,
    "cap_add": refuse("cap_add", HOST_POWER, USUAL_CAPABILITIES, name=capability),
    "cgroup": refuse("cgroup", HOST_POWER, "private"),
    "cgroup_parent": refuse("cgroup_parent", "leaves the engine's limits"),
    "container_name": container_name_rule,
    "cpu_rt_period": refuse("cpu_rt_period", "starves the host", name=None),
    "cpu_rt_runtime": refuse("cpu_rt_runtime", "starves the host", name=None),
    "credential_spec": refuse("credential_spec", HOST_POWER, name=None),
    "deploy": deploy_rule, "device_cgroup_rules": refuse("device_cgroup_rules", HOST_POWER),
    "devices": refuse("devices", "is a device of the host", name=device_path),
    "external_links": refuse("external_links", "is another's container"),
    "gpus": refuse("gpus", "is a device of the host", name=None),
    "group_add": refuse("group_add", "may be a group of the host"),
    "ipc": refuse("ipc", "is another's memory", "private|shareable|none|service:.*"),
    "isolation": refuse("isolation", HOST_POWER, "default"), "labels": labels_rule,
    "logging": refuse("logging", "lets the engine connect elsewhere", "json-file|local|none",
                      of=log_settings),
    "models": refuse("models", "runs a program of the host", name=None),
    "network_mode": refuse("network_mode", "is a network that is not its own",
                           "none|bridge|default|service:.*"),
    "oom_kill_disable": refuse("oom_kill_disable", "may hang the host", name=None),
    "oom_score_adj": refuse("oom_score_adj", "puts others to death first", r"\d+"),
    "pid": refuse("pid", "sees the host's processes"),
    "ports": ports_rule, "post_start": hooks_rule, "pre_stop": hooks_rule,
    "privileged": refuse("privileged", "is root on the host", name=None),
    "provider": refuse("provider", "runs a program of the host", name=None),
    "runtime": refuse("runtime", "is another isolation than the engine's", "runc"),
    "scale": replicas_rule, "shm_size": shm_rule,
    "security_opt": refuse("security_opt", "takes a protection away",
                           "no-new-privileges([:=]true)?"),
    "stop_grace_period": at_most("stop_grace_period", "stop_grace_period", MAX_GRACE, seconds_of,
                                 "is longer than 2 minutes"),
    "storage_opt": refuse("storage_opt", HOST_POWER, name=None),
    "sysctls": refuse("sysctls", "is a setting of the host's kernel", r"net\..*", named),
    "tmpfs": tmpfs_rule,
    "use_api_socket": refuse("use_api_socket", "is the engine's socket", name=None),
    "userns_mode": refuse("userns_mode", HOST_POWER), "uts": refuse("uts", HOST_POWER),
    "volumes": volumes_rule,
    "volumes_from": refuse("volumes_from", "may be another's container", "(?!container:).*"),
}
TOP_KEYS = frozenset("name services networks volumes configs secrets version".split())
FILE_KEYS = frozenset("name file content environment labels".split())
NETWORK_KEYS = frozenset(("name driver driver_opts external internal attachable enable_ipv4 "
                          "enable_ipv6 ipam labels").split())
ATTACHMENT_KEYS = frozenset(("aliases driver_opts gw_priority interface_name ipv4_address "
                             "ipv6_address link_local_ips mac_address priority").split())
VOLUME_KEYS = frozenset("name driver driver_opts external labels".split())
ENGINE_NETWORKS = ("host", "bridge", "none", "default", "ingress")


def check_compose_service(where: str, service: Mapping[str, Any], around: Surroundings) -> Found:
    """The table's rules on one compose service, and what needs two of its keys."""
    yield from unknown_keys(where, "", service, SERVICE_RULES)
    for key in service:
        if key in SERVICE_RULES:
            yield from SERVICE_RULES[key](where, service[key], around)
    if service.get("build"):
        yield from built_image_rule(where, image_of(around.name, where, service), around)
    made_up = f"{around.name}-{where}"
    if not service.get("container_name") and not around.owns(made_up, "-"):
        yield Violation(where, "container_name", f"{made_up}-1", "is a neighbour's name")


def check_networks(model: Model, around: Surroundings) -> Found:
    """Networks are the project's own bridges, or external ones that are permitted."""
    for key, network in (model.get("networks") or {}).items():
        network = network or {}
        name = str(network.get("name") or f"{around.name}_{key}")
        yield from unknown_keys("networks", f"{key}.", network, NETWORK_KEYS)
        yield from labels_rule(f"networks.{key}", network.get("labels"), around)
        if network.get("external"):
            if around.service.networks and name not in around.service.networks:
                yield Violation("networks", key, name, "is an external network that is not among "
                                f"networks = {json.dumps(around.service.networks)}",
                                f"network:{name}")
            elif not around.service.networks and name in ENGINE_NETWORKS:
                yield Violation("networks", key, name, "is the engine's own", f"network:{name}")
            continue
        if not around.owns(name, "_"):
            yield Violation("networks", key, name, f"must be called {around.name}_…",
                            f"network:{name}")
        if network.get("driver") not in (None, "", "bridge", "default"):
            yield Violation("networks", key, shown(network["driver"]), "is not driver bridge",
                            f"network:{key}_driver")
        if network.get("driver_opts"):
            yield Violation("networks", key, shown(network["driver_opts"]),
                            "reaches into the host's network", f"network:{key}_driver_opts")
        ipam = network.get("ipam") or {}
        own_driver = ipam.get("driver") in (None, "", "default")
        if ipam.get("config") or ipam.get("options") or not own_driver:
            yield Violation("networks", key, shown(ipam), "takes addresses that may be another's",
                            f"network:{key}_ipam")


def check_attachments(model: Model, around: Surroundings) -> Found:
    """On an external network nobody may answer to a neighbour's name or take an address."""
    listed_by_others = {name for other in around.others for name in other.networks}
    shared = {key for key, network in (model.get("networks") or {}).items()
              if (network or {}).get("external")
              or str((network or {}).get("name")) in listed_by_others}
    taken = around.neighbour_names()
    for where, service in compose_services(model).items():
        networks = service.get("networks") or {}
        for key, attachment in (networks if isinstance(networks, dict) else {}).items():
            attachment = attachment or {}
            yield from unknown_keys(where, f"networks.{key}.", attachment, ATTACHMENT_KEYS)
            if attachment.get("driver_opts"):
                yield Violation(where, f"networks.{key}", "driver_opts",
                                "reaches into the host's network")
            if key not in shared:
                continue
            names = {where, str(service.get("hostname")), str(service.get("container_name")),
                     *map(str, attachment.get("aliases") or ())}
            for name in sorted(name for name in names if name.lower().rstrip(".") in taken):
                yield Violation(where, f"networks.{key}", name, "is a neighbour's name on a "
                                "network that is shared", f"network:{key}_name_{name}")
            attachment = {"mac_address": service.get("mac_address"), **attachment}
            for fixed in ("ipv4_address", "ipv6_address", "link_local_ips", "mac_address"):
                if attachment.get(fixed):
                    yield Violation(where, f"networks.{key}.{fixed}", shown(attachment[fixed]),
                                    "is a fixed address on a network that is shared",
                                    f"network:{key}_{fixed}")


def check_volumes(model: Model, around: Surroundings) -> Found:
    """Named volumes are local ones of the project."""
    for key, volume in (model.get("volumes") or {}).items():
        volume = volume or {}
        name = str(volume.get("name") or f"{around.name}_{key}")
        yield from unknown_keys("volumes", f"{key}.", volume, VOLUME_KEYS)
        yield from labels_rule(f"volumes.{key}", volume.get("labels"), around)
        if volume.get("external") or not around.owns(name, "_"):
            yield Violation("volumes", key, name, f"must be the project's own, {around.name}_…",
                            f"volume:{name}")
        if volume.get("driver") not in (None, "", "local") or volume.get("driver_opts"):
            yield Violation("volumes", key, shown(volume), "must have driver local and no options",
                            f"volume:{key}_driver")


def check_size(model: Model, around: Surroundings) -> Found:
    """How much of everything there is in all."""
    count = sum(max(0, replicas) for replicas in expected_replicas(model).values())
    if count > allowed("replicas", MAX_CONTAINERS, int, around):
        yield Violation("services", "replicas", str(count), f"is more than {MAX_CONTAINERS} "
                        "containers in all", f"replicas:{count}")
    for key, most in (("volumes", MAX_BINDS), ("ports", MAX_PORTS)):
        count = sum(len(service.get(key) or ()) for service in compose_services(model).values())
        if count > most:
            yield Violation("services", key, str(count), f"is more than {most} in all")


def check_top_level(model: Model, around: Surroundings) -> Found:
    """Unknown keys, and where configs and secrets come from."""
    yield from unknown_keys("the compose file", "", model, TOP_KEYS)
    for kind in ("configs", "secrets"):
        for name, entry in (model.get(kind) or {}).items():
            yield from unknown_keys(kind, f"{name}.", entry, FILE_KEYS)


# Read-only, these tell a container nothing but the time: very many compose files have them.
CLOCK_BINDS = (("/etc/localtime", True), ("/etc/timezone", True))


def bind_allowed(bind: Bind, service: Service) -> bool:
    """Whether `allow` has the path or one above it, and as much as is asked for."""
    for entry in service.allow:
        if entry.startswith("bind:"):
            path, _, mode = entry[5:].partition(":")
            inside = path == "/" or beneath(bind.source, path.rstrip("/")) is not None
            if inside and (mode != "ro" or bind.read_only):
                return True
    return False


def nested_binds(binds: Iterable[Bind], writers: Sequence[Bind]) -> Iterator[tuple[Bind, Bind]]:
    """Each bind that lies beneath one that a container can write, and that one."""
    for bind in binds:
        for above in writers:
            root = above.source.rstrip("/") + "/"
            if not above.read_only and bind.source.rstrip("/").startswith(root):
                yield bind, above


def check_nested_binds(binds: Sequence[Bind], around: Surroundings) -> Found:
    """No source beneath one that a container can write: it could put a link to /etc there.

    Also where `allow` has the upper one: only an entry for the very path is the administrator's
    word that he knows.
    """
    for bind, above in nested_binds(binds, binds):
        if not {f"bind:{bind.source}", f"bind:{bind.source}:ro"} & {*around.service.allow}:
            yield Violation(bind.compose_service, bind.kind, bind.source,
                            f"lies beneath {above.source}, which a container can write; bind "
                            "it from elsewhere, or that one read-only")


def check_binds(model: Model, around: Surroundings) -> Found:
    """Where bind mounts, configs and secrets may come from."""
    binds = binds_of(model)
    for bind in binds:
        entry = f"bind:{bind.source}{':ro' if bind.read_only else ''}"
        if bind_allowed(bind, around.service) or (bind.source, bind.read_only) in CLOCK_BINDS:
            continue
        why, relative = "", beneath(bind.source, around.worktree)
        if os.path.normpath(bind.source) != (bind.source.rstrip("/") or "/") or "$" in bind.source:
            why, entry = "must be written without . and .. and $", ""
        elif relative is None:
            if beneath(bind.source, around.data) is None:
                why = f"lies neither in the repository nor in {around.data}"
        elif link_above(relative, around.tree):
            why, entry = link_above(relative, around.tree), ""
        elif relative == "" and not bind.read_only:
            why, entry = "the whole repository can only be mounted read-only", ""
        elif relative.split("/")[0] in ("ssh", ".git"):
            why, entry = "holds what decides who may steer the service", ""
        if why:
            yield Violation(bind.compose_service, bind.kind, bind.source, why, entry)
    yield from check_nested_binds(binds, around)


def check_build_secrets(model: Model, around: Surroundings) -> Found:
    """A build reads them with the docker group, and before containers are looked at again."""
    for where, service in compose_services(model).items():
        build = service.get("build")
        uses = build.get("secrets") if isinstance(build, dict) else ()
        for file in files_used(uses, model.get("secrets") or {}):
            if why := outside_commit(file, around):
                yield Violation(where, "build.secrets", file, why)


def check_policy(model: Model, around: Surroundings) -> list[Violation]:
    """Every violation of a model whose paths are those of the work tree. Pure.

    One that is too large is not read any further: it may be made to take minutes.
    """
    found = list(check_size(model, around))
    if found:
        return [v for v in found if v.allow not in around.service.allow]
    found += check_top_level(model, around)
    for where, service in compose_services(model).items():
        found += check_compose_service(where, service or {}, around)
    for check in (check_networks, check_attachments, check_volumes, check_binds,
                  check_build_secrets):
        found += check(model, around)
    allowed = set(around.service.allow)
    offered = (v if permits(v.allow) else dataclasses.replace(v, allow="")
               for v in dict.fromkeys(found))
    return [violation for violation in offered if violation.allow not in allowed]


def check_bound_links(binds: Iterable[Bind], tree: Tree, worktree: str) -> list[str]:
    """Paths that containers bind and that a commit would turn into a link."""
    reasons = []
    for bind in binds:
        relative = beneath(bind.source, worktree)
        if relative and link_above(relative, tree):
            reasons.append(f"{bind.compose_service}: {relative}, which is mounted now, "
                           f"{link_above(relative, tree)}")
    return sorted(set(reasons))

# ---- State -------------------------------------------------------------------------------------


@dataclass
class State:
    """What is known of a service across restarts, one JSON file, replaced as a whole."""

    commit: str = ""  # the last good one: what runs
    since: float = 0.0  # when it was deployed, seconds since the epoch
    digest: str = ""  # of the configuration that it was deployed with
    images: dict[str, str] = field(default_factory=dict)  # name: identity, of the good commit
    baseline: dict[str, str] = field(default_factory=dict)  # file seals at a take-over
    installed: str = ""  # the commit whose files and model were put in place last
    deploying: str = ""  # a deploy of it began and has not ended
    before: dict[str, str] = field(default_factory=dict)  # containers then; "" where one was ill
    finished: list[str] = field(default_factory=list)  # compose services whose jobs are done
    wanted: str = ""  # the branch's commit when last asked
    waiting: str = ""  # the commit that waits for `up`, and the configuration
    waiting_digest: str = ""
    failed_commit: str = ""
    failed_digest: str = ""
    failed_reason: str = ""
    failed_retry: bool = False  # will be tried again by itself
    owes_rollback: bool = False
    reload_pending: bool = False


    @property
    def in_place(self) -> str:
        """The commit whose containers there are, good or not."""
        return self.installed or self.commit

    def good(self) -> dict[str, Any]:
        """What is known of the last good deploy; kept a second time beside its model."""
        return {name: getattr(self, name) for name in
                ("commit", "since", "digest", "images", "baseline")}


def load_json(path: Path, default: Any) -> Any:
    """What a JSON file of pgod's holds; the default where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return default
    return value if isinstance(value, type(default)) else default


def load_state(folder: Path) -> State:
    """The state on disk; what is missing, damaged or of another version is left at its default.

    Without it, the record of the last good deploy serves.
    """
    stored = load_json(folder / "state.json", {})
    if not stored and (stored := load_json(folder / "good.json", {}).get("state", {})):
        log.warning("%s: state lost, goes on from the last good deploy", folder.name)
    default = State()
    return State(**{key: value for key, value in stored.items() if key in vars(default)
                    and isinstance(value, type(getattr(default, key)))})


def format_time(seconds: float) -> str:
    """UTC, to the second."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


BY_HAND = "an administrator"


@dataclass(frozen=True)
class Hold:
    """Why nothing is deployed or healed: `down` and `stop`, or `hold`."""

    by: str
    reason: str
    since: float
    until: float = 0.0  # 0: until released
    kind: str = "stop"
    services: tuple[str, ...] = ()  # of compose, that `stop` named; none: all

    def __str__(self) -> str:
        end = f" until {format_time(self.until)}" if self.until else ""
        reason = f": {self.reason}" if self.reason else ""
        verb = "stopped" if self.kind == "stop" else "held"
        return f"{verb} by {self.by} since {format_time(self.since)}{end}{reason}"


def load_hold(path: Path, kind: str) -> Hold | None:
    """The hold that a file means; one that an administrator touched has no content."""
    try:
        since = path.stat().st_mtime
    except FileNotFoundError:
        return None
    facts = load_json(path, {})
    return Hold(str(facts.get("by", BY_HAND)), str(facts.get("reason", "")),
                float(facts.get("since", since)), float(facts.get("until", 0)), kind,
                tuple(facts.get("services", ())))

# ---- Decisions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """A container of a project, as the engine has it."""

    identity: str
    compose_service: str
    name: str
    status: str  # created, running, paused, restarting, removing, exited or dead
    exit_code: int
    health: str  # "", starting, healthy or unhealthy
    restarts: int
    policy: str  # restart policy: no, always, on-failure or unless-stopped
    image: str
    started: str
    binds: tuple[Bind, ...] = ()


@dataclass(frozen=True)
class Observed:
    """All that a decision rests on."""

    hold: str = ""
    wanted: str = ""  # "" where the remote could not be asked
    running: str = ""
    digest: str = ""
    running_digest: str = ""
    deploying: str = ""
    failed: tuple[str, str, bool] = ("", "", False)  # commit, digest, will be retried
    waiting: tuple[str, str] = ("", "")  # commit, digest
    installed: str = ""
    stopped: frozenset[str] = frozenset()  # compose services that `stop` or `down` has stopped
    finished: frozenset[str] = frozenset()  # compose services whose jobs are done
    owes_rollback: bool = False  # and it is time to try it again
    asked: bool = False  # by `up`
    containers: tuple[Container, ...] | None = None  # None: not looked at
    expected: Mapping[str, int] = field(default_factory=dict)
    by_hand: frozenset[str] = frozenset()  # containers that somebody stopped or killed


@dataclass(frozen=True)
class Decision:
    """What to do: nothing, stop, deploy or rollback to `commit`, or heal `services`; and why."""

    action: str
    commit: str = ""
    services: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    crashed: bool = False  # the heal is for containers that ended by themselves


CALM = "in sync"


def short(commit: str) -> str:
    return commit[:10]


FOREVER = ("always", "unless-stopped")  # restart policies of what never is done


def broken(container: Container, by_hand: bool) -> tuple[str, bool]:
    """Why a container must be brought back, or "", and whether it ended by itself.

    One that ended with 0 is done, unless somebody stopped it, or its restart policy says that it
    is never done (then somebody stopped it while pgod did not look).
    """
    if container.status in ("running", "restarting", "paused", "removing"):
        return "", False
    if container.status == "created":
        return "was never started", False
    if by_hand:
        return "was stopped by hand", False
    if container.status == "exited" and container.exit_code == 0:
        return ("was stopped", False) if container.policy in FOREVER else ("", False)
    return f"ended with {container.exit_code}", True


def decide_heal(seen: Observed, calm: str) -> Decision:
    """Which compose services miss a container that should run; `calm` is said if none does."""
    if seen.containers is None:
        return Decision("nothing", reasons=(calm,))
    needs: dict[str, str] = {}
    crashed = True
    for name, count in seen.expected.items():
        mine = [c for c in seen.containers if c.compose_service == name]
        bad = [(c, broken(c, c.identity in seen.by_hand)) for c in mine]
        for container, (why, by_itself) in bad:
            if why:
                needs[name] = f"{container.name} {why}"
                crashed = crashed and by_itself
        if len(mine) < count and name not in seen.finished:
            needs[name] = f"{name}: {count - len(mine)} of {count} containers missing"
            crashed = False
    if not needs:
        return Decision("nothing", reasons=(calm,))
    return Decision("heal", seen.running, tuple(sorted(needs)), tuple(needs.values()), crashed)


def deploy_reason(seen: Observed, target: str) -> str:
    """Why the target must be deployed, or nothing."""
    if not seen.running:
        return f"first deploy of {short(target)}"
    if seen.deploying:
        return f"the deploy of {short(seen.deploying)} was interrupted"
    if target != seen.running:
        return f"new commit {short(target)} (runs: {short(seen.running)})"
    if seen.installed and seen.installed != target:
        return f"{short(seen.installed)} is still in place"
    if seen.digest != seen.running_digest:
        return "the configuration changed"
    return ""


def decide(seen: Observed) -> Decision:
    """The one place where it is decided what is done for a service. Pure."""
    if seen.hold:
        up = {c.compose_service for c in seen.containers or ()
              if c.compose_service in seen.stopped and c.status in ("running", "restarting")}
        return Decision("stop" if up else "nothing", "", tuple(sorted(up)), (seen.hold,))
    target = seen.wanted or seen.deploying or seen.running
    if seen.asked and target:
        return Decision("deploy", target, reasons=("asked for by up",))
    if not target:
        return Decision("nothing", reasons=("the repository could not be reached yet",))
    if seen.owes_rollback and target in (seen.failed[0], seen.running):
        return Decision("rollback", seen.running, reasons=("the last rollback failed",))
    reason, calm = deploy_reason(seen, target), CALM
    if reason and seen.failed[:2] == (target, seen.digest) and not seen.failed[2]:
        reason, calm = "", f"{short(target)} failed and is not tried now"
    if reason and seen.waiting == (target, seen.digest):
        reason, calm = "", f"{short(target)} waits for up"
    if reason:
        return Decision("deploy", target, reasons=(reason,))
    return decide_heal(seen, calm)


def is_ill(container: Container) -> bool:
    """Whether it fails by itself, now or between two restarts."""
    return (container.status in ("restarting", "paused", "dead") or container.restarts > 0
            or container.health == "unhealthy")


def judge(containers: Sequence[Container], expected: Mapping[str, int],
          unchanged: frozenset[str] = frozenset()) -> tuple[str, str]:
    """One look at a deploy: ("good" | "wait" | "bad", why).

    Containers that `up` left as they were (`unchanged`) say nothing about the commit.
    """
    waiting = ""
    for container in containers:
        if container.identity in unchanged:
            continue
        who = f"{container.compose_service} ({container.name})"
        if container.status == "restarting" or container.restarts > 0:
            return "bad", f"{who} restarts after it ended with {container.exit_code}"
        if container.status in ("exited", "dead") and container.exit_code != 0:
            return "bad", f"{who} ended with {container.exit_code}"
        if container.health == "unhealthy":
            return "bad", f"{who} is unhealthy"
        if container.status == "created" or container.health == "starting":
            waiting = f"{who} is {container.health or container.status}"
    for name, count in expected.items():
        if sum(c.compose_service == name for c in containers) < count:
            waiting = f"{name} has no container"
    return ("wait", waiting) if waiting else ("good", "")


def retry_delay(interval: float, failures: int, chance: float) -> float:
    """Seconds to the next look: the interval and up to half of it, doubled at each failure."""
    if not failures:
        return interval * (1 + chance / 2)
    delay = min(interval * 2.0 ** min(failures - 1, 16), BACKOFF_CEILING)
    return min(delay * (1 + chance / 2), BACKOFF_CEILING)

# ---- Engine ------------------------------------------------------------------------------------


def compose_program(children: Children) -> tuple[str, ...]:
    """`docker compose`, or a standalone docker-compose of version 2. Raises Fault."""
    found = ""
    for words in (("docker", "compose"), ("docker-compose",)):
        try:
            result = children.run([*words, "version", "--short"], deadline=DEADLINE["docker"],
                                  kind=("", "compose", "version"))
        except Fault:
            continue
        version = result.stdout.decode(errors="replace").strip().removeprefix("v")
        if result.status == 0 and re.match(r"[2-9]\.|[1-9]\d+\.", version):
            return words
        if result.status == 0 and version.startswith("1."):
            found = f"docker-compose {version} is too old; "
    raise Fault(f"{found}docker compose 2 is needed: install docker-compose-v2 or "
                "docker-compose-plugin")


def docker_group() -> int | None:
    """The group that may speak to the engine's socket."""
    try:
        return grp.getgrnam("docker").gr_gid
    except KeyError:
        return None


def account_of(user: str, with_docker: bool = False) -> Account:
    """The user with the groups it has, the docker group taken away or added."""
    entry = pwd.getpwnam(user)
    groups = set(os.getgrouplist(user, entry.pw_gid))
    docker = docker_group()
    if docker is not None and user != "root":
        groups = groups | {docker} if with_docker else groups - {docker}
    return Account(user, entry.pw_uid, entry.pw_gid, tuple(sorted(groups)))


ENGINE_GONE = r"Cannot connect to the Docker daemon|error during connect|server is shutting down"


def parse_container(facts: Mapping[str, Any]) -> Container:
    """A Container of what `docker inspect` says."""
    state, labels = facts["State"], facts["Config"]["Labels"] or {}
    compose_service = labels.get("com.docker.compose.service", "")
    binds = tuple(Bind(compose_service, "bind", mount["Source"], not mount["RW"],
                       mount["Destination"])
                  for mount in facts.get("Mounts") or () if mount["Type"] == "bind")
    return Container(
        facts["Id"], compose_service, facts["Name"].lstrip("/"),
        state["Status"], state["ExitCode"], (state.get("Health") or {}).get("Status", "")
        .replace("none", ""), facts.get("RestartCount", 0),
        facts["HostConfig"]["RestartPolicy"]["Name"] or "no", facts["Image"], state["StartedAt"],
        binds)


def render_fault(result: Result) -> Fault:
    """Why a rendering failed; a limit's own words help nobody. A crash is no fault of the file."""
    text, why = result.stderr, result.complaint
    if "out of memory" in text or "cannot allocate memory" in text:
        why = f"it needs more than {RENDER_MEMORY >> 20} MiB of memory"
    elif result.status in (-signal.SIGXCPU, -signal.SIGKILL) or "SIGXCPU" in text:
        why = f"it needs more than {RENDER_CPU} s of processor time"
    elif "remote resource is disabled" in text:
        why = "it includes or extends an address; only files of the repository are read"
    elif "\ngoroutine " in text:
        return Fault(f"compose crashed: {text.splitlines()[0][:200]}")
    return Refused(f"the compose file does not render: {why}")


class Engine:
    """docker and compose for one service.

    Rendering has no access to the engine; all else runs as the user with the docker group, on the
    model that was checked.
    """

    def __init__(self, service: Service, places: Places, children: Children,
                 compose: tuple[str, ...]) -> None:
        self.service = service
        self.places = places
        self.children = children
        self.compose_words = compose
        self.account = account_of(service.user)
        self.docker_account = account_of(service.user, with_docker=True)

    @property
    def reader_group(self) -> int | None:
        """Only docker commands read the model and the logins: root's, of the docker group."""
        return docker_group() if os.geteuid() == 0 else None

    def environment(self) -> dict[str, str]:
        """For every docker command. Nothing in it or in a .env makes compose fetch a remote."""
        return dict(self.service.env) | {
            "DOCKER_CONFIG": str(self.places.own / "docker"),
            "BUILDX_CONFIG": str(self.places.own / "buildx"),
            "COMPOSE_PROFILES": ",".join(self.service.profiles),
            "COMPOSE_EXPERIMENTAL_GIT_REMOTE": "false", "COMPOSE_EXPERIMENTAL_OCI_REMOTE": "false",
            "COMPOSE_PROJECT_NAME": self.service.name, "COMPOSE_MENU": "false",
            "DOCKER_CLI_HINTS": "false"}

    def prepare(self) -> None:
        make_folder(self.places.own / "docker", 0o750, None, self.reader_group)
        make_folder(self.places.own / "buildx", 0o770, None, self.reader_group)
        if not (self.places.own / "docker" / "config.json").exists():
            self.write("docker/config.json", b"{}\n")

    def write(self, name: str, data: bytes) -> None:
        """A file of root's that docker commands can read and nobody can write."""
        mode = 0o640 if self.reader_group is not None else 0o600
        write_atomic(self.places.own / name, data, mode, None, self.reader_group)

    def words(self, *command: str, model: str = "model.json") -> list[str]:
        """A compose command on a checked model: the same prefix for every one."""
        return [*self.compose_words, "--ansi", "never", "--project-name", self.service.name,
                "--project-directory", str(self.places.worktree), "--file",
                str(self.places.own / model), "--env-file", "/dev/null", *command]

    def compose(self, *command: str, deadline: str, model: str = "model.json",
                on_line: Callable[[str], None] | None = None) -> Result:
        waits = self.service.wait if deadline == "up" else 0  # for what depends_on names
        return self.children.run(
            self.words(*command, model=model), account=self.docker_account,
            env=self.environment(), deadline=DEADLINE[deadline] + waits, on_line=on_line,
            kind=(self.service.name, "compose", command[0]), secrets=self.service.secrets)

    def docker(self, *command: str, deadline: str = "docker") -> Result:
        return self.children.run(
            ["docker", *command], account=self.docker_account, env=self.environment(),
            deadline=DEADLINE[deadline], kind=(self.service.name, "docker", command[0]),
            secrets=self.service.secrets)

    def compose_files(self, tree: Tree) -> list[str]:
        """The files of the commit to render. Raises Refused if there is none."""
        names = self.service.compose or next(
            ((name,) for name in COMPOSE_FILES if name in tree), ())
        if not names:
            raise Refused(f"the repository has none of {', '.join(COMPOSE_FILES)}")
        for name in names:
            if name not in tree:
                raise Refused(f"the repository has no {name}")
        return [str(self.places.export / name) for name in names]

    def render(self, tree: Tree) -> Model:
        """The model of the exported commit, by compose itself, its paths those of the export.

        As the user, without the docker group, with limits. Raises Refused.
        """
        files = [word for name in self.compose_files(tree) for word in ("--file", name)]
        env = {"PWD": str(self.places.export), **self.environment(), "GIT_ALLOW_PROTOCOL": "none",
               "DOCKER_CONFIG": "/nonexistent", "GOMAXPROCS": "2"}
        result = self.children.run(
            ["prlimit", f"--cpu={RENDER_CPU}", f"--data={RENDER_MEMORY}", "--core=0", "--",
             *self.compose_words, "--project-name", self.service.name, "--project-directory",
             str(self.places.export), *files, "config", "--format", "json"],
            account=self.account, env=env, deadline=DEADLINE["render"], limit=RENDER_OUTPUT,
            folder=Path("/"), kind=(self.service.name, "compose", "config"),
            secrets=self.service.secrets)
        if result.status or result.trouble:
            raise render_fault(result)
        try:
            model = json.loads(result.stdout)
        except ValueError:
            raise Refused("the compose file does not render: compose wrote no JSON") from None
        if not compose_services(model):
            raise Refused("the compose file has no services (or none in these profiles)")
        return dict(model)

    def login(self) -> None:
        """Log in to every registry, with a configuration of the service's own. Raises Fault."""
        for registry in self.service.registries:
            result = self.children.run(
                ["docker", "login", "--username", registry.user, "--password-stdin",
                 registry.address], env=self.environment(), stdin=registry.token.encode(),
                deadline=DEADLINE["login"], kind=(self.service.name, "docker", "login"),
                secrets=self.service.secrets)
            with contextlib.suppress(FileNotFoundError):
                self.write("docker/config.json",
                           (self.places.own / "docker" / "config.json").read_bytes())
            if result.status or result.trouble:
                raise Fault(f"login to {registry.address} failed: {result.complaint}")

    def pull(self, model: Model, on_line: Callable[[str], None]) -> None:
        """Pull what is not built; a pull that fails is a warning if the images are here."""
        pulled = [name for name, service in compose_services(model).items()
                  if not service.get("build") and service.get("pull_policy") != "never"]
        trouble = ""
        if pulled:
            try:
                self.login()
            except Fault as fault:
                trouble = str(fault)
            names = ("--", *sorted(pulled))  # a compose service may be called --build
            result = self.compose("pull", "--quiet", *names, deadline="pull", model="render.json")
            if result.status or result.trouble:
                trouble = trouble or result.complaint
            if result.status and len(pulled) > 1:  # compose gave up at the first that failed
                self.compose("pull", "--quiet", "--ignore-pull-failures", *names, deadline="pull",
                             model="render.json")
        if any(service.get("build") for service in compose_services(model).values()):
            self.build(on_line)
        missing = self.missing_images(model)
        if missing:
            raise Fault(f"image {', '.join(missing)} cannot be pulled and is not here"
                        f"{': ' + trouble if trouble else ''}")
        if trouble:
            on_line(f"pull failed, the images that are here serve: {trouble}")

    def build(self, on_line: Callable[[str], None]) -> None:
        result = self.compose("build", deadline="build", model="render.json")
        if result.status or result.trouble:
            raise Refused(f"build failed: {one_line(result.stderr + result.trouble, 600)}")
        on_line("built")

    def image_identity(self, name: str) -> str:
        """Empty where the image is not here. Raises EngineGone."""
        result = self.docker("image", "inspect", "--format", "{{.Id}}", "--", name)
        if result.status and "o such image" not in result.stderr:
            raise EngineGone(f"the engine does not answer: {result.complaint}")
        return result.stdout.decode().strip()

    def images(self, model: Model) -> dict[str, str]:
        """Name and identity of a model's images, empty for those that are not here."""
        names = {image_of(self.service.name, name, service)
                 for name, service in compose_services(model).items()}
        return {name: self.image_identity(name) for name in sorted(names)}

    def missing_images(self, model: Model) -> list[str]:
        return [name for name, identity in self.images(model).items() if not identity]

    def keep_images(self, images: Mapping[str, str]) -> None:
        """Have a container of each image of the good commit that is never started.

        `docker image prune --all` takes every image that no container has, tagged or not.
        """
        label = f"{KEEP_LABEL}={self.service.name}"
        wanted = {f"pgod-keep-{hashlib.sha256((label + identity).encode()).hexdigest()[:12]}":
                  identity for identity in images.values() if identity}
        listed = self.docker("ps", "--all", "--filter", f"label={label}", "--format", "{{.Names}}")
        have = set(listed.stdout.decode().split())
        for name in sorted({*wanted} - have):
            places = (f"--mount=type=tmpfs,destination={place}"  # instead of anonymous volumes
                      for place in self.image_volumes(wanted[name]))
            # An image that compose built has its project's label, and hands it on.
            self.docker("create", "--name", name, "--label", label, "--label",
                        "com.docker.compose.project=", "--network", "none", "--pull", "never",
                        *places, "--", wanted[name], "never-started")
        if (old := sorted(have - {*wanted})) and listed.status == 0:
            self.docker("rm", "--force", "--volumes", *old)

    def restore_images(self, images: Mapping[str, str]) -> None:
        """Move tags that a newer commit moved back to what the good commit ran."""
        for name, identity in images.items():
            if identity and "@" not in name and self.image_identity(name) != identity:
                self.docker("tag", identity, name)

    def containers(self) -> tuple[Container, ...]:
        """The containers of the project, one-off ones left out. Raises Fault."""
        label = f"label=com.docker.compose.project={self.service.name}"
        listed = self.docker("ps", "--all", "--quiet", "--no-trunc", "--filter", label,
                             "--filter", "label=com.docker.compose.oneoff=False")
        if listed.status:
            raise EngineGone(f"the engine does not answer: {listed.complaint}")
        identities = listed.stdout.decode().split()
        if not identities:
            return ()
        result = self.docker("inspect", "--type", "container", *identities)
        try:
            return tuple(sorted(map(parse_container, json.loads(result.stdout or b"[]")),
                                key=lambda container: container.name))
        except (ValueError, KeyError) as error:
            raise Fault(f"docker inspect cannot be read: {error!r}") from None

    def remove_half_made(self) -> None:
        """Remove what a recreation that was cut short left: its name makes the next one fail.

        compose creates the new container as ID_NAME, removes the old one and renames it.
        """
        half_made = [c.identity for c in self.containers()
                     if c.status == "created" and re.match(r"[0-9a-f]{12}_", c.name)]
        if half_made:
            self.docker("rm", "--force", *half_made)

    def image_volumes(self, name: str) -> list[str]:
        result = self.docker("image", "inspect", "--format", "{{json .Config.Volumes}}", "--", name)
        return [*(json.loads(result.stdout or b"null") or {})]

    def remove_inherited(self, model: Model) -> None:
        """Remove containers whose bind mount would outlive the model that had it."""
        services = compose_services(model)
        heirs = [c.identity for c in self.containers()
                 if c.binds and (service := services.get(c.compose_service)) and inherits_bind(
                     c.binds, service, self.image_volumes(
                         image_of(self.service.name, c.compose_service, service)))]
        if heirs:
            self.docker("rm", "--force", *heirs)

    def up(self, model: Model, on_line: Callable[[str], None], services: Iterable[str] = (),
           alone: bool = False) -> None:
        """Bring the checked model up, or some compose services of it. Raises Fault.

        `alone`: without what they depend on.
        """
        self.remove_half_made()
        self.remove_inherited(model)
        extra = ("--no-deps" if alone else "--remove-orphans", "--", *services)
        words = ("up", "--detach", "--no-build", "--quiet-pull", "--pull", "never")
        result = self.compose(*words, *extra, deadline="up", on_line=on_line)
        if result.status and re.search(r"network \S+ not found", result.stderr):
            # It was deleted beneath containers that are stopped; they keep to its number.
            result = self.compose(*words, "--force-recreate", *extra, deadline="up",
                                  on_line=on_line)
        if result.status or result.trouble:
            gone = re.search(ENGINE_GONE, result.stderr)
            raise (EngineGone if gone else Fault)(f"up: {result.complaint}")

# ---- Service -----------------------------------------------------------------------------------

Say = Callable[[str], None]


@dataclass
class Request:
    """What a key holder asks a service's thread to do; `done` is set when `status` is final."""

    command: str
    arguments: tuple[str, ...]
    services: tuple[str, ...]  # of compose, that the arguments name
    by: str
    say: Say
    status: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Turns:
    """A few deploys at a time, so that a boot is no stampede. One that takes long makes room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._begun: dict[str, float] = {}  # service: when its deploy began

    def take(self, service: str) -> bool:
        """Whether it is this service's turn now."""
        now = self._clock()
        with self._lock:
            fresh = [begun for begun in self._begun.values() if begun > now - SLOW_DEPLOY]
            if len(fresh) < SAME_TIME_DEPLOYS:
                self._begun[service] = now
            return len(fresh) < SAME_TIME_DEPLOYS

    def give_back(self, service: str) -> None:
        with self._lock:
            self._begun.pop(service, None)


@dataclass
class Shared:
    """What the threads have in common."""

    settings: Settings
    configuration: Configuration
    children: Children
    metrics: Metrics
    compose_words: tuple[str, ...]
    turns: Turns = field(default_factory=Turns)
    stopping: threading.Event = field(default_factory=threading.Event)
    events_flow: threading.Event = field(default_factory=threading.Event)
    workers: dict[str, Worker] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random


class Worker(threading.Thread):
    """The thread of one service. All that changes the service happens in it, one by one.

    It sleeps until its timer, an event of the engine or a request wakes it.
    """

    def __init__(self, service: Service, shared: Shared) -> None:
        super().__init__(name=service.name, daemon=True)
        self.service = service
        self.shared = shared
        self.places = Places(service.name, shared.settings.directory, shared.settings.datadir)
        self.engine = Engine(service, self.places, shared.children, shared.compose_words)
        self.git = Git(service, self.places, self.engine.account, shared.children)
        self.state = load_state(self.places.own)
        self.keys = tuple(PublicKey(*pair) for pair in load_json(self.places.own / "keys.json", []))
        self.failures = 0
        self.last_error = ""
        self.remote_error = ""
        self.unfetched = ""
        self.next_look = 0.0  # monotonic
        self.last_crash_heal = -1e9
        self.unsettled = True  # something may be amiss that no event will tell of
        self.containers: tuple[Container, ...] = ()
        self._condition = threading.Condition()
        self._wakes: set[str] = {"start"}
        self._requests: collections.deque[Request] = collections.deque()
        self._by_hand: set[str] = set()

    # Woken from other threads:

    def wake(self, cause: str, stopped_by_hand: str = "") -> None:
        """Have a look now, because of `timer`, `webhook`, `event` or `engine`."""
        with self._condition:
            self._wakes.add(cause)
            if stopped_by_hand:
                self._by_hand.add(stopped_by_hand)
            self._condition.notify()

    def ask(self, request: Request) -> Request:
        """Queue a request."""
        with self._condition:
            self._requests.append(request)
            self._condition.notify()
        return request

    # The thread:

    def run(self) -> None:
        prepared = False
        while not self.shared.stopping.is_set():
            request, wakes = self._next()
            if self.shared.stopping.is_set() and not request:
                break
            try:
                if not prepared:
                    self.prepare()
                    prepared = True
                if request:
                    self.answer(request)
                elif wakes:
                    self.look(frozenset(wakes), self.say_log,
                              "webhook" if "webhook" in wakes else "timer")
            except Stopping:
                break
            except Exception as error:  # the thread's outermost line
                self.fail(error, request)
            finally:
                if request:
                    request.done.set()
        self._refuse_requests()

    def _next(self) -> tuple[Request | None, set[str]]:
        """The next request, or what it was woken by; sleeps until there is something."""
        with self._condition:
            while not self._requests and not self._wakes and not self.shared.stopping.is_set():
                self.shared.children.beat()
                left = self.next_look - self.shared.clock()
                if left <= 0:
                    self._wakes.add("timer")
                    break
                self._condition.wait(min(left, 5.0))
            if self._requests:
                return self._requests.popleft(), set()
            wakes, self._wakes = self._wakes, set()
            return None, wakes

    def _refuse_requests(self) -> None:
        with self._condition:
            for request in self._requests:
                request.status = 1
                request.say("pgod is ending; try again in a moment")
                request.done.set()

    def fail(self, error: Exception, request: Request | None) -> None:
        """Log what went wrong once, count it, and put the next look off."""
        known = isinstance(error, Fault | OSError)
        text = redact(str(error), self.service.secrets)
        if request:
            request.status = 1
            request.say(f"failed: {text}" if known else "failed: an error of pgod, see its log")
            if isinstance(error, Refused):
                log.info("%s: %s: %s", self.service.name, request.command, text)
                return
        if text != self.last_error or not known:
            log.error("%s: failed: %s", self.service.name, text, exc_info=None if known else error)
        self.last_error = text
        self.failures += 1
        self.unsettled = True
        if self.next_look <= self.shared.clock():
            self.schedule()
        self.show_metrics()

    def schedule(self) -> None:
        """When to look next."""
        delay = retry_delay(self.shared.settings.duration, self.failures, self.shared.chance())
        self.next_look = self.shared.clock() + delay

    def say_log(self, text: str) -> None:
        log.info("%s: %s", self.service.name, text)

    def prepare(self) -> None:
        """The service's folders, and the take-over of a checkout of the Go program."""
        places, account = self.places, self.engine.account
        make_folder(places.own, 0o711)
        self.follow_user()
        removed = sorted((places.own.parent / "removed").glob(f"{self.service.name}-????????T*"))
        if removed and not places.worktree.exists():
            log.warning("%s: begins anew; what it had before it left the configuration is in %s",
                        self.service.name, removed[-1])
        make_folder(places.worktree, 0o700, account)
        if not places.data.exists():
            make_folder(places.data, 0o750, account)
        self.mount_data()
        self.git.prepare()
        self.engine.prepare()
        if self.state.commit and not self.running_model():
            self.restore_model()
        if (places.worktree / ".git").is_dir():
            self.take_over()

    def follow_user(self) -> None:
        """Where `user` is another one than before: files of the commit and of git go to him."""
        root, git, account = self.places.worktree, self.git.folder, self.engine.account
        former = root.lstat().st_uid if root.exists() else account.uid
        if former != account.uid:
            hand_over(root, self.tracked(), former, account)
            hand_over(git, [os.path.relpath(os.path.join(top, name), git) for top, folders, files
                            in os.walk(git) for name in (*folders, *files)], former, account)

    def restore_model(self) -> None:
        """The model is lost: the good one serves, or all is as before the first deploy."""
        good = self.good_model()
        log.warning("%s: the model on disk cannot be read: %s", self.service.name,
                    "the good one serves" if good else "deploys again")
        if good:
            self.write_model("model.json", good)
        else:
            self.state.commit = ""

    def mount_data(self) -> None:
        """Mount `mount` on the data folder, if it is not mounted."""
        if not self.service.mount or self.places.data.is_mount():
            return
        parts = urllib.parse.urlsplit(self.service.mount)
        words = ["mount", "-t", "nfs", "-o", "rw,nosuid,hard", f"{parts.netloc}:{parts.path}",
                 str(self.places.data)]
        result = self.shared.children.run(words, deadline=DEADLINE["mount"],
                                          kind=(self.service.name, "mount", "nfs"))
        if result.status or result.trouble:
            raise Fault(f"mount of {self.service.mount}: {result.complaint}")

    def take_over(self) -> None:
        """Go on where the Go program stopped, touching neither its files nor its containers.

        Its .git goes last: until then, the next start begins again. Keys in it are not believed:
        a container could write it.
        """
        if not self.state.commit:
            try:
                commit = self.git.take_over()
                tree = self.git.export(commit)
                self.write_tracked(tree)
                self.adopt(commit, tree)
            except EngineGone:
                raise
            except Fault as fault:  # what runs stays as it is, and is not started again
                log.warning("%s: its checkout cannot be taken over, begins anew: %s",
                            self.service.name, fault)
        aside = self.places.own / "taken-over.git"
        shutil.rmtree(aside, ignore_errors=True)
        (self.places.worktree / ".git").rename(aside)

    def adopt(self, commit: str, tree: Tree) -> None:
        """Take what runs for a good deploy of the commit. Raises Refused where the policy does."""
        model = self.render(tree)
        self.enforce(model, tree)
        self.state.installed = commit
        self.state.baseline = file_seals(model, tree, str(self.places.worktree), {})
        self.state.commit, self.state.since = commit, time.time()
        self.state.digest = self.digest()
        self.write_model("model.json", model)
        self.keep_good(model)
        self.save()
        log.info("%s: taken over at %s", self.service.name, short(commit))

    # What is known:

    def digest(self) -> str:
        """Changes when a deploy must be done again for the configuration's sake."""
        parts = (self.service.digest(), str(self.places.worktree), str(self.places.data))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def save(self) -> None:
        data = json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True)
        write_atomic(self.places.own / "state.json", data.encode())

    def tracked(self) -> Tree:
        """What pgod put into the work tree."""
        stored = load_json(self.places.own / "tracked.json", {})
        return {path: (mode, blob) for path, (mode, blob) in stored.items()}

    def write_tracked(self, tree: Tree) -> None:
        write_atomic(self.places.own / "tracked.json", json.dumps(tree, sort_keys=True).encode())

    def running_model(self) -> Model:
        return dict(load_json(self.places.own / "model.json", {}))

    def good_model(self) -> Model:
        return dict(load_json(self.places.own / "good.json", {}).get("model", {}))

    def write_model(self, name: str, model: Model) -> None:
        self.engine.write(name, json.dumps(model, sort_keys=True).encode())

    def keep_good(self, model: Model) -> None:
        """All that a rollback to the state's commit needs: its images and its model."""
        self.state.images = self.engine.images(model)
        self.engine.keep_images(self.state.images)
        self.write_model("good.json", {"model": model, "state": self.state.good()})

    def hold(self) -> Hold | None:
        """The hold in force; one whose time is over is removed."""
        own = self.places.own / "hold.json"
        hold = load_hold(own, "hold")
        if hold and hold.until and hold.until <= time.time():
            own.unlink(missing_ok=True)
            log.info("%s: hold ended: its time is over", self.service.name)
            hold = None
        return load_hold(self.places.stop, "stop") or hold

    def around(self, tree: Tree) -> Surroundings:
        settings = self.shared.settings
        ports = tuple(address[1] for address in (settings.ssh, settings.metric) if address)
        others = tuple(s for s in self.shared.configuration.services if s.name != self.service.name)
        return Surroundings(self.service, others, str(self.places.worktree), str(self.places.data),
                            tree, ports)

    def render(self, tree: Tree) -> Model:
        """The exported commit's model, its paths those of the work tree. Raises Refused."""
        try:
            model: Model = moved_paths(self.engine.render(tree), str(self.places.export),
                                       str(self.places.worktree))
        except RecursionError:
            raise Refused("the compose file is nested too deeply") from None
        return model

    # Looking:

    def look(self, wakes: frozenset[str], say: Say, by: str, asked: bool = False) -> Decision:
        """Observe, decide, act. Raises Fault; then the next look is put off."""
        asking = asked or bool(wakes - {"event"})
        if asking:
            self.ask_remote(say if asked else log.debug)
        looked = (bool(wakes & {"start", "event", "engine"}) or self.unsettled
                  or not self.shared.events_flow.is_set())
        if looked and self.state.commit:
            self.containers = self.engine.containers()
            self.note_finished()
        seen = self.observe(looked, asked)
        decision = decide(seen)
        log.debug("%s: %s: %s", self.service.name, decision.action, "; ".join(decision.reasons))
        if self.state.waiting and decision.reasons == (CALM,):  # what waited was taken back
            self.state.waiting = ""
            self.save()
        self.act(decision, say, by, asked)
        # A hold ends without an event, and so does the cause of a heal that was put off.
        self.unsettled = bool(seen.hold) or decision.action == "heal"
        self.follow_import()
        serves = asked and decision.action != "nothing" and not self.unfetched
        if asking and self.remote_error and not serves:
            raise Fault(self.remote_error)
        if asking:  # an event must not put polls off
            self.failures, self.last_error = 0, ""
            self.shared.metrics.set("pgo_service_last_success_timestamp_seconds", time.time(),
                                    service=self.service.name)
            self.schedule()
        self.show_metrics()
        return decision

    def note_finished(self) -> None:
        """Remember jobs that are done: their containers may be pruned."""
        if self.hold():
            return
        done = {c.compose_service for c in self.containers if c.status == "exited"
                and c.exit_code == 0 and c.policy not in FOREVER
                and c.identity not in self._by_hand}
        others = {c.compose_service for c in self.containers} - done
        finished = sorted(done | {*self.state.finished} - others)
        if finished != self.state.finished:
            self.state.finished = finished
            self.save()

    def ask_remote(self, say: Callable[..., None]) -> None:
        """Learn the branch's commit; fetch it, and the keys in it, if it is new.

        What went wrong shows in `remote_error`, and in `unfetched` the commit that is there and
        cannot be had.
        """
        self.unfetched = ""
        try:
            commit = self.git.ask()
            if commit != self.state.wanted or not self.keys:
                self.unfetched = commit
                commit = self.git.fetch()
                self.learn_keys(self.git.export(commit))
                self.state.wanted, self.unfetched = commit, ""
                self.save()
            self.remote_error = ""
        except Fault as fault:
            self.remote_error = f"{short(self.unfetched)} cannot be fetched: {fault}" if (
                self.unfetched) else f"the repository cannot be reached: {fault}"
            say(self.remote_error)

    def learn_keys(self, tree: Tree) -> None:
        self.keys = self.git.public_keys(tree)
        rows = [[key.fingerprint, key.comment] for key in self.keys]
        write_atomic(self.places.own / "keys.json", json.dumps(rows).encode())

    def observe(self, looked: bool, asked: bool) -> Observed:
        state, hold = self.state, self.hold()
        retry = state.failed_retry and self.shared.clock() >= self.next_look
        return Observed(
            hold=str(hold) if hold else "", stopped=self.stopped(hold), wanted=state.wanted,
            running=state.commit, installed=state.installed,
            finished=frozenset(state.finished), digest=self.digest(),
            running_digest=state.digest, deploying=state.deploying,
            failed=(state.failed_commit, state.failed_digest, retry),
            waiting=(state.waiting, state.waiting_digest),
            owes_rollback=state.owes_rollback and self.shared.clock() >= self.next_look,
            asked=asked, containers=self.containers if looked and self.state.commit else None,
            expected=expected_replicas(self.running_model()) if looked else {},
            by_hand=frozenset(self._by_hand))

    def stopped(self, hold: Hold | None) -> frozenset[str]:
        """Compose services that a command has stopped. A file made by hand only holds."""
        if not hold or hold.kind != "stop" or hold.by == BY_HAND:
            return frozenset()
        return frozenset(hold.services or compose_services(self.running_model()))

    def act(self, decision: Decision, say: Say, by: str, asked: bool) -> None:
        if decision.action == "deploy":
            self.deploy(decision, say, by, asked)
        elif decision.action == "rollback":
            self.roll_back(say)
        elif decision.action == "heal":
            self.heal(decision, say)
        elif decision.action == "stop":  # as after a reboot, where the engine starts them
            self.say_log(f"stops what runs: {'; '.join(decision.reasons)}")
            self.engine.compose("stop", "--", *decision.services, deadline="up")

    def restore_images(self) -> None:
        """Tags of the good commit's images, but for those of images that a neighbour builds."""
        around = self.around({})
        theirs = tuple(other.name + mark for other in around.others for mark in "-/")
        self.engine.restore_images(
            {name: identity for name, identity in self.state.images.items()
             if around.owns(name, "-", "/") or not name.startswith(theirs)})

    def heal(self, decision: Decision, say: Say) -> None:
        """Bring containers back; those that end by themselves at most once an interval."""
        now = self.shared.clock()
        if decision.crashed:
            if now < self.last_crash_heal + self.shared.settings.duration:
                return
            self.last_crash_heal = now
        say(f"brings back: {'; '.join(decision.reasons)}")
        model = self.running_model()
        self.restore_images()
        self.make_binds(model)
        self.forget_hands(c for c in self.containers if c.compose_service in decision.services)
        self.engine.up(model, log.debug, decision.services, alone=True)
        self.containers = self.engine.containers()
        self.shared.metrics.add("pgo_service_heals_total", service=self.service.name)

    def forget_hands(self, containers: Iterable[Container]) -> None:
        """What of these ends from now on was not stopped by hand, until an event says so."""
        with self._condition:
            self._by_hand -= {container.identity for container in containers}

    # Deploying:

    def checked(self, commit: str) -> tuple[Tree, Model, Model]:
        """The commit's tree, the model as rendered, and the one to run. Raises Refused."""
        tree = self.git.export(commit)
        model = with_tmpfs_sizes(self.render(tree))
        self.enforce(model, tree)
        if links := self.bound_links(self.engine.containers(), tree):
            raise Refused("; ".join(links))
        seals = file_seals(model, tree, str(self.places.worktree), self.generated())
        # Built is from the export alone, also where the file names the work tree itself.
        rendered = moved_paths(model, str(self.places.worktree), str(self.places.export))
        return tree, rendered, with_file_labels(model, seals, self.state.baseline)

    def enforce(self, model: Model, tree: Tree) -> None:
        """Raises Refused with every violation; those of root's repositories are only logged."""
        violations = [v.redacted(self.service.secrets) for v in
                      check_policy(model, self.around(tree))]
        self.shared.metrics.set("pgo_service_policy_violations", len(violations),
                                service=self.service.name)
        if violations and not self.service.trusted:
            text = "the policy refuses it:\n" + "\n".join(f"  {v}" for v in violations)
            raise Refused(text)
        for violation in violations:
            log.warning("%s: root's repository, so only reported: %s", self.service.name, violation)

    def bound_links(self, containers: Iterable[Container], tree: Tree) -> list[str]:
        """Why the tree must not be put beneath these: their next restart would follow a link."""
        binds = [bind for container in containers for bind in container.binds]
        worktree = str(self.places.worktree)
        return [] if self.service.trusted else check_bound_links(binds, tree, worktree)

    def generated(self) -> dict[str, str]:
        """Files that pgod writes into the work tree, with their hashes."""
        if not self.service.import_file:
            return {}
        text = import_text(self.shared.configuration.services)
        return {self.service.import_file: blob_of(text.encode())}

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One of the few deploys at a time; who waits long for it still lives."""
        while not self.shared.turns.take(self.service.name):
            self.shared.children.beat()
            if self.shared.stopping.wait(0.1):
                raise Stopping
        try:
            yield
        finally:
            self.shared.turns.give_back(self.service.name)

    def deploy(self, decision: Decision, say: Say, by: str, asked: bool) -> None:
        """Steps 3 to 8 of the way from a push to running containers. Raises Fault."""
        commit, began = decision.commit, time.monotonic()
        with self.turn():
            try:
                tree, rendered, model = self.checked(commit)
                if waits_for_up(model) and self.state.commit and not asked:
                    self.wait_for_up(commit)
                    return
                say(f"deploys {short(commit)}: {'; '.join(decision.reasons)}")
                self.write_model("render.json", rendered)
                self.engine.pull(rendered, say)
                self.refuse_conflicts(tree)
                self.refuse_paused()
            except Fault as fault:
                self.record_failure(commit, fault, by, began)
                raise
            self.bring_up(commit, tree, model, say, by, began, asked)

    def wait_for_up(self, commit: str) -> None:
        if (self.state.waiting, self.state.waiting_digest) != (commit, self.digest()):
            log.info("%s: %s waits for up: x-pgo: reload: false", self.service.name, short(commit))
        self.state.waiting, self.state.waiting_digest = commit, self.digest()
        self.save()

    def refuse_conflicts(self, tree: Tree) -> None:
        tracked = self.tracked()
        with as_user(self.engine.account):
            conflicts = worktree_conflicts(self.places.worktree, self.places.export, tracked, tree)
        if conflicts:
            raise Refused("the commit would overwrite untracked files; move or remove them: "
                          + ", ".join(map(printable, conflicts[:10])))

    def refuse_paused(self) -> None:
        """compose can neither start nor recreate them. Raises Fault, for it will pass."""
        if paused := [c.name for c in self.engine.containers() if c.status == "paused"]:
            raise Fault(f"{', '.join(paused)} is paused by hand; once docker unpause has ended "
                        "that, it is tried again")

    def bring_up(self, commit: str, tree: Tree, model: Model, say: Say, by: str,
                 began: float, asked: bool) -> None:
        """From here on the host changes; what fails is rolled back."""
        for name, change in model_differences(self.running_model(), model).items():
            say(f"{name}: {change}")
        if not self.state.deploying:  # else: what came before the one that was interrupted counts
            self.note_before()
        self.state.deploying = commit
        self.save()
        away = time.monotonic()
        try:
            self.install(commit, tree, model, say)
            self.await_health(model, say)
        except EngineGone:
            raise
        except (Fault, OSError) as error:
            self.engine.containers()  # raises EngineGone
            fault = error if isinstance(error, Fault) else Fault(str(error))
            # What failed for the machine's sake, as a full disk, is tried again by itself.
            fault.retry = isinstance(error, OSError) or not self.state.commit
            self.state.owes_rollback = bool(self.state.commit) and self.service.rollback
            self.record_failure(commit, fault, by, began)
            self.give_up(fault, say, away)
            raise Refused(f"{short(commit)}: {fault}") from None
        self.record_success(commit, model, by, began)
        if asked and (ill := self.ill_names()):
            raise Fault(f"runs {short(commit)}, but as before: {ill}")
        say(f"runs {short(commit)}, healthy after {time.monotonic() - began:.1f} s")

    def note_before(self) -> None:
        """Which containers there are, that one of them that stays says nothing of a commit."""
        self.state.before = {c.identity: "" if is_ill(c) else c.started
                             for c in self.engine.containers()}

    def ill_names(self) -> str:
        """Containers that should be well and are not, though no deploy made them so."""
        return ", ".join(f"{c.name} is {c.health if c.health == 'unhealthy' else c.status}"
                         for c in self.containers if c.health == "unhealthy"
                         or c.status in ("restarting", "dead", "paused")
                         or (c.status == "exited" and c.exit_code))

    def install(self, commit: str, tree: Tree, model: Model, say: Say,
                strict: bool = True) -> None:
        """Work tree, binds, import, model and `up`."""
        containers = self.engine.containers()
        spared = self.spared_jobs(model, containers)
        self.state.installed, self.state.finished = commit, sorted(spared)
        self.save()
        self.write_files(tree, model, containers, strict)
        self.write_import()
        self.stop_writers(model, containers)
        self.make_binds(model)
        self.write_model("model.json", model)
        self.forget_hands(containers)
        self.engine.up(model, say, compose_services(model).keys() - spared if spared else ())

    def spared_jobs(self, model: Model, containers: Iterable[Container]) -> set[str]:
        """Compose services that are done, that nothing needs, and that the model leaves alone."""
        services, changes = compose_services(model), model_differences(self.running_model(), model)
        needed = {name for service in services.values() for name in service.get("depends_on") or ()}
        return {c.compose_service for c in containers
                if c.compose_service in {*self.state.finished} - {*changes} - needed
                and c.image == self.engine.image_identity(image_of(
                    self.service.name, c.compose_service, services[c.compose_service]))}

    def write_files(self, tree: Tree, model: Model, containers: Iterable[Container],
                    strict: bool) -> None:
        """Tracked files follow the commit; the list of them never lacks one that is there.

        Raises Refused if it is to be `strict`; a rollback takes what it can get.
        """
        tracked, worktree = self.tracked(), str(self.places.worktree)
        mounted = [bind for container in containers for bind in container.binds]
        sources = (beneath(bind.source, worktree) for bind in (*binds_of(model), *mounted))
        keep = frozenset(filter(None, sources))
        self.write_tracked({path: tree[path] if tracked.get(path) == tree.get(path) else ("", "")
                            for path in {*tracked, *tree}})
        with as_user(self.engine.account):
            failures = update_worktree(self.places.worktree, self.places.export, tracked, tree,
                                       keep, self.shared.children.beat)
        if failures and strict:
            raise Refused("; ".join(failures[:5]))
        for failure in failures:
            log.warning("%s: left as it is: %s", self.service.name, failure)
        self.write_tracked(tree)

    def stop_writers(self, model: Model, containers: Iterable[Container]) -> None:
        """Stop what could still put a link where the new model binds a path beneath its own."""
        binds = binds_of(model)
        permitted = {(bind.source, above.source) for bind, above in nested_binds(binds, binds)}
        racing = {container.identity for container in containers
                  for bind, above in nested_binds(binds, container.binds)
                  if (bind.source, above.source) not in permitted}
        if racing:
            result = self.engine.docker("stop", *sorted(racing), deadline="up")
            if result.status or result.trouble:
                raise Fault(f"stop of containers that write above a bind: {result.complaint}")

    def make_binds(self, model: Model) -> None:
        """Look at every bound path without following links; make missing folders, as the user."""
        for bind in binds_of(model):
            for root in (self.places.worktree, self.places.data):
                relative = beneath(bind.source, str(root))
                if relative:
                    with as_user(self.engine.account):
                        self.make_bind(root, relative, bind)

    def make_bind(self, root: Path, relative: str, bind: Bind) -> None:
        *parts, name = relative.split("/")
        folder = bind.kind == "bind"
        try:
            with folder_beneath(root, parts, make=folder) as parent:
                if folder:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o755, dir_fd=parent)
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise Refused(f"{bind.compose_service}: {bind.kind} {bind.source} is missing") from None
        if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
            raise Refused(f"{bind.compose_service}: {bind.source} is a link or a device; remove it")

    def await_health(self, model: Model, say: Say) -> None:
        """Wait until all runs and is healthy, three looks in a row. Raises Fault."""
        expected, until = expected_replicas(model), time.monotonic() + self.service.wait
        good, looks, told = 0, HEALTHY_LOOKS, ""
        while good < looks:
            self.containers = self.engine.containers()
            unchanged = frozenset(c.identity for c in self.containers
                                  if self.state.before.get(c.identity) in ("", c.started))
            looks = HEALTHY_LOOKS if len(unchanged) < len(self.containers) else 1
            verdict, why = judge(self.containers, expected, unchanged)
            if verdict == "bad":
                raise Fault(why)
            good = good + 1 if verdict == "good" else 0
            if why and why != told:
                say(f"waits: {why}")
                told = why
            if time.monotonic() > until:
                raise Fault(f"not healthy within {format_duration(self.service.wait)}: {why}")
            if good < looks and self.shared.stopping.wait(1.0):
                raise Stopping

    def record_success(self, commit: str, model: Model, by: str, began: float) -> None:
        state = self.state
        if commit != state.commit:
            state.since = time.time()
        state.commit, state.digest = commit, self.digest()
        state.deploying = state.waiting = state.failed_commit = state.failed_reason = ""
        state.installed = commit
        state.owes_rollback = False
        self.git.mark_good(commit)
        self.keep_good(model)
        self.save()
        self.remember(commit, by, began, "deployed", "")

    def record_failure(self, commit: str, fault: Fault, by: str, began: float) -> None:
        state = self.state
        known = (state.failed_commit, state.failed_reason) == (commit, str(fault))
        state.failed_commit, state.failed_digest = commit, self.digest()
        state.failed_reason, state.failed_retry = str(fault), fault.retry
        state.deploying = ""
        self.save()
        if not known:
            self.remember(commit, by, began, "failed", str(fault))

    def give_up(self, fault: Fault, say: Say, away: float) -> None:
        """After a bad deploy: back to the last good commit, if there is one."""
        say(f"failed: {fault}")
        if not self.state.owes_rollback:
            return
        self.roll_back(say)
        say(f"rolled back to {short(self.state.commit)}; what changed was away for "
            f"{time.monotonic() - away:.1f} s")

    def roll_back(self, say: Say) -> None:
        """Work tree, images and model of the last good commit. Raises Fault, then it is owed."""
        model = self.good_model()
        try:
            tree = self.git.export(self.state.commit)
            self.restore_images()
            if linked := [container.identity for container in self.engine.containers()
                          if self.bound_links([container], tree)]:
                self.engine.docker("rm", "--force", *linked)
            self.note_before()
            self.install(self.state.commit, tree, model, log.debug, strict=False)
            self.await_health(model, say)
        except (Fault, OSError) as error:
            raise Fault(f"ROLLBACK to {short(self.state.commit)} FAILED, will be tried again: "
                        f"{error}") from None
        self.state.owes_rollback = False
        self.save()
        self.shared.metrics.add("pgo_service_rollbacks_total", service=self.service.name)
        log.warning("%s: rolled back to %s", self.service.name, short(self.state.commit))

    def remember(self, commit: str, by: str, began: float, outcome: str, reason: str) -> None:
        """A line of history, the newest 200 are kept; and the metrics of a deploy."""
        facts, seconds = self.git.describe(commit), round(time.monotonic() - began, 1)
        line = {"time": round(time.time(), 3), "commit": commit, "author": facts.author,
                "subject": facts.subject, "by": by, "seconds": seconds, "outcome": outcome,
                "reason": redact(reason, self.service.secrets)}
        lines = [*self.history(), line][-200:]
        text = "".join(json.dumps(item) + "\n" for item in lines)
        write_atomic(self.places.own / "history.jsonl", text.encode())
        name = self.service.name
        self.shared.metrics.add("pgo_service_deploys_total", service=name, outcome=outcome)
        self.shared.metrics.set("pgo_service_last_deploy_duration_seconds", seconds, service=name)

    def history(self) -> list[dict[str, Any]]:
        found = []
        with contextlib.suppress(OSError):
            text = (self.places.own / "history.jsonl").read_text(errors="replace")
            for line in text.splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    # The reverse proxy:

    def write_import(self) -> bool:
        """Write the Caddy import, as the user, if it changed; whether it did."""
        if not self.service.import_file:
            return False
        text = import_text(self.shared.configuration.services).encode()
        with as_user(self.engine.account):
            try:
                if text == read_beneath(self.places.worktree, self.service.import_file,
                                        len(text) + 1):
                    return False
            except FileNotFoundError:
                pass
            write_beneath(self.places.worktree, self.service.import_file, io.BytesIO(text))
        log.info("%s: import written: %s", self.service.name, self.service.import_file)
        self.state.reload_pending = self.service.reload is not None
        self.save()
        return True

    def follow_import(self) -> None:
        """Keep the import right, and announce it with `reload` until that worked. Raises Fault."""
        if not self.service.import_file or not self.state.commit:
            return
        self.write_import()
        if self.state.reload_pending and self.service.reload:
            self.run_reload(self.service.reload)
            self.state.reload_pending = False
            self.save()

    def run_reload(self, reload: Reload) -> None:
        target, words = self.shared.workers[reload.service], reload.words
        compose_service = reload.service
        if reload.service not in compose_services(target.running_model()):
            compose_service, words = words[0], words[1:]
        result = target.engine.compose("exec", "-T", "--", compose_service, *words,
                                       deadline="reload")
        if result.status or result.trouble:
            raise Fault(f"reload failed, will be tried again: {result.complaint}")
        log.info("%s: reloaded: %s", self.service.name, reload.service)

    # What is shown:

    def in_sync(self) -> bool:
        state = self.state
        return bool(state.commit) and state.commit == state.wanted == state.in_place and not (
            state.owes_rollback or state.waiting)

    def show_metrics(self) -> None:
        """Set the service's gauges."""
        name, metrics, state = self.service.name, self.shared.metrics, self.state
        metrics.set("pgo_service_in_sync", self.in_sync(), service=name)
        metrics.set("pgo_service_held", self.hold() is not None, service=name)
        metrics.set("pgo_service_consecutive_failures", self.failures, service=name)
        metrics.replace("pgo_service_info", name,
                        [({"commit": state.in_place, "wanted": state.wanted}, 1)])
        counts = collections.Counter(c.status for c in self.containers)
        counts["healthy"] = sum(c.health == "healthy" for c in self.containers)
        metrics.replace("pgo_service_containers", name,
                        [({"state": key}, counts[key]) for key in
                         ("running", "healthy", "exited", "restarting")])

    # Requests:

    def answer(self, request: Request) -> None:
        """Carry a request out in this thread. Raises Fault."""
        self.unsettled = True
        REQUESTS[request.command](self, request)
        self.show_metrics()

    def request_up(self, request: Request) -> None:
        """Release a stop, deploy the newest commit, and fail where the deploy fails."""
        held = load_hold(self.places.own / "hold.json", "hold")
        if held and self.hold():
            raise Refused(f"{held}; release it first")
        self.places.stop.unlink(missing_ok=True)
        self.look(frozenset({"engine"}), self.saying(request), request.by, asked=True)

    def request_pull(self, request: Request) -> None:
        """Fetch, and deploy if there is something new."""
        decision = self.look(frozenset({"timer"}), self.saying(request), request.by)
        if decision.action == "nothing":
            request.say(f"{short(self.state.commit) or 'nothing runs'}: "
                        f"{'; '.join(decision.reasons)}")
        if self.state.failed_commit and self.state.failed_commit == self.state.wanted:
            raise Refused(f"{short(self.state.wanted)} is not deployed: "
                          f"{self.state.failed_reason}")

    def request_stop(self, request: Request) -> None:
        """The file goes first: nothing must bring back what is being stopped."""
        facts = {"by": request.by, "since": time.time(), "services": request.services}
        write_atomic(self.places.stop, json.dumps(facts).encode())
        log.info("%s: %s: by %s", self.service.name, request.command, request.by)
        if not self.running_model():
            request.say("nothing was deployed yet, and nothing will be until up")
            return
        self.compose_for(request)
        self.containers = self.engine.containers()

    def request_start(self, request: Request) -> None:
        """Release a stop and bring up what was deployed last, without a fetch."""
        model = self.deployed_model()
        self.places.stop.unlink(missing_ok=True)
        self.note_before()
        self.state.finished = []
        self.restore_images()
        self.make_binds(model)
        self.forget_hands(self.containers)
        self.engine.up(model, request.say)
        self.await_health(model, request.say)
        if ill := self.ill_names():
            raise Fault(f"as before: {ill}")

    def request_restart(self, request: Request) -> None:
        if self.hold():
            raise Refused(f"{self.hold()}; up or start ends that")
        self.make_binds(self.deployed_model())
        self.compose_for(request)
        self.forget_hands(self.engine.containers())

    def request_load(self, request: Request) -> None:
        """Check the newest commit against the policy; change nothing."""
        self.ask_remote(request.say)
        self.checked(self.state.wanted or self.state.commit)
        request.say(f"{short(self.state.wanted)}: the policy permits it")

    def request_plan(self, request: Request) -> None:
        """What would be done now and why; nothing is."""
        self.ask_remote(request.say)
        self.containers = self.engine.containers()
        seen = self.observe(looked=True, asked=False)
        decision = decide(seen)
        request.say(f"{decision.action}: {'; '.join(decision.reasons)}")
        if decision.action == "deploy":
            self.plan_deploy(decision, request.say)
        elif self.state.failed_commit and self.state.failed_commit == self.state.wanted:
            request.say(f"{short(self.state.wanted)} failed: {self.state.failed_reason}")

    def plan_deploy(self, decision: Decision, say: Say) -> None:
        """Each compose service and image. Raises Refused with every violation."""
        _, _, model = self.checked(decision.commit)
        changes = model_differences(self.running_model(), model)
        for name in sorted({*compose_services(model), *changes}):
            say(f"  {name}: {changes.get(name, 'unchanged')}")
        for image in self.missing_images_to_pull(model):
            say(f"  image to pull: {image}")

    def missing_images_to_pull(self, model: Model) -> list[str]:
        built = {image_of(self.service.name, name, service)
                 for name, service in compose_services(model).items() if service.get("build")}
        return [name for name in self.engine.missing_images(model) if name not in built]

    def deployed_model(self) -> Model:
        model = self.running_model()
        if not model:
            raise Refused("nothing was deployed yet; up does it")
        return model

    def compose_for(self, request: Request) -> None:
        """The compose command of the same name."""
        self.deployed_model()
        result = self.engine.compose(request.command, *request.arguments, deadline="up",
                                     on_line=request.say)
        if result.status or result.trouble:
            raise Fault(f"{request.command}: {result.complaint}")

    def saying(self, request: Request) -> Say:
        """Tell the one who asked, and the log."""
        def say(text: str) -> None:
            request.say(text)
            self.say_log(text)
        return say


REQUESTS: dict[str, Callable[[Worker, Request], None]] = {
    "up": Worker.request_up, "git pull": Worker.request_pull, "down": Worker.request_stop,
    "stop": Worker.request_stop, "start": Worker.request_start,
    "restart": Worker.request_restart, "load": Worker.request_load,
    "plan": Worker.request_plan,
}

# ---- Commands ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What a key holder may say. `options` maps each one to whether it takes a value.

    `where`: "thread" (one at a time with all that changes the service), "compose" (a compose
    command, streamed) or "here" (answered at once).
    """

    help: str
    where: str
    options: Mapping[str, bool] = field(default_factory=dict)
    words: str = ""  # what may follow the options, for the help


COMMANDS: dict[str, Command] = {
    "up": Command("deploy the newest commit and wait until it is healthy", "thread",
                  {"-d": False, "--detach": False, "--wait": False}),
    "down": Command("remove the containers, until up or start; volumes stay", "thread",
                    {"-t": True, "--timeout": True, "--remove-orphans": False}),
    "stop": Command("stop the containers, until up or start", "thread",
                    {"-t": True, "--timeout": True}, "[SERVICE...]"),
    "start": Command("bring up what was deployed last, without a fetch", "thread"),
    "restart": Command("restart the containers", "thread",
                       {"-t": True, "--timeout": True, "--no-deps": False}, "[SERVICE...]"),
    "ps": Command("list the containers", "compose",
                  {"-a": False, "--all": False, "-q": False, "--quiet": False, "--services": False,
                   "--format": True, "--filter": True, "--status": True, "--no-trunc": False,
                   "--orphans": False}, "[SERVICE...]"),
    "pull": Command("pull the images", "compose",
                    {"-q": False, "--quiet": False, "--include-deps": False,
                     "--ignore-pull-failures": False}, "[SERVICE...]"),
    "logs": Command("show what the containers wrote", "compose",
                    {"-f": False, "--follow": False, "-n": True, "--tail": True, "--since": True,
                     "--until": True, "-t": False, "--timestamps": False, "--no-color": False,
                     "--no-log-prefix": False, "--index": True}, "[SERVICE...]"),
    "exec": Command("run a command in a container", "compose",
                    {"-T": False, "--no-TTY": False, "-i": False, "--interactive": False,
                     "-t": False, "--tty": False, "-d": False, "--detach": False, "-e": True,
                     "--env": True, "-u": True, "--user": True, "-w": True, "--workdir": True,
                     "--index": True}, "SERVICE COMMAND [ARGUMENT...]"),
    "load": Command("check the newest commit against the policy, change nothing", "thread"),
    "git pull": Command("fetch, and deploy what is new", "thread"),
    "git hash": Command("print the commit that runs", "here"),
    "ping": Command("answer pong", "here"),
    "plan": Command("show what would be done now and why, do nothing", "thread"),
    "status": Command("show what runs, since when, and why not the newest", "here",
                      {"--json": False}),
    "history": Command("show the last deploys", "here", {"--json": False, "-n": True}),
    "hold": Command("stop deploys and heals, until release or for a time", "here",
                    {"--for": True}, "[REASON...]"),
    "release": Command("end a hold", "here"),
    "journal": Command("is disabled", "here"),
    "help": Command("show the commands", "here"),
}
# Options that pgod sets itself, or that mean nothing without a terminal of the engine's.
DROPPED_OPTIONS = frozenset(("-T", "--no-TTY", "-i", "--interactive", "-t", "--tty"))
LIST_REQUEST = "//list"
USAGE_STATUS = 2
DENIED_STATUS = 1


@dataclass(frozen=True)
class Order:
    """A parsed request: service, command, its options and what follows them."""

    service: str
    command: str
    options: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()

    def audited(self) -> str:
        """The command without the values of -e."""
        hidden = ["***" if previous == "-e" else
                  "--env=***" if option.startswith("--env=") else option
                  for previous, option in zip(("", *self.options), self.options, strict=False)]
        return shlex.join((*self.command.split(), *hidden, *self.operands))


def split_option(word: str, table: Mapping[str, bool]) -> list[tuple[str, str | None]]:
    """--name, --name=value, -x, -xVALUE or a cluster -xyz, as (option, value)."""
    if word.startswith("--"):
        name, mark, value = word.partition("=")
        return [(name, value if mark else None)]
    found: list[tuple[str, str | None]] = []
    for position, letter in enumerate(word[1:], 1):
        option = f"-{letter}"
        if table.get(option):
            return [*found, (option, word[position + 1:].removeprefix("=") or None)]
        found.append((option, None))
    return found


def parse_options(command: str,
                  arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options by the table, one word or two each, and the operands. Raises Refused.

    All that follows exec's first operand belongs to the command that it runs.
    """
    table, options, operands = COMMANDS[command].options, list[str](), list[str]()
    left = collections.deque(arguments)
    while left:
        word = left.popleft()
        if word == "--":
            operands += left
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
            if command == "exec":
                operands += left
                break
            continue
        for option, value in split_option(word, table):
            if option not in table:
                known = f"; it takes {', '.join(table)}" if table else "; it takes none"
                raise Refused(f"{command}: option {printable(option)!r} is not permitted{known}")
            if not table[option]:
                if value is not None:
                    raise Refused(f"{command}: option {option} takes no value")
                options += [] if option in DROPPED_OPTIONS and command == "exec" else [option]
                continue
            if value is None:
                if not left:
                    raise Refused(f"{command}: option {option} needs a value")
                value = left.popleft()
            if option == "--format" and not PLAIN_TEMPLATE.fullmatch(value):
                raise Refused(f"{command}: --format takes table, json or fields as {{{{.Name}}}}")
            options += [f"{option}={value}"] if option.startswith("--") else [option, value]
    return tuple(options), tuple(operands)


def check_operands(order: Order) -> Order:
    """Names of compose services where the table has them. Raises Refused."""
    syntax = COMMANDS[order.command].words
    if order.operands and not syntax:
        raise Refused(f"{order.command}: takes no arguments but options")
    if order.command == "exec" and len(order.operands) < 2:
        raise Refused("exec: write it like service//exec SERVICE COMMAND [ARGUMENT...]")
    names = order.operands if syntax == "[SERVICE...]" else ()
    names = order.operands[:1] if order.command == "exec" else names
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("-"):
            raise Refused(f"{order.command}: {printable(name)!r} is not a compose service")
    return order


def parse_order(text: str) -> Order:
    """An exec request, `service//command argument…`. Raises Refused with what is wrong."""
    if len(text) > SSH_COMMAND_BYTES:
        raise Refused("the command is too long")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Refused(f"the command cannot be split into words: {error}") from None
    service, mark, command = words[0].partition("//") if words else ("", "", "")
    if not mark or not service or not command:
        raise Refused("write it like service//command; commands: " + ", ".join(COMMANDS))
    arguments = words[1:]
    if command == "git" and arguments:
        command, arguments = f"git {arguments[0]}", arguments[1:]
    if command not in COMMANDS:
        raise Refused(f"there is no command {printable(command)!r}{nearest(command, COMMANDS)}; "
                      f"commands: {', '.join(COMMANDS)}")
    if len(arguments) > SSH_ARGUMENTS:
        raise Refused(f"more than {SSH_ARGUMENTS} arguments")
    options, operands = parse_options(command, arguments)
    return check_operands(Order(service, command, options, operands))


def option_value(order: Order, name: str) -> str | None:
    """The value of an option in an order, `` for one without, None if it is not there."""
    for position, word in enumerate(order.options):
        if word.startswith("--") and word.partition("=")[0] == name:
            return word.partition("=")[2]
        if word == name:
            return order.options[position + 1]
    return None


def answer_ping(worker: Worker, order: Order, by: str) -> str:
    return "pong"


def answer_hash(worker: Worker, order: Order, by: str) -> str:
    if not worker.state.commit:
        raise Refused("nothing was deployed yet")
    return worker.state.in_place


def answer_journal(worker: Worker, order: Order, by: str) -> str:
    raise Refused("journal is disabled; logs shows what the containers wrote")


def option_groups(options: Mapping[str, bool]) -> list[list[str]]:
    """`-f` and `--follow` together: a short option stands before its long one in the table."""
    groups: list[list[str]] = []
    for name, valued in options.items():
        text = f"{name} VALUE" if valued else name
        if groups and len(groups[-1]) == 1 and groups[-1][0].split()[0].lstrip("-") == name[2:3]:
            groups[-1] = [groups[-1][0].split()[0], text]
        else:
            groups.append([text])
    return groups


def answer_help(worker: Worker, order: Order, by: str) -> str:
    rows = []
    for name, command in COMMANDS.items():
        options = [f"[{'|'.join(group)}]" for group in option_groups(command.options)]
        rows.append(f"{name:<9} {command.help}")
        rows += [f"          {' '.join([*options, command.words]).strip()}"] if (
            options or command.words) else []
    return "\n".join(rows)


def status_facts(worker: Worker, now: float) -> dict[str, Any]:
    """All that is known of a service, for programs. Times are seconds since the epoch."""
    state, hold = worker.state, worker.hold()
    failed = state.failed_commit and state.failed_commit == state.wanted
    why = (str(hold) if hold else worker.remote_error if worker.in_sync() else
           f"{short(state.wanted)} failed: {state.failed_reason}" if failed else
           f"{short(state.waiting)} waits for up" if state.waiting else
           worker.remote_error or ("deploying" if state.deploying else "not looked at yet"))
    return {
        "service": worker.service.name, "commit": state.in_place,
        "since": state.since,
        "wanted": state.wanted, "in_sync": worker.in_sync(), "why": why,
        "hold": dataclasses.asdict(hold) if hold else None, "last_error": worker.last_error,
        "failures": worker.failures, "next_look": now + worker.next_look - worker.shared.clock(),
        "containers": [{"name": c.name, "service": c.compose_service, "status": c.status,
                        "health": c.health, "restarts": c.restarts, "started": c.started}
                       for c in worker.containers]}


def render_status(facts: Mapping[str, Any]) -> str:
    """For people: aligned, the newest thing first."""
    now, since = time.time(), facts["since"]
    age = f" since {format_time(since)} ({format_duration(now - since)})" if since else ""
    rows = [("service", facts["service"]), ("runs", (short(facts["commit"]) or "nothing") + age),
            ("wanted", short(facts["wanted"]) or "not known yet"),
            ("in sync", "yes" if facts["in_sync"] and not facts["why"] else
             f"{'yes, but' if facts['in_sync'] else 'no:'} {facts['why']}")]
    if facts["last_error"] and facts["last_error"] not in facts["why"]:
        rows.append(("last error", facts["last_error"]))
    rows.append(("next look", f"in {format_duration(max(0, facts['next_look'] - now))}"))
    lines = [f"{name:<11}{text}" for name, text in rows]
    width = max([len(c["name"]) for c in facts["containers"]], default=0)
    for container in facts["containers"]:
        health = f", {container['health']}" if container["health"] else ""
        restarts = f", {container['restarts']} restarts" if container["restarts"] else ""
        lines.append(f"  {container['name']:<{width}}  {container['status']}{health}{restarts}")
    return "\n".join(lines)


def answer_status(worker: Worker, order: Order, by: str) -> str:
    with contextlib.suppress(Fault):  # without an engine, what was seen last
        worker.containers = worker.engine.containers()
    facts = status_facts(worker, time.time())
    return json.dumps(facts) if "--json" in order.options else render_status(facts)


def answer_history(worker: Worker, order: Order, by: str) -> str:
    count = option_value(order, "-n") or "20"
    if not re.fullmatch("[0-9]{1,6}", count):
        raise Refused(f"history: -n takes a number, not {printable(count)!r}")
    lines = worker.history()[::-1][:int(count)]
    if "--json" in order.options:
        return json.dumps(lines)
    return "\n".join(
        f"{format_time(line['time'])}  {short(line['commit'])}  {line['outcome']:<8} "
        f"{line['seconds']:>6.1f}s  {line['author']}: {line['subject']}  ({line['by']})"
        + (f"\n    {one_line(line['reason'])}" if line["reason"] else "")
        for line in lines) or "nothing was deployed yet"


def answer_hold(worker: Worker, order: Order, by: str) -> str:
    """Takes force at once, also for a deploy that has not begun to change anything."""
    span, now = option_value(order, "--for"), time.time()
    try:
        until = now + parse_duration(span) if span else 0.0
        format_time(until)
    except (ValueError, OverflowError) as error:
        raise Refused(f"hold: --for: {error}") from None
    hold = Hold(by, printable(" ".join(order.operands))[:200], now, until, "hold")
    write_atomic(worker.places.own / "hold.json", json.dumps(dataclasses.asdict(hold)).encode())
    log.info("%s: %s", worker.service.name, hold)
    return str(hold)


def answer_release(worker: Worker, order: Order, by: str) -> str:
    held = load_hold(worker.places.own / "hold.json", "hold")
    if not held:
        raise Refused(f"{worker.hold() or 'there is no hold'}"
                      f"{'; up or start ends that' if worker.hold() else ''}")
    (worker.places.own / "hold.json").unlink(missing_ok=True)
    log.info("%s: hold released by %s", worker.service.name, by)
    worker.wake("engine")
    return "released"


ANSWERS: dict[str, Callable[[Worker, Order, str], str]] = {
    "ping": answer_ping, "git hash": answer_hash, "status": answer_status,
    "history": answer_history, "hold": answer_hold, "release": answer_release,
    "journal": answer_journal, "help": answer_help,
}


def compose_command(order: Order, terminal: bool) -> list[str]:
    """The words of compose for an order: its options, then --, then the operands."""
    fixed = ["-T"] if order.command == "exec" and not terminal else []
    return [order.command, *fixed, *order.options, "--", *order.operands]


def audit(directory: Path, **facts: object) -> None:
    """One line of the audit log, JSON."""
    line = json.dumps({"time": format_time(time.time()), **facts}) + "\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory / ".pgod" / "audit.log", flags, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)

# ---- SSH ---------------------------------------------------------------------------------------


@dataclass
class Client:
    """A connection: where from, and the key that it has proven."""

    address: str
    key: str = ""  # fingerprint, "" before it is proven
    heard: int = 0  # bytes before that
    sessions: int = 0


def bound_input(channel: Any) -> None:
    """Grant the client no more than a window of input that nobody has read yet.

    asyncssh forgets what waits in its buffer: 200 MB for a slow reader took 100 MB of memory.
    """
    if not hasattr(channel, "_init_recv_window"):
        return
    deliver, window = channel._deliver_data, channel._init_recv_window

    def deliver_data(data: bytes, datatype: Any = None) -> None:
        channel._init_recv_window = window - sum(len(waiting) for waiting, _ in channel._recv_buf)
        deliver(data, datatype)

    channel._deliver_data = deliver_data


def set_terminal_size(terminal: Any, columns: int, rows: int) -> None:
    size = struct.pack("HHHH", (rows or 24) & 0xFFFF, (columns or 80) & 0xFFFF, 0, 0)
    if terminal and os.isatty(terminal.fileno()):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def start_stream(engine: Engine, words: list[str], reads: bool, terminal: bool,
                 process: Any) -> tuple[Child, dict[str, Any]]:
    """A streaming child, and which of its ends go to the session. Raises Fault."""
    who, env = engine.docker_account, engine.environment()
    if not terminal:
        child = engine.children.start(
            words, account=who, env=env, stdin=PIPE if reads else DEVNULL)
        if child.stdin:
            os.set_blocking(child.stdin.fileno(), False)
        streams = {"stdin": child.stdin, "stdout": child.stdout, "stderr": child.stderr}
        return child, {name: stream for name, stream in streams.items() if stream}
    master, theirs = os.openpty()
    os.set_blocking(master, False)
    ours = os.fdopen(master, "r+b", 0)
    set_terminal_size(ours, *process.term_size[:2])
    chown(theirs, who)
    env["TERM"] = re.sub(r"[^\w.+-]", "", process.term_type or "") or "dumb"
    try:
        child = engine.children.start(["setsid", "--ctty", *words], account=who, env=env,
                                      stdin=theirs, stdout=theirs, stderr=theirs, session=False)
    except Fault:
        ours.close()
        raise
    finally:
        os.close(theirs)
    return child, {"stdin": ours, "stdout": ours}


async def ready(descriptor: int, writing: bool = False) -> None:
    """Until it can be read (of a pidfd_open(2): until the process has ended) or written."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    add, remove = ((loop.add_writer, loop.remove_writer) if writing
                   else (loop.add_reader, loop.remove_reader))
    add(descriptor, event.set)
    try:
        await event.wait()
    finally:
        remove(descriptor)


def version_of(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:3])


async def write_all(descriptor: int, data: bytes) -> bool:
    """Write to a child; false at the end of the data, or if the child reads no more."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest):]
        except BlockingIOError:
            await ready(descriptor, writing=True)
        except OSError:
            return False
    return bool(data) or os.isatty(descriptor)


class SshServer:
    """pgod's own SSH port, by asyncssh: exec requests of key holders and nothing else."""

    def __init__(self, shared: Shared, asyncssh: Any) -> None:
        self.shared = shared
        self.asyncssh = asyncssh
        self.sessions = collections.Counter[str]()  # key: commands that run now
        self.unproven: dict[Any, Client] = {}  # connection: client, oldest first
        self.loop = asyncio.new_event_loop()
        self.beat = time.monotonic()
        self.started = threading.Event()
        self.trouble = ""

    def serve(self, address: tuple[str, int]) -> None:
        """Listen; returns when it does. Raises Fault."""
        threading.Thread(target=self._run, args=(address,), name="ssh", daemon=True).start()
        self.started.wait()
        if self.trouble:
            raise Fault(self.trouble)

    def _run(self, address: tuple[str, int]) -> None:
        try:
            self.loop.run_until_complete(self._listen(address))
        except (OSError, ValueError, Fault, self.asyncssh.Error) as error:
            self.trouble = f"SSH cannot listen on {address[0]}:{address[1]}: {error}"
            self.started.set()
            return
        self.started.set()
        self.loop.run_forever()

    async def _listen(self, address: tuple[str, int]) -> None:
        server = self

        class Server(self.asyncssh.SSHServer):  # type: ignore[name-defined,misc]
            """asyncssh's callbacks for one connection."""

            def connection_made(self, conn: Any) -> None:
                self.connection = conn
                server.admit(conn)

            def connection_lost(self, exc: Exception | None) -> None:
                server.unproven.pop(self.connection, None)

            def begin_auth(self, username: str) -> bool:
                return True  # anything falsy would let the client in

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_public_key(self, username: str, key: Any) -> bool:
                return bool(server.services_of(key_fingerprint(key.public_data)))

        key = self.host_key()
        log.info("host key: %s", key_fingerprint(key.public_data))
        await self.asyncssh.create_server(
            Server, address[0], address[1], server_host_keys=[key], reuse_address=True,
            process_factory=self.session, encoding=None, line_editor=False,
            agent_forwarding=False, x11_forwarding=False, allow_scp=False, sftp_factory=None,
            password_auth=False, kbdint_auth=False, host_based_auth=False, gss_host=None,
            login_timeout=SSH_LOGIN_SECONDS, keepalive_interval=30, keepalive_count_max=3,
            server_version=f"pgod_{VERSION}", **self.algorithms())
        self.loop.call_soon(self._heartbeat)

    def algorithms(self) -> dict[str, Any]:
        """Those of SSH_ALGORITHMS that this asyncssh has."""
        from asyncssh import encryption, kex, mac, public_key  # noqa: PLC0415
        have = {"kex_algs": kex.get_kex_algs(), "encryption_algs": encryption.get_encryption_algs(),
                "mac_algs": mac.get_mac_algs(), "signature_algs": public_key.get_public_key_algs()}
        # Without strict key exchange, this one is open to Terrapin (CVE-2023-48795).
        bad = () if version_of(self.asyncssh) >= (2, 14, 2) else ("chacha20-poly1305@openssh.com",)
        return {name: [a for a in wanted if a not in bad
                       and (name not in have or a.encode() in have[name])]
                for name, wanted in SSH_ALGORITHMS.items()}

    def _heartbeat(self) -> None:
        self.beat = time.monotonic()
        self.loop.call_later(1.0, self._heartbeat)

    def host_key(self) -> Any:
        """Made once, kept ever after."""
        path = self.shared.settings.directory / ".pgod" / "ssh_host_ed25519_key"
        if not path.exists():
            key = self.asyncssh.generate_private_key("ssh-ed25519")
            write_atomic(path, key.export_private_key())
        try:
            return self.asyncssh.read_private_key(str(path))
        except (OSError, self.asyncssh.KeyImportError) as error:
            raise Fault(f"host key {path} cannot be read: {error}") from None

    def services_of(self, fingerprint: str) -> list[str]:
        """The services whose repositories hold the key, as of now."""
        return sorted(name for name, worker in self.shared.workers.items()
                      if any(hmac.compare_digest(key.fingerprint, fingerprint)
                             for key in worker.keys))

    def admit(self, connection: Any) -> None:
        """Limits for clients that have proven nothing, and the proof itself.

        A key counts when its signature was verified. That it was offered, or that some key was
        accepted, does not (CVE-2024-45337). asyncssh reads without limit before authentication.
        """
        peer = connection.get_extra_info("peername") or ("?", 0)
        client = Client(str(peer[0]))
        connection.pgod_client = client
        same = [c for c, other in self.unproven.items() if other.address == client.address]
        if len(same) >= SSH_UNPROVEN_PER_ADDRESS:
            same[0].abort()
            self.unproven.pop(same[0], None)
        if len(self.unproven) >= SSH_UNPROVEN:
            oldest = next(iter(self.unproven))
            oldest.abort()
            self.unproven.pop(oldest, None)
        self.unproven[connection] = client
        receive, validate = connection.data_received, connection.validate_public_key

        def data_received(data: bytes, datatype: Any = None) -> None:
            client.heard += 0 if client.key else len(data)
            if client.heard > SSH_UNPROVEN_BYTES:
                connection.abort()
                return
            receive(data, datatype)

        async def validate_public_key(username: str, key_data: bytes, message: bytes,
                                      signature: bytes) -> bool:
            valid = bool(await validate(username, key_data, message, signature))
            if valid and message:
                client.key = key_fingerprint(key_data)
                self.unproven.pop(connection, None)
            return valid

        connection.data_received = data_received
        connection.validate_public_key = validate_public_key

    async def session(self, process: Any) -> None:
        """One exec request, from its text to its exit status."""
        client: Client = process.get_extra_info("connection").pgod_client
        if getattr(process.channel, "_send_pktsize", 1) < 1:  # older asyncssh would loop forever
            process.get_extra_info("connection").abort()
            return
        client.sessions += 1
        self.sessions[client.key] += 1
        status = 1
        bound_input(process.channel)
        try:
            status = await self.obey(process, client)
        except (BrokenPipeError, ConnectionError, self.asyncssh.Error):
            status = 255
        except Exception:  # a session's outermost line
            log.exception("SSH session of %s failed", client.address)
            self.tell(process, "an error of pgod, see its log")
        finally:
            client.sessions -= 1
            self.sessions[client.key] -= 1
            with contextlib.suppress(OSError, self.asyncssh.Error):
                process.exit(min(status, 255))

    def tell(self, process: Any, text: str, stream: Any = None) -> None:
        """A line for people, on standard error if nothing else is asked for."""
        text = "\n".join(printable(line) for line in text.expandtabs().split("\n"))
        with contextlib.suppress(OSError, self.asyncssh.Error):
            (stream or process.stderr).write(f"{text}\n".encode())

    async def obey(self, process: Any, client: Client) -> int:
        """Parse, permit, audit and carry out."""
        mine = self.services_of(client.key)
        command = process.command or ""
        if process.subsystem or not client.key:
            self.tell(process, "refused")
            return DENIED_STATUS
        if client.sessions > SSH_SESSIONS or self.sessions[client.key] > SSH_SESSIONS_PER_KEY:
            self.tell(process, "refused: too many commands at one time")
            return DENIED_STATUS
        if command in ("", LIST_REQUEST):
            process.stdout.write("".join(f"{name}\n" for name in mine).encode())
            return 0
        try:
            order = parse_order(command)
        except Refused as refused:
            self.tell(process, str(refused))
            return USAGE_STATUS
        if order.service not in mine:
            self.tell(process, f"there is no service {printable(order.service)!r} for this key; "
                      f"it opens: {', '.join(mine) or 'nothing'}")
            return DENIED_STATUS
        worker = self.shared.workers[order.service]
        comment = next((k.comment for k in worker.keys if k.fingerprint == client.key), "")
        status = 1
        try:
            status = await self.carry_out(process, order, worker,
                                          f"{comment or client.key} from {client.address}")
        finally:
            with contextlib.suppress(OSError):
                audit(self.shared.settings.directory, address=client.address, key=client.key,
                      comment=comment, service=order.service, command=order.audited(),
                      status=status)
        return status

    async def carry_out(self, process: Any, order: Order, worker: Worker, by: str) -> int:
        where = COMMANDS[order.command].where
        if where == "thread":
            return await self.through_thread(process, order, worker, by)
        if where == "compose":
            return await self.stream(process, order, worker)
        return await self.answer_here(process, order, worker, by)

    async def answer_here(self, process: Any, order: Order, worker: Worker, by: str) -> int:
        """What does not wait for the service's thread."""
        answer = ANSWERS[order.command]
        try:
            text = await self.loop.run_in_executor(None, answer, worker, order, by)
        except (Fault, OSError) as error:
            self.tell(process, str(error))
            return 1
        self.tell(process, text, process.stdout)
        return 0

    async def through_thread(self, process: Any, order: Order, worker: Worker, by: str) -> int:
        """Queue it, tell what happens while it happens; it goes on when the client leaves."""
        stream = process.stdout if order.command in ("plan", "load") else process.stderr

        def say(text: str) -> None:
            self.loop.call_soon_threadsafe(self.tell, process, text, stream)

        takes_services = COMMANDS[order.command].words == "[SERVICE...]"
        known = compose_services(worker.running_model()) if takes_services else order.operands
        if unknown := [name for name in order.operands if name not in known]:
            self.tell(process, f"{order.command}: there is no compose service {unknown[0]!r}; "
                      f"there are: {', '.join(known)}")
            return 1
        words = (*order.options, *order.operands)
        request = worker.ask(Request(order.command, words, order.operands, by, say))
        while not request.done.is_set() and not process.channel.is_closing():
            await asyncio.sleep(0.05)
        return request.status

    async def stream(self, process: Any, order: Order, worker: Worker) -> int:
        """A compose command with its three streams tied to the session's."""
        if not worker.running_model():
            self.tell(process, "nothing was deployed yet; up does it")
            return 1
        engine, reads = worker.engine, order.command == "exec"
        terminal = reads and process.term_type is not None
        mark = f"PGOD_SESSION={os.urandom(16).hex()}"
        if reads:
            order = dataclasses.replace(order, options=("--env", mark, *order.options))
        words = engine.words(*compose_command(order, terminal))
        try:
            child, streams = start_stream(engine, words, reads, terminal, process)
        except Fault as fault:
            self.tell(process, str(fault))
            return 1
        self.shared.metrics.count("pgo_command_count", (worker.service.name, "compose",
                                                        order.command))
        status = await self.tie(process, child, streams, mark if reads else "")
        if status:
            self.shared.metrics.count("pgo_command_error_count",
                                      (worker.service.name, "compose", order.command))
        return 128 - status if status < 0 else status

    def end_stream(self, child: Child, mark: str) -> None:
        """End the child, and what it began in a container (docker does not)."""
        ended_by_itself = child.poll() is not None
        self.shared.children.end(child)
        if mark and not ended_by_itself:
            kill_all(marked_processes(mark), signal.SIGKILL)

    async def tie(self, process: Any, child: Child,
                  streams: Mapping[str, Any], mark: str) -> int:
        """Pump until the child ends or the client goes; flow control holds both back.

        asyncssh's own redirect loses the last bytes of an input now and then, and output that a
        child wrote right before its end.
        """
        descriptor = os.pidfd_open(child.pid)
        ended = asyncio.ensure_future(ready(descriptor))
        gone = asyncio.ensure_future(process.channel.wait_closed())
        feed = asyncio.ensure_future(self.pump_in(process, streams.get("stdin")))
        pumps = asyncio.gather(*(self.pump_out(streams[name], getattr(process, name))
                                 for name in ("stdout", "stderr") if name in streams))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
            await self.loop.run_in_executor(None, self.end_stream, child, mark)
            await asyncio.wait({pumps, gone}, return_when=asyncio.FIRST_COMPLETED)
            return 255 if gone.done() else child.wait()
        finally:
            tasks = (ended, gone, feed, pumps)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(descriptor)
            for stream in streams.values():
                stream.close()

    async def pump_out(self, source: Any, writer: Any) -> None:
        """What the child writes, until it writes no more."""
        with contextlib.suppress(OSError, self.asyncssh.Error):  # EIO is a terminal's end
            while True:
                await ready(source.fileno())
                if not (data := os.read(source.fileno(), 1 << 16)):
                    return
                writer.write(data)
                await writer.drain()

    async def pump_in(self, process: Any, target: Any) -> None:
        """What the client writes, to its end; dropped if there is nobody (left) to read it."""
        while True:
            try:
                data = await process.stdin.read(1 << 16)
            except self.asyncssh.TerminalSizeChanged as change:
                set_terminal_size(target, change.width, change.height)
                continue
            except (self.asyncssh.BreakReceived, self.asyncssh.SignalReceived):
                continue
            if target and not target.closed and not await write_all(target.fileno(), data):
                target.close()
            if not data:
                break


def import_asyncssh() -> Any:
    """The module, or a Fault that says how to get it."""
    import warnings  # noqa: PLC0415
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import asyncssh  # noqa: PLC0415
    except ImportError:
        raise Fault("SSH needs asyncssh: apt install python3-asyncssh, or uv run pgod.py, "
                    "or turn SSH off with --ssh ''") from None
    logging.getLogger("asyncssh").setLevel(logging.CRITICAL)
    log.info("asyncssh %s%s", asyncssh.__version__, "" if version_of(asyncssh) >= (2, 24, 1)
             else "; 2.24.1 or newer is recommended")
    return asyncssh

# ---- HTTP --------------------------------------------------------------------------------------


WEBHOOK_BYTES = 25 << 20  # GitHub sends no more
WEBHOOK_SIGNATURES = (  # header, what stands before the HMAC in it
    ("X-Hub-Signature-256", "sha256="), ("X-Gitea-Signature", ""), ("X-Forgejo-Signature", ""),
    ("X-Gogs-Signature", ""))


class HttpHandler(http.server.BaseHTTPRequestHandler):
    """Two pages, and webhooks, which wake a service: nothing in them is believed."""

    server: HttpServer
    timeout = HTTP_SECONDS
    server_version = "pgod"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, self.server.shared.metrics.render(),
                        "text/plain; version=0.0.4; charset=utf-8")
        elif self.path == "/healthz":
            self.answer(200, "ok\n")
        else:
            self.answer(404, "there are /metrics and /healthz\n")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A service that is unknown or has no webhook gets the answer of a wrong signature."""
        length, name = self.headers.get("Content-Length", ""), self.path.removeprefix("/webhook/")
        if not length.isdecimal() or int(length) > WEBHOOK_BYTES:
            self.answer(413, "a Content-Length of at most 25 MiB is needed\n")
            return
        worker = self.server.shared.workers.get(name)
        secret = worker.service.webhook if worker else ""
        code, left = hmac.new(secret.encode(), digestmod="sha256"), int(length)
        while left and (data := self.rfile.read(min(left, 1 << 16))):
            code.update(data)
            left -= len(data)
        if worker and secret and self.is_signed(secret, code.hexdigest()):
            worker.wake("webhook")
            self.answer(202, "looks at the repository\n")
        else:
            self.answer(403, "the signature is wrong, or this service has no webhook\n")

    def is_signed(self, secret: str, digest: str) -> bool:
        """Whether an HMAC-SHA256, or the token that GitLab sends instead, is right."""
        wanted = [(name, prefix + digest) for name, prefix in WEBHOOK_SIGNATURES]
        return any(hmac.compare_digest(self.headers.get(name, "").encode(), value.encode())
                   for name, value in (*wanted, ("X-Gitlab-Token", secret)))

    def answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP: %s: %s", self.address_string(), format % args)


class HttpServer(http.server.ThreadingHTTPServer):
    """The oldest connection goes when there are too many."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], shared: Shared) -> None:
        self.shared = shared
        self.open: dict[socket.socket, float] = {}
        self.guard = threading.Lock()
        both = not address[0] and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET
        super().__init__(address, HttpHandler)

    def server_bind(self) -> None:
        """An empty host is every address of both families, as in Go."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY,
                                   bool(self.server_address[0]))
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.guard:
            late = [s for s, since in self.open.items() if since + HTTP_SECONDS < time.monotonic()]
            if len(self.open) >= HTTP_CONNECTIONS:
                late.append(next(iter(self.open)))
            for old in late:
                self.open.pop(old, None)
                with contextlib.suppress(OSError):
                    old.shutdown(socket.SHUT_RDWR)
            self.open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.guard:
            self.open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP: %s: %s", client_address[0], sys.exc_info()[1])


def serve_http(address: tuple[str, int], shared: Shared) -> HttpServer:
    """Listen in a thread. Raises Fault."""
    try:
        server = HttpServer(address, shared)
    except OSError as error:
        raise Fault(f"metrics cannot listen on {address[0]}:{address[1]}: {error}") from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server

# ---- Life --------------------------------------------------------------------------------------

ENDING_SIGNALS = ("9", "15")  # of `docker kill`; others may be a word to the program
WAKING_ACTIONS = ("die", "destroy", "health_status: unhealthy", "oom")
CONFIGURATION_SECONDS = 2.0
WORKER_SILENCE = 120.0  # seconds; every wait and every child's loop beats far more often


def notify(text: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)


def left_behind(mark: str) -> list[int]:
    """Processes with the mark, outside of any container."""
    def namespace(process: int | str) -> str:
        try:
            return os.readlink(f"/proc/{process}/ns/pid")
        except OSError:
            return ""
    return [p for p in marked_processes(mark) if namespace(p) == namespace("self")]


class Lock:
    """One pgod a folder. The file says who holds it, and by which mark its children are known."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / ".pgod" / "lock"
        self.mark = f"PGOD_RUN={os.urandom(16).hex()}"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> None:
        """Raises Fault if another holds it. Ends what a pgod that was killed left behind."""
        text = os.read(self.descriptor, 4096).decode(errors="replace").split()
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"{self.path.parent.parent} belongs to a pgod that runs, process "
                        f"{text[0] if text else '?'}") from None
        if len(text) == 2 and text[1].startswith("PGOD_RUN="):
            kill_all(left_behind(text[1]), signal.SIGKILL)
        os.truncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n{self.mark}\n".encode(), 0)
        os.fsync(self.descriptor)


class EventStream(threading.Thread):
    """One `docker events` for the whole engine: wakes the service whose container fell."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(name="events", daemon=True)
        self.shared = shared

    def run(self) -> None:
        while not self.shared.stopping.is_set():
            try:
                self.follow()
            except Exception as error:  # the thread's outermost line
                log.debug("events: %s", error)
            self.shared.events_flow.clear()
            self.shared.stopping.wait(2.0)

    def follow(self) -> None:
        """Read events until the stream ends."""
        child = self.shared.children.start(
            ["docker", "events", "--filter", "type=container", "--format", "{{json .}}"],
            stderr=DEVNULL)
        assert child.stdout
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                self.read(child, selector)
        finally:
            self.shared.children.end(child)

    def read(self, child: Child, selector: selectors.BaseSelector) -> None:
        assert child.stdout
        rest, since = b"", time.monotonic()
        while not self.shared.stopping.is_set():
            if not self.shared.events_flow.is_set() and time.monotonic() > since + 1:
                self.shared.events_flow.set()  # it lasts: what fell before, a look will find
                for worker in self.shared.workers.values():
                    worker.wake("event")
            if not selector.select(0.5):
                continue
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.handle(line)

    def handle(self, line: bytes) -> None:
        """Wake the worker that an event concerns."""
        try:
            event = json.loads(line)
            project = event["Actor"]["Attributes"].get("com.docker.compose.project")
            action, identity = str(event["Action"]), str(event["Actor"]["ID"])
        except (ValueError, KeyError, TypeError):
            return
        worker, attributes = self.shared.workers.get(project), event["Actor"]["Attributes"]
        if worker and (action == "stop" or (action == "kill" and attributes.get("signal")
                                            in ENDING_SIGNALS)):
            worker.wake("event", stopped_by_hand=identity)
        elif worker and action in WAKING_ACTIONS:
            worker.wake("event")


def remove_service(shared: Shared, path: Path) -> None:
    """Containers and networks go; work tree and state move to .pgod/removed/."""
    name = path.name
    result = shared.children.run(
        [*shared.compose_words, "--project-name", name, "down", "--remove-orphans"],
        deadline=DEADLINE["up"], kind=(name, "compose", "down"),
        env={"COMPOSE_FILE": "", "DOCKER_CONFIG": str(path / "docker")})
    if result.status or result.trouble:
        raise Fault(result.complaint)
    kept = shared.children.run(
        ["docker", "ps", "--all", "--quiet", "--filter", f"label={KEEP_LABEL}={name}"],
        deadline=DEADLINE["docker"], kind=(name, "docker", "ps")).stdout.decode().split()
    if kept:
        shared.children.run(["docker", "rm", "--force", "--volumes", *kept],
                            deadline=DEADLINE["docker"], kind=(name, "docker", "rm"))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.parent / "removed" / f"{name}-{stamp}"
    make_folder(path.parent / "removed", 0o700)
    make_folder(aside, 0o700)
    worktree = shared.settings.directory / name
    if worktree.is_dir() and not worktree.is_symlink():
        worktree.rename(aside / "worktree")
    path.rename(aside / "state")
    (shared.settings.directory / f"{name}.stop").unlink(missing_ok=True)
    log.info("%s: removed: not in the configuration; its files are in %s, its volumes stay",
             name, aside)


def remove_stale(shared: Shared) -> None:
    """Take down what is in .pgod/ and not in pgo.toml; volumes stay, the folder is set aside."""
    own = shared.settings.directory / ".pgod"
    for path in sorted(own.iterdir()):
        if path.name in shared.configuration.names or not (path / "state.json").is_file():
            continue
        if NAME_PATTERN.fullmatch(path.name):
            try:
                remove_service(shared, path)
            except (Fault, OSError) as error:
                log.error("%s: removal failed, will be tried at the next start: %s",
                          path.name, error)


class Daemon:
    """pgod's life: start, watch the configuration, end."""

    def __init__(self, settings: Settings, configuration: Configuration) -> None:
        self.settings = settings
        self.configuration = configuration
        self.signals: collections.deque[int] = collections.deque()
        self.wakeup = threading.Event()
        self.read_before = configuration.seal
        self.complained = ""
        self.ssh: SshServer | None = None
        self.http: HttpServer | None = None

    def run(self) -> int:
        """The exit status: 0 after TERM, 2 after HUP or a new configuration. Raises Fault."""
        asyncssh = import_asyncssh() if self.settings.ssh else None
        self.make_folders()
        lock = Lock(self.settings.directory)
        lock.take()
        metrics = Metrics()
        children = Children(metrics, lock.mark)
        self.shared = Shared(self.settings, self.configuration, children, metrics,
                             compose_program(children))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.queue_signal)
        metrics.set("pgo_configuration_valid", 1)
        metrics.set("pgo_build_info", 1, version=VERSION)
        try:
            remove_stale(self.shared)
            self.start(asyncssh)
            return self.watch()
        finally:
            self.end()

    def make_folders(self) -> None:
        for folder in (self.settings.directory, self.settings.datadir):
            if not folder.exists():
                make_folder(folder, 0o755)
        make_folder(self.settings.directory / ".pgod", 0o711)

    def queue_signal(self, number: int, frame: FrameType | None) -> None:
        """Only queue it; `watch` acts."""
        self.signals.append(number)
        self.wakeup.set()

    def start(self, asyncssh: Any) -> None:
        """Servers and threads; then systemd is told that all is ready."""
        for service in self.configuration.services:
            self.shared.workers[service.name] = Worker(service, self.shared)
        if self.settings.metric:
            self.http = serve_http(self.settings.metric, self.shared)
        if self.settings.ssh:
            self.ssh = SshServer(self.shared, asyncssh)
            self.ssh.serve(self.settings.ssh)
        EventStream(self.shared).start()
        for worker in self.shared.workers.values():
            worker.start()
        log.info("pgod %s follows %d services", VERSION, len(self.shared.workers))
        notify("READY=1")

    def watch(self) -> int:
        """Until a signal or a new configuration ends it."""
        looked = time.monotonic()
        while True:
            self.wakeup.wait(0.5)
            self.wakeup.clear()
            while self.signals:
                number = self.signals.popleft()
                log.info("ends: %s", signal.Signals(number).name)
                return 2 if number == signal.SIGHUP else 0
            if time.monotonic() < looked + CONFIGURATION_SECONDS:
                continue
            looked = time.monotonic()
            if self.alive():
                notify("WATCHDOG=1")
            if self.settings.restart and self.configuration_changed():
                log.info("ends: the configuration changed")
                return 2

    def alive(self) -> bool:
        """Whether every service's thread and the SSH loop were seen at work lately."""
        now, beats = time.monotonic(), self.shared.children.beats
        silent = [worker.name for worker in self.shared.workers.values()
                  if not worker.is_alive()
                  or now - beats.get(worker.ident or 0, now) > WORKER_SILENCE]
        if self.ssh and now - self.ssh.beat > WORKER_SILENCE:
            silent.append("ssh")
        if silent:
            log.error("watchdog: no sign of life: %s", ", ".join(silent))
        return not silent

    def configuration_changed(self) -> bool:
        """Believed when two looks in a row agree and the result is valid."""
        try:
            seal = configuration_seal(self.settings.config)
        except OSError as error:
            self.complain(f"cannot be read: {error.strerror}")
            return False
        stable, self.read_before = seal == self.read_before, seal
        if seal == self.configuration.seal:
            self.shared.metrics.set("pgo_configuration_valid", 1)
            self.complained = ""
            return False
        if not stable:
            return False
        try:
            read_configuration(self.settings.config)
        except ConfigurationError as error:
            self.complain(str(error))
            return False
        return True

    def complain(self, text: str) -> None:
        """Once for each new trouble."""
        self.shared.metrics.set("pgo_configuration_valid", 0)
        if text != self.complained:
            log.error("%s is not valid, the old configuration goes on:\n%s",
                      self.settings.config, text)
        self.complained = text

    def end(self) -> None:
        """Containers keep running; children get a grace, threads are waited for."""
        notify("STOPPING=1")
        self.shared.stopping.set()
        self.shared.children.stop()
        for worker in self.shared.workers.values():
            worker.wake("end")
        until = time.monotonic() + 20
        for worker in self.shared.workers.values():
            if worker.is_alive():
                worker.join(max(0.0, until - time.monotonic()))
        kill_all(left_behind(self.shared.children.mark), signal.SIGTERM)

# ---- Demo --------------------------------------------------------------------------------------

DEMO_COMPOSE = """\
services:
  web:
    image: pgod-demo:1
    command: httpd -f -p 8080 -h /site
    user: "65534"
    init: true
    volumes: ["./site:/site:ro"]
    healthcheck: {test: ["CMD", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"], interval: 1s}
"""
DEMO_TRY = """
pgod runs the service "demo" from the repository {repository}

Try, in another terminal:

  {ctl} ps
  {ctl} exec web wget -q -O - http://127.0.0.1:8080/
  {ctl} logs -f

  cd {work} && echo "<h1>again</h1>" > site/index.html && git commit -qam again && git push -q
  {ctl} up

  curl -s http://127.0.0.1:{metric}/metrics

Ctrl-C here takes all of it down.
"""


def demo_image() -> bytes:
    """A tar with nothing but a static busybox, since no registry may be in reach."""
    import tarfile  # noqa: PLC0415
    busybox = shutil.which("busybox")
    if not busybox:
        raise Fault("the demo needs busybox: apt install busybox-static")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for name in ("sh", "httpd", "wget", "ls", "cat", "sleep", "ps", "echo"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Demo:
    """A repository, a key, a configuration and a service, in a temporary folder."""

    def __init__(self) -> None:
        self.children = Children(Metrics())
        self.folder = Path(tempfile.mkdtemp(prefix="pgod-demo-"))
        self.folder.chmod(0o755)
        user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self.account = account_of(user)

    def run(self, *words: str, stdin: bytes = b"") -> None:
        """A step that must work. Raises Fault."""
        result = self.children.run(words, deadline=60, kind=("", words[0], ""), stdin=stdin,
                                   folder=self.folder)
        if result.status:
            raise Fault(f"{shlex.join(words[:3])}: {result.complaint}")

    def make(self) -> Settings:
        """Everything that a user of pgod makes by hand. Raises Fault."""
        work, repository = self.folder / "work", self.folder / "demo.git"
        self.run("docker", "import", "-", "pgod-demo:1", stdin=demo_image())
        self.run("git", "init", "-q", "--bare", "-b", "main", str(repository))
        self.run("git", "clone", "-q", str(repository), str(work))
        for key, value in (("user.name", "demo"), ("user.email", "demo@localhost")):
            self.run("git", "-C", str(work), "config", key, value)
        (work / "ssh").mkdir()
        (work / "site").mkdir()
        (work / "site" / "index.html").write_text("<h1>pgod</h1>\n")
        (work / "compose.yaml").write_text(DEMO_COMPOSE)
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "demo",
                 "-f", str(self.folder / "id_demo"))
        shutil.copy(self.folder / "id_demo.pub", work / "ssh")
        for words in (("checkout", "-q", "-B", "main"), ("add", "."),
                      ("commit", "-q", "-m", "first"), ("push", "-q", "-u", "origin", "main")):
            self.run("git", "-C", str(work), *words)
        config = self.folder / "pgo.toml"
        write_atomic(config, f'[[services]]\nname = "demo"\nuser = "{self.account.name}"\n'
                     f'repository = "{repository}"\n'.encode())
        return Settings(config, self.folder / "lib", self.folder / "data",
                        ("127.0.0.1", free_port()), ("127.0.0.1", free_port()), 5.0)

    def explain(self, settings: Settings) -> None:
        assert settings.ssh and settings.metric
        ctl = Path(__file__).resolve().with_name("pgoctl.py")
        words = f"python3 {ctl} -i {self.folder}/id_demo -p {settings.ssh[1]} localhost:demo//"
        text = DEMO_TRY.format(repository=self.folder / "demo.git", work=self.folder / "work",
                               ctl=words, metric=settings.metric[1])
        print(text.replace("// ", "//"), flush=True)

    def clean(self) -> None:
        """Containers, network, images and files."""
        for remove, *find in (
                ("rm", "ps", "-aq", "--filter", "label=com.docker.compose.project=demo"),
                ("rm", "ps", "-aq", "--filter", f"label={KEEP_LABEL}=demo"),
                ("network", "network", "ls", "-q", "--filter",
                 "label=com.docker.compose.project=demo"),
                ("rmi", "image", "ls", "-q", "pgod-demo")):
            found = self.children.run(("docker", *find), deadline=60, kind=("", "docker", find[0]))
            if identities := found.stdout.decode().split():
                words = ("network", "rm") if remove == "network" else (remove, "-f")
                with contextlib.suppress(Fault):
                    self.run("docker", *words, *identities)
        shutil.rmtree(self.folder, ignore_errors=True)


def announce(daemon: Daemon, example: Demo, settings: Settings) -> None:
    """Print what to try as soon as the service runs."""
    while not (hasattr(daemon, "shared") and daemon.shared.workers.get("demo")
               and daemon.shared.workers["demo"].state.commit):
        time.sleep(0.1)
    example.explain(settings)


def demo() -> int:
    """Run the demo until Ctrl-C. Raises Fault."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    example = Demo()
    try:
        settings = example.make()
        daemon = Daemon(settings, read_configuration(settings.config))
        threading.Thread(target=announce, args=(daemon, example, settings), daemon=True).start()
        return daemon.run()
    except KeyboardInterrupt:
        return 0
    finally:
        example.clean()

# ---- Command line ------------------------------------------------------------------------------

UNIT = """\
[Unit]
Description=pgod: git decides what runs
Wants=network-online.target
After=network-online.target docker.service

[Service]
Type=notify
ExecStart={python} {program} --config {config} --dir {directory}
Restart=on-failure
RestartSec=2
RestartForceExitStatus=2
WatchdogSec=60
TimeoutStopSec=40
UMask=0022

[Install]
WantedBy=multi-user.target
"""


def bool_word(text: str) -> bool:
    """Go's notation: true, false, 1, 0, t, f."""
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "t")


def argument(parser: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the message of ArgumentTypeError, but not that of ValueError."""
    @functools.wraps(parser)
    def parse(text: str) -> Any:
        try:
            return parser(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-c", "--config"), {"type": Path, "default": Path("/etc/pgo.toml"), "metavar": "FILE",
                          "help": "configuration (default /etc/pgo.toml)"}),
    (("-d", "--dir"), {"type": Path, "default": Path("/var/lib/pgo"), "metavar": "DIR",
                       "help": "where repositories are checked out (default /var/lib/pgo)"}),
    (("--datadir",), {"type": Path, "default": Path("/data"), "metavar": "DIR",
                      "help": "data of the services, a folder each (default /data)"}),
    (("-s", "--ssh"), {"type": argument(parse_address), "default": ("", 2222),
                       "metavar": "ADDRESS", "help": "SSH address (default :2222; '' is off)"}),
    (("-m", "--metric"), {"type": argument(parse_address), "default": ("", 9112),
                          "metavar": "ADDRESS",
                          "help": "metrics address (default :9112; '' is off)"}),
    (("-t", "--duration"), {"type": argument(parse_interval), "default": 300.0,
                            "metavar": "DURATION", "help": "between polls (default 5m0s)"}),
    (("--debug",), {"action": "store_true", "help": "log everything"}),
    (("--restart",), {"type": bool_word, "nargs": "?", "const": True, "default": True,
                      "metavar": "BOOL",
                      "help": "exit with 2 when the configuration changed (default true)"}),
    (("-v", "--version"), {"action": "version", "version": f"pgod {VERSION}"}),
    (("--check",), {"action": "store_true", "help": "check the configuration and exit"}),
    (("--demo",), {"action": "store_true", "help": "run one service from nothing, to see it"}),
    (("--unit",), {"action": "store_true", "help": "print a systemd unit"}),
)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        "pgod", description="git decides what runs: follow the repositories of the configuration "
        "and run their compose files.", epilog="exit status: 0 normal, 1 error, 2 after SIGHUP",
        allow_abbrev=False)
    for names, facts in OPTIONS:
        parser.add_argument(*names, **facts)
    return parser.parse_args(words)


class LogFormatter(logging.Formatter):
    """Under systemd the journal has time and level of its own."""

    LEVELS = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (0, "<7>"))

    def __init__(self, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(message)s",
                         "%H:%M:%S")
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        prefix = next(text for level, text in self.LEVELS if record.levelno >= level)
        # What a repository says must neither steer a terminal nor look like a line of pgod's.
        text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", "?", super().format(record))
        return (prefix if self.journal else "") + text.replace("\n", "\n    ")


def set_up_logging(debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("JOURNAL_STREAM" in os.environ))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO)


def check_identity(configuration: Configuration) -> None:
    """pgod is root, unless every service's user is who runs it. Raises Fault."""
    me = pwd.getpwuid(os.geteuid()).pw_name
    others = sorted({s.user for s in configuration.services if s.user != me})
    if os.geteuid() != 0 and others:
        raise Fault(f"must be root to run services as {', '.join(others)}")
    if os.geteuid() == 0:
        os.setgroups([])
        os.umask(0o022)


def main(words: Sequence[str]) -> int:
    """Dispatch; the exit status."""
    options = parse_arguments(words)
    settings = Settings(options.config.absolute(), options.dir.absolute(),
                        options.datadir.absolute(), options.ssh, options.metric,
                        options.duration, options.debug, options.restart)
    if options.unit:
        print(UNIT.format(python=sys.executable, program=Path(__file__).resolve(),
                          config=settings.config, directory=settings.directory), end="")
        return 0
    set_up_logging(settings.debug)
    try:
        if options.demo:
            return demo()
        configuration = read_configuration(settings.config)
        for warning in configuration.warnings:
            log.warning("%s", warning)
        if options.check:
            print(f"{settings.config}: {len(configuration.services)} services, no errors")
            return 0
        check_identity(configuration)
        return Daemon(settings, configuration).run()
    except ConfigurationError as error:
        for line in error.errors:
            print(f"{settings.config}: {line}", file=sys.stderr)
    except Fault as fault:
        print(f"pgod: {fault}", file=sys.stderr)
    return 1


def run() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
