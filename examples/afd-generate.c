/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-generate: continues sequences of token ids. With --ffn the FFN is done by peers, each with a
 * shard; without, by a stage in this process, with rows rounded as on a wire: where one peer holds
 * everything the ids and the logits are the same either way. Of an attention group rank 0 prints
 * and writes; the others compute the same and are silent.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <afd/afd.h>

#include "generate/input.h"
#include "generate/run.h"
#include "generate/trace.h"
#include "tool/json.h"
#include "tool/npy.h"
#include "tool/progress.h"
#include "tool/stage.h"

#define MAX_STEP_ROWS 65536 /* afd_attn_params.max_rows */
#define AUTO_LANES    5     /* --lanes auto, until the batch is known */
#define AUTO_BATCH    8     /* from so many sequences on, auto takes two lanes */

struct flags {
	struct tool_stage stage;
	const char *ids, *batch, *logits, *trace, *group;
	struct tool_list ffn, eos;
	uint32_t max_tokens, lanes, kv_pages, page_size, prefill_chunk, top_k, reconnect_s;
	uint32_t rank[2]; /* index and number in the attention group */
	int32_t wire_dtypes[2], kv_dtype;
	int32_t gate; /* enum afd_gate, in the order of --gate; 0: the library's default */
	double temperature, top_p;
	uint64_t seed;
	int json;
};

struct program {
	const struct flags *flags;
	struct input input;
	struct trace trace;
	struct tool_npy npy;
	struct run run;
	int32_t *eos_ids; /* [flags->eos.n_items] */
	afd_context *ctx;
	afd_model *model;
	struct afd_model_info info;
	afd_transport *net;
	afd_ffn *ffn;
	afd_attn *attn;
};

static volatile sig_atomic_t interrupted;

static void interrupt(int signal)
{
	interrupted = signal;
}

static int set_lanes(const struct tool_option *option, const char *value)
{
	if (strcmp(value, "auto"))
		return tool_set_u32(option, value);
	*(uint32_t *)option->into = AUTO_LANES;
	return TOOL_DONE;
}

/* ---- before any weight is touched ---- */

static int check_flags(const struct flags *flags)
{
	if (!flags->stage.model)
		return tool_fail(TOOL_USAGE, "--model: required");
	if (!flags->ids == !flags->batch)
		return tool_fail(TOOL_USAGE, "--ids, --batch: %s given, limit one of them",
			flags->ids ? "both" : "none");
	if (flags->rank[1] > 1 && !flags->group)
		return tool_fail(TOOL_USAGE,
			"--attention-tp %" PRIu32 "/%" PRIu32 ": --attention-group is not given, "
			"limit 0/1 without it",
			flags->rank[0], flags->rank[1]);
	if (flags->group && flags->rank[1] < 2)
		return tool_fail(TOOL_USAGE,
			"--attention-group %s: --attention-tp is 0/1, limit 2 ranks or more",
			flags->group);
	return TOOL_DONE;
}

/* Rank 0 prints and writes for its group; of the others errors are seen. */
static void hush(struct flags *f)
{
	if (!f->rank[0])
		return;
	f->logits = f->trace = NULL;
	if (!f->stage.log)
		f->stage.log = AFD_LOG_ERROR;
}

static int read_eos(struct program *program)
{
	const struct tool_list *list = &program->flags->eos;
	char *end;

	program->eos_ids = calloc(list->n_items + 1, sizeof *program->eos_ids);
	if (!program->eos_ids)
		return tool_fail(TOOL_FAILED, "--eos: no memory");
	for (uint32_t i = 0; i < list->n_items; i++) {
		long id = strtol(list->items[i], &end, 10);

		if (end == list->items[i] || *end || id < 0 || id > INT32_MAX)
			return tool_fail(TOOL_USAGE, "--eos: value '%s', limit 0 to %d",
				list->items[i], INT32_MAX);
		program->eos_ids[i] = id;
	}
	return TOOL_DONE;
}

