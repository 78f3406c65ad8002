# SPDX-License-Identifier: Apache-2.0
"""tcp: between two network namespaces with a line between them, which is cut in both directions or in one.

One namespace has the attention side, the other the FFN side; ranks of an attention group are in both. With nftables packets of
one direction are dropped.
"""
import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
import unittest

from tools import DEVICE, ENV, GOLDEN, MODEL, Case, tool

PROMPT = ["--ids", "17 4 2", "--log", "error", "--json"]
MOE = GOLDEN / "moe-f32"
A4, B4, A6, B6 = "10.213.7.1", "10.213.7.2", "fd07::1", "fd07::2"
LONG = ["--max-tokens", 200000, "--kv-pages", 20000]


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


def can_filter():
    """In a namespace of its own, which ends with the command."""
    return can_make_namespaces() and shutil.which("nft") and not subprocess.run(
        ["unshare", "-n", "nft", "add", "table", "inet", "afd"], capture_output=True).returncode


@unittest.skipUnless(can_make_namespaces(), "no right to make network namespaces")
class Line(Case):
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
            ip("-n", name, "link", "set", "lo", "up")

    def inside(self, name, program, *args, model=MODEL):
        process = subprocess.Popen(["ip", "netns", "exec", name, tool(program), "--model", str(model), "--threads", "1",
                                    "--device", DEVICE, *map(str, args)], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=ENV)
        self.processes.append(process)
        return process

    def serve_inside(self, host, *args, model=MODEL, port=0):
        """Returns its address; the process is self.server, whose log says who joins."""
        self.server = self.inside(self.b, "afd-serve-ffn", "--listen", f"tcp:{host}:{port}", "--log", "info", *args, model=model)
        self.assertTrue(select.select([self.server.stdout], [], [], 30)[0])
        return self.server.stdout.readline().split()[1]

    def attend(self, *args, model=MODEL):
        return self.inside(self.a, "afd-generate", *args, model=model)

    def wait_busy(self, n_peers=1):
        """They have joined, and a moment has passed."""
        for _ in range(n_peers):
            self.wait_joined(self.server)
        time.sleep(0.1)

    def cut(self, seconds=None):
        """Both directions."""
        ip("-n", self.a, "link", "set", "afd0", "down")
        if seconds:
            time.sleep(seconds)
            ip("-n", self.a, "link", "set", "afd0", "up")
            # IPv6 addresses go with the link; IPv4 ones stay.

    @contextlib.contextmanager
    def dropped(self, direction, port, some=""):
        """Packets to or from a port of the FFN side vanish, in one direction; all of them or some."""
        name, side = (self.a, "dport") if direction == "there" else (self.b, "sport")
        rules = f"table inet afd {{ chain out {{ type filter hook output priority 0; tcp {side} {port} {some} drop\n}}\n}}\n"
        inside = ["ip", "netns", "exec", name, "nft"]
        subprocess.run([*inside, "-f", "-"], input=rules, text=True, check=True, capture_output=True, timeout=20)
        yield
        subprocess.run([*inside, "delete", "table", "inet", "afd"], check=True, capture_output=True, timeout=20)

    def expect_silence(self, running, since, listen, what, deadline=1.0):
        """The error of a peer that is silent: by the deadline and a second, and not before it."""
        _, err = running.communicate(timeout=20)
        self.assertTrue(deadline - 0.1 < time.monotonic() - since < deadline + 1.3, f"{what}: {time.monotonic() - since}")
        self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
        self.assertIn(listen, err)
        self.assertIn("silent", err)


