"""The bookkeeping imports with torch and ray out of reach: it is what runs in the simulator and in the scheduler actor."""

import json
import subprocess
import sys
from pathlib import Path

PURE = [
    "kvcache",
    "kvcache.layout",
    "scheduler.placement.admission",
    "scheduler.core",
    "scheduler.state.invariants",
    "scheduler.server.server",
    "scheduler.server.stats",
    "workers.sampling.constraints",
    "workers.sampling.grammar",
    "workers.loop.leader",
    "workers.loop.link",
    "workers.loop.reports",
    "workers.model.config.architectures",
    "workers.model.config.fields",
    "workers.model.reading",
    "workers.model.config.rope_settings",
    "workers.model.config.rope",
]


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, in which nothing has been imported."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_imports_with_torch_and_ray_blocked() -> None:
    """Each module by itself: in a copy of a process that has imported none of the others."""
    code = (
        "import importlib, os, sys, msgspec, numpy\n"
        "sys.modules.update(dict.fromkeys(('torch', 'ray', 'transformers')))\n"
        "for module in sys.argv[1:]:\n"
        "    if not (child := os.fork()):\n"
        "        importlib.import_module(module)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        sys.exit(module)"
    )
    result = run(code, *PURE)
    assert result.returncode == 0, result.stderr


def test_a_cpu_needs_no_triton() -> None:
    """It is not on every platform, and takes a second to import."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import cluster.local.process, workers.process.actor, workers.process.build\n"
        "import workers.attention.select, workers.execution.cpu.runner"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_whoever_places_workers_or_answers_clients_waits_for_no_torch() -> None:
    """A second or two of each process's start."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers')))\n"
        "import cluster.launch, deploy.app\n"
        "from deploy.config.load import EMBEDDED_MODEL\n"
        "from deploy.text.prompts import read_model_limits\n"
        "assert read_model_limits(EMBEDDED_MODEL, None).vocab_size > 0"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_process_that_only_tokenises_reads_its_model_without_torch(tmp_path: Path) -> None:
    """One of transformers' models too: its limits are config.json's; whether the class can be served is found by whoever starts
    the engine."""
    fields = {"model_type": "gemma", "vocab_size": 199, "max_position_embeddings": 512, "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from deploy.text.without_torch import import_without_torch\n"
        "import_without_torch()\n"
        "from deploy.config.load import EMBEDDED_MODEL\n"
        "from deploy.frontend.service.model import ServedModel\n"
        "from deploy.text.prompts import read_model_limits\n"
        "model = ServedModel.read('tiny', EMBEDDED_MODEL, None)\n"
        "assert model.tokenizer.encode(model.tokenizer.template.rendered([{'role': 'user', 'content': 'hello'}]))\n"
        f"limits = read_model_limits(Path({str(tmp_path)!r}), None, 2)\n"
        "assert (limits.vocab_size, limits.max_tokens, limits.eos_ids) == (199, 512, (7,)), limits\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert torch.ones(1).sum() == 1"
    )
    result = run(code)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