static int read_input(struct program *program)
{
	const struct flags *flags = program->flags;
	int status = flags->ids ? input_from_ids(&program->input, flags->ids, flags->max_tokens,
					  flags->seed)
				: input_from_batch(&program->input, flags->batch, flags->max_tokens,
					  flags->seed);

	if (!status && flags->logits && program->input.n_sequences > 1)
		return tool_fail(TOOL_USAGE, "--logits: %" PRIu32 " sequences in --batch, limit 1",
			program->input.n_sequences);
	return status ? status : read_eos(program);
}

/* ---- the stages ---- */

static int check_ids(const struct program *program)
{
	uint32_t vocab_size = program->info.vocab_size;

	for (uint32_t i = 0; i < program->input.n_sequences; i++) {
		const struct sequence *sequence = &program->input.sequences[i];

		for (uint32_t j = 0; j < sequence->n_prompt; j++) {
			if ((uint32_t)sequence->ids[j] >= vocab_size)
				return tool_fail(TOOL_FAILED,
					"sequence %" PRIu32 ": id %" PRId32 " at position %" PRIu32
					", limit %" PRIu32,
					i, sequence->ids[j], j, vocab_size - 1);
		}
	}
	return TOOL_DONE;
}

static uint32_t choose_lanes(const struct program *program)
{
	uint32_t lanes = program->flags->lanes;

	if (lanes != AUTO_LANES)
		return lanes;
	return program->flags->ffn.n_items && program->input.n_sequences >= AUTO_BATCH ? 2 : 1;
}

static int create_transport(struct program *program)
{
	const struct flags *flags = program->flags;
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params params = {
		.size = sizeof params,
		.connect = flags->ffn.items,
		.n_connect = flags->ffn.n_items,
		.lanes = choose_lanes(program),
		.max_rows = flags->stage.max_rows,
		.gate = flags->gate,
		.deadline_ms = flags->stage.deadline_ms,
		.reconnect_ms = flags->reconnect_s * 1000,
		.key_file = flags->stage.key,
		.tls = (uint32_t)flags->stage.tls,
		.connect_timeout_ms = flags->stage.connect_timeout_ms,
		.to_ffn_dtype = flags->wire_dtypes[0],
		.to_attention_dtype = flags->wire_dtypes[1],
		.group = flags->group,
		.group_index = flags->rank[0],
		.group_size = flags->rank[1],
	};
	int rc;

	if (afd_model_contract(program->model, &contract))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	rc = afd_transport_create(&program->net, program->ctx, &contract, &params);
	return rc ? tool_fail(rc == -EINVAL || rc == -ENOSYS ? TOOL_USAGE : TOOL_FAILED, "%s",
			    afd_last_error())
		  : TOOL_DONE;
}

static int create_ffn(struct program *program)
{
	struct afd_ffn_params params = { .size = sizeof params,
		.device = program->flags->stage.device,
		.quantize_activations = program->flags->stage.quantize };

	return afd_ffn_create(&program->ffn, program->model, NULL, &params)
		       ? tool_fail(TOOL_FAILED, "%s", afd_last_error())
		       : TOOL_DONE;
}

/* Positions that steps will store: the last generated token is never fed. */
static uint32_t count_positions(const struct sequence *sequence)
{
	uint64_t n = sequence->n_prompt + (uint64_t)sequence->max_tokens - 1;

	return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}

/* Pages for all of them, or fewer where they leave the windows of all layers. */
static uint64_t count_pages(const struct program *program, const struct afd_attn_params *params)
{
	const struct input *input = &program->input;
	uint64_t n = 0;

	for (uint32_t i = 0; i < input->n_sequences; i++) {
		const struct sequence *sequence = &input->sequences[i];
		uint32_t rows = sequence->n_prompt < program->run.prompt_rows
					? sequence->n_prompt
					: program->run.prompt_rows;
		int64_t pages = afd_attn_kv_pages(program->model, params,
			count_positions(sequence), rows ? rows : 1);

		n += pages > 0 ? (uint64_t)pages : 0;
	}
	return n;
}

