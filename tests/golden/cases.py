# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints: which shape, dtype, spelling and file layout each golden case has.

Dense Qwen3 is here; cases_moe.py, cases_afmoe.py and cases_fp8.py have the rest. A case changes as
little as it can from BASE, so that a failing case names the broken feature. The defaults are
hostile on purpose: head_dim differs from hidden/heads, queries share KV heads, no width is a power
of two.
"""
import dataclasses
import typing

BASE = dict(
    vocab_size=150, hidden_size=48, intermediate_size=70, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, attention_dropout=0.0,
    tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, max_window_layers=28,
    initializer_range=0.02, use_cache=True, bos_token_id=None, eos_token_id=None,
)
# With theta 500 the ramp has a middle, and its end moves when max_position_embeddings is mistaken
# for the original length.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


@dataclasses.dataclass
class Case:
    name: str
    what: str  # one sentence, copied into golden.json
    config: dict = dataclasses.field(default_factory=dict)  # what differs from BASE
    dtype: str = "bf16"  # of all tensors: f32, f16, bf16; or "mixed"
    spelling: int = 5  # major version of transformers whose config.json is imitated
    theta: typing.Optional[float] = 1e4  # None: the spelling's usual place lacks it
    rope: dict = dataclasses.field(default_factory=dict)  # rope_parameters or rope_scaling
    shards: typing.Optional[typing.Callable[[str], int]] = None  # tensor name -> shard, from 1
    head: str = "absent"  # lm_head.weight of a tied checkpoint: "absent", "equal" or "own"
    std: float = 0.2  # of matrices and biases
    n_prompt: int = 24
    n_generated: int = 9
    # of the other families
    base: dict = dataclasses.field(default_factory=lambda: BASE)
    without: tuple = ()  # keys that config.json lacks
    fused: bool = False  # experts as 3-D tensors, the way transformers 5 holds them
    tied_experts: tuple = ()  # experts whose scores are equal for every row
    bias_std: float = 0.3  # of expert_bias
    bias_dtype: str = "f32"  # of expert_bias
    scales: typing.Optional[str] = None  # FP8: dtype of the scales
    scale_name: str = "weight_scale_inv"
    unquantized: typing.Callable[[str], bool] = lambda name: False  # FP8: stays in dtype
    reads_itself: bool = False  # FP8: transformers' own dequantiser must agree


def attention_and_ffn(name):
    """Two files: everything an attention process needs, and everything an FFN process needs."""
    return 2 if ".mlp." in name else 1


def interleaved(name):
    """Three files; FFN weights alone in the second, attention weights in the first and third."""
    if ".mlp." in name:
        return 2
    return 1 if "embed" in name or ".layers.0." in name else 3


CASES = [
    # weights and heads
    Case("f32-tied", "float32 weights, tied head", dtype="f32"),
    Case("f32-untied", "float32 weights, untied head", dict(tie_word_embeddings=False),
         dtype="f32"),
    Case("bf16-tied", "bfloat16 weights, tied head; the logits are float32 math on them"),
    Case("bf16-untied", "bfloat16 weights, untied head, three layers",
         dict(tie_word_embeddings=False, num_hidden_layers=3)),
    Case("f16-untied", "float16 weights, untied head", dict(tie_word_embeddings=False),
         dtype="f16"),
    Case("mixed-dtypes", "one file with f32 norms and biases, bf16 matrices and an f16 head",
         dict(tie_word_embeddings=False, attention_bias=True), dtype="mixed"),
    Case("tied-own-head", "tied config whose file has a different lm_head.weight: the file's is "
         "used", head="own"),
    Case("tied-equal-head", "tied config whose file repeats embed_tokens as lm_head.weight",
         head="equal"),
    # shapes
    Case("wide", "hidden 96, intermediate 160, six query and two KV heads of 32",
         dict(vocab_size=256, hidden_size=96, intermediate_size=160, head_dim=32,
              num_hidden_layers=2), theta=1e6, std=0.15),
    Case("odd-f32", "no width a multiple of 16: hidden 72, intermediate 100, vocabulary 251",
         dict(vocab_size=251, hidden_size=72, intermediate_size=100, head_dim=24,
              num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=1), dtype="f32"),
    Case("odd-bf16", "no width even but head_dim: hidden 57, intermediate 83, vocabulary 211, "
         "heads of 22, untied",
         dict(vocab_size=211, hidden_size=57, intermediate_size=83, head_dim=22,
              num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=False)),
    Case("odd-f16", "hidden 90, intermediate 37, heads of 14: narrower FFN than hidden",
         dict(vocab_size=203, hidden_size=90, intermediate_size=37, head_dim=14,
              num_attention_heads=4, num_key_value_heads=2), dtype="f16"),
    Case("kv-heads-all", "as many KV heads as query heads", dict(num_key_value_heads=6)),
    Case("kv-heads-one", "one KV head for all query heads", dict(num_key_value_heads=1)),
    Case("kv-heads-null", "num_key_value_heads null means as many as query heads",
         dict(num_attention_heads=4, num_key_value_heads=None)),
    Case("bias-f32", "attention_bias: biases on q, k, v and o", dict(attention_bias=True),
         dtype="f32"),
    Case("bias-bf16", "attention_bias with bfloat16 biases, untied",
         dict(attention_bias=True, tie_word_embeddings=False)),
    Case("large-eps", "an eps that is felt: rms_norm_eps 0.05", dict(rms_norm_eps=0.05)),
    Case("long-prompt", "a prompt of 90 tokens: several KV pages and many prefill chunks",
         dict(vocab_size=140), n_prompt=90, n_generated=7),
    # spellings
    Case("v4-plain", "config.json of transformers 4: rope_theta, rope_scaling null, torch_dtype, "
         "and keys that mean nothing here", spelling=4, theta=1000000,
         config=dict(quirk={"unknown": [1, None]}, use_qk_norm=True, eos_token_id=[7, 9])),
    Case("v5-plain", "config.json of transformers 5: rope_parameters, dtype, layer_types",
         dict(layer_types=["full_attention"] * 2), theta=1000000.0),
    Case("theta-beside", "rope_parameters without rope_theta: the one beside it counts",
         dict(num_hidden_layers=1, rope_theta=1e6), theta=None),
    Case("theta-twice", "rope_theta in rope_parameters and beside it: the one inside counts",
         dict(num_hidden_layers=1, rope_theta=1e6), theta=500.0),
    Case("theta-default", "no rope_theta anywhere: 10000", dict(num_hidden_layers=1), theta=None,
         spelling=4),
    # rope
    Case("yarn-v4", "YaRN in rope_scaling; max_position_embeddings is not factor x original and "
         "positions pass both", dict(max_position_embeddings=40), spelling=4, rope=YARN,
         theta=500.0, n_prompt=44),
    Case("yarn-v4-type", "YaRN in rope_scaling under the older key 'type'", spelling=4,
         rope={("type" if k == "rope_type" else k): v for k, v in YARN.items()},
         theta=500.0, n_prompt=44),
    Case("yarn-v5", "YaRN in rope_parameters", rope=YARN, theta=500.0, n_prompt=44),
    Case("yarn-attention-factor", "YaRN with attention_factor given", spelling=4,
         rope=dict(YARN, attention_factor=0.8), theta=500.0, n_prompt=44),
    Case("yarn-betas", "YaRN with beta_fast and beta_slow given and untruncated bounds",
         rope=dict(YARN, beta_fast=2.0, beta_slow=0.5, truncate=False), theta=500.0, n_prompt=44),
    Case("yarn-mscale", "YaRN whose attention factor comes from mscale and mscale_all_dim",
         rope=dict(YARN, mscale=1.0, mscale_all_dim=0.5), theta=500.0, n_prompt=44),
    Case("yarn-no-original", "YaRN without original_max_position_embeddings: that of the config",
         dict(max_position_embeddings=24), rope={"rope_type": "yarn", "factor": 2.0},
         theta=500.0, n_prompt=44),
    # sliding window
    Case("window-v4", "window of 8 on layers from max_window_layers on",
         dict(use_sliding_window=True, sliding_window=8, max_window_layers=1,
              num_hidden_layers=3), spelling=4, theta=1e6, n_prompt=30),
    Case("window-layer-types", "window of 8 on the layers that layer_types names",
         dict(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_hidden_layers=3,
              layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
         n_prompt=30),
    Case("window-off", "use_sliding_window false: sliding_window means nothing",
         dict(use_sliding_window=False, sliding_window=8, max_window_layers=0), n_prompt=30),
    Case("window-one", "window of one key: each token sees itself",
         dict(use_sliding_window=True, sliding_window=1, max_window_layers=1), n_prompt=16),
    # files
    Case("sharded-two", "attention tensors in one file, FFN tensors in the other",
         shards=attention_and_ffn),
    Case("sharded-three", "three files, FFN tensors alone in the second, untied f32 head",
         dict(tie_word_embeddings=False, vocab_size=120), dtype="f32", shards=interleaved),
]
