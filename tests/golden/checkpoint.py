# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoint of a case: config.json by hand, weights from numpy's RandomState.

RandomState's stream is the one that numpy promises never to change; its seed is the case's name and
its order that of shapes_of, so a checkpoint is the same bytes wherever it is made. Every weight is
random, norms, biases, routers and expert_bias too: a default of ones or zeros would hide one that
nobody applies. make.py calls it.
"""
import json
import pathlib
import sys
import zlib

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "models"))
import quantize_fp8  # noqa: E402

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LONG = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "mixed": "bfloat16"}


# ---------------------------------------------------------------------------------- config.json

def quantization_of(case, names):
    """The two dialects in use: that of DeepSeek and Qwen, and that of compressed-tensors."""
    if case.scale_name == "weight_scale_inv":
        return quantize_fp8.quantization_config(names)
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"],
             "weights": {**eight, "strategy": "block", "block_structure": [128, 128],
                         "dynamic": False},
             "input_activations": {**eight, "strategy": "group", "group_size": 128,
                                   "dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*router.*"]}


def config_of(case):
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **case.base,
              **case.config}
    theta = {} if case.theta is None else {"rope_theta": case.theta}
    if case.spelling == 4:
        config |= {"torch_dtype": LONG[case.dtype], "transformers_version": "4.51.0",
                   **theta, "rope_scaling": case.rope or None}
    else:
        config |= {"dtype": LONG[case.dtype], "transformers_version": transformers.__version__,
                   "rope_parameters": {"rope_type": "default", **case.rope, **theta}}
    return {key: value for key, value in config.items() if key not in case.without}


def n_experts(config):
    return config.get("num_experts", config.get("num_local_experts", 0))


def has_experts(config, layer):
    if config["model_type"] == "afmoe":
        return layer >= config["num_dense_layers"]
    return (n_experts(config) > 0 and layer not in config.get("mlp_only_layers", [])
            and (layer + 1) % config["decoder_sparse_step"] == 0)


# -------------------------------------------------------------------------------------- tensors

def mlp_shapes(at, width, hidden):
    return {at + "gate_proj.weight": (width, hidden), at + "up_proj.weight": (width, hidden),
            at + "down_proj.weight": (hidden, width)}


def ffn_shapes(config, layer, at):
    h = config["hidden_size"]
    if not has_experts(config, layer):
        return mlp_shapes(at, config["intermediate_size"], h)
    n, width = n_experts(config), config["moe_intermediate_size"]
    shapes = {}
    if config["model_type"] == "afmoe":
        shapes[at + "router.gate.weight"] = (n, h)
        shapes[at + "expert_bias"] = (n,)
        shapes |= mlp_shapes(at + "shared_experts.", config["num_shared_experts"] * width, h)
    else:
        shapes[at + "gate.weight"] = (n, h)
    for expert in range(n):
        shapes |= mlp_shapes(f"{at}experts.{expert}.", width, h)
    return shapes


def shapes_of(config):
    """{tensor name: shape}, experts apart, in the order of the forward pass."""
    h, heads = config["hidden_size"], config["num_attention_heads"]
    hd = config.get("head_dim", h // heads)
    q, kv = heads * hd, (config["num_key_value_heads"] or heads) * hd
    gated = config["model_type"] == "afmoe"
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (h,)
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.get("attention_bias"):
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        if gated:
            shapes[at + "self_attn.gate_proj.weight"] = (q, h)
        shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (hd,)
        shapes[at + "post_attention_layernorm.weight"] = (h,)
        if gated:
            shapes[at + "pre_mlp_layernorm.weight"] = (h,)
            shapes[at + "post_mlp_layernorm.weight"] = (h,)
        shapes |= ffn_shapes(config, layer, at + "mlp.")
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (config["vocab_size"], h)
    return shapes


def dtype_of(case, name):
    if name.endswith("expert_bias"):
        return DTYPES[case.bias_dtype]
    if case.dtype != "mixed":
        return DTYPES[case.dtype]
    if name == "lm_head.weight":
        return torch.float16
    return torch.float32 if "norm" in name or name.endswith("bias") else torch.bfloat16


def values_of(case, name, rng, shape):
    values = rng.standard_normal(shape)
    if "norm" in name:
        return 1 + 0.2 * values
    if name.endswith("expert_bias"):
        values *= case.bias_std
        values[list(case.tied_experts)] = 0.25
        return values
    values *= case.std
    if name.endswith("gate.weight"):  # scores from rows of zeros are equal to the last bit
        values[list(case.tied_experts)] = 0
    if case.scales and quantize_fp8.is_quantized(name):
        blocks = 2 ** rng.uniform(-1, 1, [-(-n // quantize_fp8.BLOCK) for n in shape])
        for axis, n in enumerate(shape):
            blocks = blocks.repeat(quantize_fp8.BLOCK, axis).take(range(n), axis)
        values *= blocks
    return values


def weights_of(case, config):
    """{tensor name: tensor} before FP8, experts apart."""
    rng = np.random.RandomState(zlib.crc32(case.name.encode()))
    weights = {}
    for name, shape in shapes_of(config).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"] and case.head != "own":
            continue
        values = values_of(case, name, rng, shape)
        weights[name] = torch.from_numpy(values).to(dtype_of(case, name))
    if case.head == "equal":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def fuse(weights, config):
    """Experts of a layer as two tensors, [expert][gate rows, then up rows][hidden] and down's."""
    fused = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in filter(lambda i: has_experts(config, i), range(config["num_hidden_layers"])):
        at = f"model.layers.{layer}.mlp.experts."

        def stack(part):
            return torch.stack([weights[f"{at}{expert}.{part}_proj.weight"]
                                for expert in range(n_experts(config))])

        fused[at + "gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
        fused[at + "down_proj"] = stack("down")
    return fused


def quantized(case, weights):
    tensors = {}
    for name, tensor in weights.items():
        if not quantize_fp8.is_quantized(name) or case.unquantized(name):
            tensors[name] = tensor
            continue
        scale = quantize_fp8.scale_name(name).replace("weight_scale_inv", case.scale_name)
        tensors[name], tensors[scale] = quantize_fp8.quantize(tensor, DTYPES[case.scales])
    return tensors


def dequantized(case, tensors):
    """What the FP8 tensors stand for, in float32; the others as they are."""
    plain = {}
    for name, tensor in tensors.items():
        scale = quantize_fp8.scale_name(name).replace("weight_scale_inv", case.scale_name)
        if tensor.dtype == torch.float8_e4m3fn:
            plain[name] = quantize_fp8.dequantize(tensor, tensors[scale])
        elif not name.endswith(("_scale", "_scale_inv")):
            plain[name] = tensor
    return plain


# ---------------------------------------------------------------------------------------- files

def write_files(where, config, tensors, shards=None):
    (where / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    meta = {"format": "pt"}
    if shards is None:
        save_file(tensors, where / "model.safetensors", metadata=meta)
        return
    files = {}
    for name, tensor in tensors.items():
        files.setdefault(shards(name), {})[name] = tensor
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for shard, part in sorted(files.items()):
        path = f"model-{shard:05}-of-{len(files):05}.safetensors"
        save_file(part, where / path, metadata=meta)
        index["weight_map"] |= {name: path for name in part}
    (where / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(case, where):
    """The case's checkpoint; returns its config and tensors."""
    config = config_of(case)
    tensors = weights_of(case, config)
    if case.fused:
        tensors = fuse(tensors, config)
    if case.scales:
        tensors = quantized(case, tensors)
        config["quantization_config"] = quantization_of(case, tensors)
    write_files(where, config, tensors, case.shards)
    return config, tensors


def write_plain(case, where, config, tensors):
    """The same model without FP8, for a reader that cannot be trusted with it."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    write_files(where, config, dequantized(case, tensors))
