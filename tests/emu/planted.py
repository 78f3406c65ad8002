# SPDX-License-Identifier: Apache-2.0
"""Bugs planted into the kernels and what calls them, one at a time; the tests under emulation must catch each.

A bug is a piece of source that becomes another. That file alone is compiled anew, as the build compiled it, and linked
with the rest; then one test runs. Bugs on the way to cuBLASLt are looked for with the fake of it. AFD_SAN_BUILDS holds the builds "asan" and "tsan" when they exist beside AFD_BUILD.
"""
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from sentences import BUILD, ROOT

KERNELS = ROOT / "kernels/cuda"
MODULE = ROOT / "modules/cuda"

# kernel, what stands there, what stands there instead, test, its cases, build that must catch it, order of threads
PLANTED = {
    "a_sum_without_the_barrier_after_its_warps": (
        "block.h:norm.cu", "\tbarrier();\n", "", "rows", "norm_a*", "plain", "first"),
    "a_norm_whose_inputs_keep_what_stood_behind_the_row": (
        "tile_form.h:norm.cu", "at - f.lead < f.k ?", "at - f.lead <= f.k ?", "inputs", "products*", "plain", "first"),
    "a_norm_whose_inputs_forget_to_quantise": (
        "tile_form.h:norm.cu", "if (f.quantize)", "if (f.quantize && f.lead)", "inputs", "products*", "plain", "first"),
    "a_norm_whose_inputs_are_scaled_by_a_part_of_the_row": (
        "tile_form.h:norm.cu", "GPU_UNROLL\n\tfor (unsigned i = 0; i < N_THREADS / 32; i++)", "GPU_UNROLL\n\tfor (unsigned i = 0; i < 4; i++)",
        "inputs", "products*", "plain", "first"),
    "a_norm_whose_inputs_do_not_cross_the_wire": (
        "norm.cu", "return cross(h[i] * scale * a.weight[i], a.out_wire);", "return h[i] * scale * a.weight[i];", "inputs", "wires*",
        "plain", "first"),
    "a_norm_that_adds_what_has_crossed_no_wire": (
        "norm.cu", "0.0f + cross(more, a.add_wire)", "0.0f + more", "inputs", "wires*", "plain", "first"),
    "a_norm_that_adds_a_zero_with_its_sign": (
        "norm.cu", "0.0f + cross(more, a.add_wire)", "cross(more, a.add_wire)", "inputs", "wires*", "plain", "first"),
    "a_norm_that_stops_one_number_early": (
        "norm.cu", "i < a.width; i += THREADS) {\n\t\tfloat", "i < a.width - 1; i += THREADS) {\n\t\tfloat", "rows", "norm_a*", "plain", "first"),
    "a_norm_whose_warp_counts_twice": (
        "block.h:norm.cu", "if (lane_id() == 0)\n\t\tsums[warp_id()] = v;", "if (lane_id() == 0)\n\t\tsums[0] = v;", "rows",
        "norm_a*", "plain", "first"),
    "an_argmax_that_takes_the_last_among_equals": (
        "argmax.cu", "index < a->index", "index > a->index", "rows", "argmax*", "plain", "first"),
    "an_argmax_without_its_barrier": (
        "argmax.cu", "\tbarrier();\n", "", "rows", "argmax*", "plain", "first"),
    "an_activation_one_column_too_far": (
        "activation.cu", "if (i < a.width)", "if (i <= a.width)", "rows", "activation_a*", "asan", "first"),
    "a_gather_that_ignores_the_index": (
        "convert.cu", "size_t other = a.index ? (size_t)a.index[row] : row, from = a.scatter ? row : other,\n\t       to = a.scatter ? other : row;\n"
        "\tconst From", "size_t from = row, to = row;\n\tconst From",
        "convert", "rows_are*", "plain", "first"),
    "a_convert_that_forgets_to_add": (
        "convert.cu", "x += to_float(dst[i]);", "(void)x;", "convert", "rows_are*", "plain", "first"),
    "a_scale_of_a_wire_row_with_bits_to_spare": (
        "convert.cu", ">> AFD__SCALE_SPARE << AFD__SCALE_SPARE", "", "fp8_rows", "rows_have*", "plain", "first"),
    "a_scale_of_a_wire_row_that_infinity_sets": (
        "convert.cu", "largest = is_finite(v[i]) ? fmaxf(largest, fabsf(v[i])) : largest;", "largest = fmaxf(largest, fabsf(v[i]));",
        "fp8_rows", "groups_at*", "plain", "first"),
    "a_wire_row_whose_gaps_keep_what_was_there": (
        "convert.cu", "\tif (!group)\n\t\tfill_row", "\tif (group > 1000)\n\t\tfill_row", "fp8_rows", "rows_have*", "plain", "first"),
    "a_wire_row_read_with_the_scale_before_its_own": (
        "convert.cu", "((const float *)(rows.src + layout.scales_at))[group];",
        "((const float *)(rows.src + layout.scales_at))[group ? group - 1 : 0];", "fp8_rows", "rows_come*", "plain", "first"),
    "a_wire_row_that_forgets_to_add": (
        "convert.cu", "a.accumulate ? x + dst[column] : x", "x", "fp8_rows", "rows_of*", "plain", "first"),
    "a_rope_that_turns_the_wrong_way": (
        "rope.cu", "*second = b * h.angles[i] + a", "*second = b * h.angles[i] - a", "rope", "*", "plain", "first"),
    "a_rope_that_appends_v_where_k_lies": (
        "rope.cu", "(is_v ? a.kv.v_offset : 0)", "0", "rope", "*", "plain", "first"),
    "a_group_of_quantize_that_forgets_its_offset": (
        "group.h:quantize.cu", "least((g + 1) * GROUP - offset, width)", "least((g + 1) * GROUP, width)", "fp8", "quantize*",
        "plain", "first"),
    "a_scale_of_quantize_without_the_last_number": (
        "group.h:quantize.cu", "for (unsigned i = 0; i < GROUP_LANE; i++)\n\t\tlargest",
        "for (unsigned i = 0; i < GROUP_LANE - 1; i++)\n\t\tlargest", "fp8", "quantize*", "plain", "first"),
    "a_router_whose_lane_takes_before_others_have_looked": (
        "route.cu", "\twarp_sync(); /* others have read what is now taken */\n", "", "route", "choices*", "tsan", "random:3"),
    "a_router_that_looks_before_the_taken_is_marked": (
        "route.cu", "\t\tkeys[place] = TAKEN;\n\twarp_sync();", "\t\tkeys[place] = TAKEN;", "route", "choices*", "tsan",
        "random:3"),
    "a_bias_that_reaches_the_weights": (
        "route.cu", "float weight = scores[ids[i]];", "float weight = scores[ids[i]] + (a.bias ? a.bias[ids[i]] : 0);", "route",
        "choices*", "plain", "first"),
    "a_tile_that_waits_one_stage_too_few": (
        "tile.cu", "copy_wait<sizes::stages - 2>();", "copy_wait<sizes::stages - 1>();", "fp8", "fp8_products*", "plain", "first"),
    "a_tile_without_the_barrier_of_a_stage": (
        "tile.cu", "\t\tbarrier(); /* everybody's is;", "\t\t/* everybody's is;", "fp8", "fp8_products*", "plain", "random:3"),
    "a_tile_whose_sums_overwrite_the_last_stage": (
        "tile.cu", "\tbarrier(); /* the ring is free for the sums */\n", "", "product", "products*", "tsan", "random:3"),
    "a_tile_that_adds_before_all_warps_have_written": (
        "tile.cu", "\tbarrier();\n\tif (t.half) {", "\tif (t.half) {", "product", "products*", "plain", "first"),
    "a_tile_that_reads_weights_beyond_the_last": (
        "tile.cu", "if (has_column<COLUMNS>(t, at, row) && k < t.p.k)", "if (k < t.p.k)", "product", "products*", "asan", "first"),
    "a_tile_with_two_lanes_exchanged": (
        "tile.cu", "lane_id() / 4 + e / 2 * 8", "lane_id() % 8 + e / 2 * 8", "product", "products*", "plain", "first"),
    "a_tile_with_the_scale_of_the_next_block": (
        "tile.cu", "add_scaled<ROWS, COLUMNS>(t, at, at.stage0 + s,", "add_scaled<ROWS, COLUMNS>(t, at, at.stage0 + (s ? s : 1),",
        "fp8", "fp8_products*", "plain", "first"),
    "a_tile_that_adds_slices_that_have_not_come": (
        "tile.cu", "== t.n_slices - 1;\n\t\tif (*is_last)", "== 0;\n\t\tif (!*is_last)", "product", "a_long*", "plain", "first"),
    "a_tile_that_leaves_its_counter_behind": (
        "tile.cu", "*counter = 0; /* for the next launch */", ";", "product", "a_long*", "plain", "first"),
    "a_tile_that_looks_before_the_count_is_told": (
        "tile.cu", "\tbarrier();\n\tif (!*is_last)", "\tif (!*is_last)", "product", "a_long*", "tsan",
        "random:3"),
    "inputs_that_leave_numbers_behind_the_row": (
        "tile_form.h:tile_inputs.cu", "at - f.lead < f.k ?", "at - f.lead <= f.k ?", "product", "products*", "plain", "first"),
    "inputs_of_fp8_in_plain_order": (
        "tile_form.h:tile_inputs.cu", "return i / 4 * 2 + i % 2 + (i & 2 ? 8 : 0);", "return i;", "fp8", "fp8_products*", "plain", "first"),
    "inputs_that_forget_the_up": (
        "tile_form.h:tile_inputs.cu", "x / (1 + expf(-x)) * from.up[at]", "x / (1 + expf(-x))", "experts", "mlps*", "plain", "first"),
    "an_mlp_whose_up_is_its_gate": (
        "tile.cu", "t.half + column - COLUMNS / 2", "column - COLUMNS / 2", "experts", "mlps*", "plain", "first"),
    "an_mlp_that_leaves_numbers_behind_the_row": (
        "tile.cu", "numbers[t.activated_lead + t.half + i] = 0;", "(void)i;", "experts", "mlps*", "plain", "first"),
    "an_argmax_that_forgets_the_last_pieces": (
        "argmax.cu", "i < n_pieces; i += 32", "i < least(n_pieces, 32); i += 32", "real", "the_largest*", "plain", "first"),
    "a_sample_that_takes_the_first_among_equals": (
        "sample.cu", "return find_equal(m, r, prefix, which);", "return find_equal(m, r, prefix, 0);", "sample", "of_equal*", "plain",
        "first"),
    "a_sample_that_counts_before_the_histogram_is_empty": (
        "sample.cu", "m->histogram[thread_x() + THREADS] = 0;\n\tbarrier();", "m->histogram[thread_x() + THREADS] = 0;", "sample",
        "draws*", "plain", "random:3"),
    "a_sample_whose_warps_forget_those_before": (
        "sample.cu", "(warp_id() ? before : 0) + through", "through", "sample", "draws*", "plain", "first"),
    "a_sample_whose_top_k_is_one_too_many": (
        "sample.cu", "find_place(m, r, false, p.top_k - 1,", "find_place(m, r, false, p.top_k,", "sample", "draws*", "plain", "first"),
    "a_split_that_sees_one_position_too_many": (
        "attend_tile.h:attend_split.cu", "s.end = (unsigned)a.positions[row] + 1;", "s.end = (unsigned)a.positions[row] + 2;",
        "attend", "attention_a*", "plain", "first"),
    "a_split_whose_values_are_not_masked": (
        "attend_tile.h:attend_split.cu", "base + row >= first && base + row < end && c", "c", "attend", "attention_a*", "plain",
        "first"),
    "a_split_without_the_warp_sync_after_the_wait": (
        "attend_split.cu", "\t\twarp_sync(); /* the warp's tile s is here", "\t\t/* the warp's tile s is here", "attend",
        "attention*", "plain", "random:3"),
    "a_join_before_all_warps_have_written": (
        "attend_split.cu", "\tbarrier();\n\tfor (unsigned i = thread_x(); i < at.n_heads", "\tfor (unsigned i = thread_x(); i < at.n_heads",
        "attend", "attention_a*", "plain", "first"),
    "a_join_that_overwrites_a_ring": (
        "attend_split.cu", "\tbarrier(); /* the rings are free for the pieces */\n", "", "attend", "attention_a*", "tsan", "random:3"),
    "a_join_that_forgets_the_maximum": (
        "attend_tile.h:attend_split.cu", "return { now, exp2f(maximum - from), exp2f(other - from) };", "return { now, 1, 1 };", "attend",
        "attention_a*", "plain", "first"),
    "a_softmax_that_does_not_shrink_what_was_before": (
        "attend_tile.h:attend_split.cu", "state->out[i][e] *= keep;", "state->out[i][e] *= 1;", "attend", "attention_a*", "plain", "first"),
    "a_chunk_that_waits_one_stage_too_few": (
        "attend_chunk.cu", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", "attend", "attention_of*", "plain", "first"),
    "a_chunk_without_the_barrier_of_a_stage": (
        "attend_chunk.cu", "\t\tbarrier(); /* everybody's is;", "\t\t/* everybody's is;", "attend", "attention_of*", "plain",
        "random:3"),
    "a_chunk_whose_next_run_overwrites_the_ring": (
        "attend_chunk.cu", "\t\tbarrier(); /* the ring is free for the next run */\n", "", "attend", "rows_that*", "tsan", "random:3"),
    "a_chunk_that_takes_another_sequence_for_its_own": (
        "attend_chunk.cu", "a.sequences[row] == a.sequences[row - 1] &&", "", "attend", "attention_of*", "plain", "first"),
    "a_chunk_that_joins_parts_in_another_order": (
        "attend_chunk.cu", "at->part % SPLIT_PARTS == 0 || at", "at", "attend", "a_row_of*", "plain", "first"),
    "a_plain_attention_whose_weights_are_overwritten": (
        "attend.cu", "\t\twarp_sync(); /* all have read the weights */\n", "", "attend", "attention_a*", "tsan", "random:3"),
    "a_plan_that_counts_before_the_slots_are_known": (
        "experts_plan.cu", "\t\tfound[i] = -1;\n\t}\n\tbarrier();", "\t\tfound[i] = -1;\n\t}", "experts", "slots*", "tsan", "random:3"),
    "a_plan_that_takes_a_repeated_slot_twice": (
        "experts_plan.cu", "if (ids[i] == ids[slot])\n\t\t\treturn -1;", "if (ids[i] == ids[slot])\n\t\t\tbreak;", "experts",
        "slots*", "plain", "first"),
    "experts_that_take_a_wrong_row": (
        "experts_plan.cu", "e.rows[at + before] = i / e.top_k;", "e.rows[at + before] = (i + 1) / e.top_k % e.n_rows;", "experts",
        "many_rows*", "plain", "first"),
    "a_combine_without_its_weights": (
        "experts.cu", "sum = fmaf(e.weights[row * e.top_k + slot],", "sum = fmaf(1,", "experts", "experts_agree*", "plain",
        "first"),
    "operands_with_the_scales_of_x_row_by_row": (
        "operands.cu", "a.scales[(size_t)group * a.from.n_rows + row]", "a.scales[row * (a.row_numbers / GROUP) + group]", "dense",
        "products_of_all*", "plain", "first"),
    "operands_whose_block_scales_stand_too_close": (
        "operands.cu", "SCALES_STEP = 4", "SCALES_STEP = 1", "dense", "products_of_all*", "plain", "first"),
    "operands_with_the_scales_of_a_panel_for_those_of_a_block": (
        "operands.cu", "block_x() * GPU_BLOCK, i", "block_x() * GPU_PANEL, i", "dense", "products_of_all*", "plain", "first"),
    "operands_that_leave_numbers_behind_the_row": (
        "operands.cu", "\tif (at >= a.k)\n\t\treturn 0;\n", "", "dense", "products_of_all*", "asan", "first"),
    "operands_of_a_norm_in_plain_order": (
        "operands.cu", "[at / 16 * 16 + fp8_place(at % 16)]", "[at]", "dense", "products_of_the_rows*", "plain", "first"),
    "operands_whose_rows_of_f16_keep_their_scale": (
        "operands.cu", "scaled ? o->numbers : NULL", "NULL", "dense", "products_of_all*", "plain", "first"),
    "a_product_for_the_library_that_is_not_transposed": (
        "blaslt.c", "transposed = CUBLAS_OP_T", "transposed = CUBLAS_OP_N", "products", "the_library*", "plain", "first"),
    "a_product_for_the_library_without_the_stride_of_y": (
        "blaslt.c", "m->n_rows, (int64_t)m->y_stride", "m->n_rows, (int64_t)m->n", "dense", "products_of_all*", "plain", "first"),
    "a_library_that_works_where_the_operands_lie": (
        "blaslt_product.c", "(char *)d->gpu.workspace + d->gpu.workspace_bytes", "d->gpu.workspace", "dense", "products_of_all*",
        "plain", "first"),
    "a_pass_that_begins_where_the_first_began": (
        "blaslt_product.c", "work.x.x += work.x.x ? n * work.x.x_stride : 0;", "", "products", "rows_that*", "plain", "first"),
    "a_plan_that_forgets_how_many_rows_it_is_for": (
        "blaslt_product.c", "\t\t.n_rows = m->n_rows,\n\t\t.w_alignment", "\t\t.w_alignment", "products", "a_shape*", "plain",
        "first"),
}
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0 exitcode=67",
               "UBSAN_OPTIONS": "halt_on_error=1"}


