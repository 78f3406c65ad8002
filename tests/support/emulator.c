/* SPDX-License-Identifier: Apache-2.0 */
/* Finds the emulator's functions by name (emulator.h). */
#include "emulator.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

void emulator_open(struct emulator *e)
{
	const struct {
		void *at;
		const char *name;
	} all[] = {
		{ &e->context, "emu_context" },
		{ &e->set_context, "emu_set_context" },
		{ &e->device_of, "emu_device_of" },
		{ &e->n_allocations, "emu_n_allocations" },
		{ &e->n_registered, "emu_n_registered" },
		{ &e->n_launches, "emu_n_launches" },
		{ &e->n_replays, "emu_n_replays" },
		{ &e->stream_create, "cudaStreamCreateWithFlags" },
		{ &e->stream_destroy, "cudaStreamDestroy" },
		{ &e->stream_synchronize, "cudaStreamSynchronize" },
		{ &e->begin_capture, "cudaStreamBeginCapture" },
		{ &e->end_capture, "cudaStreamEndCapture" },
		{ &e->instantiate, "cudaGraphInstantiate" },
		{ &e->graph_launch, "cudaGraphLaunch" },
		{ &e->graph_destroy, "cudaGraphDestroy" },
		{ &e->exec_destroy, "cudaGraphExecDestroy" },
		{ &e->alloc, "cudaMalloc" },
		{ &e->free, "cudaFree" },
		{ &e->copy, "cudaMemcpyAsync" },
	};
	char path[1024];
	void *module;

	snprintf(path, sizeof(path), "%s/afd-cuda.so", getenv("AFD_MODULE_DIR"));
	module = dlopen(path, RTLD_NOW);
	if (!module)
		fail_msg("%s", dlerror());
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		*(void **)all[i].at = dlsym(module, all[i].name);
		if (!*(void **)all[i].at)
			fail_msg("%s: has no %s", path, all[i].name);
	}
	/* Stays loaded: a stream of the host's outlives the stages. */
}
