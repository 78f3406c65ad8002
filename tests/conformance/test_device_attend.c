/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention against a reference in double, and its law: the bits of a row depend on nothing but
 * what it sees. The same rows are run with other page sizes, layouts, neighbours and threads.
 *
 * Every position that no row sees is NaN in the cache, so that a read of it shows.
 */
#include "rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { N_SEQUENCES = 3, N_POSITIONS = 200, MAX_ROWS = 24 };

struct attend_case {
	const char *name;
	uint32_t head_dim, n_heads, n_kv;
	int32_t dtype;
	uint32_t window;
};

static const struct attend_case cases[] = {
	{ "two heads on one, bf16", 64, 4, 2, AFD_DTYPE_BF16, 0 },
	{ "one head each, f32", 32, 2, 2, AFD_DTYPE_F32, 0 },
	{ "a head of 24, f16", 24, 6, 2, AFD_DTYPE_F16, 0 },
	{ "seven heads on one, head of 80", 80, 7, 1, AFD_DTYPE_BF16, 0 },
	{ "a head of 2", 2, 3, 1, AFD_DTYPE_F32, 0 },
	{ "a head of 34, three on one", 34, 6, 2, AFD_DTYPE_F32, 0 },
	{ "window of 1", 16, 2, 1, AFD_DTYPE_BF16, 1 },
	{ "window of 64", 48, 4, 2, AFD_DTYPE_F32, 64 },
	{ "window of 77, f16", 128, 4, 2, AFD_DTYPE_F16, 77 },
	{ "window longer than all", 16, 2, 1, AFD_DTYPE_F32, 5000 },
	{ "fp8", 64, 4, 2, AFD_DTYPE_FP8, 0 },
	{ "fp8, five on one, window of 70", 128, 5, 1, AFD_DTYPE_FP8, 70 },
	{ "fp8, a head of 22", 22, 4, 4, AFD_DTYPE_FP8, 0 },
	{ "ten heads on one, bf16", 48, 10, 1, AFD_DTYPE_BF16, 0 },
};
#define N_CASES (sizeof(cases) / sizeof(cases[0]))

/* How the same rows are presented. */
struct how {
	uint32_t page_size, n_threads, first_row, n_rows;
	bool heads_inside;
	uint32_t run_rows;
};

struct rows {
	uint32_t n;
	int32_t sequence[MAX_ROWS], position[MAX_ROWS];
};
static const struct rows mixed_rows = { 12, { 0, 1, 2, 0, 0, 1, 1, 2, 2, 2, 0, 1 },
	{ 0, 1, 5, 62, 63, 64, 65, 127, 128, 130, 198, 199 } };
enum { MANY = 1 << 20 }; /* of run_rows: no device has reason to take rows one by one */

/* Chunks of two sequences, of 17 rows and of 7, whose positions go on where the first ends. */
static const struct rows *chunk_rows(void)
{
	static struct rows rows = { .n = MAX_ROWS };

	for (uint32_t i = 0; i < MAX_ROWS; i++) {
		rows.sequence[i] = i < 17;
		rows.position[i] = (int32_t)(176 + i);
	}
	return &rows;
}

struct data {
	const struct attend_case *c;
	const struct rows *rows;
	float scale;
	float *q;  /* [MAX_ROWS][n_heads + 2 n_kv][head_dim]; k and v parts are poison */
	float kv_scale[2]; /* of FP8: powers of two, so that numbers come back exactly */
	float *kv; /* [2][N_SEQUENCES][N_POSITIONS][n_kv][head_dim], rounded to the dtype */
};

static size_t kv_at(
	const struct attend_case *c, int which, size_t sequence, size_t position, size_t head)
{
	return ((((size_t)which * N_SEQUENCES + sequence) * N_POSITIONS + position) * c->n_kv +
		       head) *
	       c->head_dim;
}

static bool sees(const struct data *t, uint32_t row, uint32_t position)
{
	uint32_t last = (uint32_t)t->rows->position[row], window = t->c->window;

	return position <= last && (!window || last - position < window);
}

static void data_make(
	struct data *t, const struct attend_case *c, const struct rows *rows, float scale)
{
	struct rig source = { .random = 777 };
	size_t row_width = (size_t)(c->n_heads + 2 * c->n_kv) * c->head_dim,
	       n = kv_at(c, 2, 0, 0, 0);

