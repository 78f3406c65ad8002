#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records what reference.py computes where libafd is asked to round: an fp8 KV cache, e4m3 inputs.

Neither is anything that transformers does on a CPU, so here the NumPy decoder is the witness, with
the roundings of docs/models.md written a second time. Each case is a folder of rounded/, laid out
like the goldens beside it; `generated` ids are given, not chosen. Rounding is a cliff: prompts are
those of which no number lies so near a tie that float32 noise could push it over.

  rounded.py                writes every case
  rounded.py --check        computes the recorded cases again and compares

Needs: pip install numpy
"""
import argparse
import json
import math
import pathlib
import shutil
import sys

import numpy as np

import reference

HERE = pathlib.Path(__file__).resolve().parent
ROUNDED = HERE / "rounded"
N_PROMPT, N_GENERATED = 14, 7
GROUP = 128  # numbers of a row that share a scale
LARGEST = 448.0

# name -> base case, which roundings, nearest tie allowed (in steps of e4m3), what
CASES = {
    "kv": ("bf16-tied", "kv", 1e-4, "an fp8 KV cache, scales 1"),
    "kv-window": ("afmoe-f32", "kv", 1e-4, "an fp8 KV cache of layers with and without a window"),
    "kv-scales": ("bf16-tied", "kv", 1e-4, "an fp8 KV cache with scales of its own in each layer: "
                  "under three names, in three dtypes, and one so small that K saturates"),
    "inputs": ("fp8-f32", "activations", 1e-4, "e4m3 inputs, two groups of 128 a row"),
    "inputs-ragged": ("fp8-ragged", "activations", 1e-4, "e4m3 inputs, short last groups"),
    "inputs-tp2": ("fp8-ragged", "activations", 1e-4,
                   "e4m3 inputs of two attention ranks: o_proj's are cut inside a group of 128"),
    "inputs-some": ("fp8-some", "activations", 1e-4,
                    "e4m3 inputs only where the matrix is e4m3: not of k, o and one down"),
    "inputs-moe": ("fp8-moe-ragged", "activations", 1e-4, "e4m3 inputs of experts"),
    "inputs-afmoe": ("fp8-afmoe", "activations", 1e-4,
                     "e4m3 inputs of the attention gate, of shared and routed experts"),
}
# Where ranks of an attention group cut the input of o_proj, inside a group.
O_CUTS = {"inputs-tp2": 66}
# Of kv-scales: tensor -> dtype, bits, shape.
SCALES = {
    "model.layers.0.self_attn.k_proj.k_scale": ("F32", np.float32(0.02).tobytes(), [1]),
    "model.layers.0.self_attn.v_scale": ("BF16", bytes([0x80, 0x3c]), []),  # 2^-6
    "model.layers.1.self_attn.attn.k_scale": ("F16", np.float16(0.004).tobytes(), [1]),
    "model.layers.1.self_attn.v_proj.v_scale": ("F32", np.float32(0.3).tobytes(), []),
}


class Rounding:
    """e4m3: three bits of fraction, exponents from -6 on, ties to even, nothing above 448."""

    def __init__(self, kind, o_cut=None):
        self.o_cut = o_cut
        self.kv, self.activations = kind == "kv", kind == "activations"
        self.nearest_tie = math.inf  # in steps

    def e4m3(self, x):
        exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
        step = 2.0 ** (exponent - 3)
        parts = np.abs(x) / step % 1
        inside = np.abs(x) < LARGEST
        if inside.any():
            self.nearest_tie = min(self.nearest_tie, np.abs(parts[inside] - 0.5).min())
        return np.clip(np.rint(x / step) * step, -LARGEST, LARGEST)

    def quantized(self, x, name):
        """Each row in groups of 128, each with the scale that makes its largest number 448."""
        out = np.empty_like(x)
        bounds = {*range(0, x.shape[-1], GROUP), x.shape[-1]}
        if self.o_cut and "o_proj" in name:
            bounds.add(self.o_cut)
        bounds = sorted(bounds)
        for begin, end in zip(bounds, bounds[1:]):
            part = x[..., begin:end]
            largest = np.maximum(np.abs(part).max(axis=-1, keepdims=True), 1e-10)
            scale = (largest.astype(np.float32) / np.float32(LARGEST)).astype(np.float64)
            out[..., begin:end] = self.e4m3(part / scale) * scale
        return out

    def kept(self, x, scale):
        return self.e4m3(x / scale) * scale


def with_scales(base, where):
    """The base's checkpoint with the tensors of SCALES behind its own."""
    where.mkdir(parents=True, exist_ok=True)
    shutil.copy(base / "config.json", where)
    data = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    body += bytes(-len(body) % 4)  # the format wants no holes; the base ends on a multiple of 4
    if len(body) != len(data) - 8 - size:
        raise RuntimeError(f"{base}: tensors end inside a word")
    for name, (dtype, raw, shape) in SCALES.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (where / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def compute(name, checkpoint, kind, ids):
    config = json.loads((checkpoint / "config.json").read_text())
    weights = reference.read_weights(checkpoint)
    weights.rounding = Rounding(kind, O_CUTS.get(name))
    return reference.forward(config, weights, ids), weights.rounding.nearest_tie


def make(name):
    base, kind, clear, what = CASES[name]
    where = ROUNDED / name
    where.mkdir(parents=True, exist_ok=True)
    if name == "kv-scales":
        with_scales(HERE / base, where)
    source = "." if name == "kv-scales" else f"../../{base}"
    config = json.loads((where / source / "config.json").read_text())
    for seed in range(20000):
        rng = np.random.RandomState(seed)
        ids = rng.randint(0, config["vocab_size"], N_PROMPT + N_GENERATED).tolist()
        logits, nearest_tie = compute(name, where / source, kind, ids[:-1])
        if nearest_tie >= clear:
            break
    else:
        raise RuntimeError(f"{name}: every prompt has a number near a tie")
    plain = reference.forward(config, reference.read_weights(where / source), ids[:-1])
    cost = ((logits - plain) ** 2).sum() / (plain ** 2).sum()
    np.save(where / "logits.npy", logits.astype("<f4"))
    golden = {"what": what, "checkpoint": source, "rounds": kind, "prompt": ids[:N_PROMPT],
              "generated": ids[N_PROMPT:], "nearest_tie": float(f"{nearest_tie:.2e}"),
              "nmse_of_rounding": float(f"{cost:.2e}")}
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    (where / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return f"nearest tie {nearest_tie:.1e}, NMSE of rounding {cost:.1e}"


def check(name):
    where = ROUNDED / name
    golden = json.loads((where / "golden.json").read_text())
    ids = golden["prompt"] + golden["generated"]
    got, _ = compute(name, where / golden["checkpoint"], golden["rounds"], ids[:-1])
    want = np.load(where / "logits.npy").astype(np.float64)
    nmse = ((got - want) ** 2).sum() / (want ** 2).sum()
    return f"NMSE {nmse:.1e}{'' if nmse <= 1e-12 else '  FAILED'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    args = parser.parse_args()
    lines = [f"{name}: {(check if args.check else make)(name)}" for name in args.case or CASES]
    print("\n".join(lines))
    return 1 if any("FAILED" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
