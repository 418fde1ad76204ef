#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["asyncssh"]
# ///
"""pgoctl steers the compose services of a server that runs pgod, over pgod's own SSH port.

This file is the whole client: copy it and run it. It speaks SSH through OpenSSH's ssh where that
is installed, else through asyncssh (`uv run pgoctl.py` brings it), with the same answers.

Sections: Tables, Errors, Values, Streams and files, Known hosts, Failures explained, OpenSSH,
asyncssh, Configuration, Command line, Several hosts, Completion, Main.
"""
# Whatever takes long to import is imported where it is needed, and values are named tuples: with
# dataclasses a third is added to the time that pgoctl adds to ssh's.
# ruff: noqa: PLC0415

from __future__ import annotations

import binascii
import contextlib
import errno
import getopt
import os
import queue
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from types import FrameType, ModuleType
    from typing import Any

# ==== Tables ======================================================================================

VERSION = "0.1.0"
PORT = 2222
USER = "pgo"  # pgod asks for a key only; the name that it is sent means nothing
CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 15, 3  # a dead connection is noticed within a minute
CHUNK = 1 << 18
LOG_SECONDS = 0.05  # between two looks at ssh's log
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

COMMANDS = {
    "up": "fetch, deploy the newest commit and wait until it is healthy",
    "down": "remove the containers; lasts until up or start",
    "stop": "stop the containers; lasts until up or start",
    "start": "start what was stopped",
    "restart": "restart the containers",
    "ps": "list the containers",
    "pull": "pull the images",
    "logs": "print the containers' logs; -f follows them",
    "exec": "run a program in a container; the one command that reads standard input",
    "load": "check the newest commit against the server's policy",
    "git pull": "fetch the newest commit and deploy it",
    "git hash": "print the commit that runs",
    "ping": "see whether pgod answers",
    "plan": "say what would be done now, and why",
    "status": "say what runs, since when, and why not the newest commit",
    "history": "list the last deploys",
    "why": "print what the containers of a failed deploy said last",
    "hold": "stop deploys and heals, until release or --for a time",
    "release": "end a hold",
    "journal": "is disabled; pgod says so",
    "help": "list the commands and their options",
}
EXEC_VALUES = ("-e", "--env", "-u", "--user", "-w", "--workdir", "--index")  # a word follows them
READS_STDIN = frozenset({"exec"})  # another would eat the list of a shell's `while read` loop

OPTIONS = (  # short, long, its value, help
    ("i", "identity", "FILE", "private key, without passphrase"),
    ("p", "port", "PORT", f"port of pgod (default: as ~/.ssh/config says, else {PORT})"),
    ("t", "tty", "", "exec in a terminal, also where pgoctl has none; needs OpenSSH's ssh"),
    ("q", "quiet", "", "with a host alone: the names of the services"),
    ("", "json", "", "with a host alone: all that is known of them, for programs"),
    ("", "completion", "SHELL", "print what bash, zsh or fish completes pgoctl's words with"),
    ("v", "version", "", "print the version"),
    ("h", "help", "", "print this"),
)
STATUSES = {
    "0-255": "the command's own; 128+n where signal n ended it",
    "2": "also: the command line is wrong",
    "130": "also: interrupted with Ctrl-C; 141: the reader of the output left",
    "255": "also: no connection, or it broke; a line on standard error says why",
}
ENVIRONMENT = {
    "PGOCTL_ID": "the private key itself, for CI (default: root's own on the server, then the "
                 "agent, then ~/.ssh/id_*)",
    "PGOCTL_HOSTKEY": "the server's public key, 'ssh-ed25519 AAAA...' (default: known_hosts)",
    "PGOCTL_TRANSPORT": "ssh or asyncssh (default: ssh where it is installed)",
}
EXAMPLES = {
    "pgoctl example.org": "list the services, with their state; `watch pgoctl @prod` of all hosts",
    "pgoctl -i id_pgo example.org:web//logs -f": "follow the logs",
    "pgoctl [::1]:db//exec db psql < dump.sql": "feed a program",
    "pgoctl a.example,b.example:web//up": "ask several hosts at once",
    "pgoctl @prod:web//status": "ask a group of ~/.config/pgoctl.toml",
    'eval "$(pgoctl --completion bash)"': "complete hosts, services and commands, in ~/.bashrc",
}
CONFIGURATION = {  # of ~/.config/pgoctl.toml
    "identity": "a private key's file, where neither -i nor PGOCTL_ID is given",
    "port": "pgod's port, where -p is not given",
    "[groups]": 'prod = ["a.example", "b.example"]; @prod stands for all of them',
    '[hosts."a.example"]': "identity and port of that host",
}

# The key that pgod makes for root on its own machine, in its default folder.
ADMIN_KEY, LOCAL_HOSTS = "/var/lib/pgo/.pgod/admin_key", ("localhost", "127.0.0.1", "::1")
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
# ssh takes the first value that it meets, so these win over ~/.ssh/config. Nobody sees the log: it
# tells which keys were offered, whether a status came, and of writes that failed.
SSH_OPTIONS = (
    "BatchMode=yes", "PubkeyAuthentication=yes", "PreferredAuthentications=publickey",
    "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no",
    "PermitLocalCommand=no", "RemoteCommand=none", "ControlMaster=no", "ControlPath=none",
    f"ConnectTimeout={CONNECT_SECONDS}", f"ServerAliveInterval={ALIVE_SECONDS}",
    f"ServerAliveCountMax={ALIVE_COUNT}", "CheckHostIP=no", "HashKnownHosts=no",
    "UpdateHostKeys=no", "VerifyHostKeyDNS=no", "NoHostAuthenticationForLocalhost=no",
    "GlobalKnownHostsFile=/dev/null", "LogLevel=DEBUG2",
)
FAILURES = (  # what ssh's log or asyncssh's exception says, what pgoctl says; the first one counts
    ("lost after login",
     "the connection broke before the command ended; it may have done its work or not"),
    ("Host key verification failed|HostKeyNotVerifiable",
     "the host key is not the one {remembered}: either pgod was set up anew or someone is in "
     "between; once you know that it is the former: {remedy}"),
    ("Too many authentication failures",
     "more keys were offered than the server listens to: choose one with -i FILE or PGOCTL_ID"),
    ("Load key", "a private key cannot be used, it may be damaged: {words}"),
    (r"Permission denied \(|PermissionDenied",
     "Permission denied: {keys}; commit its .pub in ssh/ of the repository and push; pgod knows "
     "it after its next fetch"),
    ("Could not resolve|gaierror|UnicodeError", "no such host: is the name right, does DNS work?"),
    (rf"Connection refused|Errno {errno.ECONNREFUSED}\b",
     "connection refused: does pgod run there, and on this port (-p PORT)?"),
    (rf"(?i)timed out|timeout|Errno {errno.ETIMEDOUT}\b",
     "no answer in time: is the host up, and does a firewall let this port through?"),
    ("kex_exchange|banner exchange|Connection (closed|reset)|ConnectionLost|ProtocolNotSupported",
     "what answers there hung up or is no SSH server: is this pgod's port (-p PORT)?"),
)
UNREMEMBERED = "{} cannot be written: the host key is not remembered; pin it with PGOCTL_HOSTKEY"
NO_TRANSPORT = ("{}: install OpenSSH's client (apt install openssh-client), or asyncssh (pip "
                "install asyncssh; `uv run pgoctl.py` brings it)")

