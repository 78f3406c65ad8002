# SPDX-License-Identifier: Apache-2.0
"""Each role of each layout holds its own weights and no others, and rows go where the routing says: foretold, counted, measured."""
import json
import pathlib
import shutil
import sys
import tempfile
import unittest.mock

import checkpoints
from tools import BOTH_F32, BUILD, GOLDEN, ROOT, Case, run

MODELS = sorted(path.parent for path in (ROOT / "models").glob("tiny-*/config.json"))
RANDOM = [GOLDEN / name for name in ("moe-f32", "afmoe-two-shared", "afmoe-bf16", "fp8-moe", "fp8-fused-ragged", "wide")]
LAYOUTS = {"1A:1F": (1, 1), "1A:2F(tp2)": (2, 1), "1A:2F(ep2)": (1, 2), "1A:3F(ep3)": (1, 3), "1A:4F(tp2,ep2)": (2, 2)}


def foretold(model, role, tp, ep, gate="attention"):
    """Bytes of each shard of a role, in the order of ranks."""
    flags = ["--attention-tp", tp] if role == "attention" else ["--ffn-tp", tp, "--ffn-ep", ep]
    done = run("afd-inspect", "--model", model, *flags, "--gate", gate, "--json")
    return [entry["bytes"] for entry in json.loads(done.stdout)["roles"] if entry["role"] == role]


class Held(Case):
    def test_every_ffn_shard_holds_what_afd_inspect_foretells(self):
        for model in MODELS + RANDOM:
            for layout, (tp, ep) in LAYOUTS.items():
                with self.subTest(f"{model.name} {layout}"):
                    name = self.scratch / f"{model.name}.{tp}.{ep}.{{}}"
                    self.result(self.launch(layout, model, "--ids", "1", "--max-tokens", 1, "--metrics", name))
                    held = [self.metric(str(name).replace("{}", str(i)), "afd_ffn_stored_bytes") for i in range(tp * ep)]
                    self.assertEqual(held, foretold(model, "ffn", tp, ep))

    def test_attention_holds_what_afd_inspect_foretells_and_nothing_of_the_ffn(self):
        for model in MODELS + RANDOM:
            for gate in ("attention", "ffn"):
                with self.subTest(f"{model.name}, gate {gate}"):
                    out = self.json(self.launch("1A:2F(ep2)", model, "--ids", "1", "--max-tokens", 1, "--gate", gate, "--json"))
                    self.assertEqual(out["weight_bytes"], {"attention": foretold(model, "attention", 1, 1, gate)[0], "ffn": 0})

    def test_an_attention_rank_holds_what_afd_inspect_foretells(self):
        """Rank 0, which alone prints; the others' share is in tests/system/test_group.c."""
        for model, n in ((model, n) for model in MODELS + [GOLDEN / "afmoe-two-shared"] for n in (2, 4)):
            with self.subTest(f"{model.name}, {n} ranks"):
                out = self.json(self.launch(f"{n}A(tp{n}):2F(ep2)", model, "--ids", "1 2", "--max-tokens", 1, "--json"))
                self.assertEqual(out["weight_bytes"]["attention"], foretold(model, "attention", n, 1)[0])

    def test_one_process_holds_both_roles_and_no_router_twice(self):
        for model in MODELS + RANDOM:
            with self.subTest(model.name):
                out = self.json(self.generate(model, "--ids", "1", "--max-tokens", 1, "--json"))
                held = {"attention": foretold(model, "attention", 1, 1, "ffn")[0], "ffn": foretold(model, "ffn", 1, 1)[0]}
                self.assertEqual(out["weight_bytes"], held)

    def test_shards_of_the_ffn_share_its_bytes_among_them(self):
        """No shard holds the whole: routers stand in each, all else in one."""
        for model in MODELS:
            whole, = foretold(model, "ffn", 1, 1)
            for tp, ep in ((2, 1), (1, 2), (2, 2)):
                with self.subTest(f"{model.name} tp {tp} ep {ep}"):
                    shards = foretold(model, "ffn", tp, ep)
                    self.assertGreaterEqual(sum(shards), whole)
                    self.assertLess(sum(shards), whole * 1.05)
                    self.assertLess(max(shards), whole * 1.1 / (tp * ep))


