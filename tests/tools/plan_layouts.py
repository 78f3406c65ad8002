#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a calibration foretells of 1A:1F, 2A:1F and 3A:1F on this machine, beside what they do.

AFD_BUILD=build python3 tests/tools/plan_layouts.py [MODEL_DIR] [ROUNDS] [--alone]

Calibration and runs take turns, and the medians are compared: a machine that others use too changes
from minute to minute. All processes have one thread. --alone (root) runs them at real-time priority,
the FFN server above the others, so that neither other work nor a time slice stands between a row and it.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import pathlib

from sentences import BUILD, ROOT

ALONE = "--alone" in sys.argv
BATCH, PROMPT, TOKENS, LAYOUTS = 8, 64, 1000, (1, 2, 3)


def tool(name, *args):
    return [str(BUILD / "examples" / name), *map(str, args)]


def alone(priority):
    return ["chrt", "-r", str(priority)] if ALONE else []


def output(name, *args):
    return json.loads(subprocess.run(alone(10) + tool(name, *args, "--json"), text=True, capture_output=True, check=True).stdout)


def calibrate(model, path):
    output("afd-plan", "calibrate", "--model", model, "--batch", BATCH, "--context", PROMPT + TOKENS, "--seconds", 6, "--out", path)


def predict(path, lanes):
    """Tokens per second of each layout, and of one process that does both stages."""
    plan = output("afd-plan", "size", "--calibration", path, "--lanes", lanes, "--theta", PROMPT + TOKENS / 2, "--r-max", max(LAYOUTS))
    times = plan["curve"][0]
    return {r: plan["curve"][r - 1]["tokens_per_time"] * 1e6 for r in LAYOUTS} | {0: BATCH / (times["t_a"] + times["t_f"]) * 1e6}


def measure(model, batch, n_attention):
    """Tokens per second of all attention processes together."""
    common = ["--model", model, "--threads", 1, "--batch", batch, "--max-tokens", TOKENS, "--wire-dtype", "f32"]
    if not n_attention:
        return output("afd-generate", *common)["tokens_per_second"]
    address = "shm:plan-layouts"
    server = subprocess.Popen(alone(20) + tool("afd-serve-ffn", "--model", model, "--listen", address, "--threads", 1), stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        runs = [subprocess.Popen(alone(10) + tool("afd-generate", *common, "--ffn", address, "--json"), text=True, stdout=subprocess.PIPE)
                for _ in range(n_attention)]
        return sum(json.loads(run.communicate()[0])["tokens_per_second"] for run in runs)
    finally:
        server.terminate()
        server.wait()


def main():
    words = [word for word in sys.argv[1:] if word != "--alone"]
    model = words[0] if words else str(ROOT / "models/tiny-qwen3")
    rounds = int(words[1]) if len(words) > 1 else 5
    foretold, done = ({r: [] for r in (0, *LAYOUTS)} for _ in range(2))
    with tempfile.TemporaryDirectory(prefix="afd-plan-") as folder:
        path, batch = pathlib.Path(folder) / "calibration.json", pathlib.Path(folder) / "batch.json"
        batch.write_text(json.dumps([{"ids": [(7 * s + i) % 97 for i in range(PROMPT)]} for s in range(BATCH)]))
        for _ in range(rounds):
            calibrate(model, path)
            for r, speed in predict(path, 1).items():
                foretold[r].append(speed)
                done[r].append(measure(model, batch, r))
    print("| layout | foretold, tokens/s | measured, tokens/s | measured over foretold |\n|---|---:|---:|---:|")
    for r in (0, *LAYOUTS):
        a, b = statistics.median(foretold[r]), statistics.median(done[r])
        print(f"| {f'{r}A:1F' if r else 'one process'} | {a:.0f} ({min(foretold[r]):.0f} to {max(foretold[r]):.0f}) | "
              f"{b:.0f} ({min(done[r]):.0f} to {max(done[r]):.0f}) | {b / a:.2f} |")


if __name__ == "__main__":
    main()