static uint32_t longest_sequence(const struct input *input)
{
	uint32_t longest = 1;

	for (uint32_t i = 0; i < input->n_sequences; i++) {
		uint32_t n = count_positions(&input->sequences[i]);

		longest = n > longest ? n : longest;
	}
	return longest;
}

static int create_attention(struct program *program)
{
	const struct flags *flags = program->flags;
	char what[256];
	struct tool_progress progress = { .what = what };
	uint64_t n_pages;
	struct afd_attn_params params = {
		.size = sizeof params,
		.device = flags->stage.device,
		.ffn = program->ffn,
		.max_sequences = program->input.n_sequences,
		.page_size = flags->page_size,
		.kv_dtype = flags->kv_dtype,
		.quantize_activations = flags->stage.quantize,
		.progress = flags->rank[0] ? NULL : tool_progress_show,
		.progress_user = &progress,
	};

	params.max_rows = run_plan(&program->run, flags->prefill_chunk, MAX_STEP_ROWS);
	params.max_outputs = program->run.max_outputs;
	n_pages = flags->kv_pages ? flags->kv_pages : count_pages(program, &params);
	params.kv_pages = n_pages;
	if (!program->info.n_full_layers)
		params.max_positions = longest_sequence(&program->input);
	if (n_pages > UINT32_MAX)
		return tool_fail(
			TOOL_FAILED, "kv: %" PRIu64 " pages, limit %" PRIu32, n_pages, UINT32_MAX);
	snprintf(what, sizeof what, "loading %s", flags->stage.model);
	if (!program->net) {
		params.to_ffn_dtype = flags->wire_dtypes[0];
		params.to_attention_dtype = flags->wire_dtypes[1];
		params.lanes = choose_lanes(program);
	}
	if (afd_attn_create(&program->attn, program->model, program->net, &params))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	return TOOL_DONE;
}

static int create(struct program *program)
{
	const struct flags *flags = program->flags;
	struct afd_tracer tracer;
	int status;

	if (trace_create(&program->trace, flags->trace, &tracer))
		return tool_fail(TOOL_FAILED, "--trace: no memory");
	status = tool_context_create(&program->ctx, &flags->stage, &tracer);
	if (status)
		return status;
	program->info.size = sizeof program->info;
	if (afd_model_open(&program->model, program->ctx, flags->stage.model, NULL) ||
		afd_model_info(program->model, &program->info))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	program->run = (struct run){
		.input = &program->input,
		.eos_ids = program->eos_ids,
		.n_eos = flags->eos.n_items,
		.vocab_size = program->info.vocab_size,
		.logits_file = flags->logits ? &program->npy : NULL,
		.sample = { .size = sizeof program->run.sample,
			.temperature = flags->temperature,
			.top_p = flags->top_p,
			/* More than there are keep all. */
			.top_k = flags->top_k < program->info.vocab_size
					 ? flags->top_k
					 : program->info.vocab_size },
	};
	status = check_ids(program);
	if (!status && (flags->ffn.n_items || flags->group))
		status = create_transport(program);
	if (!status && !flags->ffn.n_items)
		status = create_ffn(program);
	return status ? status : create_attention(program);
}

static void destroy(struct program *program)
{
	afd_attn_destroy(program->attn);
	afd_ffn_destroy(program->ffn);
	afd_transport_destroy(program->net);
	afd_model_close(program->model);
	afd_context_destroy(program->ctx);
	trace_free(&program->trace);
	input_free(&program->input);
	free(program->eos_ids);
}

/* ---- the results ---- */

static json_t *peers_json(const struct program *program)
{
	struct afd_peer_info peer = { .size = sizeof peer };
	json_t *list = json_array();

	for (uint32_t i = 0; program->net && !afd_transport_peer(program->net, i, &peer); i++) {
		if (peer.role == AFD_ROLE_ATTENTION)
			continue;
		json_array_append_new(
			list, json_pack("{s:s, s:I, s:I, s:I}", "address", peer.address, "parts",
				      (json_int_t)peer.n_parts, "rows", (json_int_t)peer.n_rows,
				      "resent_rows", (json_int_t)peer.n_resent_rows));
	}
	return list;
}

