#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a file of unittest sentences: sentences.py SUITE FILE.py

Each test method's name is a sentence. Its outcome is one line on stdout, tab-separated, which
tests/run.sh counts:  passed|failed|skipped  SUITE: sentence  [reason].  Details of a failure go to
stderr.
"""
import importlib.util
import os
import pathlib
import sys
import traceback
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("AFD_BUILD", ROOT / "build"))  # a plain release build


def one_line(text):
    return " ".join(str(text).split())


class Lines(unittest.TestResult):
    def __init__(self, suite):
        super().__init__()
        self.suite = suite
        self.n_failed = 0

    def say(self, outcome, test, reason=""):
        name = getattr(test, "_testMethodName", str(test)).removeprefix("test_").replace("_", " ")
        print(outcome, f"{self.suite}: {name}", one_line(reason), sep="\t", flush=True)

    def fail(self, test, error, where=""):
        self.n_failed += 1
        self.say("failed", test, f"{where}{error[0].__name__}: {error[1]}"[:600])
        traceback.print_exception(*error)

    def addSuccess(self, test):
        self.say("passed", test)

    def addSkip(self, test, reason):
        self.say("skipped", test, reason)

    def addError(self, test, err):
        self.fail(test, err)

    def addFailure(self, test, err):
        self.fail(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.fail(test, err, f"{subtest._subDescription()} ")


def main(suite, path):
    path = pathlib.Path(path).resolve()
    sys.path[:0] = [str(path.parent), str(pathlib.Path(__file__).resolve().parent)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    result = Lines(suite)
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    return 1 if result.n_failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
