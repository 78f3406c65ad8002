/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For LD_PRELOAD in the virtual machine: a tool whose waits spin for ever, or with
 * AFD_TEST_SPIN=never sleep at once. Tools have no flag for it; a host sets it in its params.
 */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "../../include/afd/transport.h"

int afd_transport_create(afd_transport **out, afd_context *ctx, const struct afd_contract *contract,
	const struct afd_transport_params *params)
{
	int (*create)(afd_transport **, afd_context *, const struct afd_contract *,
		const struct afd_transport_params *) = dlsym(RTLD_NEXT, "afd_transport_create");
	const char *spin = getenv("AFD_TEST_SPIN");
	struct afd_transport_params ours = *params;

	ours.spin_us = spin && !strcmp(spin, "never") ? UINT32_MAX : UINT32_MAX - 1;
	return create(out, ctx, contract, &ours);
}
