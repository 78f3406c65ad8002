#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""afd-bench exchange beside UCX and libfabric from the distribution's packages, in turns within one run.

All figures are round trips in microseconds: what the peers print for one way is doubled. UCX's is the median, fi_pingpong
knows the mean alone; its shm: is run with its data check on, since it never rewrites the buffer otherwise, and the check
is inside its figure. Ours has the answer's compute inside, as its floor has; the peers send back what they have.
A peer that is not installed is left out, with the reason; nothing is judged.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = (8192, 65536, 524288, 4194304)
PACKAGES = {"ucx_perftest": "ucx-utils", "fi_pingpong": "libfabric-bin"}
PORT, TIMEOUT_S = 23370, 20


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=pathlib.Path, default=ROOT / "build/examples", help="where afd-bench is (build/examples)")
    parser.add_argument("--cpus", default="0,1", help="the CPUs of the two ends (0,1)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of which each figure is the median (5)")
    parser.add_argument("--rounds", type=int, help="round trips of a turn (200 to 2000, by size)")
    parser.add_argument("--realtime", action="store_true", help="run everything under chrt -f 50, for a machine that others use too")
    parser.add_argument("--install", action="store_true", help=f"install {' and '.join(PACKAGES.values())} with apt-get first")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error(f"--repeats: value {given.repeats}, limit 1")
    if given.rounds is not None and not 16 <= given.rounds <= 4096:
        parser.error(f"--rounds: value {given.rounds}, limit 16 to 4096")
    given.cpus = given.cpus.split(",")
    if len(given.cpus) != 2 or not all(cpu.isdigit() for cpu in given.cpus):
        parser.error("--cpus: must be two numbers, A,B")
    if not (given.tools / "afd-bench").exists():
        parser.error(f"--tools: there is no afd-bench in {given.tools}")
    return given


class Runner:
    def __init__(self, given):
        self.given, self.ports, self.skipped = given, PORT + os.getpid() % 2000 * 8, {}

    def command(self, cpu, *args):
        realtime = ["chrt", "-f", "50"] if self.given.realtime else []
        return [*realtime, "taskset", "-c", self.given.cpus[cpu], *map(str, args)]

    def pair(self, name, server, client, **env):
        """stdout of the client, with its server beside it."""
        env = {**os.environ, **env}
        there = subprocess.Popen(self.command(1, *server), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(0.5)
            for _ in range(3):
                done = subprocess.run(self.command(0, *client), env=env, text=True, capture_output=True, timeout=TIMEOUT_S)
                if done.returncode == 0:
                    return done.stdout
                time.sleep(0.5)
        except subprocess.TimeoutExpired:
            self.skipped[name] = f"it did not end within {TIMEOUT_S} s"
            return None
        finally:
            there.kill()
            there.wait()
        self.skipped[name] = f"it failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        return None

    def rounds(self, size):
        return self.given.rounds or max(200, min(2000, (1 << 29) // size))

    def port(self):
        self.ports += 1
        return self.ports

    def ours(self, medium, size):
        where = f"shm:peers-{os.getpid()}" if medium == "shm" else f"tcp:127.0.0.1:{self.port()}"
        realtime = ["chrt", "-f", "50"] if self.given.realtime else []
        done = subprocess.run([*realtime, self.given.tools / "afd-bench", "exchange", "--a", where, "--b", where, "--rows", str(size // 8192), "--cpus",
                               ",".join(self.given.cpus), "--rounds", str(self.rounds(size)), "--json"], text=True, capture_output=True, timeout=300)
        if done.returncode:
            sys.exit(done.stderr.strip())
        result, = json.loads(done.stdout)["results"]
        return {"floor": result["floor"]["us"], "libafd": result["us"]}

    def ucx(self, medium, size):
        port = self.port()
        out = self.pair("ucx " + medium, ["ucx_perftest", "-p", port],
                        ["ucx_perftest", "127.0.0.1", "-p", port, "-t", "tag_lat", "-s", size, "-n", self.rounds(size), "-w", 100, "-f"],
                        UCX_TLS="posix,self" if medium == "shm" else "tcp,self", UCX_NET_DEVICES="lo" if medium == "tcp" else "all",
                        UCX_LOG_LEVEL="error")
        return {"ucx": 2 * float(out.split()[-7])} if out else {}

    def libfabric(self, medium, size):
        port = self.port()
        how = ["-p", "shm", "-e", "rdm", "-c"] if medium == "shm" else ["-p", "tcp", "-e", "msg"]
        out = self.pair("libfabric " + medium, ["fi_pingpong", "-B", port, *how, "-I", self.rounds(size), "-S", size],
                        ["fi_pingpong", "-P", port, *how, "-I", self.rounds(size), "-S", size, "127.0.0.1"])
        return {"libfabric": 2 * float(out.split()[-2])} if out else {}


def measure(runner):
    peers = [runner.ours]
    for program, package in PACKAGES.items():
        if shutil.which(program):
            peers.append(runner.ucx if program == "ucx_perftest" else runner.libfabric)
        else:
            runner.skipped[program] = f"not installed; its package is {package}"
    results = []
    for medium in ("shm", "tcp"):
        for size in SIZES:
            figures = {}
            for _ in range(runner.given.repeats):
                for peer in peers:
                    for name, us in peer(medium, size).items():
                        figures.setdefault(name, []).append(us)
            results.append({"medium": medium, "bytes": size, **{name: statistics.median(us) for name, us in figures.items()}})
    return results


def print_table(results, skipped):
    names = ("floor", "libafd", "ucx", "libfabric")
    print("round trips in us | " + " | ".join(f"{name:>10}" for name in names) + " | over floor")
    for result in results:
        cells = [f"{result[name]:10.2f}" if name in result else f"{'-':>10}" for name in names]
        print(f"{result['medium']:5} {result['bytes']:11} | " + " | ".join(cells) + f" | {result['libafd'] / result['floor']:10.2f}")
    for name, reason in sorted(skipped.items()):
        print(f"skipped: {name}: {reason}")


def main():
    given = options()
    if given.install:
        subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES.values()], check=True,
                       stdout=sys.stderr, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    runner = Runner(given)
    results = measure(runner)
    if given.json:
        print(json.dumps({"results": results, "skipped": runner.skipped}))
    else:
        print_table(results, runner.skipped)


if __name__ == "__main__":
    main()
