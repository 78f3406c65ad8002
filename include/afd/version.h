/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The version of this header. The only place where it is written: the build reads it for the soname
 * and for afd.pc. Before 1.0 the soname is 0; from 1.0 on it is the major number.
 */
#ifndef AFD_VERSION_H
#define AFD_VERSION_H

#define AFD_VERSION_MAJOR 0
#define AFD_VERSION_MINOR 1
#define AFD_VERSION_PATCH 0

#endif
