/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A module that no build of the library accepts: it says that it is of another one. The library
 * must not follow its pointers. Opened by test_device_seam.c.
 */
#include "../../lib/device/module.h"

extern const struct afd__module afd_module_entry;
AFD_API const struct afd__module afd_module_entry = { .build = "another build",
	.ops = (const void *)8 };
