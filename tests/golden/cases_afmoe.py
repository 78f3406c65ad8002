# SPDX-License-Identifier: Apache-2.0
"""AFMoE (Trinity): its router, its layer rule, its attention, and the spellings of its config.

BASE has everything switched on that the published models have, with a window much smaller than the
context and layer types that follow no period.
"""
from cases import Case as AnyCase

BASE = {
    "architectures": ["AfmoeForCausalLM"], "model_type": "afmoe",
    **dict(vocab_size=64, hidden_size=30, intermediate_size=40, moe_intermediate_size=10,
           num_hidden_layers=4, num_dense_layers=1, num_attention_heads=4, num_key_value_heads=2,
           head_dim=10, hidden_act="silu", max_position_embeddings=128, rms_norm_eps=1e-5,
           attention_dropout=0.0, tie_word_embeddings=False, initializer_range=0.02,
           use_cache=True, bos_token_id=None, eos_token_id=None, num_experts=6,
           num_experts_per_tok=2, num_shared_experts=1, score_func="sigmoid", route_norm=True,
           route_scale=2.826, n_group=1, topk_group=1, num_expert_groups=1, num_limited_groups=1,
           load_balance_coeff=0.001, use_grouped_mm=True, mup_enabled=True, sliding_window=8,
           global_attn_every_n_layers=4,
           layer_types=["sliding_attention", "full_attention", "full_attention",
                        "sliding_attention"]),
}


TWO_LAYERS = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


def Case(*args, **more):
    return AnyCase(*args, **{"base": BASE, "spelling": 4, "n_prompt": 30, **more})


CASES = [
    Case("afmoe-f32", "AFMoE in float32, window 8 of 38 positions, config of transformers 4",
         dtype="f32"),
    Case("afmoe-bf16", "AFMoE in bfloat16 with expert_bias in float32"),
    Case("afmoe-v5", "config.json of transformers 5: rope_parameters, dtype, no key that its class "
         "does not know", spelling=5,
         without=("score_func", "route_norm", "n_group", "topk_group", "num_expert_groups",
                  "num_limited_groups", "load_balance_coeff", "use_grouped_mm")),
    # routing
    Case("afmoe-two-shared", "two shared experts: one MLP of twice the width",
         dict(TWO_LAYERS, num_shared_experts=2)),
    Case("afmoe-bias-bf16", "expert_bias in bfloat16", TWO_LAYERS, bias_dtype="bf16"),
    Case("afmoe-norm-off", "route_norm false: scores are scaled but not divided by their sum",
         dict(TWO_LAYERS, route_norm=False)),
    Case("afmoe-softmax", "score_func softmax: shares of all experts, never divided by the sum of "
         "the chosen", dict(TWO_LAYERS, score_func="softmax"), bias_std=0.05),
    Case("afmoe-scale-absent", "no route_scale: 1", TWO_LAYERS, without=("route_scale",)),
    Case("afmoe-top-one", "one expert per row: a normalised weight is route_scale itself",
         dict(TWO_LAYERS, num_experts_per_tok=1)),
    Case("afmoe-ties", "three experts whose biased scores are equal for every row: the lower id is "
         "chosen", TWO_LAYERS, tied_experts=(0, 2, 5)),
    # layers
    Case("afmoe-no-mup", "mup_enabled false: the embedding is not scaled",
         dict(TWO_LAYERS, mup_enabled=False)),
    Case("afmoe-all-moe", "num_dense_layers 0", dict(num_dense_layers=0, num_hidden_layers=3,
                                                     layer_types=["full_attention"]
                                                     + ["sliding_attention"] * 2)),
    Case("afmoe-all-dense", "as many dense layers as layers",
         dict(num_dense_layers=3, num_hidden_layers=3,
              layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    Case("afmoe-every-third", "no layer_types: every third layer sees all, by "
         "global_attn_every_n_layers", dict(global_attn_every_n_layers=3, num_dense_layers=2),
         without=("layer_types",)),
    Case("afmoe-every-fourth", "neither layer_types nor global_attn_every_n_layers: every fourth",
         dict(num_dense_layers=3), without=("layer_types", "global_attn_every_n_layers")),
    Case("afmoe-long", "a prompt of 150 and a window of 12: sliding layers leave whole KV pages "
         "behind", dict(sliding_window=12, num_hidden_layers=3, max_position_embeddings=256,
                        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
         n_prompt=150, n_generated=7),
    Case("afmoe-attention-bias", "attention_bias: biases on q, k, v and o but none on the gate",
         dict(TWO_LAYERS, attention_bias=True)),
    # files
    Case("afmoe-fused", "experts as 3-D tensors, tied head",
         dict(TWO_LAYERS, tie_word_embeddings=True), fused=True),
]
