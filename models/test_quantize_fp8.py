#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""quantize_fp8.py writes the published layout, near the weights, and refuses what it cannot do.

Run it as a program; it needs torch and safetensors. No test loads a model.
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import torch
from safetensors.torch import load_file, save_file

import quantize_fp8
from quantize_fp8 import SCALES, dequantize, quantize

SCRIPT = pathlib.Path(quantize_fp8.__file__)
INDEX = quantize_fp8.INDEX
Q = "model.layers.0.self_attn.q_proj.weight"


def random_weights(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Blocks(unittest.TestCase):
    def test_a_block_of_128_by_128_has_a_scale_of_its_largest_over_448(self):
        weight = random_weights(256, 384)
        weight[130, 300] = -44.8
        _, scales = quantize(weight, torch.float32)
        self.assertEqual(scales.shape, (2, 3))
        self.assertAlmostEqual(scales[1, 2].item(), 0.1, places=6)
        self.assertEqual(scales[0, 0].item(), (weight[:128, :128].abs().max() / 448).item())

    def test_the_last_block_is_shorter_where_the_size_does_not_divide(self):
        weight = torch.ones(192, 130)
        weight[:128, :128] = 4
        weight[128:] = 2
        _, scales = quantize(weight, torch.float32)
        want = torch.tensor([[4.0, 1], [2, 2]]) / 448
        self.assertTrue(torch.equal(scales, want))

    def test_codes_fit_the_scale_as_stored(self):
        weight = random_weights(200, 200)
        for name, dtype in SCALES.items():
            with self.subTest(name):
                codes, scales = quantize(weight, dtype)
                self.assertEqual((codes.dtype, scales.dtype), (torch.float8_e4m3fn, dtype))
                error = (dequantize(codes, scales) - weight).abs()
                self.assertLessEqual((error / weight.abs().clamp(min=0.05)).max(), 2**-4)

    def test_a_block_of_zeros_stays_zero(self):
        codes, scales = quantize(torch.zeros(128, 128), torch.float16)
        self.assertTrue(scales.isfinite().all())
        self.assertEqual(dequantize(codes, scales).abs().max(), 0)

    def test_weights_too_small_for_an_f16_scale_keep_their_precision(self):
        weight = random_weights(128, 128) * 1e-5
        error = (dequantize(*quantize(weight, torch.float16)) - weight).abs()
        self.assertLessEqual(error.max() / weight.abs().max(), 2**-4)

    def test_each_fused_expert_has_its_own_blocks(self):
        weight = random_weights(3, 192, 130)
        codes, scales = quantize(weight, torch.float32)
        self.assertEqual(scales.shape, (3, 2, 2))
        alone, own = quantize(weight[1], torch.float32)
        self.assertTrue(torch.equal(codes[1].view(torch.uint8), alone.view(torch.uint8)))
        self.assertTrue(torch.equal(scales[1], own))

    def test_a_weight_that_is_not_finite_is_refused(self):
        with self.assertRaisesRegex(ValueError, "not finite"):
            quantize(torch.tensor([[1.0, float("nan")]]), torch.float32)


class Checkpoint(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.source = pathlib.Path(scratch.name) / "in"
        self.target = pathlib.Path(scratch.name) / "out"
        self.source.mkdir()
        self.weights = {
            "model.embed_tokens.weight": random_weights(16, 128).bfloat16(),
            Q: random_weights(128, 128).bfloat16(),
            "model.layers.0.self_attn.q_norm.weight": torch.ones(64).bfloat16(),
            "model.layers.0.self_attn.q_proj.bias": torch.ones(128).bfloat16(),
            "model.layers.0.input_layernorm.weight": torch.ones(128).bfloat16(),
            "model.layers.0.mlp.down_proj.weight": random_weights(128, 192).bfloat16(),
            "lm_head.weight": random_weights(16, 128).bfloat16(),
        }
        self.config = {"model_type": "qwen3", "hidden_size": 128}
        self.write()

    def write(self):
        (self.source / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.source / "model.safetensors", metadata={"format": "pt"})

    def convert(self, *options):
        return subprocess.run([sys.executable, SCRIPT, self.source, self.target, *options],
                              capture_output=True, text=True, check=False)

    def converted(self, *options):
        done = self.convert(*options)
        self.assertEqual(done.returncode, 0, done.stderr)
        return load_file(self.target / "model.safetensors")

    def config_written(self):
        return json.loads((self.target / "config.json").read_text())

    def test_matrices_of_layers_alone_become_fp8(self):
        written = self.converted()
        matrices = {Q, "model.layers.0.mlp.down_proj.weight"}
        self.assertEqual({n for n, t in written.items() if t.dtype == torch.float8_e4m3fn},
                         matrices)
        self.assertEqual(set(written) - set(self.weights), {n + "_scale_inv" for n in matrices})
        for name in set(self.weights) - matrices:
            self.assertTrue(torch.equal(written[name], self.weights[name]), name)

    def test_config_gains_the_published_quantization_config(self):
        self.converted()
        self.assertEqual(self.config_written(), {**self.config, "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]}})

    def test_scales_have_the_dtype_asked_for(self):
        self.assertEqual(self.converted("--scale", "f16")[Q + "_scale_inv"].dtype, torch.float16)

    def test_routers_stay_and_are_named_in_config(self):
        for router in ("mlp.gate", "mlp.router.gate"):
            self.weights[f"model.layers.0.{router}.weight"] = random_weights(4, 128).bfloat16()
        self.weights["model.layers.0.mlp.expert_bias"] = torch.zeros(4)
        self.weights["model.layers.0.mlp.experts.gate_up_proj"] = random_weights(4, 192, 128)
        self.write()
        written = self.converted()
        self.assertEqual(written["model.layers.0.mlp.gate.weight"].dtype, torch.bfloat16)
        self.assertEqual(written["model.layers.0.mlp.router.gate.weight"].dtype, torch.bfloat16)
        self.assertEqual(written["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape,
                         (4, 2, 1))
        self.assertEqual(self.config_written()["quantization_config"]["modules_to_not_convert"],
                         ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate",
                          "model.layers.0.mlp.router.gate"])

    def test_shards_stay_and_the_index_lists_the_scales(self):
        (self.source / "model.safetensors").unlink()
        first = {Q: self.weights.pop(Q)}
        files = {"model-00001-of-00002.safetensors": first,
                 "model-00002-of-00002.safetensors": self.weights}
        for file, tensors in files.items():
            save_file(tensors, self.source / file)
        (self.source / INDEX).write_text("{}")
        done = self.convert()
        self.assertEqual(done.returncode, 0, done.stderr)
        index = json.loads((self.target / INDEX).read_text())
        written = {file: load_file(self.target / file) for file in files}
        self.assertEqual(index["weight_map"], {n: f for f, ts in written.items() for n in ts})
        self.assertEqual(index["weight_map"][Q + "_scale_inv"], "model-00001-of-00002.safetensors")
        self.assertEqual(index["metadata"]["total_size"],
                         sum(t.nbytes for ts in written.values() for t in ts.values()))

    def test_other_files_are_copied(self):
        (self.source / "tokenizer.json").write_text("{}")
        self.converted()
        self.assertEqual((self.target / "tokenizer.json").read_text(), "{}")

    def test_a_quantised_checkpoint_is_refused(self):
        self.config["quantization_config"] = {}
        self.write()
        done = self.convert()
        self.assertEqual(done.returncode, 1)
        self.assertIn("has a quantization_config already", done.stderr)
        self.assertFalse(self.target.exists())

    def test_a_target_that_exists_is_refused_and_left_alone(self):
        self.target.mkdir()
        done = self.convert()
        self.assertEqual(done.returncode, 1)
        self.assertIn("File exists", done.stderr)
        self.assertEqual(list(self.target.iterdir()), [])

    def test_a_folder_without_safetensors_is_refused(self):
        (self.source / "model.safetensors").unlink()
        done = self.convert()
        self.assertEqual(done.returncode, 1)
        self.assertIn("no safetensors file", done.stderr)


if __name__ == "__main__":
    unittest.main()
