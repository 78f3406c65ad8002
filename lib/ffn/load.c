/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Brings the shard's weights of the held layers onto the device, layer by layer: packed, or used
 * where they are when the model asks for that and they lie row behind row. Routers are always whole
 * and packed, since attention stages have the same ones and must find the same bits. Called by
 * stage.c at creation; nothing here runs later.
 */
#include "load.h"

#include <string.h>

/* ---- a SwiGLU ---- */

struct mlp_kinds {
	int32_t gate, up, down; /* enum afd__tensor_kind */
};

static int find_slice(const struct afd__ffn_loader *ld, uint32_t layer, int32_t kind,
	struct afd__slice *slice)
{
	struct afd__tensor t;
	int rc = afd__model_tensor(ld->to.model, (int32_t)layer, kind, &t);

	if (!rc)
		*slice = afd__slice_whole(&t);
	return rc;
}

/* Gate and up as one matrix. */
static int make_gate_up(struct afd__ffn_loader *ld, struct afd__ffn_mlp *mlp,
	const struct afd__slice *gate, const struct afd__slice *up)
{
	const struct afd__matrix_shape shape = {
		.n = 2 * mlp->width,
		.k = afd__range_size(gate->columns),
		.dtype = gate->tensor.dtype,
		.mixed_panels = afd__slice_mixes(gate, 0) || afd__slice_mixes(up, mlp->width),
		.whole_blocks = afd__slice_keeps_blocks(gate, 0) &&
				afd__slice_keeps_blocks(up, mlp->width),
	};
	int rc;

	if (mlp->width > UINT32_MAX / 2)
		return afd__error(-ENOTSUP, "%s: %u rows, limit %u", gate->tensor.name, mlp->width,
			UINT32_MAX / 2);
	rc = afd__matrix_create_stack(ld->ffn->device, &mlp->gate, &shape, NULL);
	if (rc)
		return afd__error_prefix(rc, "%s", gate->tensor.name);
	rc = afd__slice_load(&ld->to, gate, &mlp->gate, 0);
	return rc ? rc : afd__slice_load(&ld->to, up, &mlp->gate, mlp->width);
}

/* A layer's mlp is split by width over all ranks. */
static int load_mlp(struct afd__ffn_loader *ld, uint32_t layer, const struct mlp_kinds *kinds,
	uint32_t width, struct afd__ffn_mlp *mlp)
{
	struct afd__range range = afd__shard_range(
		width, afd__ffn_shard_rank(ld->ffn->shard), afd__ffn_shard_count(ld->ffn->shard));
	struct afd__slice gate, up, down;
	int rc = find_slice(ld, layer, kinds->gate, &gate);

	if (!rc)
		rc = find_slice(ld, layer, kinds->up, &up);
	if (!rc)
		rc = find_slice(ld, layer, kinds->down, &down);
	if (rc)
		return rc;
	gate.rows = up.rows = down.columns = range;
	mlp->width = afd__range_size(range);
	mlp->width_offset = range.begin;
	if (mlp->width > ld->ffn->weights.max_width)
		ld->ffn->weights.max_width = mlp->width;
	if (!ld->to.in_place && gate.tensor.dtype == up.tensor.dtype) {
		rc = make_gate_up(ld, mlp, &gate, &up);
	} else {
		rc = afd__slice_matrix(&ld->to, &gate, ld->to.in_place, &mlp->gate);
		if (!rc)
			rc = afd__slice_matrix(&ld->to, &up, ld->to.in_place, &mlp->up);
	}
	return rc ? rc : afd__slice_matrix(&ld->to, &down, ld->to.in_place, &mlp->down);
}

/* ---- a router ---- */

