"""The lm-evaluation-harness runs a saved model with MoBA by its own command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_models import logits, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moba_fast.hf

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: ["a", "b", "c"]
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold a model with settings, a tokenizer of characters, and a task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    alphabet = ["<pad>", "<s>", "</s>", *map(chr, range(ord("A"), ord("z"))), " ", "."]
    words = {x: i for i, x in enumerate(alphabet)}
    letters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )
    model = make("llama", vocab_size=len(alphabet))
    moba_fast.hf.enable(model, block_size=4, topk=2, full_layers=())
    for x in (model, tokenizer):
        x.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 26, (16, 40), generator=generator).tolist()
    rows = [
        {
            "question": "".join(chr(ord("a") + i) for i in draw[: 10 + n]),
            "answer": draw[0] % 3,
        }
        for n, draw in enumerate(draws)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.yaml").write_text(TASK.format(data=data))
    return folder


def evaluate(folder):
    """Run the harness; return the log-likelihoods that it found of every answer."""
    command = [sys.executable, "-m", "moba_fast.hf", "lm_eval"]
    command += ["--model", "hf", "--tasks", "letters", "--device", "cpu"]
    command += ["--include_path", str(folder / "tasks"), "--batch_size", "5"]
    arguments = f"pretrained={folder}/model,dtype=float32,attn_implementation=moba"
    command += ["--model_args", arguments, "--log_samples"]
    command += ["--output_path", str(folder / "results")]
    alone = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    alone["HF_HOME"] = str(folder / "home")
    result = subprocess.run(
        command, env=os.environ | alone, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "letters" in result.stdout
    [samples] = (folder / "results").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=by_number)
    return torch.tensor([[float(x[0]) for x in row["filtered_resps"]] for row in rows])


def by_number(row):
    return row["doc_id"]


def test_the_harness_finds_the_likelihoods_of_moba(folder):
    found = evaluate(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    texts = [[row["question"] + answer for answer in "abc"] for row in rows]

    def likelihoods():
        return torch.tensor(
            [[likelihood(model, tokenizer, x) for x in row] for row in texts]
        )

    dense = likelihoods()
    moba_fast.hf.enable(model)
    torch.testing.assert_close(found, likelihoods(), rtol=1e-4, atol=1e-3)
    assert (found - dense).abs().max() > 0.1


def likelihood(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    return logits(model, ids)[0, -2].log_softmax(-1)[ids[0, -1]].item()


def test_a_program_gets_its_arguments_and_the_defaults(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import sys\n"
        "from moba_fast.hf.settings import settings_of\n"
        "print(sys.argv[1:], settings_of(None))\n"
    )
    settings = ["--block-size", "512", "--topk", "3", "--full-layers=-1,0"]
    result = subprocess.run(
        [sys.executable, "-m", "moba_fast.hf", *settings, str(script), "--topk", "7"],
        capture_output=True,
        text=True,
    )
    expected = {"block_size": 512, "topk": 3, "full_layers": [-1, 0], "decode": "full"}
    assert result.stdout == f"['--topk', '7'] {expected}\n", result.stderr
