#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["asyncssh"]
# ///
"""pgoctl steers the compose services of a server that runs pgod, over pgod's own SSH port.

This one file is the whole client: copy it and run it. It speaks SSH through OpenSSH's ssh where
that is installed, else through asyncssh (`uv run pgoctl.py` brings it), with the same answers.

Sections: Tables, Errors, Values, Command line, Streams and files, Known hosts, Failures explained,
OpenSSH, asyncssh, Main. Imports that take long are made where they are needed; values are named
tuples, for dataclasses would add a quarter to the time it takes to start.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import getopt
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from queue import SimpleQueue
    from types import FrameType, ModuleType
    from typing import Any

# ==== Tables ======================================================================================

VERSION = "0.1.0"
PORT = 2222
USER = "pgo"  # pgod asks for a key only; whatever name it is sent means nothing
CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 15, 3  # a dead connection is noticed after a minute
CHUNK = 1 << 18

COMMANDS = {
    "up": "fetch, deploy the newest commit and wait until it is healthy",
    "down": "remove the containers; lasts until up or start",
    "stop": "stop the containers; lasts until up or start",
    "start": "start what was stopped",
    "restart": "restart the containers",
    "ps": "list the containers",
    "pull": "pull the images",
    "logs": "print the containers' logs; -f follows them",
    "exec": "run a program in a container; reads standard input",
    "load": "check the newest commit against the server's policy",
    "git pull": "fetch the newest commit and deploy it",
    "git hash": "print the commit that runs",
    "ping": "see whether pgod answers",
    "journal": "disabled; pgod says so",
}
READS_STDIN = frozenset({"exec"})  # any other would eat the list of a shell's `while read` loop

OPTIONS = (  # short, long, its value, help
    ("i", "identity", "FILE", "private key, without passphrase"),
    ("p", "port", "PORT", f"port of pgod (default {PORT})"),
    ("t", "tty", "", "exec in a terminal; needs OpenSSH's ssh"),
    ("v", "version", "", "print the version"),
    ("h", "help", "", "print this"),
)
STATUSES = {
    "0-254": "the command's own; 128+n where signal n ended it",
    "2": "also: a wrong command line",
    "130": "also: interrupted with Ctrl-C; 141: nobody read the output to its end",
    "255": "also: no connection, or it broke; a line on standard error says why",
}
ENVIRONMENT = {
    "PGOCTL_ID": "the private key itself, for CI (default: the agent, then ~/.ssh/id_*)",
    "PGOCTL_HOSTKEY": "the server's public key, 'ssh-ed25519 AAAA...' (default: known_hosts)",
    "PGOCTL_TRANSPORT": "ssh or asyncssh (default: ssh where it is installed)",
}
EXAMPLES = {
    "pgoctl example.org": "list the services",
    "pgoctl -i id_pgo example.org:web//logs -f": "follow the logs",
    "pgoctl [::1]:db//exec db psql < dump.sql": "feed a program",
}

DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
SSH_OPTIONS = (  # ssh takes the first value that it gets: these win over ~/.ssh/config
    "BatchMode=yes",
    "PreferredAuthentications=publickey",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "Tunnel=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "ControlMaster=no",
    "ControlPath=none",
    f"ConnectTimeout={CONNECT_SECONDS}",
    f"ServerAliveInterval={ALIVE_SECONDS}",
    f"ServerAliveCountMax={ALIVE_COUNT}",
    "CheckHostIP=no",
    "HashKnownHosts=no",
    "UpdateHostKeys=no",
    "VerifyHostKeyDNS=no",
    "NoHostAuthenticationForLocalhost=no",
    "GlobalKnownHostsFile=/dev/null",
    "LogLevel=DEBUG2",  # to see keys offered, exit statuses and writes that fail; nobody reads it
)
FAILURES = (  # what OpenSSH's log or asyncssh's exception says, what pgoctl says; first match counts
    (
        r"Host key verification failed|HostKeyNotVerifiable",
        "the host key is not the one {remembered}: either pgod was set up anew, or someone is in "
        "between; once you know that it is the former: {remedy}",
    ),
    (
        r"Too many authentication failures",
        "more keys were offered than the server listens to: choose one with -i FILE or PGOCTL_ID",
    ),
    (
        r"Permission denied \(|PermissionDenied",
        "Permission denied: {keys}; a service opens to the keys whose public half is committed in "
        "ssh/ of its repository",
    ),
    (r"Could not resolve|gaierror", "no such host: is the name right, and does DNS answer?"),
    (
        rf"Connection refused|Errno {errno.ECONNREFUSED}\b",
        "connection refused: does pgod run there, and on this port? (-p PORT)",
    ),
    (
        rf"(?i)timed out|Timeout|Errno {errno.ETIMEDOUT}\b",
        "no answer in time: is the host up, and does a firewall let this port through?",
    ),
    (
        rf"No route to|unreachable|Errno ({errno.EHOSTUNREACH}|{errno.ENETUNREACH})\b",
        "no way there: is the network up?",
    ),
    (
        r"Authenticated to|lost after login",
        "the connection broke before the command ended; it may not have done all of its work",
    ),
    (
        r"kex_exchange|banner exchange|Connection (closed|reset)|ConnectionLost|ProtocolNotSupp",
        "what answers there hung up or is no SSH server: is this pgod's port? (-p PORT)",
    ),
)

# ==== Errors ======================================================================================


class ControlError(Exception):
    """No answer from pgod: the message says what, where and what to do."""

    status = 255


class UsageError(ControlError):
    """The command line is wrong."""

    status = 2


class SignalError(ControlError):
    """A signal ends pgoctl, which says nothing about it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


