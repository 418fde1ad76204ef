"""Runs pgod with one service from nothing, until Ctrl-C: a repository, a key, an image, a pgo.toml.

All of it lies in a temporary folder, and goes at the end, also the container and the image.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
IMAGE = "pgod-demo:1"
COMPOSE = """\
services:
  web:
    image: pgod-demo:1
    command: httpd -f -p 8080 -h /site
    user: "65534"
    init: true
    volumes: ["./site:/site:ro"]
    healthcheck: {test: ["CMD", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"], interval: 1s}
"""
TRY = """
pgod runs the service "demo" from the repository {repository}

Try, in another terminal:

  {ctl}ps
  {ctl}status
  {ctl}exec web wget -q -O - http://127.0.0.1:8080/
  {ctl}logs -f

  cd {work} && echo "<h1>again</h1>" > site/index.html && git commit -qam again && git push -q
  {ctl}up

  curl -s http://127.0.0.1:{metric}/metrics

Ctrl-C here takes all of it down.
"""


def run(*words, **more):
    """A step that must work."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True,
                          **more).stdout


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_image(folder):
    """An image with nothing but a static busybox, since no registry may be in reach."""
    busybox = shutil.which("busybox")
    if not busybox:
        sys.exit("demo: busybox is missing: apt install busybox-static")
    with tarfile.open(folder / "image.tar", "w") as tar:
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for name in ("sh", "httpd", "wget", "ls", "cat", "sleep", "ps", "echo"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    run("docker", "import", folder / "image.tar", IMAGE)


def make_repository(folder):
    """What the owner of a service makes by hand."""
    work, bare = folder / "work", folder / "demo.git"
    run("git", "init", "-q", "--bare", "-b", "main", bare)
    run("git", "clone", "-q", bare, work)
    for key, value in (("user.name", "demo"), ("user.email", "demo@localhost")):
        run("git", "-C", work, "config", key, value)
    for name in ("ssh", "site"):
        (work / name).mkdir()
    (work / "site" / "index.html").write_text("<h1>pgod</h1>\n")
    (work / "compose.yaml").write_text(COMPOSE)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f", folder / "id_demo")
    shutil.copy(folder / "id_demo.pub", work / "ssh")
    for words in (("checkout", "-q", "-B", "main"), ("add", "."), ("commit", "-q", "-m", "first"),
                  ("push", "-q", "-u", "origin", "main")):
        run("git", "-C", work, *words)


def await_service(daemon, metric):
    """Until the service is in sync; False if pgod ends before."""
    while daemon.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(
                f"http://127.0.0.1:{metric}/metrics", timeout=5) as page:
            if b'pgo_service_in_sync{service="demo"} 1' in page.read():
                return True
        time.sleep(0.2)
    return False


def clean(folder):
    label = ("--filter", "label=com.docker.compose.project=demo")
    for listing, remove in ((("ps", "-aq"), ("rm", "-f")), (("network", "ls", "-q"),
                                                            ("network", "rm"))):
        if found := run("docker", *listing, *label).split():
            run("docker", *remove, *found)
    names = run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    mine = [name for name in names if name == IMAGE or name.startswith("pgod.invalid/keep:demo.")]
    if mine:
        run("docker", "rmi", "-f", *mine)
    shutil.rmtree(folder, ignore_errors=True)


def main():
    if run("docker", "ps", "-aq", "--filter", "label=com.docker.compose.project=demo"):
        sys.exit("demo: there is a compose project called demo already: take it down first")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="pgod-demo-"))
    folder.chmod(0o755)
    daemon = None
    try:
        make_image(folder)
        make_repository(folder)
        user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        (folder / "pgo.toml").write_text(f'[[services]]\nname = "demo"\nuser = "{user}"\n'
                                         f'repository = "{folder}/demo.git"\n')
        (folder / "pgo.toml").chmod(0o600)
        ssh, metric = free_port(), free_port()
        daemon = subprocess.Popen([
            sys.executable, HERE / "pgod.py", "--config", folder / "pgo.toml", "--dir",
            folder / "lib", "--datadir", folder / "data", "--ssh", f"127.0.0.1:{ssh}", "--metric",
            f"127.0.0.1:{metric}", "--duration", "5s"], start_new_session=True)
        if await_service(daemon, metric):
            ctl = f"python3 {HERE}/pgoctl.py -i {folder}/id_demo -p {ssh} localhost:demo//"
            print(TRY.format(repository=folder / "demo.git", work=folder / "work", ctl=ctl,
                             metric=metric), flush=True)
        return daemon.wait()
    except KeyboardInterrupt:
        return 0
    except subprocess.CalledProcessError as error:
        print(f"demo: {error}: {error.stderr}", file=sys.stderr)
        return 1
    finally:
        if daemon and daemon.poll() is None:
            daemon.terminate()
            daemon.wait()
        clean(folder)


if __name__ == "__main__":
    sys.exit(main())
