/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The weights of an attention stage, on its device. Matrices stay in the checkpoint's dtype;
 * vectors (norms, biases, rotation frequencies) are float32 and lie in one piece of memory.
 *
 * Invariant: fixed once loaded. Made and ended by attn, read by layer and head.
 */
#ifndef AFD_LIB_ATTN_WEIGHTS_H
#define AFD_LIB_ATTN_WEIGHTS_H

#include <afd/attn.h>

#include "../device/device.h"
#include "../model/slice.h"

enum { AFD__QKV_PARTS = 3 };

struct afd__attn_layer {
	const struct afd__layer *arch;
	uint32_t n_heads, n_kv_heads; /* of this rank: all, without an attention group */
	/* q, k and v under each other as one matrix, or three: in place, or of several dtypes. */
	struct afd__matrix qkv[AFD__QKV_PARTS];
	uint32_t n_qkv;
	struct afd__matrix gate; /* [n_heads * head_dim][hidden]; none without an output gate */
	struct afd__matrix o;    /* [hidden][n_heads * head_dim] */
	const float *input_norm; /* dev [hidden] */
	const float *ffn_norm;   /* dev [hidden] */
	const float *after_attention_norm; /* dev [hidden], or NULL: no norm there */
	const float *after_ffn_norm;       /* dev [hidden], or NULL */
	const float *qkv_bias;   /* dev [(n_heads + 2 n_kv_heads) * head_dim], or NULL */
	const float *o_bias;     /* dev [hidden], or NULL */
	const float *q_norm;     /* dev [head_dim], or NULL */
	const float *k_norm;     /* dev [head_dim], or NULL */
	float k_scale, v_scale;  /* of an fp8 KV cache; 1 with another one */
	int32_t rope;            /* index of its angles, -1: no rotation */
	/* In which form norms leave rows (inputs.c), without rows; row_bytes 0: in float32. */
	struct afd__inputs attention_inputs, ffn_inputs;
	/* of a layer with experts, when this side routes */
	struct afd__matrix router; /* [n_experts][hidden], always packed */
	const float *router_bias;  /* dev [n_experts], or NULL */
};

/* Layers that rotate alike share their angles. */
struct afd__attn_rope {
	const struct afd__rope *arch;
	const float *inv_freq; /* dev [head_dim / 2] */
};

struct afd__attn_weights {
	struct afd_context *ctx;
	struct afd__device *device;
	struct afd__attn_layer *layers; /* [n_layers] */
	struct afd__attn_rope *ropes;   /* [n_ropes] */
	uint32_t n_layers, n_ropes;
	struct afd__matrix embed; /* [vocab][hidden] */
	struct afd__matrix head;  /* the same memory when tied */
	int32_t head_is_embed;
	struct afd__inputs head_inputs; /* as in a layer */
	const float *final_norm; /* dev [hidden] */
	float *vectors;          /* dev [n_numbers] */
	size_t vector_bytes;
	uint64_t stored_bytes; /* what was loaded, as the checkpoint has it */
};

struct afd__attn_weights_params {
	const struct afd_model *model;
	struct afd__queue *queue;
	uint32_t rank, n_ranks; /* of the attention group; 0 of 1 */
	bool routes;            /* routers, too */
	int32_t kv_dtype;
	afd_progress progress;
	void *progress_user;
};

/* Loads what the rank holds of the role's tensors; waits for the device. Scales of K and V are
 * looked at for an fp8 KV cache only. On an error nothing is held. */
int afd__attn_weights_load(
	struct afd__attn_weights *weights, const struct afd__attn_weights_params *params);
void afd__attn_weights_free(struct afd__attn_weights *weights); /* also of a zeroed one */

/* Device memory held. */
uint64_t afd__attn_weights_bytes(const struct afd__attn_weights *weights);

#endif
