/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as config.json: refused with a text, or an architecture whose every size is inside its
 * limit and whose rotation is finite. Built for libFuzzer, or with replay.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/model/config.h"
#include "../../lib/model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check_layer(const struct afd__layer *l)
{
	if (!l->n_kv_heads || l->n_heads % l->n_kv_heads || l->n_heads > AFD__MAX_HEADS)
		abort();
	if (l->head_dim < 2 || l->head_dim % 2 || l->head_dim > AFD__MAX_HEAD_DIM)
		abort();
	if ((l->window != 0) != (l->attention == AFD__ATTENTION_SLIDING))
		abort();
	if (!l->intermediate_size || l->intermediate_size > AFD__MAX_INTERMEDIATE)
		abort();
}

static void check(const struct afd__arch *arch)
{
	struct afd__slot *slots;
	uint32_t n_slots, i;

	if (!arch->n_layers || arch->n_layers > AFD__MAX_LAYERS || arch->hidden_size > AFD__MAX_HIDDEN || !arch->hidden_size)
		abort();
	for (i = 0; i < arch->n_layers; i++)
		check_layer(&arch->layers[i]);
	for (i = 0; i < arch->rope.head_dim / 2; i++) {
		if (!isfinite(arch->rope.inv_freq[i]))
			abort();
	}
	if (!(arch->rope.scale > 0) || !isfinite(arch->rope.scale) || !(arch->rms_norm_eps > 0))
		abort();
	if (afd__slots_create(&slots, &n_slots, NULL, arch))
		return;
	for (i = 0; i < n_slots; i++) {
		if (!slots[i].shape[0] || strlen(slots[i].name) > 70)
			abort();
	}
	afd__free(slots);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	struct afd__arch arch;

	if (!afd__arch_read(&arch, NULL, (const char *)data, n_bytes)) {
		check(&arch);
		afd__arch_free(&arch);
	} else if (!afd_last_error()[0]) {
		abort();
	}
	return 0;
}
