/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the checkpoint to the device, tensor by tensor in the order of use, so that a file is read
 * once from front to back. Of each tensor a rank of an attention group takes the part of its heads,
 * as model/shards.c has it; all of it without a group. Vectors are uploaded as they are stored and
 * widened by the device, into memory that was sized for all of them before.
 */
#include "weights.h"

#include <assert.h>
#include <string.h>

enum { UPLOAD_TIMEOUT_MS = 60000 };

struct loader {
	struct afd__attn_weights *weights;
	struct afd__loader to;
	struct afd__queue *queue;
	int32_t kv_dtype;
	uint32_t rank, n_ranks; /* of the attention group */
	bool routes;
	void *raw;     /* dev: vectors as stored, at the place where their numbers will lie */
	size_t n_used; /* numbers of weights->vectors that are given out */
};

/* A tensor, and the part of it that this rank holds. */
static int find_slice(
	const struct loader *ld, int32_t layer, int32_t kind, struct afd__slice *slice)
{
	const struct afd__layer *arch = layer < 0 ? NULL : ld->weights->layers[layer].arch;
	struct afd__tensor *t = &slice->tensor;
	struct afd__cut cut;
	int rc = afd__model_tensor(ld->to.model, layer, kind, t);

	if (rc)
		return rc;
	cut = afd__shard_attention(arch, kind, t->shape, t->n_dims, ld->rank, ld->n_ranks);
	slice->rows = cut.rows;
	slice->columns = cut.columns;
	return 0;
}

/* ---- matrices ---- */

static int load_matrix(struct loader *ld, int32_t layer, int32_t kind, struct afd__matrix *m)
{
	struct afd__slice slice;
	int rc = find_slice(ld, layer, kind, &slice);

	return rc ? rc : afd__slice_matrix(&ld->to, &slice, ld->to.in_place, m);
}

/* q, k and v under each other. */
static int load_stacked(
	struct loader *ld, const struct afd__slice parts[AFD__QKV_PARTS], struct afd__matrix *m)
{
	struct afd__matrix_shape shape = {
		.k = (uint32_t)parts[0].tensor.shape[1],
		.dtype = parts[0].tensor.dtype,
	};
	uint32_t row = 0, i;
	int rc;

	for (i = 0; i < AFD__QKV_PARTS; i++) {
		shape.mixed_panels |= afd__slice_mixes(&parts[i], shape.n);
		shape.whole_blocks = (!i || shape.whole_blocks) &&
				     afd__slice_keeps_blocks(&parts[i], shape.n);
		shape.n += afd__range_size(parts[i].rows);
	}
	rc = afd__matrix_create_stack(ld->to.device, m, &shape, NULL);
	for (i = 0; !rc && i < AFD__QKV_PARTS; i++) {
		rc = afd__slice_load(&ld->to, &parts[i], m, row);
		row += afd__range_size(parts[i].rows);
	}
	return rc;
}

static int load_qkv(struct loader *ld, int32_t layer, struct afd__attn_layer *w)
{
	struct afd__slice parts[AFD__QKV_PARTS];
	uint32_t i;
	bool alike;
	int rc = 0;

	for (i = 0; !rc && i < AFD__QKV_PARTS; i++)
		rc = find_slice(ld, layer, AFD__TENSOR_Q + (int32_t)i, &parts[i]);
	if (rc)
		return rc;
	alike = parts[0].tensor.dtype == parts[1].tensor.dtype &&
		parts[0].tensor.dtype == parts[2].tensor.dtype && !ld->to.in_place;
	w->n_qkv = alike ? 1 : AFD__QKV_PARTS;
	if (alike)
		return load_stacked(ld, parts, &w->qkv[0]);
	for (i = 0; !rc && i < AFD__QKV_PARTS; i++)
		rc = afd__slice_matrix(&ld->to, &parts[i], ld->to.in_place, &w->qkv[i]);
	return rc;
}

/* A tied head is the embedding's own tensor, held once. */
static int load_head(struct loader *ld)
{
	struct afd__attn_weights *w = ld->weights;
	struct afd__tensor embed, head;
	int rc;

	rc = afd__model_tensor(ld->to.model, -1, AFD__TENSOR_EMBED, &embed);
	rc = rc ? rc : afd__model_tensor(ld->to.model, -1, AFD__TENSOR_HEAD, &head);
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
	struct afd__slice slice;
	size_t number_bytes, bytes;
	void *raw;
	int rc = find_slice(ld, layer, kind, &slice);

	if (rc)
		return rc;
	number_bytes = afd_dtype_bytes(slice.tensor.dtype);
	bytes = afd__range_size(slice.rows) * number_bytes;
	raw = (char *)ld->raw + ((char *)to - (char *)ld->weights->vectors);
	rc = afd__queue_upload(ld->queue, raw,
		(const char *)slice.tensor.data + slice.rows.begin * number_bytes, bytes);
	if (rc)
		return afd__error_prefix(rc, "%s", slice.tensor.name);
	convert.src = raw;
	convert.dst = to;
	convert.n_rows = 1;
	convert.width = afd__range_size(slice.rows);
	convert.src_stride = bytes;
	convert.dst_stride = convert.width * sizeof(float);
	convert.src_dtype = slice.tensor.dtype;
	convert.dst_dtype = AFD_DTYPE_F32;
	afd__loader_report(&ld->to, bytes);
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
	size_t n_q = (size_t)w->n_heads * w->arch->head_dim,
	       n_kv = (size_t)w->n_kv_heads * w->arch->head_dim;
	float *to = take_vector(ld, n_q + 2 * n_kv);
	int rc;

	w->qkv_bias = to;
	rc = load_vector_into(ld, layer, AFD__TENSOR_Q_BIAS, to);
	rc = rc ? rc : load_vector_into(ld, layer, AFD__TENSOR_K_BIAS, to + n_q);
	return rc ? rc : load_vector_into(ld, layer, AFD__TENSOR_V_BIAS, to + n_q + n_kv);
}

