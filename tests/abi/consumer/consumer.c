/* SPDX-License-Identifier: Apache-2.0 */
/* Built as C11 and as C++11 against an installed copy that was moved: links, and the library
 * answers for its version. */
#include <stdio.h>
#include <string.h>

#include <afd/afd.h>

int main(void)
{
	struct afd_context_params params;
	afd_context *ctx = NULL;
	char version[32];

	memset(&params, 0, sizeof params);
	params.size = sizeof params;
	if (afd_context_create(&ctx, &params)) {
		fprintf(stderr, "%s\n", afd_last_error());
		return 1;
	}
	afd_context_destroy(ctx);
	snprintf(version, sizeof version, "%d.%d.%d", AFD_VERSION_MAJOR, AFD_VERSION_MINOR,
		AFD_VERSION_PATCH);
	printf("header %s, library %s\n", version, afd_version());
	return strcmp(version, afd_version()) != 0;
}
