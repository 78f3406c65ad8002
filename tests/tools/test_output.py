# SPDX-License-Identifier: Apache-2.0
"""What afd-generate and afd-serve-ffn print and write: ids, JSON, trace, metrics; and sampling."""
import json
import os
import pathlib
import pty
import subprocess

from tools import ENV, GOLDEN, MODEL, Case, address, read_npy, run, tool

WIDE = GOLDEN / "wide"


def ids_of(done):
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


class Output(Case):
    def wide(self, *args):
        done = run("afd-generate", "--model", WIDE, *args)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stderr)
        return done

    def test_json_has_exactly_one_object_with_the_keys(self):
        out = json.loads(self.wide("--ids", "1 2 3", "--max-tokens", 5, "--json").stdout)
        self.assertLessEqual({"ids", "tokens_per_second", "seconds", "peers"}, set(out))
        self.assertEqual(set(out["seconds"]), {"attention", "ffn", "wait", "total"})
        self.assertEqual((len(out["ids"]), len(out["ids"][0]), out["peers"]), (1, 5, []))
        self.assertGreater(out["tokens_per_second"], 0)
        parts = out["seconds"]["attention"] + out["seconds"]["ffn"] + out["seconds"]["wait"]
        self.assertLessEqual(parts, out["seconds"]["total"] * 1.05)
        self.assertGreater(parts, out["seconds"]["total"] * 0.1)

    def test_logits_to_a_device_or_a_link_do_not_replace_it(self):
        target = self.scratch / "target.npy"
        for name, to in (("null", "/dev/null"), ("link.npy", target)):
            place = self.scratch / name
            place.symlink_to(to)
            self.wide("--ids", "1 2 3", "--max-tokens", 1, "--logits", place)
            self.assertTrue(place.is_symlink(), name)
        self.assertEqual(read_npy(target)[0], (3, 256))

    def test_json_of_a_split_run_has_its_peer(self):
        _, listen = self.serve(WIDE)
        out = self.json(self.generate(WIDE, "--ids", "1 2 3", "--max-tokens", 5, "--ffn", listen, "--json"))
        peer, = out["peers"]
        self.assertLessEqual({"address", "parts", "rows", "resent_rows"}, set(peer))
        self.assertEqual(peer["address"], listen)

    def test_json_ids_are_those_of_the_text(self):
        batch = self.write_batch([{"ids": [1, 2]}, {"ids": [9], "max_tokens": 3}])
        text, out = self.wide("--batch", batch), self.wide("--batch", batch, "--json")
        self.assertEqual(json.loads(out.stdout)["ids"], ids_of(text))
        self.assertEqual([len(ids) for ids in ids_of(text)], [16, 3])

    def test_a_sequence_is_the_same_alone_and_in_a_batch(self):
        prompts = [[1, 2, 3], [7], list(range(40)), [200, 100]]
        together = ids_of(self.wide("--batch", self.write_batch([{"ids": ids} for ids in prompts]), "--max-tokens", 10))
        alone = [ids_of(self.wide("--ids", " ".join(map(str, ids)), "--max-tokens", 10))[0] for ids in prompts]
        self.assertEqual(together, alone)

    def test_a_batch_is_the_same_for_every_chunk(self):
        batch = self.write_batch([{"ids": list(range(i, i + 20 + i))} for i in range(5)])
        want = self.wide("--batch", batch).stdout
        for chunk in (1, 3, 16, 50):
            self.assertEqual(self.wide("--batch", batch, "--prefill-chunk", chunk).stdout, want, chunk)

    def test_a_batch_is_the_same_for_every_page_size(self):
        batch = self.write_batch([{"ids": list(range(i, i + 20))} for i in range(3)])
        want = self.wide("--batch", batch).stdout
        for page in (1, 3, 64, 1000):
            self.assertEqual(self.wide("--batch", batch, "--page-size", page).stdout, want, page)

    def test_a_model_whose_layers_all_slide_needs_few_pages(self):
        common = ("--model", GOLDEN / "moe-window", "--ids", "1 2 3 4 5 6 7 8 9", "--max-tokens", 300, "--page-size", 4, "--log", "error")
        runs = [run("afd-generate", *common, *more) for more in (
            (), ("--prefill-chunk", 4), ("--prefill-chunk", 4, "--kv-pages", 6))]
        self.assertEqual([(done.returncode, done.stderr) for done in runs], [(0, "")] * 3)
        self.assertEqual(len(ids_of(runs[0])[0]), 300)
        self.assertEqual({done.stdout for done in runs}, {runs[0].stdout})
        done = run("afd-generate", *common, "--kv-pages", 2)
        self.assertEqual(done.returncode, 1)
        self.assertIn("3 KV pages needed, 2 free of 2", done.stderr)

    def test_an_eos_ends_a_sequence_with_it(self):
        free, = ids_of(self.wide("--ids", "1 2 3", "--max-tokens", 12))
        eos = free[4]
        ended, = ids_of(self.wide("--ids", "1 2 3", "--max-tokens", 12, "--eos", 255 if eos != 255 else 254, "--eos", eos))
        self.assertEqual(ended, free[:free.index(eos) + 1])

    def test_positions_beyond_the_model_are_computed_with_one_warning(self):
        done = run("afd-generate", "--model", WIDE, "--ids", " ".join(["5"] * 30), "--max-tokens", 400)
        positions = json.loads((WIDE / "config.json").read_text())["max_position_embeddings"]
        self.assertLess(positions, 429)
        self.assertEqual((done.returncode, len(ids_of(done)[0]), done.stderr.count("\n")), (0, 400, 1), done.stderr)
        self.assertIn(str(positions), done.stderr)

    def test_a_trace_holds_complete_events_of_every_layer(self):
        trace = self.scratch / "trace.json"
        self.wide("--ids", "1 2 3", "--max-tokens", 4, "--trace", trace)
        events = json.loads(trace.read_text())
        layers = json.loads((WIDE / "config.json").read_text())["num_hidden_layers"]
        for name in ("attention", "ffn"):
            own = [event for event in events if event["ph"] == "X" and event["name"] == name]
            self.assertEqual({event["args"]["layer"] for event in own}, set(range(layers)), name)
            self.assertEqual(len({event["args"]["step"] for event in own}), 4, name)
        self.assertTrue(all(event["dur"] >= 0 for event in events if event["ph"] == "X"))

    def test_metrics_are_rewritten_while_the_server_runs_and_at_its_end(self):
        metrics = self.scratch / "metrics"
        server, listen = self.serve(WIDE, "--metrics", metrics)
        first = metrics.stat().st_mtime_ns
        self.result(self.generate(WIDE, "--ids", "1 2 3", "--ffn", listen))
        self.until("the file is rewritten", lambda: metrics.stat().st_mtime_ns > first, 3)
        self.until("rows are counted", lambda: self.metric(metrics, "afd_ffn_rows_total") > 0, 3)
        self.stop(server)
        self.assertRegex(metrics.read_text(), r"(?m)^# TYPE afd_ffn_rows_per_pass histogram$")
        self.assertFalse(pathlib.Path(f"{metrics}.part").exists())

    def test_metrics_to_a_device_do_not_replace_it(self):
        place = self.scratch / "null"
        place.symlink_to("/dev/null")
        server, _ = self.serve(WIDE, "--metrics", place)
        server.terminate()
        server.wait(30)
        self.assertTrue(place.is_symlink())

    def test_a_batch_that_never_ends_is_refused_with_the_limit(self):
        done = run("afd-generate", "--model", WIDE, "--batch", "/dev/zero")
        self.assertEqual((done.returncode, done.stderr), (1, "afd-generate: /dev/zero: over 1073741824 bytes\n"))

    def test_a_bar_shows_the_loading_on_a_terminal_and_nowhere_else(self):
        try:
            leader, follower = pty.openpty()
        except OSError as error:
            self.skipTest(f"no pseudo terminal: {error}")
        self.addCleanup(os.close, leader)
        server = subprocess.Popen([tool("afd-serve-ffn"), "--model", MODEL, "--listen", address()], stdout=subprocess.PIPE,
                                  stderr=follower, text=True, env=ENV)
        self.processes.append(server)
        os.close(follower)
        self.assertTrue(server.stdout.readline().startswith("ready "))
        shown = os.read(leader, 65536).decode()
        self.assertRegex(shown, r"loading .*tiny-qwen3 \[#+ *\] +\d+ % of \d+\.\d MiB")
        self.assertTrue(shown.endswith("\r\x1b[K"), repr(shown[-20:]))  # the finished bar is wiped
        piped, _ = self.serve(MODEL)
        piped.terminate()
        self.assertEqual(piped.communicate(timeout=10)[1], "")

    def test_wire_dtype_of_the_server_restricts_its_peers(self):
        _, listen = self.serve(WIDE, "--wire-dtype", "bf16")
        process = self.generate(WIDE, "--ids", "1", "--ffn", listen, "--wire-dtype", "f32")
        _, err = process.communicate(timeout=20)
        self.assertEqual((process.returncode, err.count("\n")), (1, 1), err)
        for word in (listen, "f32", "bf16"):
            self.assertIn(word, err)
        self.result(self.generate(WIDE, "--ids", "1", "--ffn", listen, "--wire-dtype", "bf16"))

    def test_one_peer_more_than_max_peers_is_refused(self):
        metrics = self.scratch / "metrics"
        _, listen = self.serve(MODEL, "--max-peers", 1, "--metrics", metrics)
        self.generate(MODEL, "--ids", "1", "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error", "--ffn", listen)
        self.until("the first has joined", lambda: self.metric(metrics, "afd_ffn_peers") == 1)
        second = self.generate(MODEL, "--ids", "1", "--ffn", listen, "--connect-timeout-ms", 500)
        _, err = second.communicate(timeout=20)
        self.assertEqual(second.returncode, 1, err)
        self.assertIn(listen, err)

    def test_a_peer_with_another_model_is_refused_with_the_field(self):
        _, listen = self.serve(WIDE)
        process = self.generate(GOLDEN / "bf16-untied", "--ids", "1", "--ffn", listen)
        _, err = process.communicate(timeout=20)
        self.assertEqual((process.returncode, err.count("\n")), (1, 1), err)
        for word in (listen, "hidden_size", "96", "48"):
            self.assertIn(word, err)


