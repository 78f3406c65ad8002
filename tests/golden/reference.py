#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A second opinion on the goldens: Qwen3, Qwen3-MoE and AFMoE in plain NumPy, from descriptions.

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
BLOCK = 128  # rows and columns of an FP8 weight that share a scale


# -------------------------------------------------------------------------------- the checkpoint

def e4m3_values():
    """What each of the 256 codes of e4m3 (FN: no infinity, one NaN per sign) stands for."""
    code = np.arange(256)
    sign, exponent, mantissa = 1 - 2.0 * (code >> 7), code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6,
                    (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(code & 127 == 127, np.nan, sign * size)


E4M3 = e4m3_values()


def decode_values(raw, dtype):
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(raw, "u1")]
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype])


def read_safetensors(path):
    """{name: (float64 array, dtype)}: header size, JSON header, raw little-endian tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = decode_values(body[begin:end], entry["dtype"])
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64), entry["dtype"]
    return tensors


def scaled(codes, scales):
    """Row n and column k of a weight belong to scale (n / 128, k / 128), also in a short block."""
    rows, columns = codes.shape[-2:]
    want = (*codes.shape[:-2], -(-rows // BLOCK), -(-columns // BLOCK))
    if scales.shape != want:
        raise ValueError(f"scales {scales.shape} for codes {codes.shape}")
    spread = scales.repeat(BLOCK, axis=-2).repeat(BLOCK, axis=-1)
    return codes * spread[..., :rows, :columns]


class Weights(dict):
    """{tensor name: values}; rounds what enters products and the cache when `rounding` is set."""

    def __init__(self):
        super().__init__()
        self.in_e4m3 = set()  # names whose file has codes
        self.rounding = None  # of rounded.py

    def entering(self, x, name):
        """What the product with a matrix gets for x."""
        quantizes = self.rounding and self.rounding.activations and name in self.in_e4m3
        return self.rounding.quantized(x, name) if quantizes else x

    def cached(self, kind, at, x):
        """What attention sees of k or v."""
        keeps = self.rounding and self.rounding.kv
        return self.rounding.kept(x, self.kv_scale(kind, at)) if keeps else x

    def kv_scale(self, kind, at):
        """By any of its names; 1 where the file brings none."""
        names = (f"{at}{kind}_proj.{kind}_scale", f"{at}{kind}_scale", f"{at}attn.{kind}_scale")
        return next((float(self[name].reshape(())) for name in names if name in self), 1.0)


def read_weights(where):
    index = where / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {name: t for f in files for name, t in read_safetensors(where / f).items()}
    weights = Weights()
    for name, (values, dtype) in tensors.items():
        if dtype == "F8_E4M3":
            scale = name + ("_scale_inv" if name + "_scale_inv" in tensors else "_scale")
            values = scaled(values, tensors[scale][0])
            weights.in_e4m3.add(name)
        weights[name] = values
    return weights


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


def head_dim_of(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_tables(config, n):
    """cos and sin, [n][head_dim / 2], of positions 0 .. n-1."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
    head_dim = head_dim_of(config)
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
    types = config.get("layer_types")
    if config["model_type"] == "afmoe":
        every = config.get("global_attn_every_n_layers", 4)
        sliding = types[layer] == "sliding_attention" if types else (layer + 1) % every != 0
        return config["sliding_window"] if sliding else None
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return None
    if config["model_type"] == "qwen3_moe":
        return config["sliding_window"]
    sliding = (types[layer] == "sliding_attention" if types
               else layer >= config.get("max_window_layers", 28))
    return config["sliding_window"] if sliding else None


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def attention(x, w, at, config, window, tables):
    """x [n][hidden] normed -> [n][hidden]; without tables positions are not felt."""
    n, heads, eps = len(x), config["num_attention_heads"], config["rms_norm_eps"]
    head_dim = head_dim_of(config)

    def linear(name, value):
        matrix = f"{at}{name}_proj.weight"
        out = w.entering(value, matrix) @ w[matrix].T
        return out + w[f"{at}{name}_proj.bias"] if config.get("attention_bias") else out

    q, k, v = (linear(p, x).reshape(n, -1, head_dim) for p in "qkv")
    q, k = rms_norm(q, w[at + "q_norm.weight"], eps), rms_norm(k, w[at + "k_norm.weight"], eps)
    if tables:
        q, k = rotate(q, *tables), rotate(k, *tables)
    k, v = w.cached("k", at, k), w.cached("v", at, v)
    queries_per_kv = heads // k.shape[1]
    k, v = np.repeat(k, queries_per_kv, axis=1), np.repeat(v, queries_per_kv, axis=1)

    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(head_dim)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    visible = j <= i
    if window is not None:
        visible &= j > i - window
    p = softmax(np.where(visible, scores, -np.inf))
    out = np.einsum("hij,jhd->ihd", p, v).reshape(n, -1)
    if config["model_type"] == "afmoe":
        gate = at + "gate_proj.weight"  # has no bias, whatever attention_bias says
        out = out * sigmoid(w.entering(x, gate) @ w[gate].T)
    return linear("o", out)


