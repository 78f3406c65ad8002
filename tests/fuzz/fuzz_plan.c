/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a trace, as measured times and as a calibration: refused with a text, or rows inside
 * their limits that the planner then takes. Built for libFuzzer, or with replay.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <afd/afd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { ROOM = 64 };

static void check_trace(const char *text, size_t n_bytes)
{
	struct afd_plan_request rows[ROOM];
	struct afd_plan_workload w = {
		.size = sizeof(w), .requests = rows, .request_bytes = sizeof(rows[0])
	};
	struct afd_plan_load load = { .size = sizeof(load) };
	size_t n = 0;
	int rc = afd_plan_parse_trace(text, n_bytes, rows, ROOM, &n);

	if (rc < 0 && !afd_last_error()[0])
		abort();
	if (rc < 0)
		return;
	if (rc != (int)n || n == 0 || n > ROOM)
		abort();
	w.n_requests = n;
	if (afd_plan_average(&w, &load) || !isfinite(load.theta) || load.theta < 0 ||
		!(load.nu2 >= 0))
		abort();
}

static void check_times(const char *text, size_t n_bytes)
{
	struct afd_plan_time times[ROOM];
	size_t n = 0;
	int rc = afd_plan_parse_times(text, n_bytes, times, ROOM, &n);

	for (size_t i = 0; rc >= 0 && i < n; i++) {
		if (!(times[i].rows > 0) || !(times[i].us >= 0) || !isfinite(times[i].us) ||
			!memchr(times[i].stage, 0, sizeof(times[i].stage)) ||
			!memchr(times[i].device, 0, sizeof(times[i].device)))
			abort();
	}
}

static void check_calibration(const char *text, size_t n_bytes)
{
	struct afd_plan_params p = { .size = sizeof(p), .batch = 8 };
	struct afd_plan_load load = { .size = sizeof(load), .theta = 100, .nu2 = 100 };
	struct afd_plan_sizing sizing = { .size = sizeof(sizing) };
	int rc = afd_plan_parse_calibration(text, n_bytes, &p);

	/* All coefficients 0 are still refused, and no number overflows. */
	if (!rc && !afd_plan_size(&p, &load, &sizing) && !isfinite(sizing.r_continuous))
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	check_trace((const char *)data, n_bytes);
	check_times((const char *)data, n_bytes);
	check_calibration((const char *)data, n_bytes);
	return 0;
}
