# SPDX-License-Identifier: Apache-2.0
"""afd-plan: its keys, its refusals, closed form against simulation, pictures, and a calibration of this machine."""
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import unittest

import plan_workloads
from sentences import BUILD, ROOT
from tools import MODEL, Case, run

PAPER = "--alpha-a 0.00165 --beta-a 50 --alpha-f 0.083 --beta-f 100 --alpha-c 0.022 --beta-c 20 --batch 256".split()
THETA = ["--theta", "600", "--nu2", "250500"]
LAWS = ["--prompt", "constant:100", "--output", "geometric:501"]
ROOFLINE = ["--model", "DeepSeek-V3", "--device", "H800", "--ffn-nodes", "4", "--accept", "1.7", "--overhead-ms", "15"]
REPORT = ["--model", "Qwen3-32B", "--device", "H20-3e", "--attention", "3", "--ffn", "1", "--context", "8192"]
QUICK = ["--r-max", "3", "--seeds", "2", "--requests", "50"]


def python_with_matplotlib():
    """A python3 that has matplotlib, or a reason to skip."""
    for python in (sys.executable, "/usr/bin/python3", shutil.which("python3")):
        if python and subprocess.run([python, "-c", "import matplotlib"], capture_output=True).returncode == 0:
            return python
    raise unittest.SkipTest("matplotlib is not installed")


