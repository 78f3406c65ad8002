# SPDX-License-Identifier: Apache-2.0
"""What the tools say to wrong usage, to flags of later versions, and about themselves."""
import json
import re
import subprocess

from tools import ENV, GOLDEN, MODEL, Case, run, tool

WIDE = GOLDEN / "wide"
TOOLS = ["afd-inspect", "afd-serve-ffn", "afd-generate", "afd-bench", "afd-plan"]
GENERATE = ["--model", WIDE, "--ids", "1 2 3"]
SERVE = ["--model", WIDE, "--listen", "shm:never"]
STAGE_FLAGS = ["model", "device", "threads", "deadline-ms", "max-rows", "connect-timeout-ms", "key", "tls", "log",
               "quantize-activations"]
FLAGS = {
    "afd-inspect": ["model", "attention-tp", "ffn-tp", "ffn-ep", "gate", "json", "log"],
    "afd-serve-ffn": STAGE_FLAGS + ["listen", "ffn-tp", "ffn-ep", "metrics", "max-peers", "wire-dtype"],
    "afd-generate": STAGE_FLAGS + [
        "ids", "batch", "max-tokens", "eos", "ffn", "lanes", "wire-dtype", "kv-dtype", "kv-pages", "page-size", "prefill-chunk",
        "gate", "attention-tp", "attention-group", "temperature", "top-k", "top-p", "seed", "logits", "reconnect-s", "trace", "json"],
}


