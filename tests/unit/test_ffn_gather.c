/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gather decision as a table: who waits where, who is expected when, and what is to be run.
 * Times are microseconds after 1 s; a pass takes 100, a source's cycle 200 and its step 1000 unless
 * the case says otherwise.
 */
#include "../../lib/ffn/gather.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <string.h>

#define AT(us) (UINT64_C(1000000000) + UINT64_C(1000) * (us))
#define NEVER  UINT32_MAX
#define END    { .peer = NEVER }
#define CYCLE  .cycle_us = 200, .step_us = 1000

struct source {
	uint32_t peer, layer, n_rows, at_us, due_us, cycle_us, step_us;
};

struct choice_case {
	const char *name;
	uint32_t cap_us, n_layers, now_us;
	struct source sources[9]; /* ends with END */
	int32_t layer;
	uint32_t until_us;
	uint32_t step_cap_us; /* less than the cap counts as the cap */
};

/* Rows that wait since then; a source that is expected then, and not waited for later than that. */
#define ROWS(p, l, since)    { .peer = p, .layer = l, .n_rows = 1, .at_us = since, CYCLE }
#define COMES(p, l, at, due) { .peer = p, .layer = l, .at_us = at, .due_us = due, CYCLE }

static const struct choice_case cases[] = {
	{ "nobody is there: nothing is to be done", 2000, 8, 0, { END }, -1, NEVER },
	{ "nothing waits: nothing is to be done, whoever comes", 2000, 8, 0,
		{ COMES(0, 1, 50, 90), END }, -1, NEVER },
	{ "a single peer never waits", 2000, 8, 0, { ROWS(0, 3, 0), END }, 3, 0 },
	{ "all peers are here: they run", 2000, 8, 10, { ROWS(0, 3, 0), ROWS(1, 3, 5), END }, 3,
		0 },
	{ "a peer of the same layer is waited for until it is overdue", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 3, 100, 150), END }, -1, 150 },
	{ "a peer that is overdue is not waited for", 2000, 8, 160,
		{ ROWS(0, 3, 0), COMES(1, 3, 100, 150), END }, 3, 0 },
	{ "a peer that is late but not overdue is waited for", 2000, 8, 120,
		{ ROWS(0, 3, 0), COMES(1, 3, 100, 150), END }, -1, 150 },
	{ "the slowest of those that come in time counts", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 3, 100, 150), COMES(2, 3, 300, 400), END }, -1, 400 },
	{ "a peer that comes after three cycles is not waited for", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 3, 700, 900), END }, 3, 0 },
	{ "the wait is cut at three cycles", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 3, 500, 900), END }, -1, 600 },
	{ "the wait is cut at the cap", 400, 8, 10, { ROWS(0, 3, 0), COMES(1, 3, 300, 900), END },
		-1, 400 },
	{ "with a cap of 0 nobody waits", 0, 8, 10, { ROWS(0, 3, 0), COMES(1, 3, 20, 30), END }, 3,
		0 },
	{ "a wait that is over is over", 2000, 8, 600,
		{ ROWS(0, 3, 0), COMES(1, 3, 590, 900), END }, 3, 0 },
	{ "rows whose cycle is not known wait up to the cap", 2000, 8, 10,
		{ { .peer = 0, .layer = 3, .n_rows = 1 }, COMES(1, 3, 1500, 2500), END }, -1,
		2000 },
	{ "a full pass does not wait", 2000, 8, 10,
		{ { .peer = 0, .layer = 3, .n_rows = 64, CYCLE }, COMES(1, 3, 20, 30), END }, 3,
		0 },
	{ "a peer that is ahead is not waited for", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 4, 20, 30), END }, 3, 0 },
	{ "rows wait for a peer one layer behind", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 2, 100, 150), END }, -1, 600 },
	{ "rows do not wait for a peer that cannot catch up in time", 2000, 8, 10,
		{ ROWS(0, 4, 0), COMES(1, 1, 100, 150), END }, 4, 0 },
	{ "rows that are behind run first, so that they catch up", 2000, 8, 10,
		{ ROWS(0, 3, 0), ROWS(1, 2, 5), END }, 2, 0 },
	{ "rows too far behind wait for their turn", 2000, 8, 10,
		{ ROWS(0, 6, 0), ROWS(1, 2, 5), END }, 6, 0 },
	{ "rows are not held up twice: after their wait they run first", 2000, 8, 610,
		{ ROWS(0, 3, 0), ROWS(1, 2, 605), END }, 3, 0 },
	{ "the oldest rows run first when nobody is worth a wait", 300, 64, 10,
		{ ROWS(0, 20, 4), ROWS(1, 40, 2), ROWS(2, 60, 3), END }, 40, 0 },
	{ "while rows wait, those of a layer that nobody comes to run", 2000, 64, 10,
		{ ROWS(0, 3, 0), ROWS(1, 40, 5), COMES(2, 3, 100, 150), END }, 40, 0 },
	{ "a peer between two steps is behind the first layer of nobody", 2000, 8, 10,
		{ ROWS(0, 7, 0), COMES(1, 0, 100, 150), END }, 7, 0 },
	{ "rows of a new step wait for a peer between two steps", 2000, 8, 10,
		{ ROWS(0, 0, 0), COMES(1, 0, 700, 800), END }, -1, 800 },
	{ "rows of a new step wait for a peer at the end of the old one, its way between steps "
	  "included",
		2000, 8, 10, { ROWS(0, 0, 0), COMES(1, 7, 700, 800), END }, -1, 2000 },
	{ "rows of a new step do not wait for a peer that is not through the old one in time", 2000,
		8, 10, { ROWS(0, 0, 0), COMES(1, 7, 1100, 1200), END }, 0, 0 },
	{ "the first rows of a step wait for half of their time between steps", 2000, 8, 10,
		{ { .peer = 0, .n_rows = 1, .cycle_us = 200, .step_us = 10000 },
			COMES(1, 0, 4000, 9000), END },
		-1, 5000, 20000 },
	{ "the first rows of a step do not wait for more than that", 2000, 8, 10,
		{ { .peer = 0, .n_rows = 1, .cycle_us = 200, .step_us = 10000 },
			COMES(1, 0, 5001, 9000), END },
		0, 0, 20000 },
	{ "the first rows of a step do not wait beyond the step's cap", 2000, 8, 10,
		{ { .peer = 0, .n_rows = 1, .cycle_us = 200, .step_us = 10000 },
			COMES(1, 0, 4000, 9000), END },
		0, 0, 3000 },
	{ "halves of the circle: the lower layer counts as behind, and somebody runs", 4000, 2, 10,
		{ ROWS(0, 0, 0), ROWS(1, 1, 5), END }, 0, 0 },
	{ "one layer: the next step is the same layer", 2000, 1, 10,
		{ ROWS(0, 0, 0), COMES(1, 0, 100, 150), END }, -1, 150 },
	{ "a lane does not wait for another lane of its peer", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(0, 3, 100, 150), END }, 3, 0 },
	{ "of another peer one lane is waited for, the sooner", 2000, 8, 10,
		{ ROWS(0, 3, 0), COMES(1, 3, 100, 150), COMES(1, 3, 300, 350), END }, -1, 150 },
	{ "lanes that wait at one layer run together", 2000, 8, 10,
		{ ROWS(0, 3, 0), ROWS(0, 3, 5), ROWS(1, 3, 6), END }, 3, 0 },
	{ "four peers: the last one is waited for", 2000, 8, 10,
		{ ROWS(0, 3, 0), ROWS(1, 3, 2), ROWS(2, 3, 4), COMES(3, 3, 50, 200), END }, -1,
		200 },
	{ "four peers: one that stalls costs its due time and no more", 2000, 8, 201,
		{ ROWS(0, 3, 0), ROWS(1, 3, 2), ROWS(2, 3, 4), COMES(3, 3, 50, 200), END }, 3, 0 },
};

