# SPDX-License-Identifier: Apache-2.0
"""Attention peers that join and leave a server under load: nobody's tokens change, and nothing of them is left there."""
import os
import pathlib
import random
import signal
import sys
import threading
import time

from tools import MODEL, Case, address, segments, tcp_address

N_VISITORS = 100 if os.environ.get("AFD_ALL") == "1" else 8
STEADY = ["--ids", "17 4 2", "--max-tokens", 800, "--log", "error"]
VISIT = ["--ids", "99 3 8 1", "--max-tokens", 60, "--log", "error"]
GROWTH_KIB = 1024  # of memory that no peer has any more


class Membership(Case):
    def held(self):
        """Descriptors, mapped segments and KiB of the server when nobody is joined."""
        self.until("all have left", lambda: self.metric(self.metrics, "afd_ffn_peers") == 0)
        proc = pathlib.Path(f"/proc/{self.server.pid}")
        maps = (proc / "maps").read_text()
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return len(os.listdir(proc / "fd")), maps.count("memfd:"), int(status["VmRSS"].split()[0])

    def keep_busy(self, want, stop, wrong):
        """One generation after another, all with the same tokens."""
        while not stop.is_set():
            running = self.generate(MODEL, *STEADY, "--ffn", self.listen)
            out, err = running.communicate(timeout=120)
            if out != want:
                wrong.append((running.returncode, out, err))

    def visit(self, moments, want):
        """Stays to its end, is interrupted, or dies; True when it stayed."""
        visitor = self.generate(MODEL, *VISIT, "--ffn", self.listen)
        how = moments.choice((None, None, signal.SIGINT, signal.SIGKILL))
        if how:
            time.sleep(moments.uniform(0, 0.15))
            visitor.send_signal(how)
        out, err = visitor.communicate(timeout=120)
        if not how or visitor.returncode == 0:
            self.assertEqual((visitor.returncode, out), (0, want), err)
        return not how

    def come_and_go(self, scheme, listen):
        seed = random.randrange(1 << 30)
        moments = random.Random(seed)
        self.metrics = self.scratch / f"{scheme}.metrics"
        self.server, self.listen = self.serve(MODEL, "--metrics", self.metrics, listen=listen)
        wants = [self.result(self.generate(MODEL, *flags)) for flags in (STEADY, VISIT)]
        for _ in range(4):  # what is allocated once is
            self.visit(random.Random(1), wants[1])
        before, stop, wrong = self.held(), threading.Event(), []
        busy = [threading.Thread(target=self.keep_busy, args=(wants[0], stop, wrong)) for _ in range(2)]
        for thread in busy:
            thread.start()
        try:
            stayed = sum(self.visit(moments, wants[1]) for _ in range(N_VISITORS))
        finally:
            stop.set()
            for thread in busy:
                thread.join()
        self.assertEqual(wrong, [])
        after = self.held()
        print(f"{scheme}, seed {seed}: {N_VISITORS} visitors, of whom {stayed} stayed; descriptors, segments, KiB before {before}, "
              f"after {after}", file=sys.stderr)
        self.assertEqual(before[:2], after[:2])
        self.assertLess(after[2], before[2] + GROWTH_KIB)
        self.stop(self.server)

    def test_peers_that_come_and_go_over_shm_change_no_token_and_leave_nothing(self):
        before = segments()
        self.come_and_go("shm", address())
        self.assertEqual(segments(), before)

    def test_peers_that_come_and_go_over_tcp_change_no_token_and_leave_nothing(self):
        self.come_and_go("tcp", tcp_address())
