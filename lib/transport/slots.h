/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a geometry says of a slot: its size, and where it lies when the control slots come first,
 * then those of rows, each with a headroom of its own in front (stream.c, modules/verbs; segment.c
 * keeps rows on pages instead).
 */
#ifndef AFD_LIB_TRANSPORT_SLOTS_H
#define AFD_LIB_TRANSPORT_SLOTS_H

#include <assert.h>

#include "ops.h"

static inline size_t afd__slot_capacity(const struct afd__wire_slots *g, uint32_t slot)
{
	return slot < g->n_control ? g->control_bytes : g->slot_bytes;
}

/* From the begin of the direction to the slot; its headroom lies before it. */
static inline size_t afd__slot_offset(
	const struct afd__wire_slots *g, uint32_t slot, size_t headroom)
{
	size_t control = slot < g->n_control ? slot : g->n_control;

	assert(slot < g->n_slots);
	return headroom + control * (headroom + g->control_bytes) +
	       (slot - control) * (headroom + g->slot_bytes);
}

#endif
