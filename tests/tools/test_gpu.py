# SPDX-License-Identifier: Apache-2.0
"""What waits for a GPU in tests/gpu, as far as it can be looked at without one: it runs on the emulator, and it can fail."""
import math
import os
import re
import struct
import subprocess
import sys
import unittest

from sentences import BUILD, ROOT

WORDS = BUILD / "tests/gpu/test_words"
EMULATION = BUILD / "tests/gpu/words-emu.so"


def words_of(header):
    """The names of the functions of gpu.h; what a template gives its names by is in the list under that name."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    found = set(re.findall(r"^(?:template <[^>]*>\s*)*(?:GPU_FN|GPU_BOTH)\s+[\w<>\s]*?(\w+)\(", text, re.M))
    return found | {"gpu_launch", "mma"}


class Words(unittest.TestCase):
    HELPERS = {"add", "larger"}  # of the emulation's side

    def setUp(self):
        if not WORDS.exists() or not EMULATION.exists():
            self.skipTest("a build without the emulator")

    def test_every_word_of_gpu_h_has_a_case_that_compares_it_with_the_emulation(self):
        listed = subprocess.run([WORDS, EMULATION, EMULATION, "--list"], capture_output=True, text=True, check=True).stdout
        covered = set(re.findall(r"\w+", "\n".join(line.split(": ", 1)[1] for line in listed.splitlines())))
        words = words_of((ROOT / "kernels/cuda/gpu.h").read_text())
        self.assertGreater(len(words), 35)
        self.assertEqual(sorted(words - covered - self.HELPERS), [])

    def test_a_result_that_differs_in_a_bit_fails_its_case_and_no_other(self):
        listed = subprocess.run([WORDS, EMULATION, EMULATION, "--list"], capture_output=True, text=True, check=True).stdout
        names = [line.split(":")[0] for line in listed.splitlines()]
        for name in names:
            with self.subTest(name):
                done = subprocess.run([WORDS, EMULATION, EMULATION], capture_output=True, text=True,
                                      env=dict(os.environ, AFD_WORDS_SPOIL=name, AFD_WORDS_ROUNDS="1", CMOCKA_MESSAGE_OUTPUT="TAP"))
                self.assertEqual(re.findall(r"^not ok \d+ - (\w+)", done.stdout, re.M), [name])


class Scripts(unittest.TestCase):
    def setUp(self):
        sys.path.insert(0, str(ROOT / "tests/gpu"))

    def test_an_unknown_part_is_refused_and_the_parts_are_told(self):
        done = subprocess.run([ROOT / "tests/gpu/run.sh", "wrods"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("wrods", done.stderr)
        told = subprocess.run([ROOT / "tests/gpu/run.sh", "--help"], capture_output=True, text=True, check=True).stdout
        for part in ("words", "conformance", "models", "repeat", "bench", "sanitizer"):
            self.assertRegex(told, rf"\n +{part} ")

    def test_whole_models_on_the_emulated_gpu_are_near_the_cpu(self):
        if not (BUILD / "tests/emu/afd-cuda.so").exists() or not (BUILD / "examples/afd-generate").exists():
            self.skipTest("a build without the emulator or without tools")
        done = subprocess.run([ROOT / "tests/gpu/models.py", "--build", BUILD, "--emu", "--only", "trinity-mini,qwen3-8b", "--dtype",
                               "fp8"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(done.stdout.count("\nok ") + done.stdout.startswith("ok "), 2)

    def test_logits_that_differ_in_number_or_are_none_are_infinitely_far(self):
        import models
        one = struct.pack("<4f", 1, 2, -2, 0)
        self.assertEqual(models.difference(one, one), 0)
        self.assertAlmostEqual(models.difference(one, struct.pack("<4f", 1, 2, -2, 3)), 1)
        self.assertEqual(models.difference(one, struct.pack("<4f", 1, 2, math.nan, 0)), math.inf)
        self.assertEqual(models.difference(one, struct.pack("<4f", 1, 2, math.inf, 0)), math.inf)

    def test_every_published_shape_is_measured(self):
        import peers
        rows = peers.published("NVIDIA H200")
        self.assertGreater(len(rows), 300)
        self.assertEqual(len(rows), len(peers.published("NVIDIA H100 80GB HBM3")))
        self.assertEqual(peers.published("NVIDIA A100-SXM4-80GB"), {})
        planned = set()
        for dtype in peers.DTYPES:
            planned |= {("product", dtype, m, n, None) for m in peers.MATRICES for n in peers.PRODUCT_ROWS}
            planned |= {("attend", dtype, peers.HEADS[m], n, c) for m in ("qwen3-8b", "qwen3-32b", "30b-a3b-moe") for n in peers.BATCHES
                        for c in peers.CONTEXTS}
            planned |= {("moe", dtype, r, n, None) for r in ("balanced", "power-law") for n in peers.MOE_ROWS}
        self.assertEqual(sorted(set(rows) - planned, key=str), [])

    def test_a_cell_finds_its_published_row(self):
        import peers
        rows = peers.published("NVIDIA H200")
        for cell in ({"op": "product", "shape": "matrix 6144x4096", "rows": 8, "dtype": "fp8"},
                     {"op": "attend", "shape": "qwen3-32b", "rows": 8, "dtype": "bf16", "context": 4096},
                     {"op": "moe", "shape": "30b-a3b-moe", "rows": 4, "dtype": "bf16", "routing": "power-law"}):
            self.assertIn(peers.key_of(cell), rows)
