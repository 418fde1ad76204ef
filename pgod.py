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

    Limits, Values  what is the most that anybody may have, send or take; errors, dataclasses
    Parsing         durations, words, addresses, public keys: text to values
    Files           atomic writes; paths beneath a root, opened without following links
    Metrics         what Prometheus reads
    Children        the one door to other programs
    Git             ask, fetch, export, keys of a repository; no container reaches the git folder
    Work tree       tracked files follow the commit, untracked ones are never touched
    Engine          the engine's API (containers, events) and docker compose, for one service
    Model           the rendered compose model: files, values, digests, differences (pure)
    Policy          what a repository may ask for (pure)
    Configuration   pgo.toml to Service values, with every error at once
    Release         what should run, compared with what does; what to do about it (pure)
    Store           what is on disk of a service: releases, failures, holds, NAME.stop, history
    Reverse proxy   Caddy's import file and reload
    Deploy          prepare, install, wait until it is well, or roll back; heal
    Set-up          folders, mount and user of a service; the Go program's checkout is taken over
    Worker          the thread of one service: when it looks, at what, and what it shows
    Commands        what a key holder may say, hold and status among it
    SSH, HTTP       the servers: what they say it to; metrics and webhooks
    Daemon, Command line: start, events, changes of the configuration, the end; options
"""

from __future__ import annotations

import argparse, asyncio, base64, binascii, bisect, ctypes, datetime, difflib, email.utils, errno
import fcntl, functools, getopt, grp, hashlib, hmac, http.client, http.server, io, ipaddress
import itertools, json, logging, math, os, pwd, queue, random, re, resource, select, selectors
import shlex, shutil, signal, socket, stat, struct, subprocess, sys, tempfile, termios, threading
import time, tomllib, urllib.parse, warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

VERSION = "0.1.0"
log = logging.getLogger("pgod")

# ---- Limits ------------------------------------------------------------------------------------
# Compose's own order of preference.
COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
BACKOFF_CEILING = 3600.0  # seconds between two tries of the same thing, at most
DEPLOYS = 4  # at one time; up to 8 of users who have none under way
LOOKS = 2  # that pgod may be killed at, until a commit counts as failed
JOBS = 20  # of one service that wait for their turn
SLOW_DEPLOY = 30.0  # seconds, and up to as many more, that one waits for others
KEY_COUNT, KEY_FILE_BYTES = 100, 16 * 1024
OUTSIDE_BYTES = 1 << 20  # of a file that pgo.toml names

# Deadlines of child processes, in seconds.
DEADLINE = {
    "ls-remote": 60.0, "fetch": 900.0, "git": 120.0, "render": 60.0, "login": 60.0,
    "pull": 1800.0, "build": 3600.0, "up": 600.0, "docker": 60.0, "reload": 30.0, "mount": 60.0}
# What a rendering may use: CPU seconds, bytes of data (address space is no measure: a Go program
# reserves far more than it uses), bytes of output. An alias bomb of 418 bytes runs for minutes, and
# `env_file: /dev/zero` takes all memory there is.
RENDER_CPU, RENDER_MEMORY, RENDER_OUTPUT = 10, 1 << 30, 4 << 20
STAND_INS = 20  # env files that a commit may lack; each is one more rendering
CHILD_OUTPUT = 16 << 20
# What a commit may have: files, bytes of them all, characters of a path, and folders above one.
TREE_FILES, TREE_BYTES, PATH_LENGTH, PATH_DEPTH = 50_000, 4 << 30, 1024, 64
DISK_RESERVE = 256 << 20  # bytes, or a twentieth of the disk
INPUTS = 8 * TREE_FILES  # of its bind mounts, each counted where it is bound
# A rendered model's levels, entries of one list or mapping, characters of a key and of a text.
MODEL_DEPTH, MODEL_ENTRIES, MODEL_KEY, MODEL_TEXT = 24, 2_000, 256, 128 << 10
VIOLATIONS = 100  # that are told
GIT_MEMORY = 1 << 30  # bytes of data of each git process
ENVIRONMENT_BYTES = 256 << 10  # that are read of a process's environment

# Of pgod's own environment, children see these and nothing else.
PASSED_ENVIRONMENT = "PATH LANG LC_ALL TZ DOCKER_HOST SSL_CERT_FILE SSL_CERT_DIR".split()
# And git these: a compose file could show what credentials are in them.
GIT_ENVIRONMENT = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
                   "GIT_SSL_CAINFO")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SSH_UNPROVEN, SSH_UNPROVEN_BYTES = 100, 64 * 1024  # clients without a key, and what each may send
SSH_SESSIONS, SSH_SESSIONS_PER_SERVICE = 10, 20  # at one time, the first in one connection
STREAM_MEMORY = 192 << 20  # bytes of data of a command that writes to a client
SSH_LOGIN_SECONDS, SSH_KEY_SECONDS = 20, 2.0  # the last: between looks at the key of a stream
SSH_COMMAND_BYTES, SSH_ARGUMENTS = 64 * 1024, 256
SSH_ALGORITHMS: dict[str, Any] = {kind: names.split() for kind, names in {
    "kex_algs": "mlkem768x25519-sha256 sntrup761x25519-sha512@openssh.com curve25519-sha256 "
        "curve25519-sha256@libssh.org",
    "encryption_algs": "chacha20-poly1305@openssh.com aes256-gcm@openssh.com "
        "aes128-gcm@openssh.com aes256-ctr aes128-ctr",
    "mac_algs": "hmac-sha2-256-etm@openssh.com hmac-sha2-512-etm@openssh.com",
    "compression_algs": "none",
    "signature_algs": "ssh-ed25519 sk-ssh-ed25519@openssh.com ecdsa-sha2-nistp256 "
        "ecdsa-sha2-nistp384 ecdsa-sha2-nistp521 sk-ecdsa-sha2-nistp256@openssh.com rsa-sha2-512 "
        "rsa-sha2-256",
}.items()}
# docker's templates have functions; `pad` alone takes as much memory as it is told to.
PLAIN_TEMPLATE = re.compile(r"([^{}]|\{\{ *(json +)?\.\w* *\}\})*")
HTTP_CONNECTIONS, HTTP_SECONDS = 100, 10.0

# ---- Values ------------------------------------------------------------------------------------
Progress = Callable[[str], None]  # is told what happens, a line at a time
Json = Mapping[str, Any]  # an object of JSON or of a compose file

class Fault(Exception):
    """Something did not work; the text is for a person. `retry`: trying again may help."""
    retry = True
    words: Sequence[str] = ()  # what containers said last
class Refused(Fault):
    """The commit or the request is at fault: the same again will fail the same way."""
    retry = False
class Held(Refused):
    """A hold, stop or down is in the way."""
class EngineGone(Fault):
    """The engine does not answer, or ended meanwhile: no fault of any commit."""
class ConfigurationError(Exception):
    """pgo.toml is wrong; the text has every reason, a line each."""
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
        return head if mark else "file" if self.url.startswith("/") else "ssh"
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
        """What must never be shown. Short values of env and paths would redact half of a line."""
        # A path begins with a plain folder, as /srv; a token may begin with a slash as well.
        plain = (value for _, value in self.env if value != self.name and not re.fullmatch(
            r"(\.{1,2}|/[a-z]{2,12}\d{0,2})(/[\w./-]*)?", value))
        known = (*self.repository.secrets, *(r.token for r in self.registries), self.webhook)
        lines = (line for value in plain for line in (value, *value.splitlines()) if len(line) >= 6)
        return tuple({form for text in (*known, *lines) for form in (text, json.dumps(text)[1:-1])})
    def digest(self) -> str:
        parts = (self.user, self.repository.url, self.branch, self.compose, self.env,
                 self.networks, self.mount, self.profiles, self.allow)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

@dataclass(frozen=True)
class Configuration:
    """A whole pgo.toml; `digest` changes when the file or an env_file it names changes."""
    services: tuple[Service, ...]
    admins: tuple[PublicKey, ...] = ()
    digest: str = ""
    warnings: tuple[str, ...] = ()
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
class ServicePaths:
    """Where a service's things lie. All but `worktree` and `data` are closed to containers."""
    def __init__(self, service: str, directory: Path, datadir: Path) -> None:
        self.service = service
        self.own = directory / ".pgod" / service
        self.export = self.own / "export"  # the files of the newest commit that was looked at
        self.stop = directory / f"{service}.stop"
        self.worktree = directory / service
        self.data = datadir / service
        self.roots = (self.worktree, self.data)  # where bind mounts may come from
@dataclass(frozen=True)
class PublicKey:
    """A line of a key file: `fingerprint` as `ssh-keygen -l` shows it, options as in sshd(8)."""
    fingerprint: str
    comment: str
    options: Mapping[str, str] = field(default_factory=dict)
    role: str = "owner"
    def opens(self, service: str, address: str) -> bool:
        """Whether it opens the service now, and from there."""
        given = {name: KEY_OPTIONS[name](value) for name, value in self.options.items()}
        host = ipaddress.ip_address(address.removeprefix("::ffff:").partition("%")[0])
        return (("from" not in given or any(host in network for network in given["from"]))
                and time.time() < given.get("expiry-time", math.inf)
                and service in given.get("services", [service]))
    def permits(self, command: str) -> bool:
        return command in parse_permitted(self.options.get("command", command))
    def __str__(self) -> str:
        limits = (f'{name}="{value}"' if value else name for name, value in self.options.items())
        return " ".join((self.role, self.comment or self.fingerprint, *limits))

# ---- Parsing -----------------------------------------------------------------------------------
DURATION_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
def parse_duration(text: str, least: float = 0.0) -> float:
    """Seconds of a duration in Go's notation, 90s, 5m0s, 1h30m or 1.5h; not under `least`."""
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)(ms|h|m|s)", text[:50])
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text[:50]!r} is not a duration; write it like 90s, 5m0s or 1h30m")
    seconds = sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)
    if seconds < least: raise ValueError(f"{text!r} is too short; at least {least:g}s")
    return seconds
def format_duration(seconds: float) -> str:
    """The two largest units: 3d4h, 2h5m, 4m7s, 12s."""
    left, parts = int(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts): parts.append(f"{count}{unit}")
    return "".join(parts[:2])
def short(commit: str) -> str:
    return commit[:10]
def format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port of `:2222`, `127.0.0.1:2222` or `[::1]:2222`; None of an empty text."""
    if not text: return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; write it like :2222 or 127.0.0.1:2222")
    return host.removeprefix("[").removesuffix("]"), int(port)
def parse_remote(text: str) -> Remote:
    """A repository's address, with its credentials taken out of it."""
    if text.startswith("/") or re.fullmatch(r"[\w.-]+@[\w.-]+:[^\s]+", text): return Remote(text)
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("https", "ssh", "git", "file") or "\n" in text:
        raise ValueError("is not an https, ssh or git address or an absolute path")
    if parts.scheme == "file": return Remote(parts.path)
    if not parts.hostname or parts.hostname.startswith("-"): raise ValueError("has no host")
    if parts.scheme != "https" and parts.password:
        raise ValueError("has a password, which only https can take; use deploy_key")
    if parts.scheme != "https": return Remote(text)
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    if parts.username is None: return Remote(url)
    # User and token become a header that git gets by its environment.
    user, token = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
    basic = base64.b64encode(f"{user}:{token}".encode()).decode()
    secrets = {basic, parts.password or parts.username, token or user,
               urllib.parse.quote(token or user, safe="")}
    return Remote(url, f"Authorization: Basic {basic}", tuple(sorted(secrets)))
def parse_registry(text: str) -> Registry:
    """`user:token@registry`, `:token@registry` or `token@registry`; the user is "" without one."""
    login, at, address = text.rpartition("@")
    name, colon, token = login.partition(":")
    if not colon: name, token = "", login
    if not at or not token or not re.fullmatch(r"[\w.-]+(:\d+)?(/[\w./-]+)?", address):
        raise ValueError("is not a login of the form user:token@registry")
    return Registry(address, name, token)
def parse_reload(text: str) -> Reload:
    """`host:service//exec word word …`, words split as a shell would."""
    match = re.fullmatch(r"(?:[^/\s]*:)?([^/:\s]+)//exec\s+(.+)", text, re.DOTALL)
    if not match: raise ValueError("is not of the form localhost:SERVICE//exec COMMAND …")
    words = tuple(shlex.split(match[2]))
    if not words or words[0].startswith("-"): raise ValueError("has no command after exec")
    return Reload(match[1], words)
def text_of(data: bytes) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")): raise ValueError("is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None

# As compose reads the files of --env-file, but for $, which is no variable here.
ENV_VALUE = re.compile(r"""'(?P<plain>[^']*)'.*|"(?P<quoted>(?:[^"\\]|\\.)*)".*|(?P<bare>.*)""")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
def parse_env_lines(text: str) -> tuple[tuple[str, str], ...]:
    """The NAME=VALUE lines of an env_file; blank ones and those with # in front are skipped."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"): continue
        name, mark, value = (word.strip() for word in line.partition("="))
        if not mark or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"line {number} is not of the form NAME=VALUE")
        found = ENV_VALUE.fullmatch(value)
        if not found or (found["bare"] or "x")[0] in "'\"":
            raise ValueError(f"line {number} has a quote that does not end")
        bare = (found["bare"] or "").partition(" #")[0].rstrip()
        escaped = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), found["quoted"] or "")
        pairs.append((name, found["plain"] or escaped or bare))
    return tuple(pairs)
def private_key_trouble(data: bytes) -> str:
    """Why ssh could not use it without a person, or nothing."""
    if b"PRIVATE KEY-----" not in data:
        return "is no private key" + (", but the public half: name the file without .pub"
                                      if data.startswith((b"ssh-", b"ecdsa-", b"sk-")) else "")
    body = b"".join(line for line in data.splitlines() if b":" not in line and b"-----" not in line)
    with suppress(binascii.Error):  # openssh-key-v1: the cipher's name comes first
        binary = base64.b64decode(body)
        if b"ENCRYPTED" in data or (binary.startswith(b"openssh-key-v1\0")
                                    and binary[15:23] != b"\0\0\0\4none"):
            return "has a passphrase, which nobody is there to type: ssh-keygen -p -N '' removes it"
    return ""
def rsa_bits(blob: bytes) -> int:
    """Size of the modulus of an ssh-rsa key (RFC 4253, 6.6)."""
    for _ in range(3):
        length = int.from_bytes(blob[:4], "big")
        number, blob = blob[4:4 + length], blob[4 + length:]
    return int.from_bytes(number, "big").bit_length()
# A signature is called like its key, but for RSA (RFC 8332).
KEY_TYPES = {re.sub("^rsa-.*", "ssh-rsa", name) for name in SSH_ALGORITHMS["signature_algs"]}
def key_fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
def parse_expiry(text: str) -> float:
    """Seconds since the epoch; in the machine's time zone, or UTC with Z."""
    match = re.fullmatch(r"(\d{8})(\d{4}(?:\d\d)?)?(Z?)", text)
    if not match: raise ValueError(f"{text!r} is not YYYYMMDD or YYYYMMDDHHMM, with Z for UTC")
    when = datetime.datetime.fromisoformat(f"{match[1]}T{(match[2] or '').ljust(6, '0')}")
    return when.replace(tzinfo=datetime.UTC if match[3] else None).timestamp()
def parse_permitted(text: str) -> set[str]:
    """Names of commands; `read` is all that change nothing."""
    words = re.findall(r"git \w+|\S+", text) or ["nothing"]
    if unknown := {*words} - {*COMMANDS, "read"}:
        raise ValueError(f"{min(unknown)!r} is no command; there are read, {', '.join(COMMANDS)}")
    return {name for name in COMMANDS
            if name in words or (name in READ_COMMANDS and "read" in words)}
# What may stand before a key (sshd(8), AUTHORIZED_KEYS FILE FORMAT); `services` is pgod's own.
KEY_OPTIONS: dict[str, Callable[[str], Any]] = {
    "command": parse_permitted, "expiry-time": parse_expiry, "restrict": str,
    "from": lambda text: [ipaddress.ip_network(part) for part in text.split(",")],
    "services": lambda text: every(as_name, text.split(","))}
OPTION_PATTERN = re.compile(r'([A-Za-z-]+)(?:="((?:[^"\\]|\\.)*)")?(?:,|\s+)')
def parse_key_options(line: str, role: str) -> tuple[dict[str, str], str]:
    """The options before a key, and the rest of the line. One that is not known is refused."""
    options, known = dict[str, str](), {*KEY_OPTIONS} - ({"services"} if role == "owner" else set())
    while (name := line.partition(" ")[0]) not in KEY_TYPES:
        match = OPTION_PATTERN.match(line)
        name = match[1].lower() if match else name[:40]
        if not match or name not in known or name in options:
            raise ValueError(f"{name!r} is not a key type or an option that is accepted"
                             f"{' twice' if name in options else ''}")
        options[name], line = match[2] or "", line[match.end():]
        try:
            KEY_OPTIONS[name](options[name])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"option {name}: {str(error)[:300]}") from None
    return options, line
def parse_public_key(line: str, role: str = "owner") -> PublicKey:
    """One line of a .pub file, or of authorized_keys."""
    options, line = parse_key_options(line.strip(), role)
    kind, _, rest = line.partition(" ")
    encoded, _, comment = rest.strip().partition(" ")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("is not base64") from None
    if blob[4:4 + len(kind)] != kind.encode() or len(blob) < 4 + len(kind) + 8:
        raise ValueError("is not a key of the type it names")
    if kind == "ssh-rsa" and rsa_bits(blob) < 2048:
        raise ValueError("is an RSA key of under 2048 bits")
    comment = re.sub(r"[^\x20-\x7e]", "?", comment)[:100]
    return PublicKey(key_fingerprint(blob), comment, options, role)
