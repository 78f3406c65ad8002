# SPDX-License-Identifier: Apache-2.0
"""tests/bench/exchange_peers.py: its usage, and that a peer that is missing is named."""
import json
import os
import subprocess
import sys
import tempfile
import unittest

from sentences import BUILD, ROOT

SCRIPT = ROOT / "tests/bench/exchange_peers.py"


class Peers(unittest.TestCase):
    def run_script(self, *args, **env):
        return subprocess.run([sys.executable, SCRIPT, *args], text=True, capture_output=True, timeout=120, env={**os.environ, **env})

    def test_wrong_usage_of_the_comparison_with_peers_is_named(self):
        for args, text in ((["--tools", "/nowhere"], "there is no afd-bench"), (["--repeats", "0"], "limit 1"), (["--cpus", "1"], "two numbers")):
            done = self.run_script(*args)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertIn(text, done.stderr)

    def test_peers_that_are_not_installed_are_left_out_with_their_package(self):
        with tempfile.TemporaryDirectory() as folder:
            os.symlink("/usr/bin/taskset", f"{folder}/taskset")
            done = self.run_script("--tools", str(BUILD / "examples"), "--repeats", "1", "--cpus", "0,0", "--rounds", "16", "--json", PATH=folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        report = json.loads(done.stdout)
        self.assertEqual(len(report["results"]), 8)
        self.assertEqual(set(report["results"][0]), {"medium", "bytes", "floor", "libafd"})
        self.assertIn("ucx-utils", report["skipped"]["ucx_perftest"])
        self.assertIn("libfabric-bin", report["skipped"]["fi_pingpong"])
