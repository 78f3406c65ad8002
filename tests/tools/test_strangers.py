# SPDX-License-Identifier: Apache-2.0
"""Strangers at a server that has a key: what they say, repeat, cut short or leave unsaid ends with them, and the log says why.

A generation is under way meanwhile; how its rate with strangers compares to its rate without is printed, not judged.
"""
import os
import random
import re
import resource
import socket
import struct
import sys
import threading
import time
import unittest

from tools import MODEL, Case, tcp_address

IDS = ["--ids", "17 4 2", "--log", "error", "--json"]
N_SILENT = 1000
N_TOKENS = 1000
PREFIX = b"AFDH" + struct.pack("<HH", 1, 5)  # of a nonce; its bytes follow


class Keyed(Case):
    def setUp(self):
        super().setUp()
        self.keys = []
        for name in ("key", "other"):
            path = self.scratch / name
            path.write_bytes(os.urandom(32))
            path.chmod(0o600)
            self.keys.append(path)
        self.lines = []

    def serve_keyed(self, *tls):
        """A server whose log is collected."""
        self.secret = ["--key", self.keys[0], *tls]
        self.metrics = self.scratch / f"metrics{len(tls)}"
        self.server, self.listen = self.serve(MODEL, *self.secret, "--metrics", self.metrics, listen=tcp_address())
        _, host, port = self.listen.split(":")
        self.place = (host, int(port))
        self.lines.clear()
        threading.Thread(target=lambda log: self.lines.extend(iter(log.readline, "")), args=(self.server.stderr,), daemon=True).start()

    def attend(self, *args):
        return self.generate(MODEL, *IDS, "--ffn", self.listen, *self.secret, *args)

    def connect(self, *said):
        stranger = socket.create_connection(self.place, timeout=10)
        self.addCleanup(stranger.close)
        for bytes_said in said:
            with_error_ignored(stranger.sendall, bytes_said)
        return stranger

    def expect_logged(self, what, since=0):
        """A reason since line number `since`, with where the stranger came from."""
        pattern = re.compile(rf"peer tcp:\S+ from 127\.0\.0\.1:\d+ (refused|did not join): .*{what}")
        self.until(f"logged: {what}", lambda: any(pattern.search(line) for line in self.lines[since:]))

    def record(self, *args):
        """What a peer with the key says in a whole generation, heard by somebody between."""
        said = []
        with socket.create_server(("127.0.0.1", 0)) as between:
            listen = f"tcp:127.0.0.1:{between.getsockname()[1]}"
            running = self.generate(MODEL, *IDS, "--max-tokens", 4, "--ffn", listen, *self.secret, *args)
            between.settimeout(10)
            client = between.accept()[0]
            server = socket.create_connection(self.place)
            back = threading.Thread(target=copy, args=(server, client, []), daemon=True)
            back.start()
            copy(client, server, said)
            back.join(10)
        self.result(running)
        return b"".join(said)


def with_error_ignored(call, *args):
    """The server may have ended the connection already."""
    try:
        return call(*args)
    except OSError:
        return None


def copy(source, target, heard):
    while part := with_error_ignored(source.recv, 65536):
        heard.append(part)
        with_error_ignored(target.sendall, part)
    with_error_ignored(target.shutdown, socket.SHUT_WR)


