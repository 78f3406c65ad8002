# SPDX-License-Identifier: Apache-2.0
"""Attention groups as users see them: ranks of afd-generate, what they print and write, what is refused, and a rank that is lost."""
import json
import os
import pathlib
import select
import signal
import time

from tools import BOTH_F32, GOLDEN, MODEL, Case, address, read_npy, run, segments, tcp_address

WIDE = GOLDEN / "wide"
MOE = GOLDEN / "moe-f32"
PROMPT = "3 1 4 1 5 9 2 6 5 35 29 19 32 38 46"
LIMIT = 1e-10


def nmse(got, want):
    return sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want)


class Group(Case):
    meet = staticmethod(address)

    def group(self, n, model, *args, **of_rank):
        """The ranks of one group under way, rank 0 with args of its own."""
        meet = self.meet()
        return [self.generate(model, "--attention-tp", f"{i}/{n}", "--attention-group", meet, *args,
                              *of_rank.get("first" if i == 0 else "others", ())) for i in range(n)]

    def results(self, ranks):
        """What rank 0 prints; the others must say nothing."""
        for rank in ranks[1:]:
            said = rank.communicate(timeout=120)
            self.assertEqual((rank.returncode, *said), (0, "", ""))
        return self.result(ranks[0])

    def logits(self, n, model, *args):
        path = self.scratch / "group.npy"
        out = self.results(self.group(n, model, "--ids", PROMPT, "--max-tokens", 8, *args, first=["--logits", path]))
        return out, path.read_bytes(), read_npy(path)[1]

    def alone(self, model, *args):
        path = self.scratch / "alone.npy"
        out = self.result(self.generate(model, "--ids", PROMPT, "--max-tokens", 8, "--logits", path, *args))
        return out, read_npy(path)[1]

    def shards(self, model, n, *args):
        """FFN servers that hold the model together, as flags."""
        return [word for i in range(n) for word in ("--ffn", self.serve(model, "--ffn-tp", f"{i}/{n}", *args)[1])]


class Agreement(Group):
    def agree(self, model, ranks, *args):
        ids, want = self.alone(model, *BOTH_F32)
        for n_ffn in (1, 2):
            ffn = self.shards(model, n_ffn)
            for n in ranks:
                with self.subTest(f"{n}A(tp{n}):{n_ffn}F"):
                    out, _, values = self.logits(n, model, *ffn, *BOTH_F32, *args)
                    self.assertEqual(out, ids)
                    self.assertLessEqual(nmse(values, want), LIMIT)

    def test_ranks_agree_with_one_process(self):
        self.agree(WIDE, (2, 4))

    def test_ranks_agree_with_one_process_on_experts_routed_at_the_ffn(self):
        self.agree(MOE, (2,), "--gate", "ffn")

    def test_ranks_agree_with_one_process_on_experts_routed_by_each_rank(self):
        self.agree(MOE, (2, 4), "--gate", "attention")

    def test_ranks_agree_with_one_process_on_e4m3_weights_and_an_output_gate(self):
        for name in ("fp8-ragged", "fp8-afmoe", "afmoe-f32"):
            self.agree(GOLDEN / name, (2,))

    def test_bits_depend_on_the_shards_alone(self):
        ffn = self.shards(MODEL, 2)
        _, want, _ = self.logits(2, MODEL, *ffn)
        for args in (["--lanes", 2], ["--lanes", 4, "--prefill-chunk", 4], ["--page-size", 3], ["--max-rows", 2], ["--threads", 2]):
            with self.subTest(" ".join(map(str, args))):
                self.assertEqual(self.logits(2, MODEL, *ffn, *args)[1], want)

    def test_media_give_the_same_bits(self):
        """Ranks over shm:, tcp: and TLS, at FFN shards over shm:."""
        key = self.scratch / "key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        for model, n, secret in ((MODEL, 2, ()), (WIDE, 3, ()), (WIDE, 3, ("--key", key, "--tls"))):
            ffn = self.shards(model, 2, *secret)
            bits = set()
            for self.meet in (address, tcp_address, lambda: ",".join(tcp_address() for _ in range(n))):
                bits |= {self.logits(n, model, *ffn, "--lanes", lanes, *secret)[1] for lanes in (1, 3)}
            self.assertEqual(len(bits), 1)

    def test_devices_give_the_same_bits(self):
        ffn = self.shards(MODEL, 1)
        bits = {self.logits(2, MODEL, *ffn, "--device", device)[1] for device in ("cpu", "deferred")}
        self.assertEqual(len(bits), 1)

    def test_an_ffn_in_each_rank_gives_the_bits_of_a_peer(self):
        _, want, _ = self.logits(2, MODEL, *self.shards(MODEL, 1))
        self.assertEqual(self.logits(2, MODEL)[1], want)

    def test_samples_of_a_batch_are_those_of_one_process(self):
        batch = self.write_batch([{"ids": [i + 1, i + 2], "max_tokens": 4 + i} for i in range(5)])
        args = ["--batch", batch, "--temperature", 1, "--seed", 3, "--lanes", 2, *BOTH_F32]
        want = self.result(self.generate(WIDE, *args))
        self.assertEqual(self.results(self.group(2, WIDE, *args, *self.shards(WIDE, 1))), want)


    def test_launched_layouts_of_groups_print_what_one_process_prints(self):
        batch = self.write_batch([{"ids": [i + 1, i + 2, 7], "max_tokens": 3 + i} for i in range(5)])
        args = ["--batch", batch, "--gate", "ffn", *BOTH_F32]
        want = self.result(self.generate(MOE, *args))
        for layout in ("2A(tp2):1F", "4A(tp2):2F(ep2)", "4A(tp4):2F(tp2)"):
            with self.subTest(layout):
                self.assertEqual(self.result(self.launch(layout, MOE, *args)), want)


