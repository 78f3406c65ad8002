/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gather in a flow: peers that answer each reply with the next layer's rows after a while, a
 * server that takes 100 us for a pass, and a clock that the test moves. What is looked at is what
 * users see: rows of a pass, and what a peer loses.
 */
#include "../../lib/ffn/gather.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <string.h>

enum { MAX_PEERS = 8, US = 1000, PASS_US = 100 };

struct flow_peer {
	uint32_t think_us, spread_us; /* from our reply to its next rows: think .. think + spread */
	uint32_t between_us;          /* more between steps */
	uint64_t start_us, end_us;    /* its first rows; no rows after the end. 0: no end */
	uint64_t next_us;             /* when its next rows come */
	uint32_t layer;
	bool waits;
	uint64_t n_passes;
};

struct flow {
	struct afd_context ctx;
	struct afd__arrivals arrivals;
	struct flow_peer peers[MAX_PEERS];
	struct afd__held held[MAX_PEERS];
	uint32_t n_peers, n_layers, n_held;
	uint64_t now_us, seed, cap_us, longest_wait_us;
	uint64_t n_passes, n_rows;
};

static uint32_t draw(struct flow *f, uint32_t below)
{
	f->seed = f->seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return below ? (uint32_t)(f->seed >> 33) % below : 0;
}

static bool has_ended(const struct flow_peer *p)
{
	return p->end_us && p->next_us >= p->end_us;
}

static struct afd__gather_rule rule_of(const struct flow *f)
{
	return (struct afd__gather_rule){
		.cap_ns = f->cap_us * US,
		.step_cap_ns = 10 * f->cap_us * US,
		.pass_ns = PASS_US * US,
		.n_layers = f->n_layers,
		.full_rows = 64,
	};
}

static void take(struct flow *f)
{
	struct afd__gather_rule rule = rule_of(f);

	for (uint32_t i = 0; i < f->n_peers; i++) {
		struct flow_peer *p = &f->peers[i];
		struct afd__held *h = &f->held[f->n_held];

		if (p->waits || p->next_us > f->now_us || has_ended(p))
			continue;
		*h = (struct afd__held){ .part = { .peer = i,
						 .layer = p->layer,
						 .n_rows = 1,
						 .n_parts = 1,
						 .arrived_ns = p->next_us * US },
			.turn_ns = f->now_us * US };
		afd__arrivals_came(&f->arrivals, &h->part, &rule);
		p->waits = true;
		f->n_held++;
	}
}

static void choose(struct flow *f, struct afd__gather_choice *choice)
{
	struct afd__gather_rule rule = rule_of(f);
	struct afd__source joined[MAX_PEERS];
	struct afd__gather_source sources[2 * MAX_PEERS];
	uint32_t n;

	for (uint32_t i = 0; i < f->n_peers; i++) {
		const struct flow_peer *p = &f->peers[i];

		joined[i] = (struct afd__source){
			.peer = i, .next_layer = p->layer ? p->layer : f->n_layers, .n_rows = 1
		};
	}
	n = afd__arrivals_sources(
		&f->arrivals, joined, f->n_peers, f->held, f->n_held, &rule, sources);
	afd__gather_choose(&rule, sources, n, f->now_us * US, choice);
}

static void answer(struct flow *f, const struct afd__held *h)
{
	struct flow_peer *p = &f->peers[h->part.peer];

	afd__arrivals_answered(&f->arrivals, &h->part, f->now_us * US);
	p->waits = false;
	p->n_passes++;
	p->layer = (p->layer + 1) % f->n_layers;
	p->next_us =
		f->now_us + p->think_us + draw(f, p->spread_us) + (p->layer ? 0 : p->between_us);
}

static void run(struct flow *f, uint32_t layer)
{
	uint32_t n_kept = 0, n_rows = 0;
	uint64_t begun_us = f->now_us;

	f->now_us += PASS_US;
	for (uint32_t i = 0; i < f->n_held; i++) {
		uint64_t waited_us = begun_us - f->held[i].turn_ns / US;

		if (f->held[i].part.layer != layer) {
			f->held[n_kept++] = f->held[i];
			continue;
		}
		if (waited_us > f->longest_wait_us)
			f->longest_wait_us = waited_us;
		answer(f, &f->held[i]);
		n_rows++;
	}
	f->n_held = n_kept;
	f->n_passes++;
	f->n_rows += n_rows;
}

static uint64_t next_arrival_us(const struct flow *f)
{
	uint64_t next_us = UINT64_MAX;

	for (uint32_t i = 0; i < f->n_peers; i++) {
		const struct flow_peer *p = &f->peers[i];

		if (!p->waits && !has_ended(p) && p->next_us < next_us)
			next_us = p->next_us;
	}
	return next_us;
}

