# SPDX-License-Identifier: Apache-2.0
"""The tools over verbs:, inside the virtual machine with the ports of tests/verbs/ports.sh: layouts, kills, faults of the line.

The processor is emulated, and floating point is a hundred times slower than elsewhere: models are small and times generous.
"""
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
import test_failover  # noqa: E402
from tools import BOTH_F32, BUILD, ENV, GOLDEN, Case, tcp_address, tool  # noqa: E402

ALL = os.environ.get("AFD_ALL") == "1"
MODEL, MOE = GOLDEN / "bf16-tied", GOLDEN / "moe-bf16"
LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
PROMPT = "17 4 2 99 3 8 1 50 31"
PATIENT = ["--connect-timeout-ms", 60000, "--deadline-ms", 30000]


def verbs_address(query=""):
    return tcp_address().replace("tcp:", "verbs:") + query


def across(query=""):
    """Both ends of a link between the two ports: where to listen, what to connect to."""
    at = tcp_address().replace("tcp:127.0.0.1", "verbs:10.0.0.1")
    return f"{at}?dev=rxe1{query}", f"{at}?dev=rxe2{query}"


def where_it_stands(pid):
    """Each thread of a process that does not end: its state, and where it is in the kernel."""
    return [(re.search(r"State:\s+(.*)", (task / "status").read_text())[1], (task / "wchan").read_text(), (task / "stack").read_text())
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir()]


def shell(command):
    return subprocess.run(["sh", "-c", command], check=True, text=True, capture_output=True).stdout


def resources():
    """What the kernel holds for RDMA: queue pairs but those of the ports themselves, completion queues, regions."""
    return {what: len([line for line in shell(f"rdma resource show {what}").splitlines() if "pid" in line])
            for what in ("qp", "cq", "mr", "pd")}