def build_of(kind):
    return BUILD if kind == "plain" else BUILD.parent / kind


class Planted(unittest.TestCase):
    """One test per bug, made below."""


def commands(build):
    """The compile command of a kernel, by its name, and the link command of the module."""
    compile_of = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        name = pathlib.Path(entry["output"]).name
        if entry["output"].startswith("tests/emu/afd-cuda.so.p/") and name.endswith(".emu.cc.o"):
            compile_of[name.split("_.._")[-1].removesuffix(".emu.cc.o")] = entry
        elif entry["output"].startswith("tests/emu/afd-cuda.so.p/") and "modules_cuda_" in name:
            compile_of[name.split("modules_cuda_")[-1].removesuffix(".o")] = entry
    link = subprocess.run(["ninja", "-C", build, "-t", "commands", "-s", "tests/emu/afd-cuda.so"], capture_output=True, text=True,
                          check=True).stdout.strip().splitlines()[-1]
    return compile_of, link


def plant(scratch, build, places, old, new):
    """Builds a module with the bug into scratch."""
    place, kernel = (places.split(":") * 2)[:2]
    compile_of, link = commands(build)
    entry = compile_of[kernel.removesuffix(".cu")]
    home = MODULE if kernel.endswith(".c") else KERNELS
    tree = scratch / home.relative_to(ROOT)
    tree.mkdir(parents=True)
    for path in home.iterdir():
        text = path.read_text()
        if path.name == place:
            if text.count(old) != 1:
                raise AssertionError(f"{place}: what is to be replaced stands there {text.count(old)} times, not once")
            text = text.replace(old, new)
        (tree / path.name).write_text(text)
    (scratch / "lib").symlink_to(ROOT / "lib")
    if home == MODULE:
        (scratch / "kernels").symlink_to(ROOT / "kernels")
    else:
        (tree.parent / "draw.h").symlink_to(KERNELS.parent / "draw.h")
    words = shlex.split(entry["command"])
    words[words.index("-c") + 1] = str(tree / kernel)
    words[words.index("-o") + 1] = str(scratch / "bug.o")
    if home == KERNELS:
        words.insert(words.index("-c"), "-xc++")
    for flag in ("-MF", "-MQ"):
        words[words.index(flag) + 1] = str(scratch / "bug.d")
    subprocess.run(words, cwd=build, check=True, capture_output=True, text=True)
    words = shlex.split(link)
    words[words.index("-o") + 1] = str(scratch / "afd-cuda.so")
    words[words.index(entry["output"])] = str(scratch / "bug.o")
    subprocess.run(words, cwd=build, check=True, capture_output=True, text=True)