class Namespaces(Line):
    def test_tokens_are_the_same_over_ipv4_and_ipv6(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 100))["ids"]
        for host in (B4, f"[{B6}]"):
            listen = self.serve_inside(host)
            for lanes in (1, 3):
                running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 100, "--ffn", listen, "--lanes", lanes)
                self.assertEqual(self.json(running)["ids"], want)

    def test_layouts_have_the_bits_of_the_same_layout_on_one_host(self):
        """1A:1F, 3A:1F and 2A:3F(ep3), lanes 1 to 4. With the whole FFN these are the bits of one process."""
        prompts = [f"{i + 3} 1 4 1 5 9 2 6 5" for i in range(3)]
        for model, n_attention, n_shards in ((MODEL, 1, 1), (MODEL, 3, 1), (MOE, 2, 3)):
            shards = [("--ffn-ep", f"{i}/{n_shards}") if n_shards > 1 else () for i in range(n_shards)]
            near = [self.serve(model, *shard)[1] for shard in shards] if n_shards > 1 else []
            far = [self.serve_inside(B4, *shard, model=model) for shard in shards]
            for lanes in (1, 2, 3, 4):
                flags = ["--max-tokens", 6, "--prefill-chunk", 4, "--lanes", lanes, "--log", "error"]
                runs = []
                for i in range(n_attention):
                    path = [self.scratch / f"{where}{i}.npy" for where in ("near", "far")]
                    ffn = [[word for listen in listens for word in ("--ffn", listen)] for listens in (near, far)]
                    own = ["--ids", prompts[i], *flags, "--logits"]
                    runs.append((path, self.generate(model, *own, path[0], *ffn[0]),
                                 self.attend(*own, path[1], *ffn[1], model=model)))
                for path, *both in runs:
                    self.assertEqual(self.result(both[0]), self.result(both[1]))
                    self.assertEqual(path[0].read_bytes(), path[1].read_bytes(), f"{n_attention}A:{n_shards}F, {lanes} lanes")

    def test_ranks_of_a_group_in_both_namespaces_have_the_bits_of_one_host(self):
        """Ranks 0 and 2 in one, rank 1 in the other; over shm on one host, where bits depend on the shards alone."""
        for n, meet in ((2, f"tcp:{A4}:7100"), (3, f"tcp:{A4}:7200,tcp:{B4}:7200,tcp:{A4}:7201")):
            model = GOLDEN / "wide"
            listen, near = self.serve_inside(B4, model=model), self.serve(model)[1]
            paths = [self.scratch / f"{where}{n}.npy" for where in ("near", "far")]
            flags = ["--ids", "3 1 4 1 5 9 2 6", "--max-tokens", 6, "--lanes", 2, "--log", "error"]
            outs = []
            for path, ffn, group in ((paths[0], near, f"shm:ns.{os.getpid()}.{n}"), (paths[1], listen, meet)):
                ranks = []
                for i in range(n):
                    own = [*flags, "--ffn", ffn, "--attention-tp", f"{i}/{n}", "--attention-group", group, "--logits", path]
                    ranks.append(self.generate(model, *own) if ffn is near
                                 else self.inside((self.a, self.b)[i % 2], "afd-generate", *own, model=model))
                outs.append([self.result(rank) for rank in ranks][0])
            self.assertEqual(*outs)
            self.assertEqual(paths[0].read_bytes(), paths[1].read_bytes())

    def test_a_cut_of_two_seconds_changes_no_token(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 4000))["ids"]
        listen = self.serve_inside(B4)
        running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 4000, "--ffn", listen)
        self.wait_busy()
        self.cut(2)
        self.assertEqual(self.json(running)["ids"], want)

    def test_a_line_that_is_cut_is_an_error_by_the_deadline(self):
        for direction in ("both", "there", "back"):
            listen = self.serve_inside(B4)
            running = self.inside(self.a, "afd-generate", *PROMPT, "--max-tokens", 200000, "--kv-pages", 20000,
                                  "--ffn", listen, "--deadline-ms", 1000)
            self.wait_busy()
            self.assertIsNone(running.poll())
            since = time.monotonic()
            if direction == "both":
                self.cut()
            else:
                name, to = (self.a, B4) if direction == "there" else (self.b, A4)
                ip("-n", name, "route", "add", "blackhole", f"{to}/32")
            self.expect_silence(running, since, listen, direction)
            if direction == "both":
                ip("-n", self.a, "link", "set", "afd0", "up")
            else:
                ip("-n", name, "route", "del", "blackhole", f"{to}/32")

    def test_after_a_cut_beyond_the_deadline_the_same_sequences_go_on(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 4000))["ids"]
        listen = self.serve_inside(B4)
        running = self.attend(*PROMPT, "--max-tokens", 4000, "--ffn", listen, "--deadline-ms", 500, "--reconnect-s", 20)
        self.wait_busy()
        self.assertIsNone(running.poll())
        self.cut(2)
        self.assertEqual(self.json(running)["ids"], want)

    def stop_a_while(self, pid, seconds):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def test_a_peer_that_is_stopped_for_a_while_changes_no_token(self):
        """The FFN side, then the attention side, while another one goes on."""
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 5000))["ids"]
        listen = self.serve_inside(B4)
        running = [self.attend(*PROMPT, "--max-tokens", 5000, "--ffn", listen) for _ in range(2)]
        self.wait_busy(2)
        for process in (self.server, running[0]):
            self.assertIsNone(process.poll())
            self.stop_a_while(process.pid, 1.5)
        for process in running:
            self.assertEqual(self.json(process)["ids"], want)

    def test_a_peer_that_is_stopped_for_good_is_an_error_by_the_deadline(self):
        listen = self.serve_inside(B4)
        running = self.attend(*PROMPT, *LONG, "--ffn", listen, "--deadline-ms", 1000)
        self.wait_busy()
        since = time.monotonic()
        self.server.send_signal(signal.SIGSTOP)
        self.expect_silence(running, since, listen, "stopped")