class Usage(Case):
    def refuse(self, name, args, *words, status=2):
        """One line on stderr that has all the words, nothing on stdout, and the exit status."""
        with self.subTest(" ".join(map(str, [name, *args]))):
            done = run(name, *args)
            self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            for word in [name, *words]:
                self.assertIn(str(word), done.stderr)

    def test_help_lists_every_flag(self):
        for name, flags in FLAGS.items():
            with self.subTest(name):
                done = run(name, "--help")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                shown = re.findall(r"^  --([a-z-]+)", done.stdout, re.M)
                self.assertLessEqual(set(flags) | {"help", "version"}, set(shown))

    def test_help_gives_defaults_with_their_unit(self):
        text = run("afd-generate", "--help").stdout
        for line in ("(default 5000 ms)", "(default 10000 ms)", "(default 512 rows)", "(default cores)", "(default 16)"):
            self.assertIn(line, text)

    def test_a_full_stdout_is_an_error_of_every_tool(self):
        for line in (["afd-inspect", "--model", MODEL], ["afd-generate", "--model", MODEL, "--ids", "1"], ["afd-plan", "--help"],
                     ["afd-plan", "size", "--help"], ["afd-bench", "--version"], ["afd-serve-ffn", "--version"]):
            with self.subTest(line), open("/dev/full", "w") as full:
                done = subprocess.run([tool(line[0]), *map(str, line[1:])], stdout=full, stderr=subprocess.PIPE, text=True,
                                      env=ENV, timeout=60)
                self.assertEqual((done.returncode, done.stderr), (1, f"{line[0]}: stdout: cannot be written\n"))

    def test_an_empty_batch_is_said_to_be_empty(self):
        done = run("afd-generate", "--model", WIDE, "--batch", "/dev/null")
        self.assertEqual((done.returncode, done.stderr), (1, "afd-generate: /dev/null: not JSON: it is empty\n"))

    def test_version_is_printed(self):
        for name in TOOLS:
            with self.subTest(name):
                self.assertRegex(run(name, "--version").stdout, rf"^{name} \d+\.\d+\.\d+\n$")

    def test_missing_required_flags_are_named(self):
        self.refuse("afd-inspect", [], "--model")
        self.refuse("afd-serve-ffn", ["--listen", "shm:x"], "--model")
        self.refuse("afd-serve-ffn", ["--model", WIDE], "--listen")
        self.refuse("afd-generate", ["--model", WIDE], "--ids", "--batch")
        self.refuse("afd-generate", ["--ids", "1"], "--model")

    def test_an_unknown_flag_is_named(self):
        for name in TOOLS[:3]:
            self.refuse(name, ["--frobnicate", "3"], "--frobnicate")

    def test_a_word_that_is_no_flag_is_named(self):
        self.refuse("afd-generate", [*GENERATE, "more"], "more")

    def test_a_flag_without_its_value_is_named(self):
        self.refuse("afd-generate", [*GENERATE, "--lanes"], "--lanes")

    def test_values_out_of_range_are_named_with_their_limit(self):
        for flag, value, limit in (
                ("--lanes", "0", "1 to 4"), ("--lanes", "5", "1 to 4"), ("--lanes", "two", "1 to 4"), ("--max-tokens", "0", "1 to"),
                ("--max-tokens", "1x", "1 to"), ("--threads", "0", "1 to 1024"), ("--threads", "-1", "1 to 1024"),
                ("--page-size", "0", "1 to 65536"), ("--max-rows", "65537", "65536"), ("--temperature", "-1", "0 to 100"),
                ("--temperature", "nan", "0 to 100"), ("--top-p", "1.5", "0 to 1"), ("--seed", "-3", "0 to"), ("--eos", "x", "0 to"),
                ("--wire-dtype", "f64", "fp8"), ("--wire-dtype", "fp8:f64", "bf16"), ("--wire-dtype", "fp8:", "bf16"), ("--kv-dtype", "int8", "bf16"),
                ("--gate", "left", "attention or ffn"), ("--log", "loud", "warn"), ("--device", "tpu", "cpu"),
                ("--deadline-ms", "0", "10 to"), ("--connect-timeout-ms", "1e3", "1 to"), ("--kv-pages", "0", "1 to"),
                ("--prefill-chunk", "65537", "65536")):
            self.refuse("afd-generate", [*GENERATE, flag, value], flag, value, limit)

    def test_keys_that_are_none_are_refused_by_file_and_limit(self):
        key = self.scratch / "key"
        for text, mode, words in (("short", 0o600, ("16",)), (17 * "x", 0o644, ("others", "600"))):
            key.write_text(text)
            key.chmod(mode)
            for tool, flags in (("afd-serve-ffn", SERVE), ("afd-generate", [*GENERATE, "--ffn", "shm:nobody"])):
                done = run(tool, *flags, "--key", key)
                self.assertIn(done.returncode, (1, 2))
                self.assertEqual(done.stderr.count("\n"), 1)
                for word in (str(key), *words):
                    self.assertIn(word, done.stderr)
        self.refuse("afd-serve-ffn", [*SERVE, "--tls"], "tls", "key")

    def test_shards_that_there_are_not_are_refused(self):
        for value in ("2/2", "0/0", "1", "a/2", "0/2x", "-1/2", "0/4294967296", ""):
            for flag in ("--ffn-tp", "--ffn-ep"):
                self.refuse("afd-serve-ffn", [*SERVE, flag, value], flag, "not a shard i/n")

    def test_values_that_only_later_versions_change_are_taken(self):
        done = run("afd-generate", *GENERATE, "--attention-tp", "0/1", "--reconnect-s", "5", "--device", "cpu")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_addresses_that_mean_nothing_are_wrong_usage(self):
        for address in ("nowhere", "shm:", "shm:a/b", "fax:1", "tcp:127.0.0.1:0", "tcp:127.0.0.1", "shm:" + 81 * "x"):
            if not address.endswith(":0"):
                self.refuse("afd-serve-ffn", ["--model", WIDE, "--listen", address], address.split(":")[0])
            self.refuse("afd-generate", [*GENERATE, "--ffn", address], address.split(":")[0])

    def test_logits_of_several_sequences_are_wrong_usage(self):
        batch = self.write_batch([{"ids": [1]}, {"ids": [2]}])
        self.refuse("afd-generate", ["--model", WIDE, "--batch", batch, "--logits", self.scratch / "x.npy"], "--logits", "limit 1")
        self.assertFalse((self.scratch / "x.npy").exists())

    def test_ids_that_are_no_ids_are_wrong_usage(self):
        for ids in ("", "one", "1 -2", "1 2.5", "99999999999"):
            self.refuse("afd-generate", ["--model", WIDE, "--ids", ids], "--ids")

    def test_an_id_beyond_the_vocabulary_is_named_with_its_place(self):
        self.refuse("afd-generate", ["--model", WIDE, "--ids", "1 256"], "256", "position 1", "limit 255", status=1)

    def test_a_bad_batch_file_is_named_with_its_place(self):
        path = self.scratch / "batch.json"
        for text, word in (("[", "line 1"), ("{}", "an array"), ("[]", "0 entries"), ('[{"ids": []}]', "[0]"),
                           ('[{"ids": [1]}, {"ids": "1"}]', "[1].ids"), ('[{"ids": [1, 2.5]}]', "ids[1]"),
                           ('[{"ids": [-1]}]', "-1"), ('[{"ids": [1], "max_tokens": 0}]', "max_tokens"),
                           ('[{"ids": [1], "seed": "x"}]', "seed"), ('[{"ids": [1], "max_token": 3}]', "[0]: no key \"max_token\""), ("[3]", "[0]: not an object"),
                           ('[{"ids": [1], "ids": [2]}]', "line 1"),
                           ('[{"ids": [1], "max_tokens": 99999999999}]', "max_tokens")):
            path.write_text(text)
            self.refuse("afd-generate", ["--model", WIDE, "--batch", path], path, word, status=1)

    def test_a_missing_checkpoint_is_named(self):
        for name, args in (("afd-inspect", []), ("afd-generate", ["--ids", "1"]), ("afd-serve-ffn", ["--listen", "shm:never"])):
            self.refuse(name, ["--model", self.scratch / "none", *args], self.scratch / "none", status=1)

    def test_a_server_that_never_comes_is_named_within_the_timeout(self):
        self.refuse("afd-generate", [*GENERATE, "--ffn", "shm:nobody", "--connect-timeout-ms", "200"], "shm:nobody", "200", status=1)

    def test_an_address_that_is_taken_is_named(self):
        _, listen = self.serve(WIDE)
        self.refuse("afd-serve-ffn", ["--model", WIDE, "--listen", listen], listen, status=1)

    def test_an_isa_that_does_not_exist_is_named(self):
        done = run("afd-generate", *GENERATE, AFD_ISA="sse9")
        self.assertEqual(done.returncode, 1)
        self.assertIn("sse9", done.stderr)

    def test_too_few_kv_pages_are_an_error_with_the_limit(self):
        done = run("afd-generate", *GENERATE, "--kv-pages", 1, "--page-size", 2)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)