	*t = (struct data){
		.c = c, .rows = rows, .scale = scale, .q = malloc(MAX_ROWS * row_width * 4),
		.kv = malloc(n * 4)
	};
	t->kv_scale[0] = c->dtype == AFD_DTYPE_FP8 ? exp2f(floorf(log2f(scale)) - 2) : 1;
	t->kv_scale[1] = c->dtype == AFD_DTYPE_FP8 ? exp2f(floorf(log2f(scale)) - 1) : 1;
	memset(t->q, 0xff, MAX_ROWS * row_width * 4);
	for (size_t row = 0; row < MAX_ROWS; row++)
		rig_fill(&source, t->q + row * row_width, (size_t)c->n_heads * c->head_dim, scale);
	for (size_t i = 0; i < n; i++) {
		float kv_scale = t->kv_scale[i >= n / 2];
		char number[4];

		rig_encode(number, 0, c->dtype, rig_random(&source, scale) / kv_scale);
		t->kv[i] = (float)rig_decode(number, 0, c->dtype) * kv_scale;
	}
}

static void data_free(struct data *t)
{
	free(t->q);
	free(t->kv);
}

static struct afd__kv_view view_of(const struct attend_case *c, const struct how *how, void *pages)
{
	size_t head = c->head_dim * rig_bytes(c->dtype);
	struct afd__kv_view kv = { .data = pages,
		.page_size = how->page_size,
		.n_kv_heads = c->n_kv,
		.head_dim = c->head_dim,
		.dtype = c->dtype };

	kv.head_stride = how->heads_inside ? head : how->page_size * head;
	kv.position_stride = how->heads_inside ? c->n_kv * head : head;
	kv.v_offset = c->n_kv * how->page_size * head;
	kv.page_stride = 2 * kv.v_offset;
	return kv;
}

/* Writes what the rows see into pages, which are shuffled: page p of all lies at (p * 7 + 3) % n.
 */
static void fill_pages(const struct data *t, const struct how *how, char *pages, int32_t *table,
	uint32_t pages_each)
{
	const struct attend_case *c = t->c;
	struct afd__kv_view kv = view_of(c, how, pages);
	uint32_t n_pages = N_SEQUENCES * pages_each + (N_SEQUENCES * pages_each % 7 == 0);

	for (uint32_t p = 0; p < N_SEQUENCES * pages_each; p++)
		table[p] = (int32_t)((p * 7 + 3) % n_pages);
	for (uint32_t row = how->first_row; row < how->first_row + how->n_rows; row++) {
		size_t sequence = (size_t)t->rows->sequence[row];

		for (uint32_t position = 0; position < N_POSITIONS; position++) {
			size_t page =
				(size_t)table[sequence * pages_each + position / how->page_size];

			for (uint32_t head = 0; head < c->n_kv && sees(t, row, position); head++) {
				char *at = pages + page * kv.page_stride +
					   position % how->page_size * kv.position_stride +
					   head * kv.head_stride;

				for (uint32_t d = 0; d < c->head_dim; d++) {
					rig_encode(at, d, c->dtype,
						t->kv[kv_at(c, 0, sequence, position, head) + d] /
							t->kv_scale[0]);
					rig_encode(at + kv.v_offset, d, c->dtype,
						t->kv[kv_at(c, 1, sequence, position, head) + d] /
							t->kv_scale[1]);
				}
			}
		}
	}
}

