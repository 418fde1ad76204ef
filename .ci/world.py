"""A model of the engine and of compose, and a world in which pgod runs on it, in virtual time.

The model knows what pgod asks of an engine, and no more; that it tells the truth is a test. What
pgod does to the world are steps: a changed file (Python tells of each by itself, by audit events),
a child, a changing request, and each part of what compose does. A fault can be done at any of them.
git is the real one.
"""

from __future__ import annotations

import copy
import email.utils
import errno
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgod

EPOCH = 1_900_000_000.0  # when virtual time begins
IMAGE_ID = "sha256:" + "1" * 64
OTHER_IMAGES = tuple("sha256:" + digit * 64 for digit in "23")
CHANGES = frozenset(("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate",
                     "shutil.rmtree"))
Model = Mapping[str, Any]


def described(event: str, words: tuple[Any, ...]) -> str:
    """The step, without what differs from run to run; nothing for what changes nothing."""
    if event == "open" and isinstance(words[0], str) and words[2] & (os.O_WRONLY | os.O_RDWR):
        text = f"write {words[0]}"
    elif event in CHANGES:
        text = f"{event.partition('.')[2]} {words[0]}"
    elif event == "subprocess.Popen":
        text = "child " + " ".join(map(os.fsdecode, words[1]))
    elif event == "http.client.send" and words[1][:4] != b"GET " and b" HTTP/1.1" in words[1]:
        text = "engine " + words[1].split(b" HTTP")[0].decode(errors="replace")
    else:
        return ""
    if "/dev/" in text or "/proc/" in text or "ls-remote" in text:
        return ""
    return re.sub(r"[0-9a-f]{10,}|(?<=json\.)\w{8}\b", "*", text)


class Killed(BaseException):
    """pgod is no more: nothing that it would still do reaches the world."""


