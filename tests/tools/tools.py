# SPDX-License-Identifier: Apache-2.0
"""The tools as processes: start, wait, stop, and never leave one behind."""
import array
import ast
import itertools
import json
import os
import pathlib
import re
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest

from sentences import BUILD, ROOT

GOLDEN = ROOT / "tests/golden"
MODEL = ROOT / "models/tiny-qwen3"
DEVICE = os.environ.get("AFD_TEST_DEVICE", "cpu")
NAMES = itertools.count()
ENV = {**os.environ, "AFD_MODULE_DIR": str(BUILD / "modules")}
ENV.pop("AFD_TEST_DEVICE", None)
BOTH_F32 = ["--wire-dtype", "f32", "--kv-dtype", "f32"]


def tool(name):
    return str(BUILD / "examples" / name)


def address():
    return f"shm:test.{os.getpid()}.{next(NAMES)}"


def tcp_address():
    """A free port below those that the kernel gives to sockets that connect, so that it stays free while nobody listens."""
    while True:
        place = ("127.0.0.1", random.randrange(20000, 32000))
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(place)
            except OSError:
                continue
        return f"tcp:{place[0]}:{place[1]}"


def run(name, *args, timeout=60, **env):
    """A tool that runs to its end: CompletedProcess with text."""
    return subprocess.run([tool(name), *map(str, args)], text=True, capture_output=True, timeout=timeout, env={**ENV, **env})


def segments():
    """Names of shared memory that outlives a process, and would be a leak."""
    return {path.name for path in pathlib.Path("/dev/shm").iterdir() if path.name.startswith("afd")}


def read_npy(path):
    """(shape, float32 values) of a .npy file of ours."""
    data = pathlib.Path(path).read_bytes()
    start = 10 + struct.unpack_from("<H", data, 8)[0]
    head = ast.literal_eval(data[10:start].decode("latin1"))
    assert data[:6] == b"\x93NUMPY" and head["descr"] == "<f4" and not head["fortran_order"], head
    return head["shape"], array.array("f", data[start:])


def cpu_seconds(process):
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def hear_signals():
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Case(unittest.TestCase):
    """A test with a scratch folder, whose processes end with it."""

    def setUp(self):
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="afd-test-"))
        self.processes = []
        self.addCleanup(shutil.rmtree, self.scratch, True)
        self.addCleanup(self.end_processes)

    def end_processes(self):
        for process in self.processes:
            if process.poll() is None:
                process.terminate() if "launch.sh" in str(process.args[0]) else process.kill()
            process.communicate()

    def start(self, name, *args, **env):
        process = subprocess.Popen([tool(name), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**ENV, **env})
        self.processes.append(process)
        return process

    def serve(self, model, *args, listen=None):
        """A server that is ready, and its address."""
        listen = listen or address()
        server = self.start("afd-serve-ffn", "--model", model, "--listen", listen, "--threads", 1, "--device", DEVICE, *args)
        if not select.select([server.stdout], [], [], 30)[0]:
            self.fail(f"{listen}: no ready line within 30 s")
        line = server.stdout.readline()
        if line != f"ready {listen}\n":
            server.kill()
            self.fail(f"wanted 'ready {listen}', got {line!r}, stderr {server.communicate()[1]!r}")
        return server, listen

    def generate(self, model, *args, **env):
        """afd-generate under way, one thread."""
        return self.start("afd-generate", "--model", model, "--threads", 1, "--device", DEVICE, *args, **env)

    def launch(self, layout, model, *args, **env):
        """A whole layout under way, one thread a process, in a process group of its own."""
        command = [ROOT / "examples/launch.sh", layout, "--tools", tool(""), "--model", model, "--threads", 1, "--device", DEVICE]
        # A shell cannot trap what was ignored when it began, and whoever runs the tests may have signals ignored (nohup).
        process = subprocess.Popen([*map(str, command), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**ENV, **env}, start_new_session=True,
                                   preexec_fn=hear_signals)
        self.processes.append(process)
        return process

    def wait_joined(self, server):
        """A server whose log is at info says who joins; one whom nobody joins is ended, and so is its log."""
        ender = threading.Timer(30, server.kill)
        ender.start()
        while line := server.stderr.readline():
            if "peer joined" in line:
                break
        ender.cancel()
        self.assertTrue(line, "nobody joined within 30 s")

    def result(self, process, timeout=120):
        """stdout of a process that must end well."""
        out, err = process.communicate(timeout=timeout)
        self.assertEqual(process.returncode, 0, f"{' '.join(process.args)}: {err}")
        return out

    def json(self, process, timeout=120):
        return json.loads(self.result(process, timeout))

    def stop(self, server, seconds=10):
        """Ends a server as a user would; it must drain and exit with 0."""
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=seconds)
        self.assertEqual(server.returncode, 0, err)

    def wait_served(self, servers, idle, running):
        """The one of replicas that serves: it has computed since `idle`, and the generation is still under way."""
        def used():
            return [cpu_seconds(server) - before for server, before in zip(servers, idle)]
        self.until("a replica serves", lambda: max(used()) > 0.05)
        self.assertIsNone(running.poll(), "over before a replica was seen to serve")
        return used().index(max(used()))

    def write_batch(self, entries):
        path = self.scratch / f"batch{len(list(self.scratch.iterdir()))}.json"
        path.write_text(json.dumps(entries))
        return path

    def metric(self, path, name):
        match = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", pathlib.Path(path).read_text(), re.M)
        self.assertIsNotNone(match, f"{name} is not in {path}")
        return float(match[1])

    def until(self, what, condition, seconds=30):
        """Waits for a condition, and fails with its name."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.fail(f"not within {seconds} s: {what}")
            time.sleep(0.01)
