# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: how rows choose experts, which layers have them, how they lie in the file.

A case changes as little as it can from BASE; intermediate_size is there and differs from
moe_intermediate_size, so that one taken for the other shows.
"""
from cases import Case as AnyCase
from cases import BASE as DENSE

BASE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    **{key: value for key, value in DENSE.items() if key != "max_window_layers"},
    **dict(vocab_size=64, hidden_size=32, intermediate_size=42, num_attention_heads=4, head_dim=10,
           tie_word_embeddings=False, num_experts=8, num_experts_per_tok=2,
           moe_intermediate_size=10, norm_topk_prob=True, decoder_sparse_step=1,
           mlp_only_layers=[], output_router_logits=False, router_aux_loss_coef=0.001),
}


def Case(*args, **more):
    return AnyCase(*args, base=BASE, **more)


def experts_apart(name):
    """Three files: half the experts of a layer in the second, half in the third."""
    if ".experts." not in name:
        return 1
    return 2 + int(name.split(".experts.")[1].split(".")[0]) % 2


CASES = [
    # routing
    Case("moe-f32", "Qwen3-MoE in float32: two of eight experts, weights of the two sum to one",
         dtype="f32"),
    Case("moe-bf16", "Qwen3-MoE in bfloat16"),
    Case("moe-f16", "Qwen3-MoE in float16", dtype="f16"),
    Case("moe-norm-off", "norm_topk_prob false: the weights are shares of all experts",
         dict(norm_topk_prob=False)),
    Case("moe-norm-absent", "norm_topk_prob absent means false", without=("norm_topk_prob",)),
    Case("moe-top-one", "one expert per row, norm_topk_prob false", dict(num_experts_per_tok=1,
                                                                         norm_topk_prob=False)),
    Case("moe-top-all", "as many experts per row as there are", dict(num_experts=5,
                                                                     num_experts_per_tok=5)),
    Case("moe-ties", "three experts whose scores are equal for every row: the lower id is chosen",
         dict(num_experts=6), tied_experts=(1, 3, 4)),
    # layers
    Case("moe-sparse-step", "decoder_sparse_step 2 and mlp_only_layers [3]: of five layers the "
         "second alone has experts", dict(num_hidden_layers=5, decoder_sparse_step=2,
                                          mlp_only_layers=[3])),
    Case("moe-mlp-only", "mlp_only_layers [0, 2] of three layers",
         dict(num_hidden_layers=3, mlp_only_layers=[0, 2])),
    Case("moe-window", "a window of 8 holds on every layer: the MoE class has neither layer_types "
         "nor max_window_layers", dict(use_sliding_window=True, sliding_window=8,
                                       max_window_layers=1), n_prompt=30),
    # spellings
    Case("moe-local-experts", "num_local_experts, as transformers 5 writes it",
         dict(num_local_experts=8), without=("num_experts",)),
    Case("moe-v4", "config.json of transformers 4, mlp_only_layers absent, tied head",
         dict(tie_word_embeddings=True), spelling=4, theta=1000000, without=("mlp_only_layers",)),
    Case("moe-no-head-dim", "no head_dim: hidden / heads", without=("head_dim",)),
    # files
    Case("moe-fused", "experts as 3-D tensors gate_up_proj and down_proj", fused=True),
    Case("moe-fused-square", "fused experts with 2 x moe_intermediate_size equal to hidden_size: "
         "the shape does not tell which is which", dict(moe_intermediate_size=16, num_experts=6),
         fused=True),
    Case("moe-sharded", "experts of one layer in two files", shards=experts_apart),
]
