# SPDX-License-Identifier: Apache-2.0
"""The quickstart: what it prints, how it fails, and that it leaves nothing behind."""
import os
import pathlib
import re
import signal
import subprocess
import time
import unittest

from sentences import ROOT
from tools import hear_signals

SCRIPT = ROOT / "examples/quickstart.sh"


def servers():
    """Processes that serve an address of the quickstart."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"shm:quickstart." in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended meanwhile
            pass
    return found


class Quickstart(unittest.TestCase):
    def test_a_split_run_ends_with_speed_and_the_comparison_and_leaves_no_process(self):
        done = subprocess.run(["bash", SCRIPT], text=True, capture_output=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        speed, equal = done.stdout.splitlines()[-2:]
        self.assertRegex(speed, r"^tokens/s: \d+\.\d+$")
        self.assertEqual(equal, "tokens equal to a single process: yes")
        self.assertEqual(servers(), [])

    def test_another_checkpoint_is_taken_by_its_path(self):
        done = subprocess.run(["bash", SCRIPT, "golden/wide"], text=True, capture_output=True, timeout=300, cwd=ROOT / "tests")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("has no tokenizer.json: ids are printed instead of text", done.stdout)
        self.assertEqual(len(re.findall(r"^[\d ]+ -> [\d ]+$", done.stdout, re.M)), 2)
        self.assertTrue(done.stdout.endswith("\ntokens equal to a single process: yes\n"))

    def test_a_checkpoint_that_is_not_there_is_named(self):
        done = subprocess.run(["bash", SCRIPT, "/no/such/model"], text=True, capture_output=True, timeout=300)
        self.assertEqual(done.returncode, 1)
        self.assertIn("/no/such/model", done.stderr)

    def test_an_interrupted_run_leaves_no_process(self):
        run = subprocess.Popen(["bash", SCRIPT], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=hear_signals)
        end = time.monotonic() + 60
        while not servers() and run.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=20)
        self.assertNotEqual(run.returncode, 0)
        self.assertEqual(servers(), [])