/* Numbers of any dtype to float32 in dev memory. */
static int widen(struct afd__ffn_loader *ld, const struct afd__tensor *t, float *to)
{
	struct afd_ffn *ffn = ld->ffn;
	struct afd__convert_args convert = {
		.dst = to,
		.dst_dtype = AFD_DTYPE_F32,
		.dst_stride = (size_t)t->shape[0] * sizeof(float),
		.src_dtype = t->dtype,
		.src_stride = (size_t)t->bytes,
		.n_rows = 1,
		.width = (uint32_t)t->shape[0],
	};
	uint64_t ticket;
	void *raw;
	int rc = afd__device_alloc(ffn->device, (size_t)t->bytes, "ffn: router bias", &raw);

	if (rc)
		return rc;
	convert.src = raw;
	rc = afd__queue_upload(&ffn->queue, raw, t->data, (size_t)t->bytes);
	if (!rc)
		rc = afd__convert(&ffn->queue, &convert);
	if (!rc)
		rc = afd__queue_ticket(&ffn->queue, &ticket);
	if (!rc)
		rc = afd__queue_wait(&ffn->queue, ticket, AFD__FFN_WAIT_MS, "a router bias");
	/* After a failure what is enqueued may still read it. */
	if (rc)
		afd__queue_close(&ffn->queue);
	afd__device_free(ffn->device, raw, (size_t)t->bytes);
	return rc;
}

static int load_router_bias(
	struct afd__ffn_loader *ld, uint32_t layer, struct afd__ffn_layer *weights)
{
	size_t bytes = (size_t)weights->arch->n_experts * sizeof(float);
	struct afd__tensor t;
	int rc = afd__model_tensor(ld->to.model, (int32_t)layer, AFD__TENSOR_ROUTER_BIAS, &t);

	if (!rc)
		rc = afd__device_alloc(
			ld->ffn->device, bytes, "ffn: router bias", (void **)&weights->router_bias);
	if (!rc)
		rc = widen(ld, &t, weights->router_bias);
	if (rc)
		return rc;
	if (ld->to.fingerprint)
		afd__fingerprint_tensor(ld->to.fingerprint, &t);
	afd__loader_report(&ld->to, t.bytes);
	afd__model_release(&t);
	return 0;
}

static int load_router(struct afd__ffn_loader *ld, uint32_t layer, struct afd__ffn_layer *weights)
{
	struct afd__slice router;
	int rc = find_slice(ld, layer, AFD__TENSOR_ROUTER, &router);

	if (!rc)
		rc = afd__slice_matrix(&ld->to, &router, false, &weights->router);
	if (!rc && weights->arch->router.bias)
		rc = load_router_bias(ld, layer, weights);
	return rc;
}

/* ---- layers ---- */

static int load_layer(struct afd__ffn_loader *ld, uint32_t index)
{
	static const struct mlp_kinds dense = { AFD__TENSOR_GATE, AFD__TENSOR_UP,
		AFD__TENSOR_DOWN };
	static const struct mlp_kinds shared = { AFD__TENSOR_SHARED_GATE, AFD__TENSOR_SHARED_UP,
		AFD__TENSOR_SHARED_DOWN };
	struct afd__ffn_layer *weights = &ld->ffn->weights.layers[index];
	uint32_t layer = ld->ffn->first_layer + index;
	const struct afd__layer *arch = &ld->to.model->arch.layers[layer];
	int rc = 0;

	weights->arch = arch;
	if (arch->ffn_kind == AFD_FFN_DENSE)
		return load_mlp(ld, layer, &dense, arch->intermediate_size, &weights->mlp);
	rc = load_router(ld, layer, weights);
	if (!rc && arch->shared_size)
		rc = load_mlp(ld, layer, &shared, arch->shared_size, &weights->mlp);
	return rc ? rc : afd__ffn_load_experts(ld, index, weights);
}

/* The bytes of all slices, so that the first report of progress knows them, and a tensor that is
 * missing is named before any is packed. */
static int measure(struct afd__ffn_loader *ld)
{
	const struct afd_ffn *ffn = ld->ffn;
	const struct afd_shard_params params = {
		.size = sizeof(params),
		.role = AFD_ROLE_FFN,
		.shard = { ffn->shard.tp, ffn->shard.n_tp, ffn->shard.ep, ffn->shard.n_ep },
		.first_layer = ffn->first_layer,
		.n_layers = ffn->n_layers,
	};
	struct afd_role_info info = { .size = sizeof(info) };
	int rc = afd_model_shard(ld->to.model, &params, &info);

	ld->to.total_bytes = info.bytes;
	return rc;
}

/* ---- what is held ---- */