class Refusal(Exception):
    """The engine says no: its status and words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def stamp(seconds: float) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{moment}.{int(seconds % 1 * 1e6):06}Z" if seconds else "0001-01-01T00:00:00Z"


class Engine:
    """Containers, networks, volumes and names of images, and what compose makes of them."""

    def __init__(self, step: Callable[[str], None]) -> None:
        self.step = step  # is told before anything changes; may raise
        self.now = EPOCH
        self.containers: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.names: dict[str, str] = {}  # of images: identity
        self.registry: dict[str, str] = {}  # what a pull leads the names of images to
        self.refused: dict[str, float] = {}  # commands whose containers are not made until then
        self.killed: list[str] = []  # removed without having been stopped
        self.in_vain: list[str] = []  # made anew, though nothing differed
        self.on_exec: Callable[[], object] = lambda: None
        self.numbers = itertools.count(1)
        self.changes: list[tuple[str, str, str]] = []  # what was done, to which, its digest

    def copied(self, step: Callable[[str], None]) -> Engine:
        """One like it, for another world."""
        other = Engine(step)
        for name in ("now", "containers", "networks", "volumes", "names", "registry", "refused",
                     "numbers"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    def identity(self) -> str:
        return f"{next(self.numbers):012x}" + "0" * 52

    # Containers live by their command: `sleep N` stays, `sh -c "exit N"` ends.
    def status(self, facts: Mapping[str, Any]) -> tuple[str, int, int]:
        """State, exit status and restarts now."""
        match = re.search(r"exit (\d+)", " ".join(facts["model"].get("command") or ()))
        if facts["status"] != "running" or not match:
            return facts["status"], facts["code"], 0
        policy = str(facts["model"].get("restart") or "no").partition(":")[0]
        code, restarts = int(match[1]), min(int(self.now - facts["started"]), 20)
        if policy == "no" or (policy == "on-failure" and not code):
            return "exited", code, 0
        return "restarting", code, restarts

    def health(self, facts: Mapping[str, Any]) -> str:
        check = facts["model"].get("healthcheck")
        if not check or not facts["started"]:
            return ""
        if self.status(facts)[0] != "running":
            return "unhealthy"
        good = "true" in check["test"]
        age = self.now - facts["started"]
        return "starting" if age < (0.5 if good else 3) else "healthy" if good else "unhealthy"

    def described(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """As GET /containers/ID/json says it, as far as pgod reads it."""
        status, code, restarts = self.status(facts)
        model, health = facts["model"], self.health(facts)
        mounts = [{"Type": "bind", "Source": item["source"], "Destination": item["target"],
                   "RW": not item.get("read_only")} if item["type"] == "bind" else
                  {"Type": "volume", "Name": f"{facts['project']}_{item['source']}",
                   "Destination": item["target"], "RW": True}
                  for item in model.get("volumes") or ()]
        return {
            "Id": facts["id"], "Name": "/" + facts["name"], "Created": stamp(facts["created"]),
            "RestartCount": restarts, "Image": facts["image"], "Mounts": mounts,
            "State": {"Status": status, "ExitCode": code, "StartedAt": stamp(facts["started"]),
                      "FinishedAt": stamp(facts["ended"]),
                      **({"Health": {"Status": health, "Log": []}} if health else {})},
            "HostConfig": {"RestartPolicy": {"Name": str(model.get("restart") or "no")}},
            "Config": {"Labels": facts["labels"], "Tty": False},
            "NetworkSettings": {"Ports": {}, "Networks": {
                name: {"NetworkID": self.networks.get(name, {}).get("Id", "")}
                for name in facts["networks"]}}}

    # What changes:
    def do(self, what: str, name: str, facts: dict[str, Any] | None = None) -> None:
        self.step(f"engine: {what} {name}")
        if facts:
            self.changes.append((what, facts["name"], facts["labels"].get(pgod.DIGEST_LABEL, "")))

    def create(self, project: str, service: str, model: Model, name: str,
               replaces: str = "") -> dict[str, Any]:
        if model.get("cpuset"):
            raise Refusal(400, f"Error response from daemon: Requested CPUs are not available - "
                               f"requested {model['cpuset']}, available: 0-1")
        if self.refused.get(" ".join(model.get("command") or ()), 0) > self.now:
            raise Refusal(500, "Error response from daemon: it is out of order")
        image: str = self.names.get(str(model["image"]), "")
        if not image and model["image"] in self.names.values():
            image = str(model["image"])
        if not image:
            raise Refusal(404, f"Error response from daemon: No such image: {model['image']}")
        labels = dict(model.get("labels") or {}) | {
            pgod.PROJECT_LABEL: project, pgod.SERVICE_LABEL: service,
            "com.docker.compose.oneoff": "False", "com.docker.compose.config-hash": shape(model)}
        if replaces:
            labels[pgod.REPLACE_LABEL] = replaces
        facts: dict[str, Any] = {
            "id": self.identity(), "name": name, "project": project, "service": service,
            "model": dict(model), "labels": labels, "image": image, "status": "created",
            "code": 0, "created": self.now, "started": 0.0, "ended": 0.0, "killed": False,
            "networks": [f"{project}_{key}" for key in model.get("networks") or ()]}
        self.do("create", name, facts)
        self.in_vain += [name for old in self.of(project, service) if old["image"] == image
                         and old["labels"].get(pgod.DIGEST_LABEL) == labels.get(pgod.DIGEST_LABEL)
                         and old["status"] != "created" and old["networks"] == facts["networks"]]
        self.containers[facts["id"]] = facts
        for item in model.get("volumes") or ():
            if item["type"] == "volume":
                self.volumes.setdefault(f"{project}_{item['source']}", {
                    "Name": f"{project}_{item['source']}", "Driver": "local", "Options": None,
                    "Labels": {pgod.PROJECT_LABEL: project}, "born": self.identity()})
        return facts

    def start(self, facts: dict[str, Any]) -> None:
        self.do("start", facts["name"], facts)
        facts |= {"status": "running", "code": 0, "started": self.now, "killed": False}

    def stop(self, facts: dict[str, Any]) -> None:
        self.do("stop", facts["name"], facts)
        if facts["status"] == "running":
            facts |= {"status": "exited", "code": 137, "ended": self.now, "killed": True}

    def remove(self, facts: dict[str, Any]) -> None:
        self.do("remove", facts["name"], facts)
        self.killed += [facts["name"]] * (self.status(facts)[0] == "running")
        self.containers.pop(facts["id"], None)

    def of(self, project: str, service: str = "") -> list[dict[str, Any]]:
        return [facts for facts in self.containers.values() if facts["project"] == project
                and service in ("", facts["service"])]

    # compose:
    def compose(self, project: str, model: Model, command: str, words: Sequence[str]) -> str:
        """Do it; what it writes. Raises Refusal."""
        services = model.get("services") or {}
        named = [*words[words.index("--") + 1:]] if "--" in words else []
        if command == "up":
            self.up(project, model, named or [*services], "--force-recreate" in words)
        elif command in ("stop", "restart", "down"):
            for facts in self.of(project):
                if not named or facts["service"] in named:
                    self.stop(facts)
                    if command == "restart":
                        self.start(facts)
                    elif command == "down":
                        self.remove(facts)
            for name in [n for n, network in self.networks.items() if command == "down"
                         and network["Labels"].get(pgod.PROJECT_LABEL) == project]:
                self.do("remove network", name)
                del self.networks[name]
            for name in [n for n in self.volumes if {"--volumes", "-v"} & {*words}]:
                del self.volumes[name]
        elif command == "pull":
            self.pull({services[name]["image"] for name in named})
        elif command == "exec":
            self.step("engine: exec")
            self.on_exec()
        elif command == "config":
            return "".join(f"{name} {shape(service)}\n" for name, service in services.items())
        else:
            raise AssertionError(f"the model has no compose {command}")
        return ""

    def pull(self, images: set[str]) -> None:
        if gone := sorted(images - {*self.names}):
            raise Refusal(404, f"{gone[0]} Error: manifest unknown")
        for image in images & {*self.registry}:
            self.step(f"engine: pull {image}")
            self.names[image] = self.registry[image]

    def up(self, project: str, model: Model, named: Sequence[str], force: bool) -> None:
        services = model["services"]
        for facts in self.of(project):
            if facts["service"] not in services:
                self.stop(facts)
                self.remove(facts)
        for key, network in (model.get("networks") or {}).items():
            name = network.get("name") or f"{project}_{key}"
            if name not in self.networks and any(
                    key in (services[service].get("networks") or ()) for service in named):
                self.do("create network", name)
                self.networks[name] = {"Name": name, "Id": self.identity(), "Internal": False,
                                       "Labels": dict(network.get("labels") or {}) | {
                                           pgod.PROJECT_LABEL: project}}
        for service in named:
            have, wanted = self.of(project, service), services[service]
            if not have:
                self.create(project, service, wanted, f"{project}-{service}-1")
            for facts in have:
                same = facts["labels"]["com.docker.compose.config-hash"] == shape(wanted) and (
                    facts["image"] == self.names.get(wanted["image"], wanted["image"]))
                if force or not same:
                    name = re.sub(r"^[0-9a-f]{12}_", "", facts["name"])
                    new = self.create(project, service, wanted, f"{facts['id'][:12]}_{name}",
                                      facts["id"])
                    self.stop(facts)
                    self.remove(facts)
                    self.do("rename", name, new)
                    new["name"] = name
        for service in named:
            for facts in self.of(project, service):
                if facts["status"] != "running" or self.status(facts)[0] == "exited":
                    self.start(facts)

    # The API:
    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Any:
        """What the engine says. Raises Refusal."""
        filters = json.loads(query.get("filters", "{}"))
        words = [urllib.parse.unquote(word) for word in path.strip("/").split("/")]
        if words == ["containers", "json"]:
            return [self.row(facts) for facts in self.containers.values()
                    if labelled(facts["labels"], filters.get("label", ())) and (
                        {"network"} - {*filters} or self.on(facts, filters["network"][0]))]
        if words == ["images", "json"]:
            return [{"RepoTags": [name], "RepoDigests": [], "Labels": {}} for name in self.names
                    if name.startswith(tuple(filters.get("reference", ("-",))))]
        if words == ["networks"]:
            return [*self.networks.values()]
        if words == ["events"]:
            return None
        if words == ["info"]:
            return {"DockerRootDir": "", "DriverStatus": []}
        if words[0] == "images":
            return self.answer_image(method, "/".join(words[1:]), query)
        if words[0] == "volumes":
            return found(self.volumes, words[1])
        if words[0] == "networks":
            return self.answer_network(method, words, body)
        facts = found(self.containers, words[1])
        if method == "GET":
            return self.described(facts) if words[2:] == ["json"] else ""
        if method == "DELETE":
            return self.remove(facts)
        if words[2] == "stop":
            return self.stop(facts)
        assert words[2] == "rename", path
        self.do("rename", query["name"], facts)
        facts["name"] = query["name"]
        return None

    def row(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"Id": facts["id"], "Names": ["/" + facts["name"]], "Labels": facts["labels"],
                "Image": facts["model"]["image"]}

    def on(self, facts: Mapping[str, Any], network: str) -> bool:
        return any(self.networks[name]["Id"] == network for name in facts["networks"]
                   if name in self.networks)

    def answer_image(self, method: str, rest: str, query: Mapping[str, str]) -> Any:
        name = re.sub("/(json|tag)$", "", rest)
        identity = self.names.get(name, name if name in self.names.values() else "")
        if not identity:
            raise Refusal(404, f"No such image: {name}")
        if method == "GET":
            return {"Id": identity, "RepoDigests": [], "Config": {"Labels": {}, "Volumes": None},
                    "RepoTags": [text for text, found in self.names.items() if found == identity]}
        self.step(f"engine: {method} image {name}")
        if method == "POST":
            self.names[query["repo"]] = identity
        else:
            del self.names[name]
        return None

    def answer_network(self, method: str, words: Sequence[str], body: Any) -> Any:
        name = next((n for n, network in self.networks.items() if network["Id"] == words[1]), "")
        found(self.networks, name)
        self.do(f"{method.lower()} network", name)
        if method == "DELETE":
            del self.networks[name]
        else:
            self.containers[body["Container"]]["networks"].remove(name)
        return None


def shape(model: Model) -> str:
    """As compose's own hash: of all that shapes a container."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def found(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise Refusal(404, f"there is no {name}")
    return table[name]


