#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of transports over verbs, inside the virtual machine: conformance.py BUILD LABEL

Each case is one line on stdout, as those of sentences.py. "verbs-two" takes both ports of tests/verbs/ports.sh.
"""
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
import results  # noqa: E402

RUNS = [("flow", "verbs"), ("flow", "verbs-key"), ("flow", "verbs-two"), ("join", "verbs"), ("loss", "verbs"), ("loss", "verbs-two"),
        ("steady", "verbs"), ("failover", "verbs"), ("processes", "verbs"), ("shards", "verbs"), ("shards", "verbs-two"),
        ("group", "verbs"), ("group_ends", "verbs"), ("keys", "verbs"), ("probe", "verbs"),
        ("probe", "verbs-key"), ("probe", "auto")]


def main():
    build = pathlib.Path(sys.argv[1])
    env = {**os.environ, "AFD_MODULE_DIR": str(build / "modules"), "CMOCKA_MESSAGE_OUTPUT": "TAP", "AFD_TEST_EMULATED": "1"}
    for suite, backend in RUNS:
        test = {"name": f"conformance / transport_{suite}-{backend}", "stderr": ""}
        try:
            done = subprocess.run([build / f"tests/conformance/conformance_transport_{suite}", backend], env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
            test |= {"stdout": done.stdout, "returncode": done.returncode, "result": "FAIL" if done.returncode else "OK"}
        except subprocess.TimeoutExpired as late:
            test |= {"stdout": (late.stdout or b"").decode(), "returncode": -9, "result": "TIMEOUT"}
        results.report(sys.argv[2], test)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
