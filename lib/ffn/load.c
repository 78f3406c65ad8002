/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Brings the weights of the held layers onto the device, layer by layer: packed, or used where they
 * are when the model asks for that. Every byte is read once; the fingerprint is taken in the same
 * pass, block by block, while the block is in the cache. Called by stage.c at creation; nothing
 * here runs later.
 */
#include "stage.h"

#include "../model/fingerprint.h"

#include <string.h>

enum {
	BLOCK_BYTES = 4 << 20,
	BLOCK_ROWS = 32, /* a multiple of them: packing likes whole panels */
};

struct load {
	struct afd_ffn *ffn;
	const struct afd_model *model;
	struct afd__fingerprint *fingerprint; /* NULL: the host has stated it */
	afd_progress progress;
	void *progress_user;
	uint64_t done_bytes, total_bytes;
	bool in_place;
};

/* The three tensors of a layer. */
struct tensors {
	struct afd__tensor gate, up, down;
};

static int find(const struct load *load, uint32_t layer, struct tensors *t)
{
	int rc = afd__model_tensor(load->model, (int32_t)layer, AFD__TENSOR_GATE, &t->gate);

	if (!rc)
		rc = afd__model_tensor(load->model, (int32_t)layer, AFD__TENSOR_UP, &t->up);
	if (!rc)
		rc = afd__model_tensor(load->model, (int32_t)layer, AFD__TENSOR_DOWN, &t->down);
	return rc;
}

static void report(struct load *load, uint64_t bytes)
{
	load->done_bytes += bytes;
	if (load->progress)
		load->progress(load->progress_user, load->done_bytes, load->total_bytes);
}

/* Reads the tensor once: into rows row0 .. of the matrix (NULL: it is used in place), and into the
 * fingerprint. */
static int read_tensor(struct load *load, const struct afd__tensor *tensor,
	struct afd__matrix *matrix, uint32_t row0)
{
	uint32_t n_rows = (uint32_t)tensor->shape[0], first, n;
	size_t row_bytes = (size_t)(tensor->bytes / n_rows);
	uint32_t block_rows = (uint32_t)(BLOCK_BYTES / row_bytes / BLOCK_ROWS + 1) * BLOCK_ROWS;
	int rc = 0;

	if (load->fingerprint)
		afd__fingerprint_begin(load->fingerprint, tensor, NULL, NULL);
	for (first = 0; first < n_rows && !rc; first += n) {
		const char *rows = (const char *)tensor->data + first * row_bytes;

		n = n_rows - first < block_rows ? n_rows - first : block_rows;
		if (load->fingerprint)
			afd__fingerprint_add(load->fingerprint, rows, n * row_bytes);
		if (matrix)
			rc = afd__matrix_load(load->ffn->device, matrix, rows, row0 + first, n);
		report(load, n * row_bytes);
	}
	if (load->fingerprint)
		afd__fingerprint_end(load->fingerprint);
	if (matrix && !rc)
		afd__model_release(tensor);
	return rc;
}

/* A matrix of one tensor. */
static int make_matrix(
	struct load *load, struct afd__matrix *matrix, const struct afd__tensor *tensor)
{
	const void *rows = load->in_place ? tensor->data : NULL;
	int rc = afd__matrix_create(load->ffn->device, matrix, (uint32_t)tensor->shape[0],
		(uint32_t)tensor->shape[1], tensor->dtype, rows);

	if (rc)
		return afd__error_prefix(rc, "%s", tensor->name);
	if (!load->in_place || load->fingerprint)
		return read_tensor(load, tensor, load->in_place ? NULL : matrix, 0);
	report(load, tensor->bytes);
	return 0;
}