static json_t *ids_json(const struct input *input)
{
	json_t *all = json_array();

	for (uint32_t i = 0; i < input->n_sequences; i++) {
		const struct sequence *sequence = &input->sequences[i];
		json_t *ids = json_array();

		for (uint32_t j = sequence->n_prompt; j < sequence->n_ids; j++)
			json_array_append_new(ids, json_integer(sequence->ids[j]));
		json_array_append_new(all, ids);
	}
	return all;
}

static int print_json(const struct program *program)
{
	struct afd_attn_stats stats = { .size = sizeof stats };
	struct afd_ffn_stats ffn = { .size = sizeof ffn };
	const struct run *run = &program->run;

	if (afd_attn_stats(program->attn, &stats) ||
		(program->ffn && afd_ffn_stats(program->ffn, &ffn)))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	return tool_json_print(json_pack(
		"{s:o, s:f, s:{s:f, s:f, s:f, s:f}, s:o, s:I, s:I, s:I, s:s, s:{s:I, s:I}}", "ids",
		ids_json(&program->input), "tokens_per_second",
		run->seconds > 0 ? run->n_generated / run->seconds : 0.0, "seconds", "attention",
		stats.attention_ns * 1e-9, "ffn", stats.ffn_ns * 1e-9, "wait", stats.wait_ns * 1e-9,
		"total", run->seconds, "peers", peers_json(program), "steps",
		(json_int_t)stats.n_steps, "rows", (json_int_t)stats.n_rows, "lanes",
		(json_int_t)choose_lanes(program), "isa", afd_context_isa(program->ctx),
		"weight_bytes", "attention", (json_int_t)stats.stored_bytes, "ffn",
		(json_int_t)ffn.stored_bytes));
}

static int print_ids(const struct input *input)
{
	for (uint32_t i = 0; i < input->n_sequences; i++) {
		const struct sequence *sequence = &input->sequences[i];

		for (uint32_t j = sequence->n_prompt; j < sequence->n_ids; j++)
			printf("%s%" PRId32, j > sequence->n_prompt ? " " : "", sequence->ids[j]);
		printf("\n");
	}
	return tool_flush();
}

static int generate(const struct flags *flags)
{
	struct program program = { .flags = flags };
	int status = read_input(&program), rc;

	if (!status)
		status = create(&program);
	if (!status && flags->logits &&
		(rc = tool_npy_open(&program.npy, flags->logits, program.info.vocab_size)))
		status = tool_fail(TOOL_FAILED, "--logits %s: %s", flags->logits, strerror(-rc));
	if (!status) {
		program.run.attn = program.attn;
		status = run_steps(&program.run, &interrupted);
		rc = tool_npy_close(&program.npy, !status);
		if (rc && !status)
			status = tool_fail(
				TOOL_FAILED, "--logits %s: %s", flags->logits, strerror(-rc));
		rc = trace_write(&program.trace); /* of a failed run too: it shows where */
		status = status ? status : rc;
	}
	if (!status && !flags->rank[0])
		status = flags->json ? print_json(&program) : print_ids(&program.input);
	destroy(&program);
	return status;
}

/* ---- flags ---- */

static struct flags flags = {
	.max_tokens = 16, .lanes = 1, .page_size = 16, .top_p = 1, .rank = { 0, 1 }
};