def labelled(labels: Mapping[str, str], wanted: Sequence[str]) -> bool:
    return all(f"{text}=".split("=")[1] in ("", labels.get(text.partition("=")[0]))
               and text.partition("=")[0] in labels for text in wanted)


class Api(pgod.EngineApi):
    """The engine's API, answered by the model."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def exchange(self, method: str, path: str, body: Any = None,
                 seconds: float = 60.0) -> tuple[bytes, http.client.HTTPMessage]:
        engine = self.world.engine
        if self.world.engine_is_gone():
            raise pgod.EngineGone("the engine does not answer: refused")
        parts = urllib.parse.urlsplit(re.sub(r"^/v1\.\d+", "", path))
        headers = http.client.HTTPMessage()
        headers["Date"] = email.utils.formatdate(engine.now, usegmt=True)
        if parts.path == "/_ping":
            return b"OK", headers
        query = dict(urllib.parse.parse_qsl(parts.query))
        try:
            answer = engine.answer(method, parts.path, query, body)
        except Refusal as refusal:
            kind = pgod.NotThere if refusal.status == 404 else pgod.Fault
            raise kind(str(refusal)) from None
        return b"" if answer is None else json.dumps(answer).encode(), headers


class Children(pgod.Children):
    """compose is the model's, but for rendering; all else is the real program."""

    rendered: ClassVar[dict[str, pgod.Result]] = {}  # by what it was made of

    def __init__(self, world: World, metrics: pgod.Metrics) -> None:
        super().__init__(metrics)
        self.world = world

    def run(self, words: Sequence[str], who: pgod.RunAs, **more: Any) -> pgod.Result:
        command, subcommand = more["kind"]
        if (command, subcommand) == ("compose", "config") and "json" in words:
            return self.render(words, who, **more)
        if command != "compose":
            if "ls-remote" not in words:
                self.world.step("child " + " ".join(words[words.index("git"):][-3:]
                                                    if "git" in words else words))
            return super().run(words, who, **more)
        return self.compose(words, subcommand)

    def render(self, words: Sequence[str], who: pgod.RunAs, **more: Any) -> pgod.Result:
        files = [words[at + 1] for at, word in enumerate(words) if word == "--file"]
        key = repr((words, [Path(file).read_text() for file in files]))
        if key not in self.rendered:
            self.rendered[key] = super().run(words, who, **more)
        return self.rendered[key]

    def compose(self, words: Sequence[str], command: str) -> pgod.Result:
        world = self.world
        project = words[words.index("--project-name") + 1]
        model = json.loads(Path(words[words.index("--file") + 1]).read_text()) if (
            "--file" in words) else {}
        rest = words[words.index("/dev/null") + 1:] if "/dev/null" in words else words
        world.in_child += 1
        try:
            world.step(f"child compose {command}")
            if world.engine_is_gone():
                return pgod.Result(1, b"", "Cannot connect to the Docker daemon", "")
            text = world.engine.compose(project, model, command, rest)
        except Refusal as refusal:
            return pgod.Result(1, b"", str(refusal), "")
        except ChildEnded as ended:
            return pgod.Result(ended.status, b"", "", ended.trouble)
        finally:
            world.in_child -= 1
        world.after_child()
        return pgod.Result(0, text.encode(), "", "")