class Measured(Case):
    """The growth of resident memory, against a server or generator of a model of a few kilobytes."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="large-", dir=BUILD))
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        cls.model = cls.folder / "model"
        cls.bytes = checkpoints.write(cls.model)

    def resident_bytes(self, process):
        for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return self.fail("no VmRSS")

    def expect_growth(self, process, small, wanted):
        grown = self.resident_bytes(process) - small
        self.assertLess(abs(grown - wanted), 0.1 * wanted, f"grown by {grown} bytes, foretold {wanted}")

    def attention(self, model, listen, gate):
        """A generator in the middle of its work: memory is not at rest before its first step."""
        logits = self.scratch / f"{model.name}-{gate}.npy"
        peers = [word for one in listen for word in ("--ffn", one)]
        process = self.generate(model, "--ids", "1 2 3", "--max-tokens", 100000, "--kv-pages", 6251, "--log", "error",
                                "--gate", gate, "--logits", logits, *peers)
        part = pathlib.Path(f"{logits}.part")
        self.until("a step is done", lambda: part.exists() and part.stat().st_size > 200000)
        return process

    def test_the_model_is_large_enough(self):
        self.assertGreater(self.bytes, 400e6)
        self.assertGreater(foretold(self.model, "ffn", 1, 1)[0], 200e6)
        self.assertGreater(foretold(self.model, "attention", 1, 1)[0], 200e6)

    def test_a_server_grows_by_its_shard(self):
        server, _ = self.serve(GOLDEN / "moe-f32")
        small = self.resident_bytes(server)
        for tp, ep in ((1, 1), (1, 2), (2, 1), (2, 2)):
            for rank, wanted in enumerate(foretold(self.model, "ffn", tp, ep)):
                if rank in (0, tp * ep - 1):
                    with self.subTest(f"tp {rank % tp}/{tp} ep {rank // tp}/{ep}"):
                        server, _ = self.serve(self.model, "--ffn-tp", f"{rank % tp}/{tp}", "--ffn-ep", f"{rank // tp}/{ep}")
                        self.expect_growth(server, small, wanted)
                        self.stop(server)

    def test_attention_grows_by_its_part(self):
        _, listen = self.serve(GOLDEN / "moe-f32")
        small = self.resident_bytes(self.attention(GOLDEN / "moe-f32", [listen], "ffn"))
        shards = [self.serve(self.model, "--ffn-ep", f"{i}/2")[1] for i in range(2)]
        process = self.attention(self.model, shards, "ffn")
        self.expect_growth(process, small, foretold(self.model, "attention", 1, 1, "ffn")[0])


class Rows(Case):
    """What the tools count against the experts that plain NumPy picks (tests/golden/reference.py)."""

    def setUp(self):
        super().setUp()
        sys.path.insert(0, str(GOLDEN))
        try:
            import reference  # noqa: PLC0415
        except ImportError as error:
            self.skipTest(f"{error.name} is not installed")
        self.reference = reference

    def picks(self, model, ids):
        """The experts of every row, for every layer: a list of sets, or None for a layer without experts."""
        config, found, route = json.loads((model / "config.json").read_text()), [], self.reference.route
        config.setdefault("num_experts", config.get("num_local_experts"))

        def keep(*args):
            chosen, weights = route(*args)
            found.append([set(map(int, row)) for row in chosen])
            return chosen, weights

        with unittest.mock.patch.object(self.reference, "route", keep):
            self.reference.forward(config, self.reference.read_weights(model), ids)
        found = iter(found)
        layers = range(config["num_hidden_layers"])
        return config, [next(found) if self.reference.has_experts(config, layer) else None for layer in layers]

    def expected(self, config, picks, n_rows, ep):
        """Rows of one token range of ranks: all where all ranks have a part of the layer, else those with an expert of theirs."""
        n, rows = config["num_experts"], [0] * ep
        for layer in picks:
            for rank in range(ep):
                own = set(range(rank * n // ep, (rank + 1) * n // ep))
                everywhere = layer is None or config.get("num_shared_experts")
                rows[rank] += n_rows if everywhere else sum(bool(row & own) for row in layer)
        return rows

    def counted(self, model, ids, tp, ep, gate):
        """Rows that each rank was sent, as the attention side counts them; the FFN side must count the same."""
        name = self.scratch / f"{model.name}.{tp}.{ep}.{gate}.{{}}"
        out = self.json(self.launch(f"1A:{tp * ep}F(tp{tp},ep{ep})", model, "--ids", " ".join(map(str, ids)), "--max-tokens", 1,
                                    "--gate", gate, "--metrics", name, "--json", *BOTH_F32))
        sent = {int(peer["address"].rsplit(".f", 1)[1]): peer["rows"] for peer in out["peers"]}
        sent = [sent[rank] for rank in range(tp * ep)]
        self.assertEqual([self.metric(str(name).replace("{}", str(rank)), "afd_ffn_rows_total") for rank in range(tp * ep)], sent)
        return sent

    def test_rows_of_each_rank_are_those_of_its_experts_with_the_gate_on_attention(self):
        for model in [path for path in MODELS if (GOLDEN / path.name).exists()] + [GOLDEN / "moe-f32", GOLDEN / "moe-sparse-step",
                                                                                  GOLDEN / "afmoe-two-shared"]:
            golden = json.loads((GOLDEN / model.name / "golden.json").read_text())
            ids = golden["prompt"] + golden["generated"][:-1]
            config, picks = self.picks(model, ids)
            if not any(picks):
                continue
            for tp, ep in ((1, 2), (1, 3), (2, 2)):
                with self.subTest(f"{model.name} tp {tp} ep {ep}"):
                    want = [rows for rows in self.expected(config, picks, len(ids), ep) for _ in range(tp)]
                    self.assertEqual(self.counted(model, ids, tp, ep, "attention"), want)
                    if not config.get("num_shared_experts"):
                        self.assertLess(min(want), len(ids) * len(picks))

    def test_every_rank_is_sent_every_row_with_the_gate_on_the_ffn(self):
        for model in (GOLDEN / "moe-f32", GOLDEN / "afmoe-two-shared"):
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            self.assertEqual(self.counted(model, list(range(10)), 2, 2, "ffn"), [10 * layers] * 4)
