# SPDX-License-Identifier: Apache-2.0
"""examples/launch.sh: what a layout starts, how input is divided and results are joined, and that nothing is left behind."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

from tools import GOLDEN, MODEL, ROOT, Case, run, segments, tool

LAUNCH = str(ROOT / "examples/launch.sh")
WIDE = GOLDEN / "wide"
MOE = GOLDEN / "moe-f32"
ENTRIES = [{"ids": [1, 2]}, {"ids": [3], "max_tokens": 3}, {"ids": [4, 5, 6]}, {"ids": [9, 8], "seed": 77}, {"ids": [7]}]
SAMPLE = ["--temperature", 1, "--seed", 5, "--max-tokens", 6]


def children(pid):
    """The processes that pid has started, as {pid: words of its command}."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found[int(path.name)] = (path / "cmdline").read_text().split("\0")[:-1]
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return found


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Results(Case):
    def test_every_layout_prints_what_one_process_prints_in_input_order(self):
        batch = self.write_batch(ENTRIES)
        want = self.result(self.generate(WIDE, "--batch", batch, *SAMPLE))
        for layout in ("1A:1F", "2A:1F", "3A:1F", "5A:1F"):
            with self.subTest(layout):
                self.assertEqual(self.result(self.launch(layout, WIDE, "--batch", batch, *SAMPLE)), want)

    def test_shards_are_started_as_the_layout_says(self):
        batch = self.write_batch(ENTRIES)
        want = self.result(self.generate(MOE, "--batch", batch, *SAMPLE))
        for layout in ("1A:2F(tp2)", "2A:2F(ep2)", "1A:4F(tp2,ep2)", "1A:6F(ep3,tp2)", "1A:4F(ep2)"):
            with self.subTest(layout):
                self.assertEqual(self.result(self.launch(layout, MOE, "--batch", batch, "--gate", "ffn", *SAMPLE)), want)

    def test_ranks_of_an_attention_group_get_the_same_part_and_one_prints(self):
        batch = self.write_batch(ENTRIES)
        want = self.result(self.launch("2A(tp2):1F", MOE, "--batch", batch, *SAMPLE))
        self.assertEqual(len(want.splitlines()), len(ENTRIES))
        for layout in ("4A(tp2):1F", "6A(tp2):1F"):
            with self.subTest(layout):
                self.assertEqual(self.result(self.launch(layout, MOE, "--batch", batch, *SAMPLE)), want)

    def test_the_shard_of_every_process_is_in_the_metrics_of_its_number(self):
        out = self.launch("1A:4F(tp2,ep2)", MOE, "--ids", "1 2 3", "--gate", "ffn", "--metrics", self.scratch / "m.{}")
        self.result(out)
        done = run("afd-inspect", "--model", MOE, "--ffn-tp", 2, "--ffn-ep", 2, "--json")
        want = [role["bytes"] for role in json.loads(done.stdout)["roles"] if role["role"] == "ffn"]
        self.assertEqual([self.metric(self.scratch / f"m.{i}", "afd_ffn_stored_bytes") for i in range(4)], want)

    def test_json_is_one_object_with_the_sums_of_all_groups(self):
        batch = self.write_batch(ENTRIES)
        alone = self.json(self.generate(WIDE, "--batch", batch, "--json", *SAMPLE))
        out = self.json(self.launch("2A:1F", WIDE, "--batch", batch, "--json", *SAMPLE))
        self.assertEqual((out["ids"], out["rows"]), (alone["ids"], alone["rows"]))
        self.assertEqual([len(group["ids"]) for group in out["groups"]], [2, 3])
        peer, = out["peers"]
        self.assertEqual(peer["rows"], sum(group["peers"][0]["rows"] for group in out["groups"]))
        self.assertAlmostEqual(out["tokens_per_second"], sum(group["tokens_per_second"] for group in out["groups"]))
        self.assertEqual(set(out["seconds"]), {"attention", "ffn", "wait", "total"})

    def test_json_of_one_group_has_the_keys_of_afd_generate(self):
        out = self.json(self.launch("1A:1F", WIDE, "--ids", "1 2 3", "--json"))
        self.assertLessEqual(set(self.json(self.generate(WIDE, "--ids", "1 2 3", "--json"))), set(out))

    def test_groups_without_input_are_not_started_and_that_is_told(self):
        process = self.launch("3A:1F", WIDE, "--ids", "1 2 3")
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out), (0, self.result(self.generate(WIDE, "--ids", "1 2 3"))))
        self.assertEqual(err, "launch.sh: warn: input for 1 of 3 attention groups, the others are not started\n")

    def test_each_group_writes_the_logits_of_its_sequence(self):
        prompts = ([3, 1, 4], [1, 5])
        path = self.scratch / "group {}.npy"
        self.result(self.launch("2A:1F", WIDE, "--batch", self.write_batch([{"ids": ids} for ids in prompts]), "--logits", path))
        for i, ids in enumerate(prompts):
            alone = self.scratch / "alone.npy"
            self.result(self.generate(WIDE, "--ids", " ".join(map(str, ids)), "--logits", alone))
            self.assertEqual((self.scratch / f"group {i}.npy").read_bytes(), alone.read_bytes())

    def test_names_with_blanks_and_signs_are_taken_as_they_are(self):
        odd = self.scratch / "a model; $(false) 'of' \"mine\" *"
        shutil.copytree(WIDE, odd)
        batch = odd / "batch &.json"
        batch.write_text(json.dumps(ENTRIES))
        want = self.result(self.generate(WIDE, "--batch", batch, *SAMPLE))
        self.assertEqual(self.result(self.launch("2A:1F", odd, f"--batch={batch}", *SAMPLE)), want)


