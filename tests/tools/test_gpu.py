# SPDX-License-Identifier: Apache-2.0
"""What waits for a GPU in tests/gpu, as far as it can be looked at without one: it runs on the emulator, and it can fail."""
import os
import re
import subprocess
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
