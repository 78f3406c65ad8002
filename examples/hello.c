/* SPDX-License-Identifier: Apache-2.0 */
/* One token, decoded across two processes: build/examples/hello MODEL_DIR. The README shows it. */
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <afd/afd.h>

#define CHECK(call) if (call) return fprintf(stderr, "%s\n", afd_last_error()), 1

int main(int argc, char **argv)
{
	const char *address = "shm:hello";
	const int32_t prompt[] = { 1, 2, 3 };
	int32_t id;
	afd_context *ctx;
	afd_model *model;
	afd_transport *net;
	pid_t child = fork(); /* before the library is used: handles do not cross a fork */
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params listen = { .size = sizeof listen,
		.listen = &address, .n_listen = 1 };
	struct afd_transport_params connect = { .size = sizeof connect,
		.connect = &address, .n_connect = 1 };
	struct afd_entry entry = { .sequence = 7, .ids = prompt, .n_ids = 3 };
	struct afd_batch batch = { .size = sizeof batch, .entries = &entry, .n_entries = 1,
		.entry_bytes = sizeof entry, .greedy_ids = &id, .greedy_rows = 1 };

	CHECK(afd_context_create(&ctx, NULL));
	CHECK(afd_model_open(&model, ctx, argc > 1 ? argv[1] : "models/tiny-qwen3", NULL));
	CHECK(afd_model_contract(model, &contract));
	CHECK(afd_transport_create(&net, ctx, &contract, child ? &connect : &listen));
	if (!child) { /* the FFN process: holds the FFN's weights, serves until the other ends */
		afd_ffn *ffn;
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		CHECK(afd_ffn_create(&ffn, model, net, NULL));
		CHECK(afd_ffn_serve(ffn));
	} else { /* the attention process: holds all other weights and the KV cache */
		afd_attn *attn;
		CHECK(afd_attn_create(&attn, model, net, NULL));
		CHECK(afd_attn_add(attn, entry.sequence));
		CHECK(afd_attn_step(attn, &batch, 0));
		printf("after 1 2 3 comes %d\n", id);
	}
	return 0;
}
