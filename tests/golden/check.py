#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare a float32 .npy of logits with a golden case: check.py CASE_DIR LOGITS.npy

Uses the standard library only, so that the ordinary test run installs nothing. Exit status: 0 the
normalised mean square error is within the limit, 1 it is not (or a value is not finite, or the
shape differs), 2 a file cannot be read.
"""
import argparse
import array
import ast
import math
import pathlib
import struct
import sys

LIMIT = 1e-9  # float32 noise at these sizes is 1e-13 to 4e-12


def read_npy(path):
    """(shape, values) of a little-endian C-ordered float32 .npy file, any format version."""
    data = pathlib.Path(path).read_bytes()
    if data[:6] != b"\x93NUMPY":
        raise ValueError(f"{path}: not a .npy file")
    start = 10 if data[6] == 1 else 12
    size = struct.unpack_from("<H" if data[6] == 1 else "<I", data, 8)[0]
    head = ast.literal_eval(data[start:start + size].decode("latin1"))
    if head["descr"] != "<f4" or head["fortran_order"]:
        raise ValueError(f"{path}: {head['descr']} {head}, wanted little-endian float32 in C order")
    values = array.array("f", data[start + size:])
    if sys.byteorder == "big":
        values.byteswap()
    if len(values) != math.prod(head["shape"]):
        raise ValueError(f"{path}: {len(values)} values, shape {head['shape']}")
    return tuple(head["shape"]), values


def nmse(got, want):
    """Sum of squared differences over the sum of squares; NaN or infinity if got has one."""
    error = math.fsum((g - w) ** 2 for g, w in zip(got, want, strict=True))
    return error / math.fsum(w * w for w in want)


def compare(case_dir, logits, limit=LIMIT):
    """(passed, one line that says why) for the logits file of one golden case."""
    want_shape, want = read_npy(pathlib.Path(case_dir) / "logits.npy")
    shape, got = read_npy(logits)
    if shape != want_shape:
        return False, f"{logits}: shape {shape}, golden {want_shape}"
    bad = next((i for i, value in enumerate(got) if not math.isfinite(value)), None)
    if bad is not None:
        return False, f"{logits}: {got[bad]} at position {bad // shape[1]}, token {bad % shape[1]}"
    error = nmse(got, want)
    largest = max(abs(g - w) for g, w in zip(got, want))
    return error <= limit, f"{logits}: NMSE {error:.3e}, limit {limit:.0e}, largest {largest:.2e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("case_dir")
    parser.add_argument("logits")
    parser.add_argument("--limit", type=float, default=LIMIT, help="NMSE (default %(default)g)")
    args = parser.parse_args()
    try:
        passed, line = compare(args.case_dir, args.logits, args.limit)
    except (OSError, ValueError, KeyError, struct.error, SyntaxError) as error:
        print(error, file=sys.stderr)
        return 2
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