# ==== Values ======================================================================================


class Identity(NamedTuple):
    """The one key to offer."""

    name: str  # where it came from, for messages
    text: str


class Request(NamedTuple):
    """What is asked, of whom, as whom."""

    host: str
    port: int
    command: str  # as it goes over the wire
    stdin: bool  # the command reads standard input
    terminal: bool
    identity: Identity | None  # None: the agent's and the default keys
    pin: str  # the host key, "type base64"; empty: known_hosts
    home: str
    transport: str  # empty: whichever is there

    @property
    def known_name(self) -> str:
        """The host's name in known_hosts (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
        name = self.host.lower()
        return name if self.port == 22 else f"[{name}]:{self.port}"

    @property
    def known_hosts(self) -> str:
        return os.path.join(self.home, ".ssh", "known_hosts")


PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.+?)-----END \1-----", re.DOTALL)
HOST_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]", re.ASCII)


def decode_base64(text: str) -> bytes:
    """The bytes, or none where the text is not base64."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return b""


def fingerprint(blob: bytes) -> str:
    """The fingerprint of a public key as ssh-keygen -l prints it."""
    import hashlib

    digest = binascii.b2a_base64(hashlib.sha256(blob).digest(), newline=False)
    return "SHA256:" + digest.decode().rstrip("=")


def parse_identity(text: str, name: str) -> Identity:
    """A private key, out of what a CI secret may have become: CRLF, literal \\n, all on one line."""
    match = PRIVATE_KEY.search(text.replace("\\n", "\n"))
    if not match:
        public = text.startswith(("ssh-", "ecdsa-", "sk-"))
        what = "is a public key: the private half is needed" if public else "holds no private key"
        raise ControlError(f"{name} {what}")
    body = "".join(match[2].split())
    blob = decode_base64(body)
    cipher = blob[19:23] if blob.startswith(b"openssh-key-v1\0") else b"none"
    if cipher != b"none" or "ENCRYPTED" in match[1] + body:
        raise ControlError(f"{name} has a passphrase: make a key without (ssh-keygen -t ed25519)")
    if not blob:
        raise ControlError(f"{name} is damaged: what stands in the key is not base64")
    lines = "\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    return Identity(name, f"-----BEGIN {match[1]}-----\n{lines}\n-----END {match[1]}-----\n")


def parse_host_key(text: str) -> str:
    """A public key without its comment."""
    kind, _, rest = text.strip().partition(" ")
    body = rest.split()[0] if rest.split() else ""
    if kind and decode_base64(body)[4:].startswith(kind.encode()):
        return f"{kind} {body}"
    raise ControlError("PGOCTL_HOSTKEY is no public key; it looks like 'ssh-ed25519 AAAA...'")


