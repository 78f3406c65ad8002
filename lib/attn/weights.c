/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the checkpoint to the device, tensor by tensor in the order of use, so that a file is read
 * once from front to back. Vectors are uploaded as they are stored and widened by the device, into
 * memory that was sized for all of them before.
 */
#include "weights.h"

#include <assert.h>
#include <string.h>

/* How much is packed between two calls of the host's progress. */
static const size_t BLOCK_BYTES = (size_t)16 << 20;
enum { UPLOAD_TIMEOUT_MS = 60000, SCALE_GRAIN = 32 /* that share a scale, see device.h */ };

struct loader {
	struct afd__attn_weights *weights;
	const struct afd_model *model;
	struct afd__queue *queue;
	int32_t kv_dtype;
	void *raw;     /* dev: vectors as stored, at the place where their numbers will lie */
	size_t n_used; /* numbers of weights->vectors that are given out */
	afd_progress progress;
	void *progress_user;
	uint64_t done_bytes, total_bytes;
};

static void count_progress(struct loader *ld, uint64_t bytes)
{
	ld->done_bytes += bytes;
	if (ld->progress)
		ld->progress(ld->progress_user, ld->done_bytes, ld->total_bytes);
}

/* ---- matrices ---- */

static bool in_place(const struct loader *ld)
{
	return ld->model->weights == AFD_WEIGHTS_IN_PLACE;
}

/* mixed: parts of m begin at rows that are no multiple of a panel's. */
static int create_matrix(struct loader *ld, struct afd__matrix *m, const struct afd__tensor *t,
	uint32_t n, bool mixed)
{
	const struct afd__matrix_shape shape = {
		.n = n,
		.k = (uint32_t)t->shape[1],
		.dtype = t->dtype,
		.mixed_panels = t->dtype == AFD_DTYPE_FP8 && mixed,
	};

	return afd__matrix_create_stack(
		ld->weights->device, m, &shape, in_place(ld) ? t->data : NULL);
}

static int load_scales(
	struct loader *ld, struct afd__matrix *m, const struct afd__tensor *t, uint32_t row0)
{
	const struct afd__scale_blocks blocks = {
		.data = t->scales.data,
		.n_rows = t->scales.rows,
		.n_columns = t->scales.columns,
		.dtype = t->scales.dtype,
	};
	int rc;

	if (t->dtype != AFD_DTYPE_FP8)
		return 0;
	rc = afd__matrix_load_scales(
		ld->weights->device, m, &blocks, row0, (uint32_t)t->shape[0]);
	if (rc)
		return afd__error_prefix(rc, "%s", t->scales.name);
	count_progress(ld, (uint64_t)blocks.n_rows * blocks.n_columns * afd_dtype_bytes(blocks.dtype));
	return 0;
}

/* Packs the tensor's rows into m from row0 on; with weights in place there is nothing to move. */
static int pack_rows(
	struct loader *ld, struct afd__matrix *m, const struct afd__tensor *t, uint32_t row0)
{
	uint32_t n_rows = (uint32_t)t->shape[0], n, i;
	size_t row_bytes = (size_t)(t->bytes / n_rows);
	uint32_t block = (uint32_t)(BLOCK_BYTES / row_bytes / 64 * 64);
	int rc;

	rc = load_scales(ld, m, t, row0);
	if (rc || in_place(ld)) {
		count_progress(ld, t->bytes);
		return rc;
	}
	block = block ? block : 64;
	for (i = 0; i < n_rows; i += n) {
		n = n_rows - i < block ? n_rows - i : block;
		rc = afd__matrix_load(
			ld->weights->device, m, (const char *)t->data + i * row_bytes, row0 + i, n);
		if (rc)
			return afd__error_prefix(rc, "%s", t->name);
		count_progress(ld, n * row_bytes);
	}
	afd__model_release(t);
	return 0;
}

static int load_matrix(struct loader *ld, int32_t layer, int32_t kind, struct afd__matrix *m)
{
	struct afd__tensor t;
	int rc = afd__model_tensor(ld->model, layer, kind, &t);

	rc = rc ? rc : create_matrix(ld, m, &t, (uint32_t)t.shape[0], false);
	return rc ? rc : pack_rows(ld, m, &t, 0);
}

