# SPDX-License-Identifier: Apache-2.0
"""afd-bench exchange: what it measures and says; no rate is a test."""
import json
import os
import select
import signal

from sentences import BUILD
from tools import Case, address, run

FEW = ["--rounds", 16]
KEYS = {"op", "shape", "medium", "rows", "row_bytes", "bytes", "lanes", "dtype", "us", "us_p10", "us_p90", "us_p99", "us_max", "gb_per_s",
        "limit_us", "limit", "ratio", "runs"}


class Exchange(Case):
    def exchange(self, *args):
        done = run("afd-bench", "exchange", *args, "--json", timeout=300)
        self.assertEqual((done.returncode, done.stderr, done.stdout.count("\n")), (0, "", 1))
        report = json.loads(done.stdout)
        self.assertEqual(set(report), {"machine", "results"})
        for result in report["results"]:
            self.assertLessEqual(KEYS, set(result))
            self.assertEqual(result["op"], "exchange")
            times = [result[key] for key in ("us_p10", "us", "us_p90", "us_p99", "us_max")]
            self.assertEqual(times, sorted(times))
            self.assertGreater(times[0], 0)
            self.assertEqual(result["bytes"], result["rows"] * result["row_bytes"])
            self.assertAlmostEqual(result["gb_per_s"] * result["us"] * 1e3, 2 * result["bytes"] * result["lanes"], delta=1)
        return report["results"]

    def refuse(self, status, *args):
        done = run("afd-bench", "exchange", *args)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
        return done.stderr

    def ffn_end(self, *args, listen):
        end = self.start("afd-bench", "exchange", "--b", listen, *args)
        self.assertTrue(select.select([end.stdout], [], [], 30)[0], "no ready line within 30 s")
        said = end.stdout.readline().split()
        self.assertEqual(said[0], "ready")
        return end, said[1]

    def test_without_addresses_shared_memory_and_tcp_are_measured_at_four_sizes(self):
        results = self.exchange(*FEW)
        self.assertEqual([(result["medium"], result["bytes"]) for result in results],
                         [(medium, n) for medium in ("shm", "tcp") for n in (8192, 65536, 524288, 4194304)])

    def test_the_floor_of_the_same_run_is_the_limit(self):
        for result in self.exchange(*FEW, "--rows", 2, "--row-bytes", 1024):
            self.assertEqual(result["limit"], "floor")
            self.assertEqual(result["floor"]["us"], result["limit_us"])
            self.assertLessEqual(result["floor"]["us"], result["floor"]["us_p99"])
            self.assertGreaterEqual(result["floor"]["runs"], 16)
            self.assertAlmostEqual(result["ratio"] * result["us"], result["limit_us"], delta=1e-3 * result["limit_us"])

    def test_the_time_that_a_wait_spins_is_told(self):
        where = address()
        result, = self.exchange(*FEW, "--a", where, "--b", where, "--rows", 1, "--spin-us", 2000)
        self.assertEqual(result["spin_us"], 2000)
        result, = self.exchange(*FEW, "--a", where, "--b", where, "--rows", 1)
        self.assertEqual(result["spin_us"], 50)
        self.assertIn("limit 1 to 10000000", self.refuse(2, "--spin-us", 0))

    def test_lanes_and_parts_are_told(self):
        where = address()
        result, = self.exchange(*FEW, "--a", where, "--b", where, "--rows", 5, "--row-bytes", 512, "--lanes", 3, "--max-rows", 2)
        self.assertEqual((result["medium"], result["rows"], result["lanes"], result["max_rows"]), ("shm", 5, 3, 2))

    def test_the_ends_may_be_two_processes(self):
        sizes = ["--rows", 3, "--row-bytes", 256]
        for listen in (address(), "tcp:127.0.0.1:0"):
            end, where = self.ffn_end(*sizes, listen=listen)
            result, = self.exchange(*FEW, *sizes, "--a", where)
            self.assertEqual((result["limit"], result["limit_us"], "floor" in result), ("none", 0, False))
            self.stop(end)

    def test_an_interrupted_run_leaves_no_process(self):
        where = address()
        process = self.start("afd-bench", "exchange", "--a", where, "--b", where, "--rounds", 4096)
        self.until("both other ends", lambda: len(self.children(process.pid)) == 2)
        children = self.children(process.pid)
        process.send_signal(signal.SIGKILL)
        self.until("they end, too", lambda: not any(self.is_alive(child) for child in children))

    def children(self, pid):
        return open(f"/proc/{pid}/task/{pid}/children").read().split()

    def is_alive(self, pid):
        try:
            return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def test_a_size_that_the_other_end_does_not_have_is_named_on_both(self):
        end, where = self.ffn_end("--row-bytes", 256, "--rows", 1, listen=address())
        self.assertIn("hidden_size", self.refuse(1, *FEW, "--rows", 1, "--row-bytes", 512, "--a", where))
        self.stop(end)

    def test_an_end_that_is_not_there_is_named(self):
        where = address()
        self.assertIn(where, self.refuse(1, "--a", where, "--connect-timeout-ms", 100))

    def test_an_address_that_is_taken_is_named(self):
        end, where = self.ffn_end("--rows", 1, listen=address())
        self.assertIn("somebody listens there", self.refuse(1, "--a", where, "--b", where, "--rows", 1))
        self.stop(end)

    def test_the_table_has_a_line_for_each_size(self):
        done = run("afd-bench", "exchange", *FEW, timeout=300)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual((done.stdout.count("\nshm "), done.stdout.count("\ntcp "), done.stdout.count("medium")), (4, 4, 1))

    def test_wrong_usage_is_named(self):
        self.assertIn("--row-bytes: value 6, must be a multiple of 4", self.refuse(2, "--row-bytes", 6))
        self.assertIn("--rows: value '0', limit 1 to 65536", self.refuse(2, "--rows", 0))
        self.assertIn("--lanes: value '5', limit 1 to 4", self.refuse(2, "--lanes", 5))
        self.assertIn("--cpus: value '0', limit", self.refuse(2, "--cpus", "0"))
        self.assertIn("limit 268435456", self.refuse(2, "--rows", 65536, "--row-bytes", 262144))
        self.assertIn("there is no --key", self.refuse(2, "--tls"))
        self.assertIn("nonsense:x", self.refuse(1, "--a", "nonsense:x", "--b", "nonsense:x"))


class Key(Case):
    def test_a_link_with_a_key_and_tls_is_measured_too(self):
        key = self.scratch / "key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        if not (BUILD / "modules/afd-tls.so").exists():
            self.skipTest("this build has no afd-tls.so")
        done = run("afd-bench", "exchange", *FEW, "--rows", 1, "--key", key, "--tls", "--json")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(len(json.loads(done.stdout)["results"]), 2)
