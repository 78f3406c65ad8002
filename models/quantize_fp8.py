#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quantise a checkpoint to block FP8 in the layout in which Qwen3-*-FP8 is published.

Each matrix of a layer becomes e4m3 with one scale per block of 128 x 128, counted from the top
left, so the last block of a row or column may be shorter; the scale is what a code is multiplied
by, whatever its name (weight_scale_inv) says. Embedding, head, norms, biases and routers stay as they
are. Files keep their names and their division into shards.

  quantize_fp8.py IN_DIR OUT_DIR [--scale f32|bf16|f16]

Needs: pip install torch safetensors
"""
import argparse
import json
import pathlib
import re
import shutil
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 128
LARGEST = 448.0  # of e4m3
SCALES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
INDEX = "model.safetensors.index.json"
# Also experts fused to three dimensions, whose names have no ".weight".
MATRIX = re.compile(r"model\.layers\.\d+\..*(_proj\.weight|experts\.(gate_up|down)_proj)")
KEPT = re.compile(r"(model\.layers\.\d+\.(?:mlp\.(?:router\.)?gate|\w*layernorm))\.weight")


def is_quantized(name):
    return MATRIX.fullmatch(name) is not None


def scale_name(name):
    return name + "_scale_inv"


def quantize(weight, scale_dtype):
    """weight [...][rows][columns] -> the same in e4m3, and scales, one per block.

    Scales are [...][ceil(rows / 128)][ceil(columns / 128)]. Codes are those of the scale as stored, not of the exact one.
    """
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(-3, -1))
    if not largest.isfinite().all():
        raise ValueError("a weight is not finite")
    # A subnormal f16 scale would be too coarse: the codes' own exponents are better then.
    scales = (largest / LARGEST).clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype)
    scales[largest == 0] = 1
    codes = blocks / scales.float()[..., :, None, :, None]
    codes = codes.flatten(-2).flatten(-3, -2)[..., :rows, :columns].clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn).contiguous(), scales.contiguous()


def dequantize(codes, scales):
    """The float32 weights that a quantised tensor stands for."""
    rows, columns = codes.shape[-2:]
    spread = scales.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return codes.float() * spread[..., :rows, :columns]


def quantization_config(names):
    """As published: a model with routers lists what is not quantised, a dense one does not."""
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
              "weight_block_size": [BLOCK, BLOCK]}
    kept = [match[1] for match in map(KEPT.fullmatch, names) if match]
    if any(name.endswith("gate") for name in kept):
        config["modules_to_not_convert"] = ["lm_head", *sorted(kept)]
    return config


def quantize_file(source, target, scale_dtype):
    """{tensor name: bytes} of the file written."""
    tensors = {}
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():
            tensor = file.get_tensor(name)
            if not is_quantized(name):
                tensors[name] = tensor
                continue
            if tensor.dtype == torch.float8_e4m3fn:
                raise ValueError(f"{source}: {name} is quantised already")
            try:
                tensors[name], tensors[scale_name(name)] = quantize(tensor, scale_dtype)
            except ValueError as error:
                raise ValueError(f"{source}: {name}: {error}") from error
    save_file(tensors, target, metadata=metadata or {"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def convert(source, target, scale_dtype):
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError(f"{source}/config.json: has a quantization_config already")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source}: no safetensors file")
    target.mkdir(parents=True)
    written = {file.name: quantize_file(file, target / file.name, scale_dtype) for file in files}
    names = {name: file for file, tensors in written.items() for name in tensors}
    if not any(map(is_quantized, names)):
        raise ValueError(f"{source}: no tensor is a matrix of a layer")
    if (source / INDEX).exists():
        total = sum(sum(tensors.values()) for tensors in written.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config["quantization_config"] = quantization_config(names)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in source.iterdir():
        if file.is_file() and not (target / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=pathlib.Path, metavar="IN_DIR")
    parser.add_argument("target", type=pathlib.Path, metavar="OUT_DIR", help="must not exist")
    parser.add_argument("--scale", choices=SCALES, default="bf16",
                        help="dtype of the scales (default %(default)s, as Qwen publishes them)")
    args = parser.parse_args()
    try:
        convert(args.source, args.target, SCALES[args.scale])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