class Sampling(Case):
    def sample(self, *args):
        done = run("afd-generate", "--model", WIDE, "--max-tokens", 20, "--temperature", "1.5", *args)
        self.assertEqual(done.returncode, 0, done.stderr)
        return ids_of(done)

    def test_a_seed_gives_its_tokens_again_and_another_seed_gives_others(self):
        self.assertEqual(self.sample("--ids", "1 2", "--seed", 5), self.sample("--ids", "1 2", "--seed", 5))
        self.assertNotEqual(self.sample("--ids", "1 2", "--seed", 5), self.sample("--ids", "1 2", "--seed", 6))

    def test_the_seed_of_an_entry_is_the_seed_plus_its_index(self):
        batch = self.write_batch([{"ids": [1, 2]}, {"ids": [1, 2]}, {"ids": [1, 2], "seed": 5}])
        first, second, third = self.sample("--batch", batch, "--seed", 5)
        self.assertEqual((first, second, third), (third, self.sample("--ids", "1 2", "--seed", 6)[0], first))

    def test_a_draw_is_the_same_in_every_layout(self):
        _, listen = self.serve(WIDE)
        batch = self.write_batch([{"ids": [1, 2, 3]}, {"ids": [4]}, {"ids": [9, 8]}])
        want = self.sample("--batch", batch, "--top-k", 50, "--top-p", "0.9")
        for args in (["--ffn", listen], ["--ffn", listen, "--lanes", 3], ["--prefill-chunk", 2, "--threads", 2]):
            self.assertEqual(self.sample("--batch", batch, "--top-k", 50, "--top-p", "0.9", *args), want)

    def test_the_deferred_device_draws_what_the_cpu_draws(self):
        args = ["--ids", "1 2 3", "--top-k", 50, "--top-p", "0.9"]
        self.assertEqual(self.sample(*args, "--device", "deferred"), self.sample(*args, "--device", "cpu"))

    def test_a_top_k_beyond_the_vocabulary_is_none(self):
        self.assertEqual(self.sample("--ids", "1 2", "--top-k", 4294967295), self.sample("--ids", "1 2"))

    def test_top_k_of_one_is_greedy(self):
        greedy = run("afd-generate", "--model", WIDE, "--max-tokens", 20, "--ids", "1 2")
        self.assertEqual(self.sample("--ids", "1 2", "--top-k", 1), ids_of(greedy))