static uint32_t sources_of(const struct choice_case *c, struct afd__gather_source *sources)
{
	uint32_t n = 0;

	for (const struct source *s = c->sources; s->peer != NEVER; s++) {
		sources[n++] = (struct afd__gather_source){
			.peer = s->peer,
			.layer = s->layer,
			.n_rows = s->n_rows,
			.at_ns = AT(s->at_us),
			.turn_ns = AT(s->at_us),
			.due_ns = AT(s->due_us),
			.cycle_ns = s->cycle_us * UINT64_C(1000),
			.step_ns = s->step_us * UINT64_C(1000),
		};
	}
	return n;
}

static void each_case_gives_its_choice(void **state)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const struct choice_case *c = &cases[i];
		struct afd__gather_rule rule = {
			.cap_ns = c->cap_us * UINT64_C(1000),
			.pass_ns = 100000,
			.n_layers = c->n_layers,
			.full_rows = 64,
			.step_cap_ns = c->step_cap_us * UINT64_C(1000),
		};
		struct afd__gather_source sources[9];
		struct afd__gather_choice choice;
		uint32_t n_sources = sources_of(c, sources);

		print_message("%s\n", c->name);
		afd__gather_choose(&rule, sources, n_sources, AT(c->now_us), &choice);
		assert_int_equal(choice.layer, c->layer);
		if (choice.layer < 0)
			assert_int_equal(choice.until_ns,
				c->until_us == NEVER ? UINT64_MAX : AT(c->until_us));
	}
}

