#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The comparison that judges logits is itself judged here: it must fail where it should.

Run it as a program; it needs the standard library only.
"""
import array
import pathlib
import struct
import sys
import tempfile
import unittest

import check


def write_npy(path, shape, values, descr="<f4", code="f"):
    head = str({"descr": descr, "fortran_order": False, "shape": shape})
    head += " " * (-(len(head) + 11) % 64) + "\n"
    data = array.array(code, values)
    if sys.byteorder == "big":
        data.byteswap()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
                     + data.tobytes())
    return path


class Check(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.case = pathlib.Path(scratch.name)
        self.got = self.case / "got.npy"
        write_npy(self.case / "logits.npy", (2, 3), [1, 2, 3, 4, 5, 6])

    def verdict(self, values, shape=(2, 3)):
        return check.compare(self.case, write_npy(self.got, shape, values))

    def test_equal_logits_pass(self):
        self.assertTrue(self.verdict([1, 2, 3, 4, 5, 6])[0])

    def test_an_error_within_the_limit_passes(self):
        self.assertTrue(self.verdict([1, 2, 3, 4, 5, 6.0002])[0])  # NMSE 4.4e-10

    def test_an_error_above_the_limit_fails(self):
        passed, line = self.verdict([1, 2, 3, 4, 5, 6.0004])  # NMSE 1.8e-9
        self.assertFalse(passed)
        self.assertIn("limit 1e-09", line)

    def test_a_nan_fails_with_its_position(self):
        passed, line = self.verdict([1, 2, 3, 4, float("nan"), 6])
        self.assertFalse(passed)
        self.assertIn("position 1, token 1", line)

    def test_an_infinity_fails(self):
        self.assertFalse(self.verdict([1, 2, 3, 4, 5, float("inf")])[0])

    def test_a_missing_position_fails_with_both_shapes(self):
        passed, line = self.verdict([1, 2, 3], (1, 3))
        self.assertFalse(passed)
        self.assertIn("(1, 3), golden (2, 3)", line)

    def test_float64_is_refused(self):
        write_npy(self.got, (2, 3), [1, 2, 3, 4, 5, 6], "<f8", "d")
        with self.assertRaisesRegex(ValueError, "wanted little-endian float32"):
            check.compare(self.case, self.got)

    def test_a_file_shorter_than_its_shape_is_refused(self):
        with self.assertRaisesRegex(ValueError, "5 values"):
            self.verdict([1, 2, 3, 4, 5])


if __name__ == "__main__":
    unittest.main()