# ----------------------------------------------- the FFN: all that an FFN process computes

def silu_of(g):
    return g * sigmoid(g)


def mlp(x, w, at):
    gate, up, down = (f"{at}{part}_proj.weight" for part in ("gate", "up", "down"))
    a = silu_of(w.entering(x, gate) @ w[gate].T) * (w.entering(x, up) @ w[up].T)
    return w.entering(a, down) @ w[down].T


def expert(x, w, at, e):
    """Either three matrices of its own, or its part of two tensors that all experts share."""
    if at + "gate_up_proj" not in w:
        return mlp(x, w, f"{at}{e}.")
    gate_up = w.entering(x, at + "gate_up_proj") @ w[at + "gate_up_proj"][e].T
    half = gate_up.shape[-1] // 2
    a = silu_of(gate_up[:, :half]) * gate_up[:, half:]
    return w.entering(a, at + "down_proj") @ w[at + "down_proj"][e].T


def has_experts(config, layer):
    if config["model_type"] == "afmoe":
        return layer >= config["num_dense_layers"]
    return (config["model_type"] == "qwen3_moe"
            and layer not in (config.get("mlp_only_layers") or [])
            and (layer + 1) % config.get("decoder_sparse_step", 1) == 0)


def route(x, w, at, config):
    """Experts [n][k] of each row and their weights; of equal scores the lower id is chosen."""
    afmoe = config["model_type"] == "afmoe"
    sharing = not afmoe or config.get("score_func", "sigmoid") == "softmax"
    scores = x @ w[at + ("router.gate.weight" if afmoe else "gate.weight")].T
    scores = softmax(scores) if sharing else sigmoid(scores)
    biased = scores + w[at + "expert_bias"] if afmoe else scores
    chosen = np.argsort(-biased, axis=1, kind="stable")[:, :config["num_experts_per_tok"]]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if config.get("route_norm", True) and not sharing if afmoe else config.get("norm_topk_prob"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    return chosen, weights * (config.get("route_scale", 1) if afmoe else 1)


def ffn(x, w, at, config, layer):
    """x [n][hidden] normed -> [n][hidden]"""
    if not has_experts(config, layer):
        return mlp(x, w, at)
    out = mlp(x, w, at + "shared_experts.") if config["model_type"] == "afmoe" else np.zeros_like(x)
    chosen, weights = route(x, w, at, config)
    for e in np.unique(chosen):
        row, slot = np.nonzero(chosen == e)
        out[row] += weights[row, slot, None] * expert(x[row], w, at + "experts.", e)
    return out


# ------------------------------------------------------------------------------------ the layers

def layer_of(h, w, at, config, layer, tables):
    """One layer of the residual stream h [n][hidden]; AFMoE norms both branches once more."""
    eps, window = config["rms_norm_eps"], window_of(config, layer)
    afmoe = config["model_type"] == "afmoe"
    x = rms_norm(h, w[at + "input_layernorm.weight"], eps)
    branch = attention(x, w, at + "self_attn.", config, window,
                       None if afmoe and window is None else tables)
    if afmoe:
        branch = rms_norm(branch, w[at + "post_attention_layernorm.weight"], eps)
    h = h + branch
    before = "pre_mlp_layernorm" if afmoe else "post_attention_layernorm"
    branch = ffn(rms_norm(h, w[f"{at}{before}.weight"], eps), w, at + "mlp.", config, layer)
    if afmoe:
        branch = rms_norm(branch, w[at + "post_mlp_layernorm.weight"], eps)
    return h + branch


def forward(config, w, ids):
    """Logits [len(ids)][vocab]."""
    tables = rope_tables(config, len(ids))
    h = w["model.embed_tokens.weight"][ids]
    if config.get("mup_enabled"):
        h = h * math.sqrt(config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        h = layer_of(h, w, f"model.layers.{layer}.", config, layer, tables)
    head = w.get("lm_head.weight")  # a tied checkpoint that ships a head means it
    if head is None:
        if not config.get("tie_word_embeddings"):
            raise ValueError("untied config without lm_head.weight")
        head = w["model.embed_tokens.weight"]
    return rms_norm(h, w["model.norm.weight"], config["rms_norm_eps"]) @ head.T


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
