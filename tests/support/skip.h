/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a conformance test ends that this device or backend cannot be asked: it is counted as skipped,
 * and its output says why. Included by both rigs of tests/conformance, behind cmocka.h.
 */
#ifndef AFD_TEST_SKIP_H
#define AFD_TEST_SKIP_H

static inline void rig_skip(const char *why)
{
	print_message("skipped: %s\n", why);
	skip();
}

#endif
