/* SPDX-License-Identifier: Apache-2.0 */
/*
 * First everything is checked that can be refused without a trace, then pages are reserved, entry
 * by entry, and given back in reverse when one does not fit. What follows cannot fail.
 */
#include "batch.h"

#include <assert.h>
#include <string.h>

#include "../device/args.h"

/* Words that say how an output is sampled. */
enum { SAMPLE_WORDS = sizeof(struct afd__sample_row) / sizeof(int32_t) };

/* ---- life ---- */

static int count_words(struct afd__batch *batch)
{
	const struct afd__batch_limits *l = &batch->limits;
	size_t rows = l->max_rows, n_groups = batch->kv->shape.n_groups, tables;

	if (__builtin_mul_overflow(
		    (size_t)l->max_entries * n_groups, batch->kv->list_capacity, &tables) ||
		__builtin_add_overflow(
			tables, rows * (3 + n_groups) + 1 + (1 + SAMPLE_WORDS) * (size_t)l->max_outputs,
			&batch->capacity_words) ||
		batch->capacity_words > ((size_t)1 << 28))
		return afd__error(-EINVAL,
			"attn: page tables of %u sequences of %u pages exceed 1 GiB; lower "
			"max_positions",
			l->max_entries, batch->kv->list_capacity);
	return 0;
}

int afd__batch_create(struct afd__batch *batch, struct afd_context *ctx,
	const struct afd__batch_limits *limits, struct afd__kv *kv,
	const struct afd__sequences *sequences)
{
	int rc;

	memset(batch, 0, sizeof(*batch));
	batch->limits = *limits;
	batch->kv = kv;
	batch->sequences = sequences;
	rc = count_words(batch);
	if (rc)
		return rc;
	batch->entries = afd__alloc(ctx, limits->max_entries, sizeof(*batch->entries));
	batch->marks = afd__alloc(ctx, kv->shape.n_sequences, sizeof(*batch->marks));
	batch->words =
		afd__large_alloc(ctx, batch->capacity_words * sizeof(int32_t), 64, "batch staging");
	if (batch->entries && batch->marks && batch->words)
		return 0;
	afd__batch_destroy(batch);
	return -ENOMEM;
}

void afd__batch_destroy(struct afd__batch *batch)
{
	if (batch->words)
		afd__large_free(
			batch->kv->ctx, batch->words, batch->capacity_words * sizeof(int32_t));
	afd__free(batch->entries);
	afd__free(batch->marks);
	memset(batch, 0, sizeof(*batch));
}

/* ---- checks ---- */

static int check_ids(const struct afd__batch *batch, const struct afd_entry *entry)
{
	uint32_t i;

	for (i = 0; i < entry->n_ids; i++) {
		if (entry->ids[i] < 0 || (uint32_t)entry->ids[i] >= batch->limits.vocab)
			return afd__error(-EINVAL,
				"sequence %llu: id %u is %d, the vocabulary has %u",
				(unsigned long long)entry->sequence, i, entry->ids[i],
				batch->limits.vocab);
	}
	return 0;
}

static int check_entry(struct afd__batch *batch, const struct afd_entry *entry)
{
	unsigned long long id = entry->sequence;
	int index = afd__sequences_find(batch->sequences, entry->sequence);

	if (index < 0)
		return index;
	if (batch->marks[index] == batch->mark)
		return afd__error(-EINVAL, "sequence %llu: it stands in the batch twice", id);
	batch->marks[index] = batch->mark;
	if (!entry->ids || !entry->n_ids)
		return afd__error(-EINVAL,
			"sequence %llu: ids is %s, n_ids is %u, must be 1 or more", id,
			entry->ids ? "set" : "NULL", entry->n_ids);
	if (entry->outputs < 0 || entry->outputs > AFD_OUTPUT_ALL)
		return afd__error(-EINVAL, "sequence %llu: outputs is %d, limit %d", id,
			entry->outputs, AFD_OUTPUT_ALL);
	if (entry->n_ids > batch->limits.max_rows - batch->n_rows)
		return afd__error(-ENOSPC,
			"batch: more than max_rows = %u rows, with %u of sequence %llu",
			batch->limits.max_rows, entry->n_ids, id);
	return index;
}

/* The host's own number of the request stands before what is wrong with its entry. */
static void name_user(int rc, uint64_t user_id)
{
	if (user_id)
		afd__error_prefix(rc, "user %llu", (unsigned long long)user_id);
}