def parse_key_file(data: bytes, role: str = "owner") -> tuple[list[PublicKey], list[str]]:
    """The keys in a file of at most 16 KiB, one a line, and what is wrong with the other lines."""
    if len(data) > KEY_FILE_BYTES: return [], ["has more than 16 KiB"]
    if b"PRIVATE KEY-----" in data: return [], ["is a PRIVATE key: remove it and make a new one"]
    keys, wrong = list[PublicKey](), list[str]()
    try:
        for number, line in enumerate(text_of(data).splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                try:
                    keys.append(parse_public_key(line, role))
                except ValueError as error:
                    wrong.append(f"line {number} {error}")
    except ValueError as error:
        wrong.append(str(error))
    return keys, wrong if keys or wrong or role == "admin" else ["has no key"]
def redact(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret in it as ***; longer ones first, for one may hold another."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean "x"?)`, or nothing."""
    close = [name for name in known if len(word) > 2 and name.startswith(word)] or (
        difflib.get_close_matches(word, known, 1, 0.6))
    return f' (did you mean "{close[0]}"?)' if close else ""

# What compose and git put before what went wrong: progress, warnings, usage.
NOISE = re.compile(r"\s*((Container|Network|Volume|Image) \S+ +[A-Z][a-z]+\s*$|#\d+ |warning:|"
                   r"usage:|time=\S+ level=[^ef]|(see|run) '.* --help'|"
                   r"remote: (Enumerat|Count|Compress|Total))", re.IGNORECASE)
def one_line(text: str, limit: int = 300) -> str:
    """What matters of a program's words: its last lines, and of them the beginning."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not NOISE.match(line)]
    found = " / ".join(lines[-4:])
    return found if len(found) <= limit else found[:limit - 1] + "…"

# ---- Files -------------------------------------------------------------------------------------
_libc = ctypes.CDLL(None, use_errno=True)

@contextmanager
def as_user(account: Account) -> Iterator[None]:
    """Within it, this thread's file operations are the user's (setfsuid(2) is the thread's own)."""
    # Root's power over files (CAP_DAC_OVERRIDE, CAP_CHOWN, …) is off meanwhile, capabilities(7).
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
Owner = Account | None  # None: root
def chown(path: Path | int, account: Owner) -> None:
    """Give a path or descriptor to the account, where pgod may."""
    uid, gid = (account.uid, account.gid) if account else (0, 0)
    if os.geteuid() == 0: os.chown(path, uid, gid)
def make_folder(path: Path, mode: int, owner: Owner = None) -> None:
    """A folder of pgod's own with that mode and owner, also where it was there already."""
    path.mkdir(parents=True, exist_ok=True)
    if not stat.S_ISDIR(path.lstat().st_mode): raise Fault(f"{path} is not a folder; remove it")
    chown(path, owner)
    path.chmod(mode)
UNFINISHED = ".pgod-new"  # begins the name of what is not whole yet; a kill may leave it
def write_atomic(path: Path, data: bytes, mode: int = 0o600, owner: Owner = None) -> None:
    """Old content or new content, never half of it, also after a loss of power."""
    descriptor, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            chown(file.fileno(), owner)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # the rename is to last, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

@contextmanager
def folder_beneath(root: Path, parts: Sequence[str], make: bool = False) -> Iterator[int]:
    """A descriptor of root/parts, by no link. Raises FileNotFoundError, and Refused at a link."""
    descriptor = os.open(root, FOLDER_FLAGS)
    try:
        for number, part in enumerate(parts, 1):
            if make:
                with suppress(FileExistsError): os.mkdir(part, 0o755, dir_fd=descriptor)
            try:
                deeper = os.open(part, FOLDER_FLAGS, dir_fd=descriptor)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                raise Refused(f"{root}/{'/'.join(parts[:number])} is a link or a file where a "
                              "folder must be; remove it") from None
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)
def beneath(path: str, root: str) -> str | None:
    """The path relative to root (`` for root itself), or None if it lies elsewhere."""
    if os.path.normpath(path) != path.rstrip("/") and path != root: return None
    if path.rstrip("/") == root: return ""
    return path.rstrip("/")[len(root) + 1:] if path.startswith(root + "/") else None
def stat_beneath(root: Path, path: str) -> os.stat_result | None:
    """What is at root/path, not following any link; None where nothing is."""
    *parts, name = path.split("/")
    with suppress(FileNotFoundError), folder_beneath(root, parts) as folder:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    return None
def open_beneath(root: Path, path: str) -> BinaryIO:
    """A regular file beneath root, to read; a link, a device or a pipe is Refused."""
    *parts, name = path.split("/")
    with folder_beneath(root, parts) as folder:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:  # a device is not even opened: that may do something
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise Refused(f"{root}/{path} is a link, or no regular file")
        return open(f"/proc/self/fd/{found}", "rb")
    finally:
        os.close(found)
def read_beneath(root: Path, path: str, limit: int) -> bytes:
    """The content of a regular file beneath root, `limit` bytes of it: it may be endless."""
    with open_beneath(root, path) as file: return file.read(limit)
def replace_beneath(root: Path, path: str, make: Callable[[str, int], None]) -> None:
    """What `make` makes of a temporary name, at root/path. Raises Refused where a folder is."""
    *parts, name = path.split("/")
    with folder_beneath(root, parts, make=True) as folder:
        try:
            with suppress(FileNotFoundError): os.unlink(UNFINISHED, dir_fd=folder)
            make(UNFINISHED, folder)
            with suppress(OSError):  # an empty folder gives way, as in git
                os.rmdir(name, dir_fd=folder)
            os.rename(UNFINISHED, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)  # before it is noted that the file is there
        except IsADirectoryError as error:
            at = "/".join((str(root), *parts, error.filename2 or error.filename))
            raise Refused(f"{at} is a folder, not a file; move or remove it") from None
        finally:
            with suppress(OSError): os.unlink(UNFINISHED, dir_fd=folder)
def write_beneath(root: Path, path: str, data: BinaryIO, mode: int = 0o644) -> None:
    """A regular file beneath root, by a temporary name; a folder in its place is Refused."""
    def make(temporary: str, folder: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(data, file, 1 << 20)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
    replace_beneath(root, path, make)
def remove_beneath(root: Path, path: str, keep: frozenset[str]) -> None:
    """Unlink a file, and the folders that this leaves empty, but for those in `keep`."""
    *parts, name = path.split("/")
    with suppress(FileNotFoundError, IsADirectoryError, Refused):
        with folder_beneath(root, parts) as folder:
            os.unlink(name, dir_fd=folder)
            os.fsync(folder)
        while parts and "/".join(parts) not in keep:
            *parts, name = parts
            with folder_beneath(root, parts) as folder:
                try:
                    os.rmdir(name, dir_fd=folder)
                except OSError:
                    return

# ---- Metrics -----------------------------------------------------------------------------------
# The first two are the Go program's; untyped, for histograms alone have names that end in _count.
PROCESS_METRICS = ("cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "open_fds",
                   "max_fds", "start_time_seconds")
METRICS: dict[str, tuple[str, str]] = {
    "pgo_command_count": ("untyped", "Commands executed, by service, command and subcommand."),
    "pgo_command_error_count": ("untyped", "Commands that failed."),
    "pgo_service_info": ("gauge", "Commit that runs and commit wanted; always 1."),
    "pgo_service_in_sync": ("gauge", "1 if what runs is the newest commit of the branch."),
    "pgo_service_held": ("gauge", "1 while down, stop or hold is in force."),
    "pgo_service_last_success_timestamp_seconds": ("gauge", "When it last was as git says."),
    "pgo_service_consecutive_failures": ("gauge", "Looks that failed since the last good one."),
    "pgo_service_deploys_total": ("counter", "Deploys, by outcome."),
    "pgo_service_rollbacks_total": ("counter", "Deploys that were rolled back."),
    "pgo_service_heals_total": ("counter", "Times that containers were brought back."),
    "pgo_service_policy_violations": ("gauge", "Violations in the newest commit."),
    "pgo_service_last_deploy_duration_seconds": ("gauge", "How long the last deploy took."),
    "pgo_service_deploy_duration_seconds": ("histogram", "How long deploys took."),
    "pgo_service_deploy_duration_seconds_bucket": ("", ""),
    "pgo_service_deploy_duration_seconds_sum": ("", ""),
    "pgo_service_deploy_duration_seconds_count": ("", ""),
    "pgo_service_containers": ("gauge", "Containers, by state, each in one of them."),
    "pgo_configuration_valid": ("gauge", "0 while pgo.toml on disk is not valid."),
    "pgo_build_info": ("gauge", "Version of pgod; always 1."),
}
PROCESS_METRICS = ("cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "open_fds",
                   "max_fds", "start_time_seconds")
METRICS |= {f"process_{name}": ("counter" if name.endswith("total") else "gauge",
                                "As the official client libraries have it.")
            for name in PROCESS_METRICS}
DEPLOY_SECONDS, STARTED = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, math.inf), time.time()

class Metrics:
    """Counters, and gauges that are set; thread-safe."""
    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _values
        self._values: dict[str, defaultdict[tuple[tuple[str, str], ...], float]] = {
            name: defaultdict(float) for name in METRICS}
    def count_command(self, service: str, kind: tuple[str, str], failed: bool) -> None:
        """One more command of that kind: (command, subcommand)."""
        for name in ("pgo_command_count", "pgo_command_error_count")[:1 + failed]:
            self.add(name, service=service, cmd=kind[0], subcmd=kind[1])
    def observe(self, service: str, seconds: float = 0.0, count: int = 1) -> None:
        """That many more deploys, which took so long; 0 begins the counters."""
        for most in DEPLOY_SECONDS:
            self.add("pgo_service_deploy_duration_seconds_bucket", count * (seconds <= most),
                     service=service, le=f"{most:g}".replace("inf", "+Inf"))
        self.add("pgo_service_deploy_duration_seconds_sum", seconds, service=service)
        self.add("pgo_service_deploy_duration_seconds_count", count, service=service)
    def add(self, name: str, value: float = 1, /, **labels: str) -> None:
        with self._lock: self._values[name][tuple(labels.items())] += value
    def set(self, name: str, value: float, /, **labels: str) -> None:
        with self._lock: self._values[name][tuple(labels.items())] = value
    def replace(self, name: str, service: str, rows: Iterable[tuple[Json, float]]) -> None:
        with self._lock:
            values = self._values[name]
            for key in [key for key in values if ("service", service) in key]: del values[key]
            for labels, value in rows: values[("service", service), *labels.items()] = value
    def render(self) -> str:
        """The page, in the text format 0.0.4."""
        lines = []
        with self._lock:
            for name, (kind, text) in METRICS.items():
                if kind: lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                for key, value in self._values[name].items():
                    labels = ",".join(f"{label}={json.dumps(text)}" for label, text in key)
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
    def failed(self) -> bool:
        return bool(self.status or self.trouble)
    @property
    def complaint(self) -> str:
        return self.trouble or one_line(self.stderr) or f"exit status {self.status}"
    def check(self, doing: str) -> Result:
        """Itself, if all went well. Raises Fault."""
        if self.failed: raise Fault(f"{doing}: {self.complaint}")
        return self

@dataclass(frozen=True)
class RunAs:
    """Who a child is: its account (None: pgod's own), environment and directory."""
    service: str = ""  # of pgo.toml, for the log and the metrics; "" is pgod itself
    account: Account | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path("/")
    secrets: tuple[str, ...] = ()  # are redacted in the log and in standard error
    limits: tuple[str, ...] = ()  # of prlimit(1)
    marked: bool = True  # not where a compose file could show the mark: it dies with pgod
    disk: str = ""  # a folder; the child is ended before it fills the disk below DISK_RESERVE
def processes(file: str, matches: Callable[[bytes], bool]) -> list[int]:
    """The processes whose /proc/PID/file matches, proc(5)."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        # A process can make its environment as large as it likes: PR_SET_MM_MAP of prctl(2).
        with suppress(OSError), Path("/proc", entry, file).open("rb") as content:
            if matches(content.read(ENVIRONMENT_BYTES)): found.append(int(entry))
    return found
def session_processes(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    def belongs(content: bytes) -> bool:
        state, _, _, number, *_ = content.rpartition(b")")[2].split()
        return int(number) == session and state != b"Z"
    return processes("stat", belongs)
def marked_processes(mark: str) -> list[int]:
    return processes("environ", lambda content: mark.encode() in content.split(b"\0"))
def kill_all(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError): os.kill(process, number)
Child = subprocess.Popen[bytes]
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
def feed_lines(data: bytearray, on_line: Progress, secrets: Sequence[str]) -> bytearray:
    """Hand on the whole lines in `data`; what is left of it."""
    *lines, rest = data.split(b"\n")
    for text in filter(None, (line.decode(errors="replace").strip() for line in lines)):
        on_line(redact(text, secrets))
    return bytearray(rest)
LEFT_BEHIND = "something that it left behind holds its pipes"
FULL = "No space left for it on the disk"
def lacks_room(folder: str | Path, need: int = 0) -> str:
    """Why there is no room for so many bytes, or nothing."""
    disk = shutil.disk_usage(folder)
    lacks = disk.free < need + min(DISK_RESERVE, disk.total // 20)
    return f"{FULL}: {disk.free >> 20} MiB are free" if lacks else ""

class Children:
    """The one door to other programs: argument lists, never a shell; each in its own session."""
    # Once `stopped_at` is set, every `run` ends its child after a grace and raises Stopping.
    GRACE = 10.0  # seconds
    def __init__(self, metrics: Metrics, mark: str = "") -> None:
        self.metrics = metrics
        self.mark = mark  # PGOD_RUN=…: what a killed pgod left behind is known by it
        self.stopped_at = 0.0
    def start(self, words: Sequence[str], who: RunAs, *, stdin: int = DEVNULL, stdout: int = PIPE,
              stderr: int = PIPE, session: bool = True) -> Child:
        """A running child; whoever starts it must wait for it. Raises Fault if there is none."""
        passed = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
        name, _, value = self.mark.partition("=")
        # HOME is nowhere, not in /tmp: others could put links there.
        environment = {"PATH": DEFAULT_PATH, "HOME": "/nonexistent", **passed, **who.env} | (
            {name: value} if name and (who.marked or os.geteuid()) else {})
        if not shutil.which(words[0], path=environment["PATH"]):
            raise Fault(f"{words[0]} is not installed")
        log.debug("%s: runs: %s", who.service or "pgod", redact(shlex.join(words), who.secrets))
        if who.limits: words = ["prlimit", *who.limits, "--core=0", "--", *words]
        if who.account and not os.geteuid():  # by setpriv: Python would have to fork itself
            account, groups = who.account, ",".join(map(str, who.account.groups))
            words = ["setpriv", *([] if who.marked else ["--pdeathsig=KILL"]),
                     f"--reuid={account.uid}", f"--regid={account.gid}",
                     f"--groups={groups}" if groups else "--clear-groups", "--", *words]
        try:
            return subprocess.Popen(words, env=environment, cwd=who.directory, stdin=stdin,
                                    stdout=stdout, stderr=stderr, start_new_session=session,
                                    umask=0o022, bufsize=0)
        except (OSError, subprocess.SubprocessError) as error:
            raise Fault(f"{words[0]} cannot be started: {error}") from None
    def end(self, child: Child) -> None:
        """End the child's whole session: TERM, then KILL after 3 s."""
        kill_all(session_processes(child.pid), signal.SIGTERM)
        patience = time.monotonic() + 3
        while session_processes(child.pid) and time.monotonic() < patience:
            child.poll()
            time.sleep(0.05)
        while left := session_processes(child.pid):
            kill_all(left, signal.SIGKILL)
            time.sleep(0.01)
        child.wait()
    def run(self, words: Sequence[str], who: RunAs, *, deadline: float, kind: tuple[str, str],
            stdin: bytes = b"", limit: int = CHILD_OUTPUT,
            on_line: Progress | None = None) -> Result:
        """Run a child to its end, and count it as `kind`: (command, subcommand)."""
        # `limit`: bytes of output; `on_line`: is told its standard error, a line at a time.
        trouble = LEFT_BEHIND  # until its end is seen
        with self.start(words, who, stdin=PIPE if stdin else DEVNULL) as child:  # and its pipes
            try:
                output, trouble = self._collect(child, stdin, deadline, limit, on_line, who)
            finally:
                if trouble: self.end(child)  # /proc is read only for what did not end by itself
        stdout, stderr = (bytes(output[name]) for name in ("stdout", "stderr"))
        result = Result(child.returncode, stdout, redact(stderr.decode(errors="replace"),
                        who.secrets), "" if trouble == LEFT_BEHIND else trouble)
        self.metrics.count_command(who.service, kind, result.failed)
        return result
    def _collect(self, child: Child, stdin: bytes, deadline: float, limit: int,
                 on_line: Progress | None, who: RunAs) -> tuple[dict[str, bytearray], str]:
        """Both outputs until their end, the child's or the deadline; and what was wrong."""
        if child.stdin:
            with suppress(BrokenPipeError): child.stdin.write(stdin)
            child.stdin.close()
        output = {"stdout": bytearray(), "stderr": bytearray()}
        line, until, ended = bytearray(), time.monotonic() + deadline, 0.0
        with selectors.DefaultSelector() as selector:
            for name in output: selector.register(getattr(child, name), selectors.EVENT_READ, name)
            while selector.get_map() or child.poll() is None:
                now = time.monotonic()
                ended = ended or (now if child.poll() is not None else 0.0)
                if ended and now > ended + 1: return output, LEFT_BEHIND
                if now > until: return output, f"took longer than {deadline:.0f} s"
                if self.stopped_at and now > self.stopped_at + self.GRACE: raise Stopping
                if who.disk and (full := lacks_room(who.disk)): return output, full
                for key, _ in selector.select(0.2 if selector.get_map() else 0.002):
                    data = os.read(key.fd, 1 << 16)
                    if not data: selector.unregister(key.fileobj)
                    output[key.data] += data
                    if key.data == "stderr" and on_line:
                        line = feed_lines(line + data, on_line, who.secrets)
                if sum(map(len, output.values())) > limit:
                    return dict.fromkeys(output, bytearray()), f"wrote over {limit >> 10} KiB"
        return output, ""

# ---- Git ---------------------------------------------------------------------------------------
# path: (mode, blob) of everything in a commit, as `git ls-tree -r` says it.
Tree = dict[str, tuple[str, str]]
LINK_MODES = {"120000": "a symlink", "160000": "a submodule"}
GIT_SETTINGS = {
    "core.hooksPath": "/dev/null", "core.fsmonitor": "false", "credential.helper": "",
    "http.followRedirects": "false", "gc.autoDetach": "false", "fetch.recurseSubmodules": "no",
    "submodule.recurse": "false", "transfer.fsckObjects": "false", "protocol.version": "2",
    "core.symlinks": "true", "core.quotePath": "false", "advice.detachedHead": "false",
    "http.lowSpeedLimit": "100", "http.lowSpeedTime": "60", "core.bigFileThreshold": "16m",
    "fetch.unpackLimit": "1", "gc.autoPackLimit": "3", "gc.pruneExpire": "now",
}

GIT_HINTS = {
    r"returned error: 30\d": "; redirects are not followed: give the address that it leads to",
    "Host key verification failed": "; the git server's host key changed; if that is right: "
                                    "ssh-keygen -R HOST -f {}/ssh/known_hosts"}

# Files are those of the commit, byte for byte: `ident` makes twelve bytes of one.
AS_IT_IS = b"* -text -eol -ident -working-tree-encoding -filter\n"
def printable(text: str) -> str:
    """No control characters: what a repository says must not steer a terminal or a log."""
    return "".join(char if char.isprintable() else "?" for char in text)
def taken_over(descriptor: int, gid: int, prefix: str = "") -> dict[str, str]:
    """Give a folder to root, so that no process of the user's can change it; what is in it then."""
    # Root's docker builds from it, and would follow a link. The folder first: then it is at rest.
    found, root = dict[str, str](), os.geteuid() == 0
    try:
        if root: os.chown(descriptor, 0, gid)
        os.fchmod(descriptor, 0o750)
        for name in os.listdir(descriptor):
            mode = (facts := os.stat(name, dir_fd=descriptor, follow_symlinks=False)).st_mode
            if stat.S_ISDIR(mode):
                inner = os.open(name, FOLDER_FLAGS, dir_fd=descriptor)
                found |= taken_over(inner, gid, f"{prefix}{name}/")
                continue
            if root: os.chown(name, 0, gid, dir_fd=descriptor, follow_symlinks=False)
            found[prefix + name] = "120000" if stat.S_ISLNK(mode) else ""
            if stat.S_ISREG(mode) and facts.st_nlink == 1:
                mode = 0o755 if mode & stat.S_IXUSR else 0o644
                os.chmod(name, mode, dir_fd=descriptor)
                found[prefix + name] = f"100{mode:o}"
    finally:
        os.close(descriptor)
    return found

@dataclass
class Repository:
    """The git folder of one service. It lies outside the work tree, so no container reaches it."""
    # git runs as the service's user, without the docker group, without any configuration but ours.
    service: Service
    paths: ServicePaths
    account: Account
    children: Children
    exported: tuple[str, Tree] = ("", {})  # commit and tree of the export folder
    asked: str = ""  # the commit that the remote told last
    def __post_init__(self) -> None:
        self.folder = self.paths.own / "git"
    def environment(self) -> dict[str, str]:
        """No prompts, no configuration of others, one transport, the token in the environment."""
        remote, settings = self.service.repository, dict(GIT_SETTINGS)
        if remote.authorization:
            host = "/".join(remote.url.split("/")[:3])
            settings[f"http.{host}/.extraHeader"] = remote.authorization
        env = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": str(self.paths.own / "gitconfig"),
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
                   f"UserKnownHostsFile={self.paths.own}/ssh/known_hosts"]
        key = [] if not self.service.deploy_key else [
            "-i", f"{self.paths.own}/ssh/deploy_key", "-o", "IdentitiesOnly=yes",
            "-o", "IdentityAgent=none"]
        return ["ssh", "-F", "/dev/null", *(w for o in options for w in ("-o", o)), *key]
    def prepare(self) -> None:
        """Folders, the deploy key where the user can read it, and the trust in local paths."""
        own = self.paths.own
        for name in ("git", "ssh"): make_folder(own / name, 0o700, self.account)
        if self.service.deploy_key:
            key = read_beneath(Path("/"), self.service.deploy_key[1:], OUTSIDE_BYTES)
            key = key.replace(b"\r\n", b"\n").rstrip() + b"\n"
            write_atomic(own / "ssh" / "deploy_key", key, 0o600, self.account)
        remote, trusted = self.service.repository, [str(self.paths.worktree)]
        if remote.scheme == "file": trusted.append(remote.url)
        lines = "".join(f"\tdirectory = {json.dumps(place)}\n" for path in trusted
                        for place in (path, f"{path.rstrip('/')}/.git"))
        write_atomic(own / "gitconfig", f"[safe]\n{lines}".encode(), 0o644)
    def git(self, *words: str, deadline: str = "git", folder: Path | None = Path(),
            env: Mapping[str, str] | None = None) -> bytes:
        """Run git on the git folder (or on none); its standard output. Raises Fault."""
        where = [] if folder is None else [f"--git-dir={self.folder / folder}"]
        who = RunAs(self.service.name, self.account, self.environment() | dict(env or {}),
                    secrets=self.service.secrets,
                    limits=(f"--data={GIT_MEMORY}", f"--fsize={TREE_BYTES}", "--cpu=900"))
        result = self.children.run(["git", *where, *words], who, deadline=DEADLINE[deadline],
                                   kind=("git", "pull" if words[0] == "fetch" else words[0]))
        if result.failed:
            hints = [text for said, text in GIT_HINTS.items() if re.search(said, result.stderr)]
            hint = "".join(hints).format(self.paths.own)
            raise Fault(f"git {words[0]}: {result.complaint}{hint}")
        return result.stdout
    def ask(self) -> str:
        """The commit that the branch has at the remote: one process, nothing fetched."""
        branch, url = self.service.branch, self.service.repository.url
        if found := self.heads(url, f"refs/heads/{branch}").get(branch):
            self.asked = found
            return found
        there = sorted(map(printable, self.heads(url, "refs/heads/*")))
        have = ", ".join(there[:10]) + ", …" * (len(there) > 10)
        raise Fault(f"the repository has no branch {branch!r}; it has: {have or 'none'}")
    def heads(self, url: str, ref: str) -> dict[str, str]:
        """The branches of a remote that match, and their commits."""
        output = self.git("ls-remote", url, ref, deadline="ls-remote", folder=None)
        rows = re.findall(r"^([0-9a-f]{40}|[0-9a-f]{64})\trefs/heads/(.+)$",
                          output.decode(errors="replace"), re.MULTILINE)
        return {name: commit for commit, name in rows}
    def fetch(self, folder: Path = Path()) -> str:
        """Fetch the branch's commit alone, by force; its identity. Raises Fault."""
        ref = f"refs/heads/{self.service.branch}"
        return self.fetch_ref(self.service.repository.url, ref, "refs/pgod/wanted", folder)
    def fetch_ref(self, url: str, ref: str, name: str, folder: Path = Path()) -> str:
        """Fetch a ref under a name of ours; its commit. A git folder is made if there is none."""
        if not (self.folder / folder / "HEAD").exists():  # with hashes of the remote's kind
            kind = "sha256" if len(self.asked) == 64 else "sha1"
            self.git("init", "--quiet", "--bare", "--template=", f"--object-format={kind}",
                     str(self.folder / folder), folder=None)
        self.git("fetch", "--quiet", "--no-tags", "--depth=1", "--no-write-fetch-head", url,
                 f"+{ref}:{name}", deadline="fetch", folder=folder)
        words = ("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        return self.git(*words, folder=folder).decode().strip()
    def repaired(self, act: Callable[[], Any]) -> Any:
        """What `act` returns; where it fails, once more with a git folder that is made again."""
        try:
            return act()
        except Refused:
            raise
        except Fault as fault:
            self.remake(fault)
            return act()
    def remake(self, reason: Fault) -> None:
        """Make the git folder again beside the old one and swap them; the work tree stays."""
        fresh, old = (self.folder.with_name(f"{UNFINISHED}-git.{n}") for n in ("new", "old"))
        for path in (fresh, old): shutil.rmtree(path, ignore_errors=True)
        make_folder(fresh, 0o700, self.account)
        self.fetch(fresh)
        with suppress(Fault):  # the last good commit, for a rollback
            self.fetch_ref(str(self.folder), "refs/pgod/good", "refs/pgod/good", fresh)
        self.folder.rename(old)
        fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        log.warning("%s: git folder made again: %s", self.service.name, reason)
    def describe(self, commit: str) -> tuple[str, str]:
        """Author and subject, for people; empty if git cannot say."""
        with suppress(Fault):
            text = self.git("show", "--no-patch", "--format=%an%x00%s", commit)
            author, _, subject = text.decode(errors="replace").strip().partition("\0")
            return printable(author)[:80], printable(subject)[:120]
        return "", ""
    def tree(self, commit: str, spare: bool) -> Tree:
        """What the commit holds. Raises Refused where that is too much, Fault for the disk."""
        tree, left = Tree(), TREE_BYTES
        for entry in self.git("ls-tree", "-r", "-l", "-z", "--full-tree", commit).split(b"\0")[:-1]:
            facts, _, name = entry.partition(b"\t")
            mode, _, blob, size = facts.decode().split()
            path = name.decode(errors="surrogateescape")
            if path in tree: raise Refused(f"it has a path twice: {printable(path[:80])}")
            left -= int(size) if size != "-" else 0
            if len(path) > PATH_LENGTH or path.count("/") > PATH_DEPTH:
                raise Refused(f"it has a path that is too long: {printable(path[:80])}…")
            tree[path] = ("100644" if mode == "100664" else mode, blob)
            if len(tree) > TREE_FILES or left < 0:
                raise Refused(f"it has more than {TREE_FILES} files or {TREE_BYTES >> 30} GiB")
        if spare and (full := lacks_room(self.paths.own, 2 * (TREE_BYTES - left))):
            raise Fault(full)
        return tree
    def export(self, commit: str, spare: bool = False) -> Tree:
        """Put the commit's files where no container reaches; its tree. `spare`s the last space."""
        if self.exported[0] != commit:
            self.exported = ("", {})
            self.exported = (commit, self.repaired(lambda: self._export(commit, spare)))
        return self.exported[1]
    def _export(self, commit: str, spare: bool) -> Tree:
        tree = self.tree(commit, spare)
        fresh, index = self.paths.own / f"{UNFINISHED}-export", self.folder / "export.index"
        shutil.rmtree(fresh, ignore_errors=True)
        for left in (index, index.with_name("export.index.lock")): left.unlink(missing_ok=True)
        make_folder(fresh, 0o750, self.account)
        env = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(fresh)}
        with as_user(self.account):
            write_beneath(self.folder, "info/attributes", io.BytesIO(AS_IT_IS))
        try:
            self.git("read-tree", commit, env=env)
            self.git("checkout-index", "--all", "--force", f"--prefix={fresh}/", env=env)
            have = taken_over(os.open(fresh, FOLDER_FLAGS), self.account.gid)
            if have != {path: mode for path, (mode, _) in tree.items() if mode != "160000"}:
                raise Fault("the export is not what the commit has: who else writes into it?")
        except Fault:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        shutil.rmtree(self.paths.export, ignore_errors=True)
        fresh.rename(self.paths.export)
        return tree
    def take_over(self) -> str:
        # upload-pack is made for repositories that are not trusted: it runs nothing of theirs.
        there = str(self.paths.worktree / ".git")
        self.asked = self.git("ls-remote", there, "HEAD", folder=None).decode().partition("\t")[0]
        return self.fetch_ref(there, "HEAD", "refs/pgod/good")
    def public_keys(self, tree: Tree) -> tuple[tuple[PublicKey, ...], tuple[str, ...]]:
        """The keys in ssh/ of the export, and what in it is none, and why."""
        keys, ignored = dict[str, PublicKey](), list[str]()
        paths = [path for path in sorted(tree) if re.fullmatch(r"ssh/[^/]+", path)]
        for path in paths[:KEY_COUNT]:
            if kind := LINK_MODES.get(tree[path][0]):
                ignored.append(f"{printable(path)} is {kind}")
                continue
            with as_user(self.account):
                data = read_beneath(self.paths.export, path, KEY_FILE_BYTES + 1)
            found, wrong = parse_key_file(data)
            keys |= {key.fingerprint: key for key in found if key.fingerprint not in keys}
            ignored += [f"{printable(path)} {why}" for why in wrong[:10]]
        return tuple(keys.values())[:KEY_COUNT], tuple(ignored[:KEY_COUNT])

# ---- Work tree ---------------------------------------------------------------------------------
def folders_of(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
def same_entry(root: Path, export: Path, path: str, mode: str) -> bool:
    """Whether the work tree has at `path` what the export has there."""
    found, (*parts, name) = stat_beneath(root, path), path.split("/")
    if found is None or stat.S_ISLNK(found.st_mode) != (mode == "120000"): return False
    if mode == "120000":
        with folder_beneath(root, parts) as folder:
            return os.readlink(name, dir_fd=folder) == os.readlink(export / path)
    executable = bool(found.st_mode & stat.S_IXUSR) == (mode == "100755")
    size = (export / path).lstat().st_size
    if not stat.S_ISREG(found.st_mode) or not executable or found.st_size != size: return False
    with open_beneath(root, path) as one, (export / path).open("rb") as other:
        while (chunk := one.read(1 << 20)) == other.read(1 << 20):  # never in memory as a whole
            if not chunk: return True
    return False
def untracked_in(root: Path, at: str, known: set[str]) -> Iterator[str]:
    """What is not of the last commit in a folder: what a container made is not looked into."""
    with folder_beneath(root, at.split("/")) as folder, os.scandir(folder) as entries:
        for name in (f"{at}/{entry.name}" for entry in entries):
            if f"{name}/" in known:
                yield from untracked_in(root, name, known)
            elif name not in known: yield name
def conflicts_at(root: Path, export: Path, path: str, mode: str, known: set[str]) -> Iterable[str]:
    """Untracked files that a new one at `path` would overwrite, unless they are the same."""
    for at in (*folders_of(path), path):
        found = stat_beneath(root, at)
        if found is None or (at in known and at != path): return []
        if not stat.S_ISDIR(found.st_mode):
            return [] if same_entry(root, export, path, mode) else [at]
    return untracked_in(root, path, known)
@contextmanager
def refuse_on_permission_error(root: Path, path: str) -> Iterator[None]:
    """Say what to do where the user is kept out of his own work tree."""
    try:
        yield
    except PermissionError:
        raise Refused(f"{root}/{path} cannot be changed: it or its folder belongs to another user, "
                      "as when a container took it; chown it") from None
def worktree_conflicts(root: Path, export: Path, tracked: Tree, new: Tree) -> list[str]:
    """What the commit would overwrite, ten at most. Raises Refused where the user is kept out."""
    known, conflicts = {*tracked}, list[str]()
    known |= {f"{folder}/" for path in tracked for folder in folders_of(path)}
    for path, (mode, _) in sorted(new.items()):
        if path not in known and mode != "160000" and len(conflicts) < 10:
            with refuse_on_permission_error(root, path):
                conflicts += itertools.islice(conflicts_at(root, export, path, mode, known), 10)
    changes = {path for path in {*tracked, *new} if tracked.get(path) != new.get(path)}
    for folder, path in {path.rpartition("/")[0]: path for path in sorted(changes)}.items():
        with (refuse_on_permission_error(root, path),
              suppress(FileNotFoundError, Refused),
              folder_beneath(root, folder.split("/") if folder else ()) as descriptor):
            try:
                with suppress(FileNotFoundError): os.unlink(UNFINISHED, dir_fd=descriptor)
                os.symlink(".", UNFINISHED, dir_fd=descriptor)
                os.unlink(UNFINISHED, dir_fd=descriptor)
            except IsADirectoryError:
                conflicts.append(f"{path.rpartition('/')[0]}/{UNFINISHED}")
    return conflicts
def write_entry(root: Path, export: Path, path: str, mode: str) -> None:
    """What the export has at `path`, to the work tree, if that is not there already."""
    with suppress(PermissionError):
        if same_entry(root, export, path, mode): return
    if mode == "120000":
        target = os.readlink(export / path)
        replace_beneath(root, path, lambda name, folder: os.symlink(target, name, dir_fd=folder))
    else:
        with (export / path).open("rb") as data:
            write_beneath(root, path, data, 0o755 if mode == "100755" else 0o644)
def update_worktree(root: Path, export: Path, tracked: Tree, new: Tree,
                    keep: frozenset[str]) -> list[str]:
    """Make tracked files those of the commit; why some could not be made so."""
    # In place: no folder is ever replaced, for a bind mount would keep the old one. Call it as the
    # user. In the way may be a link, a folder with untracked files, or a container that keeps the
    # user out; what the commit does not change may well be a container's by now.
    failures = []
    def attempt(path: str, act: Callable[..., None], *arguments: Any) -> None:
        try:
            with refuse_on_permission_error(root, path): act(root, *arguments)
        except Refused as refused:
            if path not in new or tracked.get(path) != new[path]: failures.append(str(refused))
    gone = sorted(set(tracked) - set(new))
    folders = {folder for path in new for folder in folders_of(path)}
    # Files that become folders, and those in folders that become files.
    first = [path for path in gone
             if path in folders or not new.keys().isdisjoint(folders_of(path))]
    for path in first: attempt(path, remove_beneath, path, keep)
    for path, (mode, _) in sorted(new.items()):
        if mode != "160000": attempt(path, write_entry, export, path, mode)
    for path in gone: attempt(path, remove_beneath, path, keep)
    return failures

def chown_tracked(root: Path, paths: Iterable[str], former: int, account: Account) -> None:
    """Give paths beneath root, and the folders above them, to the account, by no link."""
    # Only those that are the former user's (a number): what a container took stays the container's.
    for path in {*paths, *(folder for file in paths for folder in folders_of(file))}:
        *parts, name = path.split("/")
        with suppress(FileNotFoundError, Refused), folder_beneath(root, parts) as folder:
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == former:
                os.chown(name, account.uid, account.gid, dir_fd=folder, follow_symlinks=False)

# ---- Engine ------------------------------------------------------------------------------------
API_NEWEST = (1, 51)  # the newest version of the engine's API that pgod was tried with
API_BYTES = 32 << 20  # of one answer
API_SECONDS = 60.0
WORDS_LINES = 200  # that a container wrote last ...
WORDS_LENGTH = 64 << 10  # ... and characters of them
PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
REPLACE_LABEL = "com.docker.compose.replace"
DIGEST_LABEL = "io.pgod.digest"
KEEP_NAME = "pgod.invalid/keep"  # repository of the tags that keep images; no host has this name
# Signals that say something to a program and do not end it, as `docker kill` reports them.
HARMLESS_SIGNALS = frozenset(("1", "10", "12", "17", "18", "23", "28"))
FOREVER = ("always", "unless-stopped")  # restart policies of what is never done
UP = ("running", "restarting", "paused", "removing")  # states of what has not ended

class NotThere(Fault):
    """The engine has no such container, image, network or volume."""
@dataclass(frozen=True)
class Bind:
    """A path of the host that the engine mounts, as root, into a container."""
    compose_service: str
    kind: str  # bind, config or secret
    source: str
    read_only: bool
    target: str = ""
    volume: bool = False  # it is by a volume of driver local, which is judged with the volumes

@dataclass(frozen=True)
class Container:
    """A container of a project, as the engine has it. Times are seconds since the epoch."""
    identity: str
    compose_service: str
    name: str
    status: str  # created, running, paused, restarting, removing, exited or dead
    exit_code: int = 0
    health: str = ""  # "" without a health check, else starting, healthy or unhealthy
    restarts: int = 0
    policy: str = "no"  # or always, on-failure, unless-stopped
    image: str = ""
    created: float = 0.0
    started: float = 0.0
    by_hand: bool = False  # ended, because somebody stopped or killed it
    digest: str = ""
    replaces: bool = False  # compose made it to take another one's place
    networks: Mapping[str, str] = field(default_factory=dict)  # name: identity
    shares: tuple[str, ...] = ()  # containers whose network, ipc or pid namespace it has
    volumes_from: tuple[str, ...] = ()
    volumes: tuple[tuple[str, bool, str], ...] = ()  # name, whether writable, target
    binds: tuple[Bind, ...] = ()
    ports: tuple[str, ...] = ()  # PORT/PROTOCOL of the host that it holds

@dataclass(frozen=True)
class Snapshot:
    """What the engine has for a project at the moment `now`, by the engine's own clock."""
    # `networks` are all of the engine; `volumes` and `images` those that were asked for.
    containers: tuple[Container, ...] = ()
    networks: Mapping[str, Json] = field(default_factory=dict)
    volumes: Mapping[str, Json] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)  # name: identity
    now: float = 0.0
def parse_docker_host(text: str) -> tuple[str, int]:
    """`(path, 0)` of a Unix socket or `(host, port)`, as docker reads DOCKER_HOST. Raises Fault."""
    scheme, _, rest = text.partition("://")
    if scheme == "unix" and rest.startswith("/"): return rest, 0
    parts = urllib.parse.urlsplit(text)
    with suppress(ValueError):
        if scheme == "tcp" and parts.hostname: return parts.hostname, parts.port or 2375
    raise Fault(f"DOCKER_HOST={text}: pgod speaks to an engine by unix:///path or tcp://host:port")
def parse_time(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time; 0 for the engine's "never"."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?\d*(Z|[+-]\d\d:\d\d)", text)
    if not match or text.startswith("0001"): return 0.0
    return datetime.datetime.fromisoformat(match[1] + (match[2] or "") + match[3]).timestamp()
def parse_container(facts: Json) -> Container:
    """A Container of what the engine says of it. Raises KeyError."""
    state, host, config = facts["State"], facts["HostConfig"], facts["Config"]
    labels = config["Labels"] or {}
    compose_service = str(labels.get(SERVICE_LABEL, ""))
    modes = (host.get("NetworkMode"), host.get("IpcMode"), host.get("PidMode"))
    net = facts.get("NetworkSettings") or {}
    return Container(
        facts["Id"], compose_service, facts["Name"].lstrip("/"), state["Status"],
        state["ExitCode"], (state.get("Health") or {}).get("Status", "").replace("none", ""),
        facts.get("RestartCount", 0), host["RestartPolicy"]["Name"] or "no", facts["Image"],
        parse_time(facts["Created"]), parse_time(state["StartedAt"]),
        digest=str(labels.get(DIGEST_LABEL, "")), replaces=REPLACE_LABEL in labels,
        networks={name: (network or {}).get("NetworkID", "")
                  for name, network in (net.get("Networks") or {}).items()},
        shares=tuple(mode[10:] for mode in modes if str(mode).startswith("container:")),
        ports=tuple(f"{at['HostPort']}/{port.rpartition('/')[2]}" for port, places in
                    (net.get("Ports") or {}).items() for at in places or ()),
        volumes_from=tuple(text.partition(":")[0] for text in host.get("VolumesFrom") or ()),
        volumes=tuple((str(mount.get("Name")), bool(mount["RW"]), mount["Destination"])
                      for mount in facts.get("Mounts") or () if mount["Type"] == "volume"),
        binds=tuple(Bind(compose_service, "bind", mount["Source"], not mount["RW"],
                         mount["Destination"])
                    for mount in facts.get("Mounts") or () if mount["Type"] == "bind"))
def device_of(volume: Json | None) -> str:
    """The path of the host that a volume of driver local is bound to; empty where it is none."""
    volume = volume or {}
    options = volume.get("driver_opts") or volume.get("Options") or {}
    bound = options.get("type") in ("none", "bind") and "bind" in str(options.get("o")).split(",")
    return str(options.get("device") or "") if bound else ""
def engine_connection(address: tuple[str, int], seconds: float) -> http.client.HTTPConnection:
    """HTTP over the engine's socket. Raises OSError."""
    host, port = address
    connection = http.client.HTTPConnection(host if port else "docker", port or 80, timeout=seconds)
    if port:
        connection.connect()
    else:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(seconds)
        connection.sock.connect(host)
    return connection

class EngineApi:
    """The engine's own API, for questions and small acts. A connection a request: any thread."""
    def __init__(self, host: str = "") -> None:
        if os.environ.get("DOCKER_TLS_VERIFY"):
            raise Fault("DOCKER_TLS_VERIFY is set: pgod speaks to an engine without TLS only, by "
                        "its socket; unset it")
        host = host or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        self.address = parse_docker_host(host)
        self._version = ""  # asked for again when the engine was away
    def path(self, path: str, query: Json) -> str:
        """With the version that both know, and the query; filters are JSON."""
        if not self._version:
            answer = self.exchange("GET", "/_ping")[1]
            newest = re.fullmatch(r"(\d+)\.(\d+)", answer.get("Api-Version") or "")
            known = (int(newest[1]), int(newest[2])) if newest else API_NEWEST
            self._version = "/v{}.{}".format(*min(known, API_NEWEST))
        words = urllib.parse.urlencode({name: json.dumps(value) if isinstance(value, dict)
                                        else value for name, value in query.items()})
        return f"{self._version}{path}?{words}"
    def exchange(self, method: str, path: str, body: Any = None,
                 seconds: float = API_SECONDS) -> tuple[bytes, http.client.HTTPMessage]:
        """The answer's body and headers. Raises NotThere, Fault with its words, or EngineGone."""
        try:
            with closing(engine_connection(self.address, seconds)) as connection:
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read(API_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            self._version, why = "", error or type(error).__name__
            raise EngineGone(f"the engine does not answer: {why}") from None
        if len(text) > API_BYTES:
            raise Fault(f"the engine answered {path} with more than {API_BYTES >> 20} MiB")
        if answer.status >= 400:
            with suppress(ValueError, AttributeError):
                text = json.loads(text).get("message", "").encode()
            raise (NotThere if answer.status == 404 else Fault)(
                one_line(text.decode(errors="replace")) or f"the engine says {answer.status}")
        return text, answer.headers
    def ask(self, method: str, path: str, query: Json | None = None, body: Any = None) -> Any:
        """The answer, parsed; None where there is none."""
        text, _ = self.exchange(method, self.path(path, query or {}), body)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise Fault(f"the engine's answer to {path} is no JSON") from None
    def listed(self, kind: str, **filters: list[str]) -> list[Json]:
        """A row for each of the `images`, or of the `containers`, also of stopped ones."""
        query = {"all": int(kind == "containers"), "filters": filters}
        return list(self.ask("GET", f"/{kind}/json", query))
    def containers(self, project: str) -> tuple[Container, ...]:
        """The containers of a project by name, one-off ones left out."""
        labels = [f"{PROJECT_LABEL}={project}", "com.docker.compose.oneoff=False"]
        found = []
        for row in self.listed("containers", label=labels):
            with suppress(NotThere, KeyError):  # gone meanwhile
                facts = self.ask("GET", f"/containers/{row['Id']}/json")
                container, ended = parse_container(facts), parse_time(facts["State"]["FinishedAt"])
                by_hand = container.status == "exited" and self.was_ended(container, ended)
                found.append(replace(container, by_hand=by_hand))
        return tuple(sorted(found, key=lambda container: container.name))
    def with_devices(self, container: Container) -> Container:
        """The container with the paths of the host that its volumes are bound to."""
        return replace(container, binds=container.binds + tuple(
            Bind(container.compose_service, "bind", device, not writable, target)
            for name, writable, target in container.volumes
            if (device := device_of(self.facts(f"/volumes/{name}")))))
    def was_ended(self, container: Container, ended: float) -> bool:
        """Whether somebody stopped or killed it. The engine remembers its last 256 events."""
        # It tells of a kill a moment later than it kills, and waits for what is yet to come.
        until = min(ended + 1, time.time())
        query = {"since": f"{container.started - 1:.9f}", "until": f"{until:.9f}",
                 "filters": {"container": [container.identity], "event": ["kill"]}}
        text, _ = self.exchange("GET", self.path("/events", query))
        events = [json.loads(line) for line in text.splitlines() if line.strip()]
        return any(event["Actor"]["Attributes"].get("signal") not in HARMLESS_SIGNALS
                   and event.get("timeNano", 0) / 1e9 > container.started for event in events)
    def facts(self, path: str) -> Json:
        """What the engine says of a thing; empty where it is not there."""
        try:
            return dict(self.ask("GET", urllib.parse.quote(path)))
        except NotThere:
            return {}
    def image(self, name: str) -> Json:
        return self.facts(f"/images/{name}/json")
    def disk(self) -> str:
        """The folder of the engine's images; empty where it is on another machine."""
        folder = str(self.facts("/info").get("DockerRootDir", ""))
        return folder if os.path.isdir(folder) else ""
    def images(self, names: Iterable[str]) -> dict[str, str]:
        return {name: str(facts["Id"]) for name in sorted({*names})
                if (facts := self.image(name)).get("Id")}
    def networks(self) -> tuple[dict[str, Json], float]:
        text, headers = self.exchange("GET", self.path("/networks", {}))
        now = email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
        return {network["Name"]: network for network in json.loads(text)}, now
    def last_words(self, container: Container, secrets: Sequence[str]) -> str:
        """The state of a container, what its health checks said, and the end of its logs."""
        # Redacted before it is cut: half of a secret is not found any more.
        facts = self.facts(f"/containers/{container.identity}/json")
        checks = ((facts.get("State") or {}).get("Health") or {}).get("Log") or ()
        query = {"stdout": 1, "stderr": 1, "tail": WORDS_LINES}
        path = self.path(f"/containers/{container.identity}/logs", query)
        try:
            data, _ = self.exchange("GET", path)
        except Fault as fault:
            data = str(fault).encode()
        frames, at = list[bytes](), 0
        while (facts.get("Config") or {}).get("Tty") is False and data[at:at + 1] in (b"\1", b"\2"):
            size = int.from_bytes(data[at + 4:at + 8], "big")  # stdout and stderr come in frames
            frames, at = [*frames[-WORDS_LINES:], data[at + 8:at + 8 + size]], at + 8 + size
        restarts = f", {container.restarts} restarts" if container.restarts else ""
        health = f", {container.health}" if container.health else ""
        said = "".join(f"health check: exit status {check.get('ExitCode')}: {check.get('Output')}\n"
                       for check in checks)
        wrote = redact(b"".join(frames or [data]).decode(errors="replace").rstrip(), secrets)
        return (f"== {container.name}: {container.status}{health}, exit status "
                f"{container.exit_code}{restarts}\n{redact(said, secrets)}{wrote[-WORDS_LENGTH:]}")
    def act(self, method: str, path: str, query: Json | None = None, body: Any = None) -> None:
        """Do something to what may be gone meanwhile. Raises Fault."""
        with suppress(NotThere): self.ask(method, path, query, body)
    def stop(self, identities: Iterable[str]) -> None:
        for path in (self.path(f"/containers/{identity}/stop", {}) for identity in identities):
            with suppress(NotThere): self.exchange("POST", path, seconds=API_SECONDS + 120)
    def remove(self, identities: Iterable[str], volumes: bool = False) -> None:
        """By force; `volumes`: also the anonymous ones that are its own."""
        for identity in identities:
            self.act("DELETE", f"/containers/{identity}", {"force": 1, "v": int(volumes)})
    def tag(self, image: str, name: str) -> None:
        """Give an image one more name, with a tag or without. Raises NotThere."""
        self.ask("POST", f"/images/{image}/tag", {"repo": name})
    def untag(self, name: str) -> None:
        self.act("DELETE", f"/images/{urllib.parse.quote(name)}", {"noprune": 1})
    def kept(self, project: str) -> set[str]:
        """The tags by which pgod keeps a project's images."""
        return {name for row in self.listed("images", reference=[KEEP_NAME])
                for name in row.get("RepoTags") or ()
                if name.startswith(f"{KEEP_NAME}:{project}.")}
    def events(self, on_event: Callable[[Json], None], going_on: Callable[[], bool]) -> None:
        """Hand on what happens to containers, until the stream ends. Raises Fault."""
        # `going_on` is asked twice a second. HTTP/1.0, because then lines come as they are.
        kinds = ["die", "destroy", "kill", "oom", "stop", "health_status", "start"]
        query = {"filters": {"type": ["container"], "event": kinds}}
        try:
            path, rest = self.path("/events", query), b""
            with engine_connection(self.address, API_SECONDS).sock as stream:
                stream.sendall(f"GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
                while going_on():
                    if not select.select([stream], [], [], 0.5)[0]: continue
                    if not (data := stream.recv(1 << 16)): return
                    *whole, rest = (rest + data).split(b"\n")
                    rest = rest if len(rest) < API_BYTES else b""
                    for line in whole:
                        with suppress(ValueError, KeyError, TypeError): on_event(json.loads(line))
        except OSError as error:
            raise EngineGone(f"the engine does not answer: {error}") from None

def compose_program(children: Children) -> tuple[str, ...]:
    """`docker compose`, or a standalone docker-compose of version 2. Raises Fault."""
    found = ""
    for words in (("docker", "compose"), ("docker-compose",)):
        with suppress(Fault):
            version = children.run(
                [*words, "version", "--short"], RunAs(), deadline=DEADLINE["docker"],
                kind=("compose", "version")).check("").stdout.decode(errors="replace").strip()
            if re.match(r"v?([2-9]|[1-9]\d+)\.", version): return words
            found = f"{' '.join(words)} {printable(version)[:40]} is too old; "
    raise Fault(f"{found}docker compose 2 is needed: install docker-compose-v2 or "
                "docker-compose-plugin")
def account_of(user: str) -> Account:
    """The user with the groups it has, but for docker's: who has that is root by the engine."""
    entry = pwd.getpwnam(user)
    groups = set(os.getgrouplist(user, entry.pw_gid))
    docker = {group.gr_gid for group in grp.getgrall() if group.gr_name == "docker"}
    return Account(user, entry.pw_uid, entry.pw_gid, tuple(sorted(groups - docker)))
def render_fault(result: Result, files: Sequence[str]) -> Fault:
    """Why a rendering failed; a limit's own words help nobody. A crash is no fault of the file."""
    text, why, at = result.stderr, result.complaint, ", ".join(map(os.path.basename, files))
    if "out of memory" in text or "cannot allocate memory" in text:
        why = f"it needs more than {RENDER_MEMORY >> 20} MiB of memory"
    elif result.status in (-signal.SIGXCPU, -signal.SIGKILL) or "SIGXCPU" in text:
        why = f"it needs more than {RENDER_CPU} s of processor time"
    elif "remote resource is disabled" in text:
        why = "it includes or extends an address; only files of the repository are read"
    elif match := re.search(r"env file (/.*) not found", why):
        why = (f"env_file {os.path.relpath(match[1], os.path.dirname(files[0]))} is not in the "
               "commit; commit it, or let env or env_file in pgo.toml stand in for it")
    elif "\ngoroutine " in text:
        return Fault(f"compose crashed: {text.splitlines()[0][:200]}")
    elif match := re.search(r"yaml: (line \d+): (.*)", why):
        return Refused(f"{at}, {match[1]}: {match[2]}")
    return Refused(f"{at}: {why.replace(os.path.dirname(files[0]) + '/', '')}")

# A registry may send the engine to any address; what it is told there, these words alone come from.
PULL_TROUBLE = re.compile(
    "manifest unknown|not found|denied|unauthorized|no basic auth credentials|no matching manifest|"
    "no such host|connection refused|no route to host|network is unreachable|timeout|x509|EOF|"
    "server gave HTTP response to HTTPS client|too ?many ?requests|no space left|deadline exceeded",
    re.IGNORECASE)

@dataclass
class Compose:
    """docker compose for one service."""
    # Rendering is the user's, without access to the engine. All else is root's, on the model that
    # was checked: who can trace a process that has the docker group, is root himself.
    service: Service
    paths: ServicePaths
    account: Account
    children: Children
    program: tuple[str, ...]
    def environment(self) -> dict[str, str]:
        """For every docker command. Nothing in it or in a .env makes compose fetch a remote."""
        profiles = ",".join(self.service.profiles)  # none: what .env says counts
        return dict(self.service.env) | ({"COMPOSE_PROFILES": profiles} if profiles else {}) | {
            "DOCKER_CONFIG": str(self.paths.own / "docker"),
            "BUILDX_CONFIG": str(self.paths.own / "buildx"),
            "COMPOSE_EXPERIMENTAL_GIT_REMOTE": "false", "COMPOSE_EXPERIMENTAL_OCI_REMOTE": "false",
            "COMPOSE_PROJECT_NAME": self.service.name, "COMPOSE_MENU": "false",
            "DOCKER_CLI_HINTS": "false"}
    def who(self, env: Mapping[str, str] | None = None, disk: str = "") -> RunAs:
        return RunAs(self.service.name, None, self.environment() | dict(env or {}),
                     secrets=self.service.secrets, disk=disk)
    def prepare(self) -> None:
        for name in ("docker", "buildx"): make_folder(self.paths.own / name, 0o700)
        if not (self.paths.own / "docker" / "config.json").exists():
            write_atomic(self.paths.own / "docker" / "config.json", b"{}\n")
    def write_model(self, name: str, model: Json) -> None:
        # As UTF-8: compose takes no surrogate pairs.
        text = json.dumps(model, sort_keys=True, ensure_ascii=False)
        write_atomic(self.paths.own / name, text.encode())
    def words(self, *command: str, model: str = "model.json") -> list[str]:
        """A compose command on a checked model: the same prefix for every one."""
        return [*self.program, "--ansi", "never", "--project-name", self.service.name,
                "--project-directory", str(self.paths.worktree), "--file",
                str(self.paths.own / model), "--env-file", "/dev/null", *command]
    def run(self, *command: str, deadline: str, model: str = "model.json",
            on_line: Progress | None = None, values: Mapping[str, str] | None = None,
            disk: str = "") -> Result:
        waits = self.service.wait if deadline == "up" else 0  # for what depends_on names
        return self.children.run(
            self.words(*command, model=model), self.who(values, disk),
            deadline=DEADLINE[deadline] + waits, on_line=on_line, kind=("compose", command[0]))
    def files(self, tree: Tree) -> list[str]:
        """The files of the commit to render. Raises Refused if there is none."""
        names = self.service.compose or tuple(n for n in COMPOSE_FILES if n in tree)[:1]
        if not names: raise Refused(f"the repository has none of {', '.join(COMPOSE_FILES)}")
        for name in names:
            if name not in tree: raise Refused(f"the repository has no {name}")
        return [str(self.paths.export / name) for name in names]
    def render(self, files: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The model of files, by compose itself, in the export; its warnings. Raises Refused."""
        # As the user, with limits. The project's folder is the first file's, as compose has it.
        folder = os.path.dirname(self.paths.export / (self.service.compose or COMPOSE_FILES)[0])
        words = [word for name in files for word in ("--file", name)]
        env = {"PWD": folder, **self.environment(), "GIT_ALLOW_PROTOCOL": "none",
               "DOCKER_CONFIG": str(self.paths.own / "none"), "GOMAXPROCS": "2"}
        with ExitStack() as stack:
            for _ in range(STAND_INS):
                result = self.children.run(
                    [*self.program, "--project-name", self.service.name, "--project-directory",
                     folder, *words, "config", "--format", "json"],
                    RunAs(self.service.name, self.account, env, secrets=self.service.secrets,
                          limits=(f"--cpu={RENDER_CPU}", f"--data={RENDER_MEMORY}"), marked=False),
                    deadline=DEADLINE["render"], limit=RENDER_OUTPUT, kind=("compose", "config"))
                missing = re.search(r"env file (/.*) not found", result.stderr)
                if not missing or not self.stand_in(missing[1], stack): break
        if result.failed: raise render_fault(result, files)
        export = str(self.paths.export) + "/"
        warnings = [json.loads(text).replace(export, "")[:300] for text in
                    re.findall(r'level=warning msg=("(?:[^"\\]|\\[\\"nt])*")', result.stderr)]
        try:
            return dict(json.loads(result.stdout)), [*dict.fromkeys(warnings)][:20]
        except (ValueError, TypeError):
            raise Refused("compose rendered the compose file to something else than JSON") from None
    def stand_in(self, path: str, stack: ExitStack) -> bool:
        """Make an env file that the commit lacks, of the names in pgo.toml, until `stack` ends."""
        # A name without a value takes that of compose's environment: no secret is in the file.
        inside, names = beneath(path, str(self.paths.export)), dict(self.service.env)
        with suppress(FileNotFoundError, FileExistsError, Refused):
            if inside and names:
                *parts, name = inside.split("/")
                with folder_beneath(self.paths.export, parts) as folder:
                    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644,
                                         dir_fd=folder)
                stack.callback(os.unlink, path)
                with os.fdopen(descriptor, "w") as file:
                    file.write("".join(f"{name}\n" for name in names))
                return True
        return False
    def docker(self, command: str, *words: str, stdin: bytes = b"") -> Result:
        return self.children.run(["docker", command, *words], self.who(), stdin=stdin,
                                 deadline=DEADLINE[command], kind=("docker", command))
    def login(self) -> None:
        """Log in to every registry, with a configuration of the service's own. Raises Fault."""
        for registry in self.service.registries:
            result = self.docker("login", "--username", registry.user, "--password-stdin",
                                 registry.address, stdin=registry.token.encode())
            result.check(f"login to {registry.address} failed")
    def pull(self, names: Sequence[str], disk: str) -> str:
        """Pull the images of compose services; why not all of them came, or nothing."""
        trouble = ""
        try:
            self.login()
        except Fault as fault:
            trouble = str(fault)
        words = ("--", *sorted(names))  # a compose service may be called --build
        attempt = functools.partial(self.run, "pull", "--quiet", deadline="pull",
                                    model="render.json", disk=disk)
        result = attempt(*words)
        if result.status and len(names) > 1:  # compose gave up at the first that failed
            attempt("--ignore-pull-failures", *words)
        told = result.trouble or ", ".join(dict.fromkeys(PULL_TROUBLE.findall(result.stderr)))
        return trouble or (told or "docker pull on the server says why" if result.failed else "")
    def build(self, names: Iterable[str], closed: Iterable[str], disk: str) -> None:
        """Build from the export, without the images in `closed`. Raises Refused, or Fault."""
        # All builds of the engine share what `RUN --mount=type=cache` keeps, but for this.
        own = ("--build-arg", f"BUILDKIT_CACHE_MOUNT_NS={self.service.name}")
        # BuildKit's own rules: they also count for what variables, ONBUILD and frontends make up.
        # An address is fetched by the engine, which reaches what listens on the host's loopback.
        denied = [f"docker-image://{start}{text}*" for name in closed
                  for text in (name, f"{repository_of(name)}@") for start in ("", "*/")]
        if "build:address" not in self.service.allow and not self.service.trusted:
            denied += ["http://*", "https://*", "git://*"]
        rules = [{"action": "DENY", "selector": {"identifier": text}} for text in denied]
        path = self.paths.own / "sources.json"
        write_atomic(path, json.dumps({"version": 1, "rules": rules}).encode())
        values = {"EXPERIMENTAL_BUILDKIT_SOURCE_POLICY": str(path),
                  # Attestations have the time in them, so that each image would be another.
                  "BUILDX_NO_DEFAULT_ATTESTATIONS": "1", "DOCKER_BUILDKIT": "1"}
        result = self.run("build", *own, "--", *names, deadline="build", model="render.json",
                          disk=disk, values=values)
        if result.trouble.startswith(FULL): raise Fault(f"build failed: {result.trouble}")
        if result.failed:
            why = one_line(result.stderr + result.trouble, 600)
            remedy = ('; an administrator permits an address in a Dockerfile with allow = '
                      '["build:address"], an image of another service with ["image:NAME"]')
            raise Refused(f"build failed: {why}{remedy if 'denied by policy' in why else ''}")
    def up(self, services: Sequence[str], values: Mapping[str, str], force: bool = False) -> None:
        """Bring up these compose services and no others; no orphans. Raises Fault or EngineGone."""
        result = self.run(
            "up", "--detach", "--no-build", "--quiet-pull", "--pull", "never", "--no-deps",
            "--remove-orphans", *["--force-recreate"] * force, "--", *services, deadline="up",
            values=values, on_line=lambda line: log.debug("%s: %s", self.service.name, line))
        if re.search(r"Cannot connect to the Docker daemon|error during connect|"
                     "server is shutting down", result.stderr) and result.status:
            raise EngineGone(f"the engine went away: {result.complaint}")
        result.check("up")

# ---- Model -------------------------------------------------------------------------------------
Model = dict[str, Any]
MAX_BYTES = 1 << 30  # of the host's memory, for a tmpfs or shared memory
VALUE_PREFIX = "PGOD_VALUE_"  # names of variables are the repository's: DOCKER_HOST is one, too
# Keys of a compose service that do not shape its containers.
NOT_SHAPING = frozenset(("build", "pull_policy", "profiles", "depends_on", "scale", "develop"))
def copied(model: Model) -> Model:
    return dict(json.loads(json.dumps(model)))
def moved_paths(value: Any, old: str, new: str) -> Any:
    """The model with every path at or beneath `old` moved to `new`."""
    if isinstance(value, dict):
        return {key: moved_paths(item, old, new) for key, item in value.items()}
    if isinstance(value, list): return [moved_paths(item, old, new) for item in value]
    if isinstance(value, str) and (value == old or value.startswith(old + "/")):
        return new + value[len(old):]
    return value
def part(value: Json, *keys: str) -> dict[str, Any]:
    """The mapping at a path of keys; an empty one where there is none."""
    for key in keys:
        found = value.get(key)
        value = found if isinstance(found, dict) else {}
    return dict(value)
def compose_services(model: Model) -> dict[str, Any]:
    return model.get("services") or {}
def entries_used(uses: Any, table: Json) -> dict[str, Any]:
    sources = [str(use.get("source") if isinstance(use, dict) else use) for use in uses or ()]
    return {source: table.get(source) or {} for source in sources}
def files_used(uses: Any, table: Json) -> list[str]:
    return [str(entry["file"]) for entry in entries_used(uses, table).values() if entry.get("file")]
def binds_of(model: Model) -> list[Bind]:
    """Every bind mount, also by a volume, and configs and secrets from files."""
    binds, volumes = [], part(model, "volumes")
    for name, service in compose_services(model).items():
        for mount in (item for item in service.get("volumes") or () if isinstance(item, dict)):
            source = str(mount.get("source", ""))
            device = device_of(volumes.get(source)) if mount.get("type") == "volume" else ""
            if mount.get("type") == "bind" or device:
                binds.append(Bind(name, "bind", device or source, mount.get("read_only") is True,
                                  str(mount.get("target", "")), bool(device)))
        for kind in ("config", "secret"):
            files = files_used(service.get(f"{kind}s"), part(model, f"{kind}s"))
            binds += [Bind(name, kind, file, True) for file in files]
    return binds
def expected_replicas(model: Model) -> dict[str, int]:
    found = {name: part(service, "deploy").get("replicas", service.get("scale", 1))
             for name, service in compose_services(model).items()}
    return {name: int(1 if replicas is None else replicas) for name, replicas in found.items()}
def normalised(model: Model) -> Model:
    """The model with a limit for each tmpfs, plain paths, no dependencies that are not there."""
    # A tmpfs may take half of the host's memory; `up` refuses what is optional and not there.
    result = copied(model)
    for service in (services := compose_services(result)).values():
        # What compose writes so, it does not read.
        if service.get("memswap_limit") == "-1": service["memswap_limit"] = -1
        for key, limits in part(service, "blkio_config").items():
            if isinstance(limits, list):
                service["blkio_config"][key] = [
                    {name.lower(): item for name, item in limit.items()} for limit in limits]
        mounts = service.get("tmpfs") or []
        for place, mount in enumerate(mounts):
            path, _, options = mount.partition(":")
            if not re.search("(^|,)size=", options):
                mounts[place] = f"{path}:{options + ',' if options else ''}size={MAX_BYTES}"
        for volume in (v for v in service.get("volumes") or () if isinstance(v, dict)):
            if volume.get("type") == "tmpfs":
                volume["tmpfs"] = {"size": str(MAX_BYTES)} | (volume.get("tmpfs") or {})
            elif volume.get("type") == "bind":
                volume["source"] = re.sub("/+", "/", str(volume.get("source", "")))
        if wanted := part(service, "depends_on"):
            service["depends_on"] = {name: how for name, how in wanted.items() if name in services
                                     or (how or {}).get("required") is not False}
    return result
def capabilities(service: Json) -> set[str]:
    """Those that it adds, by their plain names."""
    return {str(name).upper().removeprefix("CAP_") for name in service.get("cap_add") or ()}
def shared_networks(model: Model, shares: Callable[[str], bool]) -> set[str]:
    return {key for key, network in part(model, "networks").items()
            if network and (network.get("external") or shares(str(network.get("name") or "")))}
def among_others(model: Model, shares: Callable[[str], bool]) -> set[str]:
    """The compose services on networks that others may be on: external, shared or docker0."""
    shared = shared_networks(model, shares)
    modes = {name: str(service.get("network_mode") or "")
             for name, service in compose_services(model).items()}
    found = {name for name, mode in modes.items() if mode in ("bridge", "default")
             or shared & {*networks_used(compose_services(model)[name])}}
    while more := {name for name, mode in modes.items()
                   if mode.startswith("service:") and mode[8:] in found} - found:
        found |= more
    return found
def without_raw_sockets(model: Model, shares: Callable[[str], bool]) -> Model:
    """The model without NET_RAW where others are on the network: ARP would take their traffic."""
    result = copied(model)
    for service in map(compose_services(result).__getitem__, among_others(model, shares)):
        if not capabilities(service) & {"NET_RAW", "ALL"}:  # they need `allow`
            service["cap_drop"] = sorted({*(service.get("cap_drop") or ()), "NET_RAW"})
    return result
def inherits_bind(binds: Iterable[Bind], service: Json, image_volumes: Iterable[str]) -> bool:
    """Whether compose would hand an old container's bind on to the new one."""
    # It does so where the new one has an anonymous volume, of the compose file or of the image.
    mounts = {os.path.normpath(str(mount.get("target"))): mount.get("source")
              for mount in service.get("volumes") or () if isinstance(mount, dict)}
    anonymous = {*map(os.path.normpath, image_volumes)} - {*mounts} | {
        target for target, source in mounts.items() if not source}
    return any(os.path.normpath(bind.target) in anonymous for bind in binds)
def image_of(project: str, name: str, service: Json) -> str:
    """The image's name; compose makes one up for what it builds."""
    return str(service.get("image") or f"{project}-{name}")
def all_named(project: str, model: Model, kind: str) -> dict[str, tuple[str, Any]]:
    """The networks or volumes of a model: key: (name in the engine, configuration)."""
    return {key: (str((entry or {}).get("name") or f"{project}_{key}"), entry or {})
            for key, entry in part(model, kind).items()}
def named_things(project: str, model: Model, kind: str) -> dict[str, tuple[str, Any]]:
    """Those of them that are the project's own."""
    return {key: (name, entry) for key, (name, entry) in all_named(project, model, kind).items()
            if not entry.get("external")}
def networks_used(service: Json) -> list[str]:
    return [str(key) for key in service.get("networks") or ()]
def names_of(where: str, service: Json, key: str) -> set[str]:
    names = (where, service.get("hostname"), service.get("container_name"),
             *(part(service, "networks", key).get("aliases") or ()))
    return {str(name) for name in names if name}
def plain(name: str) -> str:
    return name.lower().rstrip(".")
def names_on(project: str, model: Model, network: str) -> tuple[set[str], set[str]]:
    """What a project's containers on a network answer to there, and what only they know inside."""
    called = {key: name for key, (name, _) in all_named(project, model, "networks").items()}
    keys = {key for key, name in called.items() if name == network}
    if not keys: return set(), set()
    services, replicas = compose_services(model), expected_replicas(model)
    used = {name: {*networks_used(service)} for name, service in services.items()}
    on = {name for name in services if keys & used[name]}
    near = {key for name in on for key in used[name]}
    def known(those: Iterable[str], among: set[str]) -> set[tuple[str, str]]:
        """Each name of these compose services on each of these networks, and the network."""
        return {(text, key) for name in those for key in among & used[name] for text in (
            *names_of(name, services[name], key),
            *(f"{project}-{name}-{number + 1}" for number in range(max(1, replicas[name]))))}
    # The engine asks all networks for NAME.NETWORK as a whole before it splits it.
    scoped = {f"{text}.{called.get(key, f'{project}_{key}')}"
              for text, key in known(services, near - keys)}
    links = {str(link).partition(":")[2]
             for name in on for link in services[name].get("links") or ()}
    inside = {text for text, _ in known({*services} - on, near)} | scoped | links - {""}
    return {plain(text) for text, _ in known(on, keys)}, {plain(text) for text in inside}
def shared_with(service: Json) -> set[str]:
    modes = [str(service.get(key) or "") for key in ("network_mode", "ipc", "pid")]
    sources = [str(text).split(":") for text in service.get("volumes_from") or ()]
    return {mode[8:] for mode in modes if mode.startswith("service:")} | {
        words[0] for words in sources if words[0] != "container"}
def value_names(model: Model) -> list[str]:
    """The variables whose values are configs or secrets of some compose service."""
    entries = (entry for service in compose_services(model).values()
               for kind in ("configs", "secrets")
               for entry in entries_used(service.get(kind), part(model, kind)).values())
    return sorted({str(entry["environment"]) for entry in entries if entry.get("environment")})
def with_value_names(model: Model) -> Model:
    """The model with these variables under names that mean nothing to docker."""
    result = copied(model)
    for entry in (*part(result, "configs").values(), *part(result, "secrets").values()):
        if entry.get("environment"): entry["environment"] = VALUE_PREFIX + str(entry["environment"])
    return result
def with_own_cache(model: Model, name: str) -> Model:
    """The model whose builds take no cached step from those of others, for one more host's sake."""
    # What proxies and secrets a step may read is in no key of BuildKit's cache; hosts are. What
    # cache_from brings, true or not, it would keep for the builds of all.
    result = copied(model)
    for service in compose_services(result).values():
        if isinstance(build := service.get("build"), dict):
            build.pop("cache_from", None)
            build["extra_hosts"] = [*(build.get("extra_hosts") or ()),
                                    f"{name}.pgod.invalid=127.0.0.1"]
    return result

class Files:
    """Content and mode of what a commit has at and beneath a path of the work tree."""
    def __init__(self, tree: Tree, worktree: str, generated: Mapping[str, str]) -> None:
        """`generated`: files that pgod itself writes into the work tree, with their digests."""
        self.worktree = worktree
        self.entries = dict(tree) | {path: ("100644", blob) for path, blob in generated.items()}
        self.paths = sorted(self.entries)
    def file(self, source: str) -> tuple[str, str] | None:
        """Mode and digest of a file; None where that is no file of the commit."""
        return self.entries.get(beneath(source, self.worktree) or "")
    def at(self, source: str) -> list[tuple[str, tuple[str, str]]]:
        """A file of the commit, or all that is in a folder of it."""
        own = self.file(source)
        return [(str(beneath(source, self.worktree)), own)] if own else self.beneath(source)
    def beneath(self, source: str) -> list[tuple[str, tuple[str, str]]]:
        relative = beneath(source, self.worktree)
        if relative is None: return []
        prefix = relative + "/" if relative else ""
        first = bisect.bisect_left(self.paths, prefix)
        return [(path, self.entries[path]) for path in itertools.takewhile(
            lambda path: path.startswith(prefix), itertools.islice(self.paths, first, None))]

def service_facts(model: Model, name: str, files: Files, values: Mapping[str, str]) -> list[Any]:
    """All that shapes the containers of a compose service; what a bound folder holds does not."""
    service, networks = compose_services(model)[name], part(model, "networks")
    shape = {key: value for key, value in service.items() if key not in NOT_SHAPING}
    shape["deploy"] = part(service, "deploy") | {"replicas": None}
    facts = [shape, [(bind.source, files.file(bind.source)) for bind in binds_of(model)
                     if bind.compose_service == name and bind.kind == "bind"]]
    for kind in ("configs", "secrets"):  # and their texts, wherever these come from
        entries = entries_used(service.get(kind), part(model, kind))
        facts.append({key: [entry, files.file(str(entry.get("file") or "")),
                            values.get(str(entry.get("environment") or ""))]
                      for key, entry in entries.items()})
    facts.append({key: networks.get(key) for key in networks_used(service)})
    facts.append({str(mount["source"]): part(model, "volumes", mount["source"]).get("name")
                  for mount in service.get("volumes") or () if isinstance(mount, dict)
                  and mount.get("type") == "volume" and mount.get("source")})
    context = str(part(service, "build").get("context") or "")
    return [*facts, [service.get("build"), files.beneath(context)]]
def digest_of(facts: Any, key: bytes) -> str:
    """Keyed: labels can be read by many, and some of the facts are secret."""
    text = json.dumps(facts, sort_keys=True).encode(errors="surrogatepass")
    return hmac.new(key, text, "sha256").hexdigest()[:32]
def input_digests(model: Model, files: Files, key: bytes) -> dict[str, str]:
    """Of all that is in the folders that each compose service binds. Raises Refused."""
    found, left = defaultdict[str, list[Any]](list), INPUTS
    binds = dict.fromkeys(replace(bind, target="") for bind in binds_of(model))
    for name, source in (*((b.compose_service, b.source) for b in binds if b.kind == "bind"), *(
            ("", part(service, "build").get("context")) for service in model["services"].values())):
        there = files.beneath(str(source or ""))
        if (left := left - len(there)) < 0:
            raise Refused(f"its builds and bind mounts have over {INPUTS} files, each counted")
        if name: found[name] += there
    return {name: digest_of(entries, key) for name, entries in found.items()}
def network_digests(project: str, model: Model) -> dict[str, str]:
    return {name: digest_of(network, b"")
            for name, network in named_things(project, model, "networks").values()}
def with_labels(model: Model, digests: Mapping[str, str], adopted: Mapping[str, str]) -> Model:
    """The model with the digest of each service; not where what was taken over is still right."""
    result = copied(model)
    for name, service in compose_services(result).items():
        if adopted.get(name) != digests[name]:
            service["labels"] = part(service, "labels") | {DIGEST_LABEL: digests[name]}
    return result
def with_network_labels(project: str, model: Model, there: Mapping[str, Json]) -> Model:
    """The model with the digest of each network, but for those that are there without one."""
    # compose's own hash of a network covers its labels: one more would make it anew.
    result, digests = copied(model), network_digests(project, model)
    for key, (name, network) in named_things(project, result, "networks").items():
        if name not in there or part(there[name], "Labels").get(DIGEST_LABEL):
            labels = part(network, "labels") | {DIGEST_LABEL: digests[name]}
            result["networks"][key] = network | {"labels": labels}
    return result
def why_changed(old: Model, new: Model, name: str) -> str:
    if name not in compose_services(old): return "it is not as the commit has it"
    before, after = ({key: value for key, value in part(model, "services", name).items()
                      if key not in NOT_SHAPING} for model in (old, new))
    for shape in (before, after): shape["labels"] = part(shape, "labels") | {DIGEST_LABEL: ""}
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    networks = [f"network {key}" for key in networks_used(after)
                if part(old, "networks").get(key) != part(new, "networks").get(key)]
    return f"{', '.join(keys or networks[:1] or ['a file, config or secret that it uses'])} changed"

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
        return Violation(**{name: redact(text.replace("$$", "$"), secrets)
                            for name, text in asdict(self).items()})
    def __str__(self) -> str:
        remedy = f"; an administrator permits it with allow = [{json.dumps(self.allow)}]"
        return (f"{printable(self.where)}: {printable(self.key)}: {printable(self.value)[:200]}: "
                f"{self.why}{remedy if self.allow else ''}")

def targets(service: Service) -> set[str]:
    return {target.rpartition(":")[0] for _, target in service.urls}

@dataclass(frozen=True)
class PolicyContext:
    """What the policy knows besides the model."""
    service: Service
    others: tuple[Service, ...]
    worktree: str
    data: str
    tree: Tree = field(default_factory=dict)
    ports: tuple[int, ...] = ()  # pgod's own
    closed: tuple[str, ...] = ()  # folders of pgod's, that no exception is offered for
    models: tuple[tuple[str, Model], ...] = ()  # what the others run, or ran last
    unset: Mapping[str, str] = field(default_factory=dict)  # path: variable of it that is not set
    @property
    def name(self) -> str:
        return self.service.name
    def permitted(self, start: str) -> list[str]:
        """What follows in the entries of `allow` that start so, as with `bind:`."""
        return [e.removeprefix(start) for e in self.service.allow if e.startswith(start)]
    def most(self, usual: float, start: str, measure: Callable[[Any], float]) -> float:
        """What is usual, or the most that such an entry permits."""
        return max([usual, *map(measure, self.permitted(start))])
    def shares(self, network: str) -> bool:
        """Whether others may be on a network of that name."""
        listed = any(network in other.networks for other in self.others)
        return bool(network) and (listed or not self.owns(network, "_"))
    def holds(self, path: str) -> bool:
        """Whether a path lies in the repository or in the service's folder of data."""
        return any(beneath(path, root) is not None for root in (self.worktree, self.data))
    def owns(self, text: str, *separators: str) -> bool:
        """Whether a name begins with ours and not with the longer one of a neighbour."""
        longer = [other.name for other in self.others if other.name.startswith(self.name)]
        return text.startswith(tuple(self.name + mark for mark in separators)) and (
            not text.startswith(tuple(name + mark for name in longer for mark in separators)))

Found = Iterator[Violation]
Check = Callable[[str, Any, "PolicyContext"], Found]

HOST = "is a power over the host"
MAX_REPLICAS = 20
MAX_CONTAINERS = 100  # of one project
# In one project. The engine's usual pool holds 31 networks; a published port is two processes.
MOST = {"volumes": 500, "configs": 500, "secrets": 500, "ports": 50, "networks": 8,
        "aliases": 1_000}
NOTHING: tuple[Any, ...] = (None, False, "", [], {})
def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
def exact(value: Any) -> str:
    """A value as an entry of `allow` names it: a digest, if it is long."""
    text = shown(value)
    plain = re.fullmatch(r"[\w.:/-]{1,40}", text)
    return text if plain else hashlib.sha256(text.encode()).hexdigest()[:16]
def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
def named(value: Any) -> list[Any]:
    return [*value] if isinstance(value, dict) else [str(item).split("=")[0] for item in value]

@dataclass(frozen=True)
class Rule:
    """One key of a compose service, or one kind of exception.

    `check` looks at it; without one, every part of the value is refused for `why` that does not
    match `harmless`. `allow` is the pattern of what an exception names; "" where it names
    nothing, None where there is none. `example` shows one.
    """
    key: str
    why: str = ""
    harmless: str = ""
    allow: str | None = ""
    example: str = ""
    parts: Callable[[Any], list[Any]] = listed
    name: Callable[[Any], str] = shown
    check: Check | None = None
    def violations(self, where: str, value: Any, context: PolicyContext) -> Found:
        if self.check:
            yield from self.check(where, value, context)
            return
        for item in self.parts(value) if self.why and value not in NOTHING else ():
            if item not in NOTHING and not re.fullmatch(self.harmless, shown(item)):
                entry = f"{self.key}:{self.name(item)}" if self.allow else self.key
                yield Violation(where, self.key, shown(item), self.why, entry)

def at_most(key: str, kind: str, usual: float, measure: Callable[[Any], float], why: str) -> Check:
    """What `measure` makes of the value is at most `usual`, or an exception of that kind."""
    def check(where: str, value: Any, context: PolicyContext) -> Found:
        if value is not None and measure(value) > context.most(usual, f"{kind}:", measure):
            yield Violation(where, key, str(value), why, f"{kind}:{value}")
    return check
def bytes_of(value: Any) -> float:
    """A size as compose renders it or a tmpfs option has it; 0 and unknown forms are no limit."""
    match = re.fullmatch(r"0*([1-9]\d{0,14})([kmgb]?)b?", str(value).strip().lower())
    return int(match[1]) << {"k": 10, "m": 20, "g": 30}.get(match[2], 0) if match else math.inf

GRACE = r"(\d+(\.\d+)?(h|ms?|s))+"
LEAST_INTERVAL = 0.2  # seconds between two health checks: each is a process, and events for all
LABEL_TEXT = 64 << 10  # that come with every event of a container
def seconds_of(value: Any) -> float:
    """A duration as compose renders it; unknown forms are too long."""
    return parse_duration(value) if re.fullmatch(GRACE, str(value)) else math.inf

check_replicas = at_most("replicas", "replicas", MAX_REPLICAS, int, f"is more than {MAX_REPLICAS}")
check_shm = at_most("shm_size", "size", MAX_BYTES, bytes_of, "is more memory than 1 GiB")
check_tmpfs_size = at_most("tmpfs", "size", MAX_BYTES, bytes_of, "is more memory than 1 GiB")
check_grace = at_most("stop_grace_period", "stop_grace_period", 120.0, seconds_of,
                      "is longer than 2 minutes")
LABELS = Rule("labels", "is compose's or pgod's own",
              r"(?i)(?!com\.docker\.compose\.|io\.pgod\.)[\s\S]*", ".+",
              "com.docker.compose.x", named)
def unknown_keys(where: str, prefix: str, value: Json | None, known: Iterable[str]) -> Found:
    for key, item in (value or {}).items():
        if key not in known and not key.startswith("x-") and item not in NOTHING:
            yield Violation(where, prefix + key, shown(item), "is not known to this pgod",
                            key if key in ALLOW else f"key:{key}")

# The keys that pgod knows in the mappings of a compose file.
KNOWN = {place: frozenset(keys.split()) for place, keys in {
    "deploy": "mode replicas labels update_config rollback_config resources restart_policy "
        "placement endpoint_mode",
    "build": "context dockerfile dockerfile_inline args labels target no_cache pull tags "
        "platforms network shm_size secrets ssh privileged entitlements additional_contexts "
        "cache_from cache_to extra_hosts isolation ulimits provenance sbom",
    "mount": "type source target read_only consistency bind volume tmpfs",
    "bind": "selinux propagation create_host_path recursive",
    "top": "name services networks volumes configs secrets version",
    "file": "name file content environment labels external",
    "network": "name driver driver_opts external internal attachable enable_ipv4 enable_ipv6 "
        "ipam labels",
    "attachment": "aliases driver_opts gw_priority interface_name ipv4_address ipv6_address "
        "link_local_ips mac_address priority",
    "volume": "name driver driver_opts external labels",
    "log": "max-size max-file max-buffer-size mode compress tag labels labels-regex env "
        "env-regex cache-disabled cache-max-size cache-max-file cache-compress",
}.items()}

# Rotating renames each file, and the buffer of each container is the engine's memory.
LOG_MOST = {"max-file": 100, "cache-max-file": 100, "max-buffer-size": 16 << 20}
def log_settings(value: Any) -> list[Any]:
    options = value.get("options") or {}
    return [value.get("driver"),
            *(f"{key}={exact(options[key])}" for key in sorted({*options} - KNOWN["log"])),
            *(f"{key}={options[key]}" for key, most in LOG_MOST.items()
              if key in options and bytes_of(options[key]) > most),
            *(text for text in options.values() if not PLAIN_TEMPLATE.fullmatch(str(text)))]
def check_container_name(where: str, value: Any, context: PolicyContext) -> Found:
    taken = any(value == other.name or str(value).startswith(other.name + "-")
                or value in targets(other) for other in context.others)
    own = context.owns(str(value), "-") or value in targets(context.service)
    if value and taken and not own:
        yield Violation(where, "container_name", str(value), "is a neighbour's name",
                        f"container_name:{value}")
def port_range(value: Any) -> tuple[int, int]:
    """First and last of `80` or `8000-8010`; (0, 0) where the engine chooses."""
    first, _, last = str(value or "0").partition("-")
    return int(first), int(last or first)
def check_ports(where: str, value: Any, context: PolicyContext) -> Found:
    permitted = [*map(port_range, context.permitted("ports:"))]
    refused = list[tuple[int, int, str]]()  # neighbouring ones are one range
    for item in value or ():
        published = item.get("published") if isinstance(item, dict) else item
        if not re.fullmatch(r"(\d{1,5}(-\d{1,5})?)?", str(published or "")):
            yield Violation(where, "ports", shown(published), "is not a port")
            continue
        first, last = port_range(published)
        if last and not any(low <= first and last <= high for low, high in permitted):
            own = any(first <= port <= last for port in context.ports)
            why = "is a port of pgod" if own else "is a port under 1024" if first < 1024 else ""
            refused += [(first, last, why)] * bool(why)
    for place, (first, last, why) in enumerate(ports := sorted({*refused})):
        if place + 1 < len(ports) and ports[place + 1][::2] == (last + 1, why):
            ports[place + 1] = (first, ports[place + 1][1], why)
            continue
        text = f"{first}-{last}" if last > first else f"{first}"
        yield Violation(where, "ports", text, why, f"ports:{text}")
# Not nr_blocks, which takes the limit of size away.
TMPFS_OPTION = (r"|r[ow]|(no)?(exec|suid|dev|atime|diratime|relatime)|strictatime|mode=[0-7]{1,4}|"
                r"[ug]id=\d{1,10}|nr_inodes=[1-9]\d{0,5}k?")
def check_tmpfs(where: str, value: Any, context: PolicyContext) -> Found:
    for item in listed(value or []):
        for option in str(item).partition(":")[2].split(","):
            if option.startswith("size=") and option.endswith("%"):
                yield Violation(where, "tmpfs", option, "is a share; write it like size=512m")
            elif option.startswith("size="):
                yield from check_tmpfs_size(where, option[5:], context)
            elif not re.fullmatch(TMPFS_OPTION, option):
                yield Violation(where, "tmpfs", option, "is no option of a tmpfs that is known")
def check_healthcheck(where: str, value: Any, context: PolicyContext) -> Found:
    for key in ("interval", "start_interval"):
        text = str((value or {}).get(key) or "0s")
        if seconds_of(text) == math.inf or 0 < seconds_of(text) < LEAST_INTERVAL:
            yield Violation(where, f"healthcheck.{key}", text, f"is under {LEAST_INTERVAL} s",
                            f"healthcheck:{text}")
def check_deploy(where: str, value: Any, context: PolicyContext) -> Found:
    value = value or {}
    yield from unknown_keys(where, "deploy.", value, KNOWN["deploy"])
    yield from check_replicas(where, value.get("replicas"), context)
    yield from LABELS.violations(where, value.get("labels"), context)
    for item in part(value, "resources", "reservations").get("devices") or ():
        yield Violation(where, "deploy.devices", shown(item), "is a device of the host", "gpus")
def check_hooks(where: str, value: Any, context: PolicyContext) -> Found:
    for item in (item for item in value or () if item.get("privileged")):
        yield Violation(where, "privileged", shown(item), "is root on the host", "privileged")
def link_above(relative: str, tree: Tree) -> str:
    """Why the commit makes a path unsafe: a symlink or submodule at it or above it."""
    if len(relative) > PATH_LENGTH: return f"has over {PATH_LENGTH} characters"
    for at in (*folders_of(relative), relative):
        if kind := LINK_MODES.get(tree.get(at, ("", ""))[0]): return f"leads through {kind} ({at})"
    return ""
def outside_commit(path: str, context: PolicyContext) -> str:
    """Why a path is not a plain one of the commit, or nothing. compose doubles $ in a model."""
    if "$" in path: return "must be written without $"
    relative = beneath(path, context.worktree)
    return "lies outside the repository" if relative is None else link_above(relative, context.tree)

USUAL_FRONTEND = re.compile(r"docker/dockerfile(-upstream)?([:@].*)?")
CACHES = (r"[^=,\"\s]+|type=(registry|gha|inline)(,(ref|mode|scope|compression|oci-mediatypes|"
          r"image-manifest|ignore-error)=[^=,\"\s]+)*")
def check_build_paths(where: str, build: Json, context: PolicyContext) -> Found:
    """Everything that the build reads lies in the commit, by no link."""
    folder = str(build.get("context", ""))
    if re.match(r"[a-z+]+://|git@|github\.com/", folder):
        yield Violation(where, "build.context", folder, "is an address; pgod builds from the "
                        "repository alone: put the sources into it")
        return
    paths = [("context", folder)]
    if not build.get("dockerfile_inline"):
        dockerfile = str(build.get("dockerfile", "Dockerfile"))
        if not os.path.isabs(dockerfile):  # compose joins it to the context word by word
            dockerfile = os.path.normpath(os.path.join(folder, dockerfile))
        paths.append(("dockerfile", dockerfile))
    paths += [("additional_contexts", source)
              for source in map(str, part(build, "additional_contexts").values())
              if not source.startswith(("service:", "docker-image://"))]
    for key, path in paths:
        if why := outside_commit(path, context):
            yield Violation(where, f"build.{key}", path, why)
    for key in ("cache_from", "cache_to"):
        for item in build.get(key) or ():
            if not re.fullmatch(CACHES, str(item)):
                yield Violation(where, f"build.{key}", str(item), "uses files of the host")
def repository_of(name: str) -> str:
    name = name.partition("@")[0]
    head, mark, tag = name.rpartition(":")
    return head if mark and "/" not in tag else name
def tagged(name: str) -> str:
    return name if re.search("[:@]", name.rpartition("/")[2]) else f"{name}:latest"
def check_built_image(where: str, image: str, context: PolicyContext) -> Found:
    repository = repository_of(image)
    users = [name for name, model in context.models for key, service in
             compose_services(model).items() if image_of(name, key, service) == image]
    if {f"image:{image}", f"image:{repository}"} & {*context.service.allow}: return
    if not context.owns(image, "-", "/") or USUAL_FRONTEND.fullmatch(image):
        yield Violation(where, "image", image, "is built here and may be what others use; "
                        f"call it {context.name}-… or {context.name}/…", f"image:{repository}")
    elif users and not context.owns(image, "-"):
        yield Violation(where, "image", image, f"is built here, and {users[0]} runs an image of "
                        f"that name; call it {context.name}-…", f"image:{image}")

# As BuildKit finds it: # syntax=, // syntax= or JSON, at the start; or a whole file of JSON.
FRONTEND = re.compile(r'^[^\S\n]*(?:#|//|")[^\S\n]*syntax"?[^\S\n]*[=:][^\S\n]*"?([^\s"]*)|\A\s*\{',
                      re.IGNORECASE | re.MULTILINE)
FRONTEND_WHY = "is a program that may read what the builds of others keep"
def check_frontend(where: str, dockerfile: str) -> Found:
    """What reads the Dockerfile is docker's own: another one need not separate the caches."""
    if len(dockerfile) > MODEL_TEXT:
        yield Violation(where, "dockerfile", "", f"has over {MODEL_TEXT >> 10} KiB")
        return
    for match in FRONTEND.finditer(re.sub(r"\A\ufeff*(#!.*)?\s*\ufeff*", "", dockerfile)):
        if not USUAL_FRONTEND.fullmatch(match[1] or ""):
            yield Violation(where, "syntax", match[0].strip(), FRONTEND_WHY, "build:syntax")
def check_build(where: str, value: Any, context: PolicyContext) -> Found:
    build = value if isinstance(value, dict) else {"context": value}
    yield from unknown_keys(where, "build.", build, KNOWN["build"])
    for key in ("privileged", "entitlements", "ssh"):
        if build.get(key):
            yield Violation(where, f"build.{key}", shown(build[key]), HOST, f"build:{key}")
    if build.get("network") not in (None, "", "none", "default"):
        yield Violation(where, "build.network", shown(build["network"]),
                        "is a network that is not its own", f"build:network:{build['network']}")
    if "BUILDKIT_SYNTAX" in named(build.get("args") or ()):
        yield Violation(where, "build.args", "BUILDKIT_SYNTAX", FRONTEND_WHY, "build:syntax")
    for name in named(build.get("additional_contexts") or ()):
        if "docker/dockerfile" in name.lower():  # one of that name is the frontend
            yield Violation(where, "build.additional_contexts", name, FRONTEND_WHY, "build:syntax")
    yield from LABELS.violations(f"{where}.build", build.get("labels"), context)
    for tag in build.get("tags") or (): yield from check_built_image(where, str(tag), context)
    yield from check_shm(where, build.get("shm_size"), context)
    yield from SERVICE_RULES["ulimits"].violations(where, build.get("ulimits"), context)
    yield from check_build_paths(where, build, context)
def check_mounts(where: str, value: Any, context: PolicyContext) -> Found:
    """What a mount is; the paths of bind mounts are looked at all together below."""
    for item in value or ():
        kind = item.get("type") if isinstance(item, dict) else shown(item)
        if kind not in ("bind", "volume", "tmpfs"):
            yield Violation(where, "volumes", shown(item), f"{kind} mounts are not known")
            continue
        bind = part(item, "bind")
        if bind.get("selinux") and kind == "bind" and not context.holds(str(item.get("source"))):
            yield Violation(where, "volumes", shown(item), "relabels files of the host")
        if bind.get("propagation") not in (None, "", "private", "rprivate"):
            yield Violation(where, "volumes", shown(item), "propagates mounts to the host")
        if bind.get("recursive") not in (None, "", "enabled", "disabled", "readonly"):
            yield Violation(where, "volumes", shown(item), "leaves what is mounted in it writable")
        yield from unknown_keys(where, "volumes.", item, KNOWN["mount"])
        yield from unknown_keys(where, "volumes.bind.", bind, KNOWN["bind"])
        yield from check_tmpfs_size(where, (item.get("tmpfs") or {}).get("size"), context)
def check_image(where: str, value: Any, context: PolicyContext) -> Found:
    if str(value).startswith("pgod.invalid/"):
        yield Violation(where, "image", str(value), "is a name that pgod keeps images by")

# Of those that every container has, what Kubernetes' baseline lets one ask for by name.
USUAL_CAPABILITIES = ("(?i)(cap_)?(audit_write|chown|dac_override|fowner|fsetid|kill|mknod|"
                      "net_bind_service|net_raw|setfcap|setgid|setpcap|setuid|sys_chroot)")
PLAIN_KEYS = (
    "attach cap_drop command configs cpu_count cpu_percent cpu_period cpu_quota cpu_shares cpus "
    "cpuset depends_on develop dns dns_opt dns_search domainname entrypoint environment expose "
    "extra_hosts hostname init links mac_address mem_limit mem_reservation mem_swappiness "
    "memswap_limit networks pids_limit platform profiles pull_policy pull_refresh_after read_only "
    "restart secrets stdin_open stop_signal tty user working_dir").split()

# Every key of a compose service that pgod knows. One that is not here is refused by name.
SERVICE_RULES: dict[str, Rule] = {rule.key: rule for rule in (
    *(Rule(key, allow=None) for key in PLAIN_KEYS),
    Rule("annotations", "speaks to the runtime"),
    Rule("blkio_config", "takes the host's disks"),
    Rule("build", allow="network:.+|privileged|entitlements|ssh|address|syntax", example="address",
         check=check_build),
    Rule("cap_add", HOST, USUAL_CAPABILITIES, "[A-Z_]+", "NET_ADMIN",
         name=lambda item: str(item).upper().removeprefix("CAP_")),
    Rule("cgroup", HOST, "private", "[a-z]+", "host"),
    Rule("cgroup_parent", "leaves the engine's limits", "", ".+", "/apps"),
    Rule("container_name", allow=".+", example="x", check=check_container_name),
    *(Rule(key, "starves the host") for key in ("cpu_rt_period", "cpu_rt_runtime")),
    *(Rule(key, HOST) for key in ("credential_spec", "storage_opt")),
    Rule("deploy", allow=None, check=check_deploy),
    Rule("device_cgroup_rules", HOST, "", ".+", "c 1:3 mr"),
    Rule("devices", "is a device of the host", "", ".+", "/dev/ttyUSB0", name=lambda item:
         str(item.get("source") if isinstance(item, dict) else item).split(":")[0]),
    Rule("external_links", "is another's container", "", ".+", "db"),
    Rule("gpus", "is a device of the host"),
    Rule("group_add", "may be a group of the host", r"\d+", ".+", "video"),
    Rule("healthcheck", allow=GRACE, example="500ms", check=check_healthcheck),
    Rule("image", allow=".+", example="shared/app", check=check_image),
    Rule("ipc", "is another's memory", "private|shareable|none|service:.*", ".+", "host"),
    Rule("isolation", HOST, "default", ".+", "process"),
    LABELS,
    Rule("logging", "is no log that the engine keeps; use json-file or local, with max-file to 100 "
         "and max-buffer-size to 16m", "json-file|local|none", ".+", "syslog", log_settings),
    *(Rule(key, "runs a program of the host") for key in ("models", "provider")),
    Rule("network_mode", "is a network that is not its own", "none|bridge|default|service:.*",
         ".+", "host"),
    Rule("oom_kill_disable", "may hang the host"),
    Rule("oom_score_adj", "puts others to death first", r"\d+", r"-\d+", "-500"),
    Rule("pid", "sees the host's processes", "service:.*", ".+", "host"),
    Rule("ports", allow=r"\d+(-\d+)?", example="80", check=check_ports),
    *(Rule(key, allow=None, check=check_hooks) for key in ("post_start", "pre_start", "pre_stop")),
    Rule("privileged", "is root on the host"),
    Rule("runtime", "is another isolation than the engine's", "runc", ".+", "runsc"),
    Rule("scale", allow=None, check=check_replicas),
    Rule("security_opt", "takes a protection away", "no-new-privileges([:=]true)?", ".+",
         "seccomp:unconfined"),
    Rule("shm_size", allow=None, check=check_shm),
    Rule("stop_grace_period", allow=GRACE, example="10m", check=check_grace),
    # With proxy_arp and the like, a container's kernel takes the traffic of its neighbours.
    Rule("sysctls", "is a setting of the host's kernel, or of the network of others",
         r"net\.(core\.somaxconn|unix\.max_dgram_qlen|ipv4\.(tcp|udp|ping|ip_[udl])\w+|"
         r"ipv6\.conf\.\w+\.disable_ipv6)|kernel\.(shm\w+|msg\w+|sem)|fs\.mqueue\..*", ".+",
         "vm.swappiness", named),
    Rule("tmpfs", allow=None, check=check_tmpfs),
    Rule("ulimits", "starves the host", "nofile|nproc|core|memlock|stack|fsize|cpu|data|as",
         "[a-z]+", "rtprio", named),
    Rule("use_api_socket", "is the engine's socket"),
    *(Rule(key, HOST, "", ".+", "host") for key in ("userns_mode", "uts")),
    Rule("volumes", allow=None, check=check_mounts),
    Rule("volumes_from", "may be another's container", "(?!container:).*", ".+", "container:db"),
)}
# What `allow` takes: exceptions of these rules, and kinds that are no key of a compose service.
ALLOW: dict[str, Rule] = {rule.key: rule for rule in (
    *(rule for rule in SERVICE_RULES.values() if rule.allow is not None),
    Rule("beside", allow=".+", example="old"),
    Rule("bind", allow=r"/[^:]*(:ro)?", example="/srv/media:ro"),
    Rule("key", allow="[a-z_]+", example="new_key"),
    Rule("most", allow=rf"({'|'.join(MOST)})=\d+", example="ports=100"),
    Rule("network", allow=".+", example="macvlan_driver"),
    Rule("replicas", allow=r"\d+", example="50"),
    Rule("size", allow=r"\d+[kmg]?", example="4g"),
    Rule("volume", allow=".+", example="shared_data"),
)}
def permits(entry: str) -> bool:
    kind, _, text = entry.partition(":")
    return kind in ALLOW and re.fullmatch(ALLOW[kind].allow or "", text) is not None
HARMLESS_OPTIONS = {f"com.docker.network.{key}" for key in ("driver.mtu", "bridge.enable_icc")}
ENGINE_NETWORKS = ("host", "bridge", "none", "default", "ingress")
def check_compose_service(where: str, service: Json, context: PolicyContext) -> Found:
    """The table's rules on one compose service, and what needs two of its keys."""
    yield from unknown_keys(where, "", service, SERVICE_RULES)
    for key in filter(SERVICE_RULES.__contains__, service):
        yield from SERVICE_RULES[key].violations(where, service[key], context)
    if service.get("build"):
        yield from check_built_image(where, image_of(context.name, where, service), context)
    for labels in (part(service, "labels"), part(service, "build", "labels")):
        if sum(len(f"{pair}") for pair in labels.items()) > LABEL_TEXT:
            yield Violation(where, "labels", "", f"are over {LABEL_TEXT >> 10} KiB in all")
    made_up = f"{context.name}-{where}"
    if not service.get("container_name") and not context.owns(made_up, "-"):
        yield Violation(where, "container_name", f"{made_up}-1", "is a neighbour's name")
def check_networks(model: Model, context: PolicyContext) -> Found:
    """Networks are the project's own bridges, or external ones that are permitted."""
    permitted = context.service.networks
    for key, (name, network) in all_named(context.name, model, "networks").items():
        def refuse(value: Any, why: str, entry: str, key: str = key) -> Violation:
            return Violation("networks", key, shown(value), why, f"network:{entry}")
        yield from unknown_keys("networks", f"{key}.", network, KNOWN["network"])
        yield from LABELS.violations(f"networks.{key}", network.get("labels"), context)
        if network.get("external"):
            if permitted and name not in permitted:
                yield refuse(name, "is an external network that is not among "
                             f"networks = {json.dumps(permitted)}", name)
            elif not permitted and (name in ENGINE_NETWORKS or (not context.owns(name, "_") and any(
                    name.startswith(f"{other.name}_") for other in context.others))):
                yield refuse(name, "is the engine's own, or another service's", name)
            continue
        if not context.owns(name, "_"):
            yield refuse(name, f"must be called {context.name}_…; leave name: out", f"own={name}")
        driver, options, ipam = (network.get(k) for k in ("driver", "driver_opts", "ipam"))
        if driver not in (None, "", "bridge", "default"):
            yield refuse(driver, "is not driver bridge", f"{key}_driver={exact(driver)}")
        if {*(options or ())} - HARMLESS_OPTIONS:
            yield refuse(options, "reaches into the host's network",
                         f"{key}_driver_opts={exact(options)}")
        if ipam and ({"config", "options"} & {k for k, item in ipam.items() if item}
                     or ipam.get("driver") not in (None, "", "default")):
            yield refuse(ipam, "takes addresses that may be another's; leave ipam out",
                         f"{key}_ipam={exact(ipam)}")

def check_attachments(model: Model, context: PolicyContext) -> Found:
    """On an external network nobody may answer to a neighbour's name or take an address."""
    shared = shared_networks(model, context.shares)
    for where in sorted(among_others(model, context.shares)):
        service = compose_services(model)[where]
        if "NET_RAW" in capabilities(service):
            yield Violation(where, "cap_add", "NET_RAW", "could take the traffic of neighbours on "
                            "a network that they are on as well", "cap_add:NET_RAW")
        if service.get("network_mode") and (fixed := service.get("mac_address")):
            yield Violation(where, "mac_address", str(fixed), "may be a neighbour's",
                            f"network:{where}_mac_address={exact(fixed)}")
    def names(service: Service) -> set[str]:
        hosts = (host.rpartition("/")[2] for host, _ in service.urls)
        return {name.lower() for name in (service.name, *targets(service), *hosts)}
    mine = names(context.service)
    taken = {name for other in context.others for name in names(other)} - mine
    for (where, service), key in ((item, key) for item in compose_services(model).items()
                                  for key in networks_used(item[1])):
        attachment, place = part(part(service, "networks"), key), f"networks.{key}"
        yield from unknown_keys(where, f"{place}.", attachment, KNOWN["attachment"])
        if attachment.get("driver_opts"):
            yield Violation(where, place, "driver_opts", "reaches into the host's network")
        if key not in shared: continue
        for name in sorted(names_of(where, service, key)):
            why = "is a neighbour's name" if plain(name) in taken else (
                "would hide a host of that name from neighbours" if "." in plain(name) else "")
            if why and plain(name) not in mine:
                yield Violation(where, place, name, f"{why} on a network that is shared",
                                f"network:{key}_name_{name}")
        attachment = {"mac_address": service.get("mac_address"), **attachment}
        for fixed in ("ipv4_address", "ipv6_address", "link_local_ips", "mac_address"):
            if attachment.get(fixed):
                yield Violation(where, f"{place}.{fixed}", shown(attachment[fixed]),
                                "is a fixed address on a network that is shared",
                                f"network:{key}_{fixed}={exact(attachment[fixed])}")
def name_clashes(model: Model, context: PolicyContext) -> Iterator[tuple[str, str, str, bool]]:
    """Network, name and neighbour, where both answer to it; whether one of them knows it inside."""
    # The engine asks all networks of a container for a name, in an order that nobody chooses.
    networks = all_named(context.name, model, "networks")
    for name, key in {name: key for key, (name, _) in networks.items()}.items():
        there = [(other, *names_on(other, theirs, name)) for other, theirs in context.models]
        mine, inside = names_on(context.name, model, name) if any(
            their or within for _, their, within in there) else (set[str](), set[str]())
        for other, their, within in there:
            for clash in sorted(mine & within | inside & their | mine & their):
                yield key, clash, other, clash in mine & within | inside & their
def check_inner_names(model: Model, context: PolicyContext) -> Found:
    """What one project looks up inside, no other one answers on a network that both are on."""
    for key, name, other, inner in name_clashes(model, context):
        if inner:
            yield Violation("networks", key, name, f"{other} answers to it on this network as "
                            "well, and one of the two looks it up inside; rename yours",
                            f"network:{key}_name_{name}")
def check_volumes(model: Model, context: PolicyContext) -> Found:
    for key, (name, volume) in all_named(context.name, model, "volumes").items():
        yield from unknown_keys("volumes", f"{key}.", volume, KNOWN["volume"])
        yield from LABELS.violations(f"volumes.{key}", volume.get("labels"), context)
        if volume.get("external") or not context.owns(name, "_"):
            yield Violation("volumes", key, name, "must be the project's own; leave "
                            f"external: and name: out, then it is called {context.name}_{key}",
                            f"volume:{name}")
        options = {key: text for key, text in (volume.get("driver_opts") or {}).items() if text}
        bound = {*options} == {"type", "o", "device"} and {*options["o"].split(",")} <= {
            "bind", "rw", "ro"} and context.holds(device_of(volume))
        if (volume.get("driver") or "local") != "local" or (options and not bound):
            driver = {key: volume[key] for key in ("driver", "driver_opts") if volume.get(key)}
            yield Violation("volumes", key, shown(driver), "has a driver or driver_opts",
                            f"volume:{key}_driver={exact(driver)}")
def check_size(model: Model, context: PolicyContext) -> Found:
    count = sum(max(1, replicas) for replicas in expected_replicas(model).values())
    if count > context.most(MAX_CONTAINERS, "replicas:", int):
        yield Violation("services", "replicas", str(count), f"is more than {MAX_CONTAINERS} "
                        "containers in all", f"replicas:{count}")
    services = compose_services(model).values()
    attached = [item or {} for service in services for item in part(service, "networks").values()]
    def number(key: str, entries: Iterable[Json]) -> int:
        return sum(len(entry.get(key) or ()) for entry in entries)
    counts = {key: number(key, services) for key in ("volumes", "configs", "secrets", "ports")}
    counts["networks"] = number("networks", [model])
    counts["aliases"] = number("aliases", attached) + number("links", services)
    for key, most in MOST.items():
        if counts[key] > context.most(most, f"most:{key}=", int):
            yield Violation("services", key, str(counts[key]), f"is more than {most} in all",
                            f"most:{key}={counts[key]}")
def check_top_level(model: Model, context: PolicyContext) -> Found:
    yield from unknown_keys("the compose file", "", model, KNOWN["top"])
    for kind in ("configs", "secrets"):
        for name, entry in (model.get(kind) or {}).items():
            yield from unknown_keys(kind, f"{name}.", entry, KNOWN["file"])
            if (entry or {}).get("external"):
                yield Violation(kind, name, "external", "is only in a swarm; use file: or "
                                "environment: instead")

# Read-only, these tell a container nothing but the time: very many compose files have them.
CLOCK_BINDS = (("/etc/localtime", True), ("/etc/timezone", True))
SYSTEM_FOLDERS = "/bin /boot /dev /etc /lib /proc /root /run /sbin /sys /usr /var/lib".split()
def unset_paths(text: str, warnings: Iterable[str]) -> dict[str, str]:
    """The paths in a compose file that lack a variable which compose warns of, and that one."""
    found = {}
    for name in re.findall(r'The "(\w+)" variable is not set', "\n".join(warnings)):
        marked = re.sub(rf"\$(\{{{name}\}}|{name}\b)", "\0", text)
        for word in re.split(r"""[\s"',\[\]{}]+""", marked):
            if "\0" in word:
                found[os.path.normpath(word.replace("\0", "").partition(":")[0])] = name
    return found
def outside(source: str, context: PolicyContext) -> tuple[str, bool]:
    """What is wrong with a path outside of the repository; whether an exception is offered."""
    if context.holds(source): return "", False
    if name := context.unset.get(source):
        return f"is what is left of it, for {name} is not set", False
    if beneath(source, "/nonexistent") is not None:
        return f"is in the home of nobody; write ./… or {context.data}/…", False
    if (source, True) in CLOCK_BINDS: return "must be mounted read-only: write :ro behind it", True
    for folder, what in zip(context.closed, ("leads out of the repository", "is another service's"),
                            strict=False):
        if beneath(source, folder) is not None: return what, False
    whole = any(beneath(folder, source.rstrip("/")) is not None
                for folder in (*context.closed, *SYSTEM_FOLDERS))
    return f"lies neither in the repository nor in {context.data}", not whole
def written(source: str, context: PolicyContext) -> str:
    """A path as the compose file may have it, where it leads from the export to pgod's own."""
    own = next((folder for folder in context.closed[:1] if beneath(source, folder) is not None), "")
    return os.path.relpath(source, f"{own}/.pgod/{context.name}/export") if own and (
        not context.holds(source)) else source
def bind_trouble(bind: Bind, context: PolicyContext) -> tuple[str, bool]:
    """Why a path may not be bound, or nothing; whether an exception is offered."""
    source, relative = bind.source, beneath(bind.source, context.worktree)
    if os.path.normpath(source) != (source.rstrip("/") or "/") or "$" in source:
        return "must be written without . and .. and $", False
    if relative is None: return outside(source, context)
    if link := link_above(relative, context.tree): return link, False
    if relative.split("/")[0] in ("ssh", ".git"):
        return "holds what decides who may steer the service", False
    writes = relative == "" and not bind.read_only
    return "do not mount ./ itself writable, but read-only" if writes else "", False
def bind_allowed(bind: Bind, context: PolicyContext) -> bool:
    """Whether `allow` has the path or one above it, and as much as is asked for."""
    entries = (text.partition(":") for text in context.permitted("bind:"))
    return any((path == "/" or beneath(bind.source, path.rstrip("/")) is not None)
               and (mode != "ro" or bind.read_only) for path, _, mode in entries)
def nested_binds(binds: Iterable[Bind], writers: Sequence[Bind]) -> Iterator[tuple[Bind, Bind]]:
    """Each bind that lies beneath one that a container can write, and that one."""
    writable = {above.source.rstrip("/"): above for above in writers if not above.read_only}
    for bind in binds:
        path = bind.source.rstrip("/")
        while path:
            path = path.rpartition("/")[0]
            if path in writable: yield bind, writable[path]
def check_binds(model: Model, context: PolicyContext) -> Found:
    """Where bind mounts, configs and secrets may come from."""
    binds = binds_of(model)
    for bind in binds:
        judged = bind.volume and not context.holds(bind.source)
        clock = (bind.source, bind.read_only) in CLOCK_BINDS
        why, offered = bind_trouble(bind, context)
        if why and not (judged or clock or bind_allowed(bind, context)):
            entry = f"bind:{bind.source}{':ro' if bind.read_only else ''}" if offered else ""
            yield Violation(bind.compose_service, bind.kind, written(bind.source, context), why,
                            entry)
    # No source beneath one that a container can write: it could put a link to /etc there. Also
    # where `allow` has the upper one: only an entry for the very path is the administrator's word
    # that he knows.
    for bind, above in nested_binds(binds, binds):
        if not {bind.source, f"{bind.source}:ro"} & {*context.permitted("bind:")}:
            yield Violation(bind.compose_service, bind.kind, bind.source,
                            f"lies beneath {above.source}, which a container can write; bind "
                            "it from elsewhere, or that one read-only")
def check_build_secrets(model: Model, context: PolicyContext) -> Found:
    """A build reads them with the docker group, and before containers are looked at again."""
    for where, service in compose_services(model).items():
        for file in files_used(part(service, "build").get("secrets"), part(model, "secrets")):
            if why := outside_commit(file, context):
                yield Violation(where, "build.secrets", file, why)

TOO_LARGE = (f"is over {MODEL_DEPTH} deep, or has over {MODEL_ENTRIES} entries, "
             f"{MODEL_TEXT >> 10} KiB of text, names of {MODEL_KEY} or paths of {2 * PATH_LENGTH} "
             "characters")
NAMES_AND_PATHS = frozenset((
    "aliases", "container_name", "context", "device", "dockerfile", "domainname", "file",
    "hostname", "image", "links", "name", "network_mode", "path", "source", "target", "tmpfs"))
FREE_TEXT = frozenset(("annotations", "args", "environment", "labels"))  # and what is beneath x-…
def check_budget(model: Model) -> Found:
    """A model that is so large that looking at it takes long is not looked at."""
    left: list[tuple[Any, str, int]] = [(model, "the compose file", 1)]
    while left:
        value, key, depth = left.pop()
        short = key in NAMES_AND_PATHS
        large = isinstance(value, str) and (
            len(value) > (2 * PATH_LENGTH if short else MODEL_TEXT)
            or (short and value.count("/") > 2 * PATH_DEPTH))
        if isinstance(value, dict | list): large = depth > MODEL_DEPTH or len(value) > MODEL_ENTRIES
        if large or (isinstance(value, dict) and any(len(name) > MODEL_KEY for name in value)):
            yield Violation(key, "size", str(len(value)), TOO_LARGE)
        elif isinstance(value, dict):
            free = key in FREE_TEXT or key.startswith("x-")
            left += [(item, "x-" if free else name, depth + 1) for name, item in value.items()]
        elif isinstance(value, list): left += [(item, key, depth + 1) for item in value]
MODEL_CHECKS = (check_top_level, check_networks, check_attachments, check_inner_names,
                check_volumes, check_binds, check_build_secrets)
def check_policy(model: Model, context: PolicyContext) -> list[Violation]:
    """Every violation of a model whose paths are those of the work tree. Pure."""
    # One that is too large is not read any further: it may be made to take minutes.
    found = [*itertools.islice(check_budget(model), VIOLATIONS)] or [*check_size(model, context)]
    if found: return found
    for where, service in compose_services(model).items():
        found += check_compose_service(where, service or {}, context)
    for check in MODEL_CHECKS: found += check(model, context)
    offered = (v if permits(v.allow) else replace(v, allow="") for v in dict.fromkeys(found))
    left = [violation for violation in offered if violation.allow not in context.service.allow]
    more = Violation("the compose file", "violations", str(len(left)), "are too many to tell all")
    return left[:VIOLATIONS] + [more] * (len(left) > VIOLATIONS)

# ---- Configuration -----------------------------------------------------------------------------
HOST_WORD = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
HOST_PATTERN = re.compile(rf"(?i)(https?://)?(\*\.)?{HOST_WORD}(\.{HOST_WORD})*(:\d{{1,5}})?")
TARGET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:[1-9]\d{0,4}")
def as_string(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a string that is not empty")
    return value
def as_strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of strings")
    return tuple(value)
def every(parse: Callable[[Any], Any], items: Iterable[Any], entry: str = "") -> tuple[Any, ...]:
    """All of them, parsed. Raises ValueError, a line for each that is wrong; `entry` numbers it."""
    found, wrong = [], []
    for number, item in enumerate(items, 1):
        try:
            found.append(parse(item))
        except ValueError as error:
            wrong.append(f"{entry} {number} {error}" if entry else str(error))
    if wrong: raise ValueError("\n".join(wrong))
    return tuple(found)
def matching(pattern: str, why: str) -> Callable[[object], str]:
    """A parser of strings; `why` ends the sentence about one that the pattern does not match."""
    def parse(value: object) -> str:
        if not re.fullmatch(pattern, as_string(value)): raise ValueError(f"{value!r} {why}")
        return as_string(value)
    return parse

as_file_in_repository = matching(r"(?!(.*/)?(\.|\.\.|\.git)?(/|$)|ssh/)[^\n]+",
                                 "must be a path inside the repository, not in ssh/, without ..")
as_mount = matching(r"nfs://[A-Za-z0-9][A-Za-z0-9.:-]*/[^\s,]*",
                    "is not of the form nfs://server/path")
as_network = matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "is not a name of a network")
as_name: Callable[[object], str] = matching(
    NAME_PATTERN.pattern, "is not a name; use a-z 0-9 _ - (60 at most), a letter or digit first")
# What `git check-ref-format --branch` takes.
as_branch = matching(r"(?!refs/)(?!.*(\.\.|@\{|//|/\.|\.lock(/|$)|[/.]$))"
                     r"[^-/.\x00-\x20~^:?*\[\\\x7f][^\x00-\x20~^:?*\[\\\x7f]*",
                     "is not the name of a branch; write it like main")
def as_variable(text: str) -> tuple[str, str]:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", text, re.DOTALL):
        raise ValueError("is not of the form NAME=VALUE")
    return text.partition("=")[::2]
def as_url(item: tuple[str, object]) -> tuple[str, str]:
    """Host and target; neither can hold what would be a directive of Caddy."""
    host, target = item
    if not HOST_PATTERN.fullmatch(host):
        raise ValueError(f"{host!r} is not a host name; write it like example.org")
    if (not isinstance(target, str) or not TARGET_PATTERN.fullmatch(target)
            or int(target.rpartition(":")[2]) > 65535):
        raise ValueError(f"{target!r} is not a target; write it like pgo:5006")
    return host, target
def as_urls(value: object) -> tuple[tuple[str, str], ...]:
    if isinstance(value, dict): return every(as_url, sorted(value.items()))
    raise ValueError('must be a table like { "example.org" = "pgo:5006" }')
def as_outside_file(value: object) -> str:
    """An absolute path of a file that nobody else can change or lead elsewhere."""
    path = Path(as_string(value))
    if not path.is_absolute(): raise ValueError(f"{value!r} must be an absolute path")
    try:
        with open_beneath(Path("/"), str(path)[1:]) as file:
            others = os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except (OSError, Refused) as error:
        why = error.strerror if isinstance(error, OSError) else "a link is in it, or it is no file"
        raise ValueError(f"{value!r} cannot be read: {why}") from None
    if others: raise ValueError(f"{value!r} can be written by others: chmod go-w {path}")
    return str(path)
def as_deploy_key(value: object) -> str:
    path = as_outside_file(value)
    if trouble := private_key_trouble(read_beneath(Path("/"), path[1:], OUTSIDE_BYTES)):
        raise ValueError(f"{path!r} {trouble}")
    return path
def as_secret(value: object) -> str:
    if len(as_string(value)) < 16:
        raise ValueError("must have at least 16 characters; make one with: openssl rand -hex 20")
    return as_string(value)
def as_bool(value: object) -> bool:
    if not isinstance(value, bool): raise ValueError("must be true or false")
    return value
def as_known_user(value: object) -> str:
    try:
        return pwd.getpwnam(as_string(value)).pw_name
    except KeyError:
        raise ValueError(f"{value!r} does not exist; useradd --system {value} makes it") from None
def as_exception(entry: str) -> str:
    """One that the policy's table has, with a value where it takes one."""
    kind = entry.partition(":")[0]
    if kind not in ALLOW:
        raise ValueError(f"{entry!r} permits nothing{nearest(kind, ALLOW)}; "
                         f"known are {', '.join(sorted(ALLOW))}")
    if not permits(entry):
        example = ":".join(filter(None, (kind, ALLOW[kind].example)))
        raise ValueError(f"{entry!r} permits nothing; write it like {example!r}")
    return entry
def as_tables(value: object) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(table, dict) for table in value): return value
    raise ValueError("must be written as [[services]]")
def as_admins(value: object) -> tuple[PublicKey, ...]:
    path = as_outside_file(value)
    keys, wrong = parse_key_file(read_beneath(Path("/"), path[1:], KEY_FILE_BYTES + 1), "admin")
    wrong += ["belongs to somebody else than root"] * (os.stat(path).st_uid != os.geteuid())
    if wrong: raise ValueError("\n".join(f"{path}: {why}" for why in wrong))
    return tuple(keys)
def as_env_file(value: object) -> tuple[tuple[str, str], ...]:
    path = as_outside_file(value)
    try:
        return parse_env_lines(text_of(read_beneath(Path("/"), path[1:], OUTSIDE_BYTES)))
    except (ValueError, OSError, Refused) as error:
        raise ValueError(f"{path}: {error}") from None

# The keys of pgo.toml beside its services, and their parsers.
TOP_KEYS: dict[str, Callable[[Any], Any]] = {"services": as_tables, "admins": as_admins}
# The keys of a [[services]] entry and their parsers. What needs two keys is done below.
SERVICE_KEYS: dict[str, Callable[[Any], Any]] = {
    "name": as_name, "user": as_known_user, "branch": as_branch,
    "repository": lambda value: parse_remote(as_string(value)),
    "compose": lambda value: every(
        as_file_in_repository, [value] if isinstance(value, str) else as_strings(value)),
    "registries": lambda value: every(parse_registry, as_strings(value), "entry"),
    "env": lambda value: every(as_variable, as_strings(value), "entry"), "env_file": as_env_file,
    "urls": as_urls, "networks": lambda value: every(as_network, as_strings(value)),
    "import": as_file_in_repository, "reload": lambda value: parse_reload(as_string(value)),
    "mount": as_mount, "deploy_key": as_deploy_key, "profiles": as_strings,
    "allow": lambda value: every(as_exception, as_strings(value)), "webhook": as_secret,
    "wait": lambda value: parse_duration(str(value), 1), "rollback": as_bool,
}
REQUIRED_KEYS = ("name", "user", "repository")
def parse_table(table: Json, parsers: Mapping[str, Callable[[Any], Any]], label: str,
                more: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values that are right, and every reason why others are not."""
    errors, fields = [], {}
    for key, value in table.items():
        if key not in parsers:
            errors.append(f"{label}unknown key {key!r}{nearest(key, parsers)}{more}")
            continue
        try:
            fields["import_file" if key == "import" else key] = parsers[key](value)
        except ValueError as error:
            errors += [f"{label}{key}: {line}" for line in str(error).splitlines()]
    return fields, errors
def parse_service(table: Json, label: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a Service that are right, and every reason why others are not."""
    fields, errors = parse_table(table, SERVICE_KEYS, f"{label}: ")
    errors += [f"{label}: {key} is missing" for key in REQUIRED_KEYS if key not in table]
    if fields.get("reload") and "import" not in table:
        errors.append(f"{label}: reload needs an import, which is what it announces")
    env = dict(fields.pop("env_file", ())) | dict(fields.get("env", ()))
    fields["env"] = tuple(env.items())
    fields["registries"] = tuple(replace(login, user=login.user or fields.get("user", ""))
                                 for login in fields.get("registries", ()))
    return fields, errors
def check_services(services: Mapping[str, Json], names: Collection[str]) -> Iterator[str]:
    """What is wrong between services, which go by their labels."""
    hosts = dict[str, str]()
    for label, fields in services.items():
        for host, _ in fields.get("urls", ()):
            if (owner := hosts.setdefault(host.lower(), label)) != label:
                yield f"{label}: urls: {host} belongs to {owner.removeprefix('service ')}"
        if (reload := fields.get("reload")) and reload.service not in names:
            yield (f"{label}: reload: there is no service {reload.service!r}"
                   f"{nearest(reload.service, names)}")
def parse_configuration(text: str) -> Configuration:
    """What a pgo.toml says. Raises ConfigurationError with every error at once."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"not TOML: {error}") from None
    top, errors = parse_table(document, TOP_KEYS, "", "; services are written as [[services]]")
    tables = top.get("services", ())
    if not tables and not errors:
        errors.append("has no [[services]]; an empty configuration would take everything down")
    services = dict[str, dict[str, Any]]()
    for number, table in enumerate(tables, 1):
        label = f"service {table.get('name') or number!r}"
        services[label], wrong = parse_service(table, label)
        errors += wrong
    names = Counter(str(table["name"]) for table in tables if "name" in table)
    errors += [f"service {name!r}: the name is used {count} times; names must differ"
               for name, count in names.items() if count > 1]
    errors += check_services(services, names)
    if errors: raise ConfigurationError("\n".join(errors))
    top["services"] = tuple(Service(**fields) for fields in services.values())
    return Configuration(**top)
OUTSIDE_FILES = ("admins", "env_file", "deploy_key")
def configuration_digest(path: Path) -> str:
    """Changes when pgo.toml does, or another file that it names. Raises OSError."""
    text = path.read_bytes()
    digest, tables = hashlib.sha256(text), []
    with suppress(ValueError, TypeError):
        document = tomllib.loads(text_of(text))
        tables = [document, *document.get("services", [])]
    for table in filter(lambda table: isinstance(table, dict), tables):
        for name in (str(table[key]) for key in OUTSIDE_FILES if key in table):
            with suppress(OSError, Refused):
                digest.update(name.encode() + b"\0" + read_beneath(
                    Path("/"), name[1:], OUTSIDE_BYTES))
    return digest.hexdigest()
def read_configuration(path: Path) -> Configuration:
    """pgo.toml from disk. Raises ConfigurationError, also where it cannot be read."""
    try:
        digest = configuration_digest(path)
        configuration = parse_configuration(text_of(path.read_bytes()))
        others = path.stat().st_mode & stat.S_IROTH
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"cannot be read: {reason}") from None
    secret = any(service.secrets for service in configuration.services)
    warning = f"{path} may hold secrets, and everybody can read it: chmod 600 {path}"
    return replace(configuration, digest=digest, warnings=(warning,) if others and secret else ())

# ---- Release -----------------------------------------------------------------------------------
STEADY_SECONDS = 7.0  # without a health check, what runs so long is well
CRASHES = 3  # that many ends fail a deploy ...
CRASH_AGE = 30.0  # ... of a container that is so old: the engine restarts thrice in a second

@dataclass(frozen=True)
class Release:
    """All that shapes the containers of a service: what a commit means on this server."""
    commit: str
    configuration: str  # digest of the entry in pgo.toml
    project: str
    model: Model = field(default_factory=dict)  # checked, with labels
    digests: Mapping[str, str] = field(default_factory=dict)  # of each compose service
    inputs: Mapping[str, str] = field(default_factory=dict)  # of the folders that it binds
    images: Mapping[str, str] = field(default_factory=dict)  # name: identity
    pulled: Mapping[str, str] = field(default_factory=dict)  # name: REPOSITORY@DIGEST
    values: Mapping[str, str] = field(default_factory=dict, repr=False)  # of secrets and configs
    adopted: Mapping[str, str] = field(default_factory=dict)  # digests when it was taken over
    since: float = 0.0  # when it was found good, seconds since the epoch; 0: not yet
    ill: tuple[str, ...] = ()  # containers that were ill before its deploy began
    notes: tuple[str, ...] = ()  # what its owner should know: warnings, and what is not followed
    @property
    def image_names(self) -> dict[str, str]:
        """The image of each compose service."""
        return {name: image_of(self.project, name, service)
                for name, service in compose_services(self.model).items()}
    @property
    def volume_names(self) -> list[str]:
        return [name for name, _ in named_things(self.project, self.model, "volumes").values()]
    def job(self, name: str) -> str:
        return f"{self.digests.get(name, '')}.{self.inputs.get(name, '')}"

@dataclass(frozen=True)
class DoneJob:
    """A container that ended with 0 and need not run again: what it was, and when it started."""
    job: str
    started: float
Jobs = Mapping[str, DoneJob]  # by their compose services

@dataclass(frozen=True)
class RowKind:
    """A kind of difference, and its cure: up, force, restart, remove, network or none."""
    # force: up that recreates. ill: it is what should be there, but it is not well.
    cure: str
    does: str = ""
    ill: bool = False
    waits: bool = False  # it may pass by itself

ROWS: dict[str, RowKind] = {
    "missing": RowKind("up", "created"),
    "extra": RowKind("remove", "removed"),
    "surplus": RowKind("up", "removed"),
    "digest": RowKind("up", "recreated"),
    "image": RowKind("up", "recreated"),
    "never started": RowKind("up", "started"),
    "job": RowKind("up", "run again"),
    "network": RowKind("network", "recreated"),
    "network gone": RowKind("force", "recreated"),
    "namespace gone": RowKind("up", "recreated"),
    "namespace older": RowKind("restart", "restarted"),
    "volume": RowKind(""),
    "stopped": RowKind("up", "started"),
    "ended": RowKind("up", "started", ill=True),
    "restarting": RowKind("", ill=True, waits=True),
    "unhealthy": RowKind("", ill=True),
    "paused": RowKind("", ill=True),
    "starting": RowKind("", waits=True),
}

@dataclass(frozen=True)
class Row:
    """One difference between a release and a snapshot; its text says of `subject` what it is."""
    kind: str
    compose_service: str  # "" where it is about a volume
    subject: str  # a container, compose service, network or volume
    text: str
    container: Container | None = None
    @property
    def how(self) -> RowKind:
        return ROWS[self.kind]
    def __str__(self) -> str:
        return f"{self.subject} {self.text}"
def changed_networks(release: Release, snapshot: Snapshot) -> dict[str, str]:
    """The networks that are there and not as the release has them: key: name in the engine."""
    # One without a label is not pgod's: what was taken over counts, and whether it is closed.
    digests, changed = network_digests(release.project, release.model), {}
    for key, (name, wanted) in named_things(release.project, release.model, "networks").items():
        there = snapshot.networks.get(name) or {}
        label = part(there, "Labels").get(DIGEST_LABEL)
        adopted = release.adopted.get(f"network {name}", digests[name])
        opened = not label and bool(wanted.get("internal")) != bool(there.get("Internal"))
        if there and (opened or (label or adopted) != digests[name]): changed[key] = name
    return changed
def compare_volumes(release: Release, snapshot: Snapshot) -> Iterator[Row]:
    for name, wanted in named_things(release.project, release.model, "volumes").values():
        there = snapshot.volumes.get(name)
        if there and ((wanted.get("driver") or "local") != there.get("Driver")
                      or (wanted.get("driver_opts") or {}) != (there.get("Options") or {})):
            yield Row("volume", "", f"volume {name}",
                      "has another driver or other options than the compose file says")
def lost_network(container: Container, wanted: Iterable[str], snapshot: Snapshot) -> str:
    """The network of a container that is no longer there, or that it is no longer on."""
    known = {str(network.get("Id")) for network in snapshot.networks.values()}
    for name, identity in container.networks.items():
        if identity not in known if identity else name not in snapshot.networks: return name
    return next((name for name in wanted if name not in container.networks), "")

Facts = Iterator[tuple[object, str, str]]  # whether it is so, the kind of its row, the text
def namespace_facts(container: Container, snapshot: Snapshot) -> Facts:
    """What shares a namespace has it no longer when the other one is made or started anew."""
    there = {other.identity: other for other in snapshot.containers}
    yield ({*container.shares, *container.volumes_from} - {*there}, "namespace gone",
           "shares a namespace with a container that is gone")
    for other in (there[identity] for identity in container.shares if identity in there):
        yield (container.status == other.status == "running" and other.started > container.started,
               "namespace older", f"shares a namespace with {other.name}, which started later")
def running_facts(container: Container, now: float) -> Facts:
    """What has not ended. The engine says "unhealthy" of what restarts, "healthy" between ends."""
    status, health = container.status, container.health if container.status == "running" else ""
    yield (status == "restarting", "restarting",
           f"exited with status {container.exit_code} and is restarted")
    yield status == "paused", "paused", "is paused"
    yield status == "removing", "starting", "is being removed"
    yield health == "unhealthy", "unhealthy", "is unhealthy"
    yield health == "starting", "starting", "is starting"
    yield (now - container.started < STEADY_SECONDS and (not health or container.restarts > 0),
           "starting", f"has to run for {STEADY_SECONDS:.0f} s")
def ended_facts(container: Container, job: DoneJob | None, known: str) -> Facts:
    """What has ended; nothing of it is true where it is done."""
    # `job`: what is known of its compose service; `known`: the job that the release has there.
    yield container.by_hand, "stopped", "was stopped by hand"
    yield (container.status != "exited" or container.exit_code, "ended",
           f"exited with status {container.exit_code}")
    yield (container.policy in FOREVER or not job or job.started < container.started, "stopped",
           "was stopped")
    yield job and job.job != known, "job", "is done, but files that it uses changed"
def container_facts(release: Release, container: Container, snapshot: Snapshot,
                    done: Jobs) -> Facts:
    """All that can be wrong with a container of the release; the first that is true counts."""
    name = container.compose_service
    wanted, image = release.digests.get(name, ""), release.image_names[name]
    yield (container.digest != wanted and (container.digest or release.adopted.get(name) != wanted),
           "digest", "is not as the commit has it")
    yield (release.images.get(image, container.image) != container.image, "image",
           f"has another image than {image}")
    yield container.status == "created", "never started", "was never started"
    named = named_things(release.project, release.model, "networks")
    lost = lost_network(container, [named[key][0] for key in networks_used(
        compose_services(release.model)[name]) if key in named], snapshot)
    yield lost, "network gone", f"is not on network {lost}, which is gone or was made anew"
    yield from namespace_facts(container, snapshot)
    yield from (running_facts(container, snapshot.now) if container.status in UP
                else ended_facts(container, done.get(name), release.job(name)))
def compare(release: Release, snapshot: Snapshot, done: Jobs) -> tuple[Row, ...]:
    """Every difference between what should be and what is. In sync means: none. Pure."""
    changed = changed_networks(release, snapshot)
    rows = [*compare_volumes(release, snapshot), *(
        Row("network", name, f"network {changed[key]}", "is configured anew")
        for name, service in compose_services(release.model).items()
        for key in networks_used(service) if key in changed)]
    have = defaultdict[str, list[Container]](list)
    for container in snapshot.containers: have[container.compose_service].append(container)
    for name, count in expected_replicas(release.model).items():
        mine, job = have.pop(name, []), done.get(name)
        text = f"has {len(mine)} containers, not {count}" if mine else "is missing"
        if len(mine) < count and (job is None or job.job != release.job(name)):
            rows.append(Row("missing", name, name, text))
        for container in mine:
            facts = container_facts(release, container, snapshot, done)
            if first := next(((kind, text) for true, kind, text in facts if true), None):
                rows.append(Row(first[0], name, container.name, first[1], container))
        if len(mine) > count: rows.append(Row("surplus", name, name, text))
    rows += [Row("extra", container.compose_service, container.name,
                 "is of no compose service of the commit", container)
             for containers in have.values() for container in containers]
    return tuple(rows)
def note_done(release: Release, snapshot: Snapshot, done: Jobs) -> dict[str, DoneJob]:
    """The jobs that are done: their containers may be pruned. Not to be asked after a stop."""
    noted = {name: job for name, job in done.items() if name in release.digests}
    for name in release.digests:
        mine = [c for c in snapshot.containers if c.compose_service == name]
        started = max((c.started for c in mine), default=0.0)
        if mine and all(c.status == "exited" and not c.exit_code and not c.by_hand
                        and c.policy not in FOREVER for c in mine):
            if name not in noted or noted[name].started != started:
                noted[name] = DoneJob(release.job(name), started)
        elif mine: noted.pop(name, None)
    return noted
@dataclass(frozen=True)
class Cure:
    """What removes rows: compose services to bring up and to restart, networks to make anew."""
    up: tuple[str, ...] = ()
    force: bool = False  # recreate them, also where compose sees no change
    restart: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()  # names in the engine
    remove: tuple[str, ...] = ()  # identities of containers
    def __bool__(self) -> bool:
        return bool(self.up or self.restart or self.remove)

def plan_cure(release: Release, rows: Iterable[Row], snapshot: Snapshot) -> Cure:
    """What to do so that these rows go. Pure."""
    rows, services = [*rows], compose_services(release.model)
    of = defaultdict[str, set[str]](set)
    for row in rows: of[row.how.cure].add(row.compose_service)
    anew = of["up"] | of["force"] | of["network"]
    sharers = {name: shared_with(service) for name, service in services.items()}
    while more := {name for name, shared in sharers.items() if shared & anew} - anew: anew |= more
    again = {name for name, service in services.items()
             if any((how or {}).get("restart") and other in anew
                    for other, how in part(service, "depends_on").items())}
    have = {container.compose_service for container in snapshot.containers}
    removed = (row.container for row in rows if row.how.cure == "remove" and row.container)
    return Cure(tuple(name for name in services if name in anew),
                bool(of["force"] | of["network"]),
                tuple(sorted((of["restart"] | again & have) - anew)),
                tuple(changed_networks(release, snapshot).values()) if of["network"] else (),
                tuple(container.identity for container in removed))
def judge(rows: Iterable[Row], before: Mapping[str, int], ill: Iterable[str], now: float,
          over: bool = False) -> tuple[str, str]:
    """One look at a deploy: ("good" | "wait" | "bad", why). Pure."""
    # `before`: restarts of the containers that were there when it began. `ill`: those of them that
    # were ill and that it did not touch; they say nothing about the commit. `over`: its time is.
    rows = [row for row in rows if not (row.container and row.container.identity in {*ill}
                                        and (row.how.ill or not row.how.cure))]
    for row in rows:
        crashing = row.container and now - row.container.created >= CRASH_AGE and (
            row.container.restarts - before.get(row.container.identity, 0) >= CRASHES)
        if row.kind in ("ended", "unhealthy") or crashing: return "bad", str(row)
    if not rows: return "good", ""
    return ("bad" if over else "wait"), str(rows[0])
@dataclass(frozen=True)
class Failure:
    """A commit that is not deployed, and why; `waits` for `up`, or tried again by itself."""
    commit: str
    configuration: str
    reason: str
    retry: bool = False
    waits: bool = False
    def __str__(self) -> str:
        if self.waits: return f"{short(self.commit)} waits for up"
        when = "by itself" if self.retry else "at the next push, or with up"
        return f"{short(self.commit)} failed; it is tried again {when}: {self.reason}"

@dataclass(frozen=True)
class Hold:
    """Why nothing is deployed or healed: `down` and `stop`, or `hold`."""
    by: str
    reason: str
    since: float
    until: float = 0.0  # 0: until released
    kind: str = "stop"
    services: tuple[str, ...] = ()  # of compose, that `stop` named; none: all
    by_hand: bool = False  # NAME.stop was made by an administrator: a lock
    @property
    def stops(self) -> bool:
        """Whether containers are to be stopped; a lock and `hold` leave them as they are."""
        return self.kind == "stop" and not self.by_hand
    @property
    def way_out(self) -> str:
        ends = "an administrator who removes the .stop file" if self.by_hand else (
            "release" if self.kind == "hold" else "up or start")
        return f"{self}; only {ends} ends that"
    def __str__(self) -> str:
        end = f" until {format_time(self.until)}" if self.until else ""
        reason = f": {self.reason}" if self.reason else ""
        verb = "stopped" if self.stops else "held"
        only = f"; {', '.join(self.services)} alone, with no deploys or heals of the others"
        return (f"{verb} by {self.by} since {format_time(self.since)}{end}{reason}"
                f"{only if self.services else ''}")

@dataclass(frozen=True)
class Situation:
    """All that a decision rests on."""
    configuration: str
    hold: Hold | None = None
    wanted: str = ""  # "" where the remote could not be asked
    current: Release | None = None
    good: Release | None = None
    failure: Failure | None = None
    rows: tuple[Row, ...] = ()
    running: frozenset[str] = frozenset()  # compose services with a container that runs
    asked: bool = False  # by `up`
    retry: bool = False  # it is time to try again what failed
    rollback: bool = True  # is permitted
@dataclass(frozen=True)
class Decision:
    """What to do: nothing, stop, deploy `commit`, roll back or heal; and why."""
    action: str
    commit: str = ""
    reasons: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
CALM = "in sync"
def deploy_reason(seen: Situation, target: str) -> str:
    current = seen.current
    if not current: return f"first deploy of {short(target)}"
    if target != current.commit:
        return f"new commit {short(target)} (runs: {short(current.commit)})"
    if seen.configuration != current.configuration: return "the configuration changed"
    return "" if current.since else f"the deploy of {short(target)} did not end well yet"
def decide(seen: Situation) -> Decision:
    """The one place where it is decided what is done for a service. Pure."""
    current, failure = seen.current, seen.failure
    if seen.hold:
        stopped = seen.hold.services or compose_services(current.model if current else {})
        up = seen.running & {*stopped} if seen.hold.stops else ()
        return Decision("stop" if up else "nothing", "", (str(seen.hold),), tuple(sorted(up)))
    target = seen.wanted or (current.commit if current else "")
    if not target: return Decision("nothing", reasons=("the repository could not be reached yet",))
    if seen.asked: return Decision("deploy", target, ("asked for by up",))
    reason = deploy_reason(seen, target)
    failed = failure and (failure.commit, failure.configuration) == (target, seen.configuration)
    if reason and not (failed and failure and not (failure.retry and seen.retry)):
        return Decision("deploy", target, (reason,))
    halfway = current and not current.since and failure and not failure.waits
    if halfway and seen.good and seen.rollback:
        action = "rollback" if seen.retry else "nothing"
        return Decision(action, seen.good.commit, ("the last rollback failed",))
    cures = [row for row in seen.rows if row.how.cure]
    if cures:
        return Decision("heal", current.commit if current else "", tuple(str(row) for row in cures))
    if reason and failure: return Decision("nothing", reasons=(str(failure),))
    return Decision("nothing", reasons=tuple(str(row) for row in seen.rows) or (CALM,))
def retry_delay(interval: float, failures: int, chance: float) -> float:
    """Seconds to the next look: the interval and up to half of it, doubled at each failure."""
    if not failures: return interval * (1 + chance / 2)
    delay = min(interval * 2.0 ** min(failures - 1, 16), BACKOFF_CEILING)
    return min(delay * (1 + chance / 2), BACKOFF_CEILING)

# ---- Store -------------------------------------------------------------------------------------
HISTORY_LINES = 200
WORDS_KEPT = 10  # failed deploys, of which it is known what the containers said
def load_json(path: Path, parse: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """A JSON file of pgod's, parsed; as {} would be, where it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict): return parse(value)
    return parse({})
def revived(kind: Callable[..., Any], stored: Json) -> Any:
    """The dataclass of a stored mapping; None where that is of another version."""
    with suppress(TypeError, AttributeError):
        return kind(**{key: tuple(value) if isinstance(value, list) else value
                       for key, value in stored.items()})
    return None

class Store:
    """All that is on disk of a service, but for its work tree and its git folder.

    current.json    the release whose containers there are, good or not yet
    good.json       the last release that was found good
    state.json      what failed, which jobs are done, which import was announced
    tracked.json    what pgod put into the work tree
    keys.json       the newest commit that was fetched, and who may steer by it
    history.jsonl   what was deployed when
    why/            what the containers of failed deploys said last, a file a commit
    hold.json, NAME.stop   why nothing is done
    digest_key      a random key of the digests in labels
    """
    def __init__(self, paths: ServicePaths) -> None:
        self.paths = paths
        self.guard = threading.Lock()  # guards that a hold is not taken for the one before it
        self.own = paths.own
        facts = load_json(self.own / "state.json")
        self.failure: Failure | None = revived(Failure, part(facts, "failure"))
        self.done: dict[str, DoneJob] = {name: job for name, stored in part(facts, "done").items()
                                         if (job := revived(DoneJob, stored))}
        self.announced = str(facts.get("announced", ""))
        self.looks: dict[str, int] = part(facts, "looks")  # at a commit, that did not end
        self.current: Release | None = revived(Release, load_json(self.own / "current.json"))
        self.good: Release | None = revived(Release, load_json(self.own / "good.json"))
        if not self.current and self.good:
            log.warning("%s: what runs is not known, the last good deploy serves", paths.service)
            self.set_current(self.good)
    def note(self, **facts: Any) -> bool:
        """Set `failure`, `done`, `announced` or `looks`, also on disk; whether that is news."""
        if all(getattr(self, name) == value for name, value in facts.items()): return False
        state = {name: getattr(self, name) for name in ("failure", "done", "announced", "looks")}
        self.write("state.json", state | facts)
        vars(self).update(facts)  # not before: what could not be written is news again
        return True
    def write(self, name: str, facts: object) -> None:
        write_atomic(self.own / name, json.dumps(facts, default=asdict).encode())
    def set_current(self, release: Release, good: bool = False) -> None:
        """It is what runs; if it is good, a rollback goes back to it."""
        if good:  # first: what is current and has ended well is not looked at again
            self.write("good.json", release)
            self.good = release
        self.write("current.json", release)
        self.current = release
    def digest_key(self) -> bytes:
        """Made once. Whoever lacks it cannot guess a secret by its digest."""
        path = self.own / "digest_key"
        if not path.exists() or path.stat().st_size != 32: write_atomic(path, os.urandom(32))
        return path.read_bytes()
    def tracked(self) -> Tree:
        return dict(load_json(self.own / "tracked.json", lambda stored: {
            path: (mode, blob) for path, (mode, blob) in stored.items()}))
    def set_tracked(self, tree: Tree) -> None:
        self.write("tracked.json", tree)
    def keys(self) -> tuple[str, tuple[PublicKey, ...], tuple[str, ...]]:
        """The newest commit, who may steer by it, and the lines in ssh/ that are no keys."""
        commit, keys, ignored = load_json(self.own / "keys.json", lambda stored: (
            str(stored.get("commit", "")), tuple(PublicKey(*row) for row in stored.get("keys", ())),
            tuple(map(str, stored.get("ignored", ())))))
        return commit, keys, ignored
    def set_keys(self, commit: str, keys: Iterable[PublicKey], ignored: Iterable[str]) -> None:
        rows = [[key.fingerprint, key.comment, key.options] for key in keys]
        self.write("keys.json", {"commit": commit, "keys": rows, "ignored": [*ignored]})
    def history(self) -> list[dict[str, Any]]:
        found = []
        with suppress(OSError), (self.own / "history.jsonl").open(errors="replace") as lines:
            for line in lines:
                with suppress(ValueError): found.append(json.loads(line))
        return found
    def keep_words(self, commit: str, text: str) -> None:
        """What a failed commit's containers said last; of the last ten."""
        folder = self.own / "why"
        make_folder(folder, 0o700)
        write_atomic(folder / commit, text.encode())
        for old in sorted(folder.iterdir(), key=os.path.getmtime)[:-WORDS_KEPT]: old.unlink()
    def words(self, commit: str) -> str:
        """Of the commit that begins so, or the last one; empty if there are none."""
        newest = max((self.own / "why").glob(f"{commit}*"), key=os.path.getmtime, default=None)
        return f"{newest.name}\n{newest.read_text()}" if newest else ""
    def append_history(self, line: Json) -> None:
        lines = [*self.history(), line][-HISTORY_LINES:]
        text = "".join(json.dumps(item) + "\n" for item in lines)
        write_atomic(self.own / "history.jsonl", text.encode())

    # Holds: each file is replaced or removed as a whole, so any thread may read them.
    def hold_file(self, kind: str) -> Path:
        return self.paths.stop if kind == "stop" else self.own / "hold.json"
    def hold_of(self, kind: str) -> Hold | None:
        """What `stop` or `hold` made, or an administrator, whose file has no content."""
        path = self.hold_file(kind)
        try:
            since = path.stat().st_mtime
        except FileNotFoundError:
            return None
        hold: Hold = load_json(path, lambda facts: Hold(
            str(facts.get("by", "an administrator")), str(facts.get("reason", "")),
            float(facts.get("since", since)), float(facts.get("until", 0)), kind,
            tuple(map(str, facts.get("services", ()))), kind == "stop" and "by" not in facts))
        return hold if not hold.until or hold.until > time.time() else None
    def hold(self) -> Hold | None:
        return self.hold_of("stop") or self.hold_of("hold")
    def set_hold(self, hold: Hold) -> None:
        facts = {key: value for key, value in asdict(hold).items()
                 if key not in ("kind", "by_hand")}
        with self.guard: write_atomic(self.hold_file(hold.kind), json.dumps(facts).encode())
    def release(self, kind: str) -> None:
        """End what a command made. Raises Refused at an administrator's lock."""
        if (hold := self.hold_of(kind)) and hold.by_hand: raise Held(hold.way_out)
        self.hold_file(kind).unlink(missing_ok=True)

class Project:
    """A service with all that is known of it: its paths, git folder, store, compose and engine."""
    # Only the service's own thread changes anything through it.
    def __init__(self, service: Service, shared: Shared) -> None:
        self.service = service
        self.shared = shared
        self.name = service.name
        self.paths = ServicePaths(service.name, shared.settings.directory, shared.settings.datadir)
        self.store = Store(self.paths)
        self.api, self.clock = shared.api, shared.clock
        self.account = account_of(service.user)
        self.compose = Compose(service, self.paths, self.account, shared.children,
                               shared.compose_program)
        self.git = Repository(service, self.paths, self.account, shared.children)
    def configuration(self) -> str:
        parts = (self.service.digest(), str(self.paths.worktree), str(self.paths.data))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    def snapshot(self, release: Release | None) -> Snapshot:
        """What there is of the project now, and of what the release names. Raises Fault."""
        containers, (networks, now) = self.api.containers(self.name), self.api.networks()
        volumes = {name: facts for name in (release.volume_names if release else ())
                   if (facts := self.api.facts(f"/volumes/{name}"))}
        images = self.api.images(release.image_names.values() if release else ())
        return Snapshot(containers, networks, volumes, images, now)
    def context(self, tree: Tree) -> PolicyContext:
        settings = self.shared.settings
        ports = tuple(address[1] for address in (settings.ssh, settings.metric) if address)
        others = tuple(s for s in self.shared.configuration.services if s.name != self.name)
        closed = (str(settings.directory), str(settings.datadir))
        models = tuple((name, release.model) for name, worker in self.shared.workers.items()
                       for release in (worker.store.current, worker.store.good)
                       if release and name != self.name)
        return PolicyContext(self.service, others, str(self.paths.worktree), str(self.paths.data),
                             tree, ports, closed, models)
    def last_words(self, rows: Iterable[Row]) -> str:
        """What the containers said that are not well. Raises Fault."""
        ill = {row.container.identity: row.container for row in rows
               if row.container and (row.how.ill or row.how.waits)}
        secrets = self.service.secrets
        text = "\n".join(self.api.last_words(c, secrets) for c in [*ill.values()][:10])
        return "\n".join(map(printable, text.expandtabs().split("\n")))
    def say(self, text: str) -> None:
        log.info("%s: %s", self.name, text)

@dataclass
class Shared:
    """What the threads have in common."""
    settings: Settings
    configuration: Configuration
    children: Children
    metrics: Metrics
    compose_program: tuple[str, ...]
    api: EngineApi
    turn: threading.Condition = field(default_factory=threading.Condition)  # guards `deploying`
    deploying: Counter[str] = field(default_factory=Counter)  # by user
    naming: threading.Lock = field(default_factory=threading.Lock)  # guards who takes a name first
    stopping: threading.Event = field(default_factory=threading.Event)
    events_flow: threading.Event = field(default_factory=threading.Event)
    removed: threading.Event = field(default_factory=threading.Event)  # what left pgo.toml is gone
    workers: dict[str, Worker] = field(default_factory=dict)  # whole before a thread starts
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

@contextmanager
def deploy_slot(shared: Shared, user: str) -> Iterator[None]:
    """One of a few, so that a boot is no stampede. Raises Stopping."""
    # Four of one user's, or four that hang, must not keep all others from a deploy.
    until = shared.clock() + SLOW_DEPLOY * (1 + shared.chance())
    with shared.turn:
        while (shared.deploying.total() >= (DEPLOYS if shared.deploying[user] else 2 * DEPLOYS)
               and shared.clock() < until):
            if shared.stopping.is_set(): raise Stopping
            shared.turn.wait(0.1)
        shared.deploying[user] += 1
    try:
        yield
    finally:
        with shared.turn:
            shared.deploying[user] -= 1
            shared.turn.notify_all()

# ---- Reverse proxy -----------------------------------------------------------------------------
def import_of(project: Project) -> dict[str, str]:
    """Caddy's import file, a block a host, that pgod writes into a work tree, if it is to."""
    services, file = project.shared.configuration.services, project.service.import_file
    urls = sorted({host: target for service in services for host, target in service.urls}.items())
    # Requests that come while a container is recreated wait for it.
    blocks = [f"{host} {{\n\treverse_proxy {target} {{\n\t\tlb_try_duration 5s\n\t}}\n}}\n"
              for host, target in urls]
    text = "# Written by pgod from pgo.toml; changes here are lost.\n" + "\n".join(blocks)
    return {file: text} if file else {}
def write_import(project: Project) -> None:
    """Write the Caddy import, as the user, if it changed. Raises Refused at a link."""
    for file, text in import_of(project).items():
        data = text.encode()
        with as_user(project.account):
            with suppress(FileNotFoundError):
                if data == read_beneath(project.paths.worktree, file, len(data) + 1): return
            write_beneath(project.paths.worktree, file, io.BytesIO(data))
        project.say(f"import written: {file}")
        project.store.note(announced="")
def follow_import(project: Project, target: Project | None) -> None:
    """Keep the import right, and announce it with `reload` until that worked. Raises Fault."""
    texts = import_of(project)
    if not texts or not project.store.current: return
    write_import(project)
    digest, reload = digest_of(texts, b""), project.service.reload
    if reload and target and project.store.announced != digest:
        model = target.store.current.model if target.store.current else {}
        at = [] if reload.service not in compose_services(model) else [reload.service]
        done = target.compose.run("exec", "-T", "--", *at, *reload.words, deadline="reload")
        if done.failed:
            wrote = printable(one_line(f"{done.stdout.decode(errors='replace')}\n{done.stderr}"))
            raise Fault(f"reload failed, will be tried again: {shlex.join(reload.words)}: "
                        f"{done.complaint if done.trouble or not wrote else wrote}")
        project.say(f"reloaded: {reload.service}")
        project.store.note(announced=digest)

# ---- Deploy ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prepared:
    """A commit that may be deployed: nothing on the host has changed yet."""
    release: Release
    tree: Tree
    rendered: Model  # its paths are those of the export, for pull and build
def enforce(project: Project, model: Model, tree: Tree, notes: Iterable[str] = ()) -> None:
    """Raises Refused with every violation; those of root's repositories are only logged."""
    service, export, unset = project.service, project.paths.export, dict[str, str]()
    for file in project.compose.files(tree):
        with suppress(Refused, OSError):  # a link, which compose follows
            data = read_beneath(export, os.path.relpath(file, export), MODEL_TEXT)
            unset |= {os.path.normpath(project.paths.worktree / path): name
                      for path, name in unset_paths(data.decode(errors="replace"), notes).items()}
    context = replace(project.context(tree), unset=unset)
    violations = [v.redacted(service.secrets) for v in check_policy(model, context)]
    project.shared.metrics.set("pgo_service_policy_violations", len(violations),
                               service=service.name)
    if violations and not service.trusted:
        entries = json.dumps([*dict.fromkeys(v.allow for v in violations if v.allow)])
        what = "all" if all(v.allow for v in violations) else "the others"
        remedy = [f"an administrator permits {what} with allow = {entries}"] * (", " in entries)
        lines = "".join(f"\n  {text}" for text in (*violations, *remedy))
        raise Refused(f"{REFUSES}:{lines}")
    for violation in violations:
        log.warning("%s: root's repository, so only reported: %s", service.name, violation)
    for key, name, other, _ in sorted({*name_clashes(model, project.context(tree))})[:10]:
        log.warning("%s: %s answers to %s on network %s as well", service.name, other, name, key)
def render(project: Project, tree: Tree) -> tuple[Model, list[str]]:
    """The exported commit's model, its paths those of the work tree; warnings. Raises Refused."""
    try:
        model, warnings = project.compose.render(project.compose.files(tree))
        model = normalised(moved_paths(model, str(project.paths.export),
                                       str(project.paths.worktree)))
    except RecursionError:
        raise Refused("the compose file is nested too deeply") from None
    if not compose_services(model):
        raise Refused("the compose file has no services (or none in these profiles)")
    shares = project.context(tree).shares
    return model if project.service.trusted else without_raw_sockets(model, shares), warnings
def read_values(project: Project, model: Model) -> dict[str, str]:
    """The variables that are configs or secrets, by `env`, then .env. Raises Refused."""
    # compose would make the container and not fill it, if one is not set.
    names = value_names(model)
    if not names: return {}
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]:
        raise Refused(f"environment: {printable(wrong[0])!r} is not the name of a variable")
    asking = {"services": {"values": {"image": "none"}},
              "x-pgod-values": {name: f"${{{name}-}}" for name in names},
              "x-pgod-set": {name: f"${{{name}+set}}" for name in names}}
    path = project.paths.own / "values.json"
    write_atomic(path, json.dumps(asking).encode(), owner=project.account)
    found, _ = project.compose.render([str(path)])
    values = {name: str(text).replace("$$", "$")  # compose doubles each $
              for name, text in found["x-pgod-values"].items() if found["x-pgod-set"][name]}
    if unset := [name for name in names if name not in values]:
        raise Refused(f"{', '.join(unset)} is not set: a config or secret takes its value from it; "
                      "set it in env or env_file of pgo.toml, or in .env of the repository")
    return values
def looks_like_file(bind: Bind) -> bool:
    """Whether a missing source was meant to be a file; the engine would make a folder of it."""
    return any(re.search(r"(?i)(.\.(?!d$)[a-z][a-z0-9]{0,9}|^\w+file|^\.(env|ht\w+|\w+rc))$",
                         os.path.basename(path)) for path in (bind.source, bind.target))
def unfit(project: Project, model: Model, tree: Tree) -> list[str]:
    """Configs and secrets that compose could not put into their containers, and why."""
    found = [f"{name}: {key} has its text in the compose file or in a variable, and read_only: "
             "true keeps it from being written; use a file"
             for name, service in compose_services(model).items() if service.get("read_only")
             for kind in ("configs", "secrets")
             for key, entry in entries_used(service.get(kind), part(model, kind)).items()
             if "file" not in entry]
    files, binds = Files(tree, str(project.paths.worktree), {}), binds_of(model)
    committed = {source for source in {bind.source for bind in binds} if files.at(source)}
    for bind, root in itertools.product(binds, project.paths.roots):
        relative, folder = beneath(bind.source, str(root)), bind.kind == "bind"
        if relative and bind.source not in committed and (not folder or looks_like_file(bind)):
            with as_user(project.account):
                if not stat_beneath(root, relative):
                    found.append(f"{bind.compose_service}: {bind.kind} {bind.source} is missing; "
                                 f"commit it{', or a file in it, if it is a folder' * folder}")
    return found
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OVERRIDES = tuple(name.replace(".y", ".override.y") for name in COMPOSE_FILES)
def not_followed(project: Project, model: Model, tree: Tree) -> Iterator[str]:
    """What looks as if it counted, and does not, and what to do."""
    read = [os.path.relpath(file, project.paths.export) for file in project.compose.files(tree)]
    for name in (os.path.join(os.path.dirname(read[0]), name) for name in OVERRIDES):
        if name in tree and name not in read:
            yield f"{name} is not read; to have it read: compose = {json.dumps([*read, name])}"
    files = Files(tree, str(project.paths.worktree), {})
    folders = [str(part(service, "build").get("context") or "")
               for service in compose_services(model).values()]
    used = {path: mode for source in {*(bind.source for bind in binds_of(model)), *folders}
            for path, (mode, _) in files.at(source)}
    lfs = any(path.rpartition("/")[2] == ".gitattributes" for path in tree)
    for path, mode in sorted(used.items())[:MODEL_ENTRIES]:
        if mode == "160000":
            yield f"{path} is a submodule, which is not fetched; put its files into the repository"
        elif lfs and mode.startswith("100") and read_beneath(
                project.paths.export, path, 60).startswith(LFS_POINTER):
            yield (f"{path} is in Git LFS, which is not fetched: only its pointer is there; "
                   "put the file itself into the repository")
def foreign_frontends(project: Project, model: Model) -> list[str]:
    """Dockerfiles of the export that another program than docker's own would read."""
    found, files = list[Violation](), dict[str, str]()
    for name, service in compose_services(model).items():
        build = service.get("build") or {}
        found += check_frontend(name, str(build.get("dockerfile_inline") or ""))
        folder, file = os.path.split(os.path.normpath(build.get("dockerfile") or "Dockerfile"))
        for path in (os.path.join(folder, name) for name in {file, file.lower()} if build):
            at = os.path.normpath(os.path.join(str(build.get("context", "")), path))
            files[beneath(at, str(project.paths.worktree)) or ""] = name
    for inside, name in files.items():
        with suppress(FileNotFoundError):
            data = read_beneath(project.paths.export, inside, 4 * MODEL_TEXT)
            found += check_frontend(name, data.decode(errors="replace"))
    return [str(violation.redacted(project.service.secrets)) for violation in found
            if violation.allow not in project.service.allow]
def built_by_others(project: Project) -> set[str]:
    """The images that others built here, or are to build; root's repositories read them."""
    if project.service.trusted: return set()
    # What a registry has, everybody may have; the label of compose is on it as well. containerd's
    # store gives a digest to what was built here, too.
    digests = "io.containerd.snapshotter.v1" not in str(project.api.facts("/info"))
    names = {tagged(image_of(name, key, service)) for name, model in project.context({}).models
             for key, service in compose_services(model).items() if service.get("build")}
    for row in project.api.listed("images", label=[PROJECT_LABEL]):
        if row["Labels"][PROJECT_LABEL] != project.name and not (digests and row["RepoDigests"]):
            names |= {*(row.get("RepoTags") or ()), *(row.get("RepoDigests") or ())}
    permitted = {entry[6:] for entry in project.service.allow if entry.startswith("image:")}
    return {name for name in names if not {name, repository_of(name)} & permitted}
def check_image_facts(facts: Json, closed: set[str]) -> str:
    """Why an image must not be run, or nothing: containers have its labels and health check."""
    config = facts.get("Config") or {}
    labels = config.get("Labels") or {}
    names = {*(facts.get("RepoTags") or ()), *(facts.get("RepoDigests") or ())}
    if names & closed or not names: return "was built by another service, or has no name"
    if any(name.startswith("io.pgod.") or name == REPLACE_LABEL for name in labels):
        return "has a label that is pgod's or compose's own"
    if sum(map(len, itertools.chain(*labels.items()))) > LABEL_TEXT:
        return f"has over {LABEL_TEXT >> 10} KiB of labels"
    often = 0 < (config.get("Healthcheck") or {}).get("Interval", 0) < LEAST_INTERVAL * 1e9
    return f"has a health check more often than each {LEAST_INTERVAL} s" if often else ""
def bound_links(project: Project, containers: Iterable[Container], tree: Tree) -> list[str]:
    """Why the tree must not be put beneath these: their next restart would follow a link."""
    if project.service.trusted: return []
    return sorted({f"{bind.compose_service}: {relative}, which is mounted now, {why}"
                   for container in containers for bind in container.binds
                   if (relative := beneath(bind.source, str(project.paths.worktree)))
                   and (why := link_above(relative, tree))})
def run_by_hand(project: Project, model: Model, digests: Json) -> dict[str, str]:
    """The digests of what somebody else started, just as compose would start it now."""
    rows = project.api.listed("containers", label=[f"{PROJECT_LABEL}={project.name}"])
    there = [row["Labels"] for row in rows]
    if all(DIGEST_LABEL in labels for labels in there): return {}
    project.compose.write_model("render.json", with_value_names(model))
    result = project.compose.run("config", "--hash", "*", deadline="docker", model="render.json")
    hashes = dict(re.findall(r"(?m)^(\S+) (\w+)$", result.stdout.decode()))
    right = defaultdict[str, set[bool]](set)
    for labels in there:
        name, made = labels.get(SERVICE_LABEL), labels.get("com.docker.compose.config-hash")
        right[name].add(DIGEST_LABEL not in labels and made == hashes.get(name))
    return {name: digest for name, digest in digests.items() if right[name] == {True}}
def make_release(project: Project, commit: str, model: Model, tree: Tree) -> Release:
    """The release of a checked model; its images are not known yet. Raises Refused."""
    values, current = read_values(project, model), project.store.current
    generated = {path: digest_of(text, b"") for path, text in import_of(project).items()}
    files, key = Files(tree, str(project.paths.worktree), generated), project.store.digest_key()
    inputs = input_digests(model, files, key)
    digests = {name: digest_of(service_facts(model, name, files, values), key)
               for name in compose_services(model)}
    adopted = (current.adopted if current else {}) or run_by_hand(project, model, digests)
    return Release(commit, project.configuration(), project.name,
                   with_labels(with_value_names(model), digests, adopted), digests,
                   inputs, values=values, adopted=adopted)
def prepare(project: Project, commit: str) -> Prepared:
    """Export, render and check a commit. Raises Refused."""
    tree = project.git.export(commit, spare=True)
    model, notes = render(project, tree)
    enforce(project, model, tree, notes)
    # It counts what is bound before anything goes through all of that.
    release = make_release(project, commit, model, tree)
    keys, ignored = project.git.public_keys(tree)
    notes += [f"key ignored: {why}" for why in ignored] or (
        [] if keys else ["no key is in ssh/: nobody can steer this service with pgoctl"])
    notes += itertools.islice(not_followed(project, model, tree), 20)
    wrong = [*unfit(project, model, tree),
             *(f"ssh/ has no usable key: {why}" for why in ignored if not keys),
             *(foreign_frontends(project, model) if not project.service.trusted else ()),
             *bound_links(project, project.api.containers(project.name), tree)]
    if wrong: raise Refused("; ".join(wrong))
    # Built is from the export alone, also where the file names the work tree itself.
    rendered = moved_paths(model, str(project.paths.worktree), str(project.paths.export))
    return Prepared(replace(release, notes=tuple(notes)), tree, rendered)
REFUSES = "the policy refuses it"
def prepare_or_give_up(project: Project, commit: str, asked: bool) -> Prepared:
    """As `prepare`. Raises Refused, also where pgod was killed at it twice, unless `asked`."""
    store, times = project.store, 0 if asked else project.store.looks.get(commit, 0)
    if times >= LOOKS: raise Refused(f"pgod was killed {times} times while it looked at it")
    store.note(looks={commit: times + 1})
    try:
        return prepare(project, commit)
    finally:
        store.note(looks={})
def forget_builds(project: Project, former: Release | None, *kept: Release | None) -> None:
    """The names of what a release built and others do not lead nowhere: each costs all others."""
    # The engine tells the labels of all images wherever it is asked for some, up to a size.
    def built(releases: Iterable[Release | None]) -> set[str]:
        return {name for release in releases if release
                for key, service in compose_services(release.model).items() if service.get("build")
                for name in (release.image_names[key], *(service["build"].get("tags") or ()))}
    for name in built([former]) - built(kept):
        with suppress(Fault): project.api.untag(name)
def fetch_images(project: Project, prepared: Prepared, say: Progress) -> Prepared:
    """Pull and build what the release needs. Raises Fault if an image is not there then."""
    services, release = compose_services(prepared.rendered), prepared.release
    project.compose.write_model("render.json", with_own_cache(
        with_value_names(prepared.rendered), project.name))
    if theirs := sorted({*map(tagged, release.image_names.values())} & built_by_others(project)):
        raise Refused(f"image {', '.join(theirs)} was built by another service; an administrator "
                      f"permits it with allow = {json.dumps([f'image:{name}' for name in theirs])}")
    to_pull = [name for name, service in services.items()
               if not service.get("build") and service.get("pull_policy") != "never"]
    trouble = project.compose.pull(to_pull, project.api.disk()) if to_pull else ""
    if any(service.get("build") for service in services.values()):
        project.compose.build((), built_by_others(project), project.api.disk())
        say("built")
    closed = built_by_others(project)  # others have built meanwhile
    facts = {name: project.api.image(name) for name in sorted({*release.image_names.values()})}
    if missing := [name for name, found in facts.items() if not found]:
        raise Fault(f"image {', '.join(missing)} cannot be pulled and is not on this server"
                    f"{': ' + trouble if trouble else ''}")
    text = sum(len(json.dumps(part(found, "Config", "Labels"))) for found in facts.values())
    if text > 4 * LABEL_TEXT and not project.service.trusted:
        raise Refused(f"the images have over {4 * LABEL_TEXT >> 10} KiB of labels in all")
    if bad := [f"image {name} {why}" for name, found in facts.items()
               if (why := check_image_facts(found, closed)) and not project.service.trusted]:
        raise Refused("; ".join(bad))
    if trouble: say(f"could not pull, using the copies on this server: {trouble}")
    pulled = {name: digest for name, found in facts.items()
              for digest in found.get("RepoDigests") or ()
              if repository_of(digest).endswith(repository_of(name))}
    return replace(prepared, release=replace(
        release, images={name: str(found["Id"]) for name, found in facts.items()}, pulled=pulled))
def attached_to(project: Project, network: Json) -> list[str]:
    """The project's containers on a network. Raises Refused where those of others are on it."""
    attached = project.api.listed("containers", network=[str(network["Id"])])
    if others := [row["Names"][0].lstrip("/") for row in attached
                  if (row.get("Labels") or {}).get(PROJECT_LABEL) != project.name]:
        raise Refused(f"network {network['Name']} must be made anew, and containers of others are "
                      f"on it: {', '.join(sorted(others))}")
    return [str(row["Id"]) for row in attached]
def port_taken(host: str, port: int, protocol: str) -> bool:
    """Whether something on this machine listens there."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:  # connections of before do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(ipaddress.ip_address(host)) if host else "", port))
        except (OSError, ValueError) as error:  # what is no address, compose refuses
            return isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    return False
def ports_of(model: Model) -> set[tuple[str, int, str]]:
    """The addresses that a project publishes: host ("" is any), port and protocol."""
    return {(str(item.get("host_ip") or ""), int(item["published"]), str(item.get("protocol")))
            for service in compose_services(model).values() for item in service.get("ports") or ()
            if str(item.get("published") or "0").isdigit()} - {("", 0, "tcp")}
def lacking(project: Project, model: Model, snapshot: Snapshot) -> Iterator[str]:
    """What only somebody else can bring about; it is tried again by itself until he has."""
    for kind, there in (("network", {*snapshot.networks}), ("volume", set[str]())):
        for key, entry in part(model, f"{kind}s").items():
            name = str((entry or {}).get("name") or key)
            if (entry or {}).get("external") and name not in there and not (
                    kind == "volume" and project.api.facts(f"/volumes/{name}")):
                yield f"{kind} {name} does not exist: docker {kind} create {name} makes it"
    if not project.api.address[1]:  # the engine is on this machine
        ours = {port for container in snapshot.containers for port in container.ports}
        for host, port, protocol in sorted(ports_of(model)):
            if f"{port}/{protocol}" not in ours and port_taken(host, port, protocol):
                yield f"port {port}/{protocol} is in use on this server"
def twin_of(project: Project, release: Release) -> str:
    """A project that is run by hand and looks like this one; empty if there is none."""
    ours = {service.name for service in project.shared.configuration.services}
    images, uses = defaultdict[str, set[Any]](set), defaultdict[str, set[Any]](set)
    for row in project.api.listed("containers", label=[PROJECT_LABEL]):
        other = (labels := row["Labels"])[PROJECT_LABEL]
        if other not in ours and DIGEST_LABEL not in labels:
            images[other].add((labels.get(SERVICE_LABEL), row["Image"]))
            uses[other] |= {str(mount.get("Name", "")).removeprefix(f"{other}_")
                            for mount in row.get("Mounts") or ()}
            uses[other] |= {port.get("PublicPort") for port in row.get("Ports") or ()}
    mine = {*part(release.model, "volumes"), *(port for _, port, _ in ports_of(release.model))}
    return next((name for name in images if images[name] == {*release.image_names.items()}
                 and mine & uses[name] and f"beside:{name}" not in project.service.allow), "")
def refuse_what_cannot_be(project: Project, prepared: Prepared, snapshot: Snapshot) -> None:
    """What would fail when half of it is done. Raises Refused, or Fault where it will pass."""
    release, paths = prepared.release, project.paths
    tracked = project.store.tracked()
    with as_user(project.account):
        conflicts = worktree_conflicts(paths.worktree, paths.export, tracked, prepared.tree)
    if conflicts:
        raise Refused("the commit would overwrite untracked files; move or remove them: "
                      + ", ".join(map(printable, conflicts[:10])))
    if not (project.store.current or snapshot.containers) and (twin := twin_of(project, release)):
        raise Refused(f"project {twin} looks like this stack, and runs already: with name = "
                      f"\"{twin}\" it is taken over; to have both: allow = [\"beside:{twin}\"]")
    if volumes := [*compare_volumes(release, snapshot)]:
        raise Refused("; ".join(map(str, volumes)) + "; it holds data, so pgod does not make it "
                      "anew: give the volume another name, or remove it by hand")
    owners = {name: part(facts, "Labels").get(PROJECT_LABEL, project.name)
              for name, facts in snapshot.volumes.items()}
    if theirs := [f"volume {name} is of {owner}" for name, owner in owners.items()
                  if owner != project.name and f"volume:{name}" not in project.service.allow]:
        raise Refused("; ".join(theirs))
    for name in changed_networks(release, snapshot).values():
        attached_to(project, snapshot.networks[name])
    if lacks := [*lacking(project, release.model, snapshot)]: raise Fault("; ".join(lacks))
    if paused := [c.name for c in snapshot.containers if c.status == "paused"]:
        raise Fault(f"{', '.join(paused)} is paused by hand; once docker unpause has ended "
                    "that, it is tried again")
def keep_images(project: Project, *releases: Release | None) -> None:
    """Have a tag of pgod's own on each image of these releases, and on no other one."""
    prefix = f"{KEEP_NAME}:{project.name}."
    wanted = {prefix + hashlib.sha256(identity.encode()).hexdigest()[:16]: identity
              for release in releases if release for identity in release.images.values()}
    have = project.api.kept(project.name)
    for name in {*wanted} - have:
        with suppress(NotThere): project.api.tag(wanted[name], name)
    for name in have - {*wanted}: project.api.untag(name)
def restore_images(project: Project, release: Release, wanted: Iterable[str]) -> Release:
    """Have the images of these compose services; the names of what it builds lead to them again."""
    # One that is gone is pulled again by its digest, or built again; the release with what came of
    # that. A name that was pulled is everybody's, and stays where it leads. Raises Fault.
    images, services = dict(release.images), compose_services(release.model)
    for name in sorted({release.image_names[service] for service in wanted}):
        identity, digest = images.get(name, ""), release.pulled.get(name)
        builders = [service for service, image in release.image_names.items()
                    if image == name and services[service].get("build")]
        if identity and project.api.image(identity):
            if builders and "@" not in name: project.api.tag(identity, name)
            continue
        if builders:
            project.git.export(release.commit)
            project.compose.write_model("render.json", with_own_cache(moved_paths(
                release.model, str(project.paths.worktree), str(project.paths.export)),
                project.name))
            project.compose.build(builders, built_by_others(project), "")
        elif digest:
            project.compose.login()
            project.compose.docker("pull", "--quiet", "--", digest).check("pull")
        images[name] = str(project.api.image(name if builders else digest or name).get("Id", ""))
        if not images[name]: raise Fault(f"image {name} is gone and cannot be had again")
        project.say(f"image {name} was gone, and is there again")
    return replace(release, images=images)
def make_binds(project: Project, model: Model, say: Progress) -> None:
    """Look at every bound path, by no link; make missing folders, as the user. Raises Refused."""
    for bind, root in itertools.product(binds_of(model), project.paths.roots):
        relative, folder = beneath(bind.source, str(root)), bind.kind == "bind"
        if not relative: continue
        *parts, name = relative.split("/")
        try:
            with (as_user(project.account), folder_beneath(root, parts, make=folder) as parent):
                if folder:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o755, dir_fd=parent)
                        say(f"{bind.compose_service}: made the folder {bind.source}")
                mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            raise Refused(f"{bind.compose_service}: {bind.kind} {bind.source} is missing") from None
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise Refused(f"{bind.compose_service}: {bind.source} is a link or a device; remove it")

@dataclass
class Installation:
    """Puts one release in place: files, networks, containers. What it does can be done again."""
    project: Project
    release: Release
    say: Progress
    def update_files(self, tree: Tree, containers: Iterable[Container], strict: bool) -> None:
        """Tracked files follow the commit. Raises Refused if it is to be `strict`."""
        # The list of them never lacks one that is there. A rollback takes what it can get.
        project, paths = self.project, self.project.paths
        tracked = project.store.tracked()
        mounted = [bind for container in containers for bind in container.binds]
        sources = (beneath(bind.source, str(paths.worktree))
                   for bind in (*binds_of(self.release.model), *mounted))
        if tracked != tree:
            project.store.set_tracked(
                {path: tree[path] if tracked.get(path) == tree.get(path) else ("", "")
                 for path in {*tracked, *tree}})
        with as_user(project.account):
            failures = update_worktree(paths.worktree, paths.export, tracked, tree,
                                       frozenset(filter(None, sources)))
        if failures and strict: raise Refused("; ".join(failures[:5]))
        for failure in failures: log.warning("%s: left as it is: %s", project.name, failure)
        if tracked != tree: project.store.set_tracked(tree)
    def guard(self, containers: Sequence[Container]) -> None:
        """Nothing is started beside a container that can write above a path that it binds."""
        # It could put a link there, and the next start of the other one would follow it as root.
        # It is removed: also of a stopped one the engine's restart policy asks nobody.
        binds = binds_of(self.release.model)
        permitted = {(bind.source, above.source) for bind, above in nested_binds(binds, binds)}
        def race(beneath: Sequence[Bind], writers: Sequence[Bind]) -> bool:
            return any((bind.source, above.source) not in permitted
                       for bind, above in nested_binds(beneath, writers))
        containers = [self.project.api.with_devices(container) for container in containers]
        known = [*binds, *(bind for container in containers for bind in container.binds)]
        every_bind = [*{(bind.source, bind.read_only): bind for bind in known}.values()]
        racing = sorted(c.identity for c in containers if race(every_bind, c.binds)
                        or race(c.binds, every_bind))
        self.project.api.stop(racing)
        self.project.api.remove(racing)
        make_binds(self.project, self.release.model, self.say)
    def remove_half_made(self, snapshot: Snapshot) -> None:
        """Remove what was created and cannot be filled or started; never start it half-made."""
        # compose creates the new container as ID_NAME with the volumes of the old one, removes
        # that, and renames: where the old one is gone, the new one alone holds its volumes.
        api, names = self.project.api, {c.name for c in snapshot.containers}
        for container in snapshot.containers:
            if container.status != "created": continue
            match = re.fullmatch(r"[0-9a-f]{12}_(.+)", container.name)
            if match and match[1] not in names:
                api.act("POST", f"/containers/{container.identity}/rename", {"name": match[1]})
            elif match or not container.replaces:
                api.remove([container.identity], volumes=not match)
    def remove_heirs(self, snapshot: Snapshot) -> None:
        """Remove containers whose bind mount would outlive the model that had it."""
        services, images = compose_services(self.release.model), self.release.image_names
        for container in snapshot.containers:
            service = services.get(container.compose_service)
            if not service or not container.binds: continue
            image = self.project.api.image(images[container.compose_service])
            if inherits_bind(container.binds, service, part(image, "Config", "Volumes")):
                self.project.api.remove([container.identity])
    def remove_networks(self, names: Iterable[str], snapshot: Snapshot) -> None:
        """Take everything off networks that are to be made anew; compose would do it otherwise."""
        api = self.project.api
        for network in (snapshot.networks[name] for name in names):
            for container in attached_to(self.project, network):
                api.act("POST", f"/networks/{network['Id']}/disconnect",
                        body={"Container": container, "Force": True})
            api.act("DELETE", f"/networks/{network['Id']}")
    def cure(self, rows: Sequence[Row], snapshot: Snapshot) -> None:
        """Do what removes these rows, and nothing else. Raises Fault."""
        project, cure = self.project, plan_cure(self.release, rows, snapshot)
        if not cure: return
        project.api.stop(cure.remove)
        project.api.remove(cure.remove)
        self.guard(snapshot.containers)
        if cure.up:
            self.release = restore_images(project, self.release, cure.up)
            self.remove_half_made(snapshot)
            self.remove_heirs(snapshot)
            self.remove_networks(cure.networks, snapshot)
        self.write_model()
        if cure.up:
            values = {VALUE_PREFIX + name: text for name, text in self.release.values.items()}
            project.compose.up(cure.up, values, cure.force)
        if cure.restart:
            project.compose.run("restart", "--no-deps", "--", *cure.restart,
                                deadline="up").check("restart")
    def write_model(self) -> None:
        """The model, for compose, as it fits the networks and names of images that are there."""
        # An image goes by its identity where its name leads to another one by now.
        project, release = self.project, self.release
        model = with_network_labels(project.name, release.model, project.api.networks()[0])
        there = project.api.images(release.image_names.values())
        for name, service in compose_services(model).items():
            identity = release.images.get(image := release.image_names[name])
            service |= {"image": identity} if identity and there.get(image) != identity else {}
        project.compose.write_model("model.json", model)

def describe(rows: Iterable[Row], release: Release, former: Release | None) -> dict[str, str]:
    """For each compose service: what is done to it and why, in words."""
    changes, old = dict[str, str](), former.model if former else {}
    for row in (row for row in rows if row.how.does):
        name, new = row.compose_service, row.compose_service not in compose_services(old)
        if row.kind == "extra" or (row.kind == "missing" and new):
            changes.setdefault(name, row.how.does)
        elif row.kind == "digest":
            changes[name] = f"{row.how.does}: {why_changed(old, release.model, name)}"
        else:
            changes.setdefault(name, f"{row.how.does}: {row}")
    return changes

@dataclass
class Reconciler:
    """Makes what runs what should run, for one project: deploy, roll back, heal, stop."""
    # In the service's thread. `pause` is Worker's, as is `publish`, which shows what is known.
    project: Project
    store: Store
    pause: Callable[[float], None]
    publish: Callable[[], None]
    snapshot: Snapshot = Snapshot()  # the last one
    rows: tuple[Row, ...] = ()  # of the current release with it
    was_stopped: bool = False  # what ended meanwhile was stopped, and is no job that is done
    @property
    def release(self) -> Release:
        assert self.store.current
        return self.store.current
    def look(self) -> tuple[Row, ...]:
        """Ask the engine, and compare with the current release. Raises Fault."""
        current = self.store.current
        self.snapshot = self.project.snapshot(current)
        if current:
            hold = self.store.hold()
            self.was_stopped = self.was_stopped or bool(hold and hold.stops)
            if not self.was_stopped:
                self.store.note(done=note_done(current, self.snapshot, self.store.done))
            self.rows = compare(current, self.snapshot, self.store.done)
            self.was_stopped = self.was_stopped and bool(hold or self.rows)
        else:
            self.rows = ()
        self.publish()
        return self.rows
    def cure(self, rows: Sequence[Row], say: Progress) -> None:
        """Remove rows of the current release. Raises Fault."""
        installation = Installation(self.project, self.release, say)
        try:
            installation.cure(rows, self.snapshot)
        except Fault:
            with suppress(Fault): installation.remove_half_made(self.project.snapshot(self.release))
            raise
        finally:
            self.was_stopped = False
        if installation.release != self.release: self.store.set_current(installation.release)

    # A deploy, step by step:
    def deploy(self, decision: Decision, say: Progress, by: str, asked: bool) -> None:
        """From a commit to containers that are well, or back. Raises Fault."""
        began, commit, service = self.project.clock(), decision.commit, self.project.service
        prepared: Prepared | None = None
        with deploy_slot(self.project.shared, service.user):
            try:
                prepared = prepare_or_give_up(self.project, commit, asked)
                waits = part(prepared.rendered, "x-pgo").get("reload") is False
                if waits and self.store.current and not asked:
                    failure = Failure(commit, prepared.release.configuration,
                                      "x-pgo: reload: false", waits=True)
                    if self.store.note(failure=failure):
                        self.project.say(f"{failure}: {failure.reason}")
                    return
                say(f"deploys {short(commit)}: {'; '.join(decision.reasons)}")
                for note in prepared.release.notes: say(f"note: {note}")
                prepared = fetch_images(self.project, prepared, say)
                self.snapshot = self.project.snapshot(prepared.release)
                refuse_what_cannot_be(self.project, prepared, self.snapshot)
                if hold := self.store.hold():
                    say(str(hold))
                    return
            except EngineGone:
                raise
            except Fault as fault:
                built = prepared.release if prepared else None
                forget_builds(self.project, built, self.store.current, self.store.good)
                self.record_failure(commit, fault, fault.retry, by, began)
                raise
            changed, current = self.project.clock(), self.store.current
            release = replace(prepared.release, ill=self.ill_before())
            changes = describe(compare(release, self.snapshot, self.store.done), release, current)
            for name in {*release.adopted} & {*release.digests} if not current else ():
                changes.setdefault(name, "already runs, taken over")
            for name, change in changes.items(): say(f"{name}: {change}")
            with self.project.shared.naming:
                # A neighbour may have taken a name since the policy looked.
                taken = [str(found) for found in check_inner_names(
                    release.model, self.project.context({})) if found.allow not in service.allow]
                if taken and not service.trusted: raise Refused("; ".join(taken))
                self.store.set_current(release)
            files, made = self.install(prepared.tree, say)
        if trouble := files or self.settle(say, made):
            self.fail(commit, trouble, say, by, began, changed, [*changes])
        self.record_success(by, began)
        say(f"runs {short(commit)}, healthy after {self.project.clock() - began:.1f} s")
    def ill_before(self) -> tuple[str, ...]:
        """The containers that are ill before a deploy. Where one was cut short, before that one."""
        current = self.store.current
        if not current or not current.since: return current.ill if current else ()
        rows = compare(current, self.snapshot, self.store.done)
        return tuple(row.container.identity for row in rows if row.container and row.how.ill)
    def attempt(self, act: Callable[[], object]) -> Fault | None:
        """Why it failed. EngineGone and Stopping are no fault of any commit, and raised."""
        try:
            act()
        except EngineGone:
            raise
        except (Fault, OSError) as error:
            self.project.snapshot(None)  # raises EngineGone
            fault = error if isinstance(error, Fault) else Fault(str(error))
            # What failed for the machine's sake, as a full disk, is tried again by itself.
            fault.retry = isinstance(error, OSError)
            return fault
        return None
    def install(self, tree: Tree, say: Progress,
                strict: bool = True) -> tuple[Fault | None, Fault | None]:
        """Files and containers of the current release; why the first, and the second, failed."""
        release = self.release
        def put_files() -> None:
            keep_images(self.project, release, self.store.good)
            installation = Installation(self.project, release, say)
            installation.update_files(tree, self.snapshot.containers, strict)
            write_import(self.project)
            installation.write_model()
        if trouble := self.attempt(put_files): return trouble, None
        rows = compare(release, self.snapshot, self.store.done)
        return None, self.attempt(lambda: self.cure(rows, say))
    def settle(self, say: Progress, trouble: Fault | None) -> Fault | None:
        """Wait until nothing differs, and cure what comes up meanwhile; why it did not end well."""
        # After a compose that failed, what it made decides: all may be well after a restart.
        until, told, cures = self.project.clock() + self.project.service.wait, "", 0
        before = {c.identity: c.restarts for c in self.snapshot.containers}
        while True:
            if unseen := self.attempt(self.look): return unseen
            over = self.project.clock() > until
            verdict, why = judge(self.rows, before, self.release.ill, self.snapshot.now, over)
            if verdict == "good": return None
            if verdict == "bad":
                wait = format_duration(self.project.service.wait)
                return trouble or Refused(why if not over else (
                    f'{why} after {wait}; an administrator allows more with wait = "…" in pgo.toml'
                ))
            if any(row.how.cure for row in self.rows):
                waits = any(row.how.waits for row in self.rows)
                if not waits and (trouble or cures >= 3):  # each may bring about the next
                    return trouble or Refused(why)
                cures += 1
                trouble = self.attempt(lambda: self.cure(self.rows, say))
            if why != told: say(f"waits: {why}")
            told = why
            self.pause(1.0)
    def record_success(self, by: str, began: float) -> None:
        release, good = self.release, self.store.good
        same = good is not None and good.commit == release.commit
        since = good.since if good and same else time.time()
        if not same: self.project.git.git("update-ref", "refs/pgod/good", release.commit)
        forget_builds(self.project, good, release)
        told = [(line.get("commit"), line.get("outcome")) for line in self.store.history()[-1:]]
        if same or told != [(release.commit, "deployed")]:  # a kill may have come behind it
            self.append_history(release.commit, by, began, "deployed", "")
        self.store.set_current(replace(release, since=since, ill=()), good=True)
        self.store.note(failure=None)
        self.publish()
    def record_failure(self, commit: str, fault: Fault, retry: bool, by: str, began: float) -> None:
        failure = Failure(commit, self.project.configuration(),
                          redact(str(fault), self.project.service.secrets), retry)
        if failure != self.store.failure:
            self.append_history(commit, by, began, "failed", str(fault), fault.words)
            self.store.note(failure=failure)
            self.publish()
    def fail(self, commit: str, fault: Fault, say: Progress, by: str, began: float,
             changed: float, names: Sequence[str]) -> NoReturn:
        """After a bad deploy: back to the last good release, if there is one. Raises Refused."""
        with suppress(Fault, OSError):
            text = self.project.last_words(self.rows)
            fault.words = text.splitlines()[-10:]
            self.store.keep_words(commit, text)
        self.record_failure(commit, fault, fault.retry or not self.store.good, by, began)
        say(f"failed: {fault}")
        if self.store.good and self.project.service.rollback:
            self.roll_back(say)
            down = f"; {', '.join(names)} was down for {self.project.clock() - changed:.1f} s"
            say(f"rolled back to {short(self.store.good.commit)}{down if names else ''}")
        refused = Refused(f"{short(commit)}: {fault}")
        refused.words = fault.words
        raise refused
    def roll_back(self, say: Progress) -> None:
        """Work tree, images and containers of the last good release. Raises Fault."""
        good, current = self.store.good, self.store.current
        assert good
        try:
            tree = self.project.git.export(good.commit)
            self.snapshot = self.project.snapshot(good)
            if linked := [container.identity for container in self.snapshot.containers
                          if bound_links(self.project, [container], tree)]:
                self.project.api.remove(linked)
                self.snapshot = self.project.snapshot(good)
            ill = current.ill if current else ()
            self.store.set_current(replace(good, since=0.0, ill=ill))
            files, made = self.install(tree, say, strict=False)
            if trouble := files or self.settle(say, made): raise trouble
        except (EngineGone, Held):
            raise
        except (Fault, OSError) as error:
            to = short(good.commit)
            raise Fault(f"ROLLBACK to {to} FAILED, will be tried again: {error}") from None
        self.store.set_current(replace(self.release, since=good.since, ill=()), good=True)
        forget_builds(self.project, current, good)
        self.project.shared.metrics.add("pgo_service_rollbacks_total", service=self.project.name)
        log.warning("%s: rolled back to %s", self.project.name, short(good.commit))
    def append_history(self, commit: str, by: str, began: float, outcome: str, reason: str,
                       words: Sequence[str] = ()) -> None:
        author, subject = self.project.git.describe(commit)
        seconds = round(self.project.clock() - began, 1)
        self.store.append_history({
            "time": round(time.time(), 3), "commit": commit, "author": author,
            "subject": subject, "by": by, "seconds": seconds, "outcome": outcome,
            "reason": redact(reason, self.project.service.secrets), "words": [*words]})
        metrics, name = self.project.shared.metrics, self.project.name
        metrics.add("pgo_service_deploys_total", service=name, outcome=outcome)
        metrics.set("pgo_service_last_deploy_duration_seconds", seconds, service=name)
        metrics.observe(name, seconds)

    # Besides deploys:
    def stop(self, decision: Decision) -> None:
        self.project.say(f"stops what runs: {'; '.join(decision.reasons)}")
        self.project.compose.run("stop", "--", *decision.services, deadline="up")
        self.look()
    def bring_up(self, say: Progress) -> None:
        self.look()
        made = self.attempt(lambda: self.cure(self.rows, say))
        if trouble := self.settle(say, made): raise trouble
    def await_ill(self, say: Progress) -> None:
        """Wait until also what was ill before is well. Raises Fault that names it."""
        until, told = self.project.clock() + self.project.service.wait, ""
        while rows := self.look():
            text, late = "; ".join(map(str, rows)), self.project.clock() > until
            if late or not any(row.how.ill or row.how.waits for row in rows):
                commit = short(self.release.commit)
                raise Fault(f"{commit} is deployed, but {text}, as it was before")
            if text != told: say(f"waits: {text}")
            told = text
            self.pause(1.0)

# ---- Set-up ------------------------------------------------------------------------------------
def set_up(project: Project) -> None:
    """The folders of a service, and the take-over of a checkout of the Go program. Raises Fault."""
    paths, account = project.paths, project.account
    make_folder(paths.own, 0o711)
    follow_user(project)
    removed = sorted((paths.own.parent / "removed").glob(f"{project.name}-????????T*"))
    if removed and not paths.worktree.exists():
        log.warning("%s: begins anew; what it had before it left the configuration is in %s",
                    project.name, removed[-1])
    make_folder(paths.worktree, 0o700, account)
    if not paths.data.exists(): make_folder(paths.data, 0o750, account)
    if project.service.mount and not paths.data.is_mount():
        parts = urllib.parse.urlsplit(project.service.mount)
        words = ["mount", "-t", "nfs", "-o", "rw,nosuid,nodev,hard", f"{parts.netloc}:{parts.path}"]
        project.shared.children.run(
            [*words, str(paths.data)], RunAs(project.name), deadline=DEADLINE["mount"],
            kind=("mount", "nfs")).check(f"mount of {project.service.mount}")
    project.git.prepare()
    project.compose.prepare()
    if project.store.current:
        with suppress(EngineGone):
            Installation(project, project.store.current, log.debug).write_model()
    if (paths.worktree / ".git").is_dir(): take_over(project)
def follow_user(project: Project) -> None:
    """Where `user` is another one than before: files of the commit and of git go to him."""
    root, git, account = project.paths.worktree, project.git.folder, project.account
    former = root.lstat().st_uid if root.exists() else account.uid
    if former != account.uid:
        chown_tracked(root, project.store.tracked(), former, account)
        chown_tracked(git, [str(path.relative_to(git)) for path in git.rglob("*")], former, account)
def take_over(project: Project) -> None:
    """Go on where the Go program stopped, touching neither its files nor its containers."""
    # Its .git goes last: until then, the next start begins again. No key in it is believed.
    if not project.store.current:
        try:
            adopt(project, project.git.take_over())
        except EngineGone:
            raise
        except Fault as fault:  # what runs stays as it is, and is not started again
            log.warning("%s: its checkout is not taken over: %s", project.name, fault)
    aside = project.paths.own / "taken-over.git"
    shutil.rmtree(aside, ignore_errors=True)
    (project.paths.worktree / ".git").rename(aside)
def adopt(project: Project, commit: str) -> None:
    """Take what runs for a good deploy of the commit. Raises Refused where the policy does."""
    tree = project.git.export(commit)
    project.store.set_tracked(tree)
    model, _ = render(project, tree)
    enforce(project, model, tree)
    release = make_release(project, commit, model, tree)
    names = release.image_names
    images = project.api.images(names.values()) | {
        names[c.compose_service]: c.image for c in project.api.containers(project.name)
        if c.compose_service in names}
    networks = {f"network {name}": digest
                for name, digest in network_digests(project.name, model).items()}
    project.store.set_current(replace(
        release, model=with_value_names(model), adopted={**release.digests, **networks},
        images=images, since=time.time()), good=True)
    keep_images(project, project.store.good)
    Installation(project, release, log.debug).write_model()
    log.info("%s: taken over at %s", project.name, short(commit))

# ---- Worker ------------------------------------------------------------------------------------
WATCH_SECONDS = 1.0  # between two looks at what is on its way

@dataclass(frozen=True)
class Job:
    """What a key holder asks a service's thread to do; `done` has the exit status."""
    command: str
    act: Callable[[Worker, Job], None]
    options: tuple[str, ...]
    operands: tuple[str, ...]
    by: str
    say: Progress  # to the one who asked
    tell: Progress  # and to the log
    done: Future[int] = field(default_factory=Future)

@dataclass(frozen=True)
class View:
    """What a service's thread shows to others, replaced as a whole. Times are monotonic."""
    wanted: str = ""
    release: Release | None = None
    failure: Failure | None = None
    configuration: str = ""
    containers: tuple[Container, ...] = ()
    rows: tuple[Row, ...] = ()
    keys: tuple[PublicKey, ...] = ()
    ignored: tuple[str, ...] = ()  # lines in ssh/ that are no keys
    remote_error: str = ""  # why the branch's newest commit is not known or cannot be had
    engine_error: str = ""  # why it is not known what runs
    last_error: str = ""
    failures: int = 0
    next_poll: float = 0.0
    last_success: float = 0.0  # seconds since the epoch
    @property
    def in_sync(self) -> bool:
        """Whether the newest commit runs, as it should."""
        release = self.release
        return bool(release and release.since and release.commit == self.wanted and not self.rows
                    and release.configuration == self.configuration and not self.engine_error)
    def state(self, hold: Hold | None) -> str:
        """One word for all of it; the first that is true."""
        failed = self.failure if self.failure and self.failure.commit == self.wanted else None
        words = {
            "unreachable": self.engine_error or self.remote_error,
            "stopped": hold and hold.stops, "held": hold,
            "deploying": self.release and not self.release.since,
            "unhealthy": any(row.how.ill for row in self.rows), "in sync": self.in_sync,
            "refused": failed and failed.reason.startswith(REFUSES), "failed": failed}
        return next((word for word, is_so in words.items() if is_so), "out of sync")
    def why(self, hold: Hold | None) -> str:
        if self.engine_error: return f"what runs is not known: {self.engine_error}"
        if hold: return str(hold)
        failure = self.failure
        if failure and failure.commit == self.wanted and not self.in_sync: return str(failure)
        if self.rows or self.remote_error or self.in_sync:
            return "; ".join(map(str, self.rows)) or self.remote_error
        return self.last_error or ("deploying" if self.release and not self.release.since
                                   else "not looked at yet")

class Worker(threading.Thread):
    """The thread of one service. All that changes the service happens in it, one by one."""
    # It sleeps until its timer, a webhook, an event of the engine or a job wakes it.
    def __init__(self, service: Service, shared: Shared) -> None:
        super().__init__(name=service.name, daemon=True)
        self.service = service
        self.shared = shared
        self.project = Project(service, shared)
        self.store = self.project.store
        self.reconciler = Reconciler(self.project, self.store, self.pause, self.publish)
        self.was_held = False
        self.heal_after = -1e9  # what ends by itself is not brought back before
        self.watch_until = -1e9  # what is on its way is looked at until then
        wanted, keys, ignored = self.store.keys()
        self.view = View(wanted, keys=keys, ignored=ignored)  # set only by `publish`
        self._condition = threading.Condition()  # guards _wakes and _jobs
        self._wakes: set[str] = {"start"}
        self._jobs: deque[Job] = deque()
        self.publish()

    # From other threads:
    def wake(self, cause: str) -> None:
        with self._condition:
            self._wakes.add(cause)
            self._condition.notify()
    def ask(self, job: Job) -> Job:
        """Queue a job. Raises Refused where many wait."""
        with self._condition:
            if len(self._jobs) >= JOBS:
                raise Refused(f"{JOBS} commands wait already; try again later")
            self._jobs.append(job)
            self._condition.notify()
        return job
    def fresh_view(self) -> View:
        view = self.view
        try:
            snapshot = self.project.snapshot(view.release)
        except Fault as fault:
            return replace(view, containers=(), engine_error=str(fault))
        rows: tuple[Row, ...] = ()
        if view.release:
            hold = self.store.hold()
            done = self.store.done if hold and hold.stops else note_done(
                view.release, snapshot, self.store.done)
            rows = compare(view.release, snapshot, done)
        return replace(view, containers=snapshot.containers, rows=rows)

    # The thread:
    def run(self) -> None:
        prepared, shared = False, self.shared
        # A new one may want the ports of one that is being removed.
        while not (self.store.current or shared.removed.wait(0.2) or shared.stopping.is_set()): pass
        while not self.shared.stopping.is_set():
            job, wakes = self.next_turn()
            if self.shared.stopping.is_set() and not job: break
            try:
                if not prepared:
                    set_up(self.project)
                    prepared = True
                if job:
                    job.act(self, job)
                    job.done.set_result(0)
                elif wakes:
                    self.reconcile(frozenset(wakes), self.project.say,
                                   "webhook" if "webhook" in wakes else "timer")
            except Stopping:
                break
            except Exception as error:  # the thread's outermost line
                self.fail(error, job)
            finally:
                self.publish()
                if job and not job.done.done(): job.done.set_result(1)
        with self._condition:
            for waiting in self._jobs:
                waiting.say("pgod is ending; try again in a moment")
                waiting.done.set_result(1)
    def next_turn(self) -> tuple[Job | None, set[str]]:
        """The next job, or what it was woken by; sleeps until there is something."""
        with self._condition:
            while not self._jobs and not self._wakes and not self.shared.stopping.is_set():
                held, was_held, now = self.store.hold(), self.was_held, self.shared.clock()
                self.was_held, watching = bool(held), now < self.watch_until
                if was_held and not held:  # its time is over, or an administrator took it away
                    self._wakes.add("event")
                    break
                left = min(self.view.next_poll - now, WATCH_SECONDS if watching else 5.0)
                if left <= 0:
                    self._wakes.add("timer")
                elif not self._condition.wait(left) and watching: self._wakes.add("watch")
            if self._jobs: return self._jobs.popleft(), set()
            wakes, self._wakes = self._wakes, set()
            return None, wakes
    def pause(self, seconds: float) -> None:
        """Wait, less if the engine tells of something. Raises Stopping, and Held at a hold."""
        with self._condition:
            stop = [f"{job.command} by {job.by}" for job in self._jobs if job.act is job_stop]
            if "event" not in self._wakes and not self.shared.stopping.is_set() and not stop:
                self._condition.wait(seconds)
            self._wakes.discard("event")
        if self.shared.stopping.is_set(): raise Stopping
        if held := self.store.hold() or "".join(stop[:1]):
            raise Held(f"does not wait any longer: {held}")
    def publish(self, **facts: Any) -> None:
        self.view = replace(
            self.view, release=self.store.current, failure=self.store.failure,
            configuration=self.project.configuration(), rows=self.reconciler.rows,
            containers=self.reconciler.snapshot.containers, **facts)
    def fail(self, error: Exception, job: Job | None) -> None:
        """Log what went wrong once, count it, and put the next look off."""
        known = isinstance(error, Fault | OSError)
        text = redact(str(error), self.service.secrets)
        if job:
            job.say(f"failed: {text}" if known else "failed: an error of pgod, see its log")
            for line in getattr(error, "words", ()): job.say(f"  {line}")
        if isinstance(error, Held) or (job and isinstance(error, Refused)):
            asked = isinstance(error, Held) or (job and job.act in (job_load, job_plan))
            log.log(logging.INFO if asked else logging.ERROR, "%s: %s: %s", self.name,
                    f"{job.command} by {job.by}" if job else "deploy", text)
            if job and job.act in (job_up, job_pull) and not asked: self.publish(last_error=text)
            return
        # A minute without the engine does not put off the looks at git.
        failures = self.view.failures + (not isinstance(error, EngineGone))
        now = self.shared.clock()
        retry = getattr(error, "retry", True)
        later = self.view.next_poll if self.view.next_poll > now else self.next_poll(failures)
        if text != self.view.last_error or not known:
            again = f"; tried again in {format_duration(later - now)}" if retry else ""
            log.error("%s: failed: %s%s", self.name, text, again, exc_info=None if known else error)
        self.publish(last_error=text, failures=failures, next_poll=later)
    def next_poll(self, failures: int) -> float:
        delay = retry_delay(self.shared.settings.duration, failures, self.shared.chance())
        return self.shared.clock() + delay

    # A look:
    def reconcile(self, wakes: frozenset[str], say: Progress, by: str,
                  asked: bool = False) -> Decision:
        """Ask git, look at the engine, decide, act. Raises Fault; then the next is put off."""
        asking = asked or bool(wakes - {"event", "watch"})
        if asking: self.ask_remote(say if asked else log.debug)
        hold = self.end_hold()
        if (hold or asked or wakes - {"timer", "webhook"} or self.reconciler.rows
                or self.view.last_error or not self.shared.events_flow.is_set()):
            self.reconciler.look()
        decision = decide(self.situation(hold, asked))
        log.debug("%s: %s: %s", self.name, decision.action, "; ".join(decision.reasons))
        if decision.reasons == (CALM,) and self.store.failure:  # what failed was taken back
            self.store.note(failure=None)
        if decision.action == "deploy":
            self.reconciler.deploy(decision, say, by, asked)
        elif decision.action == "rollback":
            self.reconciler.roll_back(say)
        elif decision.action == "heal":
            self.heal(say)
        elif decision.action == "stop": self.reconciler.stop(decision)
        target = self.service.reload and self.shared.workers.get(self.service.reload.service)
        follow_import(self.project, target.project if target else None)
        if not any(row.how.waits for row in self.reconciler.rows): self.watch_until = -1e9
        if asking: keep_images(self.project, self.store.current, self.store.good)
        if asking and self.view.remote_error and not asked: raise Fault(self.view.remote_error)
        if asking:  # an event must not put polls off
            self.publish(failures=0, last_success=time.time(), next_poll=self.next_poll(0))
        if asking or decision.reasons == (CALM,): self.publish(last_error=self.view.remote_error)
        return decision
    def end_hold(self) -> Hold | None:
        """The hold in force; one whose time is over is removed."""
        hold = self.store.hold()
        with self.store.guard:  # a new one may come at this moment
            if not self.store.hold_of("hold") and self.store.hold_file("hold").exists():
                self.store.release("hold")
                self.project.say("hold ended: its time is over")
        return hold
    def ask_remote(self, say: Callable[..., None]) -> None:
        """Learn the branch's commit; fetch it, and the keys in it, if it is new."""
        git, found = self.project.git, ""
        try:
            found = git.ask()
            if found != self.view.wanted or not self.view.keys:
                found = str(git.repaired(git.fetch))
                keys, ignored = git.public_keys(git.export(found, spare=True))
                if ignored and not keys:  # such a commit is refused, and locks nobody out
                    keys = self.view.keys
                self.store.set_keys(found, keys, ignored)
                self.publish(wanted=found, keys=keys, ignored=ignored)
            self.publish(remote_error="")
        except Fault as fault:
            error = f"{short(found)} cannot be fetched: {fault}" if found else (
                f"the repository cannot be reached: {fault}")
            say(error)
            self.publish(remote_error=error)
    def situation(self, hold: Hold | None, asked: bool) -> Situation:
        store, looked = self.store, self.reconciler
        running = frozenset(c.compose_service for c in looked.snapshot.containers
                            if c.status in ("running", "restarting"))
        return Situation(self.project.configuration(), hold, self.view.wanted, store.current,
                         store.good, store.failure, looked.rows, running, asked,
                         self.shared.clock() >= self.view.next_poll, self.service.rollback)
    def heal(self, say: Progress) -> None:
        """Bring back what fell; what ends by itself or cannot be healed once an interval."""
        now, former = self.shared.clock(), self.heal_after
        rows = [row for row in self.reconciler.rows if row.how.cure
                and not (now < former and (row.kind == "ended" or self.view.last_error))]
        if not rows: return
        self.heal_after = now + self.shared.settings.duration
        self.watch_until = now + self.service.wait
        say(f"brings back: {'; '.join(map(str, rows))}")
        self.reconciler.cure(rows, log.debug)
        self.shared.metrics.add("pgo_service_heals_total", service=self.name)
        if not any(row.kind == "ended" for row in rows): self.heal_after = former
        self.reconciler.look()

# Of each container one is true: those that run are told by their health, where they have a check.
CONTAINER_STATES = ("running", "healthy", "unhealthy", "starting", "restarting", "paused", "exited",
                    "created", "removing", "dead")
def show_metrics(shared: Shared) -> None:
    """Set the gauges of every service, from what its thread shows."""
    metrics = shared.metrics
    for name, worker in shared.workers.items():
        view, release = worker.view, worker.view.release
        counts = Counter(c.health if c.status == "running" and c.health else c.status
                         for c in view.containers)
        rows: dict[str, list[tuple[dict[str, str], float]]] = {
            "in_sync": [({}, view.in_sync and shared.events_flow.is_set())],
            "held": [({}, worker.store.hold() is not None)],
            "consecutive_failures": [({}, view.failures)],
            "info": [({"commit": release.commit if release else "", "wanted": view.wanted}, 1)],
            "last_success_timestamp_seconds": [({}, view.last_success)] * bool(view.last_success),
            "containers": [({"state": state}, counts[state]) for state in CONTAINER_STATES]}
        for gauge, values in rows.items(): metrics.replace(f"pgo_service_{gauge}", name, values)
        for total in ("rollbacks", "heals"):
            metrics.add(f"pgo_service_{total}_total", 0, service=name)
        for outcome in ("deployed", "failed"):
            metrics.add("pgo_service_deploys_total", 0, service=name, outcome=outcome)
        metrics.observe(name, count=0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    pages = map(int, Path("/proc/self/statm").read_text().split()[:2])
    now = (used.ru_utime + used.ru_stime, *(count * resource.getpagesize() for count in pages),
           len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0], STARTED)
    for name, number in zip(PROCESS_METRICS, now, strict=True):
        metrics.set(f"process_{name}", number)

# ---- Commands ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ParsedCommand:
    """A parsed request: service, command, its options as (name, value) and what follows them."""
    service: str
    command: str
    options: tuple[tuple[str, str], ...] = ()
    operands: tuple[str, ...] = ()
    def words(self, hidden: bool = False) -> list[str]:
        """The options as words; `hidden`: without the values of -e."""
        valued = option_names(self.command)
        return [word for name, value in self.options for word in (
            name, "***" if hidden and name in ("-e", "--env") else value)[:1 + bool(valued[name])]]
    def option(self, *names: str) -> str | None:
        return next((value for name, value in reversed(self.options) if name in names), None)
    @property
    def compose_services(self) -> tuple[str, ...]:
        syntax = COMMANDS[self.command].operands
        return self.operands[:None if syntax == "[SERVICE...]" else syntax.startswith("SERVICE")]
    def audited(self) -> str:
        return shlex.join((*self.command.split(), *self.words(hidden=True), *self.operands))

# What a service's thread does:
def refuse_hold(worker: Worker) -> None:
    if held := worker.store.hold_of("hold"): raise Held(held.way_out)
def job_up(worker: Worker, job: Job) -> None:
    """Release a stop, deploy the newest commit, and fail where the deploy fails."""
    refuse_hold(worker)
    worker.store.release("stop")
    worker.reconcile(frozenset({"start"}), job.tell, job.by, asked=True)
    if worker.view.remote_error: raise Fault(worker.view.remote_error)
    if (hold := worker.store.hold()) and not worker.view.in_sync:
        raise Held(f"nothing was deployed: {hold}")
    worker.reconciler.await_ill(job.say)
def job_pull(worker: Worker, job: Job) -> None:
    """Fetch, and deploy if there is something new."""
    decision = worker.reconcile(frozenset({"timer"}), job.tell, job.by)
    release, failure = worker.store.current, worker.store.failure
    if decision.action == "nothing":
        job.say(f"{short(release.commit) if release else 'nothing runs'}: "
                f"{'; '.join(decision.reasons)}")
    if failure and failure.commit == worker.view.wanted and not failure.waits:
        raise Refused(f"{short(worker.view.wanted)} is not deployed: {failure.reason}")
    if not worker.store.hold() and not (failure and failure.waits):
        worker.reconciler.await_ill(job.say)
def job_stop(worker: Worker, job: Job) -> None:
    """The file goes first: nothing must bring back what is being stopped."""
    held = worker.store.hold_of("stop")
    if not held or not held.by_hand:
        worker.store.set_hold(Hold(job.by, "", time.time(), services=job.operands))
    log.info("%s: %s: by %s", worker.name, job.command, job.by)
    if not worker.store.current:
        job.say("nothing was deployed yet, and nothing will be until up")
        return
    worker.reconciler.look()
    run_compose(worker, job)
    if job.command == "down": worker.store.note(done={})
    worker.reconciler.look()
def job_start(worker: Worker, job: Job) -> None:
    refuse_hold(worker)
    worker.store.release("stop")
    require_release(worker)
    worker.reconciler.bring_up(job.say)
    job.say(f"runs {short(require_release(worker).commit)}, healthy")
def job_restart(worker: Worker, job: Job) -> None:
    refuse_hold(worker)
    if hold := worker.store.hold(): raise Held(hold.way_out)
    installation = Installation(worker.project, require_release(worker), job.say)
    worker.reconciler.look()
    installation.guard(worker.reconciler.snapshot.containers)
    run_compose(worker, job)
    job.say("restarted")
    worker.watch_until = worker.shared.clock() + worker.service.wait
    worker.reconciler.look()
def job_load(worker: Worker, job: Job) -> None:
    """Check the newest commit against the policy; change nothing."""
    worker.ask_remote(job.say)
    release = worker.store.current
    prepared = prepare(worker.project, worker.view.wanted or (release.commit if release else ""))
    for note in prepared.release.notes: job.say(f"note: {note}")
    job.say(f"{short(worker.view.wanted)}: the policy permits it")
def job_plan(worker: Worker, job: Job) -> None:
    """What would be done now and why; nothing is. Raises Refused with every violation."""
    worker.ask_remote(job.say)
    worker.reconciler.look()
    decision = decide(worker.situation(worker.store.hold(), asked=False))
    job.say(f"{decision.action}: {'; '.join(decision.reasons)}")
    current, project = worker.store.current, worker.project
    if decision.action != "deploy":
        if current and decision.action == "heal":
            for name, change in describe(worker.reconciler.rows, current, current).items():
                job.say(f"  {name}: {change}")
        return
    prepared = prepare(project, decision.commit)
    snapshot = project.snapshot(prepared.release)
    refuse_what_cannot_be(project, prepared, snapshot)
    release = replace(prepared.release, images=snapshot.images)
    changes = describe(compare(release, snapshot, worker.store.done), release, current)
    for note in release.notes: job.say(f"  note: {note}")
    for name in sorted({*compose_services(release.model), *changes}):
        job.say(f"  {name}: {changes.get(name, 'unchanged')}")
    old = {*current.volume_names} if current else {*release.volume_names}
    for volume in sorted({*release.volume_names} - old - {*snapshot.volumes}):
        job.say(f"  volume {volume}: created, empty")
    services = compose_services(prepared.rendered)
    for image in sorted({image for name, image in release.image_names.items()
                         if image not in snapshot.images and not services[name].get("build")}):
        job.say(f"  image to pull: {image}")
def require_release(worker: Worker) -> Release:
    if not worker.view.release: raise Refused("nothing was deployed yet; up does it")
    return worker.view.release
def refuse_unknown(worker: Worker, command: ParsedCommand) -> None:
    """Names of compose services that are none. Raises Refused."""
    if worker.view.release:
        known = compose_services(worker.view.release.model)
        if unknown := [name for name in command.compose_services if name not in known]:
            raise Refused(f"{command.command}: there is no compose service {unknown[0]!r}; "
                          f"there are: {', '.join(known)}")
def run_compose(worker: Worker, job: Job) -> None:
    """The compose command of the same name. Raises Fault."""
    require_release(worker)
    worker.project.compose.run(job.command, *job.options, "--", *job.operands, deadline="up",
                               on_line=job.say).check(job.command)

# What is answered at once:
def answer_journal(worker: Worker, command: ParsedCommand, by: str) -> str:
    raise Refused("journal is disabled; logs shows what the containers wrote")
def answer_help(worker: Worker, command: ParsedCommand, by: str) -> str:
    rows = []
    for name, entry in COMMANDS.items():
        options = [f"[{text.replace('=', ' ', 1)}]" for text in entry.options.split()]
        rows.append(f"{name:<9} {entry.help}")
        if options or entry.operands:
            rows.append(f"          {' '.join([*options, entry.operands]).strip()}")
    return "\n".join(rows)
def status_facts(worker: Worker, now: float, view: View) -> dict[str, Any]:
    """All that is known of a service, for programs. Times are seconds since the epoch."""
    hold, release, commit = worker.store.hold(), view.release, ""
    if release: commit = release.commit
    told = [line for line in worker.store.history() if line["commit"] == commit][-1:]
    return {
        "service": worker.name, "state": view.state(hold), "commit": commit,
        **{key: "".join(line[key] for line in told) for key in ("author", "subject")},
        "since": release.since if release else 0.0, "wanted": view.wanted,
        "in_sync": view.in_sync, "why": view.why(hold),
        "hold": asdict(hold) if hold else None, "last_error": view.last_error,
        "failures": view.failures,
        "next_poll": now + view.next_poll - worker.shared.clock(),
        "differences": [str(row) for row in view.rows],
        "keys": [str(key) for key in (*view.keys, *worker.shared.configuration.admins)],
        "notes": [*dict.fromkeys((*(release.notes if release else ()),
                                  *(f"key ignored: {why}" for why in view.ignored)))],
        "containers": [{"name": c.name, "service": c.compose_service, "status": c.status,
                        "health": c.health if c.status == "running" else "",
                        "restarts": c.restarts, "started": c.started} for c in view.containers]}
def render_status(facts: Json) -> str:
    now, since = time.time(), facts["since"]
    age = f" since {format_time(since)} ({format_duration(now - since)})" if since else ""
    rows = [("service", facts["service"]), ("runs", (short(facts["commit"]) or "nothing") + age),
            ("wanted", short(facts["wanted"]) or "not known yet"),
            ("in sync", "yes" if facts["in_sync"] and not facts["why"] else
             f"{'yes, but' if facts['in_sync'] else 'no:'} {facts['why']}")]
    if facts["last_error"] and facts["last_error"] not in facts["why"]:
        rows.append(("last error", facts["last_error"]))
    pause = format_duration(max(0, facts["next_poll"] - now))
    rows += [("git", f"is checked again in {pause}"), *(("note", text) for text in facts["notes"]),
             *(("key", text) for text in facts["keys"])]
    lines = [f"{name:<11}{text}" for name, text in rows]
    width = max([len(c["name"]) for c in facts["containers"]], default=0)
    for container in facts["containers"]:
        health = f", {container['health']}" if container["health"] else ""
        restarts = f", {container['restarts']} restarts" if container["restarts"] else ""
        lines.append(f"  {container['name']:<{width}}  {container['status']}{health}{restarts}")
    return "\n".join(lines)
def answer_status(worker: Worker, command: ParsedCommand, by: str) -> str:
    facts = status_facts(worker, time.time(), worker.fresh_view())
    return render_status(facts) if command.option("--json") is None else json.dumps(facts)
def answer_history(worker: Worker, command: ParsedCommand, by: str) -> str:
    lines = worker.store.history()[::-1][:int(command.option("-n") or 20)]
    if command.option("--json") is not None: return json.dumps(lines)
    return "\n".join(
        f"{format_time(line['time'])}  {short(line['commit'])}  {line['outcome']:<8} "
        f"{line['seconds']:>6.1f}s  {line['author']}: {line['subject']}  ({line['by']})"
        + (f"\n    {one_line(line['reason'])}" if line["reason"] else "")
        for line in lines) or "nothing was deployed yet"
def answer_why(worker: Worker, command: ParsedCommand, by: str) -> str:
    """What failed containers said: those that are not well now, or those of a failed commit."""
    commit = "".join(command.operands)
    if not commit and (now := worker.project.last_words(worker.fresh_view().rows)): return now
    if kept := worker.store.words(commit): return kept
    raise Refused(f"nothing is kept of {commit}" if commit else "no container has failed")
def answer_hold(worker: Worker, command: ParsedCommand, by: str) -> str:
    """Takes force at once, also for a deploy that has not begun to change anything."""
    span, now = command.option("--for"), time.time()
    try:
        until = 0.0 if span is None else now + parse_duration(span, 1)
        format_time(until)
    except (ValueError, OverflowError) as error:
        raise Refused(f"hold: --for: {error}") from None
    hold = Hold(by, printable(" ".join(command.operands))[:200], now, until, "hold")
    worker.store.set_hold(hold)
    log.info("%s: %s", worker.name, hold)
    return str(hold)
def answer_release(worker: Worker, command: ParsedCommand, by: str) -> str:
    if not worker.store.hold_of("hold"):
        hold = worker.store.hold()
        raise Refused(hold.way_out if hold else "there is no hold")
    worker.store.release("hold")
    log.info("%s: hold released by %s", worker.name, by)
    worker.wake("release")
    return "released"
@dataclass(frozen=True)
class Command:
    """What a key holder may say: one of `job`, `answer` or, for compose's own, neither."""
    # `options` as help shows them: names with | between them, and = before what they take.
    help: str
    options: str = ""
    operands: str = ""
    job: Callable[[Worker, Job], None] | None = None
    answer: Callable[[Worker, ParsedCommand, str], str] | None = None
TIMEOUT = "-t|--timeout=SECONDS"
COMMANDS: dict[str, Command] = {
    "up": Command("deploy the newest commit and wait until it is healthy",
                  "-d|--detach --wait", job=job_up),
    "down": Command("remove the containers, until up or start; volumes stay",
                    f"{TIMEOUT} --remove-orphans", job=job_stop),
    "stop": Command("stop containers, and all deploys and heals, until up or start", TIMEOUT,
                    "[SERVICE...]", job_stop),
    "start": Command("bring up what was deployed last, without a fetch", job=job_start),
    "restart": Command("restart the containers", f"{TIMEOUT} --no-deps", "[SERVICE...]",
                       job_restart),
    "ps": Command("list the containers",
                  "-a|--all -q|--quiet --services --format=FORMAT --filter=FILTER --status=STATUS "
                  "--no-trunc --orphans", "[SERVICE...]"),
    "pull": Command("pull the images", "-q|--quiet --include-deps --ignore-pull-failures",
                    "[SERVICE...]"),
    "logs": Command("show what the containers wrote",
                    "-f|--follow -n|--tail=LINES --since=TIME --until=TIME -t|--timestamps "
                    "--no-color --no-log-prefix --index=NUMBER", "[SERVICE...]"),
    "exec": Command("run a command in a container",
                    "-T|--no-TTY -i|--interactive -t|--tty -d|--detach -e|--env=NAME=VALUE "
                    "-u|--user=USER -w|--workdir=DIR --index=NUMBER",
                    "SERVICE COMMAND [ARGUMENT...]"),
    "load": Command("check the newest commit against the policy, change nothing", job=job_load),
    "git pull": Command("fetch, and deploy what is new", job=job_pull),
    "git hash": Command("print the commit that runs",
                        answer=lambda worker, *_: require_release(worker).commit),
    "ping": Command("answer pong", answer=lambda *_: "pong"),
    "plan": Command("show what would be done now and why, do nothing", job=job_plan),
    "status": Command("show what runs, since when, and why not the newest", "--json",
                      answer=answer_status),
    "history": Command("show the last deploys", "--json -n=COUNT", answer=answer_history),
    "why": Command("show what failed containers said last", "", "[COMMIT]", answer=answer_why),
    "hold": Command("stop deploys and heals, until release or for a time", "--for=DURATION",
                    "[REASON...]", answer=answer_hold),
    "release": Command("end a hold", answer=answer_release),
    "journal": Command("is disabled", answer=answer_journal),
    "help": Command("show the commands", answer=answer_help),
}
READ_COMMANDS = {"git hash", *"help history journal load logs ping plan ps status why".split()}
# Options that pgod sets itself, or that mean nothing without a terminal of the engine's.
DROPPED_OPTIONS = frozenset(("-T", "--no-TTY", "-i", "--interactive", "-t", "--tty"))
AUDIT_BYTES = 64 << 20  # of the audit log and of the one before it
USAGE_STATUS, DENIED_STATUS = 2, 1
# What an option takes: its form, and the words for that.
VALUE_FORMS = {"LINES": ("[0-9]{1,9}|all", "a number or all"), "COUNT": ("[0-9]{1,6}", "a number"),
               "NUMBER": ("[0-9]{1,6}", "a number"), "SECONDS": ("-?[0-9]{1,6}", "whole seconds"),
               "FORMAT": (PLAIN_TEMPLATE.pattern, "table, json or fields as {{.Name}}")}
def option_names(command: str) -> dict[str, str]:
    """The options of a command, with the name of what each takes."""
    return {name: text.partition("=")[2] for text in COMMANDS[command].options.split()
            for name in text.partition("=")[0].split("|")}
def parse_options(command: str, arguments: Sequence[str]
                  ) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Options by the table, and the operands. Raises Refused."""
    # All that follows exec's first operand belongs to the command that it runs.
    table = option_names(command)
    short_ones = "".join(name[1] + ":" * bool(valued) for name, valued in table.items()
                         if not name.startswith("--"))
    long_ones = [name[2:] + "=" * bool(valued) for name, valued in table.items()
                 if name.startswith("--")]
    split = getopt.getopt if command == "exec" else getopt.gnu_getopt
    try:
        found, operands = split([*arguments], short_ones, long_ones)
    except getopt.GetoptError as error:
        known = f"; it takes {', '.join(table)}" if table else "; it takes no options"
        raise Refused(f"{command}: {printable(error.msg)[:200]}{known}") from None
    for name, value in found:
        form, words = VALUE_FORMS.get(table[name], (r"[\s\S]*", ""))
        if not re.fullmatch(form, value):
            raise Refused(f"{command}: {name} takes {words}, not {printable(value)[:40]!r}")
    return (tuple((name, value) for name, value in found
                  if command != "exec" or name not in DROPPED_OPTIONS), tuple(operands))
def check_operands(command: ParsedCommand) -> ParsedCommand:
    """Names of compose services where the table has them. Raises Refused."""
    name, syntax = command.command, COMMANDS[command.command].operands
    if command.operands and not syntax: raise Refused(f"{name}: takes no arguments but options")
    if name == "exec" and len(command.operands) < 2:
        raise Refused("exec: write it like service//exec SERVICE COMMAND [ARGUMENT...]")
    if syntax == "[COMMIT]" and not re.fullmatch("([0-9a-f]{4,64})?", "".join(command.operands)):
        raise Refused(f"{name}: takes a commit, four digits of it at least")
    for operand in command.compose_services:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", operand) or operand.startswith("-"):
            raise Refused(f"{name}: {printable(operand)!r} is not a compose service")
    return command
def parse_command(text: str) -> ParsedCommand:
    """An exec request, `service//command argument…`. Raises Refused with what is wrong."""
    if len(text) > SSH_COMMAND_BYTES or "\0" in text:
        raise Refused("the command is too long, or has a NUL in it")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Refused(f"the command cannot be split into words: {error}") from None
    service, mark, command = words[0].partition("//") if words else ("", "", "")
    if not mark or not service or not command:
        raise Refused("write it like service//command; commands: " + ", ".join(COMMANDS))
    arguments = words[1:]
    if command == "git" and arguments: command, arguments = f"git {arguments[0]}", arguments[1:]
    if command not in COMMANDS:
        raise Refused(f"there is no command {printable(command)!r}{nearest(command, COMMANDS)}; "
                      f"commands: {', '.join(COMMANDS)}")
    if len(arguments) > SSH_ARGUMENTS: raise Refused(f"more than {SSH_ARGUMENTS} arguments")
    options, operands = parse_options(command, arguments)
    return check_operands(ParsedCommand(service, command, options, operands))
def compose_command(command: ParsedCommand, terminal: bool) -> list[str]:
    """The words of compose for a command: its options, then --, then the operands."""
    fixed = ["-T"] if command.command == "exec" and not terminal else []
    return [command.command, *fixed, *command.words(), "--", *command.operands]
def audit(directory: Path, **facts: object) -> None:
    line = json.dumps({"time": format_time(time.time()), **facts}) + "\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    path = directory / ".pgod" / "audit.log"
    descriptor = os.open(path, flags, 0o600)
    try:
        os.write(descriptor, line.encode())
        if os.fstat(descriptor).st_size > AUDIT_BYTES: path.rename(path.with_name("audit.log.1"))
    finally:
        os.close(descriptor)

# ---- SSH ---------------------------------------------------------------------------------------
@dataclass
class Client:
    """A connection: where from, and the key that it has proven."""
    address: str
    key: str = ""  # fingerprint, "" before it is proven
    heard: int = 0  # bytes before that
def network_of(address: str) -> str:
    """Its /24, or /64 of IPv6: who has an address there has many."""
    host = address.removeprefix("::ffff:").partition("%")[0]
    return str(ipaddress.ip_network(f"{host}/{64 if ':' in host else 24}", strict=False))
def oldest_of_largest(networks: Mapping[Any, str]) -> Any:
    """The first connection of the network that has most: a crowd shuts out nobody but itself."""
    crowd = Counter(networks.values()).most_common(1)[0][0]
    return next(connection for connection, network in networks.items() if network == crowd)
def bound_input(channel: Any) -> None:
    """Grant the client no more than a window of input that nobody has read yet."""
    # asyncssh forgets what waits in its buffer: 200 MB for a slow reader took 100 MB of memory.
    if not hasattr(channel, "_init_recv_window"): return
    deliver, window = channel._deliver_data, channel._init_recv_window
    def deliver_data(data: bytes, datatype: Any = None) -> None:
        channel._init_recv_window = window - sum(len(waiting) for waiting, _ in channel._recv_buf)
        deliver(data, datatype)
    channel._deliver_data = deliver_data
def set_terminal_size(terminal: Any, columns: int, rows: int) -> None:
    size = struct.pack("HHHH", (rows or 24) & 0xFFFF, (columns or 80) & 0xFFFF, 0, 0)
    if terminal and os.isatty(terminal.fileno()): fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
def start_in_terminal(compose: Compose, words: list[str],
                      process: Any) -> tuple[Child, dict[str, Any]]:
    """A child with a terminal of its own, and the ends that go to the session. Raises Fault."""
    master, theirs = os.openpty()
    os.set_blocking(master, False)
    ours = os.fdopen(master, "r+b", 0)
    set_terminal_size(ours, *process.term_size[:2])
    term = re.sub(r"[^\w.+-]", "", process.term_type or "") or "dumb"
    try:
        child = compose.children.start(["setsid", "--ctty", *words], compose.who({"TERM": term}),
                                       stdin=theirs, stdout=theirs, stderr=theirs, session=False)
    except Fault:
        ours.close()
        raise
    finally:
        os.close(theirs)
    return child, {"stdin": ours, "stdout": ours}
def start_stream(compose: Compose, words: list[str], reads: bool) -> tuple[Child, dict[str, Any]]:
    """A streaming child, and which of its ends go to the session. Raises Fault."""
    # compose keeps a line of logs until its end, and a line may be endless.
    who = replace(compose.who({"GOTRACEBACK": "none"}), limits=(f"--data={STREAM_MEMORY}",))
    child = compose.children.start(words, who, stdin=PIPE if reads else DEVNULL)
    if child.stdin: os.set_blocking(child.stdin.fileno(), False)
    streams = {"stdin": child.stdin, "stdout": child.stdout, "stderr": child.stderr}
    return child, {name: stream for name, stream in streams.items() if stream}
async def ready(descriptor: int, writing: bool = False) -> None:
    """Until it can be read (of a pidfd_open(2): until the process has ended) or written."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    (loop.add_writer if writing else loop.add_reader)(descriptor, event.set)
    try:
        await event.wait()
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(descriptor)
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
async def pump_out(source: Any, writer: Any) -> None:
    with suppress(OSError):  # EIO is a terminal's end
        while True:
            await ready(source.fileno())
            if not (data := os.read(source.fileno(), 1 << 16)): return
            writer.write(data)
            await writer.drain()
async def pump_in(process: Any, target: Any, asyncssh: Any) -> None:
    """What the client writes, to its end; dropped if there is nobody (left) to read it."""
    data = b"-"
    while data:
        try:
            data = await process.stdin.read(1 << 16)
        except asyncssh.TerminalSizeChanged as change:
            set_terminal_size(target, change.width, change.height)
            continue
        except (asyncssh.BreakReceived, asyncssh.SignalReceived):
            continue
        if target and not target.closed and not await write_all(target.fileno(), data):
            target.close()
def supported_algorithms(asyncssh: Any) -> dict[str, Any]:
    from asyncssh import encryption, kex, mac, public_key  # noqa: PLC0415
    have = {"kex_algs": kex.get_kex_algs(), "encryption_algs": encryption.get_encryption_algs(),
            "mac_algs": mac.get_mac_algs(), "signature_algs": public_key.get_public_key_algs()}
    # Without strict key exchange, this one is open to Terrapin (CVE-2023-48795).
    bad = () if version_of(asyncssh) >= (2, 14, 2) else ("chacha20-poly1305@openssh.com",)
    return {name: [a for a in wanted if a not in bad
                   and (name not in have or a.encode() in have[name])]
            for name, wanted in SSH_ALGORITHMS.items()}
def kept_key(path: Path, asyncssh: Any) -> Any:
    """Made once, kept ever after. Raises Fault."""
    if not path.exists():
        write_atomic(path, asyncssh.generate_private_key("ssh-ed25519").export_private_key())
    try:
        return asyncssh.read_private_key(str(path))
    except (OSError, asyncssh.KeyImportError) as error:
        raise Fault(f"key {path} cannot be read: {error}") from None
def end_stream(children: Children, child: Child, mark: str) -> None:
    """End the child, and what it began in a container (docker does not)."""
    ended_by_itself = child.poll() is not None
    children.end(child)
    if mark and not ended_by_itself: kill_all(marked_processes(mark), signal.SIGKILL)

class SshServer:
    """pgod's own SSH port, by asyncssh: exec requests of key holders and nothing else."""
    def __init__(self, shared: Shared, asyncssh: Any) -> None:
        self.shared = shared
        self.asyncssh = asyncssh
        self.sessions = Counter[str]()  # service: commands that run now
        self.unproven: dict[Any, str] = {}  # connection: its network, oldest first
        self.loop, self.listing = asyncio.new_event_loop(), asyncio.Lock()
        self.beat = time.monotonic()
        # Who can read the file is root here, and needs no key of his own.
        own = kept_key(shared.settings.directory / ".pgod" / "admin_key", asyncssh)
        mark, here = key_fingerprint(own.public_data), {"from": "127.0.0.0/8,::1"}
        self.admins = PublicKey(mark, "root", here, "admin"), *shared.configuration.admins
    def serve(self, address: tuple[str, int]) -> None:
        """Listen, in a thread. Raises Fault."""
        threading.Thread(target=self.loop.run_forever, name="ssh", daemon=True).start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(address), self.loop).result()
        except (OSError, ValueError, self.asyncssh.Error) as error:
            raise Fault(f"SSH cannot listen on {address[0]}:{address[1]}: {error}") from None
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
                mark = key_fingerprint(key.public_data)
                known = bool(server.opened_by(mark, self.connection.pgod_client.address))
                if not known:
                    self.connection.send_auth_banner(
                        f"{mark} opens nothing; a key counts from the next fetch on\r\n")
                return known
        own = self.shared.settings.directory / ".pgod"
        key = kept_key(own / "ssh_host_ed25519_key", self.asyncssh)
        log.info("host key: %s", key_fingerprint(key.public_data))
        await self.asyncssh.create_server(
            Server, address[0], address[1], server_host_keys=[key], reuse_address=True,
            process_factory=self.session, encoding=None, line_editor=False,
            agent_forwarding=False, x11_forwarding=False, allow_scp=False, sftp_factory=None,
            password_auth=False, kbdint_auth=False, host_based_auth=False, gss_host=None,
            login_timeout=SSH_LOGIN_SECONDS, keepalive_interval=30, keepalive_count_max=3,
            server_version=f"pgod_{VERSION}", **supported_algorithms(self.asyncssh))
    def opened_by(self, fingerprint: str, address: str) -> dict[str, PublicKey]:
        """The services that the key opens now, from there, and the line that says so."""
        return {name: key for name, worker in sorted(self.shared.workers.items())
                for key in (*worker.view.keys, *self.admins)
                if hmac.compare_digest(key.fingerprint, fingerprint) and key.opens(name, address)}
    def admit(self, connection: Any) -> None:
        """Limits for clients that have proven nothing, and the proof itself."""
        # A key counts when its signature was verified. That it was offered, or that some key was
        # accepted, does not (CVE-2024-45337). asyncssh reads without limit before authentication.
        peer = connection.get_extra_info("peername") or ("127.0.0.1", 0)
        client = connection.pgod_client = Client(str(peer[0]))
        self.unproven[connection] = network_of(client.address)
        if len(self.unproven) > SSH_UNPROVEN:
            (oldest := oldest_of_largest(self.unproven)).abort()
            self.unproven.pop(oldest)
        receive, validate = connection.data_received, connection.validate_public_key
        create = connection.create_server_channel
        def create_server_channel(*words: Any, **options: Any) -> Any:
            if len(connection._channels) >= SSH_SESSIONS:  # each may fill a window of 2 MiB
                raise self.asyncssh.ChannelOpenError(
                    self.asyncssh.OPEN_RESOURCE_SHORTAGE, "too many sessions")
            return create(*words, **options)
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
        connection.create_server_channel = create_server_channel
        connection.data_received = data_received
        connection.validate_public_key = validate_public_key
    async def session(self, process: Any) -> None:
        """One exec request, from its text to its exit status."""
        connection = process.get_extra_info("connection")
        client: Client = connection.pgod_client
        if getattr(process.channel, "_send_pktsize", 1) < 1:  # older asyncssh would loop forever
            connection.abort()
            return
        status = 1
        bound_input(process.channel)
        try:
            status = await self.handle_exec(process, client)
        except (BrokenPipeError, ConnectionError, self.asyncssh.Error):
            status = 255
        except Exception:  # a session's outermost line
            log.exception("SSH session of %s failed", client.address)
            self.tell(process, "an error of pgod, see its log")
        finally:
            with suppress(OSError, self.asyncssh.Error): process.exit(min(status, 255))
    def tell(self, process: Any, text: str, stream: Any = None) -> None:
        text = "\n".join(printable(line) for line in text.expandtabs().split("\n"))
        with suppress(OSError, self.asyncssh.Error):
            (stream or process.stderr).write(f"{text}\n".encode())
    async def handle_exec(self, process: Any, client: Client) -> int:
        """Parse, permit, audit and carry out; the exit status."""
        mine, text = self.opened_by(client.key, client.address), process.command or ""
        if process.subsystem or not client.key:
            self.tell(process, "refused")
            return DENIED_STATUS
        if text in ("", "//list"):
            process.stdout.write("".join(f"{name}\n" for name in mine).encode())
            return 0
        if text == "//list --json":
            workers = [self.shared.workers[name] for name in mine if mine[name].permits("status")]
            async with self.listing:  # of many at once, one takes a thread of those that answer
                facts = await self.loop.run_in_executor(None, lambda: [
                    status_facts(worker, time.time(), worker.view) for worker in workers])
            process.stdout.write(json.dumps(facts).encode())
            return 0
        try:
            parsed = parse_command(text)
        except Refused as refused:
            self.tell(process, str(refused))
            return USAGE_STATUS
        if parsed.service not in mine:
            self.tell(process, f"there is no service {printable(parsed.service)!r} for this key; "
                      f"it opens: {', '.join(mine) or 'nothing'}")
            return DENIED_STATUS
        if self.sessions[parsed.service] >= SSH_SESSIONS_PER_SERVICE:
            self.tell(process, "refused: too many commands of this service at one time")
            return DENIED_STATUS
        self.sessions[parsed.service] += 1
        try:
            return await self.audited(process, client, parsed, mine[parsed.service])
        finally:
            self.sessions[parsed.service] -= 1
    async def audited(self, process: Any, client: Client, command: ParsedCommand,
                      key: PublicKey) -> int:
        """A job of the service's thread, an answer at once, or a command of compose."""
        worker, entry = self.shared.workers[command.service], COMMANDS[command.command]
        by, status = f"{key.comment or client.key} from {client.address}", 1
        try:
            if not key.permits(command.command):
                raise Refused(f"this key is not for {command.command}, but for: "
                              f"{key.options['command']}")
            refuse_unknown(worker, command)
            if entry.job:
                status = await self.run_job(process, command, worker, entry.job, by)
            elif entry.answer:
                text = await self.loop.run_in_executor(None, entry.answer, worker, command, by)
                self.tell(process, text, process.stdout)
                status = 0
            else:
                status = await self.stream(process, command, worker, client)
        except (Fault, OSError) as error:
            if isinstance(error, ConnectionError): raise
            self.tell(process, str(error))
        finally:
            with suppress(OSError):
                audit(self.shared.settings.directory, address=client.address, key=client.key,
                      role=key.role, comment=key.comment, service=command.service,
                      command=command.audited()[:4096], status=status)
        return status
    async def run_job(self, process: Any, command: ParsedCommand, worker: Worker,
                      act: Callable[[Worker, Job], None], by: str) -> int:
        """Queue it, tell what happens while it happens; it goes on when the client leaves."""
        stream = process.stdout if command.command in ("plan", "load") else process.stderr
        def say(text: str) -> None:
            self.loop.call_soon_threadsafe(self.tell, process, text, stream)
        def tell(text: str) -> None:
            say(text)
            worker.project.say(text)
        job = worker.ask(Job(command.command, act, tuple(command.words()), command.operands, by,
                             say, tell))
        done = asyncio.ensure_future(asyncio.wrap_future(job.done))
        gone = asyncio.ensure_future(process.channel.wait_closed())
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        return await done if done.done() else 1
    async def stream(self, process: Any, command: ParsedCommand, worker: Worker,
                     client: Client) -> int:
        """A compose command with its three streams tied to the session's. Raises Fault."""
        require_release(worker)
        compose, reads = worker.project.compose, command.command == "exec"
        terminal, mark = reads and process.term_type is not None, ""
        if reads:
            mark = f"PGOD_SESSION={os.urandom(16).hex()}"
            command = replace(command, options=(("--env", mark), *command.options))
        words = compose.words(*compose_command(command, terminal))
        child, streams = (start_in_terminal(compose, words, process) if terminal
                          else start_stream(compose, words, reads))
        def permitted() -> bool:
            key = self.opened_by(client.key, client.address).get(worker.name)
            return key is not None and key.permits(command.command)
        status = await self.pump(process, child, streams, mark, permitted)
        self.shared.metrics.count_command(worker.name, ("compose", command.command), status != 0)
        return 128 - status if status < 0 else status
    async def pump(self, process: Any, child: Child, streams: Mapping[str, Any], mark: str,
                   permitted: Callable[[], bool]) -> int:
        """Pump until the child ends, the client goes or its key does; flow control holds both."""
        # asyncssh's own redirect loses the last bytes of an input or an output now and then.
        descriptor = os.pidfd_open(child.pid)
        ended = asyncio.ensure_future(ready(descriptor))
        gone = asyncio.ensure_future(process.channel.wait_closed())
        feed = asyncio.ensure_future(pump_in(process, streams.get("stdin"), self.asyncssh))
        pumps = asyncio.gather(*(pump_out(streams[name], getattr(process, name))
                                 for name in ("stdout", "stderr") if name in streams),
                               return_exceptions=True)
        try:
            while not ended.done() and not gone.done() and permitted():
                await asyncio.wait({ended, gone}, timeout=SSH_KEY_SECONDS,
                                   return_when=asyncio.FIRST_COMPLETED)
            await self.loop.run_in_executor(None, end_stream, self.shared.children, child, mark)
            await asyncio.wait({pumps, gone}, return_when=asyncio.FIRST_COMPLETED)
            return 255 if gone.done() else child.wait()
        finally:
            tasks = (ended, gone, feed, pumps)
            for task in tasks: task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(descriptor)
            for stream in streams.values(): stream.close()

def import_asyncssh() -> Any:
    warnings.simplefilter("ignore")  # asyncssh's of old ciphers, which nobody can do anything about
    try:
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
# Header, and what stands before the HMAC-SHA256 in it; GitLab sends the secret itself.
WEBHOOK_SIGNATURES = (
    ("X-Hub-Signature-256", "sha256="), ("X-Gitea-Signature", ""), ("X-Forgejo-Signature", ""),
    ("X-Gogs-Signature", ""))

class HttpHandler(http.server.BaseHTTPRequestHandler):
    """Pages, and webhooks, which wake a service: nothing in them is believed but the branch."""
    server: HttpServer
    timeout, server_version, sys_version = HTTP_SECONDS, "pgod", ""
    def do_GET(self) -> None:
        if self.path == "/metrics":
            show_metrics(self.server.shared)
            self.answer(200, self.server.shared.metrics.render(), "text/plain; version=0.0.4")
        elif self.path == "/healthz":
            self.answer(200, "ok\n")
        elif self.path == "/readyz":
            missing = [name for name, worker in self.server.shared.workers.items()
                       if not (worker.view.last_success or worker.view.last_error)]
            missing += ["the engine"] * (not self.server.shared.events_flow.is_set())
            self.answer(503 if missing else 200, f"{', '.join(missing) or 'ok'}\n")
        else:
            self.answer(404, "there are /metrics, /healthz and /readyz\n")
    do_HEAD = do_GET
    def do_POST(self) -> None:
        """A service that is unknown or has no webhook gets the answer of a wrong signature."""
        length, name = self.headers.get("Content-Length", ""), self.path.removeprefix("/webhook/")
        if not length.isdecimal() or int(length) > WEBHOOK_BYTES:
            self.answer(413, "a Content-Length of at most 25 MiB is needed\n")
            return
        worker = self.server.shared.workers.get(name)
        secret = worker.service.webhook if worker else ""
        code, left, head = hmac.new(secret.encode(), digestmod="sha256"), int(length), b""
        while left and (data := self.rfile.read(min(left, 1 << 16))):
            code.update(data)
            head = head or data
            left -= len(data)
        right = [(name, prefix + code.hexdigest()) for name, prefix in WEBHOOK_SIGNATURES]
        if worker and secret and any(
                hmac.compare_digest(self.headers.get(name, "").encode(), value.encode())
                for name, value in (*right, ("X-Gitlab-Token", secret))):
            # Quotes in a text are escaped in JSON: this is a key, and where none is, all is asked.
            ref = re.search(rb'"ref"\s*:\s*"(refs/[^"\\]*)"', head)
            follows = not ref or ref[1] == f"refs/heads/{worker.service.branch}".encode()
            if follows: worker.wake("webhook")
            self.answer(202, f"{'looks' if follows else 'needs not look'} at the repository\n")
        else:
            self.answer(403, "the signature is wrong, or this service has no webhook\n")
    def answer(self, status: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)
    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP: %s: %s", self.address_string(), format % args)

class HttpServer(http.server.ThreadingHTTPServer):
    """Of too many connections, those go that are late, and the oldest of the largest network."""
    daemon_threads = True
    def __init__(self, address: tuple[str, int], shared: Shared) -> None:
        """An empty host is every address of both families, as in Go. Raises OSError."""
        super().__init__(address, HttpHandler, bind_and_activate=False)
        self.shared = shared
        self.guard = threading.Lock()  # guards `open`
        self.open: dict[socket.socket, tuple[float, str]] = {}  # since when, and its network
        self.socket.close()
        both = not address[0] and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET
        self.socket = socket.create_server(address, family=family, backlog=128, dualstack_ipv6=both)
    def process_request(self, request: Any, client_address: Any) -> None:
        now = time.monotonic()
        with self.guard:
            late = {s for s, (since, _) in self.open.items() if since + HTTP_SECONDS < now}
            if len(self.open) >= HTTP_CONNECTIONS:
                late.add(oldest_of_largest({s: network for s, (_, network) in self.open.items()}))
            for old in late:
                self.open.pop(old)
                with suppress(OSError): old.shutdown(socket.SHUT_RDWR)
            self.open[request] = now, network_of(client_address[0])
        super().process_request(request, client_address)
    def shutdown_request(self, request: Any) -> None:
        with self.guard: self.open.pop(request, None)
        super().shutdown_request(request)
    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP: %s: %s", client_address[0], sys.exc_info()[1])

# ---- Daemon --------------------------------------------------------------------------------------
CONFIGURATION_SECONDS = 2.0  # between two looks at pgo.toml and at what lives
SSH_SILENCE = 120.0  # seconds; it is asked for a sign of life at each look
def notify(text: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address: return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
def left_behind(mark: str) -> list[int]:
    """Processes with the mark, outside of any container."""
    ours, found = os.readlink("/proc/self/ns/pid"), []
    for process in marked_processes(mark):
        with suppress(OSError):
            found += [process] * (os.readlink(f"/proc/{process}/ns/pid") == ours)
    return found
def take_lock(directory: Path) -> str:
    """One pgod a folder; the mark by which its children are known. Raises Fault."""
    # The file says who holds it, for as long as he lives. What one that was killed left ends.
    descriptor = os.open(directory / ".pgod" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    text = os.read(descriptor, 4096).decode(errors="replace").split()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Fault(f"{directory} belongs to a pgod that runs, process {text[0]}") from None
    if len(text) == 2 and text[1].startswith("PGOD_RUN="):
        kill_all(left_behind(text[1]), signal.SIGKILL)
    mark = f"PGOD_RUN={os.urandom(16).hex()}"
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n{mark}\n".encode(), 0)
    os.fsync(descriptor)
    return mark
def follow_events(shared: Shared) -> None:
    """Wake the service whose container changed, as the engine's events tell; until the end."""
    def going_on() -> bool:
        if not shared.events_flow.is_set():
            shared.events_flow.set()  # what fell before, a look will find
            for worker in shared.workers.values(): worker.wake("event")
        return not shared.stopping.is_set()
    def handle(event: Json) -> None:
        if worker := shared.workers.get(event["Actor"]["Attributes"].get(PROJECT_LABEL)):
            worker.wake("event")
    while not shared.stopping.is_set():
        try:
            shared.api.events(handle, going_on)
        except Exception as error:  # the thread's outermost line
            log.debug("events: %s", error)
        shared.events_flow.clear()
        shared.stopping.wait(2.0)

def remove_service(shared: Shared, path: Path) -> None:
    """Containers and networks go; work tree and state move to .pgod/removed/."""
    name = path.name
    who = RunAs(name, env={"COMPOSE_FILE": "", "DOCKER_CONFIG": str(path / "docker")})
    shared.children.run(
        [*shared.compose_program, "--project-name", name, "down", "--remove-orphans"], who,
        deadline=DEADLINE["up"], kind=("compose", "down")).check("down")
    for kept in shared.api.kept(name): shared.api.untag(kept)
    aside = path.parent / "removed" / time.strftime(f"{name}-%Y%m%dT%H%M%SZ", time.gmtime())
    for folder in (aside.parent, aside): make_folder(folder, 0o700)
    worktree = shared.settings.directory / name
    if worktree.is_dir() and not worktree.is_symlink(): worktree.rename(aside / "worktree")
    path.rename(aside / "state")
    (shared.settings.directory / f"{name}.stop").unlink(missing_ok=True)
    log.info("%s: removed, for pgo.toml lacks it; its files: %s; volumes stay", name, aside)
def remove_stale(shared: Shared) -> bool:
    """Take down what is in .pgod/ and not in pgo.toml; volumes stay. Whether something is left."""
    followed, left = {service.name for service in shared.configuration.services}, False
    for path in sorted((shared.settings.directory / ".pgod").iterdir()):
        known = any((path / name).is_file() for name in ("current.json", "keys.json"))
        if known and path.name not in followed and NAME_PATTERN.fullmatch(path.name):
            try:
                remove_service(shared, path)
            except Exception as error:  # the thread's outermost line
                log.error("%s: removal failed; tried again in 1m: %s", path.name, error)
                left = True
    shared.removed.set()
    return left
def remove_unfinished(folder: Path) -> None:
    """What a kill left of files and folders that were not whole yet."""
    for place in ("", ".pgod/", ".pgod/*/", ".pgod/*/*/", ".pgod/*/git/info/"):
        for left in folder.glob(f"{place}{UNFINISHED}*"):
            with suppress(OSError): shutil.rmtree(left) if left.is_dir() else left.unlink()

class Daemon:
    """pgod's life: start, watch the configuration, end."""
    def __init__(self, settings: Settings, configuration: Configuration) -> None:
        self.settings = settings
        self.configuration = configuration
        self.wakeup = queue.SimpleQueue[int]()  # a signal handler may put, and only that
        self.read_before = configuration.digest
        self.complained = ""
        self.ssh: SshServer | None = None
    def run(self) -> int:
        """The exit status: 0 after TERM, 2 after HUP or a new configuration. Raises Fault."""
        asyncssh = import_asyncssh() if self.settings.ssh else None
        for folder in (self.settings.directory, self.settings.datadir):
            if not folder.exists(): make_folder(folder, 0o755)
        make_folder(self.settings.directory / ".pgod", 0o711)
        metrics, folder = Metrics(), self.settings.directory
        children = Children(metrics, take_lock(folder))
        remove_unfinished(folder)
        self.shared = Shared(self.settings, self.configuration, children, metrics,
                             compose_program(children), EngineApi())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.wakeup.put(number))
        metrics.set("pgo_configuration_valid", 1)
        metrics.set("pgo_build_info", 1, version=VERSION)
        try:
            self.start(asyncssh)
            def remove() -> None:
                while remove_stale(self.shared) and not self.shared.stopping.wait(60): pass
            threading.Thread(target=remove, name="removal", daemon=True).start()
            return self.watch()
        finally:
            self.end()
    def start(self, asyncssh: Any) -> None:
        """Servers and threads; then systemd is told that all is ready."""
        for service in self.configuration.services:
            self.shared.workers[service.name] = Worker(service, self.shared)
        if self.settings.metric:
            host, port = self.settings.metric
            try:
                http_server = HttpServer((host, port), self.shared)
            except OSError as error:
                raise Fault(f"metrics cannot listen on {host}:{port}: {error.strerror}") from None
            threading.Thread(target=http_server.serve_forever, name="http", daemon=True).start()
        if self.settings.ssh:
            self.ssh = SshServer(self.shared, asyncssh)
            self.ssh.serve(self.settings.ssh)
        threading.Thread(target=follow_events, args=(self.shared,), name="events",
                         daemon=True).start()
        for worker in self.shared.workers.values(): worker.start()
        log.info("pgod %s follows %d services", VERSION, len(self.shared.workers))
        notify("READY=1")
    def watch(self) -> int:
        while True:
            with suppress(queue.Empty):
                number = self.wakeup.get(timeout=CONFIGURATION_SECONDS)
                log.info("ends: %s", signal.Signals(number).name)
                return 2 if number == signal.SIGHUP else 0
            if self.alive(): notify("WATCHDOG=1")
            if self.settings.restart and self.configuration_changed():
                log.info("restarts to read the changed %s; containers go on", self.settings.config)
                return 2
    def alive(self) -> bool:
        """Whether every service's thread lives and the SSH loop answered lately."""
        dead = [worker.name for worker in self.shared.workers.values() if not worker.is_alive()]
        if self.ssh:
            self.ssh.loop.call_soon_threadsafe(setattr, self.ssh, "beat", time.monotonic())
            dead += ["ssh"] * (time.monotonic() - self.ssh.beat > SSH_SILENCE)
        if dead: log.error("watchdog: no sign of life: %s", ", ".join(dead))
        return not dead
    def configuration_changed(self) -> bool:
        """Believed when two looks in a row agree and the result is valid."""
        trouble = ""
        try:
            digest = configuration_digest(self.settings.config)
            stable, self.read_before = digest == self.read_before, digest
            if digest != self.configuration.digest:
                if stable: read_configuration(self.settings.config)
                return stable
        except OSError as error:
            trouble = f"cannot be read: {error.strerror}"
        except ConfigurationError as error:
            trouble = str(error)
        self.shared.metrics.set("pgo_configuration_valid", not trouble)
        if trouble and trouble != self.complained:  # once for each new one
            log.error("%s is not valid, the old one goes on:\n%s", self.settings.config, trouble)
        self.complained = trouble
        return False
    def end(self) -> None:
        """Containers keep running; children get a grace, threads are waited for."""
        notify("STOPPING=1")
        self.shared.stopping.set()
        self.shared.children.stopped_at = time.monotonic()
        for worker in self.shared.workers.values(): worker.wake("end")
        until = time.monotonic() + 20
        for worker in self.shared.workers.values():
            if worker.is_alive(): worker.join(max(0.0, until - time.monotonic()))
        kill_all(left_behind(self.shared.children.mark), signal.SIGTERM)

# ---- Command line ------------------------------------------------------------------------------
UNIT = """\
[Unit]
Description=pgod: git decides what runs
Wants=network-online.target
After=network-online.target docker.service

[Service]
Type=notify
WorkingDirectory=-{folder}
ExecStart={python} {program} {words}
ExecReload=/bin/kill -HUP $MAINPID
SyslogIdentifier=pgod
Restart=on-failure
RestartSec=2
RestartForceExitStatus=2
SuccessExitStatus=2
WatchdogSec=60
TimeoutStopSec=40
# No mount namespace (ProtectSystem= and the like): the engine must see what pgod mounts.
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID
CapabilityBoundingSet=CAP_SETUID CAP_NET_BIND_SERVICE CAP_SYS_ADMIN CAP_SYS_PTRACE
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service @mount
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
def bool_word(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "t")
def argument(parser: Callable[..., Any], *more: Any) -> Callable[[str], Any]:
    """argparse shows the message of ArgumentTypeError, but not that of ValueError."""
    def parse(text: str) -> Any:
        try:
            return parser(text, *more)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse
def absolute(text: str) -> Path:
    return Path(text).absolute()
FLAG = {"action": "store_true"}
ADDRESS = {"type": argument(parse_address), "metavar": "ADDRESS"}
# Field of Settings, which has the default; names; what argparse is told of it; help.
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("config", "-c --config", {"type": absolute, "metavar": "FILE"},
     "configuration (default /etc/pgo.toml)"),
    ("directory", "-d --dir", {"type": absolute, "metavar": "DIR"},
     "where repositories are checked out (default /var/lib/pgo)"),
    ("datadir", "--datadir", {"type": absolute, "metavar": "DIR"},
     "data of the services, a folder each (default /data)"),
    ("ssh", "-s --ssh", ADDRESS, "SSH address (default :2222; '' is off)"),
    ("metric", "-m --metric", ADDRESS, "metrics address (default :9112; '' is off)"),
    ("duration", "-t --duration", {"type": argument(parse_duration, 0.001), "metavar": "DURATION"},
     "between polls (default 5m0s)"),
    ("debug", "--debug", FLAG, "log everything"),
    ("restart", "--restart", {"type": bool_word, "nargs": "?", "const": True, "metavar": "BOOL"},
     "exit with 2 when the configuration changed (default true)"),
    ("version", "-v --version", FLAG, "print the version"),
    ("check", "--check", FLAG, "check the configuration and exit"),
    ("unit", "--unit", FLAG, "print a systemd unit"),
)
def parse_arguments(words: Sequence[str]) -> tuple[Settings, argparse.Namespace]:
    """The command line; exits with 1 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        "pgod", description="git decides what runs: follow the repositories of the configuration "
        "and run their compose files.", epilog="exit status: 0 normal, 1 error, 2 after SIGHUP",
        allow_abbrev=False)
    for name, names, facts, text in OPTIONS:
        parser.add_argument(*names.split(), dest=name, help=text, **facts)
    parser.error = lambda message: parser.exit(  # type: ignore[method-assign]
        1, f"pgod: {message}; see pgod --help\n")  # 2 would have it started again
    fields = vars(Settings())
    parser.set_defaults(**fields)
    options = parser.parse_args(words)
    return Settings(**{name: getattr(options, name) for name in fields}), options
JOURNAL_LEVELS = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>"}

class LogFormatter(logging.Formatter):
    """Under systemd the journal has time and level of its own."""
    def __init__(self, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(message)s",
                         "%H:%M:%S")
        self.journal = journal
    def format(self, record: logging.LogRecord) -> str:
        # What a repository says must neither steer a terminal nor look like a line of pgod's.
        text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", "?", super().format(record))
        prefix = JOURNAL_LEVELS.get(record.levelno, "<7>") if self.journal else ""
        return prefix + text.replace("\n", "\n    ")
def check_identity(configuration: Configuration) -> None:
    """pgod is root, unless every service's user is who runs it. Raises Fault."""
    me = pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        os.setgroups([])
        os.umask(0o022)
    elif others := sorted({service.user for service in configuration.services} - {me}):
        raise Fault(f"must be root to run services as {', '.join(others)}")
def main(words: Sequence[str]) -> int:
    settings, options = parse_arguments(words)
    if options.version:
        print(f"pgod {VERSION}")
        return 0
    if options.unit:
        rest = shlex.join(word for word in words if word != "--unit")
        print(UNIT.format(python=sys.executable, program=Path(__file__).resolve(), words=rest,
                          folder=os.getcwd()), end="")
        return 0
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("JOURNAL_STREAM" in os.environ))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if settings.debug else logging.INFO)
    try:
        configuration = read_configuration(settings.config)
        for warning in configuration.warnings: log.warning("%s", warning)
        if options.check:
            count = len(configuration.services)
            print(f"{settings.config}: {count} service{'s' * (count != 1)}, no errors")
            return 0
        check_identity(configuration)
        return Daemon(settings, configuration).run()
    except ConfigurationError as error:
        for line in str(error).splitlines(): print(f"{settings.config}: {line}", file=sys.stderr)
    except Fault as fault:
        print(f"pgod: {fault}", file=sys.stderr)
    return 1
def run() -> NoReturn:
    sys.exit(main(sys.argv[1:]))

if __name__ == "__main__": run()