class Layouts(Case):
    def logits(self, process, paths):
        self.result(process, 300)
        return [pathlib.Path(path).read_bytes() for path in paths]

    def alone(self, model, prompts, n_tokens):
        paths = [self.scratch / f"alone{i}.npy" for i in range(len(prompts))]
        for prompt, path in zip(prompts, paths):
            self.result(self.generate(model, "--ids", prompt, "--max-tokens", n_tokens, "--logits", path, *BOTH_F32), 300)
        return [path.read_bytes() for path in paths]

    def compare(self, model, layout, n_groups, lanes, *flags, via="verbs", **env):
        prompts = [" ".join(str(int(word) % 60 + i) for word in PROMPT.split()) for i in range(n_groups)]
        want = self.alone(model, prompts, 4)
        batch = self.write_batch([{"ids": [int(word) for word in prompt.split()]} for prompt in prompts])
        path = f"{self.scratch}/{{}}.npy"
        running = self.launch(layout, model, "--via", via, "--batch", batch, "--max-tokens", 4, "--logits", path, "--lanes", lanes,
                              *BOTH_F32, *PATIENT, *flags, **env)
        self.assertEqual(self.logits(running, [path.replace("{}", str(i)) for i in range(n_groups)]), want)

    def test_one_attention_and_one_ffn_process_give_the_logits_of_one_process_in_any_number_of_lanes(self):
        for lanes in (1, 2, 3, 4):
            with self.subTest(lanes):
                self.compare(MODEL, "1A:1F", 1, lanes)

    def test_waits_that_only_poll_or_only_sleep_change_no_bit(self):
        for spin in ("ever", "never"):
            for layout, n_groups, lanes in (("1A:1F", 1, 1), ("1A:1F", 1, 4), ("3A:1F", 3, 2)):
                with self.subTest(spin, layout=layout, lanes=lanes):
                    self.compare(MODEL, layout, n_groups, lanes, LD_PRELOAD=str(BUILD / "tests/verbs/polls.so"), AFD_TEST_SPIN=spin)

    def test_three_attention_processes_give_each_the_logits_of_one_process(self):
        self.compare(MODEL, "3A:1F", 3, 2)

    def test_three_expert_shards_give_the_same_logits_over_verbs_and_over_shm(self):
        """Shards add in another order than one process, so the same layout is the measure."""
        batch = self.write_batch([{"ids": [3, 1, 4, 1, 5]}, {"ids": [9, 2, 6]}])
        path, bits = f"{self.scratch}/{{}}.npy", {}
        for via in ("shm", "verbs"):
            for lanes in (1, 4) if via == "verbs" else (1,):
                running = self.launch("2A:3F(ep3)", MOE, "--via", via, "--batch", batch, "--max-tokens", 4, "--logits", path,
                                      "--lanes", lanes, *BOTH_F32, *PATIENT)
                bits[via, lanes] = self.logits(running, [path.replace("{}", str(i)) for i in range(2)])
        self.assertEqual(len({tuple(one) for one in bits.values()}), 1)

    def test_a_group_of_two_attention_ranks_gives_the_same_logits_over_verbs_and_over_shm(self):
        path, bits = self.scratch / "logits.npy", set()
        for via in ("shm", "verbs"):
            running = self.launch("2A(tp2):1F", MODEL, "--via", via, "--ids", PROMPT, "--max-tokens", 4, "--logits", path,
                                  *BOTH_F32, *PATIENT)
            bits.add(self.logits(running, [path])[0])
        self.assertEqual(len(bits), 1)

    def pair(self, listen, connect, *flags, n_tokens=4):
        server, _ = self.serve(MODEL, "--deadline-ms", 30000, listen=listen)
        path = self.scratch / "pair.npy"
        running = self.generate(MODEL, "--ids", PROMPT, "--max-tokens", n_tokens, "--logits", path, "--ffn", connect, *BOTH_F32,
                                *PATIENT, *flags)
        got = self.logits(running, [path])
        self.stop(server, 30)
        self.assertEqual(got, self.alone(MODEL, [PROMPT], n_tokens))

    def test_rows_cross_between_two_ports(self):
        before = shell("cat /sys/class/infiniband/rxe1/ports/1/hw_counters/sent_pkts")
        self.pair(*across())
        self.assertNotEqual(shell("cat /sys/class/infiniband/rxe1/ports/1/hw_counters/sent_pkts"), before)

    def test_two_devices_carry_one_link(self):
        listen, connect = across()
        self.pair(listen.replace("rxe1", "rxe1,rxe2"), connect.replace("rxe2", "rxe2,rxe1"), "--lanes", 4)

    def test_an_mtu_a_gid_and_a_service_level_are_taken(self):
        listen, connect = across("&mtu=1024&gid=1&sl=3&timeout=16")
        self.pair(listen, connect)

    def test_what_the_machine_does_not_have_is_refused_by_name(self):
        for query, word in (("?dev=mlx5_7", "no device mlx5_7"), ("?dev=rxe1&port=2", "port 2"), ("?dev=rxe1&gid=200", "no GID 200")):
            with self.subTest(query):
                listen = verbs_address()
                server, _ = self.serve(MODEL, listen=listen)
                running = self.generate(MODEL, "--ids", "1", "--ffn", listen + query, "--connect-timeout-ms", 3000)
                _, err = running.communicate(timeout=60)
                self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
                self.assertIn(word, err)
                self.stop(server, 30)