class Plan(Case):
    def plan(self, *args, **options):
        done = run("afd-plan", *args, "--json", timeout=300, **options)
        self.assertEqual((done.returncode, done.stderr, done.stdout.count("\n")), (0, "", 1), done.stderr)
        return json.loads(done.stdout)

    def refuse(self, status, words, *args):
        with self.subTest(" ".join(map(str, args))):
            done = run("afd-plan", *args)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (status, "", 1), done.stderr)
            for word in words:
                self.assertIn(word, done.stderr)

    # -- what the commands say --

    def test_size_gives_the_papers_ratio_and_its_curve(self):
        result = self.plan("size", *PAPER, *THETA, "--r-max", 16)
        self.assertLessEqual({"theta", "nu2", "r", "r_continuous", "regime", "curve"}, set(result))
        self.assertEqual((result["r"], result["regime"], result["constraint"]), (9, "attention", "none"))
        self.assertAlmostEqual(result["r_continuous"], 9.574548, places=6)
        self.assertEqual([row["r"] for row in result["curve"]], list(range(1, 17)))
        self.assertLessEqual({"tau_mean_field", "tau_gaussian", "throughput_mean_field", "throughput_gaussian", "idle_a", "idle_f"},
                             set(result["curve"][0]))
        self.assertAlmostEqual(result["curve"][8]["throughput_mean_field"], .75929, places=5)

    def test_a_pareto_index_of_one_is_refused_with_a_limit_above_it(self):
        done = run("afd-plan", "size", *"--alpha-a 1 --beta-a 1 --alpha-f 1 --beta-f 1 --batch 4".split(), "--prompt", "pareto:1:1",
                   "--output", "geometric:10")
        self.assertEqual((done.returncode, done.stderr), (1, "afd-plan: plan: prompt shape is 1, limit 1.00001 .. 1000\n"))

    def test_laws_and_a_trace_of_them_give_the_same_theta(self):
        laws = self.plan("size", *PAPER, "--prompt", "constant:30", "--output", "constant:12")
        trace = self.scratch / "trace.csv"
        trace.write_text("prompt_tokens,output_tokens\n" + "30,12\n" * 5)
        self.assertEqual(self.plan("size", *PAPER, "--trace", trace)["theta"], laws["theta"])
        trace.write_text("".join('{"ContextTokens": 30, "GeneratedTokens": 12}\n' for _ in range(5)))
        self.assertEqual(self.plan("size", *PAPER, "--trace", trace)["theta"], laws["theta"])

    def test_simulate_is_the_same_for_a_seed_and_keeps_to_the_bracket(self):
        first, again = (self.plan("simulate", *PAPER, *LAWS, *QUICK, "--lanes", 3) for _ in range(2))
        self.assertEqual(first["curve"], again["curve"])
        self.assertLessEqual({"r", "throughput", "ci95", "tpot_p50", "tpot_p99", "idle_a", "idle_f"}, set(first["curve"][0]))
        self.assertGreater(first["slot_updates_per_second"], 0)
        other = self.plan("simulate", *PAPER, *LAWS, *QUICK, "--lanes", 3, "--seed", 9)
        self.assertNotEqual(first["curve"], other["curve"])

    def test_simulate_tells_its_own_rate(self):
        started = time.monotonic()
        result = self.plan("simulate", *PAPER, "--prompt", "constant:100", "--output", "geometric:20", "--r-min", 8, "--r-max", 10)
        # Its time is a part of the whole run's, start and end included.
        self.assertGreater(result["slot_updates_per_second"], result["slot_updates"] / (time.monotonic() - started))

    def test_roofline_gives_the_papers_anchors_and_a_sweep(self):
        result = self.plan("roofline", *ROOFLINE)
        self.assertLessEqual({"feasible", "rank_batch", "experts_per_rank", "intensity", "ofu", "temporal_sparsity", "hfu", "region",
                              "breakpoints", "dead_zone_from"}, set(result))
        self.assertEqual((result["breakpoints"], result["dead_zone_from"], result["region"]), ([2.5, 8, 32], 2.5, "stable_intensity"))
        self.assertAlmostEqual(result["hfu"], .207, places=3)
        self.assertEqual(len(result["sweep"]), 64)
        by_numbers = self.plan("roofline", "--hidden", 7168, "--moe-intermediate", 2048, "--experts", 256, "--top-k", 8, "--layers", 61,
                               "--flops", 1979e12, "--hbm", 3.35e12, "--scale-up", 160e9, "--scale-out", 50e9, *ROOFLINE[4:])
        self.assertEqual(by_numbers["hfu"], result["hfu"])
        self.assertIsNone(self.plan("roofline", "--model", "DeepSeek-V3", "--device", "GB200", "--ffn-nodes", 4)["dead_zone_from"])

    def test_imbalance_alone_needs_neither_model_nor_device(self):
        result = self.plan("roofline", "--imbalance", 0.8, "--attention-nodes", 6, "--ffn-nodes", 2)
        self.assertAlmostEqual(result["imbalance"]["ep"], .941, places=3)
        self.assertAlmostEqual(result["imbalance"]["afd"], .914, places=3)

    def test_report_says_when_not_to_split_and_what_would_have_to_change(self):
        result = self.plan("report", *REPORT)
        self.assertLessEqual({"tokens_per_second", "tokens_per_second_per_device", "speedup_per_device", "tpot_ms", "bottleneck", "idle_a",
                              "idle_f", "bracket", "stages", "constraints", "verdict"}, set(result))
        self.assertEqual(result["verdict"], "do not use")
        self.assertLess(result["speedup_per_device"], 1)
        self.assertGreaterEqual(len(result["what_would_have_to_change"]), 3)
        text = run("afd-plan", "report", *REPORT).stdout
        self.assertTrue(text.startswith("do not use AFD here"))

    def test_a_checkpoint_is_a_model_by_its_config_alone(self):
        (self.scratch / "config.json").write_text((MODEL / "config.json").read_text())
        args = ["--device", "H200", "--attention", 1, "--ffn", 1, "--context", 100]
        bare = self.plan("report", "--model", self.scratch, *args)
        self.assertEqual(bare, self.plan("report", "--model", MODEL, *args))
        self.assertEqual(bare["model"], "Qwen3ForCausalLM")

    def test_the_published_tables_stand_beside_the_corrected_figures(self):
        published = self.plan("report", "--as-published")["published"]
        self.assertLessEqual({"name", "printed", "reproduced", "corrected", "reason"}, set(published[0]))
        printed = [(row["printed"], round(row["reproduced"], 2)) for row in published if row["printed"] is not None]
        self.assertEqual(printed, [(8.01, 8.01), (8.01, 8.01), (16.0, 16.0), (31.96, 31.96)])
        self.assertTrue(all(row["corrected"] < 1 for row in published if row["unit"] == "x"))

    def test_measured_times_replace_the_data_sheet(self):
        times = self.scratch / "times.csv"
        times.write_text("stage,device,dtype,rows,context,us\nffn,H20-3e,fp8,1,0,100\nffn,H20-3e,fp8,256,0,100\n")
        stages = {row["stage"]: row for row in self.plan("report", *REPORT, "--times", times)["stages"]}
        self.assertEqual((stages["ffn"]["from"], stages["attention"]["from"]), ("measured", "data sheet"))
        self.assertAlmostEqual(stages["ffn"]["ms"], 6.4)

    # -- closed form against simulation --

    def test_closed_form_and_simulation_agree_or_the_case_is_flagged(self):
        n_agree = 0
        for name, flags in plan_workloads.workloads(self.scratch).items():
            case = plan_workloads.compare(flags, requests=1500)
            with self.subTest(name):
                self.assertTrue(plan_workloads.agrees(case) or case["flags"], case)
            n_agree += plan_workloads.agrees(case)
        self.assertGreaterEqual(n_agree, 13)

    # -- output --

    def test_csv_has_the_rows_of_the_json(self):
        for command, args, name in (("size", [*PAPER, *THETA], "curve"), ("roofline", ROOFLINE, "sweep"),
                                    ("report", ["--as-published"], "published"), ("simulate", [*PAPER, *LAWS, *QUICK], "curve")):
            with self.subTest(command):
                rows = self.plan(command, *args)[name]
                done = run("afd-plan", command, *args, "--csv")
                read = list(csv.DictReader(io.StringIO(done.stdout)))
                self.assertEqual((done.returncode, done.stderr, len(read)), (0, "", len(rows)))
                self.assertEqual(list(read[0]), list(rows[0]))

    def test_a_table_is_the_plain_output(self):
        done = run("afd-plan", "size", *PAPER, *THETA, "--r-max", 12)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"(?m)^r +9$")
        self.assertEqual(done.stdout.strip().split("\n")[-13].split()[0], "r")

    def test_pictures_are_drawn(self):
        python = python_with_matplotlib()
        (self.scratch / "bin").mkdir()
        shim = self.scratch / "bin/python3"
        shim.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        shim.chmod(0o755)
        path = f"{self.scratch / 'bin'}:{os.environ['PATH']}"
        cases = (("size", [*PAPER, *THETA], ".svg"), ("simulate", [*PAPER, *LAWS, *QUICK], ".png"), ("roofline", ROOFLINE, ".svg"),
                 ("simulate", [*PAPER, *LAWS, *QUICK, "--timeline", 60], ".svg"), ("report", REPORT, ".png"), ("report", ["--as-published"], ".png"))
        for command, args, suffix in cases:
            picture = self.scratch / f"picture{suffix}"
            with self.subTest(command + suffix):
                done = run("afd-plan", command, *args, "--json", "--plot", picture, PATH=path)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                json.loads(done.stdout)
                self.assertTrue(picture.read_bytes().startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[suffix]))
                picture.unlink()

    # -- refusals --

    def test_bad_input_is_named(self):
        trace = self.scratch / "trace.csv"
        trace.write_text("prompt_tokens,output_tokens\n1,x\n")
        calibration = self.scratch / "calibration.json"
        calibration.write_text('{"alpha_a": -1}')
        self.refuse(2, ["command is missing"])
        self.refuse(2, ["nonsense"], "nonsense")
        self.refuse(2, ["--alpha-a", "nan"], "size", "--alpha-a", "nan")
        self.refuse(2, ["--beta-f", "-1"], "size", "--beta-f", "-1")
        self.refuse(2, ["--alpha-f is missing"], "size", "--alpha-a", 1, "--beta-a", 1)
        self.refuse(2, ["--batch is missing"], "size", *PAPER[:-2], *THETA)
        self.refuse(2, ["--theta", "--trace", "must be one"], "size", *PAPER)
        self.refuse(2, ["several", "must be one"], "size", *PAPER, *THETA, *LAWS)
        self.refuse(2, ["--output is missing"], "size", *PAPER, "--prompt", "constant:1")
        self.refuse(2, ["--prompt", "normal:5"], "size", *PAPER, "--prompt", "normal:5", "--output", "constant:2")
        self.refuse(1, ["output mean"], "size", *PAPER, "--prompt", "constant:1", "--output", "geometric:0.5")
        self.refuse(2, ["--r-min", "9"], "size", *PAPER, *THETA, "--r-min", 9, "--r-max", 8)
        self.refuse(2, ["--comm-scope", "both"], "size", *PAPER, *THETA, "--comm-scope", "both")
        self.refuse(2, ["--csv"], "size", *PAPER, *THETA, "--csv", "--json")
        self.refuse(2, ["--plot", ".svg or"], "size", *PAPER, *THETA, "--plot", "x.pdf")
        self.refuse(1, ["line 2", "'x'"], "size", *PAPER, "--trace", trace)
        self.refuse(1, ["no-such-file"], "size", *PAPER, "--trace", self.scratch / "no-such-file")
        self.refuse(1, ["alpha_a"], "size", "--calibration", calibration, "--batch", 8, *THETA)
        self.refuse(2, ["--theta", "simulation"], "simulate", *PAPER, *THETA)
        self.refuse(2, ["--start", "warm"], "simulate", *PAPER, *LAWS, "--start", "warm")
        self.refuse(1, ["slot updates"], "simulate", *PAPER, *LAWS, "--requests", 10**9, "--seeds", 4096)
        self.refuse(1, ["H900", "H800"], "roofline", "--model", "DeepSeek-V3", "--device", "H900", "--ffn-nodes", 1)
        self.refuse(1, ["GPT-9", "Kimi-K2"], "roofline", "--model", "GPT-9", "--device", "H800", "--ffn-nodes", 1)
        self.refuse(2, ["--device (or --flops) is missing"], "roofline", "--model", "DeepSeek-V3", "--ffn-nodes", 1)
        self.refuse(2, ["--ffn-nodes is missing"], "roofline", "--model", "DeepSeek-V3", "--device", "H800")
        self.refuse(2, ["--attention-nodes is missing"], "roofline", "--imbalance", 0.5, "--ffn-nodes", 1)
        self.refuse(2, ["--model is missing"], "report")
        self.refuse(2, ["--context is missing"], "report", *REPORT[:-2])
        self.refuse(2, ["--model is missing"], "calibrate")
        self.refuse(2, ["--metrics", "limit 3"], "calibrate", "--metrics", trace)
        self.refuse(1, ["afd_ffn_rows_total"], "calibrate", "--metrics", trace, "--metrics", trace, "--metrics", trace)

    def test_the_converter_names_the_package_that_it_needs(self):
        done = subprocess.run([sys.executable, "-S", ROOT / "examples/plan/aiconfigurator_times.py", "--system", "h200_sxm", "--config",
                               MODEL / "config.json"], text=True, capture_output=True)  # -S: without installed packages
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("pip install aiconfigurator-core", done.stderr)

    # -- calibration --

    def test_a_calibration_of_this_machine_is_read_by_the_other_commands(self):
        path = self.scratch / "calibration.json"
        result = self.plan("calibrate", "--model", MODEL, "--seconds", 3, "--out", path)
        self.assertLessEqual({"alpha_a", "beta_a", "alpha_f", "beta_f", "alpha_c", "beta_c", "r2", "residuals", "machine", "times"},
                             set(result))
        self.assertEqual(set(result["r2"]), {"attention", "ffn", "exchange"})
        self.assertEqual(json.loads(path.read_text())["alpha_f"], result["alpha_f"])
        size = self.plan("size", "--calibration", path, "--lanes", 1, "--theta", 100)
        self.assertEqual(size["batch"], 8)
        self.assertGreater(size["curve"][0]["t_f"], 0)
        self.assertEqual(self.plan("size", "--calibration", path, "--lanes", 1, "--theta", 100, "--alpha-f", 0,
                                   "--beta-f", 7)["curve"][0]["t_f"], 7)
        stages = self.plan("report", "--model", MODEL, "--device", "H200", "--attention", 1, "--ffn", 1, "--context", 100,
                           "--times", path)["stages"]
        self.assertIn("data sheet", {row["from"] for row in stages})  # it is not this machine

    def test_metrics_of_a_deployment_give_the_coefficients_that_made_them(self):
        """alpha 3 us a row and beta 40 us a pass; snapshots of passes with 4, 16 and 9 rows."""
        paths, rows, passes, seconds = [], 0, 0, 0.0
        for n_passes, n_rows in ((0, 0), (100, 4), (50, 16), (80, 9)):
            passes += n_passes
            rows += n_passes * n_rows
            seconds += n_passes * (40e-6 + 3e-6 * n_rows)
            paths += ["--metrics", self.scratch / f"{len(paths)}.prom"]
            paths[-1].write_text(f"# TYPE x counter\nafd_ffn_passes_total {passes}\nafd_ffn_rows_total{{a=\"b\"}} {rows}\n"
                                 f"afd_ffn_compute_seconds_sum {seconds!r}\nafd_ffn_compute_seconds_count {passes}\n")
        result = self.plan("calibrate", *paths)
        self.assertAlmostEqual(result["alpha_f"], 3, places=6)
        self.assertAlmostEqual(result["beta_f"], 40, places=5)
        self.assertNotIn("alpha_a", result)

    def test_the_installed_tool_finds_its_script(self):
        destdir = self.scratch / "destdir"
        subprocess.run(["meson", "install", "-C", BUILD, "--no-rebuild", "--quiet", "--destdir", destdir], check=True, capture_output=True)
        tool = next(destdir.rglob("bin/afd-plan"))
        script = tool.parent / "../share/afd/afd_plan_plot.py"
        self.assertEqual(script.read_text(), (ROOT / "examples/plan/afd_plan_plot.py").read_text())
