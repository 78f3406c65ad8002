/* SPDX-License-Identifier: Apache-2.0 */
/* So that the C compiler links what nvcc compiled: the side's entry is in words_side.cu. */
#include "words.h"

_Static_assert(WORDS_BLOCKS == 16, "words_numbers.cu counts through 16 bits");