class DeviceMemory(Case):
    """Rows in memory of a device whose memory is the host's behind the seam of a GPU, `deferred`. Soft-RoCE takes its address as
    peer memory, and no dma-buf; tests/verbs/takes_dmabuf.c stands in for an adapter that does."""

    def run_pair(self, fault, dmabuf, model=MODEL, *flags, connect_flags=(), lanes=1, queries=("", "")):
        """The log of either side, after the logits were found to be those of one process on the CPU."""
        env = {"AFD_VERBS_FAULT": fault}
        if dmabuf:
            env |= {"LD_PRELOAD": str(BUILD / "tests/verbs/takes_dmabuf.so"), "AFD_TEST_DMABUF": dmabuf}
        at = across()[0].split("?")[0] if queries[0] else verbs_address()
        path, both = self.scratch / "pair.npy", self.scratch / "alone.npy"
        listen = at + queries[0]
        ids = ["--ids", " ".join(str(int(word) % 60) for word in PROMPT.split()), "--max-tokens", 3]
        self.result(self.generate(model, *ids, "--logits", both, *BOTH_F32, *flags), 300)
        serve = ["--model", model, "--listen", listen, "--threads", 1, "--device", "deferred", "--log", "info", "--deadline-ms", 30000]
        server = self.start("afd-serve-ffn", *serve, **env)
        self.assertEqual(server.stdout.readline(), f"ready {listen}\n")
        running = self.start("afd-generate", "--model", model, "--threads", 1, "--device", "deferred", *ids, "--logits", path,
                             "--ffn", at + queries[1], "--lanes", lanes, "--log", "info", *BOTH_F32, *PATIENT, *flags, *connect_flags, **env)
        _, log = running.communicate(timeout=300)
        self.assertEqual(running.returncode, 0, log)
        server.send_signal(signal.SIGTERM)
        _, there = server.communicate(timeout=30)
        self.assertEqual(server.returncode, 0, there)
        self.assertEqual(path.read_bytes(), both.read_bytes())
        return log, there

    def expect(self, fault, dmabuf, *lines):
        with self.subTest(fault=fault, dmabuf=dmabuf):
            before = resources()
            for log in self.run_pair(fault, dmabuf):
                said = [line for line in log.splitlines() if "memory of device" in line or "host's memory" in line]
                self.assertEqual(len(said), len(lines), log)
                for line, wanted in zip(said, lines):
                    self.assertRegex(line, wanted)
            self.assertEqual(resources(), before)

    def test_each_way_to_a_device_is_tried_in_turn_and_proved_before_rows_lie_there(self):
        no_dmabuf = "not reached by dma-buf: device rxe[01] refuses to register it: "
        not_written = r": proof: what the adapter wrote did not arrive: byte \d+ of \d+ is \d+, must be \d+"
        by_dmabuf, by_peer = "reached by dma-buf and proved", "reached by peer memory and proved"
        bounce = "rows lie in the host's memory, device deferred copies them"
        self.expect("", None, no_dmabuf, by_peer)
        self.expect("peer", None, no_dmabuf, "not reached by peer memory" + not_written, bounce)
        self.expect("", "takes", by_dmabuf)
        self.expect("dmabuf", "takes", "not reached by dma-buf" + not_written, by_peer)
        self.expect("dmabuf,peer", "takes", "not reached by dma-buf" + not_written, "not reached by peer memory" + not_written, bounce)

    def test_an_adapter_that_registers_a_dmabuf_and_writes_elsewhere_is_found_out(self):
        self.expect("", "lies", "not reached by dma-buf: proof: what the adapter wrote did not arrive", "reached by peer memory and proved")

    def test_rows_of_experts_lie_with_the_device_and_their_ids_with_the_host(self):
        for gate in ("attention", "ffn"):
            for wire in ("f32:f32", "fp8:bf16"):
                with self.subTest(gate=gate, wire=wire):
                    for log in self.run_pair("", None, MOE, "--wire-dtype", wire, connect_flags=("--gate", gate), lanes=3):
                        self.assertIn("reached by peer memory and proved", log)

    def test_rows_of_a_group_and_of_four_lanes_lie_with_the_device(self):
        path = self.scratch / "logits.npy"
        for layout, connect in (("1A:1F", ()), ("2A(tp2):1F", ()), ("1A:1F", ("--lanes", 4))):
            bits = {}
            for via in ("shm", "verbs"):
                with self.subTest(layout=layout, via=via, connect=connect):
                    running = self.launch(layout, MODEL, "--via", via, "--device", "deferred", "--ids", PROMPT, "--max-tokens", 3,
                                          "--logits", path, "--log", "info", *BOTH_F32, *PATIENT, *connect)
                    _, log = running.communicate(timeout=300)
                    self.assertEqual(running.returncode, 0, log)
                    self.assertEqual("reached by peer memory and proved" in log, via == "verbs", log)
                    bits[via] = path.read_bytes()
            self.assertEqual(bits["shm"], bits["verbs"])

    def test_rows_over_two_adapters_lie_with_the_device_when_both_are_proved(self):
        for log in self.run_pair("", None, lanes=4, queries=("?dev=rxe1,rxe2", "?dev=rxe2,rxe1")):
            for name in ("rxe1", "rxe2"):
                self.assertIn(f"device {name}: rows lie in memory of device deferred, reached by peer memory and proved", log)

    def test_a_fault_that_is_no_way_is_refused_by_name(self):
        listen = verbs_address()
        server, _ = self.serve(MODEL, listen=listen)
        running = self.generate(MODEL, "--ids", "1", "--ffn", listen, "--connect-timeout-ms", 3000, AFD_VERBS_FAULT="dmabuf,bus")
        _, err = running.communicate(timeout=60)
        self.assertEqual(running.returncode, 1, err)
        self.assertIn('AFD_VERBS_FAULT: "dmabuf,bus" names what is not dmabuf or peer', err)
        self.stop(server, 30)


