/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routed experts: plan, the product with gate and up, activation, the product with down, and the
 * weighted sum of a row's slots, ascending. Rows go in chunks for which there is scratch. Products
 * run on tensor cores where the weights lie for it (tile.h), else plainly, a warp per column.
 *
 * Invariant: a (row, slot) is computed alone, so neither chunks nor other rows show.
 */
#include "group.h"
#include "tile.h"

enum { WARPS = 4, MAX_ENTRIES = 8192, ALIGNMENT = 256 };

/* ---- kernels ---- */

/* y of a task's entries = their x w^T; x rows by `rows`, or entry by entry when it is NULL. */
struct grouped {
	struct product p; /* of the stack's first matrix */
	size_t w_stride, scales_stride; /* from matrix to matrix, in bytes */
	const uint32_t *rows, *n_tasks;
	const expert_task *tasks;
};

template <class T>
GPU_FN float dot(const struct product &p, const T *w, const float *x, unsigned n)
{
	float sum = 0;

	for (unsigned from = 0, end = p.k; from < p.k; from = end) {
		unsigned block = (p.column_offset + from) / GPU_BLOCK;
		float part = 0;

		if (sizeof(T) == 1)
			end = least((block + 1) * GPU_BLOCK - p.column_offset, p.k);
		for (unsigned k = from + lane_id(); k < end; k += 32)
			part = fmaf(x[k], to_float(w[k]), part);
		sum = sizeof(T) == 1 ? fmaf(part, *scale_at(p, n, block), sum) : part;
	}
	return warp_sum(sum);
}

template <class T> GPU_KERNEL(WARPS * 32) grouped_plain_kernel(grouped g)
{
	unsigned n = block_x() * WARPS + warp_id();
	struct product p = g.p;

	if (block_y() >= *g.n_tasks || n >= p.n) /* the whole warp */
		return;
	expert_task task = g.tasks[block_y()];
	const T *w = (const T *)(p.w + task.expert * g.w_stride + n * p.w_row_bytes);

	if (p.scales)
		p.scales = (const float *)((const char *)p.scales + task.expert * g.scales_stride);
	for (unsigned i = task.first; i < task.first + task.n_entries; i++) {
		size_t row = g.rows ? g.rows[i] : i;
		float sum = dot(p, w, p.x + row * p.x_stride, n);

		if (lane_id() == 0)
			p.y[i * p.y_stride + n] = sum;
	}
}

/* A warp per group of 128 columns of an entry, in place of the gate. */
GPU_KERNEL(WARPS * 32)
activate_kernel(float *gate_up, const uint32_t *n_entries, unsigned width, unsigned width_offset,
	int quantize)
{
	unsigned group = block_y() * WARPS + warp_id();
	float *gate = gate_up + (size_t)block_x() * 2 * width, *up = gate + width, v[GROUP_LANE];

	if (block_x() >= *n_entries || group >= groups_of(width_offset, width)) /* the warp */
		return;
	group_range range = group_at(group, width_offset, width);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		unsigned at = group_column(range, i);

		v[i] = at < range.end ? gate[at] / (1 + expf(-gate[at])) * up[at] : 0;
	}
	if (quantize)
		group_quantize(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		if (group_column(range, i) < range.end)
			gate[group_column(range, i)] = v[i];
	}
}

GPU_KERNEL(WARPS * 32) quantize_rows_kernel(const float *x, float *out, unsigned width)
{
	unsigned group = block_y() * WARPS + warp_id();
	float v[GROUP_LANE];

	if (group >= groups_of(0, width)) /* the whole warp */
		return;
	group_range range = group_at(group, 0, width);
	x += (size_t)block_x() * width;
	out += (size_t)block_x() * width;
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = group_column(range, i) < range.end ? x[group_column(range, i)] : 0;
	group_quantize(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		if (group_column(range, i) < range.end)
			out[group_column(range, i)] = v[i];
	}
}

GPU_KERNEL(256) combine_kernel(experts e, int accumulate)
{
	unsigned i = block_y() * 256 + thread_x();
	size_t row = block_x();
	const int32_t *entries = e.entries + ((size_t)e.n_rows + row) * e.top_k; /* those found */
	float sum;

	if (i >= e.hidden)
		return;
	sum = accumulate ? e.y[row * e.hidden + i] : 0;
	for (unsigned slot = 0; slot < e.top_k; slot++) {
		if (entries[slot] >= 0)
			sum = fmaf(e.weights[row * e.top_k + slot],
				e.out[(size_t)entries[slot] * e.hidden + i], sum);
	}
	e.y[row * e.hidden + i] = sum;
}

/* ---- scratch ---- */