# ==== Errors ======================================================================================

class ControlError(Exception):
    """No answer from pgod; the message says what, where and what to do."""

    status = 255

class UsageError(ControlError):
    """The command line is wrong."""

    status = 2

class SignalError(BaseException):
    """A signal ends pgoctl, or ended the command; no library may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number

# ==== Values ======================================================================================

class Request(NamedTuple):
    """What is asked, of whom, as whom."""

    host: str
    port: int
    command: str  # as it goes over the wire
    stdin: bool  # the command reads standard input
    terminal: bool
    key_name: str  # where the one key to offer came from; empty: the agent's and the default ones
    key: str
    pin: str  # the host key, "type base64"; empty: as known_hosts says
    folder: str  # $HOME/.ssh

    @property
    def known_name(self) -> str:
        """The host's name in known_hosts (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
        return self.host.lower() if self.port == 22 else f"[{self.host.lower()}]:{self.port}"

    @property
    def known_hosts(self) -> str:
        """The path of the file."""
        return os.path.join(self.folder, "known_hosts")

PRIVATE_KEY = r"(?s)-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.+?)-----END \1-----"
OPENSSH_KEY = b"openssh-key-v1\0"  # then the cipher's length and name (PROTOCOL.key)
HOST_NAME = r"(?a)@?\w[\w.-]*|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]"  # or a group, as @prod

def decode_base64(text: str) -> bytes:
    """The bytes; none where the text is not base64."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return b""

def fingerprint(key: bytes) -> str:
    """The fingerprint of a public key as ssh-keygen -l prints it."""
    import hashlib
    digest = binascii.b2a_base64(hashlib.sha256(key).digest(), newline=False)
    return "SHA256:" + digest.decode().rstrip("=")

def parse_key(text: str, name: str) -> str:
    """A private key from what a CI secret may have become: CRLF, literal \\n, all on one line."""
    match = re.search(PRIVATE_KEY, text.replace("\\n", "\n"))
    if not match:
        public = text.startswith(("ssh-", "ecdsa-", "sk-"))
        raise ControlError(f"{name} is a public key: the private half is needed" if public else
                           f"{name} is no private key in the format of ssh-keygen")
    body = "".join(match[2].split())
    blob = decode_base64(body)
    if "ENCRYPTED" in match[1] + body or (blob.startswith(OPENSSH_KEY) and blob[19:23] != b"none"):
        raise ControlError(f"{name} has a passphrase: make a key without (ssh-keygen -t ed25519)")
    if not blob:
        raise ControlError(f"{name} is damaged: it is not base64")
    lines = "\n".join(body[start:start + 64] for start in range(0, len(body), 64))
    return f"-----BEGIN {match[1]}-----\n{lines}\n-----END {match[1]}-----\n"

def parse_host_key(text: str) -> str:
    """A public key without its comment."""
    kind, body = [*text.split(), "", ""][:2]
    if kind and decode_base64(body)[4:].startswith(kind.encode()):
        return f"{kind} {body}"
    raise ControlError("PGOCTL_HOSTKEY is no public key; it looks like 'ssh-ed25519 AAAA...'")

def parse_target(text: str) -> tuple[str, str, str]:
    """Hosts as they are written, service, command; the last two are empty where they lack."""
    place, slashes, command = text.partition("//")
    host, _, service = place.rpartition(":") if slashes else (place, "", "")
    for wrong, problem in (
        (not host, "the host is missing"),
        (not slashes and host.rpartition("]")[2].count(":") == 1, "//command is missing"),
        (not all(re.fullmatch(HOST_NAME, name) for name in host.split(",")),
         "that is no host (an IPv6 address stands in brackets)"),
        (slashes and not service, "the service is missing"),
        (slashes and not command, "the command is missing"),
    ):
        if wrong:
            raise UsageError(f"target {text!r}: {problem}; it is host:service//command, as in "
                             "example.org:web//ps, or a host alone")
    return host, service, command

def render_command(service: str, command: str, arguments: Sequence[str]) -> str:
    """The text of the SSH request; shlex.split gives the words back as they were."""
    text = shlex.join([f"{service}//{command}", *arguments])
    if text.isascii() or text == text.encode(errors="replace").decode():
        return text
    raise UsageError("an argument is not UTF-8")

# ==== Streams and files ===========================================================================

def write_all(descriptor: int, data: bytes) -> None:
    """Write to the last byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]

def say(text: str) -> None:
    """A line of pgoctl's own on standard error."""
    with contextlib.suppress(OSError):
        text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", "?", text)  # a server may have its say
        write_all(2, f"pgoctl: {text}\n".encode(errors="backslashreplace"))

def output_failure() -> ControlError | SignalError:
    """What it means that standard output takes no more: its reader left, or the disk is full."""
    mode = os.fstat(1).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return SignalError(signal.SIGPIPE)
    return ControlError("standard output was not written to its end: is the disk full?")

def write_output(descriptor: int, data: bytes) -> None:
    """Write output; raises what it means that it takes no more."""
    try:
        write_all(descriptor, data)
    except OSError:
        raise output_failure() from None

