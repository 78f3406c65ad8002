# SPDX-License-Identifier: Apache-2.0
"""Every trained model in every layout: the same shards give the same bits, other shards agree in float32.

What may not change a bit: lanes, the number of attention groups, the side of the gate, the device. Another sharding adds partial
results in another order, and may differ by the noise of float32.
"""
import filecmp
import itertools
import json
import os
import sys

from tools import BOTH_F32, DEVICE, GOLDEN, ROOT, Case

sys.path.insert(0, str(GOLDEN))
import check  # noqa: E402

MODELS = sorted(path.parent for path in (ROOT / "models").glob("tiny-*/config.json"))
ALL = os.environ.get("AFD_ALL") == "1"
LIMIT = 1e-10  # NMSE
# Attention groups that a layout starts, one for each prompt; layouts in one row have the same shards.
WHOLE = {"1A:1F": 1, "2A:1F": 2}
SHARDED = [
    {"1A:2F(tp2)": 1, "2A:2F(tp2)": 2},
    {"1A:2F(ep2)": 1, "2A:2F(ep2)": 2},
    {"1A:4F(tp2,ep2)": 1, "2A:4F(tp2,ep2)": 2},
    {"2A(tp2):1F": 1, "4A(tp2):1F": 2},
    {"2A(tp2):2F(ep2)": 1, "4A(tp2):2F(ep2)": 2},
]


class Sharding(Case):
    def setUp(self):
        super().setUp()
        self.n_files = 0

    def prompts(self, model):
        """Two, of which no choice of an id or an expert hangs on a near tie: the golden one, and the same without its end."""
        golden = json.loads((GOLDEN / model.name / "golden.json").read_text())
        return [golden["prompt"] + golden["generated"][:n] for n in (12, 3)]

    def alone(self, model):
        paths = [self.scratch / f"alone-{i}.npy" for i in range(2)]
        for ids, path in zip(self.prompts(model), paths):
            self.result(self.generate(model, "--ids", " ".join(map(str, ids)), "--max-tokens", 8, "--logits", path, *BOTH_F32))
        return paths

    def layout(self, model, layout, n_groups, gate, lanes, device):
        """The files of logits that the groups wrote, the first group for the first prompt."""
        self.n_files += 1
        batch = self.write_batch([{"ids": ids} for ids in self.prompts(model)[:n_groups]])
        path = f"{self.scratch}/{self.n_files}-{{}}.npy"
        self.result(self.launch(layout, model, "--batch", batch, "--max-tokens", 8, "--logits", path, "--gate", gate,
                                "--lanes", lanes, "--device", device, *BOTH_F32))
        return [path.replace("{}", str(i)) for i in range(n_groups)]

    def variants(self, layouts):
        """(layout, groups, gate, lanes, device): a few that differ in all of it, or all there are."""
        if ALL:
            product = itertools.product(layouts.items(), ("attention", "ffn"), (1, 2, 3, 4), ("cpu", "deferred"))
            return [(*layout, gate, lanes, device) for layout, gate, lanes, device in product]
        one, two = layouts.items()
        return [(*one, "attention", 1, DEVICE), (*one, "ffn", 3, DEVICE), (*two, "attention", 2, DEVICE), (*two, "ffn", 1, DEVICE)]

    def expect_same_bits(self, model, layouts, want):
        for variant in self.variants(layouts):
            with self.subTest(f"{model.name} {variant}"):
                for got, wanted in zip(self.layout(model, *variant), want):
                    self.assertTrue(filecmp.cmp(got, wanted, shallow=False), f"{got} is not {wanted}")
                    os.unlink(got)

    def expect_agreement(self, got, want):
        for one, other in zip(got, want, strict=True):
            shape, values = check.read_npy(one)
            wanted_shape, wanted = check.read_npy(other)
            self.assertEqual(shape, wanted_shape)
            self.assertLessEqual(check.nmse(values, wanted), LIMIT)

    def test_layouts_with_the_whole_ffn_have_the_bits_of_one_process(self):
        for model in MODELS:
            self.expect_same_bits(model, WHOLE, self.alone(model))

    def test_layouts_with_the_same_shards_have_the_same_bits_and_agree_with_one_process(self):
        for model, layouts in itertools.product(MODELS, SHARDED):
            layout = max(layouts, key=layouts.get)
            with self.subTest(f"{model.name} {layout}"):
                first = self.layout(model, layout, layouts[layout], "attention", 1, DEVICE)
                self.expect_agreement(first, self.alone(model))
                self.expect_same_bits(model, layouts, first)

    def test_other_shards_are_really_other_sums(self):
        """A limit that equal bits would pass says nothing about the order of partial results."""
        for model in MODELS:
            files = {tuple(open(path, "rb").read() for path in self.layout(model, layout, 1, "ffn", 1, DEVICE))
                     for layout in ("1A:1F", "1A:2F(tp2)", "1A:4F(tp2,ep2)", "2A(tp2):1F")}
            self.assertEqual(len(files), 4, model.name)

    def tokens(self, model, layout, *flags):
        """Of six sequences, so that lanes have rows of their own; rounded as the checkpoint says. None: one process."""
        ids = sum(self.prompts(model), [])
        args = ["--batch", self.write_batch([{"ids": ids[i:i + 5 + i]} for i in range(6)]), "--max-tokens", 6, *flags]
        return self.result(self.launch(layout, model, *args) if layout else self.generate(model, *args))

    def test_batches_have_the_same_tokens_in_all_layouts_of_the_same_shards(self):
        for model, (ranks, shards) in itertools.product(MODELS, ((1, "1F"), (1, "2F(tp2)"), (1, "4F(tp2,ep2)"), (2, "2F(ep2)"))):
            layouts = [f"{groups * ranks}A{f'(tp{ranks})' if ranks > 1 else ''}:{shards}" for groups in (1, 2, 3)]
            want = self.tokens(model, None if (ranks, shards) == (1, "1F") else layouts[0])
            for layout, *flags in zip(layouts, ("--lanes", "--lanes", "--gate"), (4, 2, "ffn")):
                with self.subTest(f"{model.name} {layout} {flags}"):
                    self.assertEqual(self.tokens(model, layout, *flags), want)