/* How many of an entry's rows give an output; without room for any, none do. */
static uint32_t count_outputs(const struct afd_batch *wanted, const struct afd_entry *entry)
{
	if (!wanted->logits && !wanted->greedy_ids && !wanted->sampled_ids)
		return 0;
	if (entry->outputs == AFD_OUTPUT_NONE)
		return 0;
	return entry->outputs == AFD_OUTPUT_ALL ? entry->n_ids : 1;
}

static int read_sample(const struct afd__batch *batch, const struct afd_entry *entry,
	struct afd_sample_params *sample)
{
	int rc = afd__params_copy(sample, sizeof(*sample), entry->sample, "sample params");

	rc = rc ? rc : afd__sample_check(sample);
	if (!rc && sample->top_k > batch->limits.vocab)
		rc = afd__error(-EINVAL, "sample: top_k is %u, the vocabulary has %u",
			sample->top_k, batch->limits.vocab);
	return rc ? afd__error_prefix(
			    rc, "sequence %llu", (unsigned long long)entry->sequence)
		  : 0;
}

static int add_entry(
	struct afd__batch *batch, const struct afd_batch *wanted, const struct afd_entry *entry)
{
	struct afd__batch_entry *e = &batch->entries[batch->n_entries];
	struct afd_sample_params sample;
	int index, rc;

	index = check_entry(batch, entry);
	if (index < 0)
		return index;
	rc = check_ids(batch, entry);
	rc = rc ? rc : read_sample(batch, entry, &sample);
	if (rc)
		return rc;
	*e = (struct afd__batch_entry){
		.id = entry->sequence,
		.user_id = entry->user_id,
		.ids = entry->ids,
		.sequence = (uint32_t)index,
		.row0 = batch->n_rows,
		.n_rows = entry->n_ids,
		.position0 = batch->kv->sequences[index].length,
		.n_outputs = count_outputs(wanted, entry),
		.sample = sample,
	};
	if (wanted->sampled_ids && e->n_outputs && sample.temperature > 0)
		batch->ids |= AFD__IDS_SAMPLED;
	batch->n_entries++;
	batch->n_rows += e->n_rows;
	batch->n_outputs += e->n_outputs;
	return 0;
}

static int check_outputs(const struct afd__batch *batch, const struct afd_batch *wanted)
{
	uint32_t n = batch->n_outputs;

	if (n > batch->limits.max_outputs)
		return afd__error(-ENOSPC, "batch: %u outputs, max_outputs is %u", n,
			batch->limits.max_outputs);
	if (wanted->logits && n > wanted->logits_rows)
		return afd__error(
			-EINVAL, "batch: %u outputs, logits_rows is %u", n, wanted->logits_rows);
	if (wanted->greedy_ids && n > wanted->greedy_rows)
		return afd__error(
			-EINVAL, "batch: %u outputs, greedy_rows is %u", n, wanted->greedy_rows);
	if (wanted->sampled_ids && n > wanted->sampled_rows)
		return afd__error(
			-EINVAL, "batch: %u outputs, sampled_rows is %u", n, wanted->sampled_rows);
	return 0;
}

/* An older host's entries end before `sample`. A newer one's are longer; what this version does not
 * know must be zero. */
static int read_entry(struct afd_entry *entry, const struct afd_batch *wanted, uint32_t i)
{
	const unsigned char *bytes =
		(const unsigned char *)wanted->entries + (size_t)i * wanted->entry_bytes;
	uint32_t at;

	memset(entry, 0, sizeof(*entry));
	memcpy(entry, bytes,
		wanted->entry_bytes < sizeof(*entry) ? wanted->entry_bytes : sizeof(*entry));
	for (at = sizeof(*entry); at < wanted->entry_bytes; at++) {
		if (bytes[at])
			return afd__error(-E2BIG,
				"entry %u: byte %u is set, this version knows %zu bytes", i, at,
				sizeof(*entry));
	}
	return 0;
}