def start_thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    """A thread that holds nothing up when pgoctl ends."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread

def read_private(path: str) -> str:
    """The text of a file that nobody else may read; ssh, too, refuses others."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            status, text = os.fstat(file.fileno()), file.read(CHUNK)
    except OSError as error:
        raise ControlError(f"key {path!r}: {error.strerror}") from None
    secret = "PRIVATE KEY" in text and stat.S_ISREG(status.st_mode)
    if secret and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise ControlError(f"key {path!r} is open to others: chmod 600 {shlex.quote(path)}")
    return text

def private_file(text: str, stack: contextlib.ExitStack) -> str:
    """A path to a text, for us and our children until the stack ends; not on disk if avoidable."""
    if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
        descriptor = os.memfd_create("pgoctl")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        os.fchmod(descriptor, 0o600)  # ssh refuses a key that is open to others
    else:
        import tempfile
        descriptor, path = tempfile.mkstemp(prefix="pgoctl-")
        stack.callback(os.unlink, path)
    stack.callback(os.close, descriptor)
    write_all(descriptor, text.encode())
    return path

def start_child(words: Sequence[str], stdin: bool = False, stdout: int | None = None,
                stderr: int | None = None, key: str = "") -> subprocess.Popen[bytes]:
    """The one door to other programs. They do not get to see our key, unless it is given."""
    environ = {name: value for name, value in os.environ.items() if name != "PGOCTL_ID"}
    environ |= {"PGOCTL_ID": key} if key else {}
    try:
        return subprocess.Popen(words, stdin=None if stdin else subprocess.DEVNULL, stdout=stdout,
                                stderr=stderr, env=environ)
    except OSError as error:
        raise ControlError(f"{words[0]}: {error.strerror}") from None

