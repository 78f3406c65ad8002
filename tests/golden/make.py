#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the golden checkpoints and record what transformers computes from them.

Weights come from numpy's RandomState, whose stream numpy promises never to change, and config.json
is written by hand in the spelling that the case is about: transformers then loads the directory
like anybody else's, so a recorded logit also proves that transformers reads that spelling. Logits
are those of eager attention in float32, whatever the dtype of the weights. Every weight, norms and
biases too, is random: a default norm of ones would hide a norm that nobody applies.

  make.py                writes every case beside this script
  make.py CASE ...       writes these
  make.py --check        makes all again elsewhere and compares with what is committed

Needs: pip install -r requirements.txt
"""
import argparse
import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

import check
from cases import BASE, CASES

HERE = pathlib.Path(__file__).resolve().parent
TRAINED = HERE.parent.parent / "models" / "tiny-qwen3"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LONG = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "mixed": "bfloat16"}
SAFE_MARGIN = 0.05  # logits; far above float32 noise, so greedy ids are the same everywhere
TRAINED_PROMPT = "And it shall come to pass in that day, that"


# ------------------------------------------------------------------------------ the checkpoint

def config_of(case):
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **BASE, **case.config}
    theta = {} if case.theta is None else {"rope_theta": case.theta}
    if case.spelling == 4:
        config |= {"torch_dtype": LONG[case.dtype], "transformers_version": "4.51.0",
                   **theta, "rope_scaling": case.rope or None}
    else:
        config |= {"dtype": LONG[case.dtype], "transformers_version": transformers.__version__,
                   "rope_parameters": {"rope_type": "default", **case.rope, **theta}}
    return config


def shapes_of(config):
    """{tensor name: shape} of a dense Qwen3 checkpoint, in the order of the forward pass."""
    h, i, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q = config["num_attention_heads"] * hd
    kv = (config["num_key_value_heads"] or config["num_attention_heads"]) * hd
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (h,)
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, columns)
            if config["attention_bias"]:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (hd,)
        shapes[at + "post_attention_layernorm.weight"] = (h,)
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (i, h)
        shapes[at + "mlp.down_proj.weight"] = (h, i)
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (config["vocab_size"], h)
    return shapes


def dtype_of(case, name):
    if case.dtype != "mixed":
        return DTYPES[case.dtype]
    if name == "lm_head.weight":
        return torch.float16
    return torch.float32 if "norm" in name or name.endswith("bias") else torch.bfloat16


def weights_of(case, config):
    rng = np.random.RandomState(zlib.crc32(case.name.encode()))
    weights = {}
    for name, shape in shapes_of(config).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"] and case.head != "own":
            continue
        values = rng.standard_normal(shape)
        values = 1 + 0.2 * values if "norm" in name else case.std * values
        weights[name] = torch.from_numpy(values).to(dtype_of(case, name))
    if case.head == "equal":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def write_checkpoint(case, where):
    config = config_of(case)
    weights = weights_of(case, config)
    (where / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    meta = {"format": "pt"}
    if case.shards is None:
        save_file(weights, where / "model.safetensors", metadata=meta)
        return
    files = {}
    for name, tensor in weights.items():
        files.setdefault(case.shards(name), {})[name] = tensor
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for shard, tensors in sorted(files.items()):
        path = f"model-{shard:05}-of-{len(files):05}.safetensors"
        save_file(tensors, where / path, metadata=meta)
        index["weight_map"] |= {name: path for name in tensors}
    (where / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------- what transformers computes

def load(checkpoint):
    """The model as transformers reads it, refusing a checkpoint that it reads only in part."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise RuntimeError(f"{checkpoint}: {wrong}")
    return model.eval()


@torch.no_grad()
def decode(model, prompt, n_generated):
    """Greedy ids, and float32 logits of every position but that of the last id generated."""
    ids = list(prompt)
    for _ in range(n_generated):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt):], logits.numpy()


def margins_of(logits, n_generated):
    """How far the greedy id stood above the second: token equality is safe where this is large."""
    top = np.sort(logits[-n_generated:], axis=1)
    return (top[:, -1] - top[:, -2]).tolist()


def decode_with_margin(model, case, vocab):
    """The first random prompt whose greedy continuation does not hang on a near tie."""
    for seed in range(100):
        prompt = np.random.RandomState(seed).randint(0, vocab, case.n_prompt).tolist()
        generated, logits = decode(model, prompt, case.n_generated)
        if min(margins_of(logits, case.n_generated)) >= SAFE_MARGIN:
            return prompt, generated, logits
    raise RuntimeError(f"{case.name}: every prompt has a near tie")


def record(where, what, checkpoint, prompt, generated, logits, **more):
    np.save(where / "logits.npy", logits.astype("<f4"))
    margins = margins_of(logits, len(generated))
    golden = {
        "what": what, "checkpoint": checkpoint, **more, "prompt": prompt, "generated": generated,
        "positions": len(logits), "vocab_size": logits.shape[1],
        "margins": [round(m, 4) for m in margins], "smallest_margin": round(min(margins), 4),
        "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
    }
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    (where / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make(case, where):
    where.mkdir(parents=True, exist_ok=True)
    write_checkpoint(case, where)
    model = load(where)
    record(where, case.what, ".", *decode_with_margin(model, case, model.config.vocab_size))


def make_trained(where):
    """The committed real model: its checkpoint stays where it is, only the outputs are here."""
    where.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TRAINED / "tokenizer.json"))
    prompt = tokenizer.encode(TRAINED_PROMPT).ids
    generated, logits = decode(load(TRAINED), prompt, 32)
    record(where, "the trained model: bfloat16 weights, float32 math", "../../../models/tiny-qwen3",
           prompt, generated, logits, text=TRAINED_PROMPT + tokenizer.decode(generated))


# ---------------------------------------------------------------------------------- the command

def differences(fresh, committed):
    """What a case made again has that differs from the committed one; margins are only advice."""
    names = sorted(p.name for p in committed.iterdir())
    if names != sorted(p.name for p in fresh.iterdir()):
        yield f"files {names} committed, {sorted(p.name for p in fresh.iterdir())} made"
        return
    for name in names:
        if name == "logits.npy":
            passed, line = check.compare(committed, fresh / name, limit=1e-10)
            if not passed:
                yield line
        elif name == "golden.json":
            old, new = (json.loads((d / name).read_text()) for d in (committed, fresh))
            yield from (f"{key}: {old[key]} committed, {new[key]} made"
                        for key in ("prompt", "generated") if old[key] != new[key])
        elif (committed / name).read_bytes() != (fresh / name).read_bytes():
            yield f"{name} differs"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    args = parser.parse_args()
    makers = {case.name: lambda where, case=case: make(case, where) for case in CASES}
    if TRAINED.exists():
        makers["tiny-qwen3"] = make_trained
    unknown = set(args.case) - set(makers)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # the same order of additions on every machine
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.case or makers:
            where = (pathlib.Path(scratch) if args.check else HERE) / name
            makers[name](where)
            wrong = list(differences(where, HERE / name)) if args.check else []
            failed += bool(wrong)
            print(f"{name}: {'; '.join(wrong) or 'ok'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
