# SPDX-License-Identifier: Apache-2.0
"""Block FP8: e4m3 weights with a scale per 128 x 128, in every dtype and under both names.

Blocks differ in size by up to four, so that a scale taken from a neighbour shows. Where sizes are
no multiples of 128 transformers' own dequantiser errs or refuses: logits always come from weights
that make.py multiplied out, and where reads_itself is set transformers had to agree from the FP8
file itself.
"""
from cases import Case as AnyCase
from cases import BASE as DENSE
from cases_afmoe import BASE as AFMOE
from cases_moe import BASE as MOE


def Case(name, what, config, base=DENSE, **more):
    small = dict(vocab_size=60, num_hidden_layers=1, num_attention_heads=4, head_dim=32)
    return AnyCase(name, what, {**small, **config}, base=base, std=0.1, **more)


CASES = [
    Case("fp8-f32", "FP8 with float32 scales, two blocks each way",
         dict(hidden_size=256, intermediate_size=256), scales="f32", reads_itself=True),
    Case("fp8-bf16", "FP8 with bfloat16 scales, as Qwen3-32B-FP8 has them",
         dict(hidden_size=128, intermediate_size=256), scales="bf16",
         reads_itself=True),
    Case("fp8-f16", "FP8 with float16 scales, as Qwen3-4B-Instruct-2507-FP8 has them",
         dict(hidden_size=128, intermediate_size=384, head_dim=16), scales="f16",
         reads_itself=True),
    Case("fp8-ragged", "no size a multiple of 128: hidden 150, intermediate 270, q 132 rows",
         dict(hidden_size=150, intermediate_size=270, num_attention_heads=6, head_dim=22),
         scales="f32"),
    Case("fp8-ragged-even", "sizes of 192: two blocks of 128 and 64, not two of 96",
         dict(hidden_size=192, intermediate_size=192, num_attention_heads=6), scales="bf16"),
    Case("fp8-some", "k_proj, o_proj and the second layer's down_proj are bfloat16 in an FP8 "
         "checkpoint, biases too", dict(hidden_size=128, intermediate_size=128, attention_bias=True,
                                        num_hidden_layers=2, head_dim=16), scales="f32",
         unquantized=lambda name: "k_proj" in name or "o_proj" in name
         or "layers.1.mlp.down" in name),
    Case("fp8-moe", "Qwen3-MoE in FP8 with a dense first layer, bfloat16 scales, router and head",
         dict(hidden_size=128, intermediate_size=72, moe_intermediate_size=128, num_experts=3,
              num_hidden_layers=2, mlp_only_layers=[0], head_dim=16), base=MOE, scales="bf16",
         reads_itself=True),
    Case("fp8-moe-ragged", "Qwen3-MoE in FP8, hidden 144 and experts of 72",
         dict(hidden_size=144, moe_intermediate_size=72, num_experts=3, head_dim=16),
         base=MOE, scales="f32"),
    Case("fp8-fused", "fused FP8 experts, gate and up each of whole blocks",
         dict(hidden_size=128, moe_intermediate_size=128, num_experts=2, num_experts_per_tok=1,
              norm_topk_prob=False, head_dim=16), base=MOE, scales="f32", fused=True),
    Case("fp8-fused-ragged", "fused FP8 experts of 96: up begins inside a block of gate",
         dict(hidden_size=136, moe_intermediate_size=96, num_experts=3, head_dim=16), base=MOE,
         scales="f16", fused=True),
    Case("fp8-weight-scale", "weight_scale instead of weight_scale_inv, dense, bfloat16 scales",
         dict(hidden_size=144, intermediate_size=264, head_dim=16), scales="bf16",
         scale_name="weight_scale"),
    Case("fp8-afmoe", "AFMoE in FP8 as compressed-tensors writes it: weight_scale, attention gate "
         "and shared expert too",
         dict(hidden_size=128, intermediate_size=96, moe_intermediate_size=64, num_experts=3,
              num_hidden_layers=2, head_dim=16,
              layer_types=["full_attention", "sliding_attention"]),
         base=AFMOE, spelling=4, n_prompt=30, scales="bf16", scale_name="weight_scale"),
]