def run_child(words: Sequence[str], stdin: bool,
              started: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Run a program on our own streams, and end it when we are ended.

    Returns its status, negative if a signal ended it.
    """
    child = start_child(words, stdin)
    try:
        started(child)
        return child.wait()
    finally:
        child.terminate()
        child.wait()

# ==== Known hosts =================================================================================

def name_matches(field: str, name: str) -> bool:
    """Whether the first field of a line of known_hosts, hashed or not, is about a name."""
    if not field.startswith("|1|"):
        return name in field.lower().split(",")
    import hmac
    salt, _, digest = field[3:].partition("|")
    return hmac.digest(decode_base64(salt), name.encode(), "sha1") == decode_base64(digest)

def known_keys(text: str, name: str) -> set[str]:
    """The keys, "type base64", that the text of known_hosts has for a name."""
    lines = (line.split() for line in text.splitlines() if not line.startswith(("#", "@")))
    return {f"{line[1]} {line[2]}" for line in lines if line[2:] and name_matches(line[0], name)}

def append_known_host(path: str, line: str) -> None:
    """Append a line in one piece, whoever else does so."""
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
    except OSError:
        say(UNREMEMBERED.format(path))

def load_known_keys(request: Request) -> set[str]:
    """The keys that a host may have: the pinned one, else those of known_hosts, if it is there.

    One that cannot be read is an error, for every host would be new.
    """
    if request.pin:
        return {request.pin}
    try:
        os.makedirs(request.folder, mode=0o700, exist_ok=True)
        with open(request.known_hosts, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        if not os.path.exists(request.known_hosts):
            return set()
        raise ControlError(f"{request.known_hosts}: {error.strerror}: no host can be told from an "
                           "impostor") from None
    if text and not text.endswith("\n"):
        append_known_host(request.known_hosts, "\n")  # ssh would write on in that line
    return known_keys(text, request.known_name)

def is_right_host(request: Request, known: set[str], key: str) -> bool:
    """Whether a host's key is a known one or the first one, which is kept."""
    if not known:
        append_known_host(request.known_hosts, f"{request.known_name} {key}\n")
        known.add(key)
    return key in known

# ==== Failures explained ==========================================================================

def explain(request: Request, words: str, keys: Sequence[str] = ()) -> ControlError:
    """What to tell, given the words of ssh or asyncssh and the public keys that were offered."""
    forget = shlex.join(["ssh-keygen", "-R", request.known_name, "-f", request.known_hosts])
    offered = ", ".join(keys) or request.key_name
    facts = {
        "words": words,
        "remembered": "in PGOCTL_HOSTKEY" if request.pin else "that known_hosts remembers",
        "remedy": "put the new one there" if request.pin else forget,
        "keys": f"no service accepts {offered}" if offered else "there was no key to offer",
    }
    for pattern, sentence in FAILURES:
        if re.search(pattern, words):
            words = sentence.format_map(facts)
            break
    return ControlError(f"{request.host} port {request.port}: {words}")

# ==== OpenSSH =====================================================================================

OFFERED = r"Offering public key: (.+?) \S+ (SHA256:\S+)"
WRITE_FAILED = "channel 0: write failed"
CHATTER = ("debug1", "Authenticated to ", "Warning: Permanently added", "Transferred: ",
           "Bytes per second: ")

class SshLog:
    """ssh's own log (-E), followed while ssh runs.

    Nothing else tells that standard output takes no more: ssh throws away what still comes, and
    ends with the command's status as if all had been written.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reader, writer = os.pipe()
        self.path = f"/proc/{os.getpid()}/fd/{writer}"
        if not os.path.exists(self.path):
            self.path = private_file("", stack)
            os.dup2(os.open(self.path, os.O_RDONLY), self.reader)
        os.set_blocking(self.reader, False)
        self.rest = b""  # of a line that is not complete
        self.lines: list[str] = []
        self.output_failed = False
        self.ended = threading.Event()

    def start(self, child: subprocess.Popen[bytes]) -> None:
        """Follow the log of a child; not line by line, which would cost it time."""
        def follow() -> None:
            while not self.ended.wait(LOG_SECONDS):
                self.read()
                if self.output_failed:
                    child.terminate()
        self.thread = start_thread(follow)

    def read(self) -> None:
        """Keep what is new and more than a detail."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, CHUNK):
                *lines, self.rest = (self.rest[-CHUNK:] + data).split(b"\n")
                texts = [line.decode(errors="replace").rstrip() for line in lines]
                self.output_failed |= any(text.endswith(WRITE_FAILED) for text in texts)
                kept = [text for text in texts if text and not text.startswith("debug2")]
                self.lines = (self.lines + kept)[-1000:]

    def finish(self) -> None:
        """Read the rest."""
        self.ended.set()
        self.thread.join()
        self.read()

    def failure(self, request: Request, key: str) -> ControlError | None:
        """What to tell of a status 255 that is not the command's own; key is the path ssh got."""
        text = "\n".join(self.lines)
        if "rtype exit-status" in text:
            return None
        text = text.replace(key, request.key_name) if key else text
        words = "; ".join(line for line in text.split("\n") if not line.startswith(CHATTER))
        words = ("lost after login: " if "Authenticated to " in text else "") + words
        offers = [f"{mark} ({name})" for name, mark in re.findall(OFFERED, text)]
        return explain(request, words or "ssh failed; what it said stands above", offers)

def quote_path(path: str) -> str:
    """A path as an option's value (ssh_config(5): quotes, tokens)."""
    return '"' + path.replace("%", "%%") + '"'

def home_words(request: Request) -> list[str]:
    """ssh asks the password database where home is; $HOME may be elsewhere, as in CI."""
    import pwd
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise ControlError(f"ssh does not work for user id {os.getuid()}, which has no name here: "
                           "PGOCTL_TRANSPORT=asyncssh does") from None
    if request.folder == os.path.join(home, ".ssh"):
        return []
    config, *keys = (os.path.join(request.folder, name) for name in ("config", *DEFAULT_KEYS))
    keys = [key for key in keys if not request.key and os.path.exists(key)]
    return [*(["-F", config] if os.path.exists(config) else []),
            *(f"-oIdentityFile={quote_path(key)}" for key in keys)]

def ssh_words(request: Request, log: str, key: str, hosts: str, known: bool) -> list[str]:
    """The command line of ssh; log, key and hosts are paths, and key may be empty.

    Of a host that is known, ssh would still take a new key if that were of another type.
    """
    options = [
        *SSH_OPTIONS, f"HostKeyAlias={request.known_name}",
        f"UserKnownHostsFile={quote_path(hosts)}",
        f"StrictHostKeyChecking={'yes' if known else 'accept-new'}"]
    if key:
        options += [f"IdentityFile={quote_path(key)}", "IdentitiesOnly=yes", "IdentityAgent=none"]
    return ["ssh", "-E", log, "-l", USER, "-p", str(request.port),
            "-t" if request.terminal else "-T", *(f"-o{option}" for option in options),
            *home_words(request), "--", request.host, request.command]

def run_ssh(request: Request) -> int:
    """Have OpenSSH do it on our own standard streams; the command's status."""
    with contextlib.ExitStack() as stack:
        log = SshLog(stack)
        key = private_file(request.key, stack) if request.key else ""
        known, hosts = load_known_keys(request), request.known_hosts
        if request.pin:
            hosts = private_file(f"{request.known_name} {request.pin}\n", stack)
        words = ssh_words(request, log.path, key, hosts, bool(known))
        status = run_child(words, request.stdin, log.start)
        log.finish()
    if log.output_failed:
        raise output_failure()
    if status < 0:
        raise SignalError(-status)
    if status == 255 and (failure := log.failure(request, key)):
        raise failure
    if any("Failed to add the host" in line for line in log.lines):
        say(UNREMEMBERED.format(request.known_hosts))
    return status

# ==== asyncssh ====================================================================================

def load_asyncssh() -> ModuleType:
    """asyncssh, which takes half a second to import, with nothing to say for itself."""
    import logging
    import warnings
    warnings.simplefilter("ignore")
    logging.disable()
    os.environ.setdefault("LOGNAME", USER)  # asyncssh wants one, even where the user has no name
    try:
        import asyncssh
    except (ImportError, AttributeError) as error:  # the latter: two packages do not fit
        asked = os.environ.get("PGOCTL_TRANSPORT") == "asyncssh"
        why = "PGOCTL_TRANSPORT=asyncssh" if asked else "there is no ssh on PATH"
        raise ControlError(NO_TRANSPORT.format(f"{why}, but {error}")) from None
    return asyncssh

async def load_keys(asyncssh: ModuleType, request: Request) -> list[Any]:
    """The one key that was given, else the agent's and the default ones."""
    if request.key:
        try:
            return [asyncssh.import_private_key(request.key)]
        except (ValueError, asyncssh.Error) as error:
            raise explain(request, f'Load key "{request.key_name}": {error}') from None
    keys: list[Any] = []
    if path := os.environ.get("SSH_AUTH_SOCK"):
        with contextlib.suppress(OSError, ValueError, asyncssh.Error):
            keys += await (await asyncssh.connect_agent(path)).get_keys()
    for name in DEFAULT_KEYS:
        with contextlib.suppress(OSError, ValueError, asyncssh.Error):
            keys.append(asyncssh.read_private_key(os.path.join(request.folder, name)))
    return keys

async def connect(asyncssh: ModuleType, request: Request) -> Any:
    """A connection to pgod, logged in."""
    import asyncio

    class Client(asyncssh.SSHClient):  # type: ignore[name-defined,misc]
        """Asked for every host key, as known_hosts below is empty."""

        def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
            text = " ".join(key.export_public_key().decode().split()[:2])
            return is_right_host(request, known, text)

    known, keys = load_known_keys(request), await load_keys(asyncssh, request)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncssh.connect(
                request.host, request.port, username=USER, config=None, client_factory=Client,
                known_hosts=([], [], []), client_keys=keys or None, agent_path=None, gss_host=None,
                preferred_auth="publickey", keepalive_interval=ALIVE_SECONDS,
                keepalive_count_max=ALIVE_COUNT)
    except (OSError, ValueError, asyncssh.Error) as error:
        offers = [f"{fingerprint(key.public_data)} ({request.key_name or key.get_comment()})"
                  for key in keys]
        raise explain(request, f"{type(error).__name__}: {error}", offers) from None

class AsyncSession:
    """A command over asyncssh: the loop has a thread of its own, and so has each stream.

    A stream's thread copies chunk by chunk and waits for the slower side, which holds up no other.
    """

    def __init__(self, request: Request) -> None:
        import asyncio
        import queue
        self.request = request
        self.asyncssh = load_asyncssh()
        self.loop = asyncio.new_event_loop()
        self.submit = asyncio.run_coroutine_threadsafe
        self.ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        start_thread(self.loop.run_forever)

    def call(self, work: Awaitable[Any]) -> Any:
        """Have the loop wait for something."""
        async def wait() -> Any:
            return await work
        return self.submit(wait(), self.loop).result()

    def copy(self, source: Any, descriptor: int) -> None:
        """One output of the command, to its end."""
        try:
            while data := self.call(source.read(CHUNK)):
                write_output(descriptor, data)
            self.ended.put(None)
        except (ControlError, SignalError, self.asyncssh.Error, OSError) as error:
            self.ended.put(error)

    def feed(self, target: Any) -> None:
        """Standard input, to its end or until the command reads no more."""
        async def send(data: bytes) -> None:
            target.write(data)
            await target.drain()
        try:
            while data := os.read(0, CHUNK) if self.request.stdin else b"":
                self.call(send(data))
            self.loop.call_soon_threadsafe(target.write_eof)
        except (BrokenPipeError, self.asyncssh.Error):
            pass
        except OSError as error:
            self.ended.put(ControlError(f"standard input: {error.strerror}"))

    def run(self) -> int:
        """The command's status, negative if a signal ended it."""
        connection = self.call(connect(self.asyncssh, self.request))
        try:
            process = self.call(connection.create_process(self.request.command, encoding=None))
            start_thread(self.feed, process.stdin)
            start_thread(self.copy, process.stdout, 1)
            start_thread(self.copy, process.stderr, 2)
            for _ in (1, 2):
                if error := self.ended.get():
                    raise error
            self.call(process.wait_closed())
        except (self.asyncssh.Error, OSError) as error:
            raise explain(self.request, f"lost after login: {error}") from None
        if process.returncode is None:
            raise explain(self.request, "lost after login")
        self.loop.call_soon_threadsafe(connection.close)
        return int(process.returncode)

def run_asyncssh(request: Request) -> int:
    """Have asyncssh do it; the command's status."""
    if request.terminal:
        raise UsageError("-t needs OpenSSH's ssh")
    status = AsyncSession(request).run()
    if status < 0:
        raise SignalError(-status)
    return status

# ==== Configuration ===============================================================================

class Settings(NamedTuple):
    """What ~/.config/pgoctl.toml says; all of it may be empty."""

    defaults: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]
    hosts: Mapping[str, Mapping[str, Any]]

    def of(self, host: str, key: str) -> Any:
        """The host's own value, else the default; None where there is none."""
        return self.hosts.get(host, {}).get(key, self.defaults.get(key))