static bool has_router(const struct loader *ld, const struct afd__layer *layer)
{
	return ld->routes && layer->ffn_kind == AFD_FFN_MOE;
}

/* Packed also where other weights are used in place: FFN stages hold it so, and both must find the
 * same bits. */
static int load_router(struct loader *ld, int32_t layer, struct afd__attn_layer *w)
{
	struct afd__slice slice;
	int rc = find_slice(ld, layer, AFD__TENSOR_ROUTER, &slice);

	rc = rc ? rc : afd__slice_matrix(&ld->to, &slice, false, &w->router);
	if (!rc && w->arch->router.bias)
		rc = load_vector(ld, layer, AFD__TENSOR_ROUTER_BIAS, w->arch->n_experts,
			&w->router_bias);
	return rc;
}

static size_t count_layer_numbers(const struct loader *ld, const struct afd__attn_layer *w)
{
	const struct afd__arch *arch = &ld->to.model->arch;
	const struct afd__layer *layer = w->arch;
	size_t n = (size_t)__builtin_popcount(layer->norms) * arch->hidden_size;

	if (layer->attention_bias)
		n += arch->hidden_size + (size_t)(w->n_heads + 2 * w->n_kv_heads) * layer->head_dim;
	if (layer->qk_norm == AFD__QK_NORM_PER_HEAD)
		n += 2 * (size_t)layer->head_dim;
	if (has_router(ld, layer) && layer->router.bias)
		n += layer->n_experts;
	return n;
}

static int allocate_vectors(struct loader *ld)
{
	const struct afd__arch *arch = &ld->to.model->arch;
	struct afd__attn_weights *w = ld->weights;
	size_t n = arch->hidden_size;
	uint32_t i;
	int rc;

	for (i = 0; i < arch->n_layers; i++)
		n += count_layer_numbers(ld, &w->layers[i]);
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
		if (!afd__slot_find(ld->to.model, layer, -1, kind))
			continue;
		rc = afd__model_tensor(ld->to.model, layer, kind, &t);
		afd__loader_report(&ld->to, rc ? 0 : t.bytes);
	}
	if (rc || ld->kv_dtype != AFD_DTYPE_FP8)
		return rc;
	return afd__model_kv_scales(ld->to.model, layer, &w->k_scale, &w->v_scale);
}

static int load_layer(struct loader *ld, int32_t layer)
{
	struct afd__attn_layer *w = &ld->weights->layers[layer];
	const struct afd__layer *arch = w->arch;
	uint32_t hidden = ld->to.model->arch.hidden_size;
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
	if (!rc && has_router(ld, arch))
		rc = load_router(ld, layer, w);
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
		: load_vector(ld, -1, AFD__TENSOR_FINAL_NORM, ld->to.model->arch.hidden_size,
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

static void find_layers(struct loader *ld)
{
	struct afd__attn_weights *w = ld->weights;
	uint32_t i;

	for (i = 0; i < w->n_layers; i++) {
		const struct afd__layer *arch = &ld->to.model->arch.layers[i];
		struct afd__heads heads = afd__shard_heads(
			arch->n_heads, arch->n_kv_heads, ld->rank, ld->n_ranks);

		w->layers[i].arch = arch;
		w->layers[i].n_heads = afd__range_size(heads.q);
		w->layers[i].n_kv_heads = afd__range_size(heads.kv);
	}
}

/* Everything that is missing is told before anything is allocated. */
static int measure(struct loader *ld)
{
	const struct afd_shard_params params = { .size = sizeof(params),
		.role = AFD_ROLE_ATTENTION,
		.gate = ld->routes ? AFD_GATE_ATTENTION : AFD_GATE_FFN,
		.shard = { .tp = ld->rank, .n_tp = ld->n_ranks } };
	struct afd_role_info info = { .size = sizeof(info) };
	int rc = afd_model_shard(ld->to.model, &params, &info);

	ld->to.total_bytes = info.bytes;
	return rc;
}

int afd__attn_weights_load(
	struct afd__attn_weights *weights, const struct afd__attn_weights_params *p)
{
	struct loader ld = { .weights = weights,
		.to = { .ctx = p->model->ctx,
			.device = p->queue->dev,
			.model = p->model,
			.progress = p->progress,
			.progress_user = p->progress_user,
			.in_place = p->model->weights == AFD_WEIGHTS_IN_PLACE },
		.queue = p->queue,
		.kv_dtype = p->kv_dtype,
		.rank = p->rank,
		.n_ranks = p->n_ranks,
		.routes = p->routes };
	int rc, settled;

	memset(weights, 0, sizeof(*weights));
	rc = measure(&ld);
	if (rc)
		return rc;
	weights->ctx = p->model->ctx;
	weights->device = p->queue->dev;
	weights->n_layers = p->model->arch.n_layers;
	weights->layers = afd__alloc(weights->ctx, weights->n_layers, sizeof(*weights->layers));
	weights->ropes = afd__alloc(weights->ctx, weights->n_layers, sizeof(*weights->ropes));
	rc = weights->layers && weights->ropes ? 0 : -ENOMEM;
	if (!rc) {
		find_layers(&ld);
		find_ropes(weights);
		rc = load_all(&ld);
		settled = settle(&ld);
		rc = rc ? rc : settled;
	}
	weights->stored_bytes = ld.to.done_bytes;
	afd__loader_end(&ld.to);
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
		afd__matrix_destroy(weights->device, &weights->layers[i].router);
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
		bytes += packed_bytes(&weights->layers[i].router);
	}
	return bytes;
}