class Refusals(Case):
    def refuse(self, layout, *args, words=(), status=2, model=WIDE):
        with self.subTest(f"{layout} {args}"):
            process = self.launch(layout, model, *args)
            out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out, err.count("\n")), (status, "", 1), err)
            for word in words:
                self.assertIn(str(word), err)

    def test_a_layout_of_another_form_is_refused(self):
        for layout in ("2A", "2A:", ":1F", "0A:1F", "2A:0F", "01A:1F", "2a:1f", "2A:1F:", "2A(ep2):1F", "1A:1F(tp0)", "1A:2F(tp2",
                       "1A:2F(xp2)", "1A:4F(tp2;ep2)", "1A:1000F", "1A 1F", "1A:1F\n", "$(id)A:1F"):
            self.refuse(layout, "--ids", "1", words=["launch.sh", layout.strip(), "2A(tp2):2F(ep2)"])

    def test_a_layout_whose_groups_do_not_come_out_even_is_refused(self):
        self.refuse("3A(tp2):1F", "--ids", "1", words=["3A(tp2):1F", "tp2"])
        self.refuse("1A:3F(ep2)", "--ids", "1", words=["1A:3F(ep2)", "2 shards"])
        self.refuse("1A:6F(tp2,ep2)", "--ids", "1", words=["6 FFN", "4 shards"])
        self.refuse("1A:4F(tp2,tp2)", "--ids", "1", words=["tp stands twice"])

    def test_wrong_flags_are_refused_before_anything_starts(self):
        for args, words in ((["--bogus"], ["--bogus"]), (["--batch", "x"], ["--ids", "--batch", "both"]),
                            (["--lanes", "9"], ["--lanes", "9"]), (["--lanes"], ["--lanes", "missing"]),
                            (["--json=yes"], ["--json"]), (["--ffn", "shm:x"], ["--ffn", "layout"]), (["more"], ["more"]),
                            (["--attention-tp", "0/2"], ["--attention-tp", "layout"]), (["--max-peers", "0"], ["--max-peers", "0"]),
                            (["--via", "rdma"], ["--via", "rdma", "shm, tcp"]), (["--via", ""], ["--via", "shm, tcp"]),
                            (["--tools", "/"], ["--tools /"])):
            self.refuse("1A:1F", "--ids", "1", *args, words=words)
        self.refuse("1A:1F", words=["--ids", "--batch"])

    def test_a_missing_model_and_a_missing_layout_are_named(self):
        done = subprocess.run([LAUNCH, "1A:1F", "--tools", tool(""), "--ids", "1"], text=True, capture_output=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (2, "", "launch.sh: --model: required\n"))
        done = subprocess.run([LAUNCH], text=True, capture_output=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (2, "", "launch.sh: the layout is missing, see --help\n"))

    def test_one_file_for_several_processes_is_refused(self):
        batch = self.write_batch(ENTRIES[:2])
        self.refuse("2A:1F", "--batch", batch, "--logits", "x.npy", words=["--logits x.npy", "{}"])
        self.refuse("2A:1F", "--batch", batch, "--trace", "x.json", words=["--trace x.json", "{}"])
        self.refuse("1A:2F(tp2)", "--ids", "1", "--metrics", "x", words=["--metrics x", "{}"])
        batch = self.write_batch(ENTRIES[:3])
        self.refuse("2A:1F", "--batch", batch, "--logits", "{}.npy", words=["--logits", "2 sequences", "group 1"])

    def test_an_unreadable_batch_gives_the_error_of_the_tool(self):
        for text in ("[", "{}", "[]", '[{"ids": 3}]', '[{"ids": [1], "ids": [2]}, {"ids": [3]}]', '[{"ids": [1], "seed": NaN}]',
                     "[" * 9999):
            path = self.scratch / "bad.json"
            path.write_text(text)
            process = self.launch("2A:1F", WIDE, "--batch", path, "--log", "error")
            out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out), (1, ""))
            self.assertIn("afd-generate: ", err)

    def test_a_model_that_cannot_be_opened_gives_the_error_of_the_tool(self):
        self.refuse("1A:1F", "--ids", "1", model=self.scratch / "none", status=1, words=["afd-serve-ffn", "none"])

    def test_tools_that_cannot_be_run_are_named(self):
        for name in ("afd-generate", "afd-serve-ffn"):
            (self.scratch / name).write_text("#!/bin/sh\necho no >&2\nexit 127\n")
            (self.scratch / name).chmod(0o755)
        command = [LAUNCH, "1A:1F", "--tools", self.scratch, "--model", WIDE, "--ids", "1"]
        done = subprocess.run(command, text=True, capture_output=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(done.stderr, f"no\nlaunch.sh: {self.scratch}/afd-generate: cannot be run\n")

    def test_more_shards_than_there_are_experts_give_the_error_of_the_tool(self):
        process = self.launch("1A:9F(ep9)", MOE, "--ids", "1", "--gate", "ffn")
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out), (2, ""))
        self.assertRegex(err, r"^afd-serve-ffn: .*9")


