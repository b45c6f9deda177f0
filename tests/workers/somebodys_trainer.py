"""A Hugging Face script that knows nothing of smartfrz_ds. test_hf.py runs it unchanged."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(args.seed)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0))


class Counting(torch.utils.data.Dataset):
    """Texts that count up from somewhere, modulo 64."""

    def __len__(self):
        return 128

    def __getitem__(self, index):
        ids = (torch.arange(16) + index) % 64
        return {"input_ids": ids, "labels": ids}


trainer = Trainer(model=model, args=args, train_dataset=Counting(), eval_dataset=Counting())
trainer.train()
trainer.save_model()
trainer.save_metrics("eval", trainer.evaluate())
trainer.save_state()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