/* out: [how->n_rows][n_heads][head_dim] */
static void run(const struct data *t, const struct how *how, float *out)
{
	const struct attend_case *c = t->c;
	struct rig *r = rig_make(how->n_threads);
	uint32_t pages_each = (N_POSITIONS + how->page_size - 1) / how->page_size,
		 n_rows = how->n_rows;
	size_t page_bytes =
		2 * (size_t)c->n_kv * how->page_size * c->head_dim * rig_bytes(c->dtype);
	size_t pool_bytes = (N_SEQUENCES * pages_each + 1) * page_bytes,
	       row_width = (size_t)(c->n_heads + 2 * c->n_kv) * c->head_dim;
	size_t out_bytes = n_rows * c->n_heads * c->head_dim * 4;
	char *pages = malloc(pool_bytes);
	int32_t *table = malloc(N_SEQUENCES * pages_each * 4);

	memset(pages, 0xff, pool_bytes);
	fill_pages(t, how, pages, table, pages_each);
	struct afd__attend_args a = {
		.qkv = rig_input(r, t->q + how->first_row * row_width, n_rows * row_width * 4),
		.positions = rig_input(r, t->rows->position + how->first_row, n_rows * 4),
		.sequences = rig_input(r, t->rows->sequence + how->first_row, n_rows * 4),
		.page_table = rig_input(r, table, N_SEQUENCES * pages_each * 4),
		.out = rig_output(r, out_bytes),
		.kv = view_of(c, how, rig_input(r, pages, pool_bytes)),
		.n_rows = n_rows,
		.n_heads = c->n_heads,
		.table_stride = pages_each,
		.window = c->window,
		.scale = 1 / sqrtf((float)c->head_dim),
		.run_rows = how->run_rows,
	};
	a.kv.k_scale = t->kv_scale[0];
	a.kv.v_scale = t->kv_scale[1];
	RIG_OK(afd__attend(&r->q, &a));
	rig_fetch(r, out, a.out, out_bytes);
	rig_end(r);
	free(pages);
	free(table);
}

/* One head of one row, in double. */
static void reference(const struct data *t, uint32_t row, uint32_t head, double *out)
{
	const struct attend_case *c = t->c;
	size_t sequence = (size_t)t->rows->sequence[row], kv_head = head / (c->n_heads / c->n_kv);
	const float *q = t->q + ((size_t)row * (c->n_heads + 2 * c->n_kv) + head) * c->head_dim;
	double score[N_POSITIONS], largest = -INFINITY, total = 0;

	memset(out, 0, c->head_dim * sizeof(*out));
	for (uint32_t j = 0; j < N_POSITIONS; j++) {
		score[j] = 0;
		for (uint32_t d = 0; d < c->head_dim; d++)
			score[j] += (double)q[d] * t->kv[kv_at(c, 0, sequence, j, kv_head) + d] /
				    sqrt(c->head_dim);
		if (sees(t, row, j) && score[j] > largest)
			largest = score[j];
	}
	for (uint32_t j = 0; j < N_POSITIONS; j++)
		total += sees(t, row, j) ? exp(score[j] - largest) : 0;
	for (uint32_t j = 0; j < N_POSITIONS; j++) {
		for (uint32_t d = 0; d < c->head_dim && sees(t, row, j); d++)
			out[d] += exp(score[j] - largest) / total *
				  t->kv[kv_at(c, 1, sequence, j, kv_head) + d];
	}
}

static void agrees(const struct rows *rows, uint32_t run_rows)
{
	const struct how how = {
		.page_size = 16, .n_threads = 2, .n_rows = rows->n, .run_rows = run_rows
	};
	static float got[MAX_ROWS * 10 * 128];
	double want[128];

	for (size_t i = 0; i < N_CASES * RIG_N_KINDS; i++) {
		const struct attend_case *c = &cases[i / RIG_N_KINDS];
		float scale =
			(c->dtype == AFD_DTYPE_F16 ? rig_kinds_f16 : rig_kinds)[i % RIG_N_KINDS]
				.scale;
		/* Two bf16 carry q and the weights on a GPU (docs/kernels.md). */
		bool is_pair = !strncmp(rig_device_name(), "cuda", 4) && c->dtype == AFD_DTYPE_BF16;
		double unit = is_pair ? 3e-5 : 5e-6;
		struct data t;

		data_make(&t, c, rows, scale);
		run(&t, &how, got);
		for (uint32_t head = 0; head < rows->n * c->n_heads; head++) {
			reference(&t, head / c->n_heads, head % c->n_heads, want);
			for (uint32_t d = 0; d < c->head_dim; d++)
				rig_near(got[head * c->head_dim + d], want[d], 0,
					unit * (double)scale, c->name, head);
		}
		data_free(&t);
	}
}

static void attention_agrees_with_double_in_every_case_and_kind(void **state)
{
	agrees(&mixed_rows, 0);
}

static void attention_of_chunks_agrees_with_double_in_every_case_and_kind(void **state)
{
	agrees(chunk_rows(), MANY);
}