@unittest.skipUnless(can_filter(), "no nftables, or no right to use them")
class OneWay(Line):
    """Packets of one direction are dropped: the other end still hears, and is not heard."""

    def test_two_seconds_of_it_change_no_token(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 4000))["ids"]
        listen = self.serve_inside(B4)
        for direction in ("there", "back"):
            running = self.attend(*PROMPT, "--max-tokens", 4000, "--ffn", listen)
            self.wait_busy()
            self.assertIsNone(running.poll())
            with self.dropped(direction, listen.rsplit(":", 1)[1]):
                time.sleep(2)
            with self.subTest(direction):
                self.assertEqual(self.json(running)["ids"], want)

    def test_for_good_it_is_an_error_by_the_deadline(self):
        for direction in ("there", "back"):
            listen = self.serve_inside(B4)
            running = self.attend(*PROMPT, *LONG, "--ffn", listen, "--deadline-ms", 1000)
            self.wait_busy()
            since = time.monotonic()
            with self.subTest(direction), self.dropped(direction, listen.rsplit(":", 1)[1]):
                self.expect_silence(running, since, listen, direction)

    def test_a_replica_takes_over_with_the_same_tokens_and_logits(self):
        paths = [self.scratch / f"{i}.npy" for i in range(2)]
        flags = ["--ids", "17 4 2 8", "--max-tokens", 3000, "--log", "error", "--json", "--logits"]
        want = self.json(self.generate(MODEL, *flags, paths[0]))["ids"]
        for direction, port in (("there", 7300), ("back", 7301)):  # nobody else is in this namespace
            first = self.serve_inside(B4)
            running = self.attend(*flags, paths[1], "--ffn", first, "--ffn", f"tcp:{B4}:{port}", "--deadline-ms", 1000)
            self.wait_busy()  # the first has the rows, since there is no other one
            self.serve_inside(B4, port=port)
            self.wait_joined(self.server)
            self.assertIsNone(running.poll())
            with self.subTest(direction), self.dropped(direction, first.rsplit(":", 1)[1]):
                done = self.json(running)
                self.assertEqual(done["ids"], want)
                self.assertEqual(paths[0].read_bytes(), paths[1].read_bytes())
                self.assertIn(sum(peer["resent_rows"] for peer in done["peers"]), range(1, 5))

    def test_packets_that_are_lost_now_and_then_change_no_token(self):
        want = self.json(self.generate(MODEL, *PROMPT, "--max-tokens", 400))["ids"]
        for direction in ("there", "back"):
            listen = self.serve_inside(B4)
            with self.dropped(direction, listen.rsplit(":", 1)[1], "numgen random mod 1000 < 10"):
                running = self.attend(*PROMPT, "--max-tokens", 400, "--ffn", listen)
                self.assertEqual(self.json(running)["ids"], want)
