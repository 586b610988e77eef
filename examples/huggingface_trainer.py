"""transformers.Trainer on a small vision transformer: `python examples/huggingface_trainer.py`."""

import argparse
import tempfile

from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import sib_fast
from sib_fast.integrations.huggingface import SIBTrainer
from sib_fast.lab.data import EmbeddedDigits


class Rows(Dataset):
    """The embedded digits as Hugging Face names things."""

    def __init__(self, *args, **kwargs) -> None:
        self.digits = EmbeddedDigits(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict:
        image, label, _ = self.digits[index]
        return {"pixel_values": image, "labels": int(label)}


def main(steps: int = 60, batch_size: int = 32) -> dict[str, float]:
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=4,
            num_labels=10, attn_implementation="eager",  # S-IB: fused attention has no second derivative
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-3,
            logging_steps=min(10, steps), report_to="none", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=7)
        trainer = SIBTrainer(model, arguments, train_dataset=Rows("train", steps * batch_size), criterion=criterion)  # S-IB
        trainer.train()
    return next(line for line in reversed(trainer.state.log_history) if "loss" in line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
