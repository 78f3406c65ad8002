/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the device front door share: the backend inside the library, and the way to
 * those that are modules. device.c asks; cpu.c and module.c answer. Nothing outside lib/device
 * includes this.
 */
#ifndef AFD_LIB_DEVICE_BACKENDS_H
#define AFD_LIB_DEVICE_BACKENDS_H

#include "device.h"
#include "module.h"

extern const struct afd__device_ops afd__cpu_device_ops;
extern const struct afd__module_host afd__module_host;

/* Loads afd-<name>.so. On success *handle is for afd__module_unload, which takes NULL. -ENOSYS when
 * there is none, -EPROTO when it is of another build. */
int afd__module_load(const char *name, void **handle, const struct afd__device_ops **ops);

/* 0, or the queue's sticky error with its text set again. */
int afd__queue_error(const struct afd__queue *q);

#endif
