#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Closed form against simulation, workload by workload; run alone it prints the table of docs/planning.md.

AFD_BUILD=build python3 tests/tools/plan_workloads.py

Coefficients are those of arXiv 2601.21351, table 2; three lanes, stationary start. Ratios from 0.6 to
1.5 of the predicted one are simulated, 8 seeds each, with the same random numbers at every ratio.
"""
import json
import math
import pathlib
import random
import subprocess
import sys
import tempfile

from sentences import BUILD

PAPER = "--alpha-a 0.00165 --beta-a 50 --alpha-f 0.083 --beta-f 100 --alpha-c 0.022 --beta-c 20 --lanes 3".split()
SEEDS, REQUESTS = 8, 3000


def write_trace(path):
    """A trace as from a chat service: short turns, long documents, and answers that grow with their prompt."""
    rows = random.Random(7)
    lines = ["prompt_tokens,output_tokens"]
    for _ in range(8000):
        if rows.random() < 0.7:
            prompt, answer = rows.lognormvariate(5.0, 0.9), rows.lognormvariate(5.3, 0.7)
        else:
            prompt = rows.lognormvariate(7.2, 0.6)
            answer = 0.15 * prompt * rows.lognormvariate(0, 0.5)
        lines.append(f"{min(8192, round(prompt))},{min(2048, max(1, round(answer)))}")
    path.write_text("\n".join(lines) + "\n")


def laws(prompt, output, batch=256):
    return ["--prompt", prompt, "--output", output, "--batch", str(batch)]


def workloads(folder):
    trace = pathlib.Path(folder) / "chat.csv"
    write_trace(trace)
    return {
        "geometric 100/500": laws("constant:100", "geometric:501"),
        "the same, batch 128": laws("constant:100", "geometric:501", 128),
        "the same, batch 512": laws("constant:100", "geometric:501", 512),
        "geometric 100/100": laws("constant:100", "geometric:101"),
        "geometric 500/500": laws("constant:500", "geometric:501"),
        "exponential prompts": laws("exponential:100", "geometric:501"),
        "lognormal 300/300": laws("lognormal:300:1.5", "lognormal:300:1"),
        "output = prompt, lognormal": laws("lognormal:366:1", "prompt:1"),
        "constant output 1000": laws("constant:100", "constant:1000"),
        "Pareto 1.8, cut at 20,000": laws("constant:100", "pareto:493:1.8:20000"),
        "uniform prompts and outputs": laws("uniform:50:950", "uniform:100:900"),
        "Pareto 1.5, cut at 50,000, batch 64": laws("constant:50", "pareto:200:1.5:50000", 64),
        "output = prompt / 4, lognormal cv 2": laws("lognormal:300:2", "prompt:0.25"),
        "long prompts, short answers": laws("lognormal:2000:1", "geometric:120"),
        "a trace, pairs kept": ["--trace", str(trace), "--batch", "256"],
    }


def run(command, flags, *more):
    done = subprocess.run([BUILD / "examples/afd-plan", command, *PAPER, *flags, "--json", *map(str, more)], text=True,
                          capture_output=True, check=True)
    return json.loads(done.stdout)


def compare(flags, requests=REQUESTS):
    """What the closed form says, what the simulation says, and what the difference costs."""
    size = run("size", flags, "--r-max", 64)
    predicted = size["r"]
    low, high = max(1, math.floor(0.6 * predicted)), max(3, math.ceil(1.5 * predicted))
    sim = run("simulate", flags, "--r-min", low, "--r-max", high, "--seeds", SEEDS, "--requests", requests)
    at = {row["r"]: row for row in sim["curve"]}
    best = at[sim["r"]]
    return {"theta": size["theta"], "continuous": size["r_continuous"], "closed": predicted, "gaussian": size["r_gaussian"],
            "simulated": sim["r"], "ci95": best["ci95"] / best["throughput"], "edge": sim["r"] in (low, high) and low > 1,
            "regret": 1 - at[predicted]["throughput"] / best["throughput"], "heavy_tail": size["heavy_tail"],
            "flags": sim["flags"]}


def agrees(case):
    return abs(case["closed"] - case["simulated"]) <= max(1, 0.1 * case["simulated"]) and case["regret"] <= 0.03


def main():
    print("| workload | θ | r, real | closed form | lock step | simulation | ± of its throughput | regret | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory(prefix="afd-plan-") as folder:
        for name, flags in workloads(folder).items():
            case = compare(flags)
            verdict = "agree" if agrees(case) else "**miss**"
            if case["flags"]:
                verdict += ": flagged " + ", ".join(case["flags"])
            print(f"| {name} | {case['theta']:.0f} | {case['continuous']:.2f} | {case['closed']} | {case['gaussian']} | "
                  f"{case['simulated']} | {100 * case['ci95']:.1f} % | {100 * case['regret']:.1f} % | {verdict} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
