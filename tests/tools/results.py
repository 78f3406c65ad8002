#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Outcomes of a meson test run, one line per cmocka case: results.py LABEL testlog.json

The tests ran with CMOCKA_MESSAGE_OUTPUT=TAP. Each case of an executable is one line, as those of
sentences.py. Cases that were planned and never reported (a crash, a timeout) are failed; so is an
executable that ended badly without a failed case (a sanitizer's report, a leak). Exit 77: skipped.
"""
import json
import re
import sys

CASE = re.compile(r"^(ok|not ok) \d+ (# SKIP|-) ?(.*)$")


def say(outcome, label, name, reason=""):
    print(outcome, f"{label}: {name.replace('_', ' ')}", " ".join(reason.split())[:600], sep="\t")


def last_words(text):
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def report(label, test):
    """Says the outcomes of one executable."""
    suite, name = re.match(r"(?:[^:]*:)?(?:(\S+) / )?(.*)", test["name"]).groups()
    label = f"{label} {suite or 'tests'}: {name}"
    output = test.get("stdout", "") or ""
    if test["returncode"] == 77:
        return say("skipped", label, "all of it", last_words(output + "\n" + test.get("stderr", "")))
    planned, n_seen, n_failed, before, pending = 0, 0, 0, "", None
    for line in output.splitlines():
        case = CASE.match(line)
        plan = re.match(r"^1\.\.(\d+)$", line)
        if pending and line.startswith("# "):
            pending[1] += line[1:]
            continue
        if pending:
            say("failed", label, *pending)
            pending = None
        if plan:
            planned += int(plan[1])
        elif not case:
            before = line
        else:
            n_seen += 1
            if case[2] == "# SKIP":
                say("skipped", label, case[3], before.removeprefix("skipped: ") or "it gives no reason")
            elif case[1] == "ok":
                say("passed", label, case[3])
            else:
                pending, n_failed = [case[3], ""], n_failed + 1
            before = ""
    if pending:
        say("failed", label, *pending)
    why = f"{test['result']}, exit {test['returncode']}: {last_words(test.get('stderr') or output)}"
    for i in range(n_seen, planned):
        say("failed", label, f"case {i + 1} of {planned}", f"not reported: {why}")
    if test["result"] != "OK" and not n_failed and n_seen >= planned:
        say("failed", label, "the whole run", why)
    elif test["result"] == "OK" and not planned:
        say("passed", label, "the whole run")


def main():
    label, path = sys.argv[1:]
    with open(path, encoding="utf-8") as log:
        for line in log:
            report(label, json.loads(line))


if __name__ == "__main__":
    main()