static int check(struct afd__batch *batch, const struct afd_batch *wanted)
{
	struct afd_entry entry;
	uint32_t i;
	int rc = 0;

	batch->n_entries = batch->n_rows = batch->n_outputs = batch->ids = 0;
	if (++batch->mark == 0) {
		memset(batch->marks, 0, batch->kv->shape.n_sequences * sizeof(*batch->marks));
		batch->mark = 1;
	}
	if (wanted->n_entries && !wanted->entries)
		return afd__error(
			-EINVAL, "batch: entries is NULL, n_entries is %u", wanted->n_entries);
	if (wanted->n_entries &&
		(wanted->entry_bytes < offsetof(struct afd_entry, sample) ||
			wanted->entry_bytes > 4096))
		return afd__error(-EINVAL,
			"batch: entry_bytes is %u, must be sizeof(struct afd_entry), %zu",
			wanted->entry_bytes, sizeof(entry));
	if (wanted->n_entries > batch->limits.max_entries)
		return afd__error(-ENOSPC, "batch: %u entries, at most %u sequences and rows",
			wanted->n_entries, batch->limits.max_entries);
	for (i = 0; !rc && i < wanted->n_entries; i++) {
		rc = read_entry(&entry, wanted, i);
		rc = rc ? rc : add_entry(batch, wanted, &entry);
		if (rc)
			name_user(rc, entry.user_id);
	}
	if (wanted->greedy_ids || !batch->ids)
		batch->ids |= AFD__IDS_GREEDY;
	return rc ? rc : check_outputs(batch, wanted);
}

/* ---- pages ---- */

static int reserve(struct afd__batch *batch)
{
	uint32_t i;
	int rc;

	for (i = 0; i < batch->n_entries; i++) {
		const struct afd__batch_entry *e = &batch->entries[i];

		rc = afd__kv_reserve(batch->kv, e->sequence, e->n_rows);
		if (rc) {
			afd__error_prefix(rc, "sequence %llu", (unsigned long long)e->id);
			name_user(rc, e->user_id);
			batch->n_entries = i;
			afd__batch_restore(batch);
			return rc;
		}
	}
	return 0;
}

void afd__batch_commit(struct afd__batch *batch)
{
	uint32_t i;

	for (i = 0; i < batch->n_entries; i++)
		afd__kv_commit(batch->kv, batch->entries[i].sequence);
	batch->n_entries = 0;
}

void afd__batch_restore(struct afd__batch *batch)
{
	while (batch->n_entries > 0)
		afd__kv_restore(batch->kv, batch->entries[--batch->n_entries].sequence);
}

/* ---- lanes ---- */

void afd__batch_split(const struct afd__batch_entry *entries, uint32_t n_entries,
	struct afd__batch_lane *lanes, uint32_t n_lanes)
{
	uint64_t rows_left = 0;
	uint32_t i = 0, lane, row = 0;

	for (lane = 0; lane < n_entries; lane++)
		rows_left += entries[lane].n_rows;
	for (lane = 0; lane < n_lanes; lane++) {
		struct afd__batch_lane *l = &lanes[lane];
		uint32_t lanes_left = n_lanes - lane;

		*l = (struct afd__batch_lane){ .entry0 = i, .row0 = row };
		while (i < n_entries) {
			/* Each lane behind this one gets an entry, if it can. */
			if (l->n_entries && n_entries - i < lanes_left)
				break;
			/* The entry goes where the larger part of it lies below the equal share. */
			if (l->n_entries &&
				lanes_left * (2ull * l->n_rows + entries[i].n_rows) > 2 * rows_left)
				break;
			l->n_rows += entries[i++].n_rows;
			l->n_entries++;
		}
		row += l->n_rows;
		rows_left -= l->n_rows;
	}
	assert(i == n_entries);
}

/* ---- what the device needs to know ---- */

/* Twice the last one, from 8 on, and at most what the longest sequence needs. */
static uint32_t steady_stride(const struct afd__batch *batch)
{
	uint32_t stride = 8, limit = batch->kv->list_capacity;

	while (stride < batch->table_stride)
		stride *= 2;
	return stride < limit ? stride : limit;
}

static void lay_out(struct afd__batch *batch)
{
	uint32_t i, n;

	batch->table_stride = 1;
	batch->last_position = 0;
	for (i = 0; i < batch->n_entries; i++) {
		uint32_t end = batch->entries[i].position0 + batch->entries[i].n_rows;

		n = afd__kv_pages(batch->kv, end);
		batch->table_stride = n > batch->table_stride ? n : batch->table_stride;
		batch->last_position =
			end - 1 > batch->last_position ? end - 1 : batch->last_position;
	}
	if (batch->limits.steady_tables)
		batch->table_stride = steady_stride(batch);
	batch->positions_at = batch->n_rows;
	batch->table_rows_at = batch->positions_at + batch->n_rows;
	batch->outputs_at = batch->table_rows_at + batch->n_rows;
	batch->samples_at = (batch->outputs_at + batch->n_outputs + 1) / 2 * 2;
	batch->groups_at = batch->samples_at;
	if (batch->ids & AFD__IDS_SAMPLED)
		batch->groups_at += (size_t)batch->n_outputs * SAMPLE_WORDS;
	batch->group_words = batch->n_rows + (size_t)batch->n_entries * batch->table_stride;
	batch->n_words = batch->groups_at + batch->kv->shape.n_groups * batch->group_words;
	assert(batch->n_words <= batch->capacity_words);
}

