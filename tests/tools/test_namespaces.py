# SPDX-License-Identifier: Apache-2.0
"""tcp: between two network namespaces with a line between them, which is cut in both directions or in one."""
import os
import select
import shutil
import subprocess
import time
import unittest

from tools import DEVICE, ENV, MODEL, Case, tool

PROMPT = ["--ids", "17 4 2", "--log", "error", "--json"]
A4, B4, A6, B6 = "10.213.7.1", "10.213.7.2", "fd07::1", "fd07::2"


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)


def can_make_namespaces():
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"afdp{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    if not done.returncode:
        ip("netns", "del", name)
    return not done.returncode


@unittest.skipUnless(can_make_namespaces(), "no right to make network namespaces")
class Namespaces(Case):
    def setUp(self):
        super().setUp()
        self.a, self.b = (f"afd{side}{os.getpid()}" for side in "ab")
        for name in (self.a, self.b):
            ip("netns", "add", name)
            self.addCleanup(ip, "netns", "del", name)
        ip("link", "add", "afd0", "netns", self.a, "type", "veth", "peer", "name", "afd0", "netns", self.b)
        for name, v4, v6 in ((self.a, A4, A6), (self.b, B4, B6)):
            ip("-n", name, "addr", "add", f"{v4}/24", "dev", "afd0")
            ip("-n", name, "addr", "add", f"{v6}/64", "dev", "afd0", "nodad")
            ip("-n", name, "link", "set", "afd0", "up")

    def inside(self, name, program, *args):
        process = subprocess.Popen(["ip", "netns", "exec", name, tool(program), "--model", str(MODEL), "--threads", "1",
                                    "--device", DEVICE, *map(str, args)], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=ENV)
        self.processes.append(process)
        return process

    def serve_inside(self, host):
        self.metrics = self.scratch / f"metrics{len(self.processes)}"
        server = self.inside(self.b, "afd-serve-ffn", "--listen", f"tcp:{host}:0", "--metrics", self.metrics)
        self.assertTrue(select.select([server.stdout], [], [], 30)[0])
        return server.stdout.readline().split()[1]

    def cut(self, seconds=None):
        """Both directions."""
        ip("-n", self.a, "link", "set", "afd0", "down")
        if seconds:
            time.sleep(seconds)
            ip("-n", self.a, "link", "set", "afd0", "up")
            # IPv6 addresses go with the link; IPv4 ones stay.

    def test_tokens_are_the_same_over_ipv4_and_ipv6(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 100))["ids"]
        for host in (B4, f"[{B6}]"):
            listen = self.serve_inside(host)
            for lanes in (1, 3):
                running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 100, "--ffn", listen, "--lanes", lanes)
                self.assertEqual(self.json(running)["ids"], want)

    def test_a_cut_of_two_seconds_changes_no_token(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 4000))["ids"]
        listen = self.serve_inside(B4)
        running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 4000, "--ffn", listen)
        self.until("rows crossed", lambda: self.metric(self.metrics, "afd_ffn_rows_total") > 100)
        self.cut(2)
        self.assertEqual(self.json(running)["ids"], want)

    def test_a_line_that_is_cut_is_an_error_by_the_deadline(self):
        for direction in ("both", "there", "back"):
            listen = self.serve_inside(B4)
            running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 200000, "--kv-pages", 20000,
                                  "--ffn", listen, "--deadline-ms", 1000)
            self.until("rows crossed", lambda: self.metric(self.metrics, "afd_ffn_rows_total") > 100)
            self.assertIsNone(running.poll())
            since = time.monotonic()
            if direction == "both":
                self.cut()
            else:
                name, to = (self.a, B4) if direction == "there" else (self.b, A4)
                ip("-n", name, "route", "add", "blackhole", f"{to}/32")
            _, err = running.communicate(timeout=20)
            self.assertTrue(0.9 < time.monotonic() - since < 2.3, f"{direction}: {time.monotonic() - since}")
            self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(listen, err)
            self.assertIn("silent", err)
            if direction == "both":
                ip("-n", self.a, "link", "set", "afd0", "up")
            else:
                ip("-n", name, "route", "del", "blackhole", f"{to}/32")