def settings_path() -> str:
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(folder, "pgoctl.toml")

def is_host(name: str) -> bool:
    """Whether it is a host; an IPv6 address stands in brackets."""
    return bool(re.fullmatch(HOST_NAME, name)) and name[0] != "@"

def settings_trouble(table: Mapping[str, Any]) -> str:
    """What is wrong with a configuration, the first of it; empty where all is well."""
    groups, hosts = table.get("groups", {}), table.get("hosts", {})
    for title, part in (("groups", groups), ("hosts", hosts)):
        if not isinstance(part, dict):
            return f"{title} is no table"
    for name, members in groups.items():
        if not re.fullmatch(r"(?a)\w[\w.-]*", name):
            return f"groups: {name!r} cannot be written as @{name}"
        if not isinstance(members, list) or not members or not all(
                isinstance(host, str) and is_host(host) for host in members):
            return (f'groups: {name} is no list of hosts, as ["a.example", "[2001:db8::1]"]; it '
                    "cannot have other groups in it")
    own = {key: value for key, value in table.items() if key not in ("groups", "hosts")}
    if wrong := [name for name in hosts if not is_host(f"[{name}]" if ":" in name else name)]:
        return f"hosts: {wrong[0]!r} is no host"
    for title, part in (("", own), *((f"hosts: {name}: ", part) for name, part in hosts.items())):
        if not isinstance(part, dict):
            return f"{title}is no table"
        for key, value in part.items():
            if key not in ("identity", "port"):
                more = (', [groups] and [hosts."NAME"]' if not title else
                        "; a name with dots stands in quotes" if isinstance(value, dict) else "")
                return f"{title}there is no key {key!r}; there are identity, port{more}"
            if key == "identity" and not isinstance(value, str):
                return f"{title}identity is the path of a file"
            if key == "port" and (type(value) is not int or not 0 < value < 65536):
                return f"{title}port is a number from 1 to 65535"
    return ""

def load_settings() -> Settings:
    """The configuration, if there is one."""
    path = settings_path()
    try:
        with open(path, "rb") as file:
            data = file.read(CHUNK)
    except FileNotFoundError:
        return Settings({}, {}, {})
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    import tomllib
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None
    if trouble := settings_trouble(table):
        raise UsageError(f"{path}: {trouble}")
    return Settings(table, table.get("groups", {}), table.get("hosts", {}))

def expand_hosts(text: str, settings: Settings) -> list[str]:
    """Every host that is named or in a group that is, once."""
    hosts: dict[str, None] = {}
    for name in text.split(","):
        if not re.fullmatch(HOST_NAME, name):
            raise UsageError(f"{name!r} is no host and no @group")
        if name.startswith("@") and name[1:] not in settings.groups:
            known = ", ".join(f"@{group}" for group in sorted(settings.groups)) or "no groups"
            raise UsageError(f"there is no group {name}; {settings_path()} has {known}")
        hosts |= dict.fromkeys(settings.groups[name[1:]] if name[0] == "@" else [name])
    return list(hosts)

# ==== Command line ================================================================================

def render_help() -> str:
    """The help, made of the tables."""
    options = {f"{f'-{short}, ' if short else ''}--{long} {value}": text
               for short, long, value, text in OPTIONS}
    tables: Sequence[tuple[str, Mapping[str, str]]] = (
        ("options, which end at the target: all after it belongs to the command", options),
        ("commands", COMMANDS), ("exit status", STATUSES), ("environment", ENVIRONMENT),
        ("~/.config/pgoctl.toml", CONFIGURATION),
        ("examples", EXAMPLES))
    lines = ["usage: pgoctl [-i FILE] [-p PORT] [-t] host:service//command [argument ...]",
             "       pgoctl [-i FILE] [-p PORT] host",
             "       pgoctl [-i FILE] [-p PORT] HOST,HOST,@GROUP[:service//command [argument ...]]",
             "",
             "Steers a compose service of a server that runs pgod. A host alone lists the services",
             "that the key may steer. Host keys are kept in ~/.ssh/known_hosts at first sight."]
    for title, rows in tables:
        width = max(map(len, rows))
        lines += ["", f"{title}:", *(f"  {name:{width}}  {text}" for name, text in rows.items())]
    return "\n".join(lines) + "\n"