class ChildEnded(Exception):
    """The child ended in the middle of what it did."""

    def __init__(self, status: int, trouble: str = "") -> None:
        super().__init__(status)
        self.status, self.trouble = status, trouble


class Worker(pgod.Worker):
    """The service's thread, which is run by hand: time passes where it would sleep."""

    world: World

    def next_turn(self) -> tuple[pgod.Job | None, set[str]]:
        return self.world.next_turn(self)

    def pause(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        if self.shared.stopping.is_set():
            raise pgod.Stopping
        if held := self.store.hold():
            raise pgod.Held(f"does not wait any longer: {held}")


class World:
    """A server with pgod on it: folders, a repository, the engine, the time, and one fault."""

    listens: World | None = None  # the one whose steps are counted now

    def __init__(self, root: Path, user: str, name: str = "app") -> None:
        self.root, self.user, self.name = root, user, name
        self.engine = Engine(self.step)
        self.engine.names |= {"busybox:1": IMAGE_ID, "web:1": OTHER_IMAGES[0]}
        self.keys: dict[str, Any] = {}
        self.steps: list[str] = []
        self.plan: dict[int, str] = {}  # faults, by the number of their steps
        self.fault = ""  # the one that was done last
        self.dead = self.dies_after_child = False
        self.in_child = 0
        self.gone_until = 0.0
        self.jobs: list[pgod.Job] = []
        self.present = True  # in pgo.toml
        self.tell: list[str] = []
        self.watch: Callable[[], None] = lambda: None
        self.meanwhile: Callable[[], object] = lambda: None  # while pgod is dead
        self.others: dict[str, Callable[[], object]] = {}  # faults that are somebody else's acts
        self.names: dict[Path, bytes | None] = {}  # renamed, and not flushed yet: what was there
        self.flushed: set[str] = set()
        self.hollow: set[Path] = set()  # renamed before what is in them was flushed

    @property
    def now(self) -> float:
        return self.engine.now

    def pass_time(self, seconds: float) -> None:
        self.engine.now += seconds

    def engine_is_gone(self) -> bool:
        return self.now < self.gone_until

    # Steps and faults:
    def step(self, text: str) -> None:
        """Something is about to change; what the fault of the world is, happens here."""
        if self.dead:
            raise Killed
        number = len(self.steps)
        self.steps.append("  " * self.in_child + text)
        self.watch()
        if number in self.plan:
            self.fault = self.plan[number]
            listening, World.listens = World.listens, None
            try:
                self.do(text)
            finally:
                World.listens = listening

    def die(self) -> None:
        self.dead = True
        raise Killed

    def do(self, text: str) -> None:
        fault = self.fault
        if fault in ("kill", "power cut") or (fault == "child goes on" and not self.in_child):
            self.die()
        elif fault == "child goes on":
            self.dies_after_child = True
        elif fault == "end":
            self.shared.stopping.set()
        elif fault == "child killed" and self.in_child:
            raise ChildEnded(-9)
        elif fault == "child hangs" and self.in_child:
            self.pass_time(600)
            raise ChildEnded(-9, "took longer than 600 s")
        elif fault == "engine gone":
            self.gone_until = self.now + 10
        elif fault in ("fails", "disk full"):
            self.fail(text)
        elif fault in self.others:
            self.others[fault]()

    def fail(self, text: str) -> None:
        """The step fails, as steps of its kind do."""
        if self.in_child:
            raise ChildEnded(1)
        if text.startswith("engine: "):
            raise Refusal(500, "Error response from daemon: it went wrong")
        if text.startswith("child "):
            raise pgod.Fault("it cannot be started: Cannot allocate memory")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after_child(self) -> None:
        if self.dies_after_child:
            self.die()

    def cut_power(self) -> None:
        """Only what was flushed is there."""
        for path, former in self.names.items():
            if former is None:
                path.unlink(missing_ok=True)
            elif path.parent.is_dir():
                path.write_bytes(former)
        for path in self.hollow - {*self.names}:
            if path.exists():
                path.write_bytes(b"")
        self.names.clear()
        self.hollow.clear()

    # pgod:
    def write_config(self) -> Path:
        keys = {"name": self.name if self.present else "other", "user": self.user, "wait": "20s",
                "repository": str(self.root / "repository.git")} | self.keys
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()
                          if not isinstance(value, dict))
        urls = ", ".join(f"{json.dumps(host)} = {json.dumps(target)}"
                         for host, target in keys.get("urls", {}).items())
        config = self.root / "pgo.toml"
        config.write_text(f"services = [{{{table}, urls = {{{urls}}}}}]\n")
        config.chmod(0o600)
        return config

    def boot(self, config: Path) -> None:
        """pgod begins, with what is on disk, and lives until it ends. Raises Killed."""
        settings = pgod.Settings(config, self.root / "lib", self.root / "data", None, None, 60.0)
        metrics = pgod.Metrics()
        self.shared = pgod.Shared(
            settings, pgod.read_configuration(config), Children(self, metrics), metrics,
            ("docker", "compose"), Api(self), clock=lambda: self.now, chance=lambda: 0.0)
        pgod.make_folder(settings.directory / ".pgod", 0o711)
        pgod.remove_unfinished(settings.directory)
        self.shared.events_flow.set()
        pgod.remove_stale(self.shared)
        for service in self.shared.configuration.services if self.present else ():
            self.worker = self.shared.workers[service.name] = Worker(service, self.shared)
            self.worker.world = self
            self.worker.run()

    def next_turn(self, worker: Worker) -> tuple[pgod.Job | None, set[str]]:
        """What the thread is woken by; the end, where nothing is to come."""
        if self.shared.stopping.is_set():
            return None, set()
        if self.turns == 0:
            self.turns += 1
            return (self.jobs.pop(0), set()) if self.jobs else (None, {"start"})
        self.turns += 1
        if self.jobs:
            return self.jobs.pop(0), set()
        if (self.is_over() and not self.engine_is_gone()) or self.turns > 80:
            self.quiet += 1
            if self.quiet > 2 or self.turns > 80:
                self.shared.stopping.set()
                return None, set()
            if self.quiet == 2:  # the last look is one at git, too
                self.pass_time(max(0.0, worker.view.next_poll - self.now))
        watching = self.now < worker.watch_until
        self.pass_time(1.0 if watching else max(1.0, min(worker.view.next_poll - self.now, 5.0)))
        if worker.view.next_poll <= self.now:
            return None, {"timer"}
        return None, {"watch"} if watching else {"event"}

    def live(self, is_over: Callable[[], bool]) -> None:
        """Let pgod run until it is over and nothing comes any more; begin anew where it ends."""
        self.is_over = is_over
        for _ in range(6):
            self.turns = self.quiet = 0
            config = self.write_config()
            World.listens = self
            try:
                self.boot(config)
            except (Killed, OSError):  # the second one ends the real one as well
                pass
            finally:
                World.listens = None
            if not self.dead and (self.quiet > 2 or (not self.present and is_over())):
                return
            if self.fault == "power cut" and self.dead:
                self.cut_power()
            if self.dead:
                self.meanwhile()
            self.dead = self.dies_after_child = False
            self.in_child = 0
            self.names.clear()
            self.hollow.clear()
            self.pass_time(5)

    def ask(self, command: str, *operands: str) -> pgod.Job:
        """Have a key holder's command done in the next turn."""
        act = pgod.COMMANDS[command].job
        assert act
        job = pgod.Job(command, act, (), operands, "ann", self.tell.append, self.tell.append)
        self.jobs.append(job)
        return job


