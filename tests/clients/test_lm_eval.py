"""lm-eval on tasks of our own: the likelihoods that it is told through `/v1/completions` are those of transformers."""

import json
import subprocess
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from tests.clients.checkpoint import ROOT
from tests.clients.conftest import MANTA
from tests.clients.samples import MODEL, PATIENCE_S

DOCUMENTS: list[dict[str, Any]] = [
    {"question": "import", "choices": [" os\n", " the weather"], "answer": 0},
    {"question": "def add(self, other):\n    return", "choices": [" self.copy()", " class class"], "answer": 0},
    {"question": "for line in", "choices": [" lines:", "))))"], "answer": 0},
]
CHOOSE = """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 16, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choose", CHOOSE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(kind: str, url: str, checkpoint: Path, task: str, tasks: TaskManager, **settings: Any) -> Any:
    given = {"base_url": url, "model": MODEL, "tokenizer": str(checkpoint), "num_concurrent": 2, "timeout": int(PATIENCE_S)}
    return lm_eval.simple_evaluate(
        model=kind, model_args=given, tasks=[task], task_manager=tasks, bootstrap_iters=0, **settings
    )


def test_likelihoods(base_url: str, checkpoint: Path, tasks: TaskManager) -> None:
    found = evaluated("local-completions", f"{base_url}/completions", checkpoint, "choose", tasks)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pairs = []
    for document in DOCUMENTS:
        context = tokenizer(document["question"])["input_ids"]
        whole = [tokenizer(document["question"] + choice)["input_ids"] for choice in document["choices"]]
        pairs += [(ids[: len(context)], ids[len(context) :]) for ids in whole]
    command = [str(Path(MANTA).with_name("python")), "-m", "tests.clients.likelihoods", str(checkpoint)]
    ran = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, cwd=ROOT, check=True)
    told = [float(answer[0][0]) for sample in found["samples"]["choose"] for answer in sample["resps"]]
    assert told == pytest.approx(json.loads(ran.stdout.splitlines()[-1]), abs=1e-3)
    right = [max((0, 1), key=lambda place: told[2 * number + place]) == 0 for number in range(len(DOCUMENTS))]
    assert found["results"]["choose"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_what_is_written(base_url: str, checkpoint: Path, tasks: TaskManager) -> None:
    found = evaluated("local-completions", f"{base_url}/completions", checkpoint, "write", tasks)
    texts = [sample["resps"][0][0] for sample in found["samples"]["write"]]
    assert len(texts) == len(DOCUMENTS)
    assert all(texts)
    assert not any("\n\n" in text for text in texts)


def test_what_is_written_in_a_chat(base_url: str, checkpoint: Path, tasks: TaskManager) -> None:
    url = f"{base_url}/chat/completions"
    found = evaluated("local-chat-completions", url, checkpoint, "write", tasks, apply_chat_template=True)
    assert len([sample["resps"][0][0] for sample in found["samples"]["write"]]) == len(DOCUMENTS)
