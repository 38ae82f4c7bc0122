"""Ranks that hand buckets to the servers beside them: who gets which bytes, and how all learn what went wrong on one."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from crew_worker import BUCKET_BYTES, SYNCS, TENSORS

from torl_mega.process.start import free_port
from torl_mega.serving.sync.buckets import make_buckets

WORKER = Path(__file__).with_name("crew_worker.py")


@contextmanager
def server(refuse: int) -> Iterator[tuple[str, list[list[str]]]]:
    """URL of a server that keeps the payloads of each request, and the payloads; it refuses request `refuse`."""
    kept: list[list[str]] = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["load_format"]) == ("/update_weights_from_tensor", "flattened_bucket")
            kept.append(body["serialized_named_tensors"])
            self.send_response(500 if len(kept) == refuse else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Keep) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", kept
        http.shutdown()


def content(text: str) -> bytes:
    return pickle.loads(base64.b64decode(text))["flattened_tensor"].numpy().tobytes()


def test_each_server_rank_gets_its_bytes_from_the_rank_beside_it_and_all_learn_of_a_failure(tmp_path: Path) -> None:
    flats = [b.flatten_into(torch.empty(b.num_bytes, dtype=torch.uint8)) for b in make_buckets(TENSORS, BUCKET_BYTES)]
    sent = [flat.numpy().tobytes() for flat in flats]
    wrong = [bytes([flat[0] ^ 1]) + flat[1:] for flat in sent]
    assert len(sent) == 3
    with ExitStack() as stack:
        servers = [stack.enter_context(server(refuse)) for refuse in (0, 0, len(sent) + 2)]
        (a, at_a), (b, at_b), (c, at_c) = servers
        owners = json.dumps({a: [0], b: [1, 2], c: [2]})
        common = {
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        env = {**os.environ, **common, "PYTHONPATH": str(WORKER.parents[2])}
        outs = [tmp_path / f"rank_{rank}.json" for rank in range(3)]
        ranks = [
            stack.enter_context(
                subprocess.Popen([sys.executable, str(WORKER), owners, str(out)], env={**env, "RANK": str(rank)})
            )
            for rank, out in enumerate(outs)
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0, -signal.SIGKILL]

    first = slice(0, len(sent))  # what the first sync sent
    assert [[content(p) for p in payloads] for payloads in at_a[first]] == [[flat] for flat in sent]
    assert [[content(p) for p in payloads] for payloads in at_b[first]] == [
        [x, y] for x, y in zip(sent, wrong, strict=True)
    ]
    assert [[content(p) for p in payloads] for payloads in at_c[first]] == [[flat] for flat in wrong]

    said = [dict(zip(SYNCS, json.loads(out.read_text()), strict=False)) for out in outs]
    for rank in (0, 1):
        lost = said[rank].pop("rank 2 dies")
        assert lost.startswith("trainer ranks 0, 1, 2 in a weight sync: ")
        assert "\n" not in lost
    assert said[0] == said[1] == said[2]
    assert said[0]["wrong byte on rank 2"] == said[0]["good"] == ""
    assert said[0]["a server refuses"].startswith(f"{c}/update_weights_from_tensor answered HTTP 500")
    assert said[0]["a server of another size"] == f"{b} has 3 ranks, the placement says 2; plan again"
    assert said[0]["rank 0 gives up early"] == "no server answers"
    assert said[0]["rank 0 gives up late"] == "no slices"
