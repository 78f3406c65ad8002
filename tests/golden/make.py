#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the golden checkpoints and record what transformers computes from them.

config.json is written by hand in the spelling that the case is about: transformers then loads the
directory like anybody else's, so a recorded logit also proves that transformers reads that
spelling. Two things cannot be asked of it: FP8 whose sizes are no multiples of 128, which is
multiplied out before it sees the weights, and route_norm and score_func of AFMoE, which its class
does not know and patch() adds. Logits are those of eager attention and eager experts in float32,
whatever the dtype of the weights.

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
import types

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode
from transformers.models.afmoe.modeling_afmoe import AfmoeTokenChoiceRouter

import cases
import cases_afmoe
import cases_fp8
import cases_moe
import check
import checkpoint

HERE = pathlib.Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "models"
CASES = cases.CASES + cases_moe.CASES + cases_afmoe.CASES + cases_fp8.CASES
SAFE_MARGIN = 0.05  # logits; far above float32 noise, so greedy ids are the same everywhere
SAFE_GAP = 5e-4  # scores of a router, likewise: the same experts everywhere
TRAINED = {  # folder under models/ -> prompt
    "tiny-qwen3": "And it shall come to pass in that day, that",
    "tiny-qwen3-moe": "And when he had opened",
    # Longer than its window with what is generated.
    "tiny-afmoe": "And he shall sprinkle of the blood of the sin offering upon the side of the altar; and "
                  "the rest of the blood shall be wrung out at the bottom of the altar: it is a sin "
                  "offering.",
}


# -------------------------------------------------------------------------------------- routing

class Routing(TorchFunctionMode):
    """Makes torch.topk, which leaves open what a tie gives, choose the lower index.

    Keeps how near a choice came to another. A tie is exact in every implementation, because the
    scores come from rows of zeros, so it is counted and not called near.
    """

    def __init__(self):
        super().__init__()
        self.smallest_gap, self.n_ties = float("inf"), 0

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        call = self.topk if function in (torch.topk, torch.Tensor.topk) else function
        return call(*args, **(kwargs or {}))

    def topk(self, scores, k, dim=-1):
        values, order = torch.sort(scores, dim=dim, descending=True, stable=True)
        if k < scores.shape[-1]:
            last, following = values[:, k - 1], values[:, k]
            apart = (values - last[:, None]).abs()
            apart[apart == 0] = float("inf")
            gaps = torch.where(last == following, apart.amin(dim=1), last - following)
            self.smallest_gap = min(self.smallest_gap, gaps.min().item())
            self.n_ties += int((last == following).sum())
        return values[:, :k], order[:, :k]

    def record(self):
        """For golden.json; nothing where there was nothing to choose."""
        if self.smallest_gap == float("inf"):
            return {}
        return {"smallest_router_gap": round(self.smallest_gap, 6), "router_ties": self.n_ties}


def published_router(self, hidden_states, expert_bias):
    """AFMoE's router with the two options of the code published beside the checkpoints."""
    logits = self.gate(hidden_states.view(-1, hidden_states.shape[-1])).float()
    sigmoid = self.config.score_func == "sigmoid"
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
    _, selected = torch.topk(scores + expert_bias, self.top_k, dim=1)
    weights = scores.gather(1, selected)
    if sigmoid and self.config.route_norm:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * self.route_scale, selected


def patch(model):
    """Adds what transformers does not know of this config, and says so for golden.json."""
    config = model.config
    if (config.model_type != "afmoe" or getattr(config, "route_norm", True)
            and getattr(config, "score_func", "sigmoid") == "sigmoid"):
        return {}
    for module in model.modules():
        if isinstance(module, AfmoeTokenChoiceRouter):
            module.forward = types.MethodType(published_router, module)
    return {"patched": "route_norm and score_func, which transformers' router does not know"}


# ------------------------------------------------------------------- what transformers computes

