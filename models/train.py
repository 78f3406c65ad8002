#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the small models of models/tiny-* on the King James Bible.

The repository needs, of each family, one checkpoint whose output a person can judge at a glance:
real words, real tokenizer, the file layout of a published model, small enough to be committed. The
text is that of Debian's package bible-kjv-text (translated in 1611, out of copyright); the script
downloads the package and unpacks it without installing anything. The dense model's tokenizer serves
all.

The shapes are chosen to be awkward where real models are: head_dim is not hidden/heads, keys and
values have fewer heads than queries, a tied head has no lm_head of its own in the file, layer_types
of AFMoE follow no period. Weights are rounded to bf16 before the last loss is measured, so the loss
printed is that of the committed file.

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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.afmoe.modeling_afmoe import AfmoeSparseMoeBlock

HERE = pathlib.Path(__file__).resolve().parent
END = "<|endoftext|>"
COMMON = dict(
    vocab_size=2048, max_position_embeddings=256, num_attention_heads=4, num_key_value_heads=2,
    rope_theta=10000.0, bos_token_id=0, eos_token_id=0,
)
FAMILIES = {  # model_type and what differs from COMMON; the folder is tiny-<family>
    "qwen3": ("qwen3", dict(
        hidden_size=160, intermediate_size=448, num_hidden_layers=4, head_dim=64,
        tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "qwen3-moe": ("qwen3_moe", dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=48,
        tie_word_embeddings=True, rms_norm_eps=1e-6, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=96, norm_topk_prob=True, router_aux_loss_coef=0.01)),
    "afmoe": ("afmoe", dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, head_dim=40,
        tie_word_embeddings=False, rms_norm_eps=1e-5, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=40, num_shared_experts=1, num_dense_layers=1, route_scale=2.826,
        route_norm=True, score_func="sigmoid", n_group=1, topk_group=1, mup_enabled=True,
        sliding_window=64, global_attn_every_n_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"]
        + ["sliding_attention", "full_attention"])),
}


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
        vocab_size=COMMON["vocab_size"], special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok


def save_tokenizer(tok, where):
    """By hand, because transformers 5 would write a class name that transformers 4 cannot load."""
    tok.save(str(where / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
              "clean_up_tokenization_spaces": False,
              "model_max_length": COMMON["max_position_embeddings"]}
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


def learning_rate(step, done, args):
    warm = min(1.0, (step + 1) / args.warmup)
    return args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class ExpertBalance:
    """Without a loss for it, AFMoE keeps its experts equally busy by moving expert_bias.

    The class starts with a router of zeros, where every choice is a tie: it is made random first.
    """

    def __init__(self, model, rate=0.002):
        self.rate = rate
        self.blocks = [m for m in model.modules() if isinstance(m, AfmoeSparseMoeBlock)]
        self.rows = {}
        for block in self.blocks:
            torch.nn.init.normal_(block.router.gate.weight, std=0.02)
            block.router.register_forward_hook(
                lambda _, inputs, outputs, block=block: self.count(block, outputs[2]))

    def count(self, block, selected):
        self.rows[block] = torch.bincount(selected.flatten(), minlength=len(block.expert_bias))

    @torch.no_grad()
    def step(self):
        for block in self.blocks:
            rows = self.rows[block].float()
            block.expert_bias += self.rate * torch.sign(rows.mean() - rows)
            block.expert_bias -= block.expert_bias.mean()


def to_bfloat16(model):
    """As published: everything in bf16 but expert_bias, which decides near ties."""
    kept = {name: p.data.clone() for name, p in model.named_parameters() if "expert_bias" in name}
    model.bfloat16()
    for name, values in kept.items():
        model.get_parameter(name).data = values
    return model


def train(model, ids, held_out, args):
    balance = ExpertBalance(model)
    even = {"output_router_logits": True} if model.config.model_type == "qwen3_moe" else {}
    learnt = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in learnt if p.dim() > 1]
    plain = [p for p in learnt if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                             {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True)
    start = time.time()
    for step in range(args.steps):
        done = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if done >= 1:
            print(f"stopped by the clock after {step} steps", flush=True)
            break
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, done, args)
        at = torch.randint(len(ids) - args.context, (args.batch,))
        rows = torch.stack([ids[a:a + args.context] for a in at.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=rows, labels=rows, **even).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        balance.step()
        if step % 100 == 99:
            extra = ""
            if step % 500 == 499:
                extra = f"  held out {held_out_loss(model, held_out, args.context):.4f}"
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}{extra}"
                  f"  {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--out", type=pathlib.Path, help="default: tiny-<family> beside this")
    parser.add_argument("--cache", type=pathlib.Path, help="keep the downloaded text here")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by the clock instead, "
                        "the learning rate with it")
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
    out = args.out or HERE / f"tiny-{args.family}"

    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o777)
        cache = args.cache or pathlib.Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        texts = chapters(fetch_text(cache))
    kept = [t for i, t in enumerate(texts) if i % 50 != 49]
    tok = (train_tokenizer(kept) if args.family == "qwen3"
           else Tokenizer.from_file(str(HERE / "tiny-qwen3" / "tokenizer.json")))
    ids, held_out = stream(tok, kept), stream(tok, texts[49::50])
    model_type, shape = FAMILIES[args.family]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **COMMON, **shape), dtype=torch.float32)
    print(f"{len(ids)} tokens, {len(held_out)} held out, {model.num_parameters()} weights")
    train(model, ids, held_out, args)

    to_bfloat16(model).save_pretrained(out)
    save_tokenizer(tok, out)
    model = model.float()
    text_bytes = sum(len(t) for t in texts[49::50])
    nats = held_out_loss(model, held_out, args.context)
    print(json.dumps({"held_out_loss": round(nats, 4), "held_out_bits_per_byte":
                      round(nats * len(held_out) / text_bytes / math.log(2), 4)}))
    prompt = tok.encode("And it came to pass in those days, that")
    said = model.eval().generate(torch.tensor([prompt.ids]), max_new_tokens=60, do_sample=False)
    print(tok.decode(said[0].tolist()))


if __name__ == "__main__":
    main()