/* The same rows in another way: the same bits. */
static void same_bits_of(const struct rows *rows, const struct how *how)
{
	const struct how usual = { .page_size = 16, .n_threads = 2, .n_rows = rows->n };
	static float all[MAX_ROWS * 10 * 128], other[MAX_ROWS * 10 * 128];

	for (size_t i = 0; i < N_CASES; i++) {
		size_t row_floats = (size_t)cases[i].n_heads * cases[i].head_dim;
		struct data t;

		data_make(&t, &cases[i], rows, 1);
		run(&t, &usual, all);
		run(&t, how, other);
		if (memcmp(all + how->first_row * row_floats, other, how->n_rows * row_floats * 4))
			fail_msg("%s: other bits", cases[i].name);
		data_free(&t);
	}
}

static void same_bits(const struct how *how)
{
	same_bits_of(&mixed_rows, how);
}

static void the_page_size_does_not_show(void **state)
{
	const uint32_t sizes[] = { 1, 5, 64, 1000 };

	for (size_t i = 0; i < 4; i++)
		same_bits(
			&(struct how){ .page_size = sizes[i], .n_threads = 2, .n_rows = mixed_rows.n });
}

static void the_layout_of_a_page_does_not_show(void **state)
{
	same_bits(&(struct how){
		.page_size = 16, .n_threads = 2, .n_rows = mixed_rows.n, .heads_inside = true });
}

static void the_number_of_threads_does_not_show(void **state)
{
	same_bits(&(struct how){ .page_size = 16, .n_threads = 1, .n_rows = mixed_rows.n });
	same_bits(&(struct how){ .page_size = 16, .n_threads = 5, .n_rows = mixed_rows.n });
}

/* Alone, the positions that only others saw are NaN: they are not even looked at. */
static void a_row_alone_has_the_bits_that_it_has_among_others(void **state)
{
	for (uint32_t row = 0; row < mixed_rows.n; row++)
		same_bits(&(struct how){
			.page_size = 7, .n_threads = 2, .first_row = row, .n_rows = 1 });
}

static void a_row_of_a_chunk_has_the_bits_that_it_has_alone(void **state)
{
	same_bits_of(chunk_rows(),
		&(struct how){ .page_size = 16, .n_threads = 2, .n_rows = MAX_ROWS, .run_rows = MANY });
	same_bits_of(chunk_rows(), &(struct how){ .page_size = 5, .n_threads = 2, .first_row = 3,
					   .n_rows = 20, .run_rows = MANY });
	same_bits_of(chunk_rows(), &(struct how){ .page_size = 16, .n_threads = 2, .first_row = 15,
					   .n_rows = 1 });
}

/* A hint that is wrong costs time, and nothing else. */
static void rows_that_do_not_follow_each_other_may_be_called_a_chunk(void **state)
{
	same_bits(&(struct how){
		.page_size = 16, .n_threads = 2, .n_rows = mixed_rows.n, .run_rows = MANY });
}

static void nan_in_what_a_row_sees_reaches_its_output(void **state)
{
	const struct how usual = { .page_size = 16, .n_threads = 2, .n_rows = mixed_rows.n };
	static float got[MAX_ROWS * 8 * 128];
	struct data t;

	data_make(&t, &cases[0], &mixed_rows, 1);
	t.kv[kv_at(t.c, 0, 2, 5, 1)] =
		NAN; /* k of kv head 1, sequence 2, position 5: row 2 and all later ones */
	run(&t, &usual, got);
	for (uint32_t head = 0; head < mixed_rows.n * t.c->n_heads; head++) {
		bool hit = t.rows->sequence[head / t.c->n_heads] == 2 && head % t.c->n_heads >= 2;

		assert_int_equal(isnan(got[head * t.c->head_dim + 9]) != 0, hit);
	}
	data_free(&t);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(attention_agrees_with_double_in_every_case_and_kind),
		cmocka_unit_test(the_page_size_does_not_show),
		cmocka_unit_test(the_layout_of_a_page_does_not_show),
		cmocka_unit_test(the_number_of_threads_does_not_show),
		cmocka_unit_test(a_row_alone_has_the_bits_that_it_has_among_others),
		cmocka_unit_test(attention_of_chunks_agrees_with_double_in_every_case_and_kind),
		cmocka_unit_test(a_row_of_a_chunk_has_the_bits_that_it_has_alone),
		cmocka_unit_test(rows_that_do_not_follow_each_other_may_be_called_a_chunk),
		cmocka_unit_test(nan_in_what_a_row_sees_reaches_its_output),
	};

	return RIG_RUN(tests);
}