/* ---- properties, over sources that are drawn ---- */

static uint32_t draw(uint64_t *seed, uint32_t below)
{
	*seed = *seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (uint32_t)(*seed >> 33) % below;
}

static uint32_t draw_sources(uint64_t *seed, struct afd__gather_source *sources, uint32_t n_layers)
{
	uint32_t n = 1 + draw(seed, 16);

	for (uint32_t i = 0; i < n; i++) {
		sources[i] = (struct afd__gather_source){
			.peer = i / 2,
			.layer = draw(seed, n_layers),
			.n_rows = draw(seed, 3),
			.at_ns = AT(draw(seed, 3000)),
			.due_ns = AT(draw(seed, 6000)),
			.cycle_ns = 1000 * draw(seed, 2000),
			.step_ns = 1000 * draw(seed, 4000),
		};
		sources[i].turn_ns = sources[i].at_ns + 1000 * draw(seed, 500);
	}
	return n;
}

static void rows_never_wait_longer_than_the_cap(void **state)
{
	struct afd__gather_source sources[16];
	struct afd__gather_choice choice;
	uint64_t seed = 1;

	for (int round = 0; round < 20000; round++) {
		struct afd__gather_rule rule = { .cap_ns = 1000 * draw(&seed, 3000),
			.pass_ns = 100000,
			.n_layers = 1 + draw(&seed, 40),
			.full_rows = 64 };
		uint32_t n = draw_sources(&seed, sources, rule.n_layers);
		uint64_t first_turn = UINT64_MAX, now = AT(3500);

		for (uint32_t i = 0; i < n; i++) {
			if (sources[i].n_rows && sources[i].turn_ns < first_turn)
				first_turn = sources[i].turn_ns;
		}
		afd__gather_choose(&rule, sources, n, now, &choice);
		if (first_turn == UINT64_MAX)
			assert_int_equal(choice.until_ns, UINT64_MAX);
		else if (choice.layer < 0)
			assert_in_range(choice.until_ns, now + 1, first_turn + rule.cap_ns);
	}
}

static void what_is_chosen_waits_there(void **state)
{
	struct afd__gather_source sources[16];
	struct afd__gather_choice choice;
	uint64_t seed = 2;

	for (int round = 0; round < 20000; round++) {
		struct afd__gather_rule rule = { .cap_ns = 2000000,
			.pass_ns = 100000,
			.n_layers = 1 + draw(&seed, 40),
			.full_rows = 64 };
		uint32_t n = draw_sources(&seed, sources, rule.n_layers), n_rows = 0;

		afd__gather_choose(&rule, sources, n, AT(draw(&seed, 5000)), &choice);
		if (choice.layer < 0)
			continue;
		for (uint32_t i = 0; i < n; i++)
			n_rows +=
				sources[i].layer == (uint32_t)choice.layer ? sources[i].n_rows : 0;
		assert_int_not_equal(n_rows, 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_case_gives_its_choice),
		cmocka_unit_test(rows_never_wait_longer_than_the_cap),
		cmocka_unit_test(what_is_chosen_waits_there),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
