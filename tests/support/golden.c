/* SPDX-License-Identifier: Apache-2.0 */
/* Reads what tests/golden/make.py wrote. Everything here fails the test instead of returning an
 * error. */
#include "golden.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *source(void)
{
	const char *directory = getenv("AFD_TEST_SOURCE");

	return directory ? directory : "tests";
}

static void *read_file(const char *path, size_t *bytes)
{
	FILE *file = fopen(path, "rb");
	void *data;
	long end;

	if (!file)
		fail_msg("%s cannot be opened", path);
	assert_int_equal(fseek(file, 0, SEEK_END), 0);
	end = ftell(file);
	assert_true(end >= 0);
	rewind(file);
	data = malloc((size_t)end + 1);
	assert_non_null(data);
	assert_int_equal(fread(data, 1, (size_t)end, file), (size_t)end);
	((char *)data)[end] = 0;
	fclose(file);
	*bytes = (size_t)end;
	return data;
}

float *npy_read(const char *path, uint32_t shape[2])
{
	size_t bytes, header, data_bytes;
	char *file = read_file(path, &bytes), *at;
	float *values;

	assert_true(bytes > 10 && !memcmp(file, "\x93NUMPY\x01", 7));
	header = 10 + (size_t)(unsigned char)file[8] + 256 * (size_t)(unsigned char)file[9];
	assert_true(header < bytes && file[header - 1] == '\n');
	file[header - 1] = 0;
	assert_non_null(strstr(file + 10, "'descr': '<f4'"));
	assert_non_null(strstr(file + 10, "'fortran_order': False"));
	at = strstr(file + 10, "'shape': (");
	assert_non_null(at);
	assert_int_equal(sscanf(at, "'shape': (%u, %u)", &shape[0], &shape[1]), 2);
	data_bytes = (size_t)shape[0] * shape[1] * sizeof(float);
	assert_int_equal(bytes - header, data_bytes);
	values = malloc(data_bytes);
	assert_non_null(values);
	memcpy(values, file + header, data_bytes);
	free(file);
	return values;
}

static uint32_t read_ids(const json_t *array, int32_t *ids)
{
	size_t i;

	assert_true(json_is_array(array));
	for (i = 0; ids && i < json_array_size(array); i++)
		ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
	return (uint32_t)json_array_size(array);
}

void golden_open(struct golden *golden, const char *name)
{
	char path[400];
	json_t *json;
	uint32_t shape[2];

	memset(golden, 0, sizeof(*golden));
	snprintf(path, sizeof(path), "%s/golden/%s/golden.json", source(), name);
	json = json_load_file(path, 0, NULL);
	if (!json)
		fail_msg("%s cannot be read as JSON", path);
	snprintf(golden->checkpoint, sizeof(golden->checkpoint), "%s/golden/%s/%s", source(), name,
		json_string_value(json_object_get(json, "checkpoint")));
	golden->n_prompt = read_ids(json_object_get(json, "prompt"), NULL);
	golden->n_generated = read_ids(json_object_get(json, "generated"), NULL);
	golden->n_positions = golden->n_prompt + golden->n_generated - 1;
	golden->ids = calloc(golden->n_prompt + golden->n_generated, sizeof(*golden->ids));
	assert_non_null(golden->ids);
	read_ids(json_object_get(json, "prompt"), golden->ids);
	read_ids(json_object_get(json, "generated"), golden->ids + golden->n_prompt);
	json_decref(json);
	snprintf(path, sizeof(path), "%s/golden/%s/logits.npy", source(), name);
	golden->logits = npy_read(path, shape);
	assert_int_equal(shape[0], golden->n_positions);
	golden->vocab = shape[1];
}

void golden_close(struct golden *golden)
{
	free(golden->ids);
	free(golden->logits);
}

double nmse(const float *got, const float *wanted, uint64_t n)
{
	double error = 0, size = 0;
	uint64_t i;

	for (i = 0; i < n; i++) {
		if (!isfinite(got[i]))
			return INFINITY;
		error += ((double)got[i] - wanted[i]) * ((double)got[i] - wanted[i]);
		size += (double)wanted[i] * wanted[i];
	}
	return error / size;
}

