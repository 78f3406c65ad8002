/* SPDX-License-Identifier: Apache-2.0 */
/* config.json as numbers: every key that matters, in either spelling, checked for type and
 * range. */
#ifndef AFD_LIB_CONFIG_H
#define AFD_LIB_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "json.h"

enum {
	AFD__MAX_LAYERS = 1024,
	AFD__MAX_HIDDEN = 65536,
	AFD__MAX_INTERMEDIATE = 1 << 20,
	AFD__MAX_HEADS = 1024,
	AFD__MAX_HEADS_PER_KV_HEAD = 64,
	AFD__MAX_HEAD_DIM = 512,
	AFD__MAX_VOCAB = 1 << 24,
};

struct afd__rope_config {
	double theta;
	bool yarn; /* the rest is YaRN's */
	double factor, original_positions;
	double beta_fast, beta_slow;
	double attention_factor;       /* NAN: not given */
	double mscale, mscale_all_dim; /* 0: not given */
	bool truncate;
};

struct afd__config {
	uint32_t hidden_size, intermediate_size, n_layers, vocab_size;
	uint32_t n_heads, n_kv_heads, head_dim;
	uint32_t max_positions;
	double rms_norm_eps;
	bool attention_bias, tied_head;
	int32_t dtype;             /* enum afd_dtype; 0: not said, or one that we do not compute
	                              with */
	uint32_t sliding_window;   /* 0: none */
	uint32_t max_window_layers;
	const json_t *layer_types; /* [n_layers] strings, checked; NULL: not given */
	struct afd__rope_config rope;
};

/* Fills config from the keys that Qwen3 has, and checks them against each other; j->error tells. */
void afd__config_read_qwen3(struct afd__config *config, struct afd__json *j);

/* rope.c: rope_theta, rope_scaling and rope_parameters. */
void afd__rope_config_read(struct afd__rope_config *rope, struct afd__json *j,
			   uint32_t max_positions);
/* inv_freq[head_dim / 2] and the factor of cos and sin; -ENOTSUP when the factor is not a positive
 * number. */
int afd__rope_compute(float *inv_freq, float *scale, const struct afd__rope_config *rope,
		      uint32_t head_dim);

#endif