class Ends(Case):
    """However it ends: no process, no segment, no scratch file, no half-written file."""

    def begin(self, layout="2A:2F(tp2)"):
        """A layout that would run for long, in the middle of it; and the processes that it has."""
        self.segments = segments()
        batch = self.write_batch([{"ids": [17, 4, 2]}, {"ids": [5]}])
        self.place = self.scratch / str(len(self.processes))
        (self.place / "tmp").mkdir(parents=True)
        launch = self.launch(layout, MODEL, "--batch", batch, "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error",
                             "--logits", self.place / "{}.npy", "--metrics", self.place / "m.{}", TMPDIR=str(self.place / "tmp"))
        metrics = self.place / "m.1"
        self.until("rows cross", lambda: metrics.exists() and self.metric(metrics, "afd_ffn_rows_total") > 100
                   and self.metric(metrics, "afd_ffn_peers") == int(layout[0]))
        return launch, children(launch.pid)

    def expect_nothing_left(self, pids):
        self.until("all processes have ended", lambda: not any(map(is_running, pids)), 8)
        self.assertEqual(segments(), self.segments)
        self.assertEqual(list((self.place / "tmp").iterdir()), [])

    def expect_no_logits(self):
        self.assertEqual([path.name for path in self.place.iterdir() if ".npy" in path.name], [])

    def test_an_interrupted_layout_leaves_nothing_behind(self):
        for sent, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(sent.name):
                launch, pids = self.begin()
                self.assertEqual(len(pids), 4, pids)
                launch.send_signal(sent)
                out, _ = launch.communicate(timeout=10)
                self.assertEqual((launch.returncode, out), (status, ""))
                self.expect_nothing_left(pids)
                self.expect_no_logits()

    def test_control_c_at_a_terminal_leaves_nothing_behind(self):
        launch, pids = self.begin()
        os.killpg(launch.pid, signal.SIGINT)
        launch.communicate(timeout=10)
        self.assertNotEqual(launch.returncode, 0)
        self.expect_nothing_left(pids)
        self.expect_no_logits()

    def test_an_interrupt_while_the_servers_load_leaves_nothing_behind(self):
        for delay_s in (0.02, 0.05, 0.1, 0.15, 0.2):
            temporary = self.scratch / f"tmp{delay_s}"
            temporary.mkdir()
            launch = self.launch("1A:4F(tp2,ep2)", MOE, "--ids", "1 2", "--gate", "ffn", "--max-tokens", 60000,
                                 TMPDIR=str(temporary))
            time.sleep(delay_s)
            pids = children(launch.pid)
            launch.terminate()
            launch.communicate(timeout=10)
            self.assertNotEqual(launch.returncode, 0)
            self.until("all processes have ended", lambda pids=pids: not any(map(is_running, pids)), 8)
            self.assertEqual(list(temporary.iterdir()), [])

    def test_a_killed_script_takes_its_processes_with_it(self):
        if not shutil.which("setpriv"):
            self.skipTest("setpriv is not installed")
        launch, pids = self.begin()
        launch.kill()
        launch.wait(timeout=10)
        self.until("all processes have ended", lambda: not any(map(is_running, pids)), 8)
        self.assertEqual(segments(), self.segments)

    def test_a_killed_process_of_either_kind_ends_the_layout_with_an_error(self):
        for layout, kind in (("2A:2F(tp2)", "afd-serve-ffn"), ("2A:2F(tp2)", "afd-generate"), ("4A(tp2):2F(tp2)", "afd-generate")):
            with self.subTest(f"{layout} {kind}"):
                launch, pids = self.begin(layout)
                os.kill(next(pid for pid, words in pids.items() if words[0].endswith(kind)), signal.SIGKILL)
                out, err = launch.communicate(timeout=10)
                self.assertEqual((launch.returncode, out), (1, ""))
                self.assertRegex(err, "killed by signal 9|link shm:launch|attention group")
                self.assertNotIn("launch.sh: line", err)
                self.expect_nothing_left(pids)  # but for the unfinished file of a generator that was killed

    def test_a_server_that_is_ended_from_outside_is_an_error(self):
        launch, pids = self.begin()
        os.kill(next(pid for pid, words in pids.items() if words[0].endswith("afd-serve-ffn")), signal.SIGTERM)
        out, err = launch.communicate(timeout=10)
        self.assertEqual((launch.returncode, out), (1, ""))
        self.assertTrue(err)
        self.expect_nothing_left(pids)