/* ---- a checkpoint with one thing changed ---- */

static void write_file(const char *path, const void *data, size_t bytes)
{
	FILE *file = fopen(path, "wb");

	assert_non_null(file);
	assert_int_equal(fwrite(data, 1, bytes, file), bytes);
	assert_int_equal(fclose(file), 0);
}

static void copy_config(const struct golden *golden, const struct golden_change *change,
	const char *directory)
{
	char path[640], *text, *at;
	size_t bytes;
	FILE *file;

	snprintf(path, sizeof(path), "%s/config.json", golden->checkpoint);
	text = read_file(path, &bytes);
	at = change->find ? strstr(text, change->find) : text + bytes;
	if (!at || (change->find && strstr(at + 1, change->find)))
		fail_msg("%s does not hold %s just once", path, change->find);
	snprintf(path, sizeof(path), "%s/config.json", directory);
	file = fopen(path, "wb");
	assert_non_null(file);
	fwrite(text, 1, (size_t)(at - text), file);
	if (change->find)
		fprintf(file, "%s%s", change->replace, at + strlen(change->find));
	assert_int_equal(fclose(file), 0);
	free(text);
}

static void change_tensor(char *data, const struct golden_change *change)
{
	uint64_t header_bytes, n, i;
	json_t *header, *entry, *offsets;
	char *numbers;

	memcpy(&header_bytes, data, sizeof(header_bytes));
	header = json_loadb(data + 8, header_bytes, 0, NULL);
	entry = json_object_get(header, change->tensor);
	if (!entry)
		fail_msg("there is no tensor %s", change->tensor);
	assert_string_equal(json_string_value(json_object_get(entry, "dtype")), "F32");
	offsets = json_object_get(entry, "data_offsets");
	numbers = data + 8 + header_bytes + (size_t)json_integer_value(json_array_get(offsets, 0));
	n = (uint64_t)(json_integer_value(json_array_get(offsets, 1)) -
		       json_integer_value(json_array_get(offsets, 0))) /
	    sizeof(float);
	n = change->n_numbers ? change->index + change->n_numbers : n;
	for (i = change->index; i < n; i++)
		memcpy(numbers + i * sizeof(float), &change->value, sizeof(float));
	json_decref(header);
}

void golden_change(
	const struct golden *golden, const struct golden_change *change, char directory[64])
{
	char path[640], *data;
	size_t bytes;

	strcpy(directory, "/tmp/afd-test-XXXXXX");
	assert_non_null(mkdtemp(directory));
	copy_config(golden, change, directory);
	snprintf(path, sizeof(path), "%s/model.safetensors", golden->checkpoint);
	data = read_file(path, &bytes);
	if (change->tensor)
		change_tensor(data, change);
	snprintf(path, sizeof(path), "%s/model.safetensors", directory);
	write_file(path, data, bytes);
	free(data);
}

void golden_patch(const struct golden *golden, const char *tensor, uint64_t index, float value,
	char directory[64])
{
	const struct golden_change change = {
		.tensor = tensor, .index = index, .n_numbers = 1, .value = value
	};

	golden_change(golden, &change, directory);
}

void golden_patch_remove(const char *directory)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/config.json", directory);
	unlink(path);
	snprintf(path, sizeof(path), "%s/model.safetensors", directory);
	unlink(path);
	rmdir(directory);
}

/* ---- all cases ---- */

static int compare_names(const void *a, const void *b)
{
	return strcmp(a, b);
}

uint32_t golden_names(char names[][64], uint32_t capacity)
{
	char path[400];
	struct dirent *entry;
	uint32_t n = 0;
	DIR *directory;

	snprintf(path, sizeof(path), "%s/golden", source());
	directory = opendir(path);
	assert_non_null(directory);
	while ((entry = readdir(directory))) {
		snprintf(path, sizeof(path), "%s/golden/%s/golden.json", source(), entry->d_name);
		if (access(path, R_OK) || strlen(entry->d_name) >= 64)
			continue;
		assert_true(n < capacity);
		strcpy(names[n++], entry->d_name);
	}
	closedir(directory);
	qsort(names, n, 64, compare_names);
	return n;
}
