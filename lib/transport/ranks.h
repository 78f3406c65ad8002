/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What group.c needs to know of the ranks of its group: who is at which link, who sends what, and
 * what has come. Everything here looks at one link and one lane; nothing but releasing a slot
 * changes anything.
 */
#ifndef AFD_LIB_TRANSPORT_RANKS_H
#define AFD_LIB_TRANSPORT_RANKS_H

#include "net.h"

static inline uint32_t afd__rank_own(const afd_transport *net)
{
	return net->params.group_index;
}

/* NULL for our own. */
static inline struct afd__link *afd__rank_link(const afd_transport *net, uint32_t rank)
{
	return rank == afd__rank_own(net) ? NULL : net->links[afd__group_link_index(net, rank)];
}

/* How many parts a rank sends in the operation, and which rows are in one of them. */
uint32_t afd__rank_parts(
	const afd_transport *net, const struct afd__group_op *op, uint32_t rank);
struct afd__piece afd__rank_piece(
	const afd_transport *net, const struct afd__group_op *op, uint32_t rank, uint32_t part);

/* The slot that the rank's next part is in, once it has come; and it goes back. */
struct afd__slot_in *afd__rank_slot(struct afd__link *link, uint32_t lane);
void afd__rank_release(struct afd__link *link, uint32_t lane);
/* Gives back what came of steps that are over. 1 when there was any. */
int afd__rank_drop_stale(afd_transport *net, struct afd__link *link);

/* All that is needed of this rank is here, and all that it needs of us has gone. */
bool afd__rank_is_settled(const afd_transport *net, const struct afd__group_op *op,
	struct afd__link *link, uint32_t lane);
/* The part that has come is the one that must come next. */
int afd__rank_check_part(const afd_transport *net, const struct afd__group_op *op,
	const struct afd__link *link, const struct afd__header *h);
/* What a rank said of its step, as far as it tells that nothing more will come. */
int afd__rank_check_step(const afd_transport *net, const struct afd__group_op *op,
	struct afd__link *link, uint32_t lane);

#endif
