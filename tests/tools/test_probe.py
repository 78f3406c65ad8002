# SPDX-License-Identifier: Apache-2.0
"""afd-bench probe, and auto: addresses in the tools."""
import json
import os
import signal

from tools import BOTH_F32, GOLDEN, Case, address, run, tcp_address

MODEL = GOLDEN / "bf16-tied"
PROMPT = "17 4 2 99 3 8 1 50 31"
KEYS = {"op", "backend", "address", "machine", "proved", "chosen"}


def auto_address():
    return tcp_address().replace("tcp:", "auto:")


class Probe(Case):
    def probe(self, *args, status=0):
        """The results by backend, and the one line on stderr when there is one."""
        done = run("afd-bench", "probe", *args, "--json")
        self.assertEqual((done.returncode, done.stdout.count("\n"), done.stderr.count("\n")), (status, 1, int(status != 0)), done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(set(report), {"machine", "results"})
        for result in report["results"]:
            self.assertLessEqual(KEYS, set(result))
            self.assertEqual(result["op"], "probe")
            self.assertEqual("reason" in result, not result["proved"])
            self.assertEqual(result.get("us", 0) > 0 and result.get("bytes_per_second", 0) > 0, result["proved"])
        return {result["backend"]: result for result in report["results"]}, done.stderr

    def chosen(self, results):
        return [name for name, result in results.items() if result["chosen"]]

    def test_each_backend_of_a_server_is_proved_or_has_a_reason(self):
        for listen, proved in ((address(), {"shm"}), (tcp_address(), {"tcp"}), (auto_address(), {"shm", "tcp"})):
            with self.subTest(listen):
                server, _ = self.serve(MODEL, listen=listen)
                results, _ = self.probe(listen)
                self.assertLessEqual({"loop", "shm", "tcp", "verbs", "nccl", "ipc"}, set(results))
                self.assertEqual({name for name, result in results.items() if result["proved"]} - {"verbs"}, proved)
                self.assertEqual(self.chosen(results), [min(proved)])
                self.stop(server)

    def test_with_a_key_and_tls_nothing_that_leaves_the_host_in_clear_is_tried(self):
        key = self.scratch / "key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        server, listen = self.serve(MODEL, "--key", key, "--tls", listen=auto_address())
        results, _ = self.probe(listen, "--key", key, "--tls")
        self.assertEqual(self.chosen(results), ["shm"])
        self.assertTrue(results["tcp"]["proved"])
        self.assertFalse(results["verbs"]["proved"])
        results, err = self.probe(listen, status=1)
        self.assertEqual(self.chosen(results), [])
        self.stop(server)

    def test_where_nobody_listens_the_table_is_printed_beside_the_error(self):
        where = auto_address()
        results, err = self.probe(where, status=1)
        self.assertIn(where, err)
        self.assertIn("nobody listens there", err)
        self.assertTrue(results["shm"]["machine"] and results["tcp"]["machine"])
        self.assertEqual(self.chosen(results), [])

    def test_a_stopped_server_is_given_up_in_time(self):
        server, listen = self.serve(MODEL, listen=tcp_address())
        server.send_signal(signal.SIGSTOP)
        results, err = self.probe(listen, "--timeout-ms", 300, status=1)
        self.assertIn("no answer in 300 ms", err)
        server.send_signal(signal.SIGCONT)
        self.assertTrue(self.probe(listen)[0]["tcp"]["proved"])
        self.stop(server)

    def test_the_table_for_people_has_a_line_for_each_backend(self):
        server, listen = self.serve(MODEL, listen=auto_address())
        done = run("afd-bench", "probe", "--timeout-ms", 5000, listen)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn(", chosen", done.stdout)
        self.assertEqual([line.split()[0] for line in done.stdout.splitlines()[1:7]], ["loop", "shm", "tcp", "verbs", "nccl", "ipc"])
        self.stop(server)

    def test_wrong_usage_is_named(self):
        for args, word, status in (([], "no address", 2), (["--timeout-ms", "5"], "no address", 2), (["shm:x", "--tls"], "no --key", 2),
                                   (["what:x"], "unknown scheme", 1), (["tcp:127.0.0.1"], "HOST:PORT", 1),
                                   (["shm:x", "more"], "more", 2), (["shm:x", "--timeout-ms", "0"], "limit 1", 2)):
            with self.subTest(args):
                done = run("afd-bench", "probe", *args)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
                self.assertIn(word, done.stderr)


class Auto(Case):
    def logits(self, *args):
        path = self.scratch / "logits.npy"
        self.result(self.generate(MODEL, "--ids", PROMPT, "--max-tokens", 8, "--logits", path, *BOTH_F32, *args))
        return path.read_bytes()

    def test_a_free_port_is_stated_and_the_logits_are_those_of_one_process(self):
        server = self.start("afd-serve-ffn", "--model", MODEL, "--listen", "auto:127.0.0.1:0", "--threads", 1)
        word, listen = server.stdout.readline().split()
        self.assertEqual((word, listen[:15], listen[15:] != "0"), ("ready", "auto:127.0.0.1:", True))
        self.assertEqual(self.logits("--ffn", listen), self.logits())
        self.stop(server)

    def test_a_layout_over_auto_gives_the_tokens_of_one_process(self):
        path = self.scratch / "layout.npy"
        self.result(self.launch("2A(tp2):2F(tp2)", MODEL, "--via", "auto", "--ids", PROMPT, "--max-tokens", 4, *BOTH_F32))
        self.result(self.launch("1A:1F", MODEL, "--via", "auto", "--ids", PROMPT, "--max-tokens", 8, "--logits", path, *BOTH_F32))
        self.assertEqual(path.read_bytes(), self.logits())

    def test_a_server_that_comes_back_is_joined_again_and_the_logits_are_the_same(self):
        listen = auto_address()
        server, _ = self.serve(MODEL, listen=listen)
        path = self.scratch / "long.npy"
        flags = ["--ids", PROMPT, "--max-tokens", 1500, "--logits", path, *BOTH_F32]
        running = self.generate(MODEL, *flags, "--ffn", listen, "--reconnect-s", 30, "--log", "info")
        self.wait_joined(running)
        server.kill()
        server.wait()
        again, _ = self.serve(MODEL, listen=listen)
        _, err = running.communicate(timeout=120)
        self.assertEqual(running.returncode, 0, err)
        self.assertIn("shm:auto-", err)
        got = path.read_bytes()
        self.result(self.generate(MODEL, *flags))
        self.assertEqual(got, path.read_bytes())
        self.stop(again)
