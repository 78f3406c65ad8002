/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checkpoints for tests, written into a directory of their own: one small Qwen3 of F32 tensors
 * whose numbers count up, so that a test can say which tensor it was given. Headers may lie when a
 * test asks for it. Included by one test each.
 */
#ifndef AFD_TEST_CHECKPOINT_FILES_H
#define AFD_TEST_CHECKPOINT_FILES_H

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TINY_ATTENTION = 11, TINY_FFN = 3, TINY_ALL = TINY_ATTENTION + TINY_FFN };

#define TINY_CONFIG "{\"model_type\":\"qwen3\",\"hidden_size\":4,\"intermediate_size\":6,\"num_hidden_layers\":1," \
	"\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":2,\"vocab_size\":5,\"dtype\":\"bfloat16\"," \
	"\"tie_word_embeddings\":false}"

/* The attention role's tensors, then the FFN's; number j of tensor i is 100 i + j. */
static const struct tiny_tensor {
	const char *name;
	unsigned rows, columns; /* columns 0: a vector */
} tiny_tensors[TINY_ALL] = {
	{ "model.embed_tokens.weight", 5, 4 }, { "lm_head.weight", 5, 4 }, { "model.norm.weight", 4,
		0 },
	{ "model.layers.0.input_layernorm.weight", 4,
		0 }, { "model.layers.0.post_attention_layernorm.weight", 4, 0 },
	{ "model.layers.0.self_attn.q_proj.weight", 4,
		4 }, { "model.layers.0.self_attn.k_proj.weight", 2, 4 },
	{ "model.layers.0.self_attn.v_proj.weight", 2,
		4 }, { "model.layers.0.self_attn.o_proj.weight", 4, 4 },
	{ "model.layers.0.self_attn.q_norm.weight", 2,
		0 }, { "model.layers.0.self_attn.k_norm.weight", 2, 0 },
	{ "model.layers.0.mlp.gate_proj.weight", 6, 4 }, { "model.layers.0.mlp.up_proj.weight", 6,
		4 },
	{ "model.layers.0.mlp.down_proj.weight", 4, 6 },
};

static inline void make_dir(char dir[64])
{
	snprintf(dir, 64, "/tmp/afd-test-XXXXXX");
	if (!mkdtemp(dir))
		abort();
}

static inline void remove_dir(const char *dir)
{
	char path[400];
	struct dirent *entry;
	DIR *d = opendir(dir);

	while (d && (entry = readdir(d))) {
		snprintf(path, sizeof(path), "%s/%s", dir, entry->d_name);
		unlink(path);
	}
	if (d)
		closedir(d);
	rmdir(dir);
}

static inline void write_bytes(const char *dir, const char *name, const void *bytes, size_t n_bytes)
{
	char path[400];
	FILE *file;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	file = fopen(path, "wb");
	if (!file || fwrite(bytes, 1, n_bytes, file) != n_bytes || fclose(file))
		abort();
}

static inline void write_text(const char *dir, const char *name, const char *text)
{
	write_bytes(dir, name, text, strlen(text));
}

/* A file with this header and n_floats numbers 0, 1, 2 … behind it. */
static inline void write_safetensors(const char *dir, const char *name, const char *header,
				     const float *data, size_t data_bytes)
{
	uint64_t header_bytes = strlen(header);
	char *bytes = calloc(1, 8 + header_bytes + data_bytes + 1);

	if (!bytes)
		abort();
	memcpy(bytes, &header_bytes, 8);
	memcpy(bytes + 8, header, header_bytes);
	if (data)
		memcpy(bytes + 8 + header_bytes, data, data_bytes);
	write_bytes(dir, name, bytes, 8 + header_bytes + data_bytes);
	free(bytes);
}

static inline unsigned tiny_numbers(unsigned tensor)
{
	return tiny_tensors[tensor].rows * (tiny_tensors[tensor].columns ? tiny_tensors[tensor].columns : 1);
}

/* Tensors first .. first + n - 1 in one file, behind a header that is padded by pad spaces. */
static inline void write_tiny(const char *dir, const char *name, unsigned first, unsigned n,
			      unsigned pad)
{
	char header[8192], shape[40];
	float data[1024];
	size_t used = 0, n_floats = 0;
	unsigned i, j;

	used += (size_t)sprintf(header, "{\"__metadata__\":{\"format\":\"pt\"}");
	for (i = first; i < first + n; i++) {
		snprintf(shape, sizeof(shape), tiny_tensors[i].columns ? "%u,%u" : "%u",
			 tiny_tensors[i].rows,
			 tiny_tensors[i].columns);
		used += (size_t)sprintf(header + used,
					",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
					tiny_tensors[i].name, shape, 4 * n_floats, 4 * (n_floats + tiny_numbers(i)));
		for (j = 0; j < tiny_numbers(i); j++)
			data[n_floats++] = (float)(100 * i + j);
	}
	used += (size_t)sprintf(header + used, "}");
	/* An aligned header, then as far off as the test wants it. */
	pad += (unsigned)(8 - used % 8) % 8;
	memset(header + used, ' ', pad);
	header[used + pad] = '\0';
	write_safetensors(dir, name, header, data, 4 * n_floats);
}

/* config.json, an index, and the attention role's tensors in a.safetensors, the FFN's in
 * f.safetensors. */
static inline void write_tiny_sharded(const char *dir)
{
	char index[4096];
	size_t used = 0;
	unsigned i;

	used += (size_t)sprintf(index, "{\"metadata\":{\"total_size\":1},\"weight_map\":{");
	for (i = 0; i < TINY_ALL; i++)
		used += (size_t)sprintf(index + used, "%s\"%s\":\"%s.safetensors\"", i ? "," : "",
					tiny_tensors[i].name,
					i < TINY_ATTENTION ? "a" : "f");
	sprintf(index + used, "}}");
	write_text(dir, "config.json", TINY_CONFIG);
	write_text(dir, "model.safetensors.index.json", index);
	write_tiny(dir, "a.safetensors", 0, TINY_ATTENTION, 0);
	write_tiny(dir, "f.safetensors", TINY_ATTENTION, TINY_FFN, 0);
}

static inline void remove_file(const char *dir, const char *name)
{
	char path[400];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	if (unlink(path))
		abort();
}

#endif