def parse_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options by their long names, and the words from the target on."""
    short = "".join(letter + ":" * bool(value) for letter, _, value, _ in OPTIONS if letter)
    long = [name + "=" * bool(value) for _, name, value, _ in OPTIONS]
    long.append("complete=")  # for the shells' sake; its value is the line up to the cursor
    try:
        pairs, rest = getopt.getopt(list(words), short, long)
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg}; see pgoctl --help") from None
    names = {f"-{letter}": name for letter, name, _, _ in OPTIONS}
    return {names.get(option, option[2:]): value for option, value in pairs}, rest

def find_key(path: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Name and text of the key of -i, else of PGOCTL_ID; empty where neither was given."""
    if path is not None:
        return f"key {path!r}", parse_key(read_private(path), f"key {path!r}")
    text = environ.get("PGOCTL_ID")
    if text is not None and not text.strip():
        raise ControlError("PGOCTL_ID is empty: does this CI job get its secret?")
    return ("PGOCTL_ID", parse_key(text, "PGOCTL_ID")) if text else ("", "")

def find_ssh() -> bool:
    """Whether OpenSSH's client is installed."""
    return any(os.access(os.path.join(folder, "ssh"), os.X_OK) for folder in os.get_exec_path())

def wants_terminal(arguments: Sequence[str]) -> bool:
    """Whether exec gets a terminal, as from docker: where it would talk to one at both ends."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "--":
            break
        if re.fullmatch("-[it]*[dT][ditT]*|--detach|--no-TTY", word):
            return False
        if word in EXEC_VALUES:
            next(words, "")
    return os.isatty(0) and os.isatty(1)

def configured_port(host: str) -> str:
    """Port of the host in ~/.ssh/config, by ssh itself; pgod's where there is none."""
    config = os.path.expanduser("~/.ssh/config")
    try:
        with open(config, encoding="utf-8", errors="replace") as file:
            asks = re.search(r"(?im)^\s*(port|include)\b", file.read(CHUNK))
    except OSError:
        return str(PORT)
    if not asks or not find_ssh():
        return str(PORT)
    with contextlib.ExitStack() as stack:
        text = f"Include {quote_path(config)}\nHost *\nPort {PORT}\n"
        path = private_file(text, stack)
        words = ["ssh", "-G", "-F", path, "--", host]
        with start_child(words, stdout=subprocess.PIPE) as child:
            output = child.communicate()[0].decode(errors="replace")
    found = re.search(r"(?m)^port (\d+)$", output)
    return found[1] if found else str(PORT)

def build_request(options: Mapping[str, str], words: Sequence[str],
                  environ: Mapping[str, str], settings: Settings) -> Request:
    """What the command line, the environment and the configuration ask for, of one host."""
    host, service, command = parse_target(words[0])
    if not command and words[1:]:
        raise UsageError(f"nothing can follow a host alone: is {host}:SERVICE//{words[1]} meant?")
    host = host.strip("[]")
    port = options["port"] if "port" in options else str(
        settings.of(host, "port") or configured_port(host))
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(f"port {port!r}: a number from 1 to 65535 is needed")
    identity = options.get("identity")
    if identity is None and "PGOCTL_ID" not in environ and settings.of(host, "identity"):
        identity = os.path.expanduser(settings.of(host, "identity"))
    if (identity is None and "PGOCTL_ID" not in environ and host in LOCAL_HOSTS
            and os.geteuid() == 0 and os.path.exists(ADMIN_KEY)):
        identity = ADMIN_KEY
    key_name, key = find_key(identity, environ)
    pin = environ.get("PGOCTL_HOSTKEY")
    return Request(
        host, int(port), render_command(service, command or "list",
                                        words[1:] or ["--json"] * ("json" in options)),
        stdin=command in READS_STDIN, terminal="tty" in options or (
            command == "exec" and wants_terminal(words[1:]) and find_ssh()
            and environ.get("PGOCTL_TRANSPORT") != "asyncssh"), key_name=key_name, key=key,
        pin="" if pin is None else parse_host_key(pin), folder=os.path.expanduser("~/.ssh"))

def choose_transport(wanted: str) -> Callable[[Request], int]:
    """OpenSSH where it is installed and nothing else is wanted."""
    transports = {"ssh": run_ssh, "asyncssh": run_asyncssh}
    if wanted not in ("", *transports):
        raise UsageError(f"PGOCTL_TRANSPORT={wanted}: it is ssh or asyncssh")
    if wanted == "ssh" and not find_ssh():
        raise ControlError(NO_TRANSPORT.format("there is no ssh on PATH"))
    return transports[wanted or ("ssh" if find_ssh() else "asyncssh")]

# ==== Several hosts ===============================================================================

COLOURS = (36, 33, 35, 32, 34, 31)  # SGR, of a host's name at the beginning of its lines

def is_colourful(descriptor: int) -> bool:
    """Whether it shows colours (no-color.org)."""
    environ = os.environ
    return os.isatty(descriptor) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"

class Lines:
    """The output of several children, line by line, each behind the name of its host."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        self.ended: queue.SimpleQueue[ControlError | SignalError | None] = queue.SimpleQueue()

    def follow(self, source: Any, descriptor: int, prefix: bytes) -> None:
        """Copy what a child writes there."""
        self.threads.append(start_thread(self.copy, source, descriptor, prefix))

    def put(self, lines: Iterable[bytes], descriptor: int, prefix: bytes) -> None:
        """Write them; nothing in one can change another, or its host's name."""
        text = b"".join(prefix + plain_line(line) + b"\n" for line in lines)
        with self.lock:
            write_output(descriptor, text)

    def copy(self, source: Any, descriptor: int, prefix: bytes) -> None:
        """To its end, which is told; a very long line comes in pieces."""
        rest, failure = b"", None
        try:
            with source:  # closed, it ends the child
                while data := source.read1(CHUNK):
                    *lines, rest = (rest + data).split(b"\n")
                    if len(rest) >= CHUNK:
                        lines, rest = [*lines, rest], b""
                    self.put(lines, descriptor, prefix)
                self.put([rest] if rest else [], descriptor, prefix)
        except (ControlError, SignalError) as error:
            failure = error
        finally:
            self.ended.put(failure)