/* Lets the flow go on until then; counts only what happens after `settled`. */
static void flow_until(struct flow *f, uint64_t settled_us, uint64_t end_us)
{
	struct afd__gather_choice choice;
	bool settled = false;

	while (f->now_us < end_us) {
		if (!settled && f->now_us >= settled_us) {
			settled = true;
			f->n_passes = f->n_rows = f->longest_wait_us = 0;
			for (uint32_t i = 0; i < f->n_peers; i++)
				f->peers[i].n_passes = 0;
		}
		take(f);
		choose(f, &choice);
		if (choice.layer >= 0) {
			run(f, (uint32_t)choice.layer);
		} else {
			uint64_t next_us = next_arrival_us(f),
				 until_us = choice.until_ns / US + (choice.until_ns % US != 0);

			f->now_us = next_us < until_us ? next_us : until_us;
		}
	}
}

static struct flow *flow_create(uint32_t n_peers, uint32_t n_layers, const struct flow_peer *like)
{
	static struct flow flow;

	flow = (struct flow){
		.n_peers = n_peers, .n_layers = n_layers, .cap_us = 2000, .seed = 7, .now_us = 1000
	};
	assert_int_equal(afd__arrivals_create(&flow.arrivals, &flow.ctx, n_peers, 0, n_layers), 0);
	for (uint32_t i = 0; i < n_peers; i++) {
		flow.peers[i] = *like;
		flow.peers[i].next_us = flow.now_us + like->start_us + draw(&flow, 5000);
	}
	return &flow;
}

static double rows_per_pass(const struct flow *f)
{
	return (double)f->n_rows / (double)f->n_passes;
}

/* ---- the laws ---- */

static void peers_of_one_rhythm_meet_in_one_pass(void **state)
{
	static const uint32_t n_layers[] = { 1, 2, 4, 28 };
	static const struct flow_peer likes[] = {
		{ .think_us = 50, .spread_us = 20, .between_us = 100 },
		{ .think_us = 50, .spread_us = 250, .between_us = 300 },
		{ .think_us = 300, .spread_us = 300, .between_us = 1000 },
	};

	for (size_t i = 0; i < sizeof(n_layers) / sizeof(n_layers[0]); i++) {
		for (size_t k = 0; k < sizeof(likes) / sizeof(likes[0]); k++) {
			struct flow *f = flow_create(4, n_layers[i], &likes[k]);

			flow_until(f, 1000000, 3000000);
			print_message("%u layers, think %u + %u us: %.2f rows per pass\n",
				n_layers[i], likes[k].think_us, likes[k].spread_us,
				rows_per_pass(f));
			assert_true(rows_per_pass(f) > 3.5);
			afd__arrivals_destroy(&f->arrivals);
		}
	}
}

static void no_rows_wait_longer_than_the_cap_for_others(void **state)
{
	struct flow *f = flow_create(
		8, 4, &(struct flow_peer){ .think_us = 50, .spread_us = 3000, .between_us = 3000 });

	flow_until(f, 0, 3000000);
	assert_true(f->longest_wait_us > 0);
	/* A pass that was begun meanwhile is not interrupted. */
	assert_in_range(f->longest_wait_us, 1, f->cap_us + 8 * PASS_US);
	afd__arrivals_destroy(&f->arrivals);
}

static void a_slow_peer_does_not_set_the_pace_of_a_quick_one(void **state)
{
	struct flow *f = flow_create(
		2, 8, &(struct flow_peer){ .think_us = 50, .spread_us = 20, .between_us = 50 });
	double cycle_us;

	f->peers[1].think_us = 1900;
	flow_until(f, 1000000, 3000000);
	cycle_us = 2000000.0 / (double)f->peers[0].n_passes;
	print_message("quick peer: %.0f us a layer, alone 160\n", cycle_us);
	assert_true(cycle_us < 2 * 160);
	afd__arrivals_destroy(&f->arrivals);
}

static void a_peer_that_stops_costs_the_others_one_wait(void **state)
{
	struct flow *f = flow_create(
		2, 8, &(struct flow_peer){ .think_us = 50, .spread_us = 20, .between_us = 50 });
	double cycle_us;

	f->peers[1].end_us = 1000000;
	flow_until(f, 1010000, 1110000);
	cycle_us = 100000.0 / (double)f->peers[0].n_passes;
	assert_true(cycle_us < 180);
	assert_int_equal(f->longest_wait_us, 0);
	afd__arrivals_destroy(&f->arrivals);
}

static void a_peer_that_joins_late_is_met(void **state)
{
	struct flow *f = flow_create(
		4, 28, &(struct flow_peer){ .think_us = 100, .spread_us = 50, .between_us = 300 });

	f->peers[3].next_us = 1003000;
	flow_until(f, 1200000, 2000000);
	assert_true(rows_per_pass(f) > 3.5);
	afd__arrivals_destroy(&f->arrivals);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(peers_of_one_rhythm_meet_in_one_pass),
		cmocka_unit_test(no_rows_wait_longer_than_the_cap_for_others),
		cmocka_unit_test(a_slow_peer_does_not_set_the_pace_of_a_quick_one),
		cmocka_unit_test(a_peer_that_stops_costs_the_others_one_wait),
		cmocka_unit_test(a_peer_that_joins_late_is_met),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
