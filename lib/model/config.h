/* SPDX-License-Identifier: Apache-2.0 */
/* config.json as numbers: every key that matters, in either spelling, checked for type and
 * range. */
#ifndef AFD_LIB_CONFIG_H
#define AFD_LIB_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "json.h"
#include "model.h"

enum {
	AFD__MAX_LAYERS = 1024,
	AFD__MAX_HIDDEN = 65536,
	AFD__MAX_INTERMEDIATE = 1 << 20,
	AFD__MAX_HEADS = 1024,
	AFD__MAX_HEADS_PER_KV_HEAD = 64,
	AFD__MAX_HEAD_DIM = 512,
	AFD__MAX_VOCAB = 1 << 24,
	AFD__MAX_EXPERTS = 4096,
	AFD__MAX_TOP_K = 64,
	AFD__MAX_ALL_EXPERTS = 1 << 17, /* of all layers together */
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

/*
 * Which layers slide: with layer_types what it says; else from first_sliding on, but each
 * full_every-th, counted from 1. sliding_window 0: none does.
 */
struct afd__window_config {
	uint32_t sliding_window;
	uint32_t first_sliding;
	uint32_t full_every;       /* 0: no such rule */
	const json_t *layer_types; /* [n_layers] strings, checked; NULL: not given */
};

/*
 * Which layers route, and how. A layer does from n_dense_layers on if it is the sparse_step-th,
 * counted from 1, and not in dense_layers; or, with types, if it is "sparse" there. n_experts 0:
 * none does.
 */
struct afd__experts_config {
	uint32_t n_experts, top_k;
	uint32_t expert_size, shared_size;
	uint32_t n_dense_layers, sparse_step;
	const json_t *dense_layers; /* integers, checked; NULL: none */
	const json_t *types;        /* [n_layers] "dense" or "sparse", checked; NULL: not given */
	struct afd__router router;
};

struct afd__config {
	uint32_t hidden_size, intermediate_size, n_layers, vocab_size;
	uint32_t n_heads, n_kv_heads, head_dim;
	uint32_t max_positions;
	double rms_norm_eps;
	double embedding_scale;
	bool attention_bias, tied_head;
	int32_t dtype; /* enum afd_dtype; 0: not said, or one that we do not compute with */
	struct afd__window_config window;
	struct afd__experts_config experts;
	struct afd__rope_config rope;
};

/* A family: what its config.json does not say, and how it spells what it does. */
struct afd__family {
	const char *model_type;
	const char *architecture;
	bool check_architecture;     /* model_type alone does not tell: another family has it too */
	bool ffn_only;
	bool rope_on_full;           /* layers that see all positions rotate, too */
	int32_t output_gate;         /* enum afd__output_gate */
	uint32_t norms;              /* enum afd__norm_slot, or-ed */
	const char *const *required; /* keys without a default, beside the sizes that all have; ends
					with NULL */
	/* The keys that not all families have. */
	void (*read)(struct afd__config *config, struct afd__json *j);
};

/* families.c: the family that model_type or architectures name. NULL: j->error tells. */
const struct afd__family *afd__family_find(struct afd__json *j);

/* Fills config from the keys of the family, and checks them against each other; j->error tells. */
void afd__config_read(struct afd__config *config, const struct afd__family *family,
		      struct afd__json *j);
bool afd__config_slides(const struct afd__config *config, uint32_t layer);
bool afd__config_routes(const struct afd__config *config, uint32_t layer);

/* For families: keys of windows, by the rule of each. The layers must be known. */
void afd__config_read_window(struct afd__config *config, struct afd__json *j);
void afd__config_check_window(struct afd__config *config, struct afd__json *j, const char *why);

/* quantization.c: refuses what is not block FP8 by the name of the key. */
void afd__quantization_check(struct afd__json *j);

/* rope.c: rope_theta, rope_scaling and rope_parameters. */
void afd__rope_config_read(struct afd__rope_config *rope, struct afd__json *j,
			   uint32_t max_positions);
/* inv_freq[head_dim / 2] and the factor of cos and sin; -ENOTSUP when the factor is not a positive
 * number. */
int afd__rope_compute(float *inv_freq, float *scale, const struct afd__rope_config *rope,
		      uint32_t head_dim);

#endif
