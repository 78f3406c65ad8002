#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""afd-plan report on measured kernels beside `aiconfigurator cli estimate --estimate-mode afd`: six cases, as a table of
docs/planning.md. Needs a Python with aiconfigurator, aiconfigurator-core and pyarrow:

AFD_BUILD=build VENV/bin/python tests/tools/plan_peers.py
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from sentences import BUILD, ROOT

QWEN30 = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
          "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936}
QWEN235 = {**QWEN30, "hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536}
# model, its config, system, prompt tokens, attention nodes, sequences of a device, lanes
CASES = [
    ("Qwen3-30B-A3B", QWEN30, "h200_sxm", 2000, 1, 128, 2),
    ("Qwen3-30B-A3B", QWEN30, "h200_sxm", 2000, 2, 64, 3),
    ("Qwen3-30B-A3B", QWEN30, "h200_sxm", 8000, 1, 64, 2),
    ("Qwen3-30B-A3B", QWEN30, "h100_sxm", 2000, 1, 64, 2),
    ("Qwen3-235B-A22B", QWEN235, "h200_sxm", 4000, 1, 64, 2),
    ("Qwen3-235B-A22B", QWEN235, "b200_sxm", 4000, 1, 64, 2),
]
OUTPUT = 500


def peer(model, system, prompt, nodes, slots, lanes):
    tool = pathlib.Path(sys.executable).parent / "aiconfigurator"
    done = subprocess.run([tool, "cli", "estimate", "--estimate-mode", "afd", "--model-path", f"Qwen/{model}", "--system", system,
                           "--backend", "sglang", "--isl", str(prompt), "--osl", str(OUTPUT), "--n-a-nodes", str(nodes), "--n-f-nodes", "1",
                           "--a-tp-size", "1", "--a-batch-size", str(slots), "--f-moe-ep-size", "8", "--num-microbatches", str(lanes),
                           "--no-afd-combined-with-pd"], text=True, capture_output=True, check=True)

    def find(name):
        return float(re.search(rf"{re.escape(name)}:\s+([\d.,]+)", done.stdout)[1].replace(",", ""))
    return {"t_a": find("T_a_layer"), "t_f": find("T_f_layer"), "t_c": find("T_c_layer") / 2, "tpot": find("TPOT"),
            "rate": find("tokens/s/gpu")}


def ours(folder, model, config, system, prompt, nodes, slots, lanes):
    path, times = folder / "config.json", folder / "times.json"
    path.write_text(json.dumps(config))
    with times.open("w") as out:
        subprocess.run([sys.executable, ROOT / "examples/plan/aiconfigurator_times.py", "--system", system, "--config", path,
                        "--ffn-devices", "8"], stdout=out, check=True)
    done = subprocess.run([BUILD / "examples/afd-plan", "report", "--model", model, "--device", system.split("_")[0], "--attention",
                           str(8 * nodes), "--ffn", "8", "--context", str(prompt + OUTPUT // 2), "--nu2", "1", "--slots", str(slots),
                           "--lanes", str(lanes), "--weight-bytes", "2", "--times", times, "--json"], text=True, capture_output=True,
                          check=True)
    result = json.loads(done.stdout)
    layers = {"Qwen3-30B-A3B": 48, "Qwen3-235B-A22B": 94}[model]
    stages = {stage["stage"]: stage["ms"] for stage in result["stages"]}
    return {"t_a": (stages["attention"]) / layers, "t_f": stages["ffn"] / layers, "t_c": stages["exchange, one direction"] / layers,
            "tpot": result["tpot_ms"], "rate": result["tokens_per_second_per_device"], "verdict": result["verdict"],
            "speedup": result["speedup_per_device"]}


def main():
    print("| case | attention, µs a layer | FFN | exchange, one way | TPOT, ms | tokens/s/GPU | per device against colocation |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="afd-plan-") as folder:
        for model, config, system, *numbers in CASES:
            a, b = ours(pathlib.Path(folder), model, config, system, *numbers), peer(model, system, *numbers)
            cells = [f"{1e3 * a[key]:.0f} : {1e3 * b[key]:.0f}" for key in ("t_a", "t_f", "t_c")]
            prompt, nodes, slots, lanes = numbers
            print(f"| {model}, {system}, {prompt} + {OUTPUT}, {8 * nodes}A:8F, {slots} slots, {lanes} lanes | {' | '.join(cells)} | "
                  f"{a['tpot']:.1f} : {b['tpot']:.1f} | {a['rate']:.0f} : {b['rate']:.0f} ({100 * (a['rate'] / b['rate'] - 1):+.0f} %) | "
                  f"{a['speedup']:.2f}, {a['verdict']} |", flush=True)


if __name__ == "__main__":
    main()
