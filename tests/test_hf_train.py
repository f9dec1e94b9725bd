"""Training through transformers, PEFT and accelerate works, and has the gradients."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from hf_models import CONFIGS, make, tokens
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import moba_fast.hf
from moba_fast.hf.sinks import attend_with_sink
from moba_ref.definition import token_mask

SMALL = {"block_size": 4, "topk": 2, "full_layers": (-1,)}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def gradients(model, ids, **options):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {
        name: x.grad.clone()
        for name, x in model.named_parameters()
        if x.grad is not None
    }


def assert_same(found, expected):
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_dense_ones_where_topk_covers_all_blocks(name):
    model, ids = make(name).train(), tokens(2, 21)
    expected = gradients(model, ids)
    moba_fast.hf.enable(model, block_size=4, topk=9, full_layers=())
    assert_same(gradients(model, ids), expected)
    moba_fast.hf.enable(model, topk=2)
    assert (gradients(model, ids)[0] - expected[0]).abs() > 1e-3


def test_a_sink_has_the_gradient_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    q, k, v = (torch.randn(13, h, 6, **options) for h in (4, 2, 2))
    sink, dout = torch.randn(4, **options), torch.randn(13, 4, 6, **options)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    offsets = {"cu_seqlens": torch.tensor([0, 5, 13]), "cu_seqlens_k": None}
    out, _ = attend_with_sink(
        *leaves, block_size=3, topk=2, **offsets, softmax_scale=0.7
    )
    found = torch.autograd.grad(out, leaves, dout)
    arrays = [x.detach().numpy() for x in (q, k)]
    mask = token_mask(*arrays, block_size=3, topk=2, cu_seqlens=[0, 5, 13])
    mask = torch.from_numpy(mask).transpose(0, 1)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = 0.7 * torch.einsum("qhd,khd->hqk", q, keys)
    scores = scores.masked_fill(~mask, -torch.inf)
    scores = torch.cat([scores, sink[:, None, None].expand(-1, 13, 1)], dim=-1)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :-1], values)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, dout))


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model, ids = moba_fast.hf.enable(make(name).train(), **SMALL), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = gradients(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, ids, attention_mask=mask), expected)


def test_padding_has_no_gradient():
    model = moba_fast.hf.enable(make("llama").train(), **SMALL)
    ids, mask = tokens(1, 25), torch.ones(1, 25, dtype=torch.long)
    mask[0, :4], labels = 0, ids.clone()
    labels[0, :5] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(
        ids, attention_mask=mask, position_ids=positions, labels=labels
    ).loss.backward()
    found = {n: x.grad.clone() for n, x in model.named_parameters()}
    model.zero_grad()
    model(ids[:, 4:], labels=labels[:, 4:]).loss.backward()
    expected = {n: x.grad for n, x in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def train(model, folder, rows=12, **options):
    torch.manual_seed(0)
    data = [{"input_ids": x, "labels": x} for x in tokens(rows, 24)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [x["loss"] for x in trainer.state.log_history if "loss" in x]


def test_trainer_learns_and_its_checkpoint_keeps_the_settings(tmp_path):
    model = moba_fast.hf.enable(make("llama"), **SMALL)
    losses = train(model, tmp_path, save_steps=6, gradient_checkpointing=True)
    assert losses[-1] < losses[0] - 0.5
    again = type(model).from_pretrained(
        tmp_path / "checkpoint-6", attn_implementation="moba"
    )
    assert again.config.moba == model.config.moba


def test_trainer_under_autocast(tmp_path):
    model = moba_fast.hf.enable(make("qwen3"), **SMALL)
    losses = train(model, tmp_path, bf16=True)
    assert losses[-1] < losses[0] - 0.5


def test_lora_trains_only_itself_and_can_be_switched(tmp_path):
    base = moba_fast.hf.enable(make("llama"), **SMALL)
    model = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    before = copy.deepcopy(base.state_dict())
    losses = train(model, tmp_path, rows=4)
    assert losses[-1] < losses[0] - 0.05
    for name, x in base.state_dict().items():
        assert torch.equal(x, before[name]) != ("lora_" in name), name
    ids = tokens(2, 21)
    with torch.no_grad():
        sparse = model.eval()(ids).logits
        dense = moba_fast.hf.disable(model)(ids).logits
        again = moba_fast.hf.enable(model, **SMALL)(ids).logits
    assert torch.equal(sparse, again)
    assert not torch.equal(sparse, dense)


def test_lora_over_a_switched_model_generates_alike():
    model, ids = moba_fast.hf.enable(make("llama"), **SMALL), tokens(1, 8).repeat(1, 3)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 10**6}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    expected = model.generate(ids, **options)
    lora = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    assert torch.equal(lora.generate(input_ids=ids, **options), expected)
    options["prompt_lookup_num_tokens"] = 3
    found = lora.generate(input_ids=ids, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)


SCRIPT = """
import sys

import torch
from accelerate import Accelerator, debug_launcher

sys.path.insert(0, {tests!r})
from hf_models import make, tokens

import moba_fast.hf


def main():
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = make("llama").train()
    moba_fast.hf.enable(model, block_size=4, topk=2, full_layers=(-1,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = torch.utils.data.DataLoader(tokens(8, 24), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(4):
        for ids in data:
            loss = model(ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    sums = torch.stack([x.detach().sum() for x in model.parameters()])
    sums = accelerator.gather(sums[None])
    equal = torch.equal(sums, sums[:1].expand_as(sums))
    if accelerator.is_main_process:
        print("RESULT", losses[0], losses[-1], len(sums), equal)


if __name__ == "__main__":
    debug_launcher(main, num_processes=2) if "two" in sys.argv else main()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerates_launchers(tmp_path, processes, capfd):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    if processes == 1:
        # What the command does, which starts the script in a process of its own.
        options = launch.launch_command_parser().parse_args(["--cpu", str(script)])
        launch.launch_command(options)
    else:
        subprocess.run([sys.executable, str(script), "two"], check=True)
    [said] = [x for x in capfd.readouterr().out.splitlines() if x.startswith("RESULT")]
    _, first, last, found, equal = said.split()
    assert (int(found), equal) == (processes, "True")
    assert float(last) < float(first) - 0.5
