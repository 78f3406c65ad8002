#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Operations on this GPU beside others at the same shapes: `afd-bench ops` against the GPU's own ceilings, PyTorch in the same
minutes, and what is published of SGLang, TensorRT-LLM and vLLM on the same kind of GPU (peers.csv, which names its source).

  peers.py --build BUILD [--out DIR] [--emu]

Prints every cell, then "summary" and a few lines. --out keeps ops.json (what afd-bench said) and peers.json (all of it). --emu runs
all of it on shapes that the emulated GPU can do, PyTorch on the CPU where there is one: the times then say nothing of a GPU.
"""
import argparse
import csv
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
HEADS = {"qwen3-8b": "32/8", "qwen3-32b": "64/8", "30b-a3b-moe": "32/4", "qwen3-0.6b": "16/8"}
MATRICES = ["6144x4096", "4096x4096", "12288x4096", "4096x12288", "10240x5120", "5120x8192", "51200x5120", "5120x2048", "2048x4096"]
PRODUCT_ROWS, BATCHES = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096], [1, 8, 16, 64, 128, 256]
CONTEXTS, MOE_ROWS = [1024, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
TORCH_ROWS, TORCH_MOE_ROWS, TORCH_BATCHES = [1, 8, 64, 4096], [1, 8, 64], [1, 8, 64]
DTYPES = ["bf16", "fp8"]
COLD_BYTES = 512 << 20  # what PyTorch's weights rotate over


def join(values):
    return ",".join(map(str, values))


def plan(emu):
    """What afd-bench is asked for, call by call."""
    if emu:
        for dtype in DTYPES:
            yield ["--matrices", "64x256", "--rows", "1,8", "--dtype", dtype, "--seconds", "0.1"]
        yield ["--ops", "attend", "--shapes", "qwen3-0.6b", "--context", "32", "--rows", "1,2", "--seconds", "0.1"]
        yield ["--ops", "norm,rope,activation", "--shapes", "qwen3-0.6b", "--rows", "1", "--seconds", "0.1"]
        return
    for dtype in DTYPES:
        yield ["--matrices", join(MATRICES), "--rows", join(PRODUCT_ROWS), "--dtype", dtype, "--cold-gib", "2", "--seconds", "6"]
        yield ["--ops", "attend", "--shapes", "qwen3-8b,qwen3-32b,30b-a3b-moe", "--context", join(CONTEXTS), "--rows", join(BATCHES),
               "--dtype", dtype, "--cold-gib", "4", "--seconds", "6"]
        for routing in ("balanced", "power-law"):
            yield ["--ops", "moe", "--rows", join(MOE_ROWS), "--routing", routing, "--dtype", dtype, "--seconds", "2"]
    yield ["--ops", "norm,rope,activation", "--shapes", "qwen3-8b", "--rows", "1,8,64,1024", "--seconds", "1"]


def measure(build, emu):
    """(machine, cells) of all calls."""
    env = dict(os.environ, AFD_MODULE_DIR=str(build / ("tests/emu" if emu else "modules")))
    machine, cells, failures = {}, [], []
    for flags in plan(emu):
        done = subprocess.run([build / "examples/afd-bench", "ops", "--device", "cuda:0", "--json", *flags], capture_output=True,
                              text=True, env=env)
        if done.returncode:
            failures.append(f"{join(flags)}: {done.stderr.strip()}")
            continue
        report = json.loads(done.stdout)
        for key, value in report["machine"].items():
            machine[key] = max(value, machine.get(key, 0)) if key.endswith("_best") else machine.get(key, value)
        cells += report["results"]
    return machine, cells, failures


def load_rate(build, emu):
    """(the result of `afd-bench load`, or None, and a line on it)."""
    env = dict(os.environ, AFD_MODULE_DIR=str(build / ("tests/emu" if emu else "modules")))
    size = ["--mib", "16", "--seconds", "0.2"] if emu else ["--mib", "2048", "--seconds", "4"]
    done = subprocess.run([build / "examples/afd-bench", "load", "--device", "cuda:0", "--json", *size], capture_output=True, text=True,
                          env=env)
    if done.returncode:
        return None, f"not measured: load: {done.stderr.strip()}"
    result = json.loads(done.stdout)["results"][0]
    return result, (f"loading weights from a mapped file: {result['gb_per_s']:.1f} GB/s, {100 * result['ratio']:.0f} % of "
                    f"{result['host_to_device_gb_per_s']:.1f} GB/s from registered memory")


def key_of(cell):
    """The row of peers.csv for a cell."""
    shape = {"product": cell["shape"].split()[-1], "attend": HEADS.get(cell["shape"]), "moe": cell.get("routing")}.get(cell["op"])
    return cell["op"], cell["dtype"], shape, cell["rows"], cell.get("context")


def published(gpu):
    """{key: (us, whose)} for this kind of GPU; empty when nothing is published of it."""
    kind = next((kind for kind in ("h200", "h100") if kind in gpu.lower()), None)
    with open(HERE / "peers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    if not kind:
        return {}
    return {(r["op"], r["dtype"], r["shape"], int(r["rows"]), int(r["context"]) if r["context"] else None):
            (float(r[f"{kind}_us"]), r[f"{kind}_by"]) for r in rows if r[f"{kind}_us"]}


# --------------------------------------------------------------------------------------- PyTorch

class Torch:
    """The same shapes through PyTorch: replays of a graph on a GPU, by the clock on a CPU."""

    def __init__(self, emu):
        import torch
        self.torch, self.emu = torch, emu
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu" and not emu:
            raise RuntimeError("PyTorch sees no GPU")
        self.gpu = torch.cuda.get_device_name() if self.device == "cuda" else "no GPU"
        self.missing = {}

    def random(self, *shape):
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.bfloat16)

    def time(self, run, n):
        """us of run(i), the mean of n of them; the best of five."""
        torch = self.torch
        for i in range(n):
            run(i)
        if self.device == "cpu":
            start = time.perf_counter()
            for i in range(n):
                run(i)
            return (time.perf_counter() - start) / n * 1e6
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(n):
                run(i)
        graph.replay()
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / n)
        return sorted(times)[2]

    def copies(self, n_bytes):
        return max(2, min(64, COLD_BYTES // n_bytes + 1))

    def ceiling(self):
        """TFLOP/s of the largest product, on random numbers."""
        n = 256 if self.emu else 8192
        a, b = self.random(n, n), self.random(n, n)
        return 2 * n ** 3 / self.time(lambda i: self.torch.matmul(a, b), 2 if self.emu else 8) * 1e-6

    def product(self, n, k, rows):
        weights = [self.random(n, k) for _ in range(2 if self.emu else self.copies(2 * n * k))]
        x = self.random(rows, k)
        return self.time(lambda i: self.torch.nn.functional.linear(x, weights[i % len(weights)]), len(weights))

    def attend(self, heads, kv_heads, batch, context):
        n = 2 if self.emu else self.copies(4 * batch * context * kv_heads * 128)
        caches = [(self.random(batch, kv_heads, context, 128), self.random(batch, kv_heads, context, 128)) for _ in range(n)]
        q = self.random(batch, heads, 1, 128)
        attention = self.torch.nn.functional.scaled_dot_product_attention
        return self.time(lambda i: attention(q, *caches[i % n], enable_gqa=True), n)

    def moe(self, rows):
        """Grouped products alone, without routing and permutation: rows lie sorted by expert already."""
        torch = self.torch
        hidden, width, experts, top = (64, 32, 8, 2) if self.emu else (2048, 768, 128, 8)
        up, down = self.random(experts, hidden, 2 * width), self.random(experts, width, hidden)
        x = self.random(rows * top, hidden)
        counts = torch.zeros(experts, dtype=torch.int32)
        for i in range(rows * top):
            counts[i * 5 % experts] += 1
        ends = counts.cumsum(0).to(torch.int32).to(self.device)

        def run(_):
            both = torch._grouped_mm(x, up, offs=ends)
            gate, value = both.chunk(2, dim=1)
            return torch._grouped_mm(torch.nn.functional.silu(gate) * value, down, offs=ends)
        return self.time(run, 2 if self.emu else 8)

    def all(self, cells):
        """{key: us} for cells in bf16 that PyTorch is asked for; what it cannot do is told once."""
        found = {}
        for cell in cells:
            key = key_of(cell)
            op, dtype, shape, rows, context = key
            wanted = {"product": TORCH_ROWS, "attend": TORCH_BATCHES, "moe": TORCH_MOE_ROWS}.get(op)
            if dtype != "bf16" or not wanted or (rows not in wanted and not self.emu) or shape == "power-law" or op in self.missing:
                continue
            try:
                if op == "product":
                    found[key] = self.product(*map(int, shape.split("x")), rows)
                elif op == "attend":
                    found[key] = self.attend(*map(int, shape.split("/")), rows, context)
                else:
                    found[key] = self.moe(rows)
            except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
                self.missing[op] = " ".join(str(error).split())[:160]
            if self.device == "cuda":
                self.torch.cuda.empty_cache()
        return found


def flashinfer_times(torch_side, cells):
    """{key: us} of decode attention where FlashInfer can be imported."""
    if torch_side is None or not importlib.util.find_spec("flashinfer"):
        return {}, "not installed"
    import flashinfer
    torch, found = torch_side.torch, {}
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    for cell in cells:
        key = op, dtype, shape, batch, context = key_of(cell)
        if op != "attend" or dtype != "bf16" or batch not in TORCH_BATCHES:
            continue
        heads, kv_heads = map(int, shape.split("/"))
        n_pages = batch * context // 16
        try:
            pages = [torch_side.random(n_pages, 2, 16, kv_heads, 128) for _ in range(torch_side.copies(n_pages * 16 * kv_heads * 512))]
            decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
            steps = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * (context // 16)
            decode.plan(steps, torch.randperm(n_pages, device="cuda").to(torch.int32), torch.full((batch,), 16, device="cuda",
                        dtype=torch.int32), heads, kv_heads, 128, 16, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
            q = torch_side.random(batch, heads, 128)
            found[key] = torch_side.time(lambda i: decode.run(q, pages[i % len(pages)]), len(pages))
        except (RuntimeError, TypeError, ValueError) as error:
            return found, " ".join(str(error).split())[:160]
    return found, ""


# ---------------------------------------------------------------------------------------- tables

def print_cells(cells, machine):
    print(f"{'op':<10} {'shape':<18} {'rows':>5} {'context':>7} {'dtype':<5} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'% of':>5} {'limit':<5}"
          f" {'PyTorch':>9} {'FlashInf':>9} {'published':>9} {'whose':<20} {'ours/best':>9}")
    for c in cells:
        numbers = [f"{c[name]:9.1f}" if c.get(name) else " " * 9 for name in ("torch_us", "flashinfer_us", "published_us")]
        ratio = f"{c['ours_over_best']:9.2f}" if c.get("ours_over_best") else ""
        print(f"{c['op']:<10} {c['shape'].removeprefix('matrix '):<18} {c['rows']:>5} {c.get('context') or c.get('routing', '')!s:>7.7} "
              f"{c['dtype']:<5} {c['us']:9.1f} {c['gb_per_s']:7.0f} {c['tflop_per_s']:8.1f} {c['percent']:5.0f} {c['limit']:<5}"
              f" {' '.join(numbers)} {c.get('published_by', ''):<20} {ratio}")


def geometric(values):
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def groups(cells):
    """(name, cells) as the goals speak of them."""
    def heavy(c):
        n, k = c["n"], c["k"]
        return n * k * (2 if c["dtype"] == "bf16" else 1) >= 60e6

    def name(c):
        if c["op"] == "product":
            return f"product {c['dtype']} " + ("4096 rows" if c["rows"] == 4096 else "1-64 rows, 60 MB" if heavy(c) and c["rows"] <= 64
                                               else "others")
        if c["op"] == "attend":
            return f"attend {c['dtype']} " + ("batch 1-8" if c["rows"] <= 8 else "larger")
        if c["op"] == "moe":
            return f"moe {c['dtype']} {c['routing']} " + ("1-8 rows" if c["rows"] <= 8 else "more")
        return c["op"]
    for label, found in itertools.groupby(sorted(cells, key=name), key=name):
        yield label, list(found)


def print_summary(cells, machine, gpu, notes, emu):
    print("summary")
    print("the emulated GPU: these times say nothing of any GPU" if emu else f"{gpu}: ceilings of this run: reading "
          f"{machine.get('device_read_gb_per_s', 0):.0f} GB/s, mma.sync {machine.get('device_mma_tflop_per_s', 0):.0f} TFLOP/s, "
          f"PyTorch's 8192^3 {machine.get('torch_tflop_per_s', 0):.0f} TFLOP/s")
    print(f"{'group':<36} {'cells':>5} {'% of limit: least':>18} {'median':>7} {'time over best: mean':>21} {'worst':>6} {'cells':>5}")
    for label, found in groups(cells):
        percents = sorted(c["percent"] for c in found)
        ratios = [c["ours_over_best"] for c in found if c.get("ours_over_best")]
        against = f"{geometric(ratios):21.2f} {max(ratios):6.2f} {len(ratios):5d}" if ratios else f"{'nothing to compare':>21}"
        print(f"{label:<36} {len(found):5d} {percents[0]:18.0f} {percents[len(percents) // 2]:7.0f} {against}")
    for note in notes:
        print(note)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--emu", action="store_true")
    options = parser.parse_args()
    load, load_line = load_rate(options.build, options.emu)
    machine, cells, failures = measure(options.build, options.emu)
    if options.out:
        (options.out / "ops.json").write_text(json.dumps({"machine": machine, "results": cells, "load": load}))
    notes, torch_side, torch_us = [load_line, *(f"not measured: {failure}" for failure in failures)], None, {}
    try:
        torch_side = Torch(options.emu)
        machine["torch_tflop_per_s"] = torch_side.ceiling()
        torch_us = torch_side.all(cells)
        notes += [f"PyTorch has no {op} here: {why}" for op, why in torch_side.missing.items()]
    except (ImportError, RuntimeError) as error:
        notes.append(f"no times of PyTorch: {error}")
    flash_us, why = flashinfer_times(None if options.emu else torch_side, cells)
    if why:
        notes.append(f"FlashInfer: {why}")
    gpu = torch_side.gpu if torch_side else subprocess.run(
        "nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1", shell=True, capture_output=True, text=True).stdout.strip()
    others = published("" if options.emu else gpu)
    if not others:
        notes.append("nothing is published of this GPU in peers.csv")
    for cell in cells:
        key = key_of(cell)
        # mma.sync may be under what other ways of multiplying reach here.
        multiply = max(cell["multiply_tflop_per_s"], machine.get("torch_tflop_per_s", 0))
        limits = {"read": cell["bytes"] / cell["read_gb_per_s"] * 1e-3, "mma": cell["flops"] / multiply * 1e-6}
        cell["limit"] = max(limits, key=limits.get)
        cell["percent"] = 100 * limits[cell["limit"]] / cell["us"]
        cell["torch_us"], cell["flashinfer_us"] = torch_us.get(key), flash_us.get(key)
        cell["published_us"], cell["published_by"] = others.get(key, (None, ""))
        best = [us for us in (cell["torch_us"], cell["flashinfer_us"], cell["published_us"]) if us]
        cell["ours_over_best"] = cell["us"] / min(best) if best and not options.emu else None
    print_cells(cells, machine)
    print_summary(cells, machine, gpu, notes, options.emu)
    if options.out:
        (options.out / "peers.json").write_text(json.dumps({"gpu": gpu, "machine": machine, "cells": cells, "notes": notes}))
    return 1 if failures or not cells or not load else 0


if __name__ == "__main__":
    sys.exit(main())
