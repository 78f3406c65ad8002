# SPDX-License-Identifier: Apache-2.0
"""FFN replicas that are killed at any moment, and servers that come back: the tokens stay the same."""
import os
import random
import signal
import socket
import time

from tools import MODEL, Case, address, segments

PROMPT = ["--ids", "17 4 2", "--max-tokens", 400, "--log", "error", "--json"]
KILLS = int(os.environ.get("AFD_TEST_KILLS", "12"))
OUTSTANDING = 2 * 2 * 3  # two slots of two lanes, and the rows of the prompt


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{free.getsockname()[1]}"


class Failover(Case):
    def kill_replicas(self, new_address, *args):
        seed = random.randrange(1 << 30)
        moments = random.Random(seed)
        want = self.json(self.generate(MODEL, *PROMPT))["ids"]
        listens = [new_address(), new_address()]
        servers = [self.serve(MODEL, listen=listen)[0] for listen in listens]
        flags = [*PROMPT, "--ffn", listens[0], "--ffn", listens[1], *args]
        since = time.monotonic()
        self.assertEqual(self.json(self.generate(MODEL, *flags))["ids"], want)
        whole = time.monotonic() - since
        n_resent = 0
        for kill in range(KILLS):
            running = self.generate(MODEL, *flags)
            time.sleep(moments.uniform(0, whole))
            victim = moments.randrange(2)
            servers[victim].kill()
            servers[victim].wait()
            done = self.json(running)
            with self.subTest(f"kill {kill} of seed {seed}"):
                self.assertEqual(done["ids"], want)
                resent = sum(peer["resent_rows"] for peer in done["peers"])
                self.assertLessEqual(resent, OUTSTANDING)
                n_resent += resent
            servers[victim] = self.serve(MODEL, listen=listens[victim])[0]
        for server in servers:
            self.stop(server)
        return n_resent

    def test_a_replica_that_is_killed_at_any_moment_changes_no_token_over_shm(self):
        before = segments()
        self.kill_replicas(address, "--lanes", 2)
        self.assertEqual(segments(), before)

    def test_a_replica_that_is_killed_at_any_moment_changes_no_token_over_tcp(self):
        self.kill_replicas(port)

    def test_a_generation_goes_on_when_a_new_server_appears_at_the_address(self):
        flags = ["--ids", "17 4 2", "--max-tokens", 2000, "--log", "error", "--json"]
        want = self.json(self.generate(MODEL, *flags))["ids"]
        for new_address in (address, port):
            listen = new_address()
            server, _ = self.serve(MODEL, listen=listen)
            running = self.generate(MODEL, *flags, "--ffn", listen, "--reconnect-s", 20)
            time.sleep(0.3)
            server.send_signal(signal.SIGKILL)
            server.wait()
            time.sleep(0.3)
            self.assertIsNone(running.poll())
            server, _ = self.serve(MODEL, listen=listen)
            self.assertEqual(self.json(running)["ids"], want)
            self.stop(server)

    def test_without_a_replica_the_time_to_reconnect_ends_in_an_error(self):
        metrics = self.scratch / "metrics"
        server, listen = self.serve(MODEL, "--metrics", metrics)
        running = self.generate(MODEL, "--ids", "17 4 2", "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error",
                                "--ffn", listen, "--reconnect-s", 1)
        self.until("rows crossed", lambda: self.metric(metrics, "afd_ffn_rows_total") > 100)
        server.kill()
        since = time.monotonic()
        _, err = running.communicate(timeout=20)
        self.assertTrue(0.9 < time.monotonic() - since < 2.5)
        self.assertEqual(running.returncode, 1)
        self.assertIn(listen, err)

    def test_a_key_is_proved_by_the_tools(self):
        key = self.scratch / "key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        other = self.scratch / "other"
        other.write_bytes(os.urandom(32))
        other.chmod(0o600)
        want = self.json(self.generate(MODEL, *PROMPT))["ids"]
        _, listen = self.serve(MODEL, "--key", key, "--tls", listen=port())
        self.assertEqual(self.json(self.generate(MODEL, *PROMPT, "--ffn", listen, "--key", key, "--tls"))["ids"], want)
        for flags in (["--key", other, "--tls"], ["--key", key], []):
            refused = self.generate(MODEL, *PROMPT, "--ffn", listen, "--connect-timeout-ms", 500, *flags)
            _, err = refused.communicate(timeout=20)
            self.assertEqual((refused.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(listen, err)
