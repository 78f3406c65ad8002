# SPDX-License-Identifier: Apache-2.0
"""What the Python tests share: where things are, and a runner that prints one line per sentence.

Each test method's name is a sentence. Its outcome is one line on stdout, tab-separated, which
tests/run.sh counts:  passed|failed|skipped  SUITE: sentence  [reason].  Details of a failure go to
stderr. A test file ends with sentences.main("suite").
"""
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


def main(suite, module="__main__"):
    tests = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[module])
    result = Lines(suite)
    tests.run(result)
    sys.exit(1 if result.n_failed else 0)
