#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stage times out of NVIDIA's aiconfigurator-core performance database, for afd-plan report --times.

    pip install aiconfigurator-core pyarrow
    aiconfigurator_times.py --system h200_sxm --config DIR/config.json [--ffn-devices 8] > times.json

A stage is the sum of its kernels as the database has them for one framework: attention is QKV, decode
attention and output projection; the FFN is the experts (or gate-up and down), with the router. Norms,
rope and quantisation are left out. A product whose shape was not measured is scaled from the nearest
one by its weights, and counted in "scaled". ffn times are those of all --ffn-devices together, times
their number: what one device that holds it all would need, which is what afd-plan divides.
"""
import argparse
import collections
import importlib.util
import json
import math
import pathlib
import sys

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
FFN_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def fail(text):
    sys.exit(f"aiconfigurator_times.py: {text}")


def find_data(system):
    """The folder of the system's tables, wherever the package is installed."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if not spec or not spec.submodule_search_locations:
        fail("the package aiconfigurator-core is not installed (pip install aiconfigurator-core pyarrow)")
    systems = pathlib.Path(next(iter(spec.submodule_search_locations))) / "systems/data"
    if not (systems / system).is_dir():
        fail(f"--system {system}: limit {', '.join(sorted(path.name for path in systems.iterdir()))}")
    return systems / system


def read_table(data, op, framework, name):
    """Rows of the newest version of a framework that has the table."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail("the package pyarrow is not installed (pip install pyarrow)")
    paths = sorted(data.glob(f"{op}/{framework}/*/{name}_perf.parquet"),
                   key=lambda path: [int(part) for part in path.parent.name.replace("rc", ".").replace("post", ".").split(".") if part.isdigit()])
    if not paths:
        fail(f"{data.name}: no {op} of {framework}, limit {', '.join(sorted(p.name for p in (data / op).iterdir()))}")
    return pyarrow.parquet.read_table(paths[-1]).to_pylist(), paths[-1].parent.name


def between(points, x):
    """Linear in x between the points {x: us}; beyond the last as the last two go on."""
    xs = sorted(points)
    if x <= xs[0] or len(xs) == 1:
        return points[xs[0]]
    high = next((i for i, value in enumerate(xs) if value >= x), len(xs) - 1)
    a, b = xs[high - 1], xs[high]
    return max(0.0, points[a] + (points[b] - points[a]) * (x - a) / (b - a))


class Products:
    """us of a product of m rows with weights [n, k], the fastest kernel of each shape."""

    def __init__(self, rows, dtype):
        self.shapes = collections.defaultdict(dict)
        self.scaled = set()
        for row in rows:
            if row["gemm_dtype"] == dtype:
                shape = self.shapes[row["n"], row["k"]]
                shape[row["m"]] = min(row["latency"] * 1e3, shape.get(row["m"], math.inf))
        if not self.shapes:
            fail(f"--dtype {dtype}: limit {', '.join(sorted({row['gemm_dtype'] for row in rows}))}")

    def us(self, m, n, k):
        if (n, k) in self.shapes:
            return between(self.shapes[n, k], m)
        self.scaled.add((n, k))
        near = min(self.shapes, key=lambda shape: abs(math.log(shape[0] / n)) + abs(math.log(shape[1] / k)))
        return between(self.shapes[near], m) * n * k / (near[0] * near[1])


def attention_times(rows, config, dtype, products):
    """(rows, context) -> us of a layer."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim, hidden = config.get("head_dim") or config["hidden_size"] // heads, config["hidden_size"]
    found = {}
    for row in rows:
        if (row["num_heads"], row["num_key_value_heads"], row["head_dim"], row["kv_cache_dtype"], row["window_size"]) == (heads, kv, dim, dtype, 0):
            key = row["batch_size"], row["isl"] + row["step"]
            found[key] = min(row["latency"] * 1e3, found.get(key, math.inf))
    if not found:
        shapes = sorted({(row["num_heads"], row["num_key_value_heads"]) for row in rows if row["head_dim"] == dim})
        fail(f"no decode attention of {heads} heads, {kv} KV heads of {dim}, KV {dtype}; limit (heads, KV heads) {shapes}")
    by_batch = collections.defaultdict(dict)
    for (batch, context), us in found.items():
        by_batch[batch][context] = us
    for batch in sorted(set(by_batch) & set(ROWS)):
        linear = products.us(batch, (heads + 2 * kv) * dim, hidden) + products.us(batch, hidden, heads * dim)
        for context in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            if context <= max(by_batch[batch]) * 1.01:
                yield batch, context, linear + between(by_batch[batch], context)