def plain_line(line: bytes) -> bytes:
    """Without what moves a terminal's cursor; colours stay, and end with the line."""
    text = re.sub(rb"(\x1b\[[0-9;]{0,20}m)|[\0-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]",
                  lambda match: match[1] or b"?", line.removesuffix(b"\r"))
    return text + b"\x1b[0m" * (b"\x1b" in text)

def feeds(command: str) -> bool:
    """Whether the command would get standard input, and there is something in it."""
    kind = os.fstat(0).st_mode
    return command in READS_STDIN and (stat.S_ISFIFO(kind) or stat.S_ISREG(kind))

STATES = {"in sync": 32, "failed": 31, "refused": 31, "unhealthy": 31, "unreachable": 31}  # SGR
OVERVIEW_BYTES = 8 << 20  # of what one host says of its services
UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))

def age(seconds: float) -> str:
    """In the largest unit, as 3d."""
    return next((f"{seconds / size:.0f}{unit}" for size, unit in UNITS if seconds >= size), "0s")

def overview(services: Sequence[tuple[str, Mapping[str, Any]]], now: float, width: int,
             colour: bool) -> str:
    """A table of services, each with its host; `width` cuts the lines, 0 does not."""
    several = len({host for host, _ in services}) > 1
    rows = [["HOST"] * several + ["SERVICE", "STATE", "COMMIT", "AGE", "UP", "SUBJECT, OR WHY NOT"]]
    for host, facts in services:
        containers = facts["containers"]
        well = sum(c["status"] == "running" and c["health"] in ("", "healthy") for c in containers)
        rows.append([host] * several + [
            facts["service"], facts["state"], facts["commit"][:10] or "-",
            age(now - facts["since"]) if facts["since"] else "-", f"{well}/{len(containers)}",
            facts["subject"] if facts["state"] == "in sync" else facts["why"]])
    rows = [[re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", "?", cell) for cell in row] for row in rows]
    widths = [*(max(map(len, column)) for column in [*zip(*rows, strict=True)][:-1]), 0]
    lines = []
    for row in rows:
        line = "  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip()
        line = line if not width or len(line) <= width else line[:width - 1] + "…"
        state = row[1 + several]
        if colour and state in STATES:
            line = line.replace(f"  {state}", f"  \x1b[{STATES[state]}m{state}\x1b[0m", 1)
        lines.append(line)
    return "\n".join(lines) + "\n"

def show_overview(hosts: Sequence[str], options: Mapping[str, str], key: str) -> int:
    """The services of all hosts in one table; the worst of the statuses."""
    import json
    import time
    more = ["-p", options["port"]] if "port" in options else []
    children: list[subprocess.Popen[bytes]] = []
    outputs = [b""] * len(hosts)

    def collect(number: int) -> None:
        outputs[number] = children[number].stdout.read(OVERVIEW_BYTES)  # type: ignore[union-attr]
    services: list[tuple[str, Mapping[str, Any]]] = []
    worst = 0
    try:
        for host in hosts:
            words = [sys.executable, os.path.abspath(__file__), "--json", *more, "--", host]
            children.append(start_child(words, stdout=subprocess.PIPE, key=key))
        for thread in [start_thread(collect, number) for number in range(len(hosts))]:
            thread.join()
        for host, child, output in zip(hosts, children, outputs, strict=True):
            status = 0 if len(output) == OVERVIEW_BYTES else child.wait()
            worst = max(worst, status if status >= 0 else 128 - status)
            try:
                services += [(host, facts) for facts in json.loads(output)] if not status else []
            except (ValueError, RecursionError):
                raise ControlError(f"{host}: pgod's answer is not understood") from None
    finally:
        for child in children:
            child.terminate()
    if services or not worst:
        terminal = os.isatty(1)
        try:
            text = overview(services, time.time(), os.get_terminal_size(1)[0] if terminal else 0,
                            is_colourful(1))
        except (KeyError, TypeError, ValueError):
            raise ControlError("a pgod's answer is not understood") from None
        write_output(1, text.encode())
    return worst

def ask_all(hosts: Sequence[str], rest: str, options: Mapping[str, str], words: Sequence[str],
            key: str) -> int:
    """Ask every host at once, each by a pgoctl of its own; the worst of the statuses."""
    # rest: what stands behind the host, as :web//up; words: what follows.
    lines, width, children = Lines(), max(map(len, hosts)), list[subprocess.Popen[bytes]]()
    more = ["-p", options["port"]] if "port" in options else []
    more += [f"--{name}" for name in ("json", "quiet") if name in options]
    try:
        for number, host in enumerate(hosts):
            child = start_child([sys.executable, os.path.abspath(__file__), *more, "--",
                                 host + rest, *words], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, key=key)
            children.append(child)
            for stream, descriptor in ((child.stdout, 1), (child.stderr, 2)):
                name = f"{host:<{width}}"
                if is_colourful(descriptor):
                    name = f"\x1b[{COLOURS[number % len(COLOURS)]}m{name}\x1b[0m"
                lines.follow(stream, descriptor, f"{name}  ".encode())
        for _ in lines.threads:
            if failure := lines.ended.get():
                raise failure
        statuses = {host: child.wait() for host, child in zip(hosts, children, strict=True)}
    finally:
        for child in children:
            child.terminate()
        for thread in lines.threads:  # what was begun is written
            thread.join(0.2)
    worst = 0
    for host, status in statuses.items():
        status = status if status >= 0 else 128 - status
        worst = max(worst, status)
        if status:
            say(f"{host} ended with {status}")
    return worst

# ==== Completion ==================================================================================

COMPLETE_SECONDS, CACHE_SECONDS = 1.0, 60.0
SCRIPTS = {
    "bash": r"""_pgoctl() {
  local line="${COMP_LINE:0:COMP_POINT}"
  local word="${line##* }"
  mapfile -t COMPREPLY < <(pgoctl --complete "$line" 2>/dev/null)
  # bash takes what stands behind the last colon for the word.
  [[ $word == *:* && $COMP_WORDBREAKS == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%:*}:"}")
}
complete -o nospace -o default -F _pgoctl pgoctl
""",
    "zsh": r"""(( $+functions[compdef] )) || { autoload -Uz compinit; compinit; }
_pgoctl() {
  local -a found
  found=("${(@f)$(pgoctl --complete "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
  [[ -n $found ]] && compadd -S '' -Q -- $found || _files
}
compdef _pgoctl pgoctl
""",
    "fish": r"""complete -c pgoctl -f -a '(pgoctl --complete (commandline -cp) 2>/dev/null)'
complete -c pgoctl -s i -l identity -r -F
complete -c pgoctl -s p -l port -x
complete -c pgoctl -l completion -x -a 'bash zsh fish'
""",
}

def cached_answer(words: Sequence[str]) -> list[str]:
    """What the server says to words, a minute old at most; where it is late, what it said."""
    import time
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                          "pgoctl")
    path, text = os.path.join(folder, " ".join(words).replace("/", "%")[-200:]), ""
    ours = os.O_NOFOLLOW | os.O_NONBLOCK  # what somebody else put there is not opened, or not read
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | ours), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
            text = file.read(CHUNK).decode(errors="replace")
            if abs(time.time() - status.st_mtime) < CACHE_SECONDS:
                return text.splitlines()
    child = start_child([sys.executable, os.path.abspath(__file__), *words],
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        key=os.environ.get("PGOCTL_ID", ""))
    output: list[bytes] = []
    start_thread(lambda: output.append(child.stdout.read(CHUNK))  # type: ignore[union-attr]
                 ).join(COMPLETE_SECONDS)
    try:
        if not output or child.wait(COMPLETE_SECONDS / 10) != 0:
            return text.splitlines()
    except subprocess.TimeoutExpired:  # it has more to say than anybody completes
        return text.splitlines()
    finally:
        child.terminate()
    text = output[0].decode(errors="replace")
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fresh = f"{path}.{os.urandom(8).hex()}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | ours, 0o600), "wb") as file:
            file.write(output[0])
        os.replace(fresh, path)
    return text.splitlines()