class Output(Group):
    def test_rank_0_alone_writes(self):
        files = [self.scratch / name for name in ("x.npy", "trace.json")]
        args = ["--ids", PROMPT, "--json", "--logits", files[0], "--trace", files[1]]
        ranks = self.group(2, WIDE, *args, others=["--logits", self.scratch / "other.npy", "--trace", self.scratch / "other.json"])
        out = json.loads(self.results(ranks))
        self.assertEqual([len(ids) for ids in out["ids"]], [16])
        self.assertEqual(sorted(os.listdir(self.scratch)), sorted(path.name for path in files))

    def test_peers_are_the_ffns_and_each_row_goes_to_them_once(self):
        metrics = self.scratch / "metrics"
        server, listen = self.serve(WIDE, "--metrics", metrics)
        out = json.loads(self.results(self.group(2, WIDE, "--ids", PROMPT, "--json", "--ffn", listen)))
        self.stop(server)
        n_rows = (15 + 15) * json.loads((WIDE / "config.json").read_text())["num_hidden_layers"]
        self.assertEqual([peer["address"] for peer in out["peers"]], [listen])
        self.assertLess(out["peers"][0]["rows"], n_rows)
        self.assertEqual(self.metric(metrics, "afd_ffn_rows_total"), n_rows)

    def test_positions_beyond_the_model_are_warned_of_once(self):
        ranks = self.group(2, MODEL, "--ids", PROMPT, "--max-tokens", 260)
        said = [rank.communicate(timeout=60)[1].count("max_position_embeddings") for rank in ranks]
        self.assertEqual(([rank.returncode for rank in ranks], said), ([0, 0], [1, 0]))


