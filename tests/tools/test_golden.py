# SPDX-License-Identifier: Apache-2.0
"""Logits against those of transformers, and the same bits for every chunk and number of threads."""
import json
import os
import sys

from tools import BOTH_F32, DEVICE, GOLDEN, Case, run

sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402


# transformers takes 1 for a missing route_scale; we refuse, since the wrong scale reads fluently.
REFUSED = GOLDEN / "afmoe-scale-absent"
CASES = sorted(path.parent for path in GOLDEN.glob("*/golden.json") if path.parent != REFUSED)


class Golden(Case):
    def logits(self, folder, chunk, threads, **env):
        golden = json.loads((folder / "golden.json").read_text())
        out = self.scratch / f"{folder.name}-{chunk}-{threads}.npy"
        done = run("afd-generate", "--model", folder / golden["checkpoint"], "--ids", " ".join(map(str, golden["prompt"])),
                   "--max-tokens", len(golden["generated"]), "--prefill-chunk", chunk, "--threads", threads, "--device", DEVICE,
                   *BOTH_F32, "--logits", out, "--log", "error", **env)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([int(word) for word in done.stdout.split()], golden["generated"])
        return out

    def test_there_are_cases(self):
        self.assertGreater(len(CASES), 80)

    def test_a_missing_route_scale_is_refused_in_one_line(self):
        done = run("afd-generate", "--model", REFUSED, "--ids", "1")
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
        self.assertIn("route_scale is missing", done.stderr)

    def test_logits_are_those_of_transformers(self):
        for folder in CASES:
            with self.subTest(folder.name):
                passed, why = check.compare(folder, self.logits(folder, 0, 1))
                self.assertTrue(passed, why)

    def test_logits_have_the_same_bits_for_every_chunk_and_number_of_threads(self):
        for folder in CASES:
            with self.subTest(folder.name):
                want = self.logits(folder, 0, 1).read_bytes()
                for chunk, threads in ((0, 2), (1, 1), (1, 2), (7, 1), (7, 2)):
                    self.assertEqual(self.logits(folder, chunk, threads).read_bytes(), want, f"chunk {chunk}, threads {threads}")

    def test_every_isa_variant_agrees_with_transformers(self):
        cpu = {"avx2": " avx2 ", "avx512": " avx512f ", "c": ""}
        with open("/proc/cpuinfo", encoding="ascii") as file:
            flags = file.read()
        for isa in (isa for isa, flag in cpu.items() if flag in flags):
            for folder in CASES if os.environ.get("AFD_ALL") == "1" else CASES[::4]:
                with self.subTest(f"{isa} {folder.name}"):
                    passed, why = check.compare(folder, self.logits(folder, 7, 2, AFD_ISA=isa))
                    self.assertTrue(passed, why)
