"""Start a verb as several processes of this machine, as torchrun does. No verb itself."""

import os
import signal
import socket
import subprocess
import sys
import time

from lit_prune.errors import LitPruneError, check_number
from lit_prune.evaluation.ranks import PLACE

HOST = "127.0.0.1"  # all processes are on this machine
GRACE = 10.0  # seconds that a process has to end


def started(count: int | None) -> bool:
    """Run this command line as `count` processes and return True; False in a process that shall run it itself.

    That is each of those, one that torchrun started, and the only one.

    Raises:
        LitPruneError: there are others than `count` already.
        SystemExit: one of them failed; the others are ended.
    """
    check_number("--processes", count, least=1, whole=True)
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else None
    if world is not None and count not in (None, world):
        raise LitPruneError(f"--processes {count}: torchrun has started {world} already; leave the option out")
    if world is not None or count in (None, 1):
        return False
    if code := _run(count):
        raise SystemExit(code)
    return True


def _run(count: int) -> int:
    """Exit code of the first process that failed, or 0."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    shared = {**os.environ, "OMP_NUM_THREADS": threads}
    port, parts = str(free_port(HOST)), []
    before = signal.signal(signal.SIGTERM, _end)
    try:
        for rank in range(count):
            place = dict(zip(PLACE, (str(rank), str(count), str(rank), HOST, port), strict=True))
            command = [sys.executable, "-m", "lit_prune", *sys.argv[1:]]
            parts.append(subprocess.Popen(command, env={**shared, **place}))
        while True:
            codes = [part.poll() for part in parts]
            if failed := [code for code in codes if code]:
                return abs(failed[0])
            if None not in codes:
                return 0
            time.sleep(0.1)
    finally:
        for part in parts:
            part.terminate()
        for part in parts:
            try:
                part.wait(GRACE)
            except subprocess.TimeoutExpired:
                part.kill()
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def free_port(host: str) -> int:
    """A port of this address that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