def known_hosts_names() -> list[str]:
    """The hosts of known_hosts that are pgod's, as far as they are not hashed."""
    text = ""
    with contextlib.suppress(OSError), open(os.path.expanduser("~/.ssh/known_hosts"),
                                            encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    return re.findall(r"(?m)^\[([\w.-]+)\]:\d+ ", text)

def complete(line: str, settings: Settings) -> list[str]:
    """What the last word of a command line may become; nothing where no host is to stand."""
    *words, word = line.split(" ")[1:] or [""]
    try:
        options, target = parse_options(list(filter(None, words)))
    except UsageError:  # the word is what an option takes
        return [*SCRIPTS] if words[-1] == "--completion" else []
    if target:
        return []
    if word.startswith("-"):
        return [f"--{name}" for _, name, _, _ in OPTIONS if f"--{name}".startswith(word)]
    asks = [part for name, value in options.items() if value
            for part in (f"--{name}", os.path.expanduser(value))]
    place, slashes, _ = word.partition("//")
    before, comma, last = place.rpartition(",")
    colon = re.search(r":(?![^\[]*\])", last)
    if not slashes and not colon:
        hosts = {*known_hosts_names(), *settings.hosts, *(f"@{name}" for name in settings.groups),
                 *(host for members in settings.groups.values() for host in members)}
        return sorted(f"{before}{comma}{host}:" for host in hosts if host.startswith(last))
    head, _, service = place.rpartition(":")
    host = expand_hosts(head, settings)[0]
    if not slashes:
        names = [f"{head}:{name}//" for name in cached_answer([*asks, "-q", "--", host])
                 if re.fullmatch(r"(?a)[\w-]+", name)]
    else:
        lines = cached_answer([*asks, "--", f"{host}:{service}//help"])
        names = [f"{place}//{line[:9].strip()}" for line in lines
                 if re.fullmatch("(git )?[a-z]+", line[:9].strip())]
    # A shell puts it on the command line: nothing of a server's but names.
    return [name for name in names if name.startswith(word)][:1000]

# ==== Main ========================================================================================

def open_streams() -> None:
    """Standard streams that came closed become /dev/null, lest a socket get their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)

def interrupt(number: int, frame: FrameType | None) -> None:
    """Let a signal unwind the stack; the next one ends us at once."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise SignalError(number)

def run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Do what is asked for; the exit status."""
    options, rest = parse_options(words)
    shell = options.get("completion", "bash")
    if shell not in SCRIPTS:
        raise UsageError(f"--completion takes bash, zsh or fish, not {shell!r}")
    texts: Mapping[str, Callable[[], str]] = {
        "help": render_help, "version": lambda: f"pgoctl {VERSION}\n",
        "completion": lambda: SCRIPTS[shell], "complete": lambda: "".join(
            f"{found}\n" for found in complete(options["complete"], load_settings()))}
    for name in texts.keys() & options.keys():
        write_output(1, texts[name]().encode(errors="surrogateescape"))
        return 0
    if not rest:
        raise UsageError("the target is missing: pgoctl host:service//command; see pgoctl --help")
    (host, _, command), settings = parse_target(rest[0]), load_settings()
    if not command and not rest[1:] and not {"json", "quiet"} & options.keys():
        return show_overview(expand_hosts(host, settings), options,
                             find_key(options.get("identity"), environ)[1])
    if "," in host or "@" in host:
        if "tty" in options:
            raise UsageError("-t is for one host alone")
        if feeds(command):
            raise UsageError("standard input is for one host alone; here it must be </dev/null")
        return ask_all(expand_hosts(host, settings), rest[0].removeprefix(host), options, rest[1:],
                       find_key(options.get("identity"), environ)[1])
    request = build_request(options, rest, environ, settings)
    transport = choose_transport(environ.get("PGOCTL_TRANSPORT", ""))
    return transport(request)

def main(words: Sequence[str]) -> int:
    """The exit status; what went wrong is told on standard error."""
    open_streams()
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        return run(words, os.environ)
    except SignalError as error:
        return error.status
    except ControlError as error:
        say(str(error))
        return error.status

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
