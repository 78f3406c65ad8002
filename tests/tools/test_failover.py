# SPDX-License-Identifier: Apache-2.0
"""FFN replicas that are killed at any moment, and servers that come back: tokens and logits stay the same, bit for bit.

Each kill is at a random moment of a generation; the seed is printed, and AFD_TEST_SEED repeats it. What went twice is counted:
rows beyond layers x rows of the steps are those that were resent, no more than one step has, and attention ran once.
"""
import json
import os
import random
import signal
import sys
import time

from tools import MODEL, Case, address, segments, tcp_address

ALL = os.environ.get("AFD_ALL") == "1"
KILLS = int(os.environ.get("AFD_TEST_KILLS", "200" if ALL else "6"))
RETURNS = 10 if ALL else 3
LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
PROMPT = "17 4 2 99 3 8 1 250 31"
MEDIA = {"shm": address, "tcp": tcp_address}


class Failover(Case):
    def moments(self, what):
        seed = int(os.environ.get("AFD_TEST_SEED", random.randrange(1 << 30)))
        print(f"{what}: seed {seed}", file=sys.stderr)
        return random.Random(seed), f"{what}, seed {seed}"

    def single(self):
        """One sequence, whose logits are kept: flags, rows of the largest step."""
        return ["--ids", PROMPT, "--max-tokens", 240, "--logits", self.scratch / "logits.npy"], len(PROMPT.split())

    def batch(self):
        """Sequences in three lanes, so that frames are out at several layers at once."""
        entries = [{"ids": list(range(3 + i, 9 + 2 * i))} for i in range(6)]
        flags = ["--batch", self.write_batch(entries), "--max-tokens", 90, "--lanes", 3]
        return flags, sum(len(entry["ids"]) for entry in entries)

    def begin(self, flags):
        return self.generate(MODEL, *flags, "--trace", self.scratch / "trace.json", "--log", "error", "--json")

    def outcome(self, running):
        """What must not change: ids, logits, steps, rows, how often attention ran; and what the peers count."""
        done = self.json(running)
        spans = [(event["args"]["step"], event["args"]["layer"], event["args"]["lane"])
                 for event in json.loads((self.scratch / "trace.json").read_text())
                 if event["ph"] == "X" and event["name"] == "attention"]
        path = self.scratch / "logits.npy"
        logits = path.read_bytes() if "--logits" in running.args else b""
        return (done["ids"], logits, done["steps"], done["rows"], sorted(spans)), done["peers"]

    def expect_unchanged(self, running, want, limit, n_shards=1):
        """Returns how many rows were resent."""
        got, peers = self.outcome(running)
        for name, one, other in zip(("ids", "logits", "steps", "rows", "attention spans"), got, want, strict=True):
            self.assertTrue(one == other, f"{name} differ")
        self.assertEqual(len(set(got[4])), len(got[4]), "attention of a layer ran again")
        resent = sum(peer["resent_rows"] for peer in peers)
        self.assertEqual(sum(peer["rows"] for peer in peers) - resent, n_shards * LAYERS * got[3])
        self.assertLessEqual(resent, limit)
        return resent

    def reference(self, flags, ffn, n_shards):
        """Of one process, or of the same shards undisturbed; and how long the layout takes."""
        want = self.outcome(self.begin(flags if n_shards == 1 else flags + ffn))[0]
        since = time.monotonic()
        self.expect_unchanged(self.begin(flags + ffn), want, 0, n_shards)
        return want, time.monotonic() - since

    def write_key(self, name):
        path = self.scratch / name
        path.write_bytes(os.urandom(32))
        path.chmod(0o600)
        return path

    def kill_replicas(self, what, new_address, runs, shards, n_kills, secret=()):
        """Each shard has two servers. In each run one of them all is killed, and started again after it."""
        moments, what = self.moments(what)
        places = [(new_address(), (*flags, *secret)) for flags in shards for _ in range(2)]
        servers = [self.serve(MODEL, *flags, listen=listen)[0] for listen, flags in places]
        ffn = [word for listen, _ in places for word in ("--ffn", listen)] + [*secret]
        references = [self.reference(flags, ffn, len(shards)) for flags, _ in runs]
        resent = []
        for kill in range(n_kills):
            (flags, limit), (want, whole) = runs[kill % len(runs)], references[kill % len(runs)]
            running = self.begin(flags + ffn)
            time.sleep(moments.uniform(0, whole))
            victim = moments.randrange(len(places))
            servers[victim].kill()
            with self.subTest(f"kill {kill} of {what}"):
                resent.append(self.expect_unchanged(running, want, limit, len(shards)))
            servers[victim].wait()
            servers[victim] = self.serve(MODEL, *places[victim][1], listen=places[victim][0])[0]
        for server in servers:
            self.stop(server)
        print(f"{what}: {len(resent)} of {n_kills} kills changed nothing; rows were resent in {sum(map(bool, resent))}, "
              f"at most {max(resent, default=0)}", file=sys.stderr)

    def test_a_replica_that_is_killed_at_any_moment_changes_no_token_and_no_logit(self):
        before = segments()
        for scheme, new_address in MEDIA.items():
            self.kill_replicas(scheme, new_address, [self.single(), self.batch()], [()], KILLS)
        self.assertEqual(segments(), before)

    def test_a_server_of_one_shard_that_is_killed_at_any_moment_changes_no_token_and_no_logit(self):
        shards = [("--ffn-tp", f"{i}/2") for i in range(2)]
        for scheme, new_address in MEDIA.items():
            self.kill_replicas(f"tp2 over {scheme}", new_address, [self.single(), self.batch()], shards, (KILLS + 2) // 4 * 2)

    def test_a_replica_that_is_killed_at_any_moment_changes_nothing_over_tls(self):
        secret = ("--key", self.write_key("key"), "--tls")
        self.kill_replicas("tls", tcp_address, [self.single(), self.batch()], [()], (KILLS + 2) // 4 * 2, secret)

    def return_often(self, scheme, new_address):
        """The only server is killed again and again, and a new one appears at its address."""
        moments, what = self.moments(f"returns over {scheme}")
        flags = ["--ids", PROMPT, "--max-tokens", 1000 * RETURNS, "--logits", self.scratch / "logits.npy"]
        want = self.outcome(self.begin(flags))[0]
        server, listen = self.serve(MODEL, "--log", "info", listen=new_address())
        running = self.begin([*flags, "--ffn", listen, "--reconnect-s", 30])
        for _ in range(RETURNS):
            self.wait_joined(server)
            time.sleep(moments.uniform(0, 0.1))
            self.assertIsNone(running.poll(), f"{what}: over before the server was killed")
            server.kill()
            server.wait()
            server, _ = self.serve(MODEL, "--log", "info", listen=listen)
        with self.subTest(what):
            self.expect_unchanged(running, want, RETURNS * len(PROMPT.split()))
        self.stop(server)

    def test_a_generation_goes_on_whenever_a_new_server_appears_at_the_address(self):
        for scheme, new_address in MEDIA.items():
            self.return_often(scheme, new_address)

    def test_without_a_replica_the_time_to_reconnect_ends_in_an_error(self):
        metrics = self.scratch / "metrics"
        server, listen = self.serve(MODEL, "--metrics", metrics)
        running = self.generate(MODEL, "--ids", PROMPT, "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error",
                                "--ffn", listen, "--reconnect-s", 1)
        self.until("rows crossed", lambda: self.metric(metrics, "afd_ffn_rows_total") > 100)
        server.kill()
        since = time.monotonic()
        _, err = running.communicate(timeout=20)
        self.assertTrue(0.9 < time.monotonic() - since < 3)
        self.assertEqual(running.returncode, 1)
        self.assertIn(listen, err)

    def test_a_stopped_replica_is_replaced_after_the_deadline(self):
        """Silent and alive: what it answers when it goes on is too late, and not taken."""
        flags, limit = self.single()
        flags[3] = 3000
        want = self.outcome(self.begin(flags))[0]
        for scheme, new_address in MEDIA.items():
            first, second = new_address(), new_address()
            stopped = self.serve(MODEL, "--log", "info", listen=first)[0]
            running = self.begin([*flags, "--ffn", first, "--ffn", second, "--deadline-ms", 1000])
            self.wait_joined(stopped)  # it has the rows, since there is no other one
            replica = self.serve(MODEL, "--log", "info", listen=second)[0]
            self.wait_joined(replica)
            self.assertIsNone(running.poll())
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(1.4)
            stopped.send_signal(signal.SIGCONT)
            with self.subTest(scheme):
                self.assertGreater(self.expect_unchanged(running, want, limit), 0)
            for server in (stopped, replica):
                self.stop(server)

    def test_the_only_server_that_was_stopped_beyond_the_deadline_is_taken_back_when_it_goes_on(self):
        flags, limit = self.single()
        flags[3] = 2000
        want = self.outcome(self.begin(flags))[0]
        for scheme, new_address in MEDIA.items():
            server, listen = self.serve(MODEL, "--log", "info", listen=new_address())
            running = self.begin([*flags, "--ffn", listen, "--deadline-ms", 300, "--reconnect-s", 30])
            self.wait_joined(server)
            server.send_signal(signal.SIGSTOP)
            time.sleep(1.2)
            self.assertIsNone(running.poll())
            server.send_signal(signal.SIGCONT)
            with self.subTest(scheme):
                self.expect_unchanged(running, want, limit)
            self.stop(server)

    def test_the_only_server_that_is_stopped_for_good_ends_in_an_error_when_the_time_to_reconnect_is_over(self):
        for scheme, new_address in MEDIA.items():
            server, listen = self.serve(MODEL, "--log", "info", listen=new_address())
            running = self.generate(MODEL, "--ids", PROMPT, "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error",
                                    "--ffn", listen, "--deadline-ms", 300, "--reconnect-s", 1)
            self.wait_joined(server)
            server.send_signal(signal.SIGSTOP)
            since = time.monotonic()
            _, err = running.communicate(timeout=20)
            with self.subTest(scheme):
                self.assertTrue(1.2 < time.monotonic() - since < 3.5, time.monotonic() - since)
                self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
                self.assertIn(listen, err)
            server.kill()

    def test_a_key_is_proved_by_the_tools(self):
        key, other = self.write_key("key"), self.write_key("other")
        flags = ["--ids", PROMPT, "--max-tokens", 200, "--log", "error", "--json"]
        want = self.json(self.generate(MODEL, *flags))["ids"]
        _, listen = self.serve(MODEL, "--key", key, "--tls", listen=tcp_address())
        self.assertEqual(self.json(self.generate(MODEL, *flags, "--ffn", listen, "--key", key, "--tls"))["ids"], want)
        for secret in (["--key", other, "--tls"], ["--key", key], []):
            refused = self.generate(MODEL, *flags, "--ffn", listen, "--connect-timeout-ms", 500, *secret)
            _, err = refused.communicate(timeout=20)
            self.assertEqual((refused.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(listen, err)