class Bench(Case):
    def test_exchange_is_measured_beside_the_same_work_requests(self):
        at = verbs_address()
        done = self.json(self.start("afd-bench", "exchange", "--a", at, "--b", at, "--rows", 1, "--rounds", 16, "--json"), 300)
        (result,) = done["results"]
        self.assertEqual(result["medium"], "verbs")
        self.assertIn("WRITE WITH IMMEDIATE", result["floor"]["what"])
        self.assertGreater(result["floor"]["us"], 0)
        print(f"exchange over verbs: {result['us']:.0f} us, floor {result['floor']['us']:.0f} us", file=sys.stderr)

    def test_a_probe_proves_verbs_and_all_that_an_auto_server_has(self):
        for listen, proved in ((verbs_address(), {"verbs"}), (tcp_address().replace("tcp:", "auto:"), {"verbs", "shm", "tcp"})):
            with self.subTest(listen):
                server, _ = self.serve(MODEL, listen=listen)
                results = self.json(self.start("afd-bench", "probe", listen, "--json"), 60)["results"]
                self.assertEqual({result["backend"] for result in results if result["proved"]}, proved)
                for result in results:
                    if result["proved"]:
                        print(f"{result['backend']}: {result['us']:.0f} us, {result['bytes_per_second'] / 1e6:.0f} MB/s", file=sys.stderr)
                self.stop(server, 30)


