/* SPDX-License-Identifier: Apache-2.0 */
/* A model by the name of a preset or by its directory: of a checkpoint only config.json is read. */
#ifndef PLAN_HARDWARE_H
#define PLAN_HARDWARE_H

#include <afd/plan.h>

/* Where numbers of a config.json are smaller than their default type says. */
struct plan_precision {
	double weight_bytes, kv_bytes; /* 0: not said */
};

/* TOOL_DONE, or TOOL_FAILED after a line on stderr. Strings of out live until the program ends. */
int plan_find_model(const char *name, struct afd_plan_model *out, struct plan_precision *precision);

#endif