/* Gate and up as one matrix. */
static int make_gate_up(struct load *load, struct afd__ffn_layer *layer, const struct tensors *t)
{
	uint32_t width = layer->width, k = (uint32_t)t->gate.shape[1], n;
	int rc;

	if (__builtin_mul_overflow(width, 2, &n))
		return afd__error(
			-ENOTSUP, "%s: %u rows, limit %u", t->gate.name, width, UINT32_MAX / 2);
	rc = afd__matrix_create(load->ffn->device, &layer->gate, n, k, t->gate.dtype, NULL);
	if (rc)
		return afd__error_prefix(rc, "%s", t->gate.name);
	rc = read_tensor(load, &t->gate, &layer->gate, 0);
	return rc ? rc : read_tensor(load, &t->up, &layer->gate, width);
}

static int load_layer(struct load *load, uint32_t index)
{
	struct afd__ffn_weights *weights = &load->ffn->weights;
	struct afd__ffn_layer *layer = &weights->layers[index];
	struct tensors t;
	int rc = find(load, load->ffn->first_layer + index, &t);

	if (rc)
		return rc;
	layer->width = (uint32_t)t.gate.shape[0];
	if (layer->width > weights->max_width)
		weights->max_width = layer->width;
	if (!load->in_place && t.gate.dtype == t.up.dtype) {
		rc = make_gate_up(load, layer, &t);
	} else {
		rc = make_matrix(load, &layer->gate, &t.gate);
		if (!rc)
			rc = make_matrix(load, &layer->up, &t.up);
	}
	if (!rc)
		rc = make_matrix(load, &layer->down, &t.down);
	if (!rc && !load->in_place)
		weights->bytes += layer->gate.bytes + layer->up.bytes + layer->down.bytes;
	return rc;
}

/* The bytes of all tensors, so that the first report of progress knows them, and a missing one is
 * named before any is packed. */
static int measure(struct load *load)
{
	struct tensors t;
	uint32_t i;
	int rc = 0;

	for (i = 0; i < load->ffn->n_layers && !rc; i++) {
		rc = find(load, load->ffn->first_layer + i, &t);
		if (!rc)
			load->total_bytes += t.gate.bytes + t.up.bytes + t.down.bytes;
	}
	return rc;
}

int afd__ffn_load(
	struct afd_ffn *ffn, const struct afd_model *model, const struct afd_ffn_params *params)
{
	struct load load = {
		.ffn = ffn,
		.model = model,
		.progress = params->progress,
		.progress_user = params->progress_user,
		.in_place = model->weights == AFD_WEIGHTS_IN_PLACE,
	};
	bool stated = params->weights[0] || params->weights[1];
	uint32_t i;
	int rc;

	if (stated && !load.in_place)
		return afd__error(-EINVAL, "ffn: weights states a fingerprint, but that of packed "
					   "weights is taken from them");
	rc = measure(&load);
	if (rc)
		return rc;
	ffn->weights.layers = afd__alloc(ffn->ctx, ffn->n_layers, sizeof(*ffn->weights.layers));
	if (!ffn->weights.layers)
		return -ENOMEM;
	if (!stated && !(load.fingerprint = afd__fingerprint_create(ffn->ctx)))
		return -ENOMEM;
	for (i = 0; i < ffn->n_layers && !rc; i++)
		rc = load_layer(&load, i);
	if (stated)
		memcpy(ffn->weights.fingerprint, params->weights, sizeof(ffn->weights.fingerprint));
	else if (!rc)
		afd__fingerprint_value(load.fingerprint, ffn->weights.fingerprint);
	afd__fingerprint_destroy(load.fingerprint);
	return rc;
}

void afd__ffn_unload(struct afd_ffn *ffn)
{
	uint32_t i;

	for (i = 0; ffn->weights.layers && i < ffn->n_layers; i++) {
		struct afd__ffn_layer *layer = &ffn->weights.layers[i];

		afd__matrix_destroy(ffn->device, &layer->gate);
		afd__matrix_destroy(ffn->device, &layer->up);
		afd__matrix_destroy(ffn->device, &layer->down);
	}
	afd__free(ffn->weights.layers);
	ffn->weights.layers = NULL;
}