static const struct tool_option options[] = {
	TOOL_OPTIONS_STAGE(flags.stage),
	{ "ids", "\"1 2 3\"", NULL, "token ids of the prompt; this or --batch is required",
		tool_set_text, &flags.ids, 0, 0 },
	{ "batch", "FILE", NULL, "JSON array of {\"ids\": [...], \"max_tokens\": n, \"seed\": s}",
		tool_set_text, &flags.batch, 0, 0 },
	{ "max-tokens", "N", "16", "generated tokens of a sequence, 1 to 1048576", tool_set_u32,
		&flags.max_tokens, 1, 1048576 },
	{ "eos", "ID", "none", "an id that ends a sequence; may be repeated", tool_set_list,
		&flags.eos, 0, 0 },
	{ "ffn", "ADDR", "in this process",
		"an FFN peer, shm:NAME or tcp:HOST:PORT; repeated for shards and replicas, in any "
		"order", tool_set_list,
		&flags.ffn, 0, 0 },
	{ "lanes", "1..4|auto", "1",
		"micro-batches that overlap; auto: 2 from 8 sequences on when --ffn is given, else "
		"1",
		set_lanes, &flags.lanes, 1, AFD_MAX_LANES },
	{ "wire-dtype", "X|X:Y", "auto",
		"f32, bf16, f16 or fp8 rows (attention to FFN : FFN to attention); auto: as "
		"embed_tokens, bf16 for FP8",
		tool_set_dtypes, flags.wire_dtypes, 0, 0 },
	{ "kv-dtype", "X", "auto", "f32, bf16, f16 or fp8 KV cache; auto: as embed_tokens",
		tool_set_dtype, &flags.kv_dtype, 0, 0 },
	{ "kv-pages", "N", "enough for the run", "pages of the KV cache, 1 to 4294967295",
		tool_set_u32, &flags.kv_pages, 1, UINT32_MAX },
	{ "page-size", "P", "16", "positions in a page, 1 to 65536", tool_set_u32, &flags.page_size,
		1, 65536 },
	{ "prefill-chunk", "C", "0", "prompt rows of one step, 0 to 65536; 0: all at once",
		tool_set_u32, &flags.prefill_chunk, 0, MAX_STEP_ROWS },
	{ "gate", "attention|ffn", "attention", "which side routes rows to experts",
		tool_set_either, &flags.gate, 0, 0 },
	{ "attention-tp", "i/n", "0/1", "attention rank i of n, 2 to 64 of them: part of the heads",
		tool_set_shard, flags.rank, 0, 0 },
	{ "attention-group", "ADDR", NULL,
		"where rank 0 listens and the other attention ranks connect; or ADDR,... one of each rank",
		tool_set_text, &flags.group, 0, 0 },
	{ "temperature", "T", "0: greedy", "sampling temperature, 0 to 100", tool_set_real,
		&flags.temperature, 0, 100 },
	{ "top-k", "K", "0: off", "sample from the K largest logits", tool_set_u32, &flags.top_k, 0,
		UINT32_MAX },
	{ "top-p", "P", "1: off", "sample from the smallest set whose sum reaches P, 0 to 1",
		tool_set_real, &flags.top_p, 0, 1 },
	{ "seed", "S", "0", "seed of the first sequence; the others' follow", tool_set_u64,
		&flags.seed, 0, 0 },
	{ "logits", "FILE.npy", "none", "float32 [positions, vocab] of the one sequence",
		tool_set_text, &flags.logits, 0, 0 },
	{ "reconnect-s", "N", "0 s",
		"how long a step waits for an FFN peer to come (back) when none is left, 0 to "
		"86400 s",
		tool_set_u32, &flags.reconnect_s, 0, 86400 },
	{ "trace", "FILE.json", "none", "Chrome trace of the steps", tool_set_text, &flags.trace, 0,
		0 },
	{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &flags.json, 0, 0 },
	{ 0 },
};

int main(int argc, char **argv)
{
	const struct sigaction action = { .sa_handler = interrupt };
	int status = tool_options_read(
		options, "--model DIR (--ids \"1 2 3\" | --batch FILE) [flags]", argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	status = check_flags(&flags);
	hush(&flags);
	if (!status)
		status = generate(&flags);
	free(flags.ffn.items);
	free(flags.eos.items);
	return status;
}
