# SPDX-License-Identifier: Apache-2.0
"""verbs: where there is no adapter: the module loads, and says so. Rows cross in a virtual machine, tests/verbs."""
import pathlib
import shutil
import subprocess
import unittest

from tools import BUILD, GOLDEN, Case, run

MODULE = BUILD / "modules/afd-verbs.so"
LISTEN = ["--model", GOLDEN / "f32-tied", "--listen", "verbs:127.0.0.1:0"]
ADAPTERS = pathlib.Path("/sys/class/infiniband")


class Verbs(Case):
    def setUp(self):
        super().setUp()
        if not MODULE.exists():
            self.skipTest("this build has no afd-verbs.so: libibverbs-dev is not installed")

    def refused(self, status, *words, **env):
        done = run("afd-serve-ffn", *LISTEN, **env)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def test_a_machine_without_an_adapter_says_so(self):
        if ADAPTERS.exists() and any(ADAPTERS.iterdir()):
            self.skipTest("this machine has an RDMA device")
        self.refused(1, "verbs:", "no RDMA device")

    def test_a_build_without_the_module_names_what_would_help(self):
        shutil.copy(BUILD / "modules/afd-deferred.so", self.scratch)
        self.refused(2, "verbs: no module", "libibverbs-dev", AFD_MODULE_DIR=str(self.scratch))

    def test_the_module_needs_libibverbs_and_libc_only_and_shows_one_symbol(self):
        needs = subprocess.run(["readelf", "-d", MODULE], text=True, capture_output=True, check=True).stdout
        libraries = sorted(line.split("[")[1].split(".so")[0] for line in needs.splitlines() if "(NEEDED)" in line)
        self.assertEqual(libraries, ["libc", "libibverbs"])
        self.assertNotIn("RUNPATH", needs)
        symbols = subprocess.run(["nm", "-D", "--defined-only", MODULE], text=True, capture_output=True, check=True).stdout.split()
        self.assertEqual(symbols[2::3], ["afd_module_entry"])

    def test_encryption_is_refused_before_anything_listens(self):
        key = self.scratch / "key"
        key.write_bytes(bytes(range(32)))
        key.chmod(0o600)
        done = run("afd-serve-ffn", *LISTEN, "--key", key, "--tls")
        self.assertEqual(done.returncode, 1, done.stderr)


if __name__ == "__main__":
    unittest.main()
