"""Fine-tuning an export. Each function is one use: its docstring says in the table what was tried."""

from pathlib import Path

import torch
from opened import CLOSE, TEXTS, logits_of, model_of, some_ids, tokenizer_of
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

QUIET = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=1)
STEPS = dict(max_steps=8, per_device_train_batch_size=3, learning_rate=1e-2, **QUIET)


def rows(export: Path) -> list[dict]:
    return [{"input_ids": tokenizer_of(export)(text)["input_ids"]} for text in TEXTS * 4]


def mean_loss(model: PreTrainedModel, export: Path) -> float:
    """Mean over the texts of the loss of each alone."""
    model.eval()
    with torch.no_grad():
        ids = [torch.tensor([row["input_ids"]]) for row in rows(export)[: len(TEXTS)]]
        return sum(model(x, labels=x, use_cache=False).loss.item() for x in ids) / len(ids)


def trainer(export: Path, tmp: Path) -> None:
    """Trainer with evaluation at steps, evaluate, predict, the best model at the end, and resume"""
    model, tokenizer = model_of(export), tokenizer_of(export)
    before = mean_loss(model, export)
    options = STEPS | dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4)
    arguments = TrainingArguments(tmp / "out", load_best_model_at_end=True, **options)
    data = dict(train_dataset=rows(export), eval_dataset=rows(export)[: len(TEXTS)])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    run = Trainer(model, arguments, data_collator=collator, **data)
    run.train()
    after = mean_loss(model, export)
    assert after < before - 0.5, (before, after)
    assert abs(run.evaluate()["eval_loss"] - run.predict(data["eval_dataset"]).metrics["test_loss"]) < 1e-5
    assert run.predict(data["eval_dataset"]).predictions.shape[-1] == model.config.vocab_size
    again = Trainer(model_of(export), TrainingArguments(tmp / "out", **options), data_collator=collator, **data)
    again.train(resume_from_checkpoint=str(tmp / "out" / "checkpoint-4"))
    assert again.state.global_step == 8


def gradient_checkpointing(export: Path, tmp: Path) -> None:
    """Trainer with gradient checkpointing, accumulation and bf16"""
    model = model_of(export)
    before = mean_loss(model, export)
    arguments = TrainingArguments(tmp, gradient_checkpointing=True, gradient_accumulation_steps=2, bf16=True, **STEPS)
    collator = DataCollatorForLanguageModeling(tokenizer_of(export), mlm=False)
    Trainer(model, arguments, train_dataset=rows(export), data_collator=collator).train()
    assert mean_loss(model, export) < before - 0.5


def flattened(export: Path, tmp: Path) -> None:
    """DataCollatorWithFlattening: the packed loss is that of the texts alone"""
    model, texts = model_of(export), rows(export)[: len(TEXTS)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)
    with torch.no_grad():
        packed = model(**{name: value for name, value in batch.items()}, use_cache=False).loss.item()
        losses = []
        for row in texts:
            ids = torch.tensor([row["input_ids"]])
            logits = logits_of(model, ids)[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert abs(packed - torch.cat(losses).mean().item()) < 1e-4


def lora(export: Path, tmp: Path) -> None:
    """LoRA of peft on all linear layers: train, save, load, merge"""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(model_of(export), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = mean_loss(model, export)
    collator = DataCollatorForLanguageModeling(tokenizer_of(export), mlm=False)
    Trainer(model, TrainingArguments(tmp / "out", **STEPS), train_dataset=rows(export), data_collator=collator).train()
    model.eval()
    assert mean_loss(model, export) < before - 0.1
    model.save_pretrained(tmp / "adapter")
    again = PeftModel.from_pretrained(model_of(export), tmp / "adapter").eval()
    expected = logits_of(model, some_ids())
    torch.testing.assert_close(logits_of(again, some_ids()), expected, **CLOSE)
    torch.testing.assert_close(logits_of(again.merge_and_unload(), some_ids()), expected, rtol=0, atol=1e-3)
    again.generate(input_ids=some_ids(1), attention_mask=torch.ones_like(some_ids(1)), max_new_tokens=3)


def sft(export: Path, tmp: Path) -> None:
    """SFTTrainer of trl: plain, packed, without padding"""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": text} for text in TEXTS * 4])
    for choice in ({}, {"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}):
        model = model_of(export)
        before = mean_loss(model, export)
        options = STEPS | dict(bf16=False, max_length=64) | choice
        run = SFTTrainer(
            model,
            args=SFTConfig(str(tmp / "out"), **options),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer_of(export),
        )
        run.train()
        run.evaluate()
        assert mean_loss(model, export) < before - 0.3, choice


def dpo(export: Path, tmp: Path) -> None:
    """DPOTrainer of trl: the chosen answers gain on the rejected ones"""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in TEXTS * 2]
    run = DPOTrainer(
        model_of(export),
        ref_model=model_of(export),
        args=DPOConfig(str(tmp / "out"), **(STEPS | dict(bf16=False, max_length=64, learning_rate=1e-3))),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer_of(export),
    )
    run.train()
    assert run.evaluate()["eval_rewards/margins"] > 0.01


USES = (trainer, gradient_checkpointing, flattened, lora, sft, dpo)
