# SPDX-License-Identifier: Apache-2.0
"""afd-generate --trace: a track per FFN peer and lane whose spans never overlap, and where the time of each part went."""
import collections
import json
import resource
import subprocess

from tools import ENV, MODEL, Case, address, cpu_seconds, tcp_address, tool

LEGS = ["wire out", "queue", "gather", "compute", "wire back", "unread"]
ESTIMATED = {"wire out", "wire back", "unread"}
LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]


def ns(microseconds):
    return round(microseconds * 1000)


class Trace(Case):
    def traced(self, *args):
        path = self.scratch / "trace.json"
        self.result(self.generate(MODEL, *args, "--log", "error", "--trace", path))
        return json.loads(path.read_text())

    def names(self, events):
        return {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}

    def parts(self, events):
        """Spans of each part in the order of time, by (process, lane, layer, step, part)."""
        parts = collections.defaultdict(list)
        for event in events:
            if event["ph"] == "X" and "part" in event["args"]:
                args = event["args"]
                parts[event["pid"], args["lane"], args["layer"], args["step"], args["part"]].append(event)
        return parts

    def expect_tracks(self, events):
        tracks = collections.defaultdict(list)
        for event in events:
            if event["ph"] == "X":
                tracks[event["pid"], event["tid"]].append((ns(event["ts"]), ns(event["dur"]), event["name"]))
        named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
        self.assertLessEqual(set(tracks), named)
        for track, spans in tracks.items():
            self.assertEqual(spans, sorted(spans, key=lambda span: span[0]), track)
            for before, after in zip(spans, spans[1:]):
                self.assertLessEqual(before[0] + before[1], after[0], (track, before, after))
        return tracks

    def expect_chain(self, spans):
        names = [event["name"] for event in spans]
        self.assertEqual(names, [leg for leg in LEGS if leg in names])
        self.assertLessEqual({"wire out", "compute", "wire back"}, set(names))
        for before, after in zip(spans, spans[1:]):
            self.assertEqual(ns(before["ts"]) + ns(before["dur"]), ns(after["ts"]))
        for event in spans:
            self.assertTrue(event["args"].get("estimated") or event["name"] not in ESTIMATED)

    def expect_flows(self, events, n_parts):
        flows = collections.defaultdict(list)
        for event in events:
            if event["ph"] in "stf":
                flows[event["id"]].append((ns(event["ts"]), event["ph"], event["pid"]))
        self.assertEqual(len(flows), n_parts)
        for points in flows.values():
            self.assertEqual([phase for _, phase, _ in sorted(points, key=lambda point: "stf".index(point[1]))], ["s", "t", "f"])
            times = {phase: time for time, phase, _ in points}
            self.assertTrue(times["s"] <= times["t"] <= times["f"])

    def test_a_trace_that_does_not_fit_is_an_error_and_leaves_nothing(self):
        path = self.scratch / "trace.json"
        done = subprocess.run([tool("afd-generate"), "--model", MODEL, "--ids", "1 2 3", "--trace", path], capture_output=True,
                              text=True, env=ENV, timeout=60, restore_signals=False,  # so SIGXFSZ stays ignored
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn(f"--trace {path}: ", done.stderr)
        self.assertEqual(list(self.scratch.iterdir()), [])

    def test_every_peer_lane_and_layer_has_its_spans_one_behind_the_other(self):
        listens = [address(), tcp_address()]
        for i, listen in enumerate(listens):
            self.serve(MODEL, "--ffn-tp", f"{i}/2", listen=listen)
        batch = self.write_batch([{"ids": [i + 1, i + 2, 7], "max_tokens": 5} for i in range(6)])
        events = self.traced("--batch", batch, "--lanes", 2, "--ffn", listens[0], "--ffn", listens[1])
        self.assertEqual(sorted(self.names(events).values()), sorted(["attention", *(f"FFN {listen}" for listen in listens)]))
        self.expect_tracks(events)
        parts = self.parts(events)
        self.assertEqual(len(parts), 2 * 2 * LAYERS * 5)
        for spans in parts.values():
            self.expect_chain(spans)
        self.expect_flows(events, len(parts))

    def test_parts_lie_within_the_time_that_their_lane_is_at_the_ffn(self):
        _, listen = self.serve(MODEL)
        events = self.traced("--ids", "1 2 3", "--max-tokens", 6, "--ffn", listen)
        away = {(event["args"]["step"], event["args"]["layer"]): event for event in events if event["name"] == "ffn"}
        parts = self.parts(events)
        self.assertEqual(len(parts), LAYERS * 6)
        for (_, _, layer, step, _), spans in parts.items():
            ffn = away[step, layer]
            self.assertGreaterEqual(ns(spans[0]["ts"]), ns(ffn["ts"]))
            self.assertLessEqual(ns(spans[-1]["ts"]) + ns(spans[-1]["dur"]), ns(ffn["ts"]) + ns(ffn["dur"]))

    def test_parts_that_are_out_together_have_tracks_of_their_own(self):
        _, listen = self.serve(MODEL)
        prompt = " ".join(str(i % 200 + 1) for i in range(120))
        events = self.traced("--ids", prompt, "--max-tokens", 2, "--ffn", listen, "--max-rows", 7)
        tracks = self.expect_tracks(events)
        self.assertLessEqual({0, 1}, {tid for pid, tid in tracks if pid != 1})
        self.assertEqual({spans[0]["args"]["parts"] for spans in self.parts(events).values()}, {1, (120 - 1) // 7 + 1})

    def test_each_step_has_a_trace_id_of_its_own_in_all_its_spans(self):
        server, listen = self.serve(MODEL, "--log", "debug")
        events = [event for event in self.traced("--ids", "1 2 3", "--max-tokens", 4, "--ffn", listen) if event["ph"] == "X"]
        ids = collections.defaultdict(set)
        for event in events:
            ids[event["args"]["step"]].add(event["args"]["trace_id"])
        self.assertEqual([len(seen) for seen in ids.values()], [1] * 4)
        self.assertEqual(len(set.union(*ids.values())), 4)
        self.assertEqual(sum(event["name"] == "step" for event in events), 4)
        server.terminate()
        _, log = server.communicate(timeout=10)
        for step, (trace_id,) in ids.items():
            self.assertIn(f"step {step}, trace id {trace_id}", log)

    def test_a_replica_that_takes_over_has_tracks_beside_those_of_the_lost_one(self):
        listens = [address(), address()]
        servers = [self.serve(MODEL, listen=listen)[0] for listen in listens]
        idle = [cpu_seconds(server) for server in servers]
        path = self.scratch / "trace.json"
        running = self.generate(MODEL, "--ids", "17 4 2", "--max-tokens", 4000, "--log", "error", "--trace", path,
                                "--ffn", listens[0], "--ffn", listens[1])
        victim = self.wait_served(servers, idle, running)
        servers[victim].kill()
        self.result(running)
        events = json.loads(path.read_text())
        self.expect_tracks(events)
        names = self.names(events)
        last = {}
        for event in events:
            if event["ph"] == "X" and event["name"] in LEGS:
                last[names[event["pid"]]] = event["args"]["step"]
        self.assertLess(last[f"FFN {listens[victim]}"], 4000)
        self.assertEqual(last[f"FFN {listens[1 - victim]}"], 4000)
