/* SPDX-License-Identifier: Apache-2.0 */
/* The ranks of group_rig.h. */
#include "group_rig.h"

struct rank ranks[RANKS_MAX];
char group[96];

/* ---- the stage ---- */

static int stage_fill(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->filling, 0);
	memcpy(slot, w->own + row0 * HIDDEN, n_rows * HIDDEN * sizeof(float));
	w->filling = w->delay;
	return !w->filling;
}

static int stage_filled(void *user, uint32_t lane)
{
	return !--((struct rank *)user)->lanes[lane].filling;
}

static int add_drain(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->draining, 0);
	assert_int_equal(!slot, rank == ((struct rank *)user)->index);
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++) {
		float *sum = &w->all[row0 * HIDDEN + i];

		*sum = (rank ? *sum : 0.0f) + (slot ? slot[i] : w->own[row0 * HIDDEN + i]);
	}
	w->draining = w->delay;
	return !w->draining;
}

static int copy_drain(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->draining, 0);
	assert_int_not_equal(rank, ((struct rank *)user)->index);
	memcpy(w->own + row0 * HIDDEN, slot, n_rows * HIDDEN * sizeof(float));
	w->draining = w->delay;
	return !w->draining;
}

static int stage_drained(void *user, uint32_t lane)
{
	return !--((struct rank *)user)->lanes[lane].draining;
}

static struct afd__group_io io_of(struct rank *rank, uint8_t type)
{
	return (struct afd__group_io){ .fill = stage_fill,
		.filled = stage_filled,
		.drain = type == AFD__REDUCE ? add_drain : copy_drain,
		.drained = stage_drained,
		.user = rank };
}

int start(struct rank *rank, uint8_t type, uint32_t lane, uint32_t layer, uint32_t n_rows)
{
	struct afd__group_io io = io_of(rank, type);

	return type == AFD__REDUCE ? afd__group_reduce(rank->net, lane, layer, n_rows, &io)
				   : afd__group_gather(rank->net, lane, layer, n_rows, &io);
}

/* ---- groups ---- */

struct afd_transport_params params_of(uint32_t index, uint32_t n)
{
	return (struct afd_transport_params){ .size = sizeof(struct afd_transport_params),
		.group = group,
		.group_index = index,
		.group_size = n,
		.max_rows = 4,
		.lanes = LANES,
		.spin_us = UINT32_MAX };
}

void make_rank(uint32_t index, const struct afd_transport_params *params)
{
	struct afd_transport_params p = *params;

	rig_secret(&p);
	ranks[index].index = index;
	if (afd_transport_create(&ranks[index].net, client_ctx, &rig_contract, &p))
		fail_msg("%s", afd_last_error());
}

void join_all(uint32_t n)
{
	uint64_t until = now_ms() + PATIENCE_MS;
	uint32_t n_joined = 0;

	while (n_joined < n) {
		n_joined = 0;
		for (uint32_t i = 0; i < n; i++) {
			int rc = afd_transport_poll(ranks[i].net);

			if (rc < 0 || now_ms() > until)
				fail_msg("rank %u: %d %s", i, rc, afd_last_error());
			n_joined += (uint32_t)rc;
		}
	}
}

void make_group(uint32_t n, uint32_t deadline_ms)
{
	memset(ranks, 0, sizeof(ranks));
	rig_address(group);
	/* The last one first: it waits for the others. */
	for (uint32_t i = n; i--;) {
		struct afd_transport_params params = params_of(i, n);

		params.deadline_ms = deadline_ms;
		make_rank(i, &params);
	}
	join_all(n);
}

void end_group(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		afd_transport_destroy(ranks[i].net);
}

int begin(struct rank *rank, uint32_t rows0, uint32_t rows1)
{
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { rows0, rows1 } };

	return afd__exchange_begin(rank->net, &step);
}

void begin_all(uint32_t n, uint32_t n_rows)
{
	for (uint32_t i = 0; i < n; i++)
		assert_int_equal(begin(&ranks[i], n_rows, n_rows), 0);
}

/* Until it is done or has failed; only this rank is moved. */
int finish(struct rank *rank, uint32_t lane, int timeout_ms)
{
	uint64_t until = now_ms() + (uint64_t)timeout_ms;
	int rc;

	while (!(rc = afd__group_done(rank->net, lane))) {
		if (now_ms() > until)
			fail_msg("rank %u is not done after %d ms", rank->index, timeout_ms);
		rc = afd__exchange_progress(rank->net);
		if (!rc)
			afd__transport_sleep(rank->net, -1, 5);
	}
	return rc;
}

/* All ranks in turn, the first given first, until all are done. */
void finish_all(uint32_t n, uint32_t lane, uint32_t first)
{
	uint64_t until = now_ms() + PATIENCE_MS;
	uint32_t n_done = 0;

	while (n_done < n) {
		n_done = 0;
		for (uint32_t k = 0; k < n; k++) {
			struct rank *rank = &ranks[(first + k) % n];

			if (afd__exchange_progress(rank->net) < 0 || now_ms() > until)
				fail_msg("rank %u: %s", rank->index, afd_last_error());
			n_done += afd__group_done(rank->net, lane) == 1;
		}
	}
}

/* ---- numbers whose sum depends on the order ---- */

static float partial(uint32_t rank, uint32_t i)
{
	static const float scales[] = { 1e8f, 1.0f, -1e8f, 1e-3f };

	return scales[(rank + i) % 4] * (1.0f + (float)((i * 31 + rank * 17) % 97) / 97.0f);
}

void fill_partials(uint32_t n, uint32_t lane, uint32_t salt)
{
	for (uint32_t r = 0; r < n; r++) {
		for (uint32_t i = 0; i < ROWS_MAX * HIDDEN; i++)
			ranks[r].lanes[lane].own[i] = partial(r, i + salt);
	}
}

void expect_sums(uint32_t n, uint32_t lane, uint32_t n_rows, uint32_t salt)
{
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++) {
		float sum = 0.0f;

		for (uint32_t r = 0; r < n; r++)
			sum += partial(r, i + salt);
		for (uint32_t r = 0; r < n; r++) {
			if (memcmp(&ranks[r].lanes[lane].all[i], &sum, sizeof(sum)))
				fail_msg("rank %u of %u, number %u: %a, should be %a", r, n, i,
					(double)ranks[r].lanes[lane].all[i], (double)sum);
		}
	}
}