/* Takes a piece; with memory NULL it only counts. *bytes is SIZE_MAX once it overflowed. */
template <class T> static T *take(char *memory, size_t *bytes, size_t n, size_t each)
{
	size_t more, at = *bytes;

	if (at == SIZE_MAX || __builtin_mul_overflow(n, each * sizeof(T), &more) ||
		more > SIZE_MAX / 4 || at > SIZE_MAX / 4) {
		*bytes = SIZE_MAX;
		return NULL;
	}
	*bytes = divide_up(at + more, ALIGNMENT) * ALIGNMENT;
	return memory ? (T *)(memory + at) : NULL;
}

/* Rows of a task: about as many as an expert gets. */
static uint32_t task_rows_of(size_t n_entries, uint32_t n_stack)
{
	size_t each = n_entries / n_stack;

	return each <= 8 ? 8 : each <= 16 ? 16 : each <= 32 ? 32 : 64;
}

static struct tile_x take_inputs(
	char *memory, size_t *bytes, const struct afd__matrix *w, size_t n_rows)
{
	struct tile_x x = tile_shape(w);

	return tile_x_at(x, take<char>(memory, bytes, n_rows, x.row_bytes));
}

static size_t lay_out(experts *e, const struct afd__experts_args *a, uint32_t n_rows, char *memory)
{
	size_t n_entries = (size_t)n_rows * a->top_k, bytes = 0;

	*e = {};
	e->n_rows = n_rows;
	e->top_k = a->top_k;
	e->n_stack = a->gate_up.n_stack;
	e->hidden = a->down.n;
	e->width = a->down.k;
	e->first_expert = a->first_expert;
	/* Those quantise where they make inputs of FP8, with groups where the blocks of scales are. */
	e->on_tiles = tile_fits(&a->gate_up) && tile_fits(&a->down) &&
		      (!a->quantize || (a->gate_up.dtype == AFD_DTYPE_FP8 &&
					       a->gate_up.column_offset % TILE_K == 0 &&
					       a->down.dtype == AFD_DTYPE_FP8 &&
					       a->down.column_offset % TILE_K ==
						       a->width_offset % TILE_K));
	e->task_rows = task_rows_of(n_entries, e->n_stack);
	e->max_tasks = (uint32_t)(n_entries / e->task_rows +
		(n_entries < e->n_stack ? n_entries : e->n_stack));
	e->n_tasks = take<uint32_t>(memory, &bytes, 1, 1);
	e->n_entries = take<uint32_t>(memory, &bytes, 1, 1);
	e->first = take<uint32_t>(memory, &bytes, e->n_stack, 1);
	e->entries = take<int32_t>(memory, &bytes, n_entries, 2);
	e->rows = take<uint32_t>(memory, &bytes, n_entries, 1);
	e->tasks = take<expert_task>(memory, &bytes, e->max_tasks, 1);
	e->gate_up = take<float>(memory, &bytes, n_entries, 2 * (size_t)e->width);
	e->out = take<float>(memory, &bytes, n_entries, e->hidden);
	if (a->quantize && !e->on_tiles)
		e->x_quantized = take<float>(memory, &bytes, n_rows, e->hidden);
	if (e->on_tiles) {
		e->x_tiles = take_inputs(memory, &bytes, &a->gate_up, n_rows);
		e->activated_tiles = take_inputs(memory, &bytes, &a->down, n_entries);
	}
	return bytes == SIZE_MAX ? bytes : bytes + ALIGNMENT; /* to align what is given */
}

static uint32_t most_rows(const struct afd__experts_args *a)
{
	return a->top_k >= MAX_ENTRIES ? 1 : least(a->n_rows, MAX_ENTRIES / a->top_k);
}

size_t afd_gpu_experts_scratch_bytes(const struct afd__experts_args *a, int is_least)
{
	experts e;

	return lay_out(&e, a, is_least ? 1 : most_rows(a), NULL);
}

/* Rows of a chunk: as many as the scratch takes. */
static uint32_t chunk_rows(const struct afd__experts_args *a)
{
	uint32_t low = 1, high = most_rows(a);
	experts e;

	if (lay_out(&e, a, high, NULL) <= a->scratch_bytes)
		return high;
	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if (lay_out(&e, a, middle, NULL) <= a->scratch_bytes)
			low = middle;
		else
			high = middle;
	}
	return low;
}

/* ---- launches ---- */

/* y of each entry. x: [n_rows][x_stride] by `rows`, or of each entry when that is NULL. */
static int run_plain(const struct afd_gpu *gpu, const experts &e, const struct afd__matrix *w,
	const float *x, size_t x_stride, const uint32_t *rows, float *y)
{
	grouped g = { product_of(w), w->data_stride, w->scales_stride, rows, e.n_tasks, e.tasks };

	g.p.x = x;
	g.p.x_stride = x_stride;
	g.p.y = y;
	g.p.y_stride = w->n;
	return with_dtype(w->dtype, [&](auto t) {
		return gpu_launch(gpu, "grouped_plain", grouped_plain_kernel<decltype(t)>,
			{ (unsigned)divide_up(w->n, WARPS), e.max_tasks, 1 }, WARPS * 32, 0, g);
	});
}