static void write_rows(struct afd__batch *batch, uint32_t entry)
{
	const struct afd__batch_entry *e = &batch->entries[entry];
	uint32_t i;

	memcpy(batch->words + e->row0, e->ids, e->n_rows * sizeof(int32_t));
	for (i = 0; i < e->n_rows; i++) {
		batch->words[batch->positions_at + e->row0 + i] = (int32_t)(e->position0 + i);
		batch->words[batch->table_rows_at + e->row0 + i] = (int32_t)entry;
	}
}

static void write_pages(struct afd__batch *batch, uint32_t entry, uint32_t group)
{
	const struct afd__batch_entry *e = &batch->entries[entry];
	const int32_t *list = afd__kv_list(batch->kv, e->sequence, group);
	int32_t *slots = batch->words + afd__batch_slots_at(batch, group) + e->row0;
	int32_t *table = batch->words + afd__batch_table_at(batch, group) +
			 (size_t)entry * batch->table_stride;
	uint32_t page_size = batch->kv->shape.page_size,
		 n = afd__kv_pages(batch->kv, e->position0 + e->n_rows), i;

	/* What is gone and what lies behind is never looked at; it is written as a page that there
	 * is, so that nothing uploaded is left to chance. */
	for (i = 0; i < n; i++)
		table[i] = list[i] == AFD__PAGE_GONE ? 0 : list[i];
	memset(table + n, 0, (batch->table_stride - n) * sizeof(int32_t));
	for (i = 0; i < e->n_rows; i++) {
		uint32_t position = e->position0 + i;

		slots[i] = (int32_t)((uint32_t)list[position / page_size] * page_size +
				     position % page_size);
	}
}

/* Of the output that row i of the entry gives. */
static void write_sample(struct afd__batch *batch, const struct afd__batch_entry *e, uint32_t i,
	uint32_t output)
{
	const struct afd__sample_row row = {
		.seed = e->sample.seed,
		.position = (uint64_t)e->position0 + i + 1,
		.temperature = e->sample.temperature,
		.top_p = e->sample.top_p,
		.top_k = e->sample.top_k,
	};

	memcpy(batch->words + batch->samples_at + (size_t)output * SAMPLE_WORDS, &row, sizeof(row));
}

static void write_words(struct afd__batch *batch)
{
	int32_t *outputs = batch->words + batch->outputs_at;
	uint32_t entry, group, i, output = 0;

	if (batch->samples_at > batch->outputs_at + batch->n_outputs)
		batch->words[batch->samples_at - 1] = 0;

	for (entry = 0; entry < batch->n_entries; entry++) {
		const struct afd__batch_entry *e = &batch->entries[entry];

		write_rows(batch, entry);
		for (group = 0; group < batch->kv->shape.n_groups; group++)
			write_pages(batch, entry, group);
		for (i = e->n_rows - e->n_outputs; i < e->n_rows; i++) {
			if (batch->ids & AFD__IDS_SAMPLED)
				write_sample(batch, e, i, output);
			outputs[output++] = (int32_t)(e->row0 + i);
		}
	}
}

int afd__batch_plan(struct afd__batch *batch, const struct afd_batch *wanted)
{
	int rc = check(batch, wanted);

	if (!rc)
		rc = reserve(batch);
	if (rc) {
		batch->n_entries = 0;
		return rc;
	}
	afd__batch_split(batch->entries, batch->n_entries, batch->lanes, batch->limits.n_lanes);
	lay_out(batch);
	write_words(batch);
	return 0;
}

const struct afd__batch_entry *afd__batch_entry_of(const struct afd__batch *batch, uint32_t row)
{
	uint32_t low = 0, high = batch->n_entries;

	assert(row < batch->n_rows);
	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if (batch->entries[middle].row0 <= row)
			low = middle;
		else
			high = middle;
	}
	return &batch->entries[low];
}