class Inspect(Case):
    def test_json_has_the_keys_and_the_sums_of_the_checkpoint(self):
        info = json.loads(run("afd-inspect", "--model", WIDE, "--json").stdout)
        config = json.loads((WIDE / "config.json").read_text())
        self.assertEqual((info["layers"], info["hidden_size"], info["vocab_size"]),
                         (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]))
        self.assertEqual(info["architecture"], config["architectures"][0])
        self.assertEqual(info["kv_bytes_per_token"],
                         2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])
        self.assertEqual([(role["role"], role["shard"]) for role in info["roles"]], [("attention", "0/1"), ("ffn", "0/1")])
        ffn = info["roles"][1]
        self.assertEqual(ffn["tensors"], 3 * config["num_hidden_layers"])
        self.assertEqual(ffn["bytes"], 2 * ffn["tensors"] * config["hidden_size"] * config["intermediate_size"])

    def test_text_names_both_roles(self):
        self.assertRegex(run("afd-inspect", "--model", WIDE).stdout, r"(?s)architecture.*attention +0/1 .*\nffn +0/1 ")

    def shards(self, case, *flags):
        return json.loads(run("afd-inspect", "--model", GOLDEN / case, "--json", *flags).stdout)["roles"]

    def test_shards_are_listed_rank_by_rank(self):
        roles = self.shards("moe-bf16", "--attention-tp", 2, "--ffn-tp", 2, "--ffn-ep", 3)
        self.assertEqual([(role["role"], role["shard"]) for role in roles],
                         [("attention", "tp0/2"), ("attention", "tp1/2")]
                         + [("ffn", f"tp{tp}/2,ep{ep}/3") for ep in range(3) for tp in range(2)])
        self.assertEqual([role["shard"] for role in self.shards("moe-bf16", "--ffn-tp", 2)], ["0/1", "tp0/2", "tp1/2"])

    def test_shards_of_the_ffn_add_up_to_it_and_a_router_each(self):
        config = json.loads((GOLDEN / "moe-bf16/config.json").read_text())
        router = 2 * config["num_hidden_layers"] * config["num_experts"] * config["hidden_size"]
        whole = self.shards("moe-bf16")[1]["bytes"]
        parts = [role["bytes"] - router for role in self.shards("moe-bf16", "--ffn-tp", 2, "--ffn-ep", 3)[1:]]
        self.assertEqual(sum(parts) + router, whole)

    def test_attention_holds_the_routers_when_it_routes(self):
        config = json.loads((GOLDEN / "moe-bf16/config.json").read_text())
        router = 2 * config["num_hidden_layers"] * config["num_experts"] * config["hidden_size"]
        bytes_of = [self.shards("moe-bf16", "--gate", gate)[0]["bytes"] for gate in ("attention", "ffn")]
        self.assertEqual(bytes_of[0] - bytes_of[1], router)
        self.assertEqual(self.shards("moe-bf16")[0]["bytes"], bytes_of[0])

    def test_more_ranks_than_there_is_work_for_are_refused(self):
        for flag in (["--ffn-ep", "99"], ["--attention-tp", "99"]):
            done = run("afd-inspect", "--model", GOLDEN / "moe-bf16", *flag)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
            self.assertIn("99", done.stderr)
        for flag in (["--ffn-tp", "0"], ["--gate", "both"]):
            self.assertEqual(run("afd-inspect", "--model", WIDE, *flag).returncode, 2)
