/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fields of the planner's params: inside their limits, or refused with their name, value and limit.
 * NaN and infinities are outside any limit. Called by every public function of the planner before
 * anything is computed.
 */
#include <math.h>

#include "plan.h"

int afd__plan_real(const char *field, double value, double min, double max)
{
	if (value >= min && value <= max && isfinite(value))
		return 0;
	return afd__error(-EINVAL, "plan: %s is %g, limit %g .. %g", field, value, min, max);
}

int afd__plan_whole(const char *field, uint64_t value, uint64_t min, uint64_t max)
{
	if (value >= min && value <= max)
		return 0;
	return afd__error(-EINVAL, "plan: %s is %llu, limit %llu .. %llu", field,
		(unsigned long long)value, (unsigned long long)min, (unsigned long long)max);
}

int afd__plan_real_or(const char *field, double *value, double fallback, double min, double max)
{
	if (*value == 0)
		*value = fallback;
	return afd__plan_real(field, *value, min, max);
}

int afd__plan_whole_or(
	const char *field, uint32_t *value, uint32_t fallback, uint32_t min, uint32_t max)
{
	if (*value == 0)
		*value = fallback;
	return afd__plan_whole(field, *value, min, max);
}
