/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libafd: attention and FFN of a transformer in different processes. All of the API, in the order
 * in which a host meets it. The rules that hold everywhere stand at the top of context.h.
 */
#ifndef AFD_AFD_H
#define AFD_AFD_H

#include "version.h"
#include "context.h"
#include "model.h"
#include "transport.h"
#include "ffn.h"
#include "attn.h"
#include "plan.h"

#endif
