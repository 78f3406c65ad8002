/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations that are several in one: a SwiGLU with both its products, whose limit is the bytes of
 * three matrices, and the draw of an id, whose limit is one reading of the logits (it reads them
 * some ten times, from the cache where they fit).
 */
#include "ops.h"

#define VOCAB 151936 /* of Qwen3 */

struct run {
	struct bench_ops *o;
	struct afd__mlp_args mlp;
	struct afd__sample_args sample;
};

static json_t *cell_of(const char *op, const char *shape, uint32_t n_rows, int32_t dtype)
{
	return json_pack("{s:s, s:s, s:I, s:s}", "op", op, "shape", shape, "rows",
		(json_int_t)n_rows, "dtype", afd_dtype_name(dtype));
}

/* ---- SwiGLU ---- */

static int run_mlp(void *arg)
{
	struct run *r = arg;
	int rc;

	bench_take_cold(r->o, &r->mlp.gate_up);
	bench_take_cold(r->o, &r->mlp.down);
	rc = afd__mlp(&r->o->queue, &r->mlp);
	return rc ? rc : bench_finish(r->o);
}

static int make_rows(struct run *r, const struct bench_model *m, uint32_t n_rows)
{
	size_t n_x = (size_t)n_rows * m->hidden, n_wide = (size_t)n_rows * m->intermediate;
	void *x, *y, *gate_up, *activated;
	int rc = bench_upload_numbers(r->o, "mlp", n_x, &x);

	if (!rc)
		rc = bench_upload(r->o, n_x * 4, NULL, &y);
	if (!rc)
		rc = bench_upload(r->o, 2 * n_wide * 4, NULL, &gate_up);
	if (!rc)
		rc = bench_upload(r->o, n_wide * 4, NULL, &activated);
	if (rc)
		return rc;
	r->mlp.x = x;
	r->mlp.y = y;
	r->mlp.gate_up_rows = gate_up;
	r->mlp.activated = activated;
	return 0;
}

static int measure_mlp(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_mlp);
	struct run r = { .o = o };
	struct bench_work work = { 0 };
	int status = TOOL_DONE;

	r.mlp.gate_up = bench_packed(o, 2 * m->intermediate, m->hidden);
	r.mlp.down = bench_packed(o, m->hidden, m->intermediate);
	work.dram_bytes = (double)r.mlp.gate_up.bytes + (double)r.mlp.gate_up.scales_bytes +
			  (double)r.mlp.down.bytes + (double)r.mlp.down.scales_bytes;
	if (work.dram_bytes > (double)o->cold_bytes)
		return tool_fail(TOOL_FAILED,
			"mlp: %.0f bytes of weights, limit %zu: see --cold-gib", work.dram_bytes,
			o->cold_bytes);
	if (make_rows(&r, m, bench_list_max(&rows)))
		return bench_fail();
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		r.mlp.n_rows = rows.at[i];
		work.flops = 6.0 * rows.at[i] * m->hidden * m->intermediate;
		status = bench_measure(o->b, o->seconds,
			cell_of("mlp", m->name, rows.at[i], o->dtype), &work, run_mlp, &r);
	}
	return status;
}

const struct bench_op bench_mlp = { "mlp", 1, { 1, 8, 32, 128 }, 0, measure_mlp };

/* ---- the draw ---- */

static int run_sample(void *arg)
{
	struct run *r = arg;
	int rc;

	r->sample.logits = (const float *)bench_cold(
		r->o, (size_t)r->sample.n_rows * r->sample.width * sizeof(float));
	rc = afd__sample(&r->o->queue, &r->sample);
	return rc ? rc : bench_finish(r->o);
}

/* Of each row its own seed; top-k and top-p as engines' defaults have them. */
static int measure_sample(struct bench_ops *o, const struct bench_model *m)
{
	static struct afd__sample_row host[BENCH_ROWS_MAX];
	const struct bench_list rows = bench_rows_of(o, &bench_sample);
	uint32_t most = bench_list_max(&rows);
	struct run r = { .o = o, .sample = { .width = VOCAB } };
	int status = TOOL_DONE;
	void *dev, *ids;

	for (uint32_t i = 0; i < most; i++)
		host[i] = (struct afd__sample_row){ .seed = i, .position = i,
			.temperature = 0.6f, .top_p = 0.95f, .top_k = 20 };
	if ((size_t)most * VOCAB * sizeof(float) > o->cold_bytes)
		return tool_fail(TOOL_FAILED, "sample: %u rows of %d logits, limit %zu bytes: see "
			"--cold-gib", most, VOCAB, o->cold_bytes);
	if (bench_upload(o, most * sizeof host[0], host, &dev) ||
		bench_upload(o, most * sizeof(int32_t), NULL, &ids))
		return bench_fail();
	r.sample.rows = dev;
	r.sample.ids = ids;
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		struct bench_work work = { .dram_bytes = 4.0 * VOCAB * rows.at[i],
			.flops = 8.0 * VOCAB * rows.at[i] };

		r.sample.n_rows = rows.at[i];
		status = bench_measure(o->b, o->seconds,
			cell_of("sample", m->name, rows.at[i], AFD_DTYPE_F32), &work, run_sample,
			&r);
	}
	return status;
}

const struct bench_op bench_sample = { "sample", 1, { 1, 8, 32 }, 0, measure_sample };
