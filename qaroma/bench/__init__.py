"""Speed and memory of a training step, side by side with PEFT's QLoRA in one process."""