def place(name: str, folder: int) -> Path:
    """The path of a name in an open folder (-1: none)."""
    return Path(os.readlink(f"/proc/self/fd/{folder}"), name) if folder >= 0 else Path(name)


def note_rename(world: World, source: Path, target: Path) -> None:
    """It is lost in a power cut, until its folder is flushed; and what is not flushed is hollow."""
    World.listens = None
    if source.is_file() and world.root in target.parents:
        world.names.setdefault(target, target.read_bytes() if target.is_file() else None)
        if str(source) not in world.flushed:
            world.hollow.add(target)
    World.listens = world


def note_removal(world: World, target: Path) -> None:
    """In a power cut it is there again, until its folder is flushed."""
    World.listens = None
    if target.is_file() and world.root / "lib" / world.name in target.parents:
        world.names.setdefault(target, target.read_bytes())
    World.listens = world


def hear(event: str, words: tuple[Any, ...]) -> None:
    """Python's own word of each change of a file."""
    world = World.listens
    if not world or event == "subprocess.Popen":
        return
    text = described(event, words)
    if not text or (not str(words[0]).startswith(str(world.root)) and str(words[0])[:1] == "/"):
        return
    if event == "os.rename":
        note_rename(world, place(words[0], words[2]), place(words[1], words[3]))
    elif event == "os.remove":
        note_removal(world, place(words[0], words[1]))
    world.step(text)


def heard_flush(flush: Callable[[int], None]) -> Callable[[int], None]:
    """os.fsync that tells the world what is safe now."""
    def wrapper(descriptor: int) -> None:
        flush(descriptor)
        if (world := World.listens) and isinstance(descriptor, int):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            world.flushed.add(path)
            for name in [name for name in world.names if str(name.parent) == path]:
                del world.names[name]
    return wrapper


sys.addaudithook(hear)