def make_test(places, old, new, test, cases, kind, order):
    def body(self):
        build = build_of(kind)
        if not (build / "tests/emu/afd-cuda.so").exists():
            self.skipTest(f"no build {build.name}")
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            try:
                plant(scratch, build, places, old, new)
            except subprocess.CalledProcessError as error:
                self.fail(f"does not build: {error.stderr or error.stdout}"[:500])
            environment = dict(os.environ, AFD_MODULE_DIR=str(scratch), AFD_EMU_ORDER=order, **ENVIRONMENT)
            libraries = [build / f"tests/emu/libcublasLt-{name}.so" for name in ("emu", "short")]
            command = [build / f"tests/conformance/conformance_device_{test}", "cuda:0"]
            if test == "products":
                command = [build / "tests/conformance/conformance_cuda_products", "cuda:0", *libraries]
            if test == "dense":
                environment.update(AFD_CUBLASLT=str(libraries[0]), AFD_CUDA_PRODUCTS="cublaslt")
            codes = []
            for case in cases.split("|"):
                environment["AFD_TEST_ONLY"] = case
                done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
                codes.append(done.returncode)
            self.assertTrue(any(codes), "not caught")
    return body


for name, bug in PLANTED.items():
    setattr(Planted, f"test_{name}_is_caught", make_test(*bug))
