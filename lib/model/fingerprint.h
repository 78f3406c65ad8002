/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fingerprint of the weights that a stage holds: 128 bits, so that two FFN peers which claim
 * the same shard can be seen to hold the same numbers. Not cryptographic. docs/wire.md defines it:
 *
 *   Each tensor of which the stage holds a slice gives a digest, XXH3 with 128 bits and seed 0 over
 *   these bytes:
 *     1. the canonical name of the tensor, and a 0 byte. Canonical is the name in a checkpoint that
 *        stores every matrix apart, "model.layers.3.mlp.experts.5.up_proj.weight", also where the
 *        file at hand has it fused; of names that families spell differently the first one in the
 *        table of docs/models.md
 *     2. the dtype as safetensors spells it, "F32", "F16", "BF16" or "F8_E4M3", and a 0 byte
 *     3. the number of dimensions, u32 little-endian
 *     4. for each dimension three u64 little-endian: its size in the whole tensor, and begin and
 *        end of the slice in it
 *     5. the numbers of the slice, row-major, little-endian, as they are stored
 *   The scales of an F8_E4M3 matrix are a tensor of their own, of [rows of blocks][columns of
 *   blocks], under the canonical name of the matrix with "_scale_inv" behind it, however the file
 *   spells it; the slice is every block that the slice of the matrix touches. Of an up half of a
 *   fused tensor that does not begin on a block they begin with the block it begins in.
 *   The digests are added as 128-bit numbers modulo 2^128, so the order in which a stage loads its
 *   tensors does not matter. The fingerprint is XXH3 with 128 bits and seed 0 over 24 bytes: the
 *   sum's low 64 bits, its high 64 bits and the number of tensors, u64 little-endian each. In text
 *   and as a pair of u64 the low half comes first. 0, 0 means unknown.
 *
 * A stage creates one, and for every tensor calls _begin, _add for the bytes in order (in the pass
 * that packs them), _end, and _scales with the same slice. A hash goes through its bytes one by one,
 * so with several compute threads slices wait instead (_later), and are hashed side by side. Without
 * <xxhash.h> at build time every call is accepted and the value is 0, 0: unknown, and never equal to
 * anything.
 */
#ifndef AFD_LIB_FINGERPRINT_H
#define AFD_LIB_FINGERPRINT_H

#include "model.h"

struct afd__fingerprint;

/* NULL and the error text when there is no memory. */
struct afd__fingerprint *afd__fingerprint_create(struct afd_context *ctx);
void afd__fingerprint_destroy(struct afd__fingerprint *fp); /* NULL is fine */

/* begin and end are [n_dims] of the slice, or both NULL for the whole tensor. */
void afd__fingerprint_begin(struct afd__fingerprint *fp, const struct afd__tensor *tensor,
			    const uint64_t *begin, const uint64_t *end);
void afd__fingerprint_add(struct afd__fingerprint *fp, const void *bytes, size_t n_bytes);
void afd__fingerprint_end(struct afd__fingerprint *fp);

/* Of an e4m3 matrix with its data; of any other tensor nothing happens. begin and end are those of
 * the matrix. */
void afd__fingerprint_scales(struct afd__fingerprint *fp, const struct afd__tensor *tensor,
			     const uint64_t *begin, const uint64_t *end);

/* A slice of a matrix at once, with its scales, from where it lies. */
void afd__fingerprint_slice(struct afd__fingerprint *fp, const struct afd__tensor *tensor,
			    const uint64_t begin[2], const uint64_t end[2]);

/* The same by the compute threads, together with others that wait: by the time of _value. Until then
 * tensor->data stays where it is. `release`: its pages are given back then. False: there is one
 * thread, and nothing was done. */
bool afd__fingerprint_later(struct afd__fingerprint *fp, const struct afd__tensor *tensor,
			    const uint64_t begin[2], const uint64_t end[2], bool release);

/* A whole tensor at once, with its scales. */
void afd__fingerprint_tensor(struct afd__fingerprint *fp, const struct afd__tensor *tensor);

void afd__fingerprint_value(struct afd__fingerprint *fp, uint64_t value[2]);

#endif