def parse_port(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    raise UsageError(f"port {text!r}: a number from 1 to 65535 is needed")


def parse_target(text: str) -> tuple[str, str, str]:
    """Host, service and command; the latter two are empty where only a host was named."""
    place, slashes, command = text.partition("//")
    host, _, service = place.rpartition(":") if slashes else (place, "", "")
    for wrong, problem in (
        ("," in host, "several hosts are not supported yet; name one"),
        (not host, "there is no host"),
        (host.endswith(":"), "there is no //command after the service"),
        (not slashes and ":" in host and host[0] != "[", "there is no //command"),
        (not HOST_NAME.fullmatch(host), "that is no host; an IPv6 address stands in brackets"),
        (slashes and not service, "there is no service between host: and //"),
        (slashes and not command, "there is no command after //"),
    ):
        if wrong:
            raise UsageError(
                f"{text!r}: {problem}: host:service//command is needed, as in example.org:web//ps"
            )
    return host.strip("[]"), service, command


# ==== Files and streams ===========================================================================


def fd_path(fd: int) -> str:
    """A path by which our children can open one of our descriptors; empty where /proc lacks."""
    path = f"/proc/{os.getpid()}/fd/{fd}"
    return path if os.path.exists(path) else ""


def private_folder(stack: contextlib.ExitStack) -> str:
    """A folder that nobody else can enter, until the stack ends."""
    import tempfile

    return stack.enter_context(tempfile.TemporaryDirectory(prefix="pgoctl-"))


def private_file(text: str, stack: contextlib.ExitStack) -> str:
    """A path to a text, for our children alone, until the stack ends; not on disk if avoidable."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pgoctl")
        stack.callback(os.close, fd)
        path = fd_path(fd)
    else:
        path = ""
    if not path:
        path = os.path.join(private_folder(stack), "file")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        stack.callback(os.close, fd)
    os.fchmod(fd, 0o600)  # ssh refuses a key that others can read
    write_all(fd, text.encode())
    return path


def private_pipe(stack: contextlib.ExitStack) -> tuple[int, int, str]:
    """A pipe's two ends, to be closed by the caller, and a path to write to it."""
    reader, writer = os.pipe()
    path = fd_path(writer)
    if not path:
        os.close(reader), os.close(writer)
        path = os.path.join(private_folder(stack), "pipe")
        os.mkfifo(path, 0o600)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(path, os.O_WRONLY)
        os.set_blocking(reader, True)
    return reader, writer, path


def read_private(path: str) -> str:
    """The text of a file that nobody else may read (ssh refuses others, too)."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            status, text = os.fstat(file.fileno()), file.read(1 << 16)
    except OSError as error:
        raise ControlError(f"key {path!r}: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise ControlError(f"key {path!r} can be read by others: chmod 600 {shlex.quote(path)}")
    return text


def read_text(path: str) -> str:
    """A file's text, empty where there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror}") from None


def write_all(fd: int, data: bytes) -> None:
    """Write to the last byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def say(text: str) -> None:
    """A line of pgoctl's own on standard error."""
    with contextlib.suppress(OSError):
        write_all(2, f"pgoctl: {text}\n".encode(errors="backslashreplace"))


def output_failure() -> ControlError:
    """What it means that standard output takes no more: a reader that left, or a full disk."""
    mode = os.fstat(1).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return SignalError(signal.SIGPIPE)
    return ControlError("standard output could not be written to its end: is the disk full?")


def run_child(argv: Sequence[str], stdin: bool, started: Callable[[Child], object]) -> int:
    """Run a program on our own standard streams; its status, negative if a signal ended it.

    It ends when we are ended. It need not know our secrets. The one door to other programs.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PGOCTL_ID"}
    try:
        child = subprocess.Popen(argv, stdin=None if stdin else subprocess.DEVNULL, env=environ)
    except OSError as error:
        raise ControlError(f"{argv[0]}: {error.strerror}") from None
    try:
        started(child)
        return child.wait()
    finally:
        child.terminate()
        child.wait()


# ==== Known hosts =================================================================================


def name_matches(field: str, name: str) -> bool:
    """Whether the first field of a line of known_hosts, maybe hashed, names a host."""
    import fnmatch
    import hmac

    if field.startswith("|1|"):
        salt, _, digest = field[3:].partition("|")
        return hmac.digest(decode_base64(salt), name.encode(), "sha1") == decode_base64(digest)
    hits = [
        pattern
        for pattern in field.lower().split(",")
        if fnmatch.fnmatchcase(name, pattern.lstrip("!").replace("[", "[[]"))
    ]
    return bool(hits) and not any(pattern.startswith("!") for pattern in hits)


def known_keys(text: str, name: str) -> set[str]:
    """The keys, "type base64", that the text of known_hosts has for a name."""
    lines = (line.split() for line in text.splitlines() if not line.startswith(("#", "@")))
    return {f"{line[1]} {line[2]}" for line in lines if line[2:] and name_matches(line[0], name)}


def remember_host(path: str, line: str) -> None:
    """Append a line, whole, whoever else does the same."""
    with contextlib.closing(open(path, "ab+", buffering=0)) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + f"{line}\n".encode())


def host_key_is_right(request: Request, key: str) -> bool:
    """Whether a host's key is the pinned, the known or the first one, which is remembered."""
    if request.pin:
        return key == request.pin
    known = known_keys(read_text(request.known_hosts), request.known_name)
    if not known:
        try:
            remember_host(request.known_hosts, f"{request.known_name} {key}")
        except OSError:
            say(UNREMEMBERED.format(path=request.known_hosts))
    return key in known or not known


# ==== Failures explained ==========================================================================


def explain(request: Request, words: str, keys: Sequence[str]) -> ControlError:
    """The error for what ssh or asyncssh said, and the public keys that it had offered."""
    forget = f"ssh-keygen -R {shlex.quote(request.known_name)} -f {shlex.quote(request.known_hosts)}"
    offered = ", ".join(keys) or (request.identity.name if request.identity else "")
    facts = {
        "remembered": "in PGOCTL_HOSTKEY" if request.pin else "that known_hosts remembers",
        "remedy": "put the new one in PGOCTL_HOSTKEY" if request.pin else forget,
        "keys": f"nothing here opens to {offered}" if offered else "there was no key to offer",
    }
    for pattern, sentence in FAILURES:
        if re.search(pattern, words):
            words = sentence.format_map(facts)
            break
    return ControlError(f"{request.host} port {request.port}: {words}")


# ==== OpenSSH =====================================================================================

OFFERED = re.compile(r"Offering public key: (.+?) \S+ (SHA256:\S+)")
WRITE_FAILED = re.compile(r"debug2: channel \d+: write failed")
CHATTER = ("debug", "Warning: Permanently added", "Transferred: ", "Bytes per second: ")


class SshLog:
    """ssh's own log (-E), read while ssh runs; a thread of its own follows it.

    Nothing else tells that standard output takes no more: ssh would throw away what still comes,
    and end with the command's status.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reader, self.writer, self.path = private_pipe(stack)
        self.errors: list[str] = []
        self.keys: list[str] = []  # the public keys that were offered
        self.answered = False  # the command's own exit status came
        self.output_failed = False
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.child: Child | None = None

    def start(self, child: Child) -> None:
        self.child = child
        self.thread.start()

    def follow(self) -> None:
        with open(self.reader, encoding="utf-8", errors="replace") as file:
            for line in file:
                self.take(line.rstrip())

    def take(self, line: str) -> None:
        """Keep what matters of a line."""
        if not line.startswith(CHATTER):
            self.errors.append(line)
        elif offer := OFFERED.search(line):
            self.keys.append(f"{offer[2]} ({offer[1]})")
        elif " rtype exit-status " in line:
            self.answered = True
        elif WRITE_FAILED.match(line) and self.child:
            self.output_failed = True
            self.child.terminate()

    def finish(self) -> None:
        """Read to the end; a ProxyCommand that lives on may hold the pipe open."""
        os.close(self.writer)
        self.thread.join(1)


def ssh_path(path: str) -> str:
    """A path as the value of an option (ssh_config(5): quotes, tokens)."""
    return '"' + path.replace("%", "%%") + '"'


def home_arguments(home: str) -> list[str]:
    """ssh asks the password database for a home; $HOME may be elsewhere, as in CI."""
    import pwd

    with contextlib.suppress(KeyError):
        if home == pwd.getpwuid(os.getuid()).pw_dir:
            return []
    folder = os.path.join(home, ".ssh")
    keys = [path for key in DEFAULT_KEYS if os.path.exists(path := os.path.join(folder, key))]
    config = os.path.join(folder, "config")
    return [
        *(["-F", config] if os.path.exists(config) else []),
        *(f"-oIdentityFile={ssh_path(key)}" for key in keys),
    ]


def ssh_arguments(request: Request, log: str, key: str, hosts: str) -> list[str]:
    """The command line of ssh; log, key and hosts are paths, key may be empty."""
    options = [
        *SSH_OPTIONS,
        f"HostKeyAlias={request.known_name}",
        f"UserKnownHostsFile={ssh_path(hosts)}",
        f"StrictHostKeyChecking={'yes' if request.pin else 'accept-new'}",
    ]
    if key:
        options += [f"IdentityFile={ssh_path(key)}", "IdentitiesOnly=yes", "IdentityAgent=none"]
    return [
        "ssh",
        *("-E", log, "-l", USER, "-p", str(request.port), "-t" if request.terminal else "-T"),
        *([] if key else home_arguments(request.home)),
        *(f"-o{option}" for option in options),
        *("--", request.host, request.command),
    ]


def run_ssh(request: Request) -> int:
    """Have OpenSSH do it, on our own standard streams; the command's status."""
    with contextlib.ExitStack() as stack:
        log = SshLog(stack)
        key = private_file(request.identity.text, stack) if request.identity else ""
        line = f"{request.known_name} {request.pin}\n"
        hosts = private_file(line, stack) if request.pin else request.known_hosts
        argv = ssh_arguments(request, log.path, key, hosts)
        stack.callback(log.finish)
        status = run_child(argv, request.stdin, log.start)
    if log.output_failed:
        raise output_failure()
    if status < 0:
        raise SignalError(-status)
    if status == 255 and not log.answered:
        name = request.identity.name if request.identity else ""
        words = "; ".join(log.errors) or "ssh failed and did not say why"
        raise explain(request, words, [text.replace(key, name) if key else text for text in log.keys])
    if any("Failed to add the host" in line for line in log.errors):
        say(UNREMEMBERED.format(path=request.known_hosts))
    return status


# ==== asyncssh ====================================================================================


def load_asyncssh(request: Request) -> ModuleType:
    """asyncssh, which takes half a second to import, and prints nothing of its own."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable()
    try:
        import asyncssh
    except ImportError as error:
        raise ControlError(
            f"{'' if request.transport else 'no ssh on PATH, and '}no asyncssh ({error}): install "
            "OpenSSH's client (apt install openssh-client), or run pgoctl with uv "
            "(uv run pgoctl.py), or install asyncssh (pip install asyncssh)"
        ) from None
    return asyncssh


async def load_keys(asyncssh: ModuleType, request: Request) -> list[Any]:
    """The one key that was given, else those of the agent and the default ones."""
    if request.identity:
        try:
            return [asyncssh.import_private_key(request.identity.text)]
        except (ValueError, asyncssh.Error) as error:
            raise ControlError(f"{request.identity.name} cannot be read: {error}") from None
    keys: list[Any] = []
    if path := os.environ.get("SSH_AUTH_SOCK"):
        with contextlib.suppress(OSError, ValueError, asyncssh.Error):
            keys += await (await asyncssh.connect_agent(path)).get_keys()
    for name in DEFAULT_KEYS:
        with contextlib.suppress(OSError, ValueError, asyncssh.Error):
            keys.append(asyncssh.read_private_key(os.path.join(request.home, ".ssh", name)))
    return keys


async def connect(asyncssh: ModuleType, request: Request) -> Any:
    """A connection to pgod, logged in."""
    import asyncio

    class Client(asyncssh.SSHClient):  # type: ignore[name-defined,misc]
        def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
            kind, body = key.export_public_key().decode().split()[:2]
            return host_key_is_right(request, f"{kind} {body}")

    keys = await load_keys(asyncssh, request)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncssh.connect(
                request.host,
                request.port,
                username=USER,
                config=None,
                client_factory=Client,
                known_hosts=([], [], []),  # none: Client is asked
                client_keys=keys or None,
                agent_path=None,
                gss_host=None,
                preferred_auth="publickey",
                keepalive_interval=ALIVE_SECONDS,
                keepalive_count_max=ALIVE_COUNT,
            )
    except (OSError, asyncssh.Error) as error:
        names = [f"{fingerprint(key.public_data)} ({key.get_comment()})" for key in keys]
        raise explain(request, f"{type(error).__name__}: {error}", names) from None