static void count(struct afd__ffn_weights *w, const struct afd__matrix *m)
{
	w->n_packed += m->layout == AFD__LAYOUT_PACKED;
	w->n_in_place += m->layout == AFD__LAYOUT_IN_PLACE;
	w->bytes += (m->layout == AFD__LAYOUT_PACKED ? m->bytes : 0) + m->scales_bytes;
}

static void account(struct afd_ffn *ffn)
{
	struct afd__ffn_weights *w = &ffn->weights;
	uint32_t i, k;

	for (i = 0; i < ffn->n_layers; i++) {
		const struct afd__ffn_layer *layer = &w->layers[i];

		count(w, &layer->mlp.gate);
		count(w, &layer->mlp.up);
		count(w, &layer->mlp.down);
		for (k = 0; k < layer->n_stacks; k++) {
			count(w, &layer->stacks[k].gate_up);
			count(w, &layer->stacks[k].down);
		}
		w->bytes += layer->router.bytes + layer->router.scales_bytes;
		if (layer->router_bias)
			w->bytes += layer->arch->n_experts * sizeof(float);
	}
}

static int load_all(struct afd__ffn_loader *ld)
{
	struct afd__ffn_weights *w = &ld->ffn->weights;
	uint32_t i;
	int rc = measure(ld);

	if (rc)
		return rc;
	w->layers = afd__alloc(ld->ffn->ctx, ld->ffn->n_layers, sizeof(*w->layers));
	if (!w->layers)
		return -ENOMEM;
	for (i = 0; i < ld->ffn->n_layers && !rc; i++)
		rc = load_layer(ld, i);
	if (rc)
		return rc;
	account(ld->ffn);
	w->stored_bytes = ld->to.done_bytes;
	if (w->n_in_place && w->n_packed)
		afd__log(ld->ffn->ctx, AFD_LOG_WARN,
			"ffn: %u of %u matrices are packed, not used in place: their parts do not "
			"lie row behind row",
			w->n_packed, w->n_packed + w->n_in_place);
	return 0;
}

int afd__ffn_load(
	struct afd_ffn *ffn, const struct afd_model *model, const struct afd_ffn_params *params)
{
	struct afd__ffn_loader ld = {
		.ffn = ffn,
		.to = { .ctx = ffn->ctx,
			.device = ffn->device,
			.model = model,
			.progress = params->progress,
			.progress_user = params->progress_user,
			.in_place = model->weights == AFD_WEIGHTS_IN_PLACE },
	};
	bool stated = params->weights[0] || params->weights[1];
	int rc;

	if (stated && !ld.to.in_place)
		return afd__error(-EINVAL, "ffn: weights states a fingerprint, but that of packed "
					   "weights is taken from them");
	if (!stated && !(ld.to.fingerprint = afd__fingerprint_create(ffn->ctx)))
		return -ENOMEM;
	rc = load_all(&ld);
	if (stated)
		memcpy(ffn->weights.fingerprint, params->weights, sizeof(ffn->weights.fingerprint));
	else if (!rc)
		afd__fingerprint_value(ld.to.fingerprint, ffn->weights.fingerprint);
	afd__fingerprint_destroy(ld.to.fingerprint);
	afd__loader_end(&ld.to);
	return rc;
}

static void unload_layer(struct afd_ffn *ffn, struct afd__ffn_layer *layer)
{
	uint32_t i;

	for (i = 0; layer->stacks && i < layer->n_stacks; i++) {
		afd__matrix_destroy(ffn->device, &layer->stacks[i].gate_up);
		afd__matrix_destroy(ffn->device, &layer->stacks[i].down);
	}
	afd__free(layer->stacks);
	afd__matrix_destroy(ffn->device, &layer->mlp.gate);
	afd__matrix_destroy(ffn->device, &layer->mlp.up);
	afd__matrix_destroy(ffn->device, &layer->mlp.down);
	afd__matrix_destroy(ffn->device, &layer->router);
	if (layer->router_bias)
		afd__device_free(
			ffn->device, layer->router_bias, layer->arch->n_experts * sizeof(float));
}

void afd__ffn_unload(struct afd_ffn *ffn)
{
	uint32_t i;

	for (i = 0; ffn->weights.layers && i < ffn->n_layers; i++)
		unload_layer(ffn, &ffn->weights.layers[i]);
	afd__free(ffn->weights.layers);
	ffn->weights.layers = NULL;
}
