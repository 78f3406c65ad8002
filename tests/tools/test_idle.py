# SPDX-License-Identifier: Apache-2.0
"""An idle server uses no CPU: spins are bounded, then it sleeps."""
import os
import pathlib
import signal
import time

from tools import MODEL, Case


class Idle(Case):
    def cpu_seconds(self, process):
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def expect_idle(self, server):
        before = self.cpu_seconds(server)
        time.sleep(10)
        self.assertLess(self.cpu_seconds(server) - before, 0.1)  # 1 % of 10 s

    def test_a_server_that_has_served_uses_under_one_per_cent_of_a_core(self):
        server, listen = self.serve(MODEL, "--metrics", self.scratch / "metrics")
        self.result(self.generate(MODEL, "--ids", "1 2 3", "--max-tokens", 50, "--ffn", listen))
        self.expect_idle(server)

    def test_a_server_with_a_peer_that_is_silent_uses_under_one_per_cent_of_a_core(self):
        metrics = self.scratch / "metrics"
        server, listen = self.serve(MODEL, "--metrics", metrics)
        peer = self.generate(MODEL, "--ids", "1", "--max-tokens", 200000, "--kv-pages", 20000, "--log", "error", "--ffn", listen)
        self.until("the peer is at work", lambda: self.metric(metrics, "afd_ffn_rows_total") > 100)
        peer.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        self.expect_idle(server)
