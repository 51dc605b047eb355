"""One SGD step of every trainable head with the stock Trainer on two packed bins: `one_step.py OUTPUT`.

In one process the bins are accumulated; under `torchrun --nproc_per_node 2` each rank takes one.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from hf_ehr import MedBertConfig, MedBertForMaskedLM, MedBertForPreTraining, MedBertForSequenceClassification


class TwoBins(torch.utils.data.Dataset):
    """Four patients of six codes a bin; everything a bin holds depends on its index alone."""

    def __init__(self, per_code: bool, stays: bool):
        self.per_code, self.stays = per_code, stays

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        codes = torch.randint(5, 50, (1, 24), generator=generator)
        batch = {"input_ids": codes, "cu_seqlens": torch.arange(0, 25, 6, dtype=torch.int32), "max_seqlen": 6}
        outcome = torch.randint(0, 2, (4,), generator=generator)
        if not self.per_code:
            return {"labels": outcome, **batch}
        batch["labels"] = torch.where(torch.arange(24)[None] % 6 == index, codes, -100)
        return batch | ({"prolonged_stay_labels": outcome} if self.stays else {})


def main(output: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    config = MedBertConfig.tiny(vocab_size=50, hidden_size=16, num_attention_heads=2, hidden_dropout_prob=0.0)
    heads = (
        (MedBertForMaskedLM, True, False),
        (MedBertForPreTraining, True, True),
        (MedBertForSequenceClassification, False, False),
    )
    for model_class, per_code, stays in heads:
        torch.manual_seed(0)
        model = model_class(config)
        arguments = TrainingArguments(
            output_dir=str(output / "trainer"), max_steps=1, per_device_train_batch_size=1, optim="sgd",
            gradient_accumulation_steps=2 // ranks, learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0,
            use_cpu=True, save_strategy="no", disable_tqdm=True, report_to="none",
        )  # fmt: skip
        dataset = TwoBins(per_code, stays)
        Trainer(model, arguments, lambda rows: rows[0], train_dataset=dataset).train()
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(model.state_dict(), output / f"{model_class.__name__}-{ranks}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # without it a rank may abort while it exits


if __name__ == "__main__":
    main(Path(sys.argv[1]))
