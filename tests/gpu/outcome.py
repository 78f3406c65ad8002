#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The outcomes of one program that spoke TAP, one line each: outcome.py PART NAME STATUS SECONDS STDOUT STDERR

Lines are those of tests/tools/results.py, which tests/gpu/run.sh counts. Status 124 is what `timeout` ends with.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import results  # noqa: E402

part, name, status, seconds, out, err = sys.argv[1:]
result = "OK" if status == "0" else f"stopped after {seconds} s" if status == "124" else "ERROR"
results.report(part, {"name": name, "returncode": int(status), "result": result,
                      "stdout": pathlib.Path(out).read_text(errors="replace"), "stderr": pathlib.Path(err).read_text(errors="replace")})
