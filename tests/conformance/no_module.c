/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A shared object that is no module at all: it has no afd_module_entry. Opened by
 * test_device_seam.c as a device.
 */
int afd_nothing(void);

__attribute__((visibility("default"))) int afd_nothing(void)
{
	return 0;
}
