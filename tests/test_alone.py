"""Exporting, loading and verifying open no connection; the only program that is started is Python, for `isolated`."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
import torch
from tiny import tiny_llama
from torch_to_nnef import TractModel, isolated, quantize_and_verify
from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions

folder = Path(sys.argv[1])
source = tiny_llama(folder / "source")
seen = []
NETWORK = {"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
PROGRAMS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen"}
sys.addaudithook(lambda event, arguments: event in NETWORK | PROGRAMS and seen.append((event, str(arguments[0]))))
assert quantize_and_verify(torch.nn.Linear(32, 4), torch.ones(1, 32), folder / "m.nnef.tgz").ok
TractModel.load(folder / "m.nnef.tgz")
assert export_llm(LlmOptions(local_dir=source, export_dirpath=folder / "llm", dump_with_tokenizer_and_conf=True)).ok
print(seen)
isolated.verify(folder / "m.nnef.tgz")
assert {(event, program) for event, program in seen} == {("subprocess.Popen", sys.executable)}, seen
"""


def test_no_connections_and_no_programs(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent / "llm")])}
    command = [sys.executable, "-c", SCRIPT, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