/* The product over the tasks: of gate and up from e.x_tiles, of down from e.activated_tiles. */
static struct tile_work tile_work_of(
	const experts &e, const struct afd__matrix *w, const uint32_t *rows, float *y)
{
	struct tile_work t = {};

	t.p = product_of(w);
	t.p.y = y;
	t.p.y_stride = w->n;
	t.x = rows ? e.x_tiles : e.activated_tiles;
	t.lead = w->column_offset % TILE_K;
	t.n_slices = 1;
	t.rows = e.task_rows;
	t.tasks = e.tasks;
	t.n_tasks = e.n_tasks;
	t.max_tasks = e.max_tasks;
	t.x_rows = rows;
	t.w_stride = w->data_stride;
	t.scales_stride = w->scales_stride;
	return t;
}

/* Whether the first product ends in the inputs of the second. */
static bool is_fused(const struct afd__experts_args *a)
{
	return !a->quantize && a->down.dtype == AFD_DTYPE_BF16;
}

static int run_tiles(const struct afd_gpu *gpu, const experts &e, const struct afd__experts_args *a)
{
	struct tile_work up = tile_work_of(e, &a->gate_up, e.rows, e.gate_up),
			 down = tile_work_of(e, &a->down, NULL, e.out);
	tile_source x = { e.x, NULL, e.hidden, e.n_rows, NULL, a->quantize };
	tile_source activated = { e.gate_up, e.gate_up + e.width, 2 * (size_t)e.width,
		e.n_rows * e.top_k, e.n_entries, a->quantize };
	int rc;

	if (is_fused(a)) {
		up.half = e.width;
		up.activated = e.activated_tiles;
		up.activated_lead = down.lead;
	}
	rc = tile_inputs(gpu, &a->gate_up, &x, &up.x);
	if (!rc)
		rc = tile_product(gpu, &up);
	if (!rc && !is_fused(a))
		rc = tile_inputs(gpu, &a->down, &activated, &down.x);
	return rc ? rc : tile_product(gpu, &down);
}

static int run_plainly(
	const struct afd_gpu *gpu, const experts &e, const struct afd__experts_args *a)
{
	unsigned groups = groups_of(a->width_offset, e.width), entries = e.n_rows * e.top_k;
	const float *x = e.x;
	int rc = 0;

	if (a->quantize) {
		rc = gpu_launch(gpu, "experts_quantize", quantize_rows_kernel,
			{ e.n_rows, (unsigned)divide_up(groups_of(0, e.hidden), WARPS), 1 },
			WARPS * 32, 0, e.x, e.x_quantized, e.hidden);
		x = e.x_quantized;
	}
	if (!rc)
		rc = run_plain(gpu, e, &a->gate_up, x, e.hidden, e.rows, e.gate_up);
	if (!rc)
		rc = gpu_launch(gpu, "experts_activate", activate_kernel,
			{ entries, (unsigned)divide_up(groups, WARPS), 1 }, WARPS * 32, 0,
			e.gate_up, e.n_entries, e.width, a->width_offset, a->quantize);
	return rc ? rc : run_plain(gpu, e, &a->down, e.gate_up, 2 * (size_t)e.width, NULL, e.out);
}

static int run_chunk(const struct afd_gpu *gpu, const experts &e, const struct afd__experts_args *a)
{
	int rc = experts_plan(gpu, e);

	if (!rc)
		rc = e.on_tiles ? run_tiles(gpu, e, a) : run_plainly(gpu, e, a);
	if (!rc)
		rc = gpu_launch(gpu, "experts_combine", combine_kernel,
			{ e.n_rows, (unsigned)divide_up(e.hidden, 256), 1 }, 256, 0, e,
			a->accumulate);
	return rc;
}

int afd_gpu_experts(const struct afd_gpu *gpu, const struct afd__experts_args *a)
{
	char *memory = (char *)a->scratch + -(uintptr_t)a->scratch % ALIGNMENT;
	uint32_t chunk = chunk_rows(a);
	int rc = 0;

	for (uint32_t row = 0; !rc && row < a->n_rows; row += chunk) {
		experts e;

		lay_out(&e, a, least(chunk, a->n_rows - row), memory);
		e.x = a->x + (size_t)row * e.hidden;
		e.y = a->y + (size_t)row * e.hidden;
		e.ids = a->ids + (size_t)row * e.top_k;
		e.weights = a->weights + (size_t)row * e.top_k;
		rc = run_chunk(gpu, e, a);
	}
	return rc;
}
