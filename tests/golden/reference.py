#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A second opinion on the goldens: Qwen3 in plain NumPy, written from its description.

It shares no code with transformers or with libafd. It reads the safetensors files itself, computes
in float64, recomputes the whole sequence instead of keeping a cache, and must agree with what
transformers recorded. Read it next to docs/models.md to see what the C code has to compute.

  reference.py CASE_DIR ...   compares each case; exit status 1 if one disagrees
  reference.py                compares every case beside this script

Needs: pip install numpy
"""
import argparse
import json
import math
import pathlib
import sys

import numpy as np

LIMIT = 1e-10  # NMSE; transformers' float32 is what is inexact here


# -------------------------------------------------------------------------------- the checkpoint

def read_safetensors(path):
    """{name: float64 array} of one file: header size, JSON header, raw little-endian tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(body[begin:end], {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[
            entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = raw.reshape(entry["shape"]).astype(np.float64)
    return tensors


def read_weights(where):
    index = where / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(where / "model.safetensors")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: t for f in files for name, t in read_safetensors(where / f).items()}


# ------------------------------------------------------------------------------------------ rope

def yarn(inv_freq, rope, max_positions, theta, head_dim):
    """Slow rotations are stretched by the factor, fast ones kept, with a ramp between the two."""
    factor = rope["factor"]
    original = rope.get("original_max_position_embeddings", max_positions)

    def dim_of(rotations):
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(rope.get("beta_fast", 32)), dim_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)

    def magnitude(scale):
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    elif attention_factor is None:
        attention_factor = magnitude(1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), attention_factor


def rope_tables(config, n):
    """cos and sin, [n][head_dim / 2], of positions 0 .. n-1."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
    head_dim = config["head_dim"]
    inv_freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scale = 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn":
        inv_freq, scale = yarn(inv_freq, rope, config["max_position_embeddings"], theta, head_dim)
    elif kind != "default":
        raise ValueError(f"rope_type {kind}")
    angles = np.arange(n)[:, None] * inv_freq
    return np.cos(angles) * scale, np.sin(angles) * scale


def rotate(x, cos, sin):
    """x [n][heads][head_dim]: element d turns with element d + head_dim / 2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# ------------------------------------------------------------------------------------- the model

def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def window_of(config, layer):
    """Keys that a query of this layer sees, itself included; None for all of them."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return None
    types = config.get("layer_types")
    sliding = (types[layer] == "sliding_attention" if types
               else layer >= config.get("max_window_layers", 28))
    return config["sliding_window"] if sliding else None


def attention(x, w, at, config, layer, tables):
    """x [n][hidden] normed -> [n][hidden]"""
    n, heads, eps = len(x), config["num_attention_heads"], config["rms_norm_eps"]

    def linear(name, value):
        out = value @ w[f"{at}{name}_proj.weight"].T
        return out + w[f"{at}{name}_proj.bias"] if config.get("attention_bias") else out

    q, k, v = (linear(p, x).reshape(n, -1, config["head_dim"]) for p in "qkv")
    q = rotate(rms_norm(q, w[at + "q_norm.weight"], eps), *tables)
    k = rotate(rms_norm(k, w[at + "k_norm.weight"], eps), *tables)
    queries_per_kv = heads // k.shape[1]
    k, v = np.repeat(k, queries_per_kv, axis=1), np.repeat(v, queries_per_kv, axis=1)

    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(config["head_dim"])
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    visible = j <= i
    window = window_of(config, layer)
    if window is not None:
        visible &= j > i - window
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return linear("o", np.einsum("hij,jhd->ihd", p, v).reshape(n, -1))


def ffn(x, w, at):
    """x [n][hidden] normed -> [n][hidden]; all that an FFN process computes."""
    gate, up = x @ w[at + "gate_proj.weight"].T, x @ w[at + "up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w[at + "down_proj.weight"].T


def forward(config, w, ids):
    """Logits [len(ids)][vocab]."""
    eps = config["rms_norm_eps"]
    tables = rope_tables(config, len(ids))
    h = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = rms_norm(h, w[at + "input_layernorm.weight"], eps)
        h = h + attention(x, w, at + "self_attn.", config, layer, tables)
        x = rms_norm(h, w[at + "post_attention_layernorm.weight"], eps)
        h = h + ffn(x, w, at + "mlp.")
    head = w.get("lm_head.weight")  # a tied checkpoint that ships a head means it
    if head is None:
        if not config.get("tie_word_embeddings"):
            raise ValueError("untied config without lm_head.weight")
        head = w["model.embed_tokens.weight"]
    return rms_norm(h, w["model.norm.weight"], eps) @ head.T


# ----------------------------------------------------------------------------------- the command

def compare(case_dir):
    golden = json.loads((case_dir / "golden.json").read_text())
    checkpoint = case_dir / golden["checkpoint"]
    config = json.loads((checkpoint / "config.json").read_text())
    ids = golden["prompt"] + golden["generated"]
    got = forward(config, read_weights(checkpoint), ids[:-1])
    want = np.load(case_dir / "logits.npy").astype(np.float64)
    if got.shape != want.shape:
        return False, f"shape {got.shape}, recorded {want.shape}"
    nmse = ((got - want) ** 2).sum() / (want ** 2).sum()
    greedy = got[len(golden["prompt"]) - 1:].argmax(axis=1).tolist() == golden["generated"]
    return bool(nmse <= LIMIT and greedy), f"NMSE {nmse:.1e}, ids {'equal' if greedy else 'differ'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("case_dir", nargs="*", type=pathlib.Path)
    args = parser.parse_args()
    here = pathlib.Path(__file__).resolve().parent
    cases = args.case_dir or sorted(path.parent for path in here.glob("*/golden.json"))
    failed = 0
    for case_dir in cases:
        passed, line = compare(case_dir)
        failed += not passed
        print(f"{case_dir.name}: {line}{'' if passed else '  FAILED'}")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