class Auto(Case):
    """Another user's shared memory cannot be reached, as on another host; verbs can."""

    def as_nobody(self, *args):
        def become():
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.setuid(65534)
        process = subprocess.Popen([tool("afd-generate"), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=ENV, preexec_fn=become)
        self.processes.append(process)
        return process

    def test_auto_goes_by_verbs_where_shared_memory_is_not_proved(self):
        shell("chmod 666 /dev/infiniband/*")
        server, listen = self.serve(MODEL, "--deadline-ms", 30000, listen=tcp_address().replace("tcp:", "auto:"))
        os.chmod(self.scratch, 0o777)
        path, alone = self.scratch / "auto.npy", self.scratch / "alone.npy"
        flags = ["--model", MODEL, "--threads", 1, "--ids", PROMPT, "--max-tokens", 4, *BOTH_F32]
        running = self.as_nobody(*flags, "--logits", path, "--ffn", listen, "--log", "info", *PATIENT)
        _, err = running.communicate(timeout=300)
        self.assertEqual(running.returncode, 0, err)
        self.assertRegex(err, r"verbs:127\.0\.0\.1:\d+ is used")
        self.assertRegex(err, r"shm:auto-\w+ is not used: .*nobody listens")
        self.result(self.start("afd-generate", *flags, "--logits", alone), 300)
        self.assertEqual(path.read_bytes(), alone.read_bytes())
        self.stop(server, 30)


class Kills(test_failover.Failover):
    """All that is true of killed and stopped replicas over shm and tcp, over verbs."""

    def single(self):
        return ["--ids", PROMPT, "--max-tokens", 60, "--logits", self.scratch / "logits.npy", *PATIENT[:2]], len(PROMPT.split())

    def batch(self):
        flags, rows = super().batch()
        return [*flags[:3], 30, *flags[4:], *PATIENT[:2]], rows

    def test_a_stopped_replica_is_replaced_after_the_deadline(self):
        self.skipTest("its times are for a processor that is not emulated; the conformance suite stops peers over verbs")

    def test_without_a_replica_the_time_to_reconnect_ends_in_an_error(self):
        self.skipTest("its times are for a processor that is not emulated; the conformance suite waits for nobody over verbs")

    def test_a_key_is_proved_by_the_tools(self):
        self.skipTest("it is about TLS, which verbs: does not have; the conformance suite has keys over verbs")


test_failover.MODEL, test_failover.LAYERS, test_failover.PROMPT = MODEL, LAYERS, PROMPT
test_failover.MEDIA, test_failover.KILLS, test_failover.RETURNS = {"verbs": verbs_address}, 20 if ALL else 4, 2


class Faults(Case):
    """The line between the two ports, and who stands at its ends."""

    def tearDown(self):
        shell("tc qdisc del dev left root 2>/dev/null; ip link set left up; ip link set right up; true")
        super().tearDown()

    def begin(self, *flags, n_tokens=60):
        """A generation under way, and the address that it connects to."""
        listen, connect = across()
        self.metrics = self.scratch / "metrics"
        self.server, _ = self.serve(MODEL, "--metrics", self.metrics, listen=listen)
        self.path = self.scratch / "fault.npy"
        running = self.generate(MODEL, "--ids", PROMPT, "--max-tokens", n_tokens, "--logits", self.path, "--ffn", connect, "--log",
                                "error", "--connect-timeout-ms", 60000, *BOTH_F32, *flags)
        return running, connect

    def expect_tokens(self, running, n_tokens=60):
        self.result(running, 300)
        got = self.path.read_bytes()
        alone = self.scratch / "alone.npy"
        self.result(self.generate(MODEL, "--ids", PROMPT, "--max-tokens", n_tokens, "--logits", alone, "--kv-pages", 400,
                                  *BOTH_F32), 300)
        self.assertEqual(got, alone.read_bytes())

    def test_a_line_that_loses_delays_and_reorders_changes_no_token(self):
        for netem in ("loss 1%", "delay 20ms 10ms"):
            with self.subTest(netem):
                shell(f"tc qdisc replace dev left root netem {netem}")
                running, _ = self.begin("--deadline-ms", 20000, n_tokens=12 if "delay" in netem else 60)
                self.expect_tokens(running, 12 if "delay" in netem else 60)

    def expect_error_within(self, running, seconds, word):
        since = time.monotonic()
        try:
            _, err = running.communicate(timeout=seconds + 30)
        except subprocess.TimeoutExpired as late:
            self.fail(f"still there after {late.timeout} s, stderr {late.stderr!r}, its threads: {where_it_stands(running.pid)}")
        took = time.monotonic() - since
        self.assertEqual((running.returncode, err.count("\n")), (1, 1), err)
        self.assertIn(word, err)
        self.assertLess(took, seconds, err)

    def started(self, running):
        self.until("rows crossed", lambda: self.metric(self.metrics, "afd_ffn_rows_total") > 0, 60)
        self.assertIsNone(running.poll(), "over before the fault")

    def test_a_server_that_is_killed_is_named_within_a_second(self):
        running, connect = self.begin("--kv-pages", 4000, n_tokens=20000)
        self.started(running)
        self.server.kill()
        self.expect_error_within(running, 1 + 1, connect)

    def test_a_server_that_is_stopped_is_named_within_the_deadline_and_a_second(self):
        running, connect = self.begin("--deadline-ms", 2000, "--kv-pages", 4000, n_tokens=20000)
        self.started(running)
        self.server.send_signal(signal.SIGSTOP)
        self.expect_error_within(running, 2 + 1 + 1, connect)
        self.server.kill()

    def test_a_port_that_goes_down_ends_in_a_clear_error(self):
        running, connect = self.begin("--deadline-ms", 3000, "--kv-pages", 4000, n_tokens=20000)
        self.started(running)
        shell("ip link set left down")
        self.expect_error_within(running, 3 + 1 + 1, connect)

    def test_a_partition_of_two_seconds_changes_no_token_or_ends_in_a_clear_error(self):
        running, connect = self.begin("--deadline-ms", 8000, "--reconnect-s", 20, n_tokens=100)
        time.sleep(3)
        shell("tc qdisc replace dev left root netem loss 100%")
        time.sleep(2)
        shell("tc qdisc del dev left root")
        self.expect_tokens(running, 100)

    def test_a_hundred_peers_that_join_and_leave_leave_nothing_behind(self):
        listen = verbs_address()
        server, _ = self.serve(MODEL, listen=listen)
        descriptors = pathlib.Path(f"/proc/{server.pid}/fd")

        def held():
            status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
            return resources(), len(list(descriptors.iterdir())), int(re.search(r"VmRSS:\s+(\d+)", status)[1])

        def join():
            self.result(self.generate(MODEL, "--ids", "1 2 3", "--max-tokens", 1, "--ffn", listen, *PATIENT), 120)

        for _ in range(2):
            join()
        time.sleep(0.5)
        before = held()
        for _ in range(100 if ALL else 10):
            join()
        time.sleep(0.5)
        after = held()
        self.assertEqual(after[:2], before[:2])
        self.assertLess(after[2], before[2] + 2048, "KiB of memory")
        self.stop(server, 30)
