"""
Two CPU processes train a tiny GPT-2 for two steps under ZeRO-1, 2 and 3 and save DeepSpeed's shards alone.

`torchrun --nproc_per_node 2 tests/support/zero_shards.py FOLDER`: a checkpoint a stage, as the Trainer leaves it
with stage3_gather_16bit_weights_on_model_save off.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=33, n_embd=10, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        model.transformer.wpe.weight.requires_grad = False
        biases = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
        others = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=1e-2),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        for _ in range(2):
            tokens = torch.randint(0, 33, (2, 8))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        checkpoint = folder / f"zero{stage}" / "checkpoint-2"
        engine.save_checkpoint(str(checkpoint), tag="global_step2")
        if engine.global_rank == 0:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(checkpoint)
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