class Refusals(Group):
    def refuse(self, args, *words, status=2):
        with self.subTest(" ".join(map(str, args))):
            done = run("afd-generate", "--model", WIDE, "--ids", "1 2 3", *args)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
            for word in words:
                self.assertIn(word, done.stderr)

    def test_groups_that_cannot_be_are_wrong_usage(self):
        self.refuse(["--attention-tp", "0/2"], "--attention-tp 0/2", "--attention-group is not given")
        self.refuse(["--attention-tp", "1/2"], "--attention-tp 1/2", "--attention-group is not given")
        self.refuse(["--attention-group", "shm:g"], "--attention-group shm:g", "limit 2 ranks")
        self.refuse(["--attention-tp", "0/1", "--attention-group", "shm:g"], "limit 2 ranks")
        self.refuse(["--attention-tp", "0/65", "--attention-group", "shm:g"], "group_size is 65, limit 64")
        for shard in ("2/2", "0/0", "1", "-1/2", "a/2", "0/2x"):
            self.refuse(["--attention-tp", shard, "--attention-group", "shm:g"], f"--attention-tp {shard}", "not a shard i/n")
        self.refuse(["--attention-tp", "0/2", "--attention-group", "fax:1"], "fax")

    def test_more_ranks_than_heads_are_refused_with_their_number(self):
        self.refuse(["--attention-tp", "0/7", "--attention-group", address()], "7 tensor-parallel ranks, limit 6", status=1)

    def test_a_rank_that_never_comes_is_named_within_the_timeout(self):
        self.refuse(["--attention-tp", "0/2", "--attention-group", address(), "--connect-timeout-ms", "300"], "rank 1", "300", status=1)
        self.refuse(["--attention-tp", "1/2", "--attention-group", address(), "--connect-timeout-ms", "300"], "300", status=1)

    def test_ranks_of_other_sizes_are_refused_by_the_field(self):
        meet = address()
        ranks = [self.generate(WIDE, "--ids", "1 2", "--attention-group", meet, "--attention-tp", f"{i}/{i + 2}",
                               "--connect-timeout-ms", 2000) for i in range(2)]
        errors = [rank.communicate(timeout=30)[1] for rank in ranks]
        self.assertEqual([rank.returncode for rank in ranks], [1, 1], errors)
        self.assertIn("group_size", "".join(errors))

    def test_ranks_of_other_input_end_with_an_error(self):
        meet = address()
        ranks = [self.generate(WIDE, "--ids", ids, "--attention-group", meet, "--attention-tp", f"{i}/2")
                 for i, ids in enumerate(("1 2 3", "1 2 3 4"))]
        errors = [rank.communicate(timeout=30)[1] for rank in ranks]
        self.assertEqual([rank.returncode for rank in ranks], [1, 1], errors)
        self.assertIn("rows at rank", "".join(errors))


class Losses(Group):
    def begin(self, n):
        """A group in the middle of its work at one FFN."""
        self.before = segments()
        metrics = self.scratch / "metrics"
        server, listen = self.serve(MODEL, "--metrics", metrics)
        ranks = self.group(n, MODEL, "--ids", "17 4 2", "--log", "error", "--max-tokens", 200000, "--kv-pages", 20000, "--ffn", listen)
        self.until("rows crossed", lambda: pathlib.Path(metrics).exists() and self.metric(metrics, "afd_ffn_rows_total") > 300)
        self.assertTrue(all(rank.poll() is None for rank in ranks))
        return server, listen, ranks

    def lose(self, n, victim, how):
        server, listen, ranks = self.begin(n)
        silent = [rank.stderr for rank in ranks if rank is not ranks[victim]]
        end = time.monotonic() + 1.0
        ranks[victim].send_signal(how)
        while silent and time.monotonic() < end:
            told = select.select(silent, [], [], 0.05)[0]
            silent = [stream for stream in silent if stream not in told]
        self.assertEqual(len(silent), 0, "ranks that have told nothing within a second")
        ranks[victim].communicate(timeout=20)
        for rank in ranks[:victim] + ranks[victim + 1:]:
            _, err = rank.communicate(timeout=20)
            self.assertEqual((rank.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(f"rank {victim}", err)
        self.assertEqual(self.result(self.generate(MODEL, "--ids", "5 6", "--ffn", listen)),
                         self.result(self.generate(MODEL, "--ids", "5 6")))
        self.stop(server)
        self.assertEqual(segments(), self.before)

    def test_a_killed_rank_is_named_by_the_other_within_a_second(self):
        self.lose(2, 1, signal.SIGKILL)

    def test_a_killed_first_rank_is_named_by_the_other_within_a_second(self):
        self.lose(2, 0, signal.SIGKILL)

    def test_a_killed_rank_is_named_by_all_others(self):
        self.lose(4, 2, signal.SIGKILL)

    def test_an_interrupted_rank_ends_its_group(self):
        self.lose(2, 1, signal.SIGINT)

    def test_a_killed_ffn_ends_every_rank(self):
        server, listen, ranks = self.begin(2)
        server.send_signal(signal.SIGKILL)
        for rank in ranks:
            _, err = rank.communicate(timeout=10)
            self.assertEqual((rank.returncode, err.count("\n")), (1, 1), err)
            self.assertIn(listen, err)
        self.assertEqual(segments(), self.before)