static int load_qkv(struct loader *ld, int32_t layer, struct afd__attn_layer *w)
{
	struct afd__tensor t[AFD__QKV_PARTS];
	uint32_t n = 0, i;
	bool alike;
	int rc = 0;

	for (i = 0; !rc && i < AFD__QKV_PARTS; i++)
		rc = afd__model_tensor(ld->model, layer, AFD__TENSOR_Q + (int32_t)i, &t[i]);
	if (rc)
		return rc;
	alike = t[0].dtype == t[1].dtype && t[0].dtype == t[2].dtype && !in_place(ld);
	w->n_qkv = alike ? 1 : AFD__QKV_PARTS;
	if (alike)
		rc = create_matrix(ld, &w->qkv[0], &t[0],
			(uint32_t)(t[0].shape[0] + t[1].shape[0] + t[2].shape[0]),
			t[0].shape[0] % SCALE_GRAIN || t[1].shape[0] % SCALE_GRAIN);
	for (i = 0; !rc && i < AFD__QKV_PARTS; i++) {
		if (!alike)
			rc = create_matrix(ld, &w->qkv[i], &t[i], (uint32_t)t[i].shape[0], false);
		rc = rc ? rc : pack_rows(ld, &w->qkv[alike ? 0 : i], &t[i], alike ? n : 0);
		n += (uint32_t)t[i].shape[0];
	}
	return rc;
}

/* A tied head is the embedding's own tensor, held once. */
static int load_head(struct loader *ld)
{
	struct afd__attn_weights *w = ld->weights;
	struct afd__tensor embed, head;
	int rc;

	rc = afd__model_tensor(ld->model, -1, AFD__TENSOR_EMBED, &embed);
	rc = rc ? rc : afd__model_tensor(ld->model, -1, AFD__TENSOR_HEAD, &head);
	if (rc)
		return rc;
	if (head.data != embed.data)
		return load_matrix(ld, -1, AFD__TENSOR_HEAD, &w->head);
	w->head = w->embed;
	w->head_is_embed = 1;
	return 0;
}

/* ---- vectors ---- */

/* Gives out n numbers of the vectors' memory. */
static float *take_vector(struct loader *ld, size_t n)
{
	float *at = ld->weights->vectors + ld->n_used;

	ld->n_used += n;
	assert(ld->n_used * sizeof(float) <= ld->weights->vector_bytes);
	return at;
}

static int load_vector_into(struct loader *ld, int32_t layer, int32_t kind, float *to)
{
	struct afd__convert_args convert = { 0 };
	struct afd__tensor t;
	void *raw;
	int rc = afd__model_tensor(ld->model, layer, kind, &t);

	if (rc)
		return rc;
	raw = (char *)ld->raw + ((char *)to - (char *)ld->weights->vectors);
	rc = afd__queue_upload(ld->queue, raw, t.data, (size_t)t.bytes);
	if (rc)
		return afd__error_prefix(rc, "%s", t.name);
	convert.src = raw;
	convert.dst = to;
	convert.n_rows = 1;
	convert.width = (uint32_t)t.shape[0];
	convert.src_stride = (size_t)t.bytes;
	convert.dst_stride = (size_t)t.shape[0] * sizeof(float);
	convert.src_dtype = t.dtype;
	convert.dst_dtype = AFD_DTYPE_F32;
	count_progress(ld, t.bytes);
	return afd__convert(ld->queue, &convert);
}

static int load_vector(struct loader *ld, int32_t layer, int32_t kind, size_t n, const float **out)
{
	float *to = take_vector(ld, n);

	*out = to;
	return load_vector_into(ld, layer, kind, to);
}

static int load_qkv_bias(struct loader *ld, int32_t layer, struct afd__attn_layer *w)
{
	size_t n_q = (size_t)w->arch->n_heads * w->arch->head_dim,
	       n_kv = (size_t)w->arch->n_kv_heads * w->arch->head_dim;
	float *to = take_vector(ld, n_q + 2 * n_kv);
	int rc;

	w->qkv_bias = to;
	rc = load_vector_into(ld, layer, AFD__TENSOR_Q_BIAS, to);
	rc = rc ? rc : load_vector_into(ld, layer, AFD__TENSOR_K_BIAS, to + n_q);
	return rc ? rc : load_vector_into(ld, layer, AFD__TENSOR_V_BIAS, to + n_q + n_kv);
}

static size_t count_layer_numbers(const struct afd__arch *arch, const struct afd__layer *layer)
{
	size_t n = (size_t)__builtin_popcount(layer->norms) * arch->hidden_size;

	if (layer->attention_bias)
		n += arch->hidden_size +
		     (size_t)(layer->n_heads + 2 * layer->n_kv_heads) * layer->head_dim;
	if (layer->qk_norm == AFD__QK_NORM_PER_HEAD)
		n += 2 * (size_t)layer->head_dim;
	return n;
}