def load(where):
    """The model as transformers reads it, refusing a checkpoint that it reads only in part."""
    config = json.loads((where / "config.json").read_text())
    experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in config else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
        **experts)
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise RuntimeError(f"{where}: {wrong}")
    return model.eval()


@torch.no_grad()
def forward(model, ids):
    """Float32 logits of every position."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def decode(model, prompt, n_generated):
    """Greedy ids, and float32 logits of every position but that of the last id generated."""
    ids = list(prompt)
    for _ in range(n_generated):
        logits = forward(model, ids)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt):], logits.numpy()


def margins_of(logits, n_generated):
    """How far the greedy id stood above the second: token equality is safe where this is large."""
    top = np.sort(logits[-n_generated:], axis=1)
    return (top[:, -1] - top[:, -2]).tolist()


def decode_clearly(model, case):
    """The first random prompt of which no choice, of an id or of an expert, hangs on a near tie."""
    for seed in range(2000):
        rng = np.random.RandomState(seed)
        prompt = rng.randint(0, model.config.vocab_size, case.n_prompt).tolist()
        with Routing() as routing:
            forward(model, prompt)  # spares most of the decoding
            if routing.smallest_gap < SAFE_GAP:
                continue
            generated, logits = decode(model, prompt, case.n_generated)
        if (routing.smallest_gap >= SAFE_GAP and bool(routing.n_ties) == bool(case.tied_experts)
                and min(margins_of(logits, case.n_generated)) >= SAFE_MARGIN):
            return prompt, generated, logits, routing
    raise RuntimeError(f"{case.name}: every prompt has a near tie")


def record(where, what, source, prompt, generated, logits, routing, **more):
    np.save(where / "logits.npy", logits.astype("<f4"))
    margins = margins_of(logits, len(generated))
    golden = {
        "what": what, "checkpoint": source, **more, "prompt": prompt, "generated": generated,
        "positions": len(logits), "vocab_size": logits.shape[1],
        "margins": [round(m, 4) for m in margins], "smallest_margin": round(min(margins), 4),
        **routing.record(),
        "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
    }
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    (where / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def require_agreement(case, model, ids, logits):
    """transformers' own reading of the FP8 file against the weights multiplied out here.

    It keeps what is not FP8 in the dtype of the file: float() of that is exact.
    """
    with Routing():
        own = forward(model.float(), ids).numpy()
    nmse = ((own - logits) ** 2).sum() / (logits ** 2).sum()
    if not nmse <= 1e-11:
        raise RuntimeError(f"{case.name}: transformers reads another model: NMSE {nmse:.1e}")


def make(case, where):
    where.mkdir(parents=True, exist_ok=True)
    config, tensors = checkpoint.write(case, where)
    with tempfile.TemporaryDirectory() as scratch:
        readable = where
        if case.scales:
            readable = pathlib.Path(scratch)
            checkpoint.write_plain(case, readable, config, tensors)
        model = load(readable)
        patched = patch(model)
        prompt, generated, logits, routing = decode_clearly(model, case)
    if case.reads_itself:
        require_agreement(case, load(where), prompt + generated[:-1], logits)
    record(where, case.what, ".", prompt, generated, logits, routing, **patched)


def make_trained(name, where):
    """A committed real model: its checkpoint stays where it is, only the outputs are here."""
    where.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))
    prompt = tokenizer.encode(TRAINED[name]).ids
    with Routing() as routing:
        generated, logits = decode(load(MODELS / name), prompt, 32)
    if routing.smallest_gap < SAFE_GAP or min(margins_of(logits, 32)) < SAFE_MARGIN:
        raise RuntimeError(f"{name}: a near tie; TRAINED needs another prompt")
    record(where, "the trained model: bfloat16 weights, float32 math", f"../../../models/{name}",
           prompt, generated, logits, routing, text=TRAINED[name] + tokenizer.decode(generated))


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
    for name in TRAINED:
        if (MODELS / name / "model.safetensors").exists():
            makers[name] = lambda where, name=name: make_trained(name, where)
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
