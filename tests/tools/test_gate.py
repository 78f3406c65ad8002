# SPDX-License-Identifier: Apache-2.0
"""Routing on either side, as users see it: the same logits with the same shards, and rows only where they are wanted."""
import json
import signal
import time

from tools import BOTH_F32, GOLDEN, Case, read_npy

PROMPT = "3 1 4 1 5 9 2 6 5 35 8 57 32 38 46 26 43 38 32 7 50 28"
CASES = ("moe-f32", "moe-bf16", "afmoe-f32", "fp8-moe")
SHARDS = {  # tp2,ep2 in another order than that of ranks
    "ep2": [["--ffn-ep", "0/2"], ["--ffn-ep", "1/2"]],
    "tp2": [["--ffn-tp", "0/2"], ["--ffn-tp", "1/2"]],
    "tp2,ep2": [["--ffn-tp", f"{tp}/2", "--ffn-ep", f"{ep}/2"] for tp in (0, 1) for ep in (0, 1)],
}


def nmse(got, want):
    return sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want)


class Gate(Case):
    def decode(self, model, args, n_attention=1):
        """Logits of each attention process, which must be one and the same, and the rows that each peer was sent by all."""
        paths = [self.scratch / f"{i}.npy" for i in range(n_attention)]
        running = [self.generate(GOLDEN / model, "--ids", PROMPT, "--max-tokens", 6, "--logits", path, "--json", *args) for path in paths]
        peers = [self.json(process)["peers"] for process in running]
        self.assertEqual(len({path.read_bytes() for path in paths}), 1)
        return paths[0].read_bytes(), {peer["address"]: sum(p["rows"] for them in peers for p in them if p["address"] == peer["address"])
                                       for peer in peers[0]}

    def serve_shards(self, model, shards):
        """The servers' metrics files by address, and the flags that name the servers."""
        metrics = {}
        for shard in shards:
            path = self.scratch / f"metrics{len(metrics)}-{time.monotonic_ns()}"
            server, listen = self.serve(GOLDEN / model, "--metrics", path, "--max-rows", 8, *shard)
            metrics[listen] = (server, path)
        return metrics, [word for listen in metrics for word in ("--ffn", listen)]

    def expect_rows(self, metrics, rows):
        """What the servers computed is what was sent to them."""
        for listen, (server, path) in metrics.items():
            self.stop(server)
            self.assertEqual(self.metric(path, "afd_ffn_rows_total"), rows[listen])

    def test_one_server_gives_the_logits_of_one_process_with_either_gate(self):
        for model in CASES:
            want, _ = self.decode(model, [])
            metrics, ffn = self.serve_shards(model, [[]])
            sent = 0
            for gate in ([], ["--gate", "ffn"]):
                for n_attention, lanes in ((1, 1), (1, 4), (2, 2)):
                    with self.subTest(model=model, gate=gate, n_attention=n_attention, lanes=lanes):
                        got, rows = self.decode(model, [*ffn, *gate, "--lanes", lanes], n_attention)
                        self.assertEqual(got, want)
                        sent += sum(rows.values())
            self.expect_rows(metrics, {listen: sent for listen in metrics})

    def compare_shards(self, model, shards):
        """Rows that each server was sent, by gate side; the logits are the same whatever it is."""
        self.decode(model, BOTH_F32)
        want = read_npy(self.scratch / "0.npy")[1]
        metrics, ffn = self.serve_shards(model, shards)
        sent, logits = {"attention": [], "ffn": []}, set()
        for gate, counts in sent.items():
            for n_attention, lanes in ((1, 1), (1, 3), (2, 2)):
                got, rows = self.decode(model, [*ffn, "--gate", gate, "--lanes", lanes, *BOTH_F32], n_attention)
                logits.add(got)
                counts.append(rows)
        self.assertEqual(len(logits), 1)
        self.assertLessEqual(nmse(read_npy(self.scratch / "0.npy")[1], want), 1e-10)
        self.expect_rows(metrics, {listen: sum(rows[listen] for counts in sent.values() for rows in counts) for listen in metrics})
        return [[[rows[listen] for listen in metrics] for rows in counts] for counts in sent.values()]

    def test_shards_give_the_same_logits_with_either_gate(self):
        for model in CASES:
            for name, shards in SHARDS.items():
                with self.subTest(model=model, shards=name):
                    attention, ffn = self.compare_shards(model, shards)
                    n_layers = json.loads((GOLDEN / model / "config.json").read_text())["num_hidden_layers"]
                    n_rows = n_layers * (len(PROMPT.split()) + 5)
                    self.assertEqual(ffn, [[n * n_rows] * len(shards) for n in (1, 1, 2)])
                    # Lanes and peers do not change what is chosen; ranks of one expert range get the same.
                    once, lanes, twice = attention
                    self.assertEqual((lanes, twice), (once, [2 * n for n in once]))
                    n_ep = 2 if "ep2" in name else 1
                    self.assertEqual(once, once[:n_ep] * (len(shards) // n_ep))
                    if name == "tp2" or model == "afmoe-f32":  # shared experts: every rank has a part of them
                        self.assertEqual(once, ffn[0])
                    else:
                        self.assertLess(sum(once), sum(ffn[0]))
                        self.assertGreaterEqual(sum(once[:n_ep]), n_rows)

    def test_a_rank_that_is_killed_while_rows_are_routed_is_named_within_a_second(self):
        metrics, ffn = self.serve_shards("moe-f32", SHARDS["ep2"])
        process = self.generate(GOLDEN / "moe-f32", "--ids", "3 1 4", "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error", *ffn)
        listen, (server, path) = list(metrics.items())[1]
        self.until("rows crossed", lambda: path.exists() and self.metric(path, "afd_ffn_rows_total") > 1000)
        since = time.monotonic()
        server.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=20)
        self.assertLessEqual(time.monotonic() - since, 1.0 + 0.5)  # and some slack
        self.assertIn(listen, err)
        self.assertEqual((process.returncode, err.count("\n")), (1, 1), err)
