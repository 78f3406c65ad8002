/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Replays a corpus through a fuzz target without libFuzzer: every file of the directories that are
 * given, every prefix of it, and every byte of it replaced by a few others. The target aborts when
 * a property does not hold.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { MAX_BYTES = 1 << 16 };

static unsigned long n_inputs;

/* From memory of exactly this size, so that a sanitizer sees a read beyond it. */
static void run(const uint8_t *bytes, size_t n_bytes)
{
	uint8_t *copy = malloc(n_bytes ? n_bytes : 1);

	if (!copy)
		abort();
	memcpy(copy, bytes, n_bytes);
	LLVMFuzzerTestOneInput(copy, n_bytes);
	free(copy);
	n_inputs++;
}

static void run_variants(uint8_t *bytes, size_t n_bytes)
{
	static const uint8_t values[] = { 0x00, 0xff, '0', '9', '-', '"', '{', ']', ',' };
	size_t at, i;

	run(bytes, n_bytes);
	for (at = 0; at < n_bytes; at++) {
		uint8_t was = bytes[at];

		run(bytes, at);
		for (i = 0; i < sizeof(values); i++) {
			bytes[at] = values[i];
			run(bytes, n_bytes);
		}
		bytes[at] = was;
	}
}

static int run_file(const char *path)
{
	static uint8_t bytes[MAX_BYTES];
	FILE *file = fopen(path, "rb");
	size_t n_bytes;

	if (!file) {
		perror(path);
		return 1;
	}
	n_bytes = fread(bytes, 1, sizeof(bytes), file);
	fclose(file);
	run_variants(bytes, n_bytes);
	return 0;
}

static int run_dir(const char *dir)
{
	struct dirent *entry;
	char path[1000];
	DIR *d = opendir(dir);
	int rc = 0, n_files = 0;

	if (!d) {
		perror(dir);
		return 1;
	}
	while (!rc && (entry = readdir(d))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", dir, entry->d_name);
		rc = run_file(path);
		n_files++;
	}
	closedir(d);
	printf("%s: %d files, %lu inputs\n", dir, n_files, n_inputs);
	return rc || !n_files;
}

int main(int argc, char **argv)
{
	int i, rc = argc < 2;

	for (i = 1; i < argc && !rc; i++)
		rc = run_dir(argv[i]);
	return rc;
}
