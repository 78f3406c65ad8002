/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A number of the planner against the one that is wanted, within a bound that the test states. What
 * is no number is near nothing. Included behind cmocka.h by the tests of lib/plan.
 */
#ifndef AFD_TEST_NEAR_H
#define AFD_TEST_NEAR_H

#include <math.h>

static inline void near(double value, double wanted, double within)
{
	if (!(fabs(value - wanted) <= within))
		fail_msg("%.9g, wanted %.9g within %.3g", value, wanted, within);
}

#endif
