"""Six steps on a GPU, for test_fsdp_gpu.py: `gpu_fsdp.py FOLDER`. Under accelerate's FSDP2 if it was launched so."""

import json
import sys
from pathlib import Path

from small_run import small_model, small_trainer

OPTIONS = {"use_cpu": False, "bf16": False, "save_steps": 3, "max_steps": 6, "logging_steps": 1, "eval_strategy": "no"}


def main(folder):
    trainer = small_trainer(folder, model=small_model(attention_dropout=0.0), **OPTIONS)
    trainer.train(resume_from_checkpoint="auto")
    if trainer.is_world_process_zero():
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        result = {"losses": losses, "sharded": trainer.is_fsdp_enabled}
        (Path(folder) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
