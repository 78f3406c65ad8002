#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU against the CPU: logits of checkpoints with the dimensions of published models, a few layers and
random weights, in bf16 and block FP8. One line of TAP for each sentence.

  models.py --build BUILD [--emu] [--folder DIR] [--only NAME,...] [--dtype bf16|fp8] [--repeat]

--emu takes the emulated GPU and dimensions that it can do. --repeat asks for the same logits twice and more, bit for bit,
also of a prompt that comes row by row. Needs Python alone; numpy makes it faster.
"""
import argparse
import array
import json
import math
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile

try:
    import numpy
except ImportError:
    numpy = None

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": False, "hidden_act": "silu",
        "attention_bias": False, "use_sliding_window": False, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
MOE = {**QWEN, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [],
       "decoder_sparse_step": 1}
AFMOE = {**QWEN, "architectures": ["AfmoeForCausalLM"], "model_type": "afmoe", "vocab_size": 200192, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "num_hidden_layers": 3, "num_dense_layers": 1, "num_shared_experts": 1, "score_func": "sigmoid",
         "route_norm": True, "route_scale": 2.826, "n_group": 1, "topk_group": 1, "mup_enabled": True, "sliding_window": 2048,
         "global_attn_every_n_layers": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


def sizes(hidden, heads, kv_heads, intermediate, width=0, experts=0, top_k=0):
    found = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate}
    return found | ({"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": top_k} if experts else {})


MODELS = {
    "qwen3-8b": QWEN | sizes(4096, 32, 8, 12288),
    "qwen3-32b": QWEN | sizes(5120, 64, 8, 25600),
    "qwen3-30b-a3b": MOE | sizes(2048, 32, 4, 6144, 768, 128, 8),
    "trinity-mini": AFMOE | sizes(2048, 32, 4, 6144, 1024, 128, 8),
}
# Root mean square of the difference over that of the logits. Products round x to bf16 or f16 here and not on the CPU; where
# two experts score nearly alike, that decides. Limits are for a GPU to confirm.
CASES = [("qwen3-8b", "bf16", "auto", 0.03), ("qwen3-8b", "bf16", "fp8", 0.04), ("qwen3-8b", "fp8", "auto", 0.03),
         ("qwen3-32b", "fp8", "auto", 0.03), ("qwen3-32b", "bf16", "auto", 0.03), ("qwen3-30b-a3b", "bf16", "auto", 0.08),
         ("qwen3-30b-a3b", "fp8", "auto", 0.08), ("trinity-mini", "bf16", "auto", 0.08), ("trinity-mini", "fp8", "auto", 0.08)]
N_IDS = 33
BLOCK = 128


# ---------------------------------------------------------------------------------- checkpoints

def shrunk(config):
    small = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "vocab_size": 640, "num_experts": 16,
             "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16}
    return {key: small.get(key, value) for key, value in config.items()}


def mlp(at, width, hidden):
    return {f"{at}gate_proj": (width, hidden), f"{at}up_proj": (width, hidden), f"{at}down_proj": (hidden, width)}


def layer_shapes(c, i):
    """{name without ".weight": shape} of a layer."""
    h, d, afmoe = c["hidden_size"], c["head_dim"], c["model_type"] == "afmoe"
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    found = {"input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h),
             "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q), "self_attn.q_norm": (d,), "self_attn.k_norm": (d,)}
    if afmoe:
        found |= {"self_attn.gate_proj": (q, h), "pre_mlp_layernorm": (h,), "post_mlp_layernorm": (h,)}
    if "num_experts" not in c or i < c.get("num_dense_layers", 0):
        return found | mlp("mlp.", c["intermediate_size"], h)
    width = c["moe_intermediate_size"]
    found["mlp.router.gate" if afmoe else "mlp.gate"] = (c["num_experts"], h)
    if afmoe:
        found["mlp.expert_bias"] = (c["num_experts"],)
        found |= mlp("mlp.shared_experts.", width * c["num_shared_experts"], h)
    for e in range(c["num_experts"]):
        found |= mlp(f"mlp.experts.{e}.", width, h)
    return found


def tensors(c, quantized):
    """(name, dtype, shape) of every tensor, in the order of the file."""
    v, h = c["vocab_size"], c["hidden_size"]
    yield from (("model.embed_tokens.weight", "BF16", (v, h)), ("lm_head.weight", "BF16", (v, h)), ("model.norm.weight", "BF16", (h,)))
    for i in range(c["num_hidden_layers"]):
        for name, shape in layer_shapes(c, i).items():
            name = f"model.layers.{i}.{name}"
            if name.endswith("expert_bias"):
                yield name, "F32", shape
            elif quantized and name.endswith("_proj"):
                yield name + ".weight", "F8_E4M3", shape
                yield name + ".weight_scale_inv", "BF16", tuple(-(-n // BLOCK) for n in shape)
            else:
                yield name + ".weight", "BF16", shape


class Numbers:
    """Random numbers of each kind, drawn once and taken from random places; their count is prime, so that no two rows are alike."""
    N = (1 << 24) - 3

    def __init__(self):
        self.random = random.Random(20)
        low = self.random.randbytes(self.N)
        # Finite, of both signs, from 2^-7 to 2^-5; norms and scales positive; e4m3 from 1/4 to 2.
        self.weights = self.pairs(low, bytes((b & 0x80) | 0x3c for b in range(256)))
        self.norms = self.pairs(low[:1 << 20], bytes([0x3f]) * 256)
        self.scales = self.pairs(low[:1 << 20], bytes([0x3c]) * 256)
        self.fp8 = low.translate(bytes((b & 0x87) | 0x28 + (b >> 1 & 0x10) for b in range(256)))

    def pairs(self, low, high):
        found = bytearray(2 * len(low))
        found[0::2], found[1::2] = low, self.random.randbytes(len(low)).translate(high)
        return memoryview(bytes(found))

    def write(self, file, name, dtype, n):
        if dtype == "F32":
            file.write(struct.pack(f"<{n}f", *(self.random.uniform(-0.3, 0.3) for _ in range(n))))
            return
        pool = memoryview(self.fp8) if dtype == "F8_E4M3" else self.norms if "norm" in name else \
            self.scales if name.endswith("scale_inv") else self.weights
        left = n * (1 if dtype == "F8_E4M3" else 2)
        while left:
            at = self.random.randrange(len(pool) // 4) * 2
            piece = pool[at:at + left]
            file.write(piece)
            left -= len(piece)


def write(folder, config, quantized, numbers):
    folder.mkdir(parents=True)
    if quantized:
        config = config | {"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                                   "weight_block_size": [BLOCK, BLOCK]}}
    (folder / "config.json").write_text(json.dumps(config))
    header, end, listed = {}, 0, list(tensors(config, quantized))
    for name, dtype, shape in listed:
        n_bytes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape in listed:
            numbers.write(file, name, dtype, math.prod(shape))
    return end


# --------------------------------------------------------------------------------------- running

class Runner:
    def __init__(self, options):
        self.build, self.emu = options.build, options.emu
        self.modules = self.build / ("tests/emu" if options.emu else "modules")

    def logits(self, model, device, kv, *flags):
        """Rows of float32, one for each position."""
        ids = " ".join(str(i * 977 % 600 + 1) for i in range(N_IDS))
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            done = subprocess.run([self.build / "examples/afd-generate", "--model", model, "--ids", ids, "--max-tokens", "1", "--device",
                                   device, "--kv-dtype", kv, "--logits", file.name, *flags], capture_output=True, text=True,
                                  env=dict(os.environ, AFD_MODULE_DIR=str(self.modules)))
            if done.returncode:
                raise RuntimeError(done.stderr.strip())
            data = pathlib.Path(file.name).read_bytes()
        return data[10 + int.from_bytes(data[8:10], "little"):]  # version 1 of the format


def difference(want, got):
    """Root mean square of got - want over that of want; infinity when a number is not finite."""
    if numpy:
        a, b = (numpy.frombuffer(x, "<f4").astype("f8") for x in (want, got))
        error, size = float(((a - b) ** 2).sum()), float((a * a).sum())
    else:
        a, b = array.array("f", want), array.array("f", got)
        error, size = math.fsum((x - y) ** 2 for x, y in zip(a, b)), math.fsum(x * x for x in a)
    return math.sqrt(error / size) if len(want) == len(got) and size > 0 and math.isfinite(error) else math.inf


class Tap:
    def __init__(self):
        self.n = self.n_failed = 0

    def say(self, good, sentence, reason=""):
        self.n += 1
        self.n_failed += not good
        print(f"{'ok' if good else 'not ok'} {self.n} - {sentence}" + (f" # {reason}" if reason else ""), flush=True)


def check(tap, run, folder, case, repeat):
    name, dtype, kv, limit = case
    label = f"{name.replace('-', '_')}_in_{dtype}" + ("" if kv == "auto" else f"_with_a_cache_in_{kv}")
    try:
        want, got = run.logits(folder, "cpu", kv), run.logits(folder, "cuda:0", kv)
        found = difference(want, got)
        tap.say(found <= limit, f"logits_of_{label}_are_near_those_of_the_cpu", f"{found:.4f} of their size, limit {limit}")
        if repeat:
            again = [run.logits(folder, "cuda:0", kv) for _ in range(2)]
            tap.say(all(other == got for other in again), f"logits_of_{label}_are_the_same_each_time")
            by_row = difference(want, run.logits(folder, "cuda:0", kv, "--prefill-chunk", "1"))
            tap.say(by_row <= limit, f"logits_of_{label}_row_by_row_are_near_those_of_the_cpu", f"{by_row:.4f}, limit {limit}")
    except RuntimeError as error:
        tap.say(False, f"logits_of_{label}_are_near_those_of_the_cpu", " ".join(str(error).split())[:300])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--dtype", choices=["bf16", "fp8"])
    parser.add_argument("--emu", action="store_true")
    parser.add_argument("--repeat", action="store_true")
    options = parser.parse_args()
    tap, run, numbers, last = Tap(), Runner(options), Numbers(), None
    cases = [case for case in CASES if (not options.only or case[0] in options.only.split(",")) and options.dtype in (None, case[1])]
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for case in cases:
            folder = pathlib.Path(place, f"{case[0]}-{case[1]}")
            if folder != last:
                if last:
                    shutil.rmtree(last)
                config = MODELS[case[0]]
                write(folder, shrunk(config) if options.emu else config, case[1] == "fp8", numbers)
                last = folder
            check(tap, run, folder, case, options.repeat)
    print(f"1..{tap.n}")
    return 1 if tap.n_failed or not tap.n else 0


if __name__ == "__main__":
    sys.exit(main())
