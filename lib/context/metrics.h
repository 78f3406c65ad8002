/* SPDX-License-Identifier: Apache-2.0 */
/* The registry of one context's metrics; made and ended by the context alone. core.h has what
 * others call. */
#ifndef AFD_LIB_METRICS_H
#define AFD_LIB_METRICS_H

#include "core.h"

struct afd__metrics *afd__metrics_create(void); /* NULL and the error text when there is no memory */
void afd__metrics_destroy(struct afd__metrics *metrics);

#endif
