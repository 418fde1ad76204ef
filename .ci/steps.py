"""Runs pgod, and does a fault at one of its steps: a changed file, a child, a request.

Python tells of all of them by itself (audit events, PEP 578), before they happen, so a step that is
new is found without a word about it here, and the program knows nothing of it. PGOD_STEPS is JSON:
`log` gets a line a step; `fault` is done at step number `at`; steps are counted in the threads that
`threads` names.
"""

import errno
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgod
from world import described

LATER = 0.15  # seconds that a child has run when the fault comes that falls in the middle of it
GONE = 3.0  # seconds that the engine is away
state = {"count": 0, "gone": 0.0}
inside = threading.local()  # what a fault itself does is no step


def children():
    """The processes that this one has started and that have not ended."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat[1]) == os.getpid():
            found.append(int(stat[3]))  # each has a session of its own
    return found


def run(words):
    subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True)


def kill_later(also_children):
    def work():
        inside.fault = True
        time.sleep(LATER)
        for session in children() if also_children else ():
            os.killpg(session, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=work, daemon=True).start()


def do(fault, text):
    """Do the fault, at the step that the text describes. Raises OSError where the step fails."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault in ("kill in the middle", "kill with the child"):
        if text.startswith("child "):
            kill_later(fault == "kill with the child")
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "end":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "fail":
        number = errno.ENOMEM if text.startswith("child ") else errno.ENOSPC
        raise OSError(number, os.strerror(number))
    elif fault == "engine gone":
        state["gone"] = time.monotonic() + GONE
    else:
        run(PLAN["commands"][fault])


def observe(event, words):
    if getattr(inside, "fault", False):
        return
    if event == "socket.connect" and time.monotonic() < state["gone"]:
        if str(words[1]).endswith("docker.sock"):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the engine is away")
        return
    name = threading.current_thread().name
    if name not in PLAN["threads"] or not (text := described(event, words)):
        return
    inside.fault = True
    try:
        number = state["count"]
        state["count"] += 1
        os.write(LOG, f"{text}\n".encode(errors="replace"))
        if number == PLAN.get("at"):
            do(PLAN["fault"], text)
    finally:
        inside.fault = False


if __name__ == "__main__":
    PLAN = json.loads(os.environ.pop("PGOD_STEPS"))
    LOG = os.open(PLAN["log"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)  # a user's step cannot
    assert http.client.HTTPConnection  # its sends are heard of
    sys.addaudithook(observe)
    sys.argv[0] = pgod.__file__
    pgod.run()
