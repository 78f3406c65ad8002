/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rotary position embedding: from the three spellings of its keys to a table of frequencies. The
 * table is computed in float32 in the order of transformers 5, so that angles agree with it to the
 * last bit or nearly, also at far positions where a bit of the frequency would show. Called by
 * config.c and arch.c, when a model is opened.
 */
#include <math.h>
#include <string.h>

#include "../context/core.h"
#include "config.h"

static const double DEFAULT_THETA = 10000;

/* ---- keys ---- */

/* Where a file has both, rope_scaling (transformers 4) wins over rope_parameters (5), as there. */
static const json_t *find_dict(struct afd__json *j, const char **name)
{
	const json_t *dict;

	*name = "config.json: rope_scaling";
	dict = afd__json_object(j, "rope_scaling");
	if (json_object_size(dict))
		return dict;
	*name = "config.json: rope_parameters";
	return afd__json_object(j, "rope_parameters");
}

static void refuse_nested(struct afd__json *dict)
{
	static const char *const types[] = { "full_attention", "sliding_attention" };
	size_t i;

	for (i = 0; i < 2; i++) {
		if (afd__json_member(dict, types[i]))
			afd__json_refuse_key(dict, -ENOTSUP, types[i],
					     "supported: one set of keys for all layers");
	}
}

static bool is_yarn(struct afd__json *dict)
{
	const char *key = afd__json_member(dict, "rope_type") ? "rope_type" : "type";
	const char *type = afd__json_string(dict, key, "default");

	if (strcmp(type, "default") && strcmp(type, "yarn"))
		afd__json_refuse_key(dict, -ENOTSUP, key, "supported: \"default\", \"yarn\"");
	return !strcmp(type, "yarn");
}

/* Zero means the default for these, as in transformers. */
static double number_or(struct afd__json *dict, const char *key, double fallback)
{
	double value = afd__json_number(dict, key, 0, 1e6, fallback);

	return value > 0 ? value : fallback;
}

static void read_yarn(struct afd__rope_config *rope, struct afd__json *dict, struct afd__json *top,
		      uint32_t max_positions)
{
	double original;

	original = afd__json_number(dict, "original_max_position_embeddings", 1, INT32_MAX,
				    max_positions);
	rope->original_positions = afd__json_number(top, "original_max_position_embeddings", 1,
						    INT32_MAX, original);
	rope->factor = afd__json_number(dict, "factor", 1, 1e6,
					max_positions / rope->original_positions);
	rope->beta_fast = number_or(dict, "beta_fast", 32);
	rope->beta_slow = number_or(dict, "beta_slow", 1);
	rope->attention_factor = afd__json_number(dict, "attention_factor", 1e-6, 1e6, NAN);
	rope->mscale = afd__json_number(dict, "mscale", -1e6, 1e6, 0);
	rope->mscale_all_dim = afd__json_number(dict, "mscale_all_dim", -1e6, 1e6, 0);
	rope->truncate = afd__json_bool(dict, "truncate", true);
}

void afd__rope_config_read(struct afd__rope_config *rope, struct afd__json *j,
			   uint32_t max_positions)
{
	struct afd__json dict = { .error = 0 };
	double theta = afd__json_number(j, "rope_theta", 1.0001, 1e15, DEFAULT_THETA);

	memset(rope, 0, sizeof(*rope));
	rope->theta = theta;
	dict.object = find_dict(j, &dict.where);
	if (j->error || !dict.object)
		return;
	refuse_nested(&dict);
	rope->theta = afd__json_number(&dict, "rope_theta", 1.0001, 1e15, theta);
	rope->yarn = is_yarn(&dict);
	if (afd__json_number(&dict, "partial_rotary_factor", 0, 1, 1) != 1)
		afd__json_refuse_key(&dict, -ENOTSUP, "partial_rotary_factor", "supported: 1");
	if (rope->yarn && !dict.error)
		read_yarn(rope, &dict, j, max_positions);
	if (!j->error)
		j->error = dict.error;
}

/* ---- the table ---- */

/* theta^(2i / head_dim): the exponent is a float32, the power is rounded once to float32. */
static float power(const struct afd__rope_config *rope, uint32_t i, uint32_t head_dim)
{
	float exponent = (float)(2 * i) / (float)head_dim;

	return (float)pow((double)(float)rope->theta, (double)exponent);
}

static double magnitude(double factor, double mscale)
{
	return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

static double attention_factor(const struct afd__rope_config *rope)
{
	if (!isnan(rope->attention_factor))
		return rope->attention_factor;
	if (rope->mscale != 0 && rope->mscale_all_dim != 0)
		return magnitude(rope->factor, rope->mscale) /
		       magnitude(rope->factor, rope->mscale_all_dim);
	return magnitude(rope->factor, 1);
}

/* The dimension whose wave turns n_rotations times within the original context. */
static double dimension(const struct afd__rope_config *rope, double n_rotations, uint32_t head_dim)
{
	return head_dim * log(rope->original_positions / (n_rotations * 2 * M_PI)) /
	       (2 * log(rope->theta));
}

static void compute_yarn(float *inv_freq, const struct afd__rope_config *rope, uint32_t head_dim)
{
	double low = dimension(rope, rope->beta_fast, head_dim);
	double high = dimension(rope, rope->beta_slow, head_dim);
	float start, width;
	uint32_t i;

	if (rope->truncate) {
		low = floor(low);
		high = ceil(high);
	}
	low = fmax(low, 0);
	high = fmin(high, head_dim - 1);
	if (low == high)
		high += 0.001; /* the ramp would have no width */
	start = (float)low;
	width = (float)(high - low);
	for (i = 0; i < head_dim / 2; i++) {
		float extrapolated = 1.0f / power(rope, i, head_dim);
		float interpolated = 1.0f / ((float)rope->factor * power(rope, i, head_dim));
		float ramp = fminf(fmaxf(((float)i - start) / width, 0.0f), 1.0f);
		float keep = 1.0f - ramp;

		inv_freq[i] = interpolated * (1.0f - keep) + extrapolated * keep;
	}
}

int afd__rope_compute(float *inv_freq, float *scale, const struct afd__rope_config *rope,
		      uint32_t head_dim)
{
	double factor = rope->yarn ? attention_factor(rope) : 1;
	uint32_t i;

	if (!isfinite(factor) || factor <= 0)
		return afd__error(-ENOTSUP, "config.json: mscale %g and mscale_all_dim %g give the "
				  "attention factor %g, must be above 0",
				  rope->mscale, rope->mscale_all_dim, factor);
	*scale = (float)factor;
	if (rope->yarn) {
		compute_yarn(inv_freq, rope, head_dim);
		return 0;
	}
	for (i = 0; i < head_dim / 2; i++)
		inv_freq[i] = 1.0f / power(rope, i, head_dim);
	return 0;
}
