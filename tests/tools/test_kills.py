# SPDX-License-Identifier: Apache-2.0
"""What is left when a process is killed or stopped in the middle of a generation."""
import os
import select
import signal
import time

from tools import MODEL, Case, address, segments, tcp_address

SLACK_S = 0.5  # for a machine that others use, too
LONG = ["--ids", "17 4 2", "--log", "error"]


class Kills(Case):
    def begin(self, n_attention, *args, listen=None):
        """A server, and attention processes that are in the middle of their work."""
        before = segments()
        metrics = self.scratch / f"metrics{len(self.processes)}"
        server, listen = self.serve(MODEL, "--metrics", metrics, listen=listen)
        running = [self.generate(MODEL, *LONG, "--max-tokens", 200000, "--kv-pages", 20000, "--ffn", listen, *args)
                   for _ in range(n_attention)]
        self.until("all peers joined and rows crossed", lambda: self.metric(metrics, "afd_ffn_peers") == n_attention
                   and self.metric(metrics, "afd_ffn_rows_total") > 1000)
        self.assertTrue(all(process.poll() is None for process in running))
        return before, server, listen, running

    def read_report(self, process, since):
        """Seconds until the process told what happened, and what it told."""
        ready = select.select([process.stderr], [], [], 20)[0]
        seconds = time.monotonic() - since
        self.assertTrue(ready, "nothing was told within 20 s")
        _, err = process.communicate(timeout=10)
        return seconds, err

    def expect_lost(self, running, since, listen, limit_s, words="."):
        for process in running:
            seconds, err = self.read_report(process, since)
            self.assertLessEqual(seconds, limit_s + SLACK_S)
            self.assertIn(listen, err)
            self.assertRegex(err, words)
            self.assertEqual((process.returncode, err.count("\n")), (1, 1), err)

    def test_a_killed_ffn_is_reported_by_every_attention_process_within_a_second(self):
        for new_address in (address, tcp_address):
            before, server, listen, running = self.begin(3, listen=new_address())
            since = time.monotonic()
            server.send_signal(signal.SIGKILL)
            self.expect_lost(running, since, listen, 1.0)
            self.assertEqual(segments(), before)

    def test_a_stopped_ffn_is_reported_within_the_deadline_and_a_second(self):
        for new_address in (address, tcp_address):
            before, server, listen, running = self.begin(2, "--deadline-ms", 800, listen=new_address())
            since = time.monotonic()
            server.send_signal(signal.SIGSTOP)
            self.expect_lost(running, since, listen, 1.8)
            self.assertGreaterEqual(time.monotonic() - since, 0.8)  # silence is not death
            server.send_signal(signal.SIGCONT)
            self.stop(server)
            self.assertEqual(segments(), before)

    def test_a_short_silence_is_not_reported(self):
        _, listen = self.serve(MODEL)
        alone = self.result(self.generate(MODEL, *LONG, "--max-tokens", 4000))
        running = self.generate(MODEL, *LONG, "--max-tokens", 4000, "--ffn", listen)
        server = self.processes[0]
        for _ in range(3):
            time.sleep(0.1)
            server.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            server.send_signal(signal.SIGCONT)
        self.assertEqual(self.result(running), alone)

    def test_the_address_of_a_killed_ffn_is_free_at_once(self):
        server, listen = self.serve(MODEL)
        server.kill()
        server.wait()
        self.serve(MODEL, listen=listen)
        want = self.result(self.generate(MODEL, *LONG))
        self.assertEqual(self.result(self.generate(MODEL, *LONG, "--ffn", listen)), want)

    def test_a_killed_attention_process_does_not_disturb_the_others(self):
        want = self.result(self.generate(MODEL, *LONG, "--max-tokens", 1500))
        _, _, listen, (victim,) = self.begin(1)
        others = [self.generate(MODEL, *LONG, "--max-tokens", 1500, "--ffn", listen) for _ in range(2)]
        time.sleep(0.3)
        victim.kill()
        for process in others:
            self.assertEqual(self.result(process), want)

    def test_a_stopped_attention_process_does_not_disturb_the_others(self):
        want = self.result(self.generate(MODEL, *LONG, "--max-tokens", 300))
        _, _, listen, (victim,) = self.begin(1)
        victim.send_signal(signal.SIGSTOP)
        self.assertEqual(self.result(self.generate(MODEL, *LONG, "--max-tokens", 300, "--ffn", listen)), want)
        victim.kill()

    def test_a_terminated_ffn_drains_and_its_peers_are_told(self):
        for new_address in (address, tcp_address):
            before, server, listen, running = self.begin(2, listen=new_address())
            since = time.monotonic()
            server.send_signal(signal.SIGTERM)
            self.expect_lost(running, since, listen, 1.0, "has left|is leaving")
            _, err = server.communicate(timeout=10)
            self.assertEqual((server.returncode, err), (0, ""))
            self.assertEqual(segments(), before)

    def test_an_interrupted_generation_leaves_no_file_behind(self):
        path = self.scratch / "x.npy"
        running = self.generate(MODEL, "--ids", "1 2 3", "--max-tokens", 100000, "--log", "error", "--logits", path)
        self.until("the run has begun", lambda: (self.scratch / "x.npy.part").exists())
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=10)
        self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
        self.assertEqual(os.listdir(self.scratch), [])
