#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the small Qwen3 model of models/tiny-qwen3 on the King James Bible.

The repository needs one checkpoint whose output a person can judge at a glance: real words, real
tokenizer, the file layout of a published model, small enough to be committed. The text is that of
Debian's package bible-kjv-text (translated in 1611, out of copyright); the script downloads the
package and unpacks it without installing anything.

The shape is chosen to be awkward where real models are: head_dim is not hidden/heads, keys and
values have fewer heads than queries, the head is tied to the embedding, and no file of its own
holds an lm_head. Weights are rounded to bf16 before the last loss is measured, so the loss printed
is that of the committed file.

Needs apt-get (after apt-get update), dpkg-deb, libreadline8, and:
pip install torch transformers tokenizers safetensors numpy
"""
import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import tempfile
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

END = "<|endoftext|>"
SHAPE = dict(
    vocab_size=2048, hidden_size=160, intermediate_size=448, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=10000.0, bos_token_id=0, eos_token_id=0,
)


def fetch_text(cache):
    """The Bible as printed by Debian's own reader, one verse a line: "Ge1:1 In the beginning"."""
    text = cache / "kjv.txt"
    if not text.exists():
        # The download runs in a world-writable place because apt drops to the user _apt.
        subprocess.run(["apt-get", "download", "bible-kjv", "bible-kjv-text"], cwd=cache,
                       check=True)
        for deb in cache.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb, cache / "root"], check=True)
        out = subprocess.run(
            [cache / "root/usr/bin/bible", "-p", cache / "root/usr/lib", "-f", "gen1:1-rev22:21"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout
        text.write_bytes(out)
    return text.read_text("ascii")


def chapters(text):
    """Verses without their references, joined to one line of text per chapter."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(\w+?\d+):\d+ (.*)", line)
        found.setdefault(match[1], []).append(match[2].strip())
    return [" ".join(verses) for verses in found.values()]


def train_tokenizer(texts):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


def save_tokenizer(tok, where):
    """By hand, because transformers 5 would write a class name that transformers 4 cannot load."""
    tok.save(str(where / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
              "clean_up_tokenization_spaces": False,
              "model_max_length": SHAPE["max_position_embeddings"]}
    (where / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def stream(tok, texts):
    ids = []
    for text in texts:
        ids += [tok.token_to_id(END)] + tok.encode(text).ids
    return torch.tensor(ids)


@torch.no_grad()
def held_out_loss(model, ids, context):
    """Mean loss in nats per token over consecutive windows of text that was not trained on."""
    model.eval()
    rows = ids[: len(ids) // context * context].view(-1, context)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(16)]
    model.train()
    return sum(losses) / len(rows)


def learning_rate(step, args):
    warm = min(1.0, (step + 1) / args.warmup)
    done = step / args.steps
    return args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model, ids, held_out, args):
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                             {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True)
    start = time.time()
    for step in range(args.steps):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args)
        at = torch.randint(len(ids) - args.context, (args.batch,))
        rows = torch.stack([ids[a:a + args.context] for a in at.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=rows, labels=rows).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 100 == 99:
            extra = ""
            if step % 500 == 499:
                extra = f"  held out {held_out_loss(model, held_out, args.context):.4f}"
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}{extra}"
                  f"  {time.time() - start:.0f} s", flush=True)


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=pathlib.Path, default=here / "tiny-qwen3")
    parser.add_argument("--cache", type=pathlib.Path, help="keep the downloaded text here")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps until the peak")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--autocast", action="store_true", help="bf16 products (faster where the "
                        "CPU has them)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o777)
        cache = args.cache or pathlib.Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        texts = chapters(fetch_text(cache))
    kept = [t for i, t in enumerate(texts) if i % 50 != 49]
    tok = train_tokenizer(kept)
    ids, held_out = stream(tok, kept), stream(tok, texts[49::50])
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    print(f"{len(ids)} tokens, {len(held_out)} held out, {model.num_parameters()} weights")
    train(model, ids, held_out, args)

    model.bfloat16().save_pretrained(args.out)
    save_tokenizer(tok, args.out)
    model = model.float()
    text_bytes = sum(len(t) for t in texts[49::50])
    nats = held_out_loss(model, held_out, args.context)
    print(json.dumps({"held_out_loss": round(nats, 4), "held_out_bits_per_byte":
                      round(nats * len(held_out) / text_bytes / math.log(2), 4)}))
    prompt = tok.encode("And it came to pass in those days, that")
    out = model.eval().generate(torch.tensor([prompt.ids]), max_new_tokens=60, do_sample=False)
    print(tok.decode(out[0].tolist()))


if __name__ == "__main__":
    main()