static int allocate_vectors(struct loader *ld)
{
	const struct afd__arch *arch = &ld->model->arch;
	struct afd__attn_weights *w = ld->weights;
	size_t n = arch->hidden_size;
	uint32_t i;
	int rc;

	for (i = 0; i < arch->n_layers; i++)
		n += count_layer_numbers(arch, &arch->layers[i]);
	for (i = 0; i < w->n_ropes; i++)
		n += w->ropes[i].arch->head_dim / 2;
	w->vector_bytes = n * sizeof(float);
	rc = afd__device_alloc(w->device, w->vector_bytes, "norm weights", (void **)&w->vectors);
	return rc ? rc
		  : afd__device_alloc(
			    w->device, w->vector_bytes, "norm weights as stored", &ld->raw);
}

/* ---- rotation ---- */

static void find_ropes(struct afd__attn_weights *w)
{
	uint32_t i;

	for (i = 0; i < w->n_layers; i++) {
		const struct afd__rope *rope = w->layers[i].arch->rope;
		uint32_t r = 0;

		w->layers[i].rope = -1;
		if (!rope)
			continue;
		while (r < w->n_ropes && w->ropes[r].arch != rope)
			r++;
		w->ropes[r].arch = rope;
		w->n_ropes = r == w->n_ropes ? r + 1 : w->n_ropes;
		w->layers[i].rope = (int32_t)r;
	}
}

static int load_ropes(struct loader *ld)
{
	uint32_t i;
	int rc = 0;

	for (i = 0; !rc && i < ld->weights->n_ropes; i++) {
		const struct afd__rope *rope = ld->weights->ropes[i].arch;
		float *to = take_vector(ld, rope->head_dim / 2);

		ld->weights->ropes[i].inv_freq = to;
		rc = afd__queue_upload(
			ld->queue, to, rope->inv_freq, rope->head_dim / 2 * sizeof(float));
	}
	return rc;
}

/* ---- all of it ---- */

/* Numbers that the host keeps: arguments of operations. */
static int load_kv_scales(struct loader *ld, int32_t layer, struct afd__attn_layer *w)
{
	struct afd__tensor t;
	int32_t kind;
	int rc = 0;

	w->k_scale = w->v_scale = 1;
	for (kind = AFD__TENSOR_K_SCALE; !rc && kind <= AFD__TENSOR_V_SCALE; kind++) {
		if (!afd__slot_find(ld->model, layer, -1, kind))
			continue;
		rc = afd__model_tensor(ld->model, layer, kind, &t);
		count_progress(ld, rc ? 0 : t.bytes);
	}
	if (rc || ld->kv_dtype != AFD_DTYPE_FP8)
		return rc;
	return afd__model_kv_scales(ld->model, layer, &w->k_scale, &w->v_scale);
}

static int load_layer(struct loader *ld, int32_t layer)
{
	struct afd__attn_layer *w = &ld->weights->layers[layer];
	const struct afd__layer *arch = w->arch;
	uint32_t hidden = ld->model->arch.hidden_size;
	int rc;

	rc = load_vector(ld, layer, AFD__TENSOR_INPUT_NORM, hidden, &w->input_norm);
	rc = rc ? rc : load_kv_scales(ld, layer, w);
	rc = rc ? rc : load_qkv(ld, layer, w);
	if (!rc && arch->attention_bias)
		rc = load_qkv_bias(ld, layer, w);
	if (!rc && arch->qk_norm == AFD__QK_NORM_PER_HEAD) {
		rc = load_vector(ld, layer, AFD__TENSOR_Q_NORM, arch->head_dim, &w->q_norm);
		rc = rc ? rc
			: load_vector(ld, layer, AFD__TENSOR_K_NORM, arch->head_dim, &w->k_norm);
	}
	if (!rc && arch->output_gate == AFD__OUTPUT_GATE_ELEMENTWISE)
		rc = load_matrix(ld, layer, AFD__TENSOR_OUTPUT_GATE, &w->gate);
	rc = rc ? rc : load_matrix(ld, layer, AFD__TENSOR_O, &w->o);
	if (!rc && arch->attention_bias)
		rc = load_vector(ld, layer, AFD__TENSOR_O_BIAS, hidden, &w->o_bias);
	if (!rc && arch->norms & AFD__NORM_AFTER_ATTENTION)
		rc = load_vector(ld, layer, AFD__TENSOR_AFTER_ATTENTION_NORM, hidden,
			&w->after_attention_norm);
	rc = rc ? rc : load_vector(ld, layer, AFD__TENSOR_FFN_NORM, hidden, &w->ffn_norm);
	if (!rc && arch->norms & AFD__NORM_AFTER_FFN)
		rc = load_vector(
			ld, layer, AFD__TENSOR_AFTER_FFN_NORM, hidden, &w->after_ffn_norm);
	return rc;
}