def moe_times(rows, config, dtype, distribution, devices, products):
    """rows -> us of a layer on `devices` devices together."""
    experts, width = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
    wanted = (config["hidden_size"], width, config["num_experts_per_tok"], experts, 1, devices, dtype, distribution)
    found = {}
    for row in rows:
        if (row["hidden_size"], row["inter_size"], row["topk"], row["num_experts"], row["moe_tp_size"], row["moe_ep_size"],
                row["moe_dtype"], row["distribution"]) == wanted:
            found[row["num_tokens"]] = min(row["latency"] * 1e3, found.get(row["num_tokens"], math.inf))
    if not found:
        fail(f"no experts of (hidden, width, top-k, experts, tp, ep, dtype, distribution) {wanted}")
    for n in FFN_ROWS:
        if n <= max(found):
            yield n, between(found, n) + products.us(max(1, n // devices), experts, config["hidden_size"])


def dense_times(config, devices, products):
    width, hidden = config["intermediate_size"] // devices, config["hidden_size"]
    for n in FFN_ROWS:
        yield n, products.us(n, 2 * width, hidden) + products.us(n, hidden, width)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", required=True, help="h100_sxm, h200_sxm, b200_sxm, gb200, ...")
    parser.add_argument("--config", required=True, help="config.json of the model")
    parser.add_argument("--framework", default="sglang", help="sglang, trtllm or vllm (default sglang)")
    parser.add_argument("--dtype", default="bfloat16", help="of products and experts: bfloat16, fp8_block, ... (default bfloat16)")
    parser.add_argument("--kv-dtype", default="bfloat16", help="bfloat16 or fp8 (default bfloat16)")
    parser.add_argument("--ffn-devices", type=int, default=1, help="devices that share the FFN (default 1)")
    parser.add_argument("--distribution", default="power_law_1.2", help="of rows over experts: balanced, power_law_1.2, ... (default power_law_1.2)")
    parser.add_argument("--device", help="the name that afd-plan knows the device by (default: from --system)")
    args = parser.parse_args()

    config = json.loads(pathlib.Path(args.config).read_text())
    data = find_data(args.system)
    gemms, version = read_table(data, "gemm", args.framework, "gemm")
    products = Products(gemms, args.dtype)
    device = args.device or args.system.split("_")[0].upper()
    entry = {"device": device, "dtype": args.dtype}
    times = [{"stage": "attention", **entry, "rows": rows, "context": context, "us": round(us, 3)}
             for rows, context, us in attention_times(read_table(data, "attention", args.framework, "generation_attention")[0], config,
                                                      args.kv_dtype, products)]
    if config.get("moe_intermediate_size"):
        ffn = moe_times(read_table(data, "moe", args.framework, "moe")[0], config, args.dtype, args.distribution, args.ffn_devices, products)
    else:
        ffn = dense_times(config, args.ffn_devices, products)
    times += [{"stage": "ffn", **entry, "rows": rows, "context": 0, "us": round(us * args.ffn_devices, 3)} for rows, us in ffn]
    vocab = {"stage": "head", **entry, "context": 0}
    times += [{**vocab, "rows": rows, "us": round(products.us(rows, config["vocab_size"], config["hidden_size"]), 3)} for rows in ROWS]
    json.dump({"source": f"aiconfigurator-core {args.system} {args.framework} {version}", "ffn_devices": args.ffn_devices,
               "scaled": sorted(products.scaled), "times": times}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