class Strangers(Keyed):
    def refuse_tools(self):
        """Peers without the key are told so."""
        for secret in ([], ["--key", self.keys[1], *self.secret[2:]]):
            refused = self.generate(MODEL, *IDS, "--ffn", self.listen, "--connect-timeout-ms", 1500, *secret)
            _, err = refused.communicate(timeout=20)
            self.assertEqual((refused.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(self.listen, err)

    def annoy(self, recorded, reasons, seed):
        """Every kind of stranger once, each with its reason in the log."""
        random_bytes = random.Random(seed).randbytes
        kinds = {
            "truncated": lambda: self.connect(recorded[:30]).close(),
            "oversized": lambda: self.connect(PREFIX + struct.pack("<I", 4097)),
            "huge": lambda: self.connect(PREFIX + struct.pack("<I", 0xffffffff) + bytes(4096)),
            "replayed": lambda: self.connect(recorded),
            "random": lambda: self.connect(random_bytes(3000)),
        }
        for name, stranger in kinds.items():
            since = len(self.lines)
            stranger()
            with self.subTest(name):
                self.expect_logged(reasons[name], since)
            time.sleep(0.15)  # at most ten a second are logged

    def serve_through(self, reasons, *tls):
        seed = random.randrange(1 << 30)
        self.serve_keyed(*tls)
        recorded = self.record()
        want = self.json(self.generate(MODEL, *IDS, "--max-tokens", N_TOKENS))["ids"]
        quiet = self.json(self.attend("--max-tokens", N_TOKENS))
        running = self.attend("--max-tokens", N_TOKENS)
        self.annoy(recorded, reasons, seed)
        self.refuse_tools()
        over = False
        while not over:  # once at least
            over = running.poll() is not None
            for _ in range(20):
                self.connect(random.randbytes(random.randrange(1, 5000))).close()
        loud = self.json(running)
        self.assertEqual((quiet["ids"], loud["ids"]), (want, want))
        print(f"strangers{' with tls' if tls else ''}, seed {seed}: {loud['tokens_per_second'] / quiet['tokens_per_second']:.2f} "
              "of the rate without them", file=sys.stderr)
        self.until("the refused are counted", lambda: self.metric(self.metrics, "afd_transport_refused_total") > 7)
        self.expect_few_lines()
        self.stop(self.server)

    def expect_few_lines(self):
        """A burst is not logged line by line."""
        time.sleep(1.1)
        since = len(self.lines)
        for _ in range(200):
            self.connect(b"no such protocol").close()
        self.until("a summary", lambda: any("more refusals were not logged" in line for line in self.lines[since:]))
        self.assertLess(len(self.lines) - since, 60)

    def test_a_server_with_a_key_goes_on_serving_and_says_why_each_stranger_was_refused(self):
        self.serve_through({"truncated": "the peer is gone", "oversized": "a message says 4097 bytes", "huge": "a message says 4294967295",
                            "replayed": "key is another there, required here", "random": "handshake: begins with"})

    def test_a_server_with_tls_goes_on_serving_and_says_why_each_stranger_was_refused(self):
        self.serve_through(dict.fromkeys(("truncated", "oversized", "huge", "replayed", "random"), "(tls: |the peer is gone)"), "--tls")


class Silent(Keyed):
    def setUp(self):
        super().setUp()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 2 * N_SILENT:
            self.skipTest(f"{hard} file descriptors, {2 * N_SILENT} are needed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * N_SILENT), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    def crowd(self, *tls):
        """They connect and say nothing; a peer with the key joins among them, and one that has joined goes on."""
        self.serve_keyed(*tls)
        want = self.json(self.generate(MODEL, *IDS, "--max-tokens", N_TOKENS))["ids"]
        quiet = self.json(self.attend("--max-tokens", N_TOKENS))["tokens_per_second"]
        running = self.attend("--max-tokens", N_TOKENS)
        silent = [self.connect() for _ in range(N_SILENT)]
        since = time.monotonic()
        self.result(self.attend("--max-tokens", 1, "--connect-timeout-ms", 10000))
        joined_s = time.monotonic() - since
        loud = self.json(running)
        self.assertEqual(loud["ids"], want)
        print(f"{N_SILENT} silent{' with tls' if tls else ''}: {loud['tokens_per_second'] / quiet:.2f} of the rate without them, "
              f"a peer was served after {joined_s:.2f} s", file=sys.stderr)
        self.expect_logged("it is the oldest that is silent")
        self.assertLess(len(os.listdir(f"/proc/{self.server.pid}/fd")), 100)
        for stranger in silent:
            stranger.close()
        self.stop(self.server)

    def test_a_thousand_that_say_nothing_keep_nobody_out(self):
        self.crowd()

    def test_a_thousand_that_say_nothing_to_a_server_with_tls_keep_nobody_out(self):
        self.crowd("--tls")


def can_capture():
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)).close()
    except (OSError, AttributeError):
        return False
    return True


@unittest.skipUnless(can_capture(), "no right to open a packet socket")
class Capture(Keyed):
    def heard_on_the_line(self, *tls):
        """All IP packets of loopback during a generation, one after the other."""
        self.serve_keyed(*tls)
        packets = []
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as line:
            line.bind(("lo", 3))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
            line.settimeout(0.2)
            running = self.attend("--max-tokens", 8)
            while (packet := with_error_ignored(line.recv, 1 << 17)) or running.poll() is None:
                packets.append(packet or b"")
        self.result(running)
        self.stop(self.server)
        port = struct.pack(">H", self.place[1])
        return [packet for packet in packets if port in (packet[20:22], packet[22:24])]

    def rows(self, packets):
        """The first numbers of each frame of rows: 64 bytes behind the magic, where kind is 1."""
        found = {packet[at.start() + 64:at.start() + 96] for packet in packets
                 for at in re.finditer(rb"AFDF..\x40\x00\x01[\x01\x02]", packet, re.S)}
        return {row for row in found if len(row) == 32 and any(row)}

    def test_rows_are_on_the_line_in_clear_without_tls_and_not_with_it(self):
        clear, sealed = self.heard_on_the_line(), self.heard_on_the_line("--tls")
        rows = self.rows(clear)
        self.assertGreater(len(rows), 20)
        self.assertGreater(sum(map(len, sealed)), sum(map(len, clear)) // 2)
        self.assertEqual(self.rows(sealed), set())
        everything = b"".join(sealed)
        self.assertFalse(any(row in everything for row in rows))
        self.assertNotIn(b"AFDF", everything)
