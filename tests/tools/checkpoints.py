# SPDX-License-Identifier: Apache-2.0
"""A large Qwen3-MoE checkpoint for tests that look at memory: random bf16 numbers, written when it is needed."""
import json
import random
import struct

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "hidden_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 48000,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "intermediate_size": 4096, "norm_topk_prob": True,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "bos_token_id": 0,
    "eos_token_id": 0,
}


def shapes(config):
    """{name: shape} of every tensor."""
    hidden, width, head_dim = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,),
             "lm_head.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden),
                 "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
                 "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,), "mlp.gate": (config["num_experts"], hidden)}
        for e in range(config["num_experts"]):
            layer |= {f"mlp.experts.{e}.gate_proj": (width, hidden), f"mlp.experts.{e}.up_proj": (width, hidden),
                      f"mlp.experts.{e}.down_proj": (hidden, width)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write(folder):
    """Writes the checkpoint; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, end = {}, 0
    for name, shape in shapes(CONFIG).items():
        n_bytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = random.Random(1)
    # Finite, of either sign, from 2^-8 to 2^-5.
    block = b"".join(struct.pack("<H", rng.randrange(2) << 15 | rng.randrange(119, 122) << 7 | rng.randrange(128))
                     for _ in range(1 << 19))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for at in range(0, end, len(block)):
            file.write(block[:end - at])
    return end