static int load_all(struct loader *ld)
{
	struct afd__attn_weights *w = ld->weights;
	uint32_t i;
	int rc;

	rc = allocate_vectors(ld);
	rc = rc ? rc : load_ropes(ld);
	rc = rc ? rc : load_matrix(ld, -1, AFD__TENSOR_EMBED, &w->embed);
	for (i = 0; !rc && i < w->n_layers; i++)
		rc = load_layer(ld, (int32_t)i);
	rc = rc ? rc
		: load_vector(ld, -1, AFD__TENSOR_FINAL_NORM, ld->model->arch.hidden_size,
			  &w->final_norm);
	return rc ? rc : load_head(ld);
}

/* Also after a failure: nothing may be freed that the device still reads. */
static int settle(struct loader *ld)
{
	uint64_t ticket;
	int rc = afd__queue_ticket(ld->queue, &ticket);

	return rc ? rc
		  : afd__queue_wait(
			    ld->queue, ticket, UPLOAD_TIMEOUT_MS, "the upload of norm weights");
}

int afd__attn_weights_load(struct afd__attn_weights *weights, const struct afd_model *model,
	struct afd__queue *queue, int32_t kv_dtype, afd_progress progress, void *progress_user)
{
	struct loader ld = { .weights = weights,
		.model = model,
		.queue = queue,
		.kv_dtype = kv_dtype,
		.progress = progress,
		.progress_user = progress_user };
	struct afd_role_info role = { .size = sizeof(role) };
	uint32_t i;
	int rc, settled;

	memset(weights, 0, sizeof(*weights));
	/* Everything that is missing is told before anything is allocated. */
	rc = afd_model_role(model, AFD_ROLE_ATTENTION, &role);
	if (rc)
		return rc;
	ld.total_bytes = role.bytes;
	weights->ctx = model->ctx;
	weights->device = queue->dev;
	weights->n_layers = model->arch.n_layers;
	weights->layers = afd__alloc(model->ctx, weights->n_layers, sizeof(*weights->layers));
	weights->ropes = afd__alloc(model->ctx, weights->n_layers, sizeof(*weights->ropes));
	rc = weights->layers && weights->ropes ? 0 : -ENOMEM;
	if (!rc) {
		for (i = 0; i < weights->n_layers; i++)
			weights->layers[i].arch = &model->arch.layers[i];
		find_ropes(weights);
		rc = load_all(&ld);
		settled = settle(&ld);
		rc = rc ? rc : settled;
	}
	if (ld.raw)
		afd__device_free(weights->device, ld.raw, weights->vector_bytes);
	if (rc)
		afd__attn_weights_free(weights);
	return rc;
}

void afd__attn_weights_free(struct afd__attn_weights *weights)
{
	uint32_t i, p;

	for (i = 0; weights->layers && i < weights->n_layers; i++) {
		for (p = 0; p < AFD__QKV_PARTS; p++)
			afd__matrix_destroy(weights->device, &weights->layers[i].qkv[p]);
		afd__matrix_destroy(weights->device, &weights->layers[i].gate);
		afd__matrix_destroy(weights->device, &weights->layers[i].o);
	}
	if (weights->device) {
		afd__matrix_destroy(weights->device, &weights->embed);
		if (!weights->head_is_embed)
			afd__matrix_destroy(weights->device, &weights->head);
	}
	if (weights->vectors)
		afd__device_free(weights->device, weights->vectors, weights->vector_bytes);
	afd__free(weights->layers);
	afd__free(weights->ropes);
	memset(weights, 0, sizeof(*weights));
}

static uint64_t packed_bytes(const struct afd__matrix *m)
{
	return (m->layout == AFD__LAYOUT_PACKED ? m->bytes : 0) + m->scales_bytes;
}

uint64_t afd__attn_weights_bytes(const struct afd__attn_weights *weights)
{
	uint64_t bytes = weights->vector_bytes + packed_bytes(&weights->embed);
	uint32_t i, p;

	if (!weights->head_is_embed)
		bytes += packed_bytes(&weights->head);
	for (i = 0; i < weights->n_layers; i++) {
		for (p = 0; p < weights->layers[i].n_qkv; p++)
			bytes += packed_bytes(&weights->layers[i].qkv[p]);
		bytes += packed_bytes(&weights->layers[i].gate);
		bytes += packed_bytes(&weights->layers[i].o);
	}
	return bytes;
}
